// Included by kernels.cpp once for each instruction set, each time into a namespace of its own.
//
// Eight elements at a time, which is one byte of a mask. What is left over at the end of a tensor is filled up with
// zeros: a task vector of zeros elects nothing and adds nothing.

namespace EMR_BODY {
namespace {

typedef float f8 __attribute__((vector_size(32)));
typedef int32_t i8 __attribute__((vector_size(32)));
typedef double d4 __attribute__((vector_size(32)));
typedef int64_t l4 __attribute__((vector_size(32)));
typedef uint64_t ul4 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));

constexpr int32_t SIGN = INT32_MIN, MAGNITUDE = INT32_MAX, INFINITE = 0x7f800000;

inline f8 as_float(i8 x) { return (f8)x; }
inline i8 as_int(f8 x) { return (i8)x; }

#ifdef EMR_AVX2  // what the compiler would otherwise do in halves of halves
inline d4 low(f8 x) { return (d4)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)); }
inline d4 high(f8 x) { return (d4)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)); }
inline f8 narrow(d4 low, d4 high) { return (f8)_mm256_set_m128(_mm256_cvtpd_ps((__m256d)high), _mm256_cvtpd_ps((__m256d)low)); }
#else
inline d4 low(f8 x) { return d4{x[0], x[1], x[2], x[3]}; }
inline d4 high(f8 x) { return d4{x[4], x[5], x[6], x[7]}; }
inline f8 narrow(d4 low, d4 high) {
    return f8{(float)low[0],  (float)low[1],  (float)low[2],  (float)low[3],
              (float)high[0], (float)high[1], (float)high[2], (float)high[3]};
}
#endif

inline bool any(i8 x) {
#ifdef EMR_AVX2
    return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
    int32_t found = 0;
    for (int lane = 0; lane < 8; lane++) found |= x[lane];
    return found != 0;
#endif
}

inline i8 larger(i8 x, i8 y) { return x > y ? x : y; }

inline int32_t largest_of(i8 x) {
    int32_t largest = 0;
    for (int lane = 0; lane < 8; lane++) largest = x[lane] > largest ? x[lane] : largest;
    return largest;
}

// One bit a lane, from lanes of all zeros or all ones.
inline uint8_t to_bits(i8 lanes) {
#ifdef EMR_AVX2
    return (uint8_t)_mm256_movemask_ps((__m256)lanes);
#else
    uint8_t bits = 0;
    for (int lane = 0; lane < 8; lane++) bits |= (uint8_t)((lanes[lane] & 1) << lane);
    return bits;
#endif
}

inline int64_t ones(const uint8_t *bytes, int64_t count) {
    int64_t found = 0, i = 0;
    for (uint64_t word; i + 8 <= count; i += 8) {
        memcpy(&word, bytes + i, sizeof word);
        found += __builtin_popcountll(word);
    }
    for (; i < count; i++) found += __builtin_popcount(bytes[i]);
    return found;
}

inline i8 from_bits(uint8_t bits) {
    const i8 place = {1, 2, 4, 8, 16, 32, 64, 128};
    return (((int32_t)bits & place) != 0);
}

template <int KIND>
inline f8 load(const void *from, int64_t index) {
    if (KIND == BFLOAT16) {
#ifdef EMR_AVX2
        const __m128i raw = _mm_loadu_si128((const __m128i *)((const uint16_t *)from + index));
        return (f8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16);
#else
        u16x8 raw;
        memcpy(&raw, (const uint16_t *)from + index, sizeof raw);
        return (f8)(__builtin_convertvector(raw, u32x8) << 16);
#endif
    }
    if (KIND == FLOAT16) {
#ifdef EMR_AVX2
        return (f8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)from + index)));
#else
        _Float16 raw[8];
        memcpy(raw, (const uint16_t *)from + index, sizeof raw);
        f8 value;
        for (int lane = 0; lane < 8; lane++) value[lane] = (float)raw[lane];
        return value;
#endif
    }
    f8 value;
    memcpy(&value, (const float *)from + index, sizeof value);
    return value;
}

// Rounds to nearest, ties to even, as torch does.
inline u16x8 to_bfloat16(f8 value) {
    u32x8 bits = (u32x8)value;
    u32x8 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    u32x8 result = value == value ? rounded : (rounded & 0) + 0x7fc0;
    return __builtin_convertvector(result, u16x8);
}

