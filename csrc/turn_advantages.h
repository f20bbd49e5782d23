// Turn rewards to discounted returns, to advantages normalised within a scope, to one advantage a token.
// The definition is gtpo_kernels/turn_advantages/reference.py. Pointers and sizes in, status out: without torch headers
// one build serves every torch version.
#pragma once

#include <cstdint>

namespace gtpo {

enum class Scope { group, batch, group_turn, none };
enum class Population { turns, trajectories };
enum class Status { ok, bad_cu_turns, bad_turn_id };

struct Turns {
    const double* turn_rewards;     // [num_turns]
    const std::int64_t* cu_turns;   // [num_trajectories + 1], prefix sums of the turns of each trajectory
    std::int64_t num_turns;
    std::int64_t num_trajectories;
};

struct Tokens {
    const std::int64_t* turn_ids;   // [num_tokens], row of turn_rewards, -1 where not sampled
    std::int64_t num_tokens;
};

struct CreditRule {
    double gamma;
    Scope scope;
    Population population;
    std::int64_t ddof;
    double eps;
};

// returns [num_turns]: R_k = r_k + gamma * R_{k+1}, restarting at each trajectory.
Status turn_returns_cpu(const Turns& turns, double gamma, double* returns);

// turn_advantages [num_turns]: (R_k - mean) / (std + eps) over the population of the turn's scope; exactly 0 where that has
// no spread, and for turns without tokens, which are no part of it. token_advantages [num_tokens]: those of each token's
// turn, rounded to T (float or double), 0 where turn_ids is -1. group_ids [num_trajectories]. returns is written too.
template <class T>
Status turn_advantages_cpu(const Turns& turns, const std::int64_t* group_ids, const Tokens& tokens, const CreditRule& rule,
                           double* returns, double* turn_advantages, T* token_advantages);

}  // namespace gtpo
