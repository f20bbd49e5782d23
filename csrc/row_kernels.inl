// Included by row_kernels_<instruction set>.cpp, which defines GTPO_VECTOR_BYTES and GTPO_KERNELS. No standard header with
// inline functions: the linker could keep this file's copy of one for machines without its instructions.
#include "row_kernels.h"

namespace gtpo {
namespace {

constexpr double infinity = __builtin_inf();

template <class T>
struct Simd;

template <>
struct Simd<float> {
    typedef float Vector __attribute__((vector_size(GTPO_VECTOR_BYTES)));
    typedef std::int32_t Bits __attribute__((vector_size(GTPO_VECTOR_BYTES)));
    static constexpr std::int64_t lanes = GTPO_VECTOR_BYTES / 4;

    // 2^n p(r), y = n log 2 + r: for finite y <= 0 within 2 ulp; 0 below min_log_weight; NaN stays.
    static Vector exp(Vector y) {
        // adding it rounds to an integer, which is then in the low bits
        constexpr float magic = 12582912.0f;
        const Vector shifted = y * 1.44269504088896341f + magic;
        const Vector n = shifted - magic;
        // log 2 in two parts, the first short enough for an exact product
        Vector r = y - n * 0.693359375f;
        r = r - n * -2.12194440e-4f;
        Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
        p = p * r + 8.3334519073e-3f;
        p = p * r + 4.1665795894e-2f;
        p = p * r + 1.6666665459e-1f;
        p = p * r + 5.0000001201e-1f;
        p = p * (r * r) + r + 1.0f;
        const Vector scaled = reinterpret_cast<Vector>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
        return y >= min_log_weight ? scaled : y * 0.0f;
    }

    // Within 2 ulp; NaN stays.
    static Vector tanh(Vector x) {
        const Bits sign = reinterpret_cast<Bits>(x) & static_cast<std::int32_t>(0x80000000u);
        const Vector magnitude = reinterpret_cast<Vector>(reinterpret_cast<Bits>(x) ^ sign);
        const Vector limit = 20.0f - Vector{};
        const Vector bounded = magnitude > limit ? limit : magnitude;
        const Vector e = exp(-2.0f * bounded);
        const Vector z = bounded * bounded;
        Vector p = z * -5.70498872745e-3f + 2.06390887954e-2f;
        p = p * z - 5.37397155531e-2f;
        p = p * z + 1.33314422036e-1f;
        p = p * z - 3.33332819422e-1f;
        p = p * z * bounded + bounded;
        const Vector value = bounded < 0.625f ? p : (1.0f - e) / (1.0f + e);
        return reinterpret_cast<Vector>(reinterpret_cast<Bits>(value) | sign);
    }
};

template <>
struct Simd<double> {
    typedef double Vector __attribute__((vector_size(GTPO_VECTOR_BYTES)));
    static constexpr std::int64_t lanes = GTPO_VECTOR_BYTES / 8;

    static Vector exp(Vector y) {
        for (std::int64_t i = 0; i < lanes; ++i) y[i] = __builtin_exp(y[i]);
        return y;
    }

    static Vector tanh(Vector x) {
        for (std::int64_t i = 0; i < lanes; ++i) x[i] = __builtin_tanh(x[i]);
        return x;
    }
};

template <class T>
using Vector = typename Simd<T>::Vector;

template <class T>
Vector<T> broadcast(T value) {
    return value - Vector<T>{};
}

// NaN only where a is.
template <class V>
V larger(V a, V b) {
    return b > a ? b : a;
}

template <class T>
T largest_lane(Vector<T> v) {
    T value = v[0];
    for (std::int64_t i = 1; i < Simd<T>::lanes; ++i) value = v[i] > value ? v[i] : value;
    return value;
}

template <class T>
double sum_of_lanes(Vector<T> v) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < Simd<T>::lanes; ++i) sum += static_cast<double>(v[i]);
    return sum;
}