template <int KIND>
inline void store(void *to, int64_t index, f8 value) {
    if (KIND == BFLOAT16) {
        u16x8 raw = to_bfloat16(value);
        memcpy((uint16_t *)to + index, &raw, sizeof raw);
    } else if (KIND == FLOAT16) {
#ifdef EMR_AVX2
        _mm_storeu_si128((__m128i *)((uint16_t *)to + index), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
        _Float16 raw[8];
        for (int lane = 0; lane < 8; lane++) raw[lane] = (_Float16)value[lane];
        memcpy((uint16_t *)to + index, raw, sizeof raw);
#endif
    } else {
        memcpy((float *)to + index, &value, sizeof value);
    }
}

constexpr int64_t size_of(int kind) { return kind == BFLOAT16 || kind == FLOAT16 ? 2 : 4; }

// The same for the last few elements of a tensor.
template <int KIND>
inline f8 load_some(const void *from, int64_t index, int64_t count) {
    char padded[32] = {0};
    memcpy(padded, (const char *)from + index * size_of(KIND), count * size_of(KIND));
    return load<KIND>(padded, 0);
}

template <int KIND>
inline void store_some(void *to, int64_t index, int64_t count, f8 value) {
    char padded[32];
    store<KIND>(padded, 0, value);
    memcpy((char *)to + index * size_of(KIND), padded, count * size_of(KIND));
}

template <int KIND>
inline void widen(const void *from, int64_t start, int64_t count, float *to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) store<FLOAT32>(to, i, load<KIND>(from, start + i));
    if (i < count) store<FLOAT32>(to, i, load_some<KIND>(from, start + i, count - i));
}

// tau_t of a segment, in float32. Returns the bits of the largest |tau_t|: magnitudes are ordered as these integers.
template <int KIND>
inline int32_t subtract(const void *finetune, int64_t start, int64_t count, const float *base, float *tau) {
    i8 largest = {0};
    auto one = [&](int64_t i, f8 value) {
        if (KIND != TASK_VECTOR) value -= load<FLOAT32>(base, i);
        store<FLOAT32>(tau, i, value);
        largest = larger(largest, as_int(value) & MAGNITUDE);
    };
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) one(i, load<KIND>(finetune, start + i));
    if (i < count) one(i, load_some<KIND>(finetune, start + i, count - i));
    return largest_of(largest);
}

inline int32_t subtract_kind(int32_t kind, const void *finetune, int64_t start, int64_t count, const float *base,
                             float *tau) {
    switch (kind) {
        case BFLOAT16: return subtract<BFLOAT16>(finetune, start, count, base, tau);
        case FLOAT16: return subtract<FLOAT16>(finetune, start, count, base, tau);
        case TASK_VECTOR: return subtract<TASK_VECTOR>(finetune, start, count, base, tau);
        default: return subtract<FLOAT32>(finetune, start, count, base, tau);
    }
}

inline void widen_kind(int32_t kind, const void *from, int64_t start, int64_t count, float *to) {
    switch (kind) {
        case BFLOAT16: return widen<BFLOAT16>(from, start, count, to);
        case FLOAT16: return widen<FLOAT16>(from, start, count, to);
        default: return widen<FLOAT32>(from, start, count, to);
    }
}

// Sign of the exact sum of a column, by sums of doubles that do not overlap (Shewchuk 1997, grow-expansion).
inline bool exactly_positive(const float *column, int64_t tasks) {
    double parts[320];  // as many as a sum of floats has bits; a handful are ever in use
    int used = 0;
    for (int64_t t = 0; t < tasks; t++) {
        double x = column[t * STRIDE];
        int kept = 0;
        for (int k = 0; k < used; k++) {
            double y = parts[k], sum = x + y, shadow = sum - x;
            double error = (x - (sum - shadow)) + (y - shadow);
            if (error != 0) parts[kept++] = error;
            x = sum;
        }
        parts[kept++] = x;
        used = kept;
    }
    while (used > 0 && parts[used - 1] == 0) used--;
    return used > 0 && parts[used - 1] > 0;
}

