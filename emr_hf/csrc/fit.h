// Included by kernels.cpp once for each instruction set, each time into a namespace of its own: the loops of fitting.py
// and lowbit.py, which define them. In a fit, of each element every set of tasks is tried that a threshold can cut off;
// the tasks' own values are the thresholds.

namespace EMR_BODY {
namespace {

constexpr int64_t MOST_TASKS = 256;  // more are left to torch

// Neighbouring elements that are worked on together; what a comparison gives is all bits or none.
constexpr int64_t LANES = 8;

inline f8 only(i8 chosen, f8 values) { return (f8)(chosen & (i8)values); }
inline f8 choose(i8 chosen, f8 yes, f8 no) { return (f8)((chosen & (i8)yes) | (~chosen & (i8)no)); }

// To compare squares of float32 numbers, none of which is too small or too large for float64.
typedef double d8 __attribute__((vector_size(64)));
typedef int64_t l8 __attribute__((vector_size(64)));

inline d8 wide(f8 values) { return __builtin_convertvector(values, d8); }
inline i8 narrow(l8 chosen) { return __builtin_convertvector(chosen, i8); }
inline d8 larger_of(d8 a, d8 b) {
    const l8 chosen = a > b;
    return (d8)((chosen & (l8)a) | (~chosen & (l8)b));
}

// Elements from `start` on of a row; zeros behind the last.
inline f8 load(const float *row, int64_t start, int64_t count) {
    f8 lanes = {};
    const int64_t left = count - start;
    std::memcpy(&lanes, row + start, (left < LANES ? left : LANES) * sizeof(float));
    return lanes;
}

inline void store(float *row, int64_t start, int64_t count, f8 lanes) {
    const int64_t left = count - start;
    std::memcpy(row + start, &lanes, (left < LANES ? left : LANES) * sizeof(float));
}

// `fitting.fit_vector`. taus: (tasks, count), rescalers: (tasks,), all positive; out: (count,).
void fit_vector(int64_t count, int64_t tasks, const float *taus, const float *rescalers, float *out) {
    f8 z[MOST_TASKS], weighted[MOST_TASKS], weights[MOST_TASKS];
    const f8 zero = {};
    for (int64_t t = 0; t < tasks; t++) weights[t] = zero + rescalers[t] * rescalers[t];
    for (int64_t start = 0; start < count; start += LANES) {
        for (int64_t t = 0; t < tasks; t++) {
            const f8 tau = load(taus + t * count, start, count);
            z[t] = tau / rescalers[t];
            weighted[t] = tau * rescalers[t];
        }
        f8 best = zero;
        d8 explained = {};
        for (int64_t j = 0; j < tasks; j++) {
            const i8 flip = ~(z[j] > zero) & INT32_MIN;  // the sign bit, where the threshold is not positive
            const f8 threshold = (f8)((i8)z[j] ^ flip);
            f8 above = zero, below = zero;
            for (int64_t t = 0; t < tasks; t++) {
                const i8 inside = (f8)((i8)z[t] ^ flip) >= threshold;
                above += only(inside, weighted[t]);
                below += only(inside, weights[t]);
            }
            // Of a threshold of zero nothing is gained: not even its own side is wanted.
            const d8 gain = wide(only(z[j] != zero, above)) * wide(above) / wide(below);
            best = choose(narrow(gain > explained), above / below, best);
            explained = larger_of(gain, explained);
        }
        store(out, start, count, best);
    }
}

// `fitting.two_levels`. values: (tasks, count); low and high: (count,).
void two_levels(int64_t count, int64_t tasks, const float *values, float *low, float *high) {
    f8 x[MOST_TASKS];
    const f8 zero = {}, one = zero + 1.0f, all = zero + (float)tasks;
    for (int64_t start = 0; start < count; start += LANES) {
        for (int64_t t = 0; t < tasks; t++) x[t] = load(values + t * count, start, count);
        f8 best_low = x[0], best_high = x[0];
        d8 explained = {};
        for (int64_t j = 0; j < tasks; j++) {
            f8 above = zero, below = zero, members = zero;
            for (int64_t t = 0; t < tasks; t++) {
                const i8 inside = x[t] >= x[j];
                above += only(inside, x[t]);
                below += only(~inside, x[t]);
                members += only(inside, one);
            }
            const f8 others = all - members;
            const f8 upper = above / members, lower = below / choose(others > zero, others, one);
            const d8 gap = wide(upper - lower), between = gap * gap * wide(members * others);
            const i8 better = narrow(between > explained);
            best_low = choose(better, lower, best_low);
            best_high = choose(better, upper, best_high);
            explained = larger_of(between, explained);
        }
        store(low, start, count, best_low);
        store(high, start, count, best_high);
    }
}

// One task of a segment of `fitting.compare`, from its first element on. `move`: scratch of SEGMENT.
void compare_segment(int64_t length, const float *tau, const float *used, const float *shift, float rescaler,
                     bool of_moves, float *move, uint8_t *mask, double *sums, int64_t *counts) {
    i8 largest_tau = {0}, largest_move = {0}, moved = {0}, chosen = {0}, agreeing = {0};
    const f8 zero = {};
    for (int64_t i = 0; i < length; i += 8) {
        const f8 value = load(tau, i, length), vector = load(used, i, length);
        const f8 from = shift ? load(shift, i, length) : zero;
        const i8 sign = (i8)vector & SIGN, size = (i8)vector & MAGNITUDE;
        const i8 inside = ((f8)((i8)(value - from) ^ sign) > (f8)size * rescaler * 0.5f) & (size != 0);
        const f8 moves = only(inside, vector) + from, direction = of_moves ? moves : vector;
        store(move, i, SEGMENT, moves);
        mask[i / 8] = to_bits(inside);
        largest_tau = larger(largest_tau, (i8)value & MAGNITUDE);
        largest_move = larger(largest_move, (i8)moves & MAGNITUDE);
        moved -= value != zero;
        chosen -= inside;
        agreeing -= ((f8)((i8)value ^ ((i8)direction & SIGN)) > zero) & (direction != zero);
    }
    for (int lane = 0; lane < 8; lane++) counts[0] += moved[lane], counts[1] += chosen[lane], counts[2] += agreeing[lane];
    const float scale = scale_of(largest_of(largest_tau)), scale_moves = scale_of(largest_of(largest_move)), up = ONE;
    Sum first, second, square, square_moves, along, against;
    for (int64_t from = 0; from < length; from += 8 * ADDITIONS) {
        for (int64_t i = from; i < at_most(from + 8 * ADDITIONS, length); i += 8) {
            const f8 value = load(tau, i, length) * scale, moves = load(move, i, SEGMENT) * scale_moves;
            const i8 opposite = ((i8)value ^ (i8)moves) >> 31;
            const f8 a = (f8)((i8)value & MAGNITUDE), b = (f8)((i8)moves & MAGNITUDE);
            const i8 product = rounded(a * b * up);
            first.add(rounded(a * up));
            second.add(rounded(b * up));
            square.add(rounded(a * a * up));
            square_moves.add(rounded(b * b * up));
            along.add(product & ~opposite);
            against.add(product & opposite);
        }
        first.carry(), second.carry(), square.carry(), square_moves.carry(), along.carry(), against.carry();
    }
    const double unit = 1.0 / scale, unit_moves = 1.0 / scale_moves;
    sums[0] += first.total() * unit;
    sums[1] += second.total() * unit_moves;
    sums[2] += square.total() * (unit * unit);
    sums[3] += square_moves.total() * (unit_moves * unit_moves);
    sums[4] += (along.total() - against.total()) * (unit * unit_moves);
}

// `fitting.compare`. taus: (tasks, count); used, and shift unless it is null: (count,); rescalers: (tasks,); masks: each
// task's packed mask; sums: (units, tasks, 5), zeros; counts: (tasks, 3), zeros.
void compare(int64_t count, int64_t tasks, const float *taus, const float *used, const float *shift,
             const float *rescalers, bool of_moves, uint8_t *const *masks, double *sums, int64_t *counts) {
    alignas(64) float move[SEGMENT];
    for (int64_t start = 0; start < count; start += SEGMENT)
        for (int64_t t = 0; t < tasks; t++)
            compare_segment(at_most(count - start, SEGMENT), taus + t * count + start, used + start,
                            shift ? shift + start : nullptr, rescalers[t], of_moves, move, masks[t] + start / 8,
                            sums + (start / UNIT * tasks + t) * 5, counts + t * 3);
}

// `lowbit.Codes.__getitem__`: elements from `start` on, of codes that begin with that element's.
template <int BITS>
void decode(int64_t count, int64_t start, int64_t columns, const uint8_t *codes, const float *scales, float *out) {
    constexpr int64_t IN_BYTE = 8 / BITS;
    constexpr int MOST = (1 << BITS) - 1;
    constexpr float HALF = MOST / 2.0f;
    const int64_t whole = count / IN_BYTE;
    for (int64_t byte = 0; byte < whole; byte++)
        for (int64_t i = 0; i < IN_BYTE; i++)
            out[byte * IN_BYTE + i] = (float)((codes[byte] >> (i * BITS)) & MOST) - HALF;
    for (int64_t i = whole * IN_BYTE; i < count; i++)
        out[i] = (float)((codes[whole] >> (i % IN_BYTE * BITS)) & MOST) - HALF;
    for (int64_t i = 0; i < count;) {
        const int64_t row = (start + i) / columns, end = (row + 1) * columns - start;
        const float scale = scales[row];
        for (const int64_t stop = end < count ? end : count; i < stop; i++) out[i] *= scale;
    }
}

void decode(int64_t count, int64_t start, int64_t columns, int64_t bits, const uint8_t *codes, const float *scales,
            float *out) {
    if (bits == 8) return decode<8>(count, start, columns, codes, scales, out);
    if (bits == 4) return decode<4>(count, start, columns, codes, scales, out);
    decode<2>(count, start, columns, codes, scales, out);
}

}  // namespace
}  // namespace EMR_BODY