// How the logits lie in memory, and the type that their arithmetic is in.
template <class Logit>
struct Memory {
    using T = Logit;
    static Vector<T> load(const Logit* from) {
        Vector<T> v;
        __builtin_memcpy(&v, from, sizeof v);
        return v;
    }
    static void store(Logit* to, Vector<T> v) { __builtin_memcpy(to, &v, sizeof v); }
    static Logit minus_infinity() { return static_cast<Logit>(-infinity); }
};

template <>
struct Memory<Bfloat16> {
    using T = float;
    typedef std::uint16_t Half __attribute__((vector_size(GTPO_VECTOR_BYTES / 2)));
    typedef std::uint32_t Bits __attribute__((vector_size(GTPO_VECTOR_BYTES)));
    static Vector<float> load(const Bfloat16* from) {
        Half half;
        __builtin_memcpy(&half, from, sizeof half);
        return reinterpret_cast<Vector<float>>(__builtin_convertvector(half, Bits) << 16);
    }
    static void store(Bfloat16* to, Vector<float> v) {
        const Bits bits = reinterpret_cast<Bits>(v);
        // to the nearest, ties to even; a NaN must not round to infinity
        const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Half half = __builtin_convertvector(v == v ? rounded : bits * 0u + 0x7fc0u, Half);
        __builtin_memcpy(to, &half, sizeof half);
    }
    static Bfloat16 minus_infinity() { return {0xff80u}; }
};

// cap(l), and d cap / d l where it is asked for.
template <class T, bool capped>
Vector<T> cap(Vector<T> logits, T softcap, Vector<T>* slope = nullptr) {
    if constexpr (!capped) return logits;
    const Vector<T> t = Simd<T>::tanh(logits / softcap);
    if (slope != nullptr) *slope = static_cast<T>(1) - t * t;
    const T inf = static_cast<T>(infinity);
    // an infinite logit is a mask, put on after the cap: it stays what it is
    return (logits == inf) | (logits == -inf) ? logits : softcap * t;
}

// What cap(l) is shifted by: cap(max), and 0 for a row of all -inf, which must not come out as NaN.
template <class T, bool capped>
Vector<T> shift_of(Vector<T> max, T softcap) {
    return max == static_cast<T>(-infinity) ? Vector<T>{} : cap<T, capped>(max, softcap);
}

template <class T, bool scaled>
Vector<T> divide(Vector<T> difference, Vector<T> high, Vector<T> low) {
    if constexpr (!scaled) return difference;
    // the parts of an infinite product would be infinities of either sign
    const Vector<T> least = broadcast<T>(static_cast<T>(log_zero));
    const Vector<T> product = difference * high;
    return product < least ? least : product + difference * low;
}

template <class T>
Vector<T> without_infinity(Vector<T> y) {
    return larger(y, broadcast<T>(static_cast<T>(log_zero)));
}

// ---- rows: a vector holds neighbours of one row ----

// Runs body(vector, i) over the row; the last vector is filled up with -inf.
template <class Logit, class Body>
void for_each_vector(const Logit* row, std::int64_t count, Body body) {
    constexpr std::int64_t lanes = Simd<typename Memory<Logit>::T>::lanes;
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes) body(Memory<Logit>::load(row + i), i);
    if (i == count) return;
    Logit rest[lanes];
    for (std::int64_t k = 0; k < lanes; ++k) rest[k] = i + k < count ? row[i + k] : Memory<Logit>::minus_infinity();
    body(Memory<Logit>::load(rest), i);
}

// The first `count` lanes, at most all.
template <class Logit>
void store_some(Logit* to, Vector<typename Memory<Logit>::T> v, std::int64_t count) {
    constexpr std::int64_t lanes = Simd<typename Memory<Logit>::T>::lanes;
    if (count >= lanes) return Memory<Logit>::store(to, v);
    Logit rest[lanes];
    Memory<Logit>::store(rest, v);
    __builtin_memcpy(to, rest, static_cast<unsigned long>(count) * sizeof(Logit));
}