// Lanes where the sum of the tasks is positive: by float32 where that meets no rounding (as the ties of bfloat16
// checkpoints do not: Knuth's TwoSum tells), exactly where it does.
inline i8 exactly_positive_lanes(const float *taus, int64_t tasks) {
    f8 sum = {0};
    i8 rounded = {0};
    for (int64_t t = 0; t < tasks; t++) {
        f8 x = load<FLOAT32>(taus, t * STRIDE), next = sum + x, part = next - sum;
        rounded |= ~(((sum - (next - part)) + (x - part)) == 0);  // nor where it is infinite less infinite
        sum = next;
    }
    i8 positive = sum > 0;
    if (any(rounded))
        for (int lane = 0; lane < 8; lane++)
            if (rounded[lane]) positive[lane] = exactly_positive(taus + lane, tasks) ? -1 : 0;
    return positive;
}

inline float float_of(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// The power of two that takes magnitudes up to `largest`, given by its bits, below 1, or 2^100 if that is less.
inline float scale_of(int32_t largest) {
    const int64_t exponent = 126 - (largest >> 23), bits = ((exponent < 100 ? exponent : 100) + 1023) << 52;
    double value;
    memcpy(&value, &bits, sizeof value);
    return (float)value;
}

// To nearest, ties to even. For numbers that are not negative and below 2^31.
inline i8 rounded(f8 x) {
#ifdef EMR_AVX2
    return (i8)_mm256_cvtps_epi32((__m256)x);
#else
    f8 near = (x + 0x1p23f) - 0x1p23f;
    return __builtin_convertvector(x < 0x1p23f ? near : x, i8);
#endif
}

// Adds up whole numbers up to 2^WHOLE, so that no order of theirs can matter.
constexpr float ONE = (float)(1 << WHOLE);
constexpr int64_t ADDITIONS = 32;  // that 32 bits hold, with room for what rounding takes to 2^WHOLE

struct Sum {
    u32x8 few = {0};
    ul4 all = {0};

    void add(i8 numbers) { few += (u32x8)numbers; }
    void carry() {  // after no more than ADDITIONS
        all += ((ul4)few & 0xffffffff) + ((ul4)few >> 32);
        few = few & 0;
    }
    double total() const { return (double)(int64_t)(all[0] + all[1] + all[2] + all[3]) * (1.0 / ONE); }
};

inline f8 round_to(int32_t kind, f8 value) {
    char stored[32];
    if (kind == BFLOAT16) {
        store<BFLOAT16>(stored, 0, value);
        return load<BFLOAT16>(stored, 0);
    }
    if (kind == FLOAT16) {
        store<FLOAT16>(stored, 0, value);
        return load<FLOAT16>(stored, 0);
    }
    return value;
}

inline void store_as(int32_t kind, void *to, int64_t index, int64_t count, f8 value) {
    switch (kind) {
        case BFLOAT16: return store_some<BFLOAT16>(to, index, count, value);
        case FLOAT16: return store_some<FLOAT16>(to, index, count, value);
        default: return store_some<FLOAT32>(to, index, count, value);
    }
}

inline int64_t at_most(int64_t x, int64_t limit) { return x < limit ? x : limit; }

// What was elected in a segment, as the tasks are compared with it.
struct Elected {
    int32_t flip[SEGMENT];   // the sign bit where the sum is not positive: what makes the tasks that agree positive
    int32_t limit[SEGMENT];  // what the bits of a task's magnitude have to be above
    float size[SEGMENT];     // |tau|, scaled to below 2^WHOLE
    int32_t whole[SEGMENT];  // the same and its square, in whole numbers
    int32_t square[SEGMENT];
    float exact[SEGMENT];    // |tau| before it is rounded to its dtype
    float change[SEGMENT];   // by how much that changed it
};

// Elects eight elements. `tau_of(t)` is tau_t of them, which `column` holds too; `bound`: what rounding can change a
// float32 sum by, times the largest term. `flip`: see Elected. Returns |tau|, as bits.
template <typename Get>
inline i8 elect_eight(int64_t tasks, Get tau_of, const float *column, float bound, i8 &flip) {
    f8 sum = {0};
    i8 most = {0};
    for (int64_t t = 0; t < tasks; t++) {
        f8 tau = tau_of(t);
        sum += tau;
        most = larger(most, as_int(tau) & MAGNITUDE);
    }
    i8 sure = as_float(as_int(sum) & MAGNITUDE) > as_float(most) * bound;
    i8 positive = sum > 0;
    if (__builtin_expect(any(~sure & (most != 0)), 0)) positive = exactly_positive_lanes(column, tasks);
    flip = ~positive & SIGN;
    i8 size = {0};  // max |tau_t| among those of the elected sign: the others are negative integers
    for (int64_t t = 0; t < tasks; t++) size = larger(size, as_int(tau_of(t)) ^ flip);
    return size;
}

inline float bound_of(int64_t tasks) { return (float)tasks * (float)tasks * 0x1p-23f; }

// Task vectors, signs and magnitudes of a segment of whole eights, when all is of one kind and the tasks are few.
template <int TASKS, int KIND>
inline void elect_few(const void *base, const void *const *finetunes, int64_t start, int64_t length, float *taus,
                      int32_t *largest_bits, Elected &elected) {
    i8 largest[TASKS] = {};
    for (int64_t i = 0; i < length; i += 8) {
        f8 weight = load<KIND>(base, start + i), values[TASKS];
#pragma GCC unroll 8
        for (int t = 0; t < TASKS; t++) {
            values[t] = load<KIND>(finetunes[t], start + i) - weight;
            store<FLOAT32>(taus, t * STRIDE + i, values[t]);
            largest[t] = larger(largest[t], as_int(values[t]) & MAGNITUDE);
        }
        i8 flip, size = elect_eight(TASKS, [&](int64_t t) { return values[t]; }, taus + i, bound_of(TASKS), flip);
        store<FLOAT32>(elected.flip, i, as_float(flip));
        store<FLOAT32>(elected.exact, i, as_float(size));
    }
    for (int t = 0; t < TASKS; t++) largest_bits[t] = largest_of(largest[t]);
}

template <int KIND>
inline bool elect_few_of(int64_t tasks, const void *base, const void *const *finetunes, int64_t start, int64_t length,
                         float *taus, int32_t *largest, Elected &elected) {
    switch (tasks) {
#define EMR_FEW(TASKS) \
    case TASKS: elect_few<TASKS, KIND>(base, finetunes, start, length, taus, largest, elected); return true;
        EMR_FEW(1) EMR_FEW(2) EMR_FEW(3) EMR_FEW(4) EMR_FEW(5) EMR_FEW(6) EMR_FEW(7) EMR_FEW(8)
#undef EMR_FEW
        default: return false;
    }
}

// The same of anything.
inline void elect_many(int64_t tasks, const void *base, int32_t base_kind, const void *const *finetunes,
                       const int32_t *kinds, int64_t start, int64_t length, float *wide_base, float *taus,
                       int32_t *largest, Elected &elected) {
    widen_kind(base_kind, base, start, length, wide_base);
    for (int64_t t = 0; t < tasks; t++)
        largest[t] = subtract_kind(kinds[t], finetunes[t], start, length, wide_base, taus + t * STRIDE);
    for (int64_t i = 0; i < length; i += 8) {
        auto tau_of = [&](int64_t t) { return load<FLOAT32>(taus, t * STRIDE + i); };
        i8 flip, size = elect_eight(tasks, tau_of, taus + i, bound_of(tasks), flip);
        store<FLOAT32>(elected.flip, i, as_float(flip));
        store<FLOAT32>(elected.exact, i, as_float(size));
    }
}

// Writes the unified vector of a segment and gets it ready for `compare`. Returns the bits of the largest |tau|.
inline int32_t round_segment(int64_t start, int64_t length, int32_t most, void *tau, int32_t tau_kind,
                             Elected &elected) {
    const float scale = scale_of(most), up = ONE;
    i8 largest = {0};
    for (int64_t i = 0; i < length; i += 8) {
        f8 exact = load<FLOAT32>(elected.exact, i), used = round_to(tau_kind, exact);
        i8 flip = as_int(load<FLOAT32>(elected.flip, i)), in_use = as_int(used) != 0;
        largest = larger(largest, as_int(used));
        f8 below_one = used * scale, scaled = below_one * up;
        store<FLOAT32>(elected.limit, i, as_float(~in_use & MAGNITUDE));
        store<FLOAT32>(elected.size, i, scaled);
        store<FLOAT32>(elected.whole, i, as_float(rounded(scaled)));
        store<FLOAT32>(elected.square, i, as_float(rounded(scaled * below_one)));
        if (tau_kind != FLOAT32) store<FLOAT32>(elected.change, i, as_float(as_int(exact - used) & MAGNITUDE));
        f8 vector = as_float(as_int(used) | (flip & in_use));
        if (tau_kind == FLOAT32 && i + 8 <= length)
            store<FLOAT32>(tau, start + i, vector);
        else
            store_as(tau_kind, tau, start + i, at_most(length - i, 8), vector);
    }
    return largest_of(largest);
}

// One task's mask of a segment and what it adds to the sums and counts.
inline void compare(const float *task, int64_t length, int32_t largest, int32_t most, const Elected &elected,
                    const char *next, int64_t step, uint8_t *mask, double *sums, int64_t *counts) {
    const float scale = scale_of(largest), up = ONE;
    Sum moved, kept, square, square_kept, product;
    i8 zeros = {0};
    auto one = [&](int64_t i) {
        i8 value = as_int(load<FLOAT32>(task, i));
        i8 inside = (value ^ as_int(load<FLOAT32>(elected.flip, i))) > as_int(load<FLOAT32>(elected.limit, i));
        mask[i / 8] = to_bits(inside);
        value &= MAGNITUDE;
        zeros -= value == 0;
        f8 below_one = as_float(value) * scale, scaled = below_one * up;
        moved.add(rounded(scaled));
        kept.add(as_int(load<FLOAT32>(elected.whole, i)) & inside);
        square.add(rounded(scaled * below_one));
        square_kept.add(as_int(load<FLOAT32>(elected.square, i)) & inside);
        product.add(rounded(below_one * as_float(as_int(load<FLOAT32>(elected.size, i)) & inside)));
    };
    for (int64_t from = 0; from < length; from += 8 * ADDITIONS) {
        const int64_t to = at_most(from + 8 * ADDITIONS, length);
        int64_t i = from;
        for (; i + 32 <= to; i += 32) {
            __builtin_prefetch(next + i * step, 0, 2);
            if (step == 4) __builtin_prefetch(next + i * 4 + 64, 0, 2);
            one(i), one(i + 8), one(i + 16), one(i + 24);
        }
        for (; i < to; i += 8) one(i);
        moved.carry(), kept.carry(), square.carry(), square_kept.carry(), product.carry();
    }
    const double unit = 1.0 / scale, unit_used = 1.0 / scale_of(most);
    sums[0] += moved.total() * unit;
    sums[1] += kept.total() * unit_used;
    sums[2] += square.total() * unit * unit;
    sums[3] += square_kept.total() * unit_used * unit_used;
    sums[4] += product.total() * unit * unit_used;
    counts[0] += (length + 7) / 8 * 8;
    for (int lane = 0; lane < 8; lane++) counts[0] -= zeros[lane];
    counts[1] += ones(mask, (length + 7) / 8);
}

// Sum of the squares of magnitudes.
inline double sum_of_squares(const float *sizes, int64_t length) {
    i8 largest = {0};
    for (int64_t i = 0; i < length; i += 8) largest = larger(largest, as_int(load<FLOAT32>(sizes, i)));
    const float scale = scale_of(largest_of(largest)), up = ONE;
    Sum square;
    for (int64_t i = 0; i < length; i += 8) {
        f8 below_one = load<FLOAT32>(sizes, i) * scale;
        square.add(rounded(below_one * up * below_one));
        square.carry();
    }
    return square.total() / scale / scale;
}

// Elects `count` elements of a tensor.
//
// base, finetunes: of their kinds, flat. tau: where the unified vector is written. masks: where each task's packed
// mask is. sums: for each unit of the elements, for each task, sum |tau_t|, sum M |tau|, sum tau_t^2, sum M tau^2,
// sum tau_t M tau. counts: for each task, elements that moved and elements in the mask, added to what is there.
// squares: for each unit, of the unified vector before rounding and of what the rounding changed; only where it is
// narrower than float32.
int32_t elect(int64_t count, int64_t tasks, const void *base, int32_t base_kind, const void *const *finetunes,
              const int32_t *kinds, void *tau, int32_t tau_kind, uint8_t *const *masks, double *sums, int64_t *counts,
              double *squares, float *scratch) {
    float *wide_base = scratch, *taus = scratch + STRIDE;
    int32_t *largest = (int32_t *)(taus + tasks * STRIDE);
    bool alike = true;
    for (int64_t t = 0; t < tasks; t++) alike = alike && kinds[t] == base_kind;
    Elected elected;
    for (int64_t start = 0; start < count; start += SEGMENT) {
        const int64_t length = at_most(count - start, SEGMENT);
        bool done = false;
        if (alike && length % 8 == 0) switch (base_kind) {
                case BFLOAT16: done = elect_few_of<BFLOAT16>(tasks, base, finetunes, start, length, taus, largest, elected); break;
                case FLOAT16: done = elect_few_of<FLOAT16>(tasks, base, finetunes, start, length, taus, largest, elected); break;
                default: done = elect_few_of<FLOAT32>(tasks, base, finetunes, start, length, taus, largest, elected);
            }
        if (!done)
            elect_many(tasks, base, base_kind, finetunes, kinds, start, length, wide_base, taus, largest, elected);
        int32_t most = 0;
        for (int64_t t = 0; t < tasks; t++) most = largest[t] > most ? largest[t] : most;
        if (most >= INFINITE) return NOT_FINITE;
        if (round_segment(start, length, most, tau, tau_kind, elected) >= INFINITE) return OVERFLOWS;
        for (int64_t t = 0; t < tasks; t++) {
            const int64_t step = size_of(kinds[t]);
            const char *next = (const char *)finetunes[t] + (start + SEGMENT) * step;
            compare(taus + t * STRIDE, length, largest[t], most, elected, next, step, masks[t] + start / 8,
                    sums + (start / UNIT * tasks + t) * 5, counts + 2 * t);
        }
        if (tau_kind != FLOAT32) {
            squares[2 * (start / UNIT)] += sum_of_squares(elected.exact, length);
            squares[2 * (start / UNIT) + 1] += sum_of_squares(elected.change, length);
        }
    }
    return DONE;
}

template <int BASE, int TAU, int OUT>
inline void rebuild_as(int64_t count, const void *base, const void *tau, const uint8_t *mask, float minus_rescaler,
                       void *out) {
    auto one = [&](int64_t i, f8 weight, f8 vector) {
        f8 delta = vector * minus_rescaler;
        return weight - as_float(as_int(delta) & from_bits(mask[i / 8]));
    };
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) store<OUT>(out, i, one(i, load<BASE>(base, i), load<TAU>(tau, i)));
    if (i < count) {
        f8 weight = load_some<BASE>(base, i, count - i), vector = load_some<TAU>(tau, i, count - i);
        store_some<OUT>(out, i, count - i, one(i, weight, vector));
    }
}

