#include "gtpo_loss_cuda.h"

#include <type_traits>

#include "logits_sweep.cuh"

namespace gtpo {
namespace {

constexpr double kMaxLogRatio = 20;

// d loss / d logprob: -ratio * advantage / denominator; 0 if clipped, clamped or infinite.
template <class A>
__device__ A loss_slope(const LossSweep& sweep, std::int64_t batch_row, A logprob, A advantage) {
    const A old = sweep.old_logprobs ? static_cast<const A*>(sweep.old_logprobs)[batch_row] : logprob;
    if (std::isinf(logprob) || std::isinf(old)) return 0;
    const A log_ratio = logprob - old;
    const A ratio = exp(log_ratio);
    if (fabs(log_ratio) > static_cast<A>(kMaxLogRatio)) return 0;
    if (advantage != advantage) return advantage;
    if (advantage > 0 ? ratio > static_cast<A>(1 + sweep.clip_high) : ratio < static_cast<A>(1 - sweep.clip_low)) return 0;
    return -ratio * advantage / *static_cast<const A*>(sweep.denominator);
}

template <class T, bool aligned>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>) sweep_loss(LossSweep sweep) {
    using A = Accumulator<T>;
    const Logits& logits = sweep.logits;
    for (std::int64_t i = blockIdx.x; i < logits.num_rows; i += gridDim.x) {
        const std::int64_t batch_row = logits.rows ? logits.rows[i] : i;
        const bool masked = !sweep.loss_mask[batch_row];
        const A advantage = masked ? 0 : static_cast<const A*>(sweep.advantages)[batch_row];
        T* out = sweep.d_logits ? static_cast<T*>(sweep.d_logits) + i * logits.vocab : nullptr;
        A slope = 0;
        if (advantage != 0 || (sweep.all_metrics && !masked)) {
            const T* row = static_cast<const T*>(logits.data) + i * logits.stride;
            const std::int64_t target = logits.targets[batch_row];
            const LogitScale<A> scale(logits, batch_row);
            const RowSoftmax<A> softmax = row_softmax<T, aligned>(row, logits.vocab, target, scale);
            if (threadIdx.x == 0) {
                static_cast<A*>(sweep.logprobs)[batch_row] = softmax.target;
                static_cast<A*>(sweep.entropy)[batch_row] = softmax.entropy;
            }
            if (advantage != 0) slope = loss_slope(sweep, batch_row, softmax.target, advantage);
            if (out && slope != 0) write_gradient<T, aligned>(row, out, logits.vocab, target, scale, softmax, slope, A{0});
        }
        if (out && slope == 0) write_zeros<T, aligned>(out, logits.vocab);
    }
}

}  // namespace

int gtpo_loss_cuda(const LossSweep& sweep, void* stream) {
    const Logits& logits = sweep.logits;
    return dispatch(logits, sweep.d_logits, logits.vocab, [&](auto element, auto aligned) {
        using T = decltype(element);
        return launch(&sweep_loss<T, decltype(aligned)::value>, logits.num_rows, threads_of(logits.vocab, sizeof(T)),
                      static_cast<cudaStream_t>(stream), sweep);
    });
}

}  // namespace gtpo