template <class Logit>
typename Memory<Logit>::T block_max(const Logit* row, std::int64_t count) {
    using T = typename Memory<Logit>::T;
    constexpr std::int64_t lanes = Simd<T>::lanes;
    const Vector<T> start = broadcast<T>(static_cast<T>(-infinity));
    Vector<T> a = start, b = start, c = start, d = start;
    std::int64_t i = 0;
    for (; i + 4 * lanes <= count; i += 4 * lanes) {
        a = larger(a, Memory<Logit>::load(row + i));
        b = larger(b, Memory<Logit>::load(row + i + lanes));
        c = larger(c, Memory<Logit>::load(row + i + 2 * lanes));
        d = larger(d, Memory<Logit>::load(row + i + 3 * lanes));
    }
    for_each_vector(row + i, count - i, [&](Vector<T> x, std::int64_t) { a = larger(a, x); });
    return largest_lane<T>(larger(larger(a, b), larger(c, d)));
}

template <class Logit, bool capped, bool scaled, bool keeps_weights>
void row_sums_of(const Logit* row, Logit* weights, std::int64_t vocab, const RowScale& scale, RowSums& sums,
                 double* block_max_of) {
    using T = typename Memory<Logit>::T;
    constexpr std::int64_t lanes = Simd<T>::lanes;
    const T softcap = static_cast<T>(scale.softcap);
    const double inverse = 1.0 / scale.temperature;
    const Vector<T> high = broadcast<T>(static_cast<T>(inverse));
    const Vector<T> low = broadcast<T>(static_cast<T>(inverse - static_cast<double>(high[0])));
    sums = {-infinity, 0.0, 0.0};
    Vector<T> shift = {};
    for (std::int64_t start = 0; start < vocab; start += row_block_vocab) {
        const std::int64_t count = vocab - start < row_block_vocab ? vocab - start : row_block_vocab;
        const double max = static_cast<double>(block_max(row + start, count));
        if (max > sums.max) {
            const T old_shift = shift[0];
            shift = shift_of<T, capped>(broadcast<T>(static_cast<T>(max)), softcap);
            if (sums.max != -infinity) {
                const double moved = (static_cast<double>(old_shift) - static_cast<double>(shift[0])) * inverse;
                const double factor = __builtin_exp(moved);
                sums.weighted = factor * (sums.weighted + moved * sums.sum);
                sums.sum *= factor;
            }
            sums.max = max;
        }
        if constexpr (keeps_weights) block_max_of[start / row_block_vocab] = sums.max;
        // two chains of additions, or their latency would be what is measured
        Vector<T> sum[2] = {}, weighted[2] = {};
        const auto add = [&](Vector<T> x, int chain, std::int64_t at) {
            const Vector<T> y =
                without_infinity<T>(divide<T, scaled>(cap<T, capped>(x, softcap) - shift, high, low));
            const Vector<T> e = Simd<T>::exp(y);
            sum[chain] += e;
            weighted[chain] += y * e;
            if constexpr (keeps_weights) store_some(weights + start + at, e, count - at);
        };
        std::int64_t i = 0;
        for (; i + 2 * lanes <= count; i += 2 * lanes) {
            // the next block, whose maximum would else wait for memory
            __builtin_prefetch(row + start + i + row_block_vocab);
            __builtin_prefetch(row + start + i + row_block_vocab + lanes);
            add(Memory<Logit>::load(row + start + i), 0, i);
            add(Memory<Logit>::load(row + start + i + lanes), 1, i + lanes);
        }
        for_each_vector(row + start + i, count - i, [&](Vector<T> x, std::int64_t k) { add(x, 0, i + k); });
        sums.sum += sum_of_lanes<T>(sum[0]) + sum_of_lanes<T>(sum[1]);
        sums.weighted += sum_of_lanes<T>(weighted[0]) + sum_of_lanes<T>(weighted[1]);
    }
}