template <int BASE, int TAU>
inline void rebuild_to(int64_t count, const void *base, const void *tau, const uint8_t *mask, float minus_rescaler,
                       void *out, int32_t out_kind) {
    switch (out_kind) {
        case BFLOAT16: return rebuild_as<BASE, TAU, BFLOAT16>(count, base, tau, mask, minus_rescaler, out);
        case FLOAT16: return rebuild_as<BASE, TAU, FLOAT16>(count, base, tau, mask, minus_rescaler, out);
        default: return rebuild_as<BASE, TAU, FLOAT32>(count, base, tau, mask, minus_rescaler, out);
    }
}

template <int BASE>
inline void rebuild_with(int64_t count, const void *base, const void *tau, int32_t tau_kind, const uint8_t *mask,
                         float minus_rescaler, void *out, int32_t out_kind) {
    switch (tau_kind) {
        case BFLOAT16: return rebuild_to<BASE, BFLOAT16>(count, base, tau, mask, minus_rescaler, out, out_kind);
        case FLOAT16: return rebuild_to<BASE, FLOAT16>(count, base, tau, mask, minus_rescaler, out, out_kind);
        default: return rebuild_to<BASE, FLOAT32>(count, base, tau, mask, minus_rescaler, out, out_kind);
    }
}

// W0 - (tau * -lambda where the mask is 1): see bits.py.
void rebuild(int64_t count, const void *base, int32_t base_kind, const void *tau, int32_t tau_kind, const uint8_t *mask,
             float minus_rescaler, void *out, int32_t out_kind) {
    switch (base_kind) {
        case BFLOAT16: return rebuild_with<BFLOAT16>(count, base, tau, tau_kind, mask, minus_rescaler, out, out_kind);
        case FLOAT16: return rebuild_with<FLOAT16>(count, base, tau, tau_kind, mask, minus_rescaler, out, out_kind);
        default: return rebuild_with<FLOAT32>(count, base, tau, tau_kind, mask, minus_rescaler, out, out_kind);
    }
}

}  // namespace
}  // namespace EMR_BODY
