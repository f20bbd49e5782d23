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

// Neighbouring tokens of one id, up to `end`, from where the run before ends.
struct Run {
    std::int64_t turn;
    std::int64_t end;
};

// body(turn id, end) for consecutive pieces of the tokens that have one id. The tokens of a turn are neighbours, so most
// pieces are as long as what is compared at once.
template <class Body>
void for_each_piece(const Tokens& tokens, Body body) {
    constexpr std::int64_t piece = 32;
    const std::int64_t* ids = tokens.turn_ids;
    std::int64_t i = 0;
    for (; i + piece <= tokens.num_tokens; i += piece) {
        std::int64_t differs = 0;
        for (std::int64_t k = 1; k < piece; ++k) differs |= ids[i + k] ^ ids[i];
        if (differs == 0) {
            body(ids[i], i + piece);
        } else {
            for (std::int64_t k = i; k < i + piece; ++k) body(ids[k], k + 1);
        }
    }
    for (; i < tokens.num_tokens; ++i) body(ids[i], i + 1);
}

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
    const Turns& turns, const std::int64_t* group_ids, const std::vector<char>& has_tokens, const CreditRule& rule) {
    std::map<std::pair<std::int64_t, std::int64_t>, ScopeTurns> scopes;
    for (std::int64_t trajectory = 0; trajectory < turns.num_trajectories; ++trajectory) {
        const std::int64_t first = turns.cu_turns[trajectory];
        const std::int64_t group = rule.scope == Scope::batch ? 0 : group_ids[trajectory];
        bool is_first_with_tokens = true;
        ScopeTurns* of_trajectory = nullptr;
        for (std::int64_t k = first; k < turns.cu_turns[trajectory + 1]; ++k) {
            if (!has_tokens[static_cast<std::size_t>(k)]) continue;
            if (of_trajectory == nullptr || rule.scope == Scope::group_turn) {
                of_trajectory = &scopes[{group, rule.scope == Scope::group_turn ? k - first : 0}];
            }
            of_trajectory->turns.push_back(k);
            if (rule.population == Population::turns || is_first_with_tokens) of_trajectory->population.push_back(k);
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

template <class T>
Status turn_advantages_cpu(const Turns& turns, const std::int64_t* group_ids, const Tokens& tokens, const CreditRule& rule,
                           double* returns, double* turn_advantages, T* token_advantages) {
    // the entry before the first is for tokens of no turn, here and in the lookup below
    std::vector<char> seen(static_cast<std::size_t>(turns.num_turns) + 1, 0);
    // reading the ids is most of the work, so it is done once
    std::vector<Run> runs;
    for_each_piece(tokens, [&](std::int64_t turn, std::int64_t end) {
        if (runs.empty() || runs.back().turn != turn) runs.push_back({turn, end});
        runs.back().end = end;
    });
    for (const Run& run : runs) {
        if (run.turn < -1 || run.turn >= turns.num_turns) return Status::bad_turn_id;
        seen[static_cast<std::size_t>(run.turn + 1)] = 1;
    }
    const std::vector<char> has_tokens(seen.begin() + 1, seen.end());
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
    std::vector<T> of_turn(static_cast<std::size_t>(turns.num_turns) + 1, 0);
    std::transform(turn_advantages, turn_advantages + turns.num_turns, of_turn.begin() + 1,
                   [](double advantage) { return static_cast<T>(advantage); });
    std::int64_t start = 0;
    for (const Run& run : runs) {
        std::fill(token_advantages + start, token_advantages + run.end, of_turn[static_cast<std::size_t>(run.turn + 1)]);
        start = run.end;
    }
    return Status::ok;
}

template Status turn_advantages_cpu<float>(const Turns&, const std::int64_t*, const Tokens&, const CreditRule&, double*,
                                           double*, float*);
template Status turn_advantages_cpu<double>(const Turns&, const std::int64_t*, const Tokens&, const CreditRule&, double*,
                                            double*, double*);

}  // namespace gtpo