template <class Logit, bool capped, bool scaled, bool has_linear>
void row_gradient_of(const Logit* row, Logit* d_row, std::int64_t vocab, const RowScale& scale, const RowSlope& slope) {
    using T = typename Memory<Logit>::T;
    constexpr std::int64_t lanes = Simd<T>::lanes;
    const T softcap = static_cast<T>(scale.softcap);
    const double inverse = 1.0 / scale.temperature;
    const Vector<T> high = broadcast<T>(static_cast<T>(inverse));
    const Vector<T> low = broadcast<T>(static_cast<T>(inverse - static_cast<double>(high[0])));
    const Vector<T> shift = shift_of<T, capped>(broadcast<T>(static_cast<T>(slope.max)), softcap);
    const T constant = static_cast<T>(slope.constant), linear = static_cast<T>(slope.linear);
    const auto gradient = [&](Vector<T> x) {
        Vector<T> cap_slope;
        const Vector<T> y =
            without_infinity<T>(divide<T, scaled>(cap<T, capped>(x, softcap, &cap_slope) - shift, high, low));
        const Vector<T> d = Simd<T>::exp(y) * (has_linear ? y * linear + constant : broadcast<T>(constant));
        return capped ? d * cap_slope : d;
    };
    std::int64_t i = 0;
    for (; i + lanes <= vocab; i += lanes) Memory<Logit>::store(d_row + i, gradient(Memory<Logit>::load(row + i)));
    for_each_vector(row + i, vocab - i, [&](Vector<T> x, std::int64_t) { store_some(d_row + i, gradient(x), vocab - i); });
}

template <class Logit>
void row_rescale(Logit* weights, std::int64_t vocab, const double* factors) {
    using T = typename Memory<Logit>::T;
    for (std::int64_t start = 0; start < vocab; start += row_block_vocab) {
        const std::int64_t count = vocab - start < row_block_vocab ? vocab - start : row_block_vocab;
        const Vector<T> factor = broadcast<T>(static_cast<T>(factors[start / row_block_vocab]));
        Logit* block = weights + start;
        for_each_vector(block, count, [&](Vector<T> x, std::int64_t i) { store_some(block + i, x * factor, count - i); });
    }
}

// ---- columns: a vector holds the same vocabulary entry of neighbouring rows ----

// Vocabulary entries that stay in the L1 cache between their maximum and their sums.
constexpr std::int64_t tile_vocab = 32;

// The entry a tile further on: the stride is too long for the hardware to see it coming.
template <class T>
void prefetch_next_tile(const T* at, std::int64_t stride) {
    __builtin_prefetch(at + tile_vocab * stride);
}

