#include "gtpo_loss.h"

namespace gtpo {
namespace {

struct Context {
    const LossRows& loss;
    bool is_float64;
};

RowUpstream upstream_of(const void* data, std::int64_t i, const RowStatistics& row) {
    const auto& [loss, is_float64] = *static_cast<const Context*>(data);
    // rounded as it is stored: the ratio of a log-probability to itself is 1
    const double logprob = is_float64 ? row.logprob : static_cast<double>(static_cast<float>(row.logprob));
    const bool has_old = loss.old_logprobs != nullptr;
    return {loss_slope(logprob, loss.advantages[i], has_old ? loss.old_logprobs[i] : logprob, has_old, loss.rule), 0.0};
}

}  // namespace

SweepStatus gtpo_loss_cpu(const Logits& logits, const Logits* d_logits, const RowBatch& batch, const LossRows& loss,
                          RowStatistics* statistics, std::int64_t num_threads) {
    const Context context{loss, logits.type == LogitType::float64};
    return sweep_rows_cpu(logits, d_logits, batch, statistics, upstream_of, &context, false, num_threads);
}

}  // namespace gtpo
