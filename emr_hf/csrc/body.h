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
        u16x8 raw;
        memcpy(&raw, (const uint16_t *)from + index, sizeof raw);
        return (f8)(__builtin_convertvector(raw, u32x8) << 16);
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

struct Moved {
    // Bits of the largest |tau_t| and of the smallest that is not 0: magnitudes are ordered as the integers of their bits.
    int32_t largest = 0, smallest = MAGNITUDE;
    int64_t nonzero = 0;
};

// tau_t of a segment, in float32.
template <int KIND>
inline Moved subtract(const void *finetune, int64_t start, int64_t count, const float *base, float *tau) {
    i8 largest = {0}, nonzero = {0};
    u32x8 smallest = (u32x8)nonzero + MAGNITUDE;
    auto one = [&](int64_t i, f8 value) {
        if (KIND != TASK_VECTOR) value -= load<FLOAT32>(base, i);
        store<FLOAT32>(tau, i, value);
        i8 size = as_int(value) & MAGNITUDE;
        largest = size > largest ? size : largest;
        nonzero -= size != 0;
        u32x8 other = (u32x8)size - 1;  // 0 becomes the largest
        smallest = other < smallest ? other : smallest;
    };
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) one(i, load<KIND>(finetune, start + i));
    if (i < count) one(i, load_some<KIND>(finetune, start + i, count - i));
    Moved moved;
    for (int lane = 0; lane < 8; lane++) {
        moved.largest = largest[lane] > moved.largest ? largest[lane] : moved.largest;
        int32_t least = (int32_t)smallest[lane] + (smallest[lane] < MAGNITUDE);
        moved.smallest = least < moved.smallest ? least : moved.smallest;
        moved.nonzero += nonzero[lane];
    }
    return moved;
}