template <class T, bool capped, bool scaled>
void column_sums_of(const T* logits, std::int64_t stride, std::int64_t vocab, std::int64_t width,
                    const ColumnScale<T>& scale, T* max, T* sum, T* weighted) {
    constexpr std::int64_t lanes = Simd<T>::lanes;
    for (std::int64_t j = 0; j < width; ++j) {
        max[j] = static_cast<T>(-infinity);
        sum[j] = weighted[j] = 0;
    }
    for (std::int64_t start = 0; start < vocab; start += tile_vocab) {
        const std::int64_t count = vocab - start < tile_vocab ? vocab - start : tile_vocab;
        const T* tile = logits + start * stride;
        for (std::int64_t j = 0; j < width; j += lanes) {
            const auto at = [&](std::int64_t v) { return Memory<T>::load(tile + v * stride + j); };
            for (std::int64_t v = 0; v < count; ++v) prefetch_next_tile(tile + v * stride + j, stride);
            const Vector<T> old_max = Memory<T>::load(max + j);
            Vector<T> a = old_max, b = old_max;
            std::int64_t v = 0;
            for (; v + 2 <= count; v += 2) {
                a = larger(a, at(v));
                b = larger(b, at(v + 1));
            }
            if (v < count) a = larger(a, at(v));
            const Vector<T> new_max = larger(a, b);
            const Vector<T> high = scaled ? Memory<T>::load(scale.inverse_temperature_high + j) : Vector<T>{};
            const Vector<T> low = scaled ? Memory<T>::load(scale.inverse_temperature_low + j) : Vector<T>{};
            const Vector<T> shift = shift_of<T, capped>(new_max, scale.softcap);
            const Vector<T> old_shift = shift_of<T, capped>(old_max, scale.softcap);
            // nothing to move where all so far was -inf
            const Vector<T> difference = old_max == static_cast<T>(-infinity) ? Vector<T>{} : old_shift - shift;
            const Vector<T> moved = without_infinity<T>(divide<T, scaled>(difference, high, low));
            const Vector<T> factor = Simd<T>::exp(moved);
            const Vector<T> old_sum = Memory<T>::load(sum + j);
            Vector<T> sums[2] = {}, weights[2] = {};
            const auto add = [&](Vector<T> x, int chain) {
                const Vector<T> y =
                    without_infinity<T>(divide<T, scaled>(cap<T, capped>(x, scale.softcap) - shift, high, low));
                const Vector<T> e = Simd<T>::exp(y);
                sums[chain] += e;
                weights[chain] += y * e;
            };
            for (v = 0; v + 2 <= count; v += 2) {
                add(at(v), 0);
                add(at(v + 1), 1);
            }
            if (v < count) add(at(v), 0);
            const Vector<T> old_weighted = (Memory<T>::load(weighted + j) + moved * old_sum) * factor;
            Memory<T>::store(weighted + j, old_weighted + (weights[0] + weights[1]));
            Memory<T>::store(sum + j, old_sum * factor + (sums[0] + sums[1]));
            Memory<T>::store(max + j, new_max);
        }
    }
}

template <class T, bool capped, bool scaled, bool has_linear>
void column_gradient_of(T* logits, std::int64_t stride, std::int64_t vocab, std::int64_t width,
                        const ColumnScale<T>& scale, const T* max, const T* constant, const T* linear) {
    constexpr std::int64_t lanes = Simd<T>::lanes;
    for (std::int64_t start = 0; start < vocab; start += tile_vocab) {
        const std::int64_t count = vocab - start < tile_vocab ? vocab - start : tile_vocab;
        T* tile = logits + start * stride;
        for (std::int64_t j = 0; j < width; j += lanes) {
            const Vector<T> high = scaled ? Memory<T>::load(scale.inverse_temperature_high + j) : Vector<T>{};
            const Vector<T> low = scaled ? Memory<T>::load(scale.inverse_temperature_low + j) : Vector<T>{};
            const Vector<T> shift = shift_of<T, capped>(Memory<T>::load(max + j), scale.softcap);
            const Vector<T> of_one = Memory<T>::load(constant + j);
            const Vector<T> of_y = has_linear ? Memory<T>::load(linear + j) : Vector<T>{};
            for (std::int64_t v = 0; v < count; ++v) {
                T* at = tile + v * stride + j;
                prefetch_next_tile(at, stride);
                Vector<T> cap_slope;
                const Vector<T> capped_logit = cap<T, capped>(Memory<T>::load(at), scale.softcap, &cap_slope);
                const Vector<T> y = without_infinity<T>(divide<T, scaled>(capped_logit - shift, high, low));
                const Vector<T> d = Simd<T>::exp(y) * (has_linear ? y * of_y + of_one : of_one);
                Memory<T>::store(at, capped ? d * cap_slope : d);
            }
        }
    }
}

// ---- the options, which are the same for all of a call, become template arguments ----

template <class Logit>
void row_sums(const Logit* row, std::int64_t vocab, const RowScale& scale, RowSums& sums) {
    const auto run = [&](auto* function) { function(row, nullptr, vocab, scale, sums, nullptr); };
    if (scale.softcap != 0.0) return run(row_sums_of<Logit, true, true, false>);
    run(scale.temperature != 1.0 ? row_sums_of<Logit, false, true, false> : row_sums_of<Logit, false, false, false>);
}

