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

// What each turn is in its population.
struct Entries {
    std::vector<std::int64_t> of_turn;              // [num_turns], the turn whose value is its own entry; -1: none
    const std::vector<std::int64_t>& token_counts;  // [num_turns]
    bool by_tokens;                                 // an entry weighs as many tokens as it has, else 1

    double mass(std::int64_t k) const { return by_tokens ? static_cast<double>(token_counts[static_cast<std::size_t>(k)]) : 1.0; }
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

Entries entries_of(const Turns& turns, const std::vector<std::int64_t>& token_counts, Population population) {
    Entries entries{std::vector<std::int64_t>(token_counts.size(), -1), token_counts, population == Population::tokens};
    for (std::int64_t trajectory = 0; trajectory < turns.num_trajectories; ++trajectory) {
        std::int64_t first_with_tokens = -1;
        const std::int64_t end = turns.cu_turns[trajectory + 1];
        for (std::int64_t k = turns.cu_turns[trajectory]; k < end; ++k) {
            const auto turn = static_cast<std::size_t>(k);
            if (token_counts[turn] == 0) continue;
            if (first_with_tokens < 0) first_with_tokens = k;
            entries.of_turn[turn] = k;
        }
        if (population != Population::trajectories) continue;
        std::fill(entries.of_turn.begin() + turns.cu_turns[trajectory], entries.of_turn.begin() + end, first_with_tokens);
    }
    return entries;
}

// Numbers from 0, one a scope, in order of appearance.
struct ScopeNumbers {
    std::vector<std::size_t> of_turn;  // [num_turns]
    std::size_t count = 0;
};

ScopeNumbers number_scopes(const Turns& turns, const ScopeIds& ids, Scope scope) {
    ScopeNumbers numbers{std::vector<std::size_t>(static_cast<std::size_t>(turns.num_turns)), 0};
    std::map<std::pair<std::int64_t, std::int64_t>, std::size_t> known;
    const auto number_of = [&](std::int64_t group, std::int64_t second) {
        return known.try_emplace({group, second}, known.size()).first->second;
    };
    const bool by_turn = scope == Scope::group_turn || scope == Scope::group_anchor;
    for (std::int64_t trajectory = 0; trajectory < turns.num_trajectories; ++trajectory) {
        const std::int64_t first = turns.cu_turns[trajectory], end = turns.cu_turns[trajectory + 1];
        const std::int64_t group = scope == Scope::batch ? 0 : ids.group_ids[trajectory];
        if (!by_turn && first < end) {
            std::fill(numbers.of_turn.begin() + first, numbers.of_turn.begin() + end, number_of(group, 0));
        }
        for (std::int64_t k = first; by_turn && k < end; ++k) {
            const std::int64_t second = scope == Scope::group_turn ? k - first : ids.anchor_ids[k];
            numbers.of_turn[static_cast<std::size_t>(k)] = number_of(group, second);
        }
    }
    numbers.count = known.size();
    return numbers;
}

struct Bounds {
    double low = std::numeric_limits<double>::infinity();
    double high = -std::numeric_limits<double>::infinity();
};

// normalised [num_turns], of x [num_turns]. Sums are added in ascending order of turns, so that the bits depend on nothing
// but the input.
void normalise(const Turns& turns, const ScopeIds& ids, const std::vector<std::int64_t>& token_counts,
               const CreditRule& rule, const double* x, double* result) {
    const Entries entries = entries_of(turns, token_counts, rule.population);
    const ScopeNumbers scope = number_scopes(turns, ids, rule.scope);
    std::vector<ScopeStatistics> statistics(scope.count);
    std::vector<Bounds> bounds(scope.count);
    const auto for_each_entry = [&](auto visit) {
        for (std::int64_t k = 0; k < turns.num_turns; ++k) {
            const auto turn = static_cast<std::size_t>(k);
            if (entries.of_turn[turn] == k) visit(scope.of_turn[turn], entries.mass(k), x[k]);
        }
    };
    for_each_entry([&](std::size_t i, double mass, double value) {
        statistics[i].count += 1.0;
        statistics[i].total += mass;
        statistics[i].weighted += mass * value;
        bounds[i].low = std::min(bounds[i].low, value);
        bounds[i].high = std::max(bounds[i].high, value);
    });
    for (std::size_t i = 0; i < scope.count; ++i) {
        statistics[i].has_spread = bounds[i].high > bounds[i].low;
        statistics[i].mean = statistics[i].has_spread ? statistics[i].weighted / statistics[i].total : bounds[i].low;
    }
    for_each_entry([&](std::size_t i, double mass, double value) {
        statistics[i].std += mass * (value - statistics[i].mean) * (value - statistics[i].mean);
    });
    for (ScopeStatistics& of_scope : statistics) {
        of_scope.std = of_scope.has_spread ? std::sqrt(of_scope.std / (of_scope.total - static_cast<double>(rule.ddof))) : 0.0;
    }
    for (std::int64_t k = 0; k < turns.num_turns; ++k) {
        const auto turn = static_cast<std::size_t>(k);
        const std::int64_t own = entries.of_turn[turn];
        const double own_mass = own < 0 ? 0.0 : entries.mass(own);
        result[k] = normalised(x[k], own_mass, own < 0 ? 0.0 : x[own], statistics[scope.of_turn[turn]], rule);
    }
}

// x[k] + gamma * (what follows), in place.
void discount(const Turns& turns, double gamma, double* x) {
    for (std::int64_t trajectory = 0; trajectory < turns.num_trajectories; ++trajectory) {
        double after = 0.0;
        for (std::int64_t k = turns.cu_turns[trajectory + 1] - 1; k >= turns.cu_turns[trajectory]; --k) {
            after = x[k] + gamma * after;
            x[k] = after;
        }
    }
}

}  // namespace

