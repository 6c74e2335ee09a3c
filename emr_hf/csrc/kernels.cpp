// The loops over whole models: the election, the rebuild of a task's weights, and the least-squares fits.
//
// Plain C interface, no Python or torch headers: emr_hf/kernels.py loads it with ctypes and falls back to torch where it
// is missing. Every function here gives, bit for bit, what its torch version in election.py, bits.py, fitting.py or
// lowbit.py gives; those are the definitions, and the tests compare the two.
//
// body.h and fit.h are compiled once for the plain architecture and, on x86-64, once more for AVX2.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EMR_HAS_AVX2 1
#include <immintrin.h>
#endif

namespace {

// Dtypes, and a task vector in place of weights. The numbers are those of emr_hf/kernels.py.
enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, TASK_VECTOR = 3 };

// Terms that are summed with one scale, what is added up before Python sees it, and bits of a term. Those of
// election.py.
constexpr int64_t SEGMENT = 1 << 10;
constexpr int64_t UNIT = 1 << 14;
constexpr int WHOLE = 26;
// Tasks stand further apart than a power of two, or they would fall on the same lines of the cache.
constexpr int64_t STRIDE = SEGMENT + 16;

enum Result : int32_t { DONE = 0, NOT_FINITE = 1, OVERFLOWS = 2 };

}  // namespace

#define EMR_BODY plain
#include "body.h"
#include "fit.h"
#undef EMR_BODY

#ifdef EMR_HAS_AVX2
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt")
#define EMR_BODY avx2
#define EMR_AVX2 1
#include "body.h"
#include "fit.h"
#undef EMR_AVX2
#undef EMR_BODY
#pragma GCC pop_options
#endif

namespace {

bool fast() {
#ifdef EMR_HAS_AVX2
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

}  // namespace

extern "C" {

// Bytes of scratch that emr_elect needs.
int64_t emr_elect_scratch(int64_t tasks) { return ((tasks + 1) * STRIDE + tasks) * (int64_t)sizeof(float); }

// See body.h. `level`: 0 for the plain body, 1 for the fastest that the processor has.
int32_t emr_elect(int32_t level, int64_t count, int64_t tasks, const void *base, int32_t base_kind,
                  const void *const *finetunes, const int32_t *kinds, void *tau, int32_t tau_kind,
                  uint8_t *const *masks, double *sums, int64_t *counts, double *squares, float *scratch) {
#ifdef EMR_HAS_AVX2
    if (level && fast())
        return avx2::elect(count, tasks, base, base_kind, finetunes, kinds, tau, tau_kind, masks, sums, counts,
                           squares, scratch);
#endif
    return plain::elect(count, tasks, base, base_kind, finetunes, kinds, tau, tau_kind, masks, sums, counts, squares,
                        scratch);
}

void emr_rebuild(int32_t level, int64_t count, const void *base, int32_t base_kind, const void *tau, int32_t tau_kind,
                 const uint8_t *mask, float minus_rescaler, void *out, int32_t out_kind) {
#ifdef EMR_HAS_AVX2
    if (level && fast())
        return avx2::rebuild(count, base, base_kind, tau, tau_kind, mask, minus_rescaler, out, out_kind);
#endif
    plain::rebuild(count, base, base_kind, tau, tau_kind, mask, minus_rescaler, out, out_kind);
}

// How many tasks the two below take.
int64_t emr_fit_tasks() { return plain::MOST_TASKS; }

// See fit.h.
void emr_fit_vector(int32_t level, int64_t count, int64_t tasks, const float *taus, const float *rescalers,
                    float *out) {
#ifdef EMR_HAS_AVX2
    if (level && fast()) return avx2::fit_vector(count, tasks, taus, rescalers, out);
#endif
    plain::fit_vector(count, tasks, taus, rescalers, out);
}

void emr_two_levels(int32_t level, int64_t count, int64_t tasks, const float *values, float *low, float *high) {
#ifdef EMR_HAS_AVX2
    if (level && fast()) return avx2::two_levels(count, tasks, values, low, high);
#endif
    plain::two_levels(count, tasks, values, low, high);
}

void emr_compare(int32_t level, int64_t count, int64_t tasks, const float *taus, const float *used,
                 const float *shift, const float *rescalers, int32_t of_moves, uint8_t *const *masks, double *sums,
                 int64_t *counts) {
#ifdef EMR_HAS_AVX2
    if (level && fast())
        return avx2::compare(count, tasks, taus, used, shift, rescalers, of_moves, masks, sums, counts);
#endif
    plain::compare(count, tasks, taus, used, shift, rescalers, of_moves, masks, sums, counts);
}

void emr_decode(int32_t level, int64_t count, int64_t start, int64_t columns, int64_t bits, const uint8_t *codes,
                const float *scales, float *out) {
#ifdef EMR_HAS_AVX2
    if (level && fast()) return avx2::decode(count, start, columns, bits, codes, scales, out);
#endif
    plain::decode(count, start, columns, bits, codes, scales, out);
}

}  // extern "C"