template <class Logit>
void row_weights(const Logit* row, Logit* weights, std::int64_t vocab, const RowScale& scale, RowSums& sums,
                 double* block_max) {
    const auto run = [&](auto* function) { function(row, weights, vocab, scale, sums, block_max); };
    run(scale.temperature != 1.0 ? row_sums_of<Logit, false, true, true> : row_sums_of<Logit, false, false, true>);
}

template <class Logit>
void row_gradient(const Logit* row, Logit* d_row, std::int64_t vocab, const RowScale& scale, const RowSlope& slope) {
    if (scale.softcap != 0.0) return row_gradient_of<Logit, true, true, true>(row, d_row, vocab, scale, slope);
    if (slope.linear != 0.0) return row_gradient_of<Logit, false, true, true>(row, d_row, vocab, scale, slope);
    if (scale.temperature != 1.0) return row_gradient_of<Logit, false, true, false>(row, d_row, vocab, scale, slope);
    row_gradient_of<Logit, false, false, false>(row, d_row, vocab, scale, slope);
}

template <class T>
void column_sums(const T* logits, std::int64_t stride, std::int64_t vocab, std::int64_t width, const ColumnScale<T>& scale,
                 T* max, T* sum, T* weighted) {
    const auto run = [&](auto* function) { function(logits, stride, vocab, width, scale, max, sum, weighted); };
    const bool scaled = scale.inverse_temperature_high != nullptr;
    if (scale.softcap != 0) return run(scaled ? column_sums_of<T, true, true> : column_sums_of<T, true, false>);
    run(scaled ? column_sums_of<T, false, true> : column_sums_of<T, false, false>);
}

template <class T, bool has_linear>
void column_gradient_with(T* logits, std::int64_t stride, std::int64_t vocab, std::int64_t width,
                          const ColumnScale<T>& scale, const T* max, const T* constant, const T* linear) {
    const auto run = [&](auto* function) { function(logits, stride, vocab, width, scale, max, constant, linear); };
    const bool scaled = scale.inverse_temperature_high != nullptr;
    if (scale.softcap != 0) {
        return run(scaled ? column_gradient_of<T, true, true, has_linear> : column_gradient_of<T, true, false, has_linear>);
    }
    run(scaled ? column_gradient_of<T, false, true, has_linear> : column_gradient_of<T, false, false, has_linear>);
}

template <class T>
void column_gradient(T* logits, std::int64_t stride, std::int64_t vocab, std::int64_t width, const ColumnScale<T>& scale,
                     const T* max, const T* constant, const T* linear) {
    if (linear != nullptr) {
        return column_gradient_with<T, true>(logits, stride, vocab, width, scale, max, constant, linear);
    }
    column_gradient_with<T, false>(logits, stride, vocab, width, scale, max, constant, linear);
}

template <class Function>
void map_vectors(const float* x, float* out, std::int64_t count, Function function) {
    constexpr std::int64_t lanes = Simd<float>::lanes;
    for_each_vector(x, count, [&](Vector<float> v, std::int64_t i) {
        const Vector<float> result = function(v);
        for (std::int64_t k = 0; k < lanes && i + k < count; ++k) out[i + k] = result[k];
    });
}

void map_exp(const float* x, float* out, std::int64_t count) { map_vectors(x, out, count, Simd<float>::exp); }
void map_tanh(const float* x, float* out, std::int64_t count) { map_vectors(x, out, count, Simd<float>::tanh); }

}  // namespace

const Kernels GTPO_KERNELS = {
    {row_sums<float>, row_weights<float>, row_rescale<float>, row_gradient<float>},
    {row_sums<Bfloat16>, nullptr, nullptr, row_gradient<Bfloat16>},
    {row_sums<double>, row_weights<double>, row_rescale<double>, row_gradient<double>},
    {column_sums<float>, column_gradient<float>},
    {column_sums<double>, column_gradient<double>},
    map_exp,
    map_tanh,
};

}  // namespace gtpo
