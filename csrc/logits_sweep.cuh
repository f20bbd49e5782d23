// One block a row of logits: the row's softmax in one read, and its gradient in a second read and a write.
// The formulas are docs/numerics.md's.
#pragma once

#include <cmath>
#include <cstdint>

#include "device.cuh"
#include "logits_sweep_cuda.h"

namespace gtpo {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 512;
constexpr int kLoadBytes = 16;

template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ inline float to_accumulator(float x) { return x; }
__device__ inline double to_accumulator(double x) { return x; }
__device__ inline float to_accumulator(BFloat16 x) { return to_float(x); }
__device__ inline float to_accumulator(Half x) { return to_float(x); }
__device__ inline void round_to(float& out, float x) { out = x; }
__device__ inline void round_to(double& out, double x) { out = x; }

template <class A>
__device__ A minus_infinity() {
    return -static_cast<A>(INFINITY);
}

// Far below the logarithm of the smallest number: exp gives 0 as for -inf, but 0 * log_zero is 0 and not NaN.
template <class A>
__device__ A log_zero() {
    return static_cast<A>(-1e5);
}

// x / divisor, rounded as a division is: a product with the reciprocal, corrected by its remainder.
template <class A>
__device__ A divide(A x, A divisor, A reciprocal) {
    const A quotient = x * reciprocal;
    const A remainder = fma(-quotient, divisor, x);
    return std::isfinite(remainder) ? fma(remainder, reciprocal, quotient) : quotient;
}

// x = cap(logit) / temperature.
template <class A>
struct LogitScale {
    A temperature, reciprocal, softcap;

    __device__ LogitScale(const Logits& logits, std::int64_t batch_row)
        : temperature(logits.row_temperature ? static_cast<const A*>(logits.row_temperature)[batch_row]
                                             : static_cast<A>(logits.temperature)),
          reciprocal(1 / temperature),
          softcap(static_cast<A>(logits.softcap)) {}

    __device__ A over_temperature(A x) const {
        return temperature == 1 ? x : divide(x, temperature, reciprocal);
    }

    // slope: d cap / d logit. An infinite logit is a mask, put on after the cap: it stays what it is.
    __device__ A scaled(A logit, A& slope) const {
        slope = 1;
        if (softcap > 0 && !std::isinf(logit)) {
            const A bounded = std::tanh(logit / softcap);
            slope = 1 - bounded * bounded;
            logit = softcap * bounded;
        }
        return over_temperature(logit);
    }

    __device__ A scaled(A logit) const {
        A slope;
        return scaled(logit, slope);
    }
};

template <class T>
constexpr int kWidth = kLoadBytes / static_cast<int>(sizeof(T));

// Blocks a multiprocessor must hold: with 2 a thread has 64 registers, which is too few for float64.
template <class T>
constexpr int kMinBlocks = sizeof(T) == 8 ? 1 : 2;

template <class T>
struct alignas(kLoadBytes) Pack {
    T values[kWidth<T>];
};

// The elements of a row that one thread holds at a time. Element k is at first + k * step.
// aligned: neighbours, moved 16 bytes at once; else a block apart, so that neighbouring threads read neighbouring elements.
template <class T, bool aligned>
struct Tile {
    std::int64_t first;
    std::int64_t vocab;
    int step;
    Pack<T> pack;

    __device__ Tile(std::int64_t start, std::int64_t vocab_size)
        : first(start + (aligned ? threadIdx.x * kWidth<T> : threadIdx.x)), vocab(vocab_size), step(aligned ? 1 : blockDim.x) {}

    __device__ bool whole() const { return aligned && first + kWidth<T> <= vocab; }
    __device__ bool holds(int k) const { return first + static_cast<std::int64_t>(k) * step < vocab; }

    __device__ void load(const T* row) {
        if (whole()) {
            pack = *reinterpret_cast<const Pack<T>*>(row + first);
            return;
        }
#pragma unroll
        for (int k = 0; k < kWidth<T>; ++k) {
            if (holds(k)) {
                pack.values[k] = row[first + static_cast<std::int64_t>(k) * step];
            } else {
                round_to(pack.values[k], minus_infinity<Accumulator<T>>());
            }
        }
    }

