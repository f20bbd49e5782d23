// Turn rewards to discounted returns, to advantages normalised within a scope, to one advantage a token.
// The definition is gtpo_kernels/turn_advantages/reference.py. Pointers and sizes in, status out: without torch headers
// one build serves every torch version.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define GTPO_HOST_DEVICE __host__ __device__
#else
#define GTPO_HOST_DEVICE
#endif

namespace gtpo {

enum class Scope { group, batch, group_turn, group_anchor, none };
enum class Population { turns, trajectories, tokens };
enum class Centre { mean, leave_one_out, none };
enum class Status { ok, bad_cu_turns, bad_turn_id };

struct Turns {
    const double* turn_rewards;     // [num_turns]
    const std::int64_t* cu_turns;   // [num_trajectories + 1], prefix sums of the turns of each trajectory
    std::int64_t num_turns;
    std::int64_t num_trajectories;
};

// What statistics are shared by. anchor_ids: [num_turns], read for Scope::group_anchor alone.
struct ScopeIds {
    const std::int64_t* group_ids;  // [num_trajectories]
    const std::int64_t* anchor_ids;
};

struct Tokens {
    const std::int64_t* turn_ids;   // [num_tokens], row of turn_rewards, -1 where not sampled
    std::int64_t num_tokens;
};

struct CreditRule {
    double gamma_before;   // discount of the rewards
    double gamma_after;    // discount of what is normalised
    bool per_trajectory;   // all turns of a trajectory have the value of its first
    Scope scope;
    Population population;
    Centre centre;
    bool divides;          // by std + eps
    std::int64_t ddof;
    double eps;
    bool keeps_alone;      // a population of one has mean 0 and std 1, else no advantage
};

// Of a scope's population: how many entries, what they weigh in sum, the sum of weight times value.
struct ScopeStatistics {
    double count = 0.0;
    double total = 0.0;
    double weighted = 0.0;
    double mean = 0.0;     // the lowest value where there is no spread: the mean of equal numbers may differ by rounding
    double std = 0.0;
    bool has_spread = false;
};

// x by the statistics of its scope. own_mass, own: weight and value of its own entry in the population, 0 where it has none.
GTPO_HOST_DEVICE inline double normalised(double x, double own_mass, double own, const ScopeStatistics& scope,
                                          const CreditRule& rule) {
    if (scope.count == 0.0) return 0.0;
    if (scope.count == 1.0) return rule.keeps_alone ? (rule.divides ? x / (1.0 + rule.eps) : x) : 0.0;
    double baseline = scope.mean;
    if (rule.centre == Centre::leave_one_out && scope.has_spread) {
        baseline = (scope.weighted - own_mass * own) / (scope.total - own_mass);
    }
    if (rule.centre == Centre::none) baseline = 0.0;
    if (!rule.divides) return x - baseline;
    // without a spread a rounding error would be divided by eps, and look like a difference
    return scope.has_spread ? (x - baseline) / (scope.std + rule.eps) : 0.0;
}

// returns [num_turns]: R_k = r_k + gamma * R_{k+1}, restarting at each trajectory.
Status turn_returns_cpu(const Turns& turns, double gamma, double* returns);

// turn_advantages [num_turns]: the returns, normalised as the rule says; exactly 0 for turns without tokens, which are no
// part of the statistics. token_advantages [num_tokens]: those of each token's turn, rounded to T (float or double), 0
// where turn_ids is -1. returns is written too.
template <class T>
Status turn_advantages_cpu(const Turns& turns, const ScopeIds& ids, const Tokens& tokens, const CreditRule& rule,
                           double* returns, double* turn_advantages, T* token_advantages);

}  // namespace gtpo
