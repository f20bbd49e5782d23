// The clipped loss from logits: log-probability and entropy of every counted row, and d loss / d logits in the same sweep.
// The definition is gtpo_kernels/gtpo_loss/reference.py.
#pragma once

#include <cstdint>

#include "logits_sweep_cuda.h"

namespace gtpo {

// Arrays are [batch] of the accumulator, but for loss_mask.
struct LossSweep {
    Logits logits;
    void* d_logits;                // [num_rows, vocab], contiguous, of the logits' dtype; may be the logits; null: forward only
    const unsigned char* loss_mask;
    const void* advantages;
    const void* old_logprobs;      // null: those of this pass
    const void* denominator;       // one number
    double clip_low;
    double clip_high;
    bool all_metrics;              // also compute rows of advantage 0
    void* logprobs;                // written for the rows that are computed
    void* entropy;
};

// Rows outside the loss mask, and of advantage 0, are not read; their d_logits are 0. Returns a cudaError_t.
int gtpo_loss_cuda(const LossSweep& sweep, void* stream);

}  // namespace gtpo