    __device__ void store(T* row) const {
        if (whole()) {
            *reinterpret_cast<Pack<T>*>(row + first) = pack;
            return;
        }
#pragma unroll
        for (int k = 0; k < kWidth<T>; ++k) {
            if (holds(k)) row[first + static_cast<std::int64_t>(k) * step] = pack.values[k];
        }
    }

    // k of a position of the row, -1 where this tile does not hold it.
    __device__ int find(std::int64_t position) const {
        const std::int64_t offset = position - first;
        return offset >= 0 && offset < static_cast<std::int64_t>(kWidth<T>) * step && offset % step == 0
                   ? static_cast<int>(offset / step)
                   : -1;
    }
};

// visit(tile) for every tile of the row that belongs to this thread; the next one is under way meanwhile.
template <class T, bool aligned, class Visit>
__device__ void for_each_tile(const T* row, std::int64_t vocab, Visit visit) {
    const std::int64_t block_step = static_cast<std::int64_t>(blockDim.x) * kWidth<T>;
    Tile<T, aligned> next(0, vocab);
    if (next.first < vocab) next.load(row);
    for (std::int64_t start = 0; next.first < vocab; start += block_step) {
        Tile<T, aligned> tile = next;
        next = Tile<T, aligned>(start + block_step, vocab);
        if (next.first < vocab) next.load(row);
        visit(tile);
    }
}

template <class A>
__device__ A warp_max(A x) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x = fmax(x, shuffle_xor(x, lanes));
    return x;
}

template <class A>
__device__ A warp_sum(A x) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    return x;
}

// Over the elements x seen: their maximum, sum of e^(x - max), and sum of e^(x - max) (x - max).
template <class A>
struct RowSums {
    A max, sum, weighted;

    __device__ void raise_max(A higher) {
        // nothing was seen while max is -inf, or NaN, which stays
        if (max == higher || max == minus_infinity<A>()) {
            max = higher;
            return;
        }
        const A drop = max - higher;
        const A factor = exp(drop);
        weighted = factor * (weighted + sum * drop);
        sum *= factor;
        max = higher;
    }

    template <int width>
    __device__ void add(const A (&x)[width]) {
        A highest = x[0];
#pragma unroll
        for (int k = 1; k < width; ++k) highest = fmax(highest, x[k]);
        if (highest > max) raise_max(highest);
        const A shift = max == minus_infinity<A>() ? 0 : max;
#pragma unroll
        for (int k = 0; k < width; ++k) {
            const A below = x[k] - shift;
            const A weight = exp(below);
            sum += weight;
            weighted += weight * fmax(below, log_zero<A>());
        }
    }

    __device__ void add_up_warp() {
        raise_max(warp_max(max));
        sum = warp_sum(sum);
        weighted = warp_sum(weighted);
    }
};

template <class A>
struct WarpSums {
    RowSums<A> of_warp[kMaxThreads / kWarpSize];
};

// What a row's gradient needs: log p = (x - shift) - log_sum.
template <class A>
struct RowSoftmax {
    A shift, log_sum, entropy;
    A max;     // shift, but -inf for a row of all -inf
    A target;  // the log-probability of the target
};