inline Moved subtract_kind(int32_t kind, const void *finetune, int64_t start, int64_t count, const float *base,
                           float *tau) {
    switch (kind) {
        case BFLOAT16: return subtract<BFLOAT16>(finetune, start, count, base, tau);
        case FLOAT16: return subtract<FLOAT16>(finetune, start, count, base, tau);
        case TASK_VECTOR: return subtract<TASK_VECTOR>(finetune, start, count, base, tau);
        default: return subtract<FLOAT32>(finetune, start, count, base, tau);
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

// Whether no sum of the tasks can meet rounding in float64: all are multiples of the last bit of the smallest.
inline bool sums_are_exact(int32_t largest, int32_t smallest, int64_t tasks) {
    int32_t least = smallest >> 23 > 1 ? smallest >> 23 : 1;  // exponents; the subnormal numbers' is 1
    return (double)tasks * (double)(int64_t(1) << ((largest >> 23) - least < 30 ? (largest >> 23) - least + 24 : 54)) <= 0x1p53;
}

// Lanes where the exact sum of the tasks is positive. `bound`: rounding error of their sum, times the largest of them.
template <bool EXACT>
inline i8 positive_sum(const float *taus, int64_t tasks, double bound) {
    d4 sum_low = {0}, sum_high = {0};
    i8 largest = {0};
    for (int64_t t = 0; t < tasks; t++) {
        f8 tau = load<FLOAT32>(taus, t * STRIDE);
        if (!EXACT) {
            i8 size = as_int(tau) & MAGNITUDE;
            largest = size > largest ? size : largest;
        }
        sum_low += low(tau);
        sum_high += high(tau);
    }
    // No sum of floats is so small that float32 would take it for 0.
    f8 sum = narrow(sum_low, sum_high);
    i8 positive = sum > 0;
    if (EXACT) return positive;
    // A sum that its rounding error could have turned; twice the bound, since it is compared in float32.
    f8 size = as_float(as_int(sum) & MAGNITUDE);
    i8 unsure = (size <= as_float(largest) * (float)(2 * bound)) & (largest != 0);
    if (__builtin_expect(any(unsure), 0)) {
        // Most of them, such as the ties of bfloat16 checkpoints, meet no rounding at all.
        d4 total[2] = {{0}, {0}};
        l4 rounded[2] = {{0}, {0}};
        for (int64_t t = 0; t < tasks; t++) {
            f8 tau = load<FLOAT32>(taus, t * STRIDE);
            d4 terms[2] = {low(tau), high(tau)};
            for (int half = 0; half < 2; half++) {
                d4 fresh = total[half] + terms[half], part = fresh - total[half];
                rounded[half] |= ((total[half] - (fresh - part)) + (terms[half] - part)) != 0;
                total[half] = fresh;
            }
        }
        for (int lane = 0; lane < 8; lane++)
            if (unsure[lane] && rounded[lane / 4][lane % 4])
                positive[lane] = exactly_positive(taus + lane, tasks) ? -1 : 0;
    }
    return positive;
}

// A sum whose order cannot matter: each term is rounded to a multiple of the segment's quantum by adding `big` to it,
// and these multiples are added as integers (Demmel and Nguyen 2013, "Fast reproducible floating-point summation").
struct Sum {
    d4 big;
    ul4 bits = {0};  // sum of (term + big) as bit patterns; what `big` itself added comes off at the end

    explicit Sum(double largest) {
        int64_t raw;
        memcpy(&raw, &largest, sizeof raw);
        int64_t exponent = largest == 0 ? 1022 : raw >> 52;  // biased: largest < 2^(exponent - 1022)
        raw = (exponent + 1 + 9) << 52;
        double value;
        memcpy(&value, &raw, sizeof value);
        big = d4{value, value, value, value};
    }

    void add(d4 terms) { bits += (ul4)(terms + big); }
    // The product of two float32 is exact in float64, whether it is rounded before the addition or not.
    void add(d4 x, d4 y) { bits += (ul4)(x * y + big); }

    // Of `groups` additions.
    double total(int64_t groups) const {
        uint64_t raw = ((ul4)big)[0];
        int64_t multiples = (int64_t)(bits[0] + bits[1] + bits[2] + bits[3] - (uint64_t)groups * 4 * raw);
        raw -= (uint64_t)52 << 52;
        double quantum;
        memcpy(&quantum, &raw, sizeof quantum);
        return (double)multiples * quantum;
    }
};

inline double to_double(int32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

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

inline int32_t largest_of(i8 x) {
    int32_t largest = 0;
    for (int lane = 0; lane < 8; lane++) largest = x[lane] > largest ? x[lane] : largest;
    return largest;
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
    float *wide_base = scratch, *unified = scratch + STRIDE, *taus = scratch + 2 * STRIDE;
    const double bound = (double)tasks * (double)tasks * 0x1p-52;
    for (int64_t start = 0; start < count; start += SEGMENT) {
        int64_t length = count - start < SEGMENT ? count - start : SEGMENT;
        int64_t padded = (length + 7) / 8 * 8;
        double *unit = sums + start / UNIT * tasks * 5;
        switch (base_kind) {
            case BFLOAT16: widen<BFLOAT16>(base, start, length, wide_base); break;
            case FLOAT16: widen<FLOAT16>(base, start, length, wide_base); break;
            default: widen<FLOAT32>(base, start, length, wide_base);
        }
        int32_t least = MAGNITUDE, most = 0;  // of all tasks
        for (int64_t t = 0; t < tasks; t++) {
            Moved moved = subtract_kind(kinds[t], finetunes[t], start, length, wide_base, taus + t * STRIDE);
            if (moved.largest >= INFINITE) return NOT_FINITE;
            memcpy(taus + t * STRIDE + SEGMENT, &moved.largest, sizeof moved.largest);  // kept in the gap
            counts[2 * t] += moved.nonzero;
            least = moved.smallest < least ? moved.smallest : least;
            most = moved.largest > most ? moved.largest : most;
        }
        const bool exact_sums = sums_are_exact(most, least, tasks);

        i8 largest = {0}, largest_exact = {0}, largest_change = {0};
        float exact_values[SEGMENT];
        for (int64_t i = 0; i < padded; i += 8) {
            i8 positive = exact_sums ? positive_sum<true>(taus + i, tasks, bound) : positive_sum<false>(taus + i, tasks, bound);
            i8 flip = ~positive & SIGN;
            i8 size = {0};  // max |tau_t| among those of the elected sign: the others are negative integers
            for (int64_t t = 0; t < tasks; t++) {
                i8 turned = as_int(load<FLOAT32>(taus, t * STRIDE + i)) ^ flip;
                size = turned > size ? turned : size;
            }
            f8 exact = as_float(size), used = round_to(tau_kind, exact);
            i8 in_use = as_int(used) != 0, limit = ~in_use & MAGNITUDE;
            for (int64_t t = 0; t < tasks; t++) {
                i8 turned = as_int(load<FLOAT32>(taus, t * STRIDE + i)) ^ flip;
                masks[t][(start + i) / 8] = to_bits(turned > limit);
            }
            largest = as_int(used) > largest ? as_int(used) : largest;
            f8 signed_used = as_float(as_int(used) | (flip & in_use));
            store<FLOAT32>(unified, i, signed_used);
            if (tau_kind != FLOAT32) {
                store<FLOAT32>(exact_values, i, exact);
                i8 change = as_int(exact - used) & MAGNITUDE;
                largest_exact = size > largest_exact ? size : largest_exact;
                largest_change = change > largest_change ? change : largest_change;
            }
            int64_t left = length - i < 8 ? length - i : 8;
            if (tau_kind == BFLOAT16)
                store_some<BFLOAT16>(tau, start + i, left, signed_used);
            else if (tau_kind == FLOAT16)
                store_some<FLOAT16>(tau, start + i, left, signed_used);
            else if (left == 8)
                store<FLOAT32>(tau, start + i, signed_used);
            else
                store_some<FLOAT32>(tau, start + i, left, signed_used);
        }
        int32_t largest_used = largest_of(largest);
        if (largest_used >= INFINITE) return OVERFLOWS;

        double size_used = to_double(largest_used);
        for (int64_t t = 0; t < tasks; t++) {
            const float *task = taus + t * STRIDE;
            double size = task[SEGMENT];
            Sum moved(size), kept(size_used), square(size * size), square_kept(size_used * size_used),
                product(size * size_used);
            const char *next = (const char *)finetunes[t] + (start + SEGMENT) * size_of(kinds[t]);
            for (int64_t i = 0; i < padded; i += 8) {
                __builtin_prefetch(next + i * size_of(kinds[t]), 0, 2);
                i8 value = as_int(load<FLOAT32>(task, i)), use = as_int(load<FLOAT32>(unified, i));
                i8 mask = (value ^ (use & SIGN)) > 0;
                f8 a = as_float(value & MAGNITUDE), k = as_float(use & MAGNITUDE & mask);
                d4 al = low(a), ah = high(a), kl = low(k), kh = high(k);
                moved.add(al), moved.add(ah);
                kept.add(kl), kept.add(kh);
                square.add(al, al), square.add(ah, ah);
                square_kept.add(kl, kl), square_kept.add(kh, kh);
                product.add(al, kl), product.add(ah, kh);
            }
            counts[2 * t + 1] += ones(masks[t] + start / 8, padded / 8);
            const Sum *all[] = {&moved, &kept, &square, &square_kept, &product};
            for (int k = 0; k < 5; k++) unit[5 * t + k] += all[k]->total(padded / 4);
        }
        if (tau_kind != FLOAT32) {
            double size = to_double(largest_of(largest_exact)), change = to_double(largest_of(largest_change));
            Sum square(size * size), square_change(change * change);
            for (int64_t i = 0; i < padded; i += 8) {
                f8 exact = load<FLOAT32>(exact_values, i);
                f8 used = as_float(as_int(load<FLOAT32>(unified, i)) & MAGNITUDE);
                f8 rest = exact - used;  // exact: `used` has the leading bits of it
                square.add(low(exact), low(exact)), square.add(high(exact), high(exact));
                square_change.add(low(rest), low(rest)), square_change.add(high(rest), high(rest));
            }
            squares[2 * (start / UNIT)] += square.total(padded / 4);
            squares[2 * (start / UNIT) + 1] += square_change.total(padded / 4);
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
