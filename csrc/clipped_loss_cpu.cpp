#include "clipped_loss.h"

#include <algorithm>
#include <cmath>

namespace gtpo {
namespace {

constexpr double max_log_ratio = 20.0;

bool is_clipped(double ratio, double advantage, const ClipRule& rule) {
    return advantage > 0.0 ? ratio > 1.0 + rule.clip_high : advantage < 0.0 && ratio < 1.0 - rule.clip_low;
}

}  // namespace

double loss_slope(double logprob, double advantage, double old_logprob, bool has_old, const ClipRule& rule) {
    if (std::isinf(logprob) || (has_old && std::isinf(old_logprob))) return 0.0;
    const double log_ratio = has_old ? logprob - old_logprob : 0.0;
    const double ratio = std::exp(log_ratio);
    // what is clipped by a NaN nobody knows: it is false here, and stays to be seen
    if (std::abs(log_ratio) > max_log_ratio || is_clipped(ratio, advantage, rule)) return 0.0;
    return -ratio * advantage / rule.denominator;
}

void clipped_loss_cpu(const LossTokens& tokens, const ClipRule& rule, bool all_metrics, double* loss, double* metrics,
                      double* d_logprobs) {
    double surrogate = 0.0, clip_low = 0.0, clip_high = 0.0, k1 = 0.0, k3 = 0.0, entropy = 0.0;
    double ratios = 0.0, ratio_max = 0.0, logprobs = 0.0;
    double num_computed = 0.0, num_dropped = 0.0, num_nonfinite = 0.0;
    const bool has_old = tokens.old_logprobs != nullptr;
    for (std::int64_t i = 0; i < tokens.num_tokens; ++i) {
        if (d_logprobs != nullptr) d_logprobs[i] = 0.0;
        if (!tokens.loss_mask[i]) continue;
        const double advantage = tokens.advantages[i];
        if (advantage == 0.0 && !all_metrics) {
            num_dropped += 1.0;
            continue;
        }
        num_computed += 1.0;
        const double logprob = tokens.logprobs[i];
        const double old_logprob = has_old ? tokens.old_logprobs[i] : logprob;
        if (std::isinf(logprob) || std::isinf(old_logprob)) {
            num_nonfinite += 1.0;
            continue;
        }
        const double difference = logprob - old_logprob;
        // written so that a NaN stays one
        const double log_ratio =
            difference > max_log_ratio ? max_log_ratio : (difference < -max_log_ratio ? -max_log_ratio : difference);
        const double ratio = std::exp(log_ratio);
        const double bounded =
            ratio > 1.0 + rule.clip_high ? 1.0 + rule.clip_high : (ratio < 1.0 - rule.clip_low ? 1.0 - rule.clip_low : ratio);
        if (advantage != 0.0) surrogate += std::min(ratio * advantage, bounded * advantage);
        if (is_clipped(ratio, advantage, rule)) (advantage > 0.0 ? clip_high : clip_low) += 1.0;
        k1 -= log_ratio;
        k3 += std::expm1(log_ratio) - log_ratio;
        if (tokens.entropy != nullptr) entropy += tokens.entropy[i];
        ratios += ratio;
        // a NaN is larger than any, and stays
        if (std::isnan(ratio) || ratio > ratio_max) ratio_max = ratio;
        logprobs += logprob;
        if (d_logprobs != nullptr && advantage != 0.0) {
            d_logprobs[i] = loss_slope(logprob, advantage, old_logprob, has_old, rule);
        }
    }
    *loss = -surrogate / rule.denominator;
    const double num_live = std::max(1.0, num_computed - num_nonfinite);
    const double means[] = {clip_low, clip_high, k1, k3, entropy, ratios};
    for (const double sum : means) *metrics++ = sum / num_live;
    const double others[] = {ratio_max, logprobs / num_live, num_computed, num_dropped, num_nonfinite};
    std::copy(others, others + 5, metrics);
}

}  // namespace gtpo
