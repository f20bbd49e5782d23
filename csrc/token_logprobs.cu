#include "token_logprobs_cuda.h"

#include <type_traits>

#include "logits_sweep.cuh"

namespace gtpo {
namespace {

struct Forward {
    Logits logits;
    RowStatistics statistics;
};

struct Backward {
    Logits logits;
    RowStatistics statistics;
    Upstream upstream;
    void* d_logits;
};

template <class T, bool aligned>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>) sweep_statistics(Forward sweep) {
    using A = Accumulator<T>;
    const Logits& logits = sweep.logits;
    for (std::int64_t i = blockIdx.x; i < logits.num_rows; i += gridDim.x) {
        const std::int64_t batch_row = logits.rows ? logits.rows[i] : i;
        const T* row = static_cast<const T*>(logits.data) + i * logits.stride;
        const LogitScale<A> scale(logits, batch_row);
        const RowSoftmax<A> softmax = row_softmax<T, aligned>(row, logits.vocab, logits.targets[batch_row], scale);
        if (threadIdx.x == 0) {
            static_cast<A*>(sweep.statistics.logprobs)[batch_row] = softmax.target;
            static_cast<A*>(sweep.statistics.entropy)[batch_row] = softmax.entropy;
            static_cast<A*>(sweep.statistics.row_max)[batch_row] = softmax.max;
            static_cast<A*>(sweep.statistics.log_sum)[batch_row] = softmax.log_sum;
        }
    }
}

template <class T, bool aligned>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks<T>) sweep_gradient(Backward sweep) {
    using A = Accumulator<T>;
    const Logits& logits = sweep.logits;
    const auto at = [](const void* data, std::int64_t index) { return static_cast<const A*>(data)[index]; };
    for (std::int64_t i = blockIdx.x; i < logits.num_rows; i += gridDim.x) {
        const std::int64_t batch_row = logits.rows ? logits.rows[i] : i;
        T* out = static_cast<T*>(sweep.d_logits) + i * logits.vocab;
        A g = sweep.upstream.logprobs ? at(sweep.upstream.logprobs, batch_row) : 0;
        const A h = sweep.upstream.entropy ? at(sweep.upstream.entropy, batch_row) : 0;
        if (g == 0 && h == 0) {
            write_zeros<T, aligned>(out, logits.vocab);
            continue;
        }
        const A logprob = at(sweep.statistics.logprobs, batch_row);
        const A max = at(sweep.statistics.row_max, batch_row);
        if (logprob == minus_infinity<A>()) g = 0;
        const RowSoftmax<A> softmax{max == minus_infinity<A>() ? 0 : max, at(sweep.statistics.log_sum, batch_row),
                                    at(sweep.statistics.entropy, batch_row), max, logprob};
        const T* row = static_cast<const T*>(logits.data) + i * logits.stride;
        write_gradient<T, aligned>(row, out, logits.vocab, logits.targets[batch_row], LogitScale<A>(logits, batch_row),
                                   softmax, g, h);
    }
}

}  // namespace

int token_logprobs_cuda(const Logits& logits, const RowStatistics& statistics, void* stream) {
    return dispatch(logits, nullptr, 0, [&](auto element, auto aligned) {
        using T = decltype(element);
        return launch(&sweep_statistics<T, decltype(aligned)::value>, logits.num_rows, threads_of(logits.vocab, sizeof(T)),
                      static_cast<cudaStream_t>(stream), Forward{logits, statistics});
    });
}

int token_logprobs_backward_cuda(const Logits& logits, const RowStatistics& statistics, const Upstream& upstream,
                                 void* d_logits, void* stream) {
    return dispatch(logits, d_logits, logits.vocab, [&](auto element, auto aligned) {
        using T = decltype(element);
        return launch(&sweep_gradient<T, decltype(aligned)::value>, logits.num_rows, threads_of(logits.vocab, sizeof(T)),
                      static_cast<cudaStream_t>(stream), Backward{logits, statistics, upstream, d_logits});
    });
}

}  // namespace gtpo
