// The clipped policy loss of per-token log-probabilities, its slope and its metrics, in double.
// The definition is gtpo_kernels/clipped_loss/reference.py.
#pragma once

#include <cstdint>

namespace gtpo {

struct ClipRule {
    double clip_low;
    double clip_high;
    double denominator;
};

// Every array is [num_tokens]; what tokens outside the mask hold is never read.
struct LossTokens {
    std::int64_t num_tokens;
    const double* logprobs;
    const double* advantages;
    const bool* loss_mask;
    const double* old_logprobs;   // null for the log-probabilities themselves, ratio 1
    const double* entropy;        // null for none
};

// The fields of LossMetrics, in their order.
constexpr int num_loss_metrics = 11;

// d loss / d logprob of a counted token; has_old false for ratio 1.
double loss_slope(double logprob, double advantage, double old_logprob, bool has_old, const ClipRule& rule);

// Adds up in the order of the tokens.  metrics: [num_loss_metrics].  d_logprobs: [num_tokens], or null.
void clipped_loss_cpu(const LossTokens& tokens, const ClipRule& rule, bool all_metrics, double* loss, double* metrics,
                      double* d_logprobs);

}  // namespace gtpo