Status turn_returns_cpu(const Turns& turns, double gamma, double* returns) {
    if (!cu_turns_cover(turns)) return Status::bad_cu_turns;
    std::copy(turns.turn_rewards, turns.turn_rewards + turns.num_turns, returns);
    discount(turns, gamma, returns);
    return Status::ok;
}

template <class T>
Status turn_advantages_cpu(const Turns& turns, const ScopeIds& ids, const Tokens& tokens, const CreditRule& rule,
                           double* returns, double* turn_advantages, T* token_advantages) {
    // reading the ids is most of the work, so it is done once
    std::vector<Run> runs;
    runs.reserve(static_cast<std::size_t>(2 * turns.num_turns));
    for_each_piece(tokens, [&](std::int64_t turn, std::int64_t end) {
        if (runs.empty() || runs.back().turn != turn) runs.push_back({turn, end});
        runs.back().end = end;
    });
    std::vector<std::int64_t> token_counts(static_cast<std::size_t>(turns.num_turns), 0);
    std::int64_t start = 0;
    for (const Run& run : runs) {
        if (run.turn < -1 || run.turn >= turns.num_turns) return Status::bad_turn_id;
        if (run.turn >= 0) token_counts[static_cast<std::size_t>(run.turn)] += run.end - start;
        start = run.end;
    }
    const Status status = turn_returns_cpu(turns, rule.gamma_before, returns);
    if (status != Status::ok) return status;
    if (rule.per_trajectory) {
        for (std::int64_t trajectory = 0; trajectory < turns.num_trajectories; ++trajectory) {
            const std::int64_t first = turns.cu_turns[trajectory];
            for (std::int64_t k = first + 1; k < turns.cu_turns[trajectory + 1]; ++k) returns[k] = returns[first];
        }
    }

    if (rule.scope == Scope::none) {
        std::copy(returns, returns + turns.num_turns, turn_advantages);
    } else {
        normalise(turns, ids, token_counts, rule, returns, turn_advantages);
    }
    if (rule.gamma_after > 0.0) discount(turns, rule.gamma_after, turn_advantages);
    // the entry before the first is for tokens of no turn
    std::vector<T> of_turn(static_cast<std::size_t>(turns.num_turns) + 1, 0);
    for (std::size_t k = 0; k < token_counts.size(); ++k) {
        if (token_counts[k] == 0) turn_advantages[k] = 0.0;
        of_turn[k + 1] = static_cast<T>(turn_advantages[k]);
    }
    start = 0;
    for (const Run& run : runs) {
        std::fill(token_advantages + start, token_advantages + run.end, of_turn[static_cast<std::size_t>(run.turn + 1)]);
        start = run.end;
    }
    return Status::ok;
}

template Status turn_advantages_cpu<float>(const Turns&, const ScopeIds&, const Tokens&, const CreditRule&, double*,
                                           double*, float*);
template Status turn_advantages_cpu<double>(const Turns&, const ScopeIds&, const Tokens&, const CreditRule&, double*,
                                            double*, double*);

}  // namespace gtpo
