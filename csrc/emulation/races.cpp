// Runs every CUDA kernel once on small operands, for the thread sanitizer: tests/kernels/test_cuda_emulation.py compiles it
// with -fsanitize=thread and reads what it reports. Values are checked elsewhere.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "../gtpo_loss_cuda.h"
#include "../token_logprobs_cuda.h"
#include "../turn_advantages_cuda.h"

namespace {

// Two blocks of several rows each; vocabularies of one warp and of several, in whole 16-byte loads and not.
void sweep_logits(std::int64_t vocab) {
    const std::int64_t num_rows = 8;
    const std::size_t rows = num_rows, elements = rows * static_cast<std::size_t>(vocab);
    std::vector<float> values(elements), d_values(elements), ones(rows, 1.0f), denominator(1, 8.0f);
    for (std::size_t i = 0; i < elements; ++i) values[i] = static_cast<float>(i * 7919 % 613) * 0.01f;
    std::vector<std::int64_t> targets(rows, vocab / 2);
    std::vector<unsigned char> mask(rows, 1);
    mask[1] = 0;
    std::vector<std::vector<float>> outputs(4, std::vector<float>(rows));
    const gtpo::RowStatistics statistics{outputs[0].data(), outputs[1].data(), outputs[2].data(), outputs[3].data()};
    const gtpo::Logits logits{gtpo::DType::float32, values.data(), vocab,   num_rows, vocab, nullptr,
                              targets.data(),       1.3,           nullptr, 5.0};
    gtpo::token_logprobs_cuda(logits, statistics, nullptr);
    gtpo::token_logprobs_backward_cuda(logits, statistics, {ones.data(), ones.data()}, d_values.data(), nullptr);
    gtpo::gtpo_loss_cuda({logits, values.data(), mask.data(), ones.data(), nullptr, denominator.data(), 0.2, 0.28, true,
                          outputs[0].data(), outputs[1].data()},
                         nullptr);
}

void credit(gtpo::Scope scope, gtpo::Population population, gtpo::Centre centre = gtpo::Centre::mean) {
    const std::int64_t num_trajectories = 6, num_turns = 3 * num_trajectories, num_tokens = 500;
    std::vector<float> rewards(num_turns), returns(num_turns), of_turns(num_turns), of_tokens(num_tokens);
    std::vector<std::int64_t> cu_turns(num_trajectories + 1), group_ids(num_trajectories), turn_ids(num_tokens);
    for (std::int64_t t = 0; t <= num_trajectories; ++t) cu_turns[static_cast<std::size_t>(t)] = 3 * t;
    for (std::int64_t t = 0; t < num_trajectories; ++t) group_ids[static_cast<std::size_t>(t)] = t % 2;
    // runs of three tokens, so that a turn is met again and again
    for (std::int64_t i = 0; i < num_tokens; ++i) turn_ids[static_cast<std::size_t>(i)] = i / 3 % (num_turns + 1) - 1;
    for (std::size_t k = 0; k < rewards.size(); ++k) rewards[k] = static_cast<float>(k % 4);
    std::vector<std::int64_t> anchor_ids(num_turns);
    for (std::size_t k = 0; k < anchor_ids.size(); ++k) anchor_ids[k] = static_cast<std::int64_t>(k % 2);
    std::vector<int> token_counts(num_turns);
    std::vector<double> exact(num_turns), exact_advantages(num_turns);
    const gtpo::DeviceTurns turns{rewards.data(), gtpo::DType::float32, {cu_turns.data(), true}, num_turns, num_trajectories};
    gtpo::turn_returns_cuda(turns, 0.9, exact.data(), nullptr);
    gtpo::turn_advantages_cuda({turns, {group_ids.data(), true}, {turn_ids.data(), true}, {anchor_ids.data(), true}, num_tokens,
                                {0.9, 0.5, false, scope, population, centre, true, 1, 1e-6, false}, token_counts.data(),
                                exact.data(), exact_advantages.data(), false, returns.data(), of_turns.data(),
                                of_tokens.data()},
                               nullptr);
}

}  // namespace

int main() {
    for (const std::int64_t vocab : {37, 257, 508}) sweep_logits(vocab);
    for (const auto scope : {gtpo::Scope::group, gtpo::Scope::batch, gtpo::Scope::group_turn, gtpo::Scope::group_anchor,
                             gtpo::Scope::none}) {
        credit(scope, gtpo::Population::turns);
    }
    credit(gtpo::Scope::group, gtpo::Population::trajectories, gtpo::Centre::leave_one_out);
    credit(gtpo::Scope::batch, gtpo::Population::tokens);
    std::puts("all kernels ran");
}