// Read the row once. All threads of the block get the same; the row may be overwritten afterwards.
template <class T, bool aligned>
__device__ RowSoftmax<Accumulator<T>> row_softmax(const T* row, std::int64_t vocab, std::int64_t target,
                                                  const LogitScale<Accumulator<T>>& scale) {
    using A = Accumulator<T>;
    const A target_logit = scale.scaled(to_accumulator(row[target]));
    RowSums<A> sums{minus_infinity<A>(), 0, 0};
    for_each_tile<T, aligned>(row, vocab, [&](const Tile<T, aligned>& tile) {
        A x[kWidth<T>];
#pragma unroll
        for (int k = 0; k < kWidth<T>; ++k) x[k] = scale.scaled(to_accumulator(tile.pack.values[k]));
        sums.add(x);
    });
    sums.add_up_warp();
    auto& warps = block_shared<WarpSums<A>>();
    const int lane = threadIdx.x % kWarpSize;
    // the row before this one has been added up by all warps
    sync_block();
    if (lane == 0) warps.of_warp[threadIdx.x / kWarpSize] = sums;
    sync_block();
    sums = lane < static_cast<int>(blockDim.x) / kWarpSize ? warps.of_warp[lane] : RowSums<A>{minus_infinity<A>(), 0, 0};
    sums.add_up_warp();

    // a row of all -inf must give -inf, not NaN, so its shift is 0
    const bool dead = sums.sum == 0;
    const A sum = dead ? 1 : sums.sum;
    const A shift = dead ? 0 : sums.max;
    const A log_sum = log(sum);
    return {shift, log_sum, log_sum - sums.weighted / sum, sums.max, (target_logit - shift) - log_sum};
}

// out_v = (g (1[v = target] - p_v) - h p_v (log p_v + H)) / temperature, times the slope of the cap. out may be the row.
template <class T, bool aligned>
__device__ void write_gradient(const T* row, T* out, std::int64_t vocab, std::int64_t target,
                               const LogitScale<Accumulator<T>>& scale, const RowSoftmax<Accumulator<T>>& softmax,
                               Accumulator<T> g, Accumulator<T> h) {
    using A = Accumulator<T>;
    g = scale.over_temperature(g);
    h = scale.over_temperature(h);
    for_each_tile<T, aligned>(row, vocab, [&](Tile<T, aligned>& tile) {
        const int hit = tile.find(target);
#pragma unroll
        for (int k = 0; k < kWidth<T>; ++k) {
            A slope;
            const A x = scale.scaled(to_accumulator(tile.pack.values[k]), slope);
            const A log_p = (x - softmax.shift) - softmax.log_sum;
            const A by_p = h == 0 ? g : g + h * (fmax(log_p, log_zero<A>()) + softmax.entropy);
            const A gradient = (k == hit ? g : 0) - exp(log_p) * by_p;
            round_to(tile.pack.values[k], slope * gradient);
        }
        tile.store(out);
    });
}

template <class T, bool aligned>
__device__ void write_zeros(T* out, std::int64_t vocab) {
    const std::int64_t block_step = static_cast<std::int64_t>(blockDim.x) * kWidth<T>;
    for (std::int64_t start = 0; start < vocab; start += block_step) {
        Tile<T, aligned> tile(start, vocab);
#pragma unroll
        for (int k = 0; k < kWidth<T>; ++k) round_to(tile.pack.values[k], 0);
        tile.store(out);
    }
}

// Threads for a row: one load each, up to kMaxThreads.
inline int threads_of(std::int64_t vocab, std::int64_t element_bytes) {
    const std::int64_t warp_bytes = kWarpSize * kLoadBytes;
    const std::int64_t warps = (vocab * element_bytes + warp_bytes - 1) / warp_bytes;
    return kWarpSize * static_cast<int>(warps < kMaxThreads / kWarpSize ? warps : kMaxThreads / kWarpSize);
}

// run(T{}, aligned) with the element type, and whether every row starts at a multiple of 16 bytes.
template <class Run>
cudaError_t dispatch(const Logits& logits, const void* out, std::int64_t out_stride, Run run) {
    const auto with_type = [&](auto element) {
        using T = decltype(element);
        const auto starts_even = [](const void* data, std::int64_t stride) {
            return reinterpret_cast<std::uintptr_t>(data) % kLoadBytes == 0 && stride % kWidth<T> == 0;
        };
        const bool aligned = starts_even(logits.data, logits.stride) && starts_even(out, out_stride);
        return aligned ? run(element, std::true_type{}) : run(element, std::false_type{});
    };
    switch (logits.dtype) {
        case DType::float64: return with_type(double{});
        case DType::bfloat16: return with_type(BFloat16{});
        case DType::float16: return with_type(Half{});
        default: return with_type(float{});
    }
}

}  // namespace gtpo
