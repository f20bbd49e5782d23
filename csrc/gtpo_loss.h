// The clipped loss straight from logits: their softmax, the slope of the loss, and d_logits in the same sweep.
#pragma once

#include "clipped_loss.h"
#include "token_logprobs.h"

namespace gtpo {

// What the loss of every wanted row needs; [num_rows] each.
struct LossRows {
    const double* advantages;
    const double* old_logprobs;  // null for ratio 1
    ClipRule rule;
};

// As sweep_rows_cpu.  The slope is that of the log-probability as stored, in the accumulator type of the logits.
SweepStatus gtpo_loss_cpu(const Logits& logits, const Logits* d_logits, const RowBatch& batch, const LossRows& loss,
                          RowStatistics* statistics, std::int64_t num_threads);

}  // namespace gtpo
