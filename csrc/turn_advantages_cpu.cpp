#include "turn_advantages.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <map>
#include <utility>
#include <vector>

namespace gtpo {
namespace {

// Turns that share statistics, in ascending order, and those of them that make the statistics.
struct ScopeTurns {
    std::vector<std::int64_t> turns;
    std::vector<std::int64_t> population;
};

struct Statistics {
    double mean = 0.0;
    double std = 0.0;
    bool has_spread = false;
};

bool cu_turns_cover(const Turns& turns) {
    const std::int64_t* cu = turns.cu_turns;
    return cu[0] == 0 && cu[turns.num_trajectories] == turns.num_turns && std::is_sorted(cu, cu + turns.num_trajectories + 1);
}

// Added in ascending order of turns, so the bits do not depend on anything but the input.
Statistics statistics_of(const std::vector<std::int64_t>& population, const double* returns, std::int64_t ddof) {
    double sum = 0.0;
    double low = std::numeric_limits<double>::infinity();
    double high = -low;
    for (const std::int64_t k : population) {
        sum += returns[k];
        low = std::min(low, returns[k]);
        high = std::max(high, returns[k]);
    }
    Statistics statistics;
    // Where all returns are equal the rounding error of their mean would be divided by eps, and look like a difference.
    statistics.has_spread = high > low;
    if (!statistics.has_spread) return statistics;
    const auto count = static_cast<double>(population.size());
    statistics.mean = sum / count;
    double squares = 0.0;
    for (const std::int64_t k : population) {
        const double deviation = returns[k] - statistics.mean;
        squares += deviation * deviation;
    }
    statistics.std = std::sqrt(squares / (count - static_cast<double>(ddof)));
    return statistics;
}

std::map<std::pair<std::int64_t, std::int64_t>, ScopeTurns> turns_by_scope(
    const Turns& turns, const std::int64_t* group_ids, const std::vector<bool>& has_tokens, const CreditRule& rule) {
    std::map<std::pair<std::int64_t, std::int64_t>, ScopeTurns> scopes;
    for (std::int64_t trajectory = 0; trajectory < turns.num_trajectories; ++trajectory) {
        const std::int64_t first = turns.cu_turns[trajectory];
        const std::int64_t group = rule.scope == Scope::batch ? 0 : group_ids[trajectory];
        bool is_first_with_tokens = true;
        for (std::int64_t k = first; k < turns.cu_turns[trajectory + 1]; ++k) {
            if (!has_tokens[static_cast<std::size_t>(k)]) continue;
            ScopeTurns& scope = scopes[{group, rule.scope == Scope::group_turn ? k - first : 0}];
            scope.turns.push_back(k);
            if (rule.population == Population::turns || is_first_with_tokens) scope.population.push_back(k);
            is_first_with_tokens = false;
        }
    }
    return scopes;
}

}  // namespace

Status turn_returns_cpu(const Turns& turns, double gamma, double* returns) {
    if (!cu_turns_cover(turns)) return Status::bad_cu_turns;
    for (std::int64_t trajectory = 0; trajectory < turns.num_trajectories; ++trajectory) {
        double after = 0.0;
        for (std::int64_t k = turns.cu_turns[trajectory + 1] - 1; k >= turns.cu_turns[trajectory]; --k) {
            after = turns.turn_rewards[k] + gamma * after;
            returns[k] = after;
        }
    }
    return Status::ok;
}

Status turn_advantages_cpu(const Turns& turns, const std::int64_t* group_ids, const Tokens& tokens, const CreditRule& rule,
                           double* returns, double* turn_advantages, double* token_advantages) {
    std::vector<bool> has_tokens(static_cast<std::size_t>(turns.num_turns), false);
    for (std::int64_t i = 0; i < tokens.num_tokens; ++i) {
        const std::int64_t turn = tokens.turn_ids[i];
        if (turn < -1 || turn >= turns.num_turns) return Status::bad_turn_id;
        if (turn >= 0) has_tokens[static_cast<std::size_t>(turn)] = true;
    }
    const Status status = turn_returns_cpu(turns, rule.gamma, returns);
    if (status != Status::ok) return status;

    std::fill_n(turn_advantages, turns.num_turns, 0.0);
    if (rule.scope == Scope::none) {
        for (std::int64_t k = 0; k < turns.num_turns; ++k) {
            if (has_tokens[static_cast<std::size_t>(k)]) turn_advantages[k] = returns[k];
        }
    } else {
        for (const auto& [key, scope] : turns_by_scope(turns, group_ids, has_tokens, rule)) {
            const Statistics statistics = statistics_of(scope.population, returns, rule.ddof);
            if (!statistics.has_spread) continue;
            for (const std::int64_t k : scope.turns) {
                turn_advantages[k] = (returns[k] - statistics.mean) / (statistics.std + rule.eps);
            }
        }
    }
    for (std::int64_t i = 0; i < tokens.num_tokens; ++i) {
        const std::int64_t turn = tokens.turn_ids[i];
        token_advantages[i] = turn < 0 ? 0.0 : turn_advantages[turn];
    }
    return Status::ok;
}

}  // namespace gtpo
