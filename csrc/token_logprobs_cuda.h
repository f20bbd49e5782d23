// Log-probability and entropy of every row of logits, and their gradients.
// The definition is gtpo_kernels/token_logprobs/reference.py.
#pragma once

#include "logits_sweep_cuda.h"

namespace gtpo {

// [batch] of the accumulator each; lse = row_max + log_sum.
struct RowStatistics {
    void* logprobs;
    void* entropy;
    void* row_max;
    void* log_sum;
};

struct Upstream {
    const void* logprobs;  // [batch] accumulator, or null
    const void* entropy;   // [batch] accumulator, or null
};

// Both return a cudaError_t.
int token_logprobs_cuda(const Logits& logits, const RowStatistics& statistics, void* stream);

// d_logits [num_rows, vocab], contiguous, of the logits' dtype; may be the logits. Rows that nothing flows back to are not
// read; theirs are 0.
int token_logprobs_backward_cuda(const Logits& logits, const RowStatistics& statistics, const Upstream& upstream,
                                 void* d_logits, void* stream);

}  // namespace gtpo
