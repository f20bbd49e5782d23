#include "token_logprobs.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "threads.h"

namespace gtpo {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();
// Logits a thread must have to be worth waking.
constexpr std::int64_t min_logits_of_thread = 1 << 15;

double widen(float logit) { return static_cast<double>(logit); }
double widen(double logit) { return logit; }
double widen(Bfloat16 logit) {
    const std::uint32_t bits = static_cast<std::uint32_t>(logit.bits) << 16;
    float value;
    static_assert(sizeof value == sizeof bits);
    __builtin_memcpy(&value, &bits, sizeof value);
    return static_cast<double>(value);
}

void narrow(double value, float& out) { out = static_cast<float>(value); }
void narrow(double value, double& out) { out = value; }
void narrow(double value, Bfloat16& out) {
    const auto single = static_cast<float>(value);
    std::uint32_t bits;
    __builtin_memcpy(&bits, &single, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out.bits = static_cast<std::uint16_t>(std::isnan(single) ? 0x7fc0u : rounded);
}

double cap(double logit, double softcap) {
    return softcap == 0.0 || std::isinf(logit) ? logit : softcap * std::tanh(logit / softcap);
}

// What the target's logit has to do with a row, once its sums are known, in double.
struct Target {
    double logit;
    double y;  // (cap(logit) - cap(max)) / temperature
};

Target target_of(double logit, const RowSums& sums, double temperature, double softcap) {
    const double max = sums.max == -infinity ? 0.0 : sums.max;
    return {logit, (cap(logit, softcap) - cap(max, softcap)) / temperature};
}

RowStatistics statistics_of(const RowSums& sums, const Target& target, double temperature, double softcap) {
    // a row of all -inf has sum 0; one with NaN has sum NaN
    if (sums.sum == 0.0) return {-infinity, 0.0, -infinity, 0.0};
    const double log_sum = std::log(sums.sum);
    return {target.y - log_sum, log_sum - sums.weighted / sums.sum, cap(sums.max, softcap) / temperature, log_sum};
}

struct Gradient {
    RowSlope slope;
    double of_target;
};

Gradient gradient_of(const RowSums& sums, const Target& target, const RowStatistics& row, RowUpstream upstream,
                     double temperature, double softcap) {
    if (sums.sum == 0.0) return {{-infinity, 0.0, 0.0}, 0.0};
    // a target of probability 0 has no gradient
    const double g = row.logprob == -infinity ? 0.0 : upstream.logprob / temperature;
    const double h = upstream.entropy / temperature;
    const double inverse_sum = 1.0 / sums.sum;
    Gradient gradient;
    gradient.slope.max = sums.max;
    gradient.slope.constant = -inverse_sum * (g + h * (row.entropy - row.log_sum));
    gradient.slope.linear = -inverse_sum * h;
    const double p = std::exp(row.logprob);
    const double tanh = softcap == 0.0 ? 0.0 : std::tanh(target.logit / softcap);
    const double spread = p == 0.0 ? 0.0 : p * (row.logprob + row.entropy);
    gradient.of_target = (g * (1.0 - p) - h * spread) * (1.0 - tanh * tanh);
    return gradient;
}

struct Sweep {
    const Logits& logits;
    const Logits* d_logits;
    const RowBatch& batch;
    RowStatistics* statistics;
    RowUpstream (*upstream)(const void*, std::int64_t, const RowStatistics&);
    const void* context;
    bool has_entropy_gradient;
    std::int64_t num_threads;

    std::int64_t row(std::int64_t i) const { return batch.rows == nullptr ? i : batch.rows[i]; }
    double temperature(std::int64_t i) const { return batch.temperature == nullptr ? 1.0 : batch.temperature[i]; }

    // Threads worth waking, none of them for less than min_logits_of_thread.
    std::int64_t threads() const {
        const double logits_of_thread = static_cast<double>(batch.num_rows) * static_cast<double>(logits.vocab) /
                                        static_cast<double>(min_logits_of_thread);
        return std::min(num_threads, static_cast<std::int64_t>(logits_of_thread) + 1);
    }
};

template <class Logit>
void sweep_row(const Sweep& sweep, const RowKernels<Logit>& kernels, std::int64_t i) {
    const std::int64_t vocab = sweep.logits.vocab;
    const RowScale scale{sweep.temperature(i), sweep.batch.softcap};
    const Logit* row = static_cast<const Logit*>(sweep.logits.data) + sweep.row(i) * sweep.logits.row_stride;
    Logit* d_row = nullptr;
    if (sweep.d_logits != nullptr) {
        d_row = static_cast<Logit*>(sweep.d_logits->data) + sweep.row(i) * sweep.d_logits->row_stride;
    }
    const std::int64_t at = sweep.batch.targets[i];
    const double target_logit = widen(row[at]);
    // one exponential an entry instead of two, where the gradient is a multiple of the weights
    const bool keeps_weights =
        d_row != nullptr && kernels.weights != nullptr && scale.softcap == 0.0 && !sweep.has_entropy_gradient;
    std::vector<double> blocks(keeps_weights ? static_cast<std::size_t>((vocab + row_block_vocab - 1) / row_block_vocab) : 0);
    RowSums sums;
    if (keeps_weights) {
        kernels.weights(row, d_row, vocab, scale, sums, blocks.data());
    } else {
        kernels.sums(row, vocab, scale, sums);
    }
    const Target target = target_of(target_logit, sums, scale.temperature, scale.softcap);
    const RowStatistics statistics = statistics_of(sums, target, scale.temperature, scale.softcap);
    sweep.statistics[i] = statistics;
    if (d_row == nullptr) return;
    const RowUpstream upstream = sweep.upstream(sweep.context, i, statistics);
    if (sums.sum == 0.0 || (upstream.logprob == 0.0 && upstream.entropy == 0.0)) {
        std::fill_n(d_row, vocab, Logit{});
        return;
    }
    const Gradient gradient = gradient_of(sums, target, statistics, upstream, scale.temperature, scale.softcap);
    if (keeps_weights) {
        for (double& block : blocks) {
            // a block of all -inf before any other has weights of 0
            const double moved = block == -infinity ? 0.0 : (block - sums.max) / scale.temperature;
            block = gradient.slope.constant * std::exp(moved);
        }
        kernels.rescale(d_row, vocab, blocks.data());
    } else {
        kernels.gradient(row, d_row, vocab, scale, gradient.slope);
    }
    narrow(gradient.of_target, d_row[at]);
}

template <class Logit>
void sweep_as_rows(const Sweep& sweep, const RowKernels<Logit>& kernels) {
    for_each_task(sweep.batch.num_rows, sweep.threads(), [&](std::int64_t i) { sweep_row(sweep, kernels, i); });
}

// Sums of blocks of the vocabulary, [num_blocks, width] each, added up in the order of the blocks.
template <class T>
RowSums combine_blocks(const T* max, const T* sum, const T* weighted, std::int64_t num_blocks, std::int64_t width,
                       double temperature, double softcap) {
    RowSums all{-infinity, 0.0, 0.0};
    for (std::int64_t b = 0; b < num_blocks; ++b) all.max = std::max(all.max, static_cast<double>(max[b * width]));
    const double shift = cap(all.max, softcap);
    for (std::int64_t b = 0; b < num_blocks; ++b) {
        const auto block_max = static_cast<double>(max[b * width]);
        // a block of all -inf has shifted by 0, and its sums are 0, or NaN
        const double moved = block_max == -infinity ? 0.0 : (cap(block_max, softcap) - shift) / temperature;
        const double factor = std::exp(moved);
        all.weighted += factor * (static_cast<double>(weighted[b * width]) + moved * static_cast<double>(sum[b * width]));
        all.sum += factor * static_cast<double>(sum[b * width]);
    }
    return all;
}

template <class T>
void sweep_as_columns(const Sweep& sweep, const ColumnKernels<T>& kernels) {
    const std::int64_t num_rows = sweep.batch.num_rows, vocab = sweep.logits.vocab, stride = sweep.logits.vocab_stride;
    const std::int64_t width = (num_rows + column_multiple - 1) / column_multiple * column_multiple;
    const std::int64_t num_blocks = (vocab + column_block_vocab - 1) / column_block_vocab;
    const bool scaled = sweep.batch.temperature != nullptr;
    T* logits = static_cast<T*>(sweep.logits.data);
    const auto rows_of = [&](std::int64_t count) { return std::vector<T>(static_cast<std::size_t>(count * width)); };
    std::vector<T> max = rows_of(num_blocks), sum = rows_of(num_blocks), weighted = rows_of(num_blocks);
    std::vector<T> high = rows_of(scaled ? 1 : 0), low = rows_of(scaled ? 1 : 0);
    for (std::int64_t i = 0; scaled && i < num_rows; ++i) {
        const double inverse = 1.0 / sweep.temperature(i);
        const auto k = static_cast<std::size_t>(i);
        high[k] = static_cast<T>(inverse);
        low[k] = static_cast<T>(inverse - static_cast<double>(high[k]));
    }
    const ColumnScale<T> scale{scaled ? high.data() : nullptr, scaled ? low.data() : nullptr,
                               static_cast<T>(sweep.batch.softcap)};
    const auto for_each_block = [&](auto body) {
        for_each_task(num_blocks, sweep.threads(), [&](std::int64_t b) {
            body(logits + b * column_block_vocab * stride, std::min(column_block_vocab, vocab - b * column_block_vocab), b * width);
        });
    };
    for_each_block([&](T* block, std::int64_t count, std::int64_t at) {
        kernels.sums(block, stride, count, width, scale, max.data() + at, sum.data() + at, weighted.data() + at);
    });

    std::vector<T> row_max = rows_of(1), constant = rows_of(1), linear = rows_of(1);
    std::vector<double> of_target(static_cast<std::size_t>(num_rows));
    bool has_linear = false;
    for (std::int64_t i = 0; i < num_rows; ++i) {
        const double temperature = sweep.temperature(i), softcap = sweep.batch.softcap;
        const RowSums sums =
            combine_blocks(max.data() + i, sum.data() + i, weighted.data() + i, num_blocks, width, temperature, softcap);
        const Target target = target_of(widen(logits[sweep.batch.targets[i] * stride + i]), sums, temperature, softcap);
        sweep.statistics[i] = statistics_of(sums, target, temperature, softcap);
        if (sweep.d_logits == nullptr) continue;
        const RowUpstream upstream = sweep.upstream(sweep.context, i, sweep.statistics[i]);
        const Gradient gradient = gradient_of(sums, target, sweep.statistics[i], upstream, temperature, softcap);
        const auto k = static_cast<std::size_t>(i);
        row_max[k] = static_cast<T>(gradient.slope.max);
        constant[k] = static_cast<T>(gradient.slope.constant);
        linear[k] = static_cast<T>(gradient.slope.linear);
        of_target[k] = gradient.of_target;
        has_linear = has_linear || gradient.slope.linear != 0.0;
    }
    if (sweep.d_logits == nullptr) return;
    for_each_block([&](T* block, std::int64_t count, std::int64_t) {
        kernels.gradient(block, stride, count, width, scale, row_max.data(), constant.data(),
                         has_linear ? linear.data() : nullptr);
    });
    for (std::int64_t i = 0; i < num_rows; ++i) {
        logits[sweep.batch.targets[i] * stride + i] = static_cast<T>(of_target[static_cast<std::size_t>(i)]);
    }
}

bool is_rows(const Logits& logits) {
    // strides of what is empty, or a single row, say nothing
    if (logits.num_rows == 0) return true;
    return logits.vocab_stride == 1 && (logits.num_rows == 1 || logits.row_stride >= logits.vocab);
}

SweepStatus check(const Sweep& sweep) {
    const Logits& logits = sweep.logits;
    const RowBatch& batch = sweep.batch;
    for (std::int64_t i = 0; i < batch.num_rows; ++i) {
        if (sweep.row(i) < 0 || sweep.row(i) >= logits.num_rows) return SweepStatus::bad_row;
        if (batch.targets[i] < 0 || batch.targets[i] >= logits.vocab) return SweepStatus::bad_target;
    }
    const Logits* d = sweep.d_logits;
    if (d != nullptr && (d->type != logits.type || d->num_rows != logits.num_rows || d->vocab != logits.vocab)) {
        return SweepStatus::bad_layout;
    }
    if (is_rows(logits)) return d == nullptr || is_rows(*d) ? SweepStatus::ok : SweepStatus::bad_layout;
    const std::int64_t width = (batch.num_rows + column_multiple - 1) / column_multiple * column_multiple;
    const bool is_columns = logits.row_stride == 1 && logits.vocab_stride >= width && batch.rows == nullptr &&
                            logits.type != LogitType::bfloat16 && (d == nullptr || d->data == logits.data);
    return is_columns ? SweepStatus::ok : SweepStatus::bad_layout;
}

}  // namespace

SweepStatus sweep_rows_cpu(const Logits& logits, const Logits* d_logits, const RowBatch& batch, RowStatistics* statistics,
                           RowUpstream (*upstream)(const void*, std::int64_t, const RowStatistics&), const void* context,
                           bool has_entropy_gradient, std::int64_t num_threads) {
    const Sweep sweep{logits, d_logits, batch, statistics, upstream, context, has_entropy_gradient, num_threads};
    const SweepStatus status = check(sweep);
    if (status != SweepStatus::ok || batch.num_rows == 0) return status;
    const Kernels& best = kernels();
    if (is_rows(logits)) {
        switch (logits.type) {
            case LogitType::float32: sweep_as_rows(sweep, best.rows_float32); break;
            case LogitType::bfloat16: sweep_as_rows(sweep, best.rows_bfloat16); break;
            case LogitType::float64: sweep_as_rows(sweep, best.rows_float64); break;
        }
    } else if (logits.type == LogitType::float32) {
        sweep_as_columns(sweep, best.columns_float32);
    } else {
        sweep_as_columns(sweep, best.columns_float64);
    }
    return SweepStatus::ok;
}

}  // namespace gtpo
