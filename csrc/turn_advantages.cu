// One cooperative launch; what one phase writes and another reads is parted by a barrier of the grid.
// A block owns a scope: it visits the scope's trajectories three times, for the mean, the deviations and the result. Sums run in
// an order fixed by the block size, whatever the grid is. Members are found by comparing group ids, so the work is linear in
// turns and tokens, and trajectories times groups / 128 for the ids; scope="group_anchor" searches for every turn, which is
// trajectories times turns / 128. scope="batch" is one block's work.
#include "turn_advantages_cuda.h"

#include <cmath>

#include "device.cuh"

namespace gtpo {
namespace {

constexpr int kThreads = 128;
constexpr int kWarpSize = 32;

__device__ inline std::int64_t at(const DeviceIds& ids, std::int64_t i) {
    return ids.wide ? static_cast<const std::int64_t*>(ids.data)[i] : static_cast<const std::int32_t*>(ids.data)[i];
}

__device__ inline double reward_at(const DeviceTurns& turns, std::int64_t k) {
    switch (turns.reward_type) {
        case DType::float64: return static_cast<const double*>(turns.turn_rewards)[k];
        case DType::bfloat16: return to_float(static_cast<const BFloat16*>(turns.turn_rewards)[k]);
        case DType::float16: return to_float(static_cast<const Half*>(turns.turn_rewards)[k]);
        default: return static_cast<const float*>(turns.turn_rewards)[k];
    }
}

__device__ inline void store(const DeviceCredit& credit, void* results, std::int64_t i, double value) {
    if (credit.wide_results) {
        static_cast<double*>(results)[i] = value;
    } else {
        static_cast<float*>(results)[i] = static_cast<float>(value);
    }
}

struct WarpResults {
    double of_warp[kThreads / kWarpSize];
};

// Over all threads of the block; all get the result.
template <class Combine>
__device__ double reduce_block(double x, Combine combine) {
#pragma unroll
    for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) x = combine(x, shuffle_xor(x, lanes));
    double* of_warp = block_shared<WarpResults>().of_warp;
    // the reduction before this one has been read by all
    sync_block();
    if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = x;
    sync_block();
    x = of_warp[0];
    for (int warp = 1; warp < kThreads / kWarpSize; ++warp) x = combine(x, of_warp[warp]);
    return x;
}

struct Add {
    __device__ double operator()(double a, double b) const { return a + b; }
};
struct Higher {
    __device__ double operator()(double a, double b) const { return fmax(a, b); }
};

// Turns that share statistics: those of the trajectories of one group, or of all; `second` is the position or the anchor id
// that tells scopes of one group apart.
struct ScopeTurns {
    std::int64_t first;  // the scope's first trajectory
    std::int64_t group;
    std::int64_t second;
};

__device__ inline double mass_of(const DeviceCredit& credit, std::int64_t k) {
    return credit.rule.population == Population::tokens ? static_cast<double>(credit.token_counts[k]) : 1.0;
}

// The trajectory's entry where a population has one a trajectory: its first turn with tokens, -1 where it has none.
__device__ inline std::int64_t entry_of_trajectory(const DeviceCredit& credit, std::int64_t begin, std::int64_t end) {
    for (std::int64_t k = begin; k < end; ++k) {
        if (credit.token_counts[k] > 0) return k;
    }
    return -1;
}

// visit(k, entry) for this thread's share of the scope's turns; entry: the turn whose value is k's own in the population.
template <class Visit>
__device__ void for_each_turn(const DeviceCredit& credit, const ScopeTurns& scope, Visit visit) {
    const DeviceTurns& turns = credit.turns;
    const CreditRule& rule = credit.rule;
    for (std::int64_t t = scope.first + threadIdx.x; t < turns.num_trajectories; t += kThreads) {
        if (rule.scope != Scope::batch && at(credit.group_ids, t) != scope.group) continue;
        const std::int64_t begin = at(turns.cu_turns, t);
        const std::int64_t end = at(turns.cu_turns, t + 1);
        const bool one_each = rule.population == Population::trajectories;
        const std::int64_t of_trajectory = one_each ? entry_of_trajectory(credit, begin, end) : -1;
        for (std::int64_t k = rule.scope == Scope::group_turn ? begin + scope.second : begin; k < end; ++k) {
            if (rule.scope != Scope::group_anchor || at(credit.anchor_ids, k) == scope.second) {
                visit(k, one_each ? of_trajectory : credit.token_counts[k] > 0 ? k : -1);
            }
            if (rule.scope == Scope::group_turn) break;
        }
    }
}

__device__ __forceinline__ void normalise(const DeviceCredit& credit, const ScopeTurns& scope) {
    const double* x = credit.exact_returns;
    double count = 0, total = 0, weighted = 0, high = -INFINITY, minus_low = -INFINITY;
    for_each_turn(credit, scope, [&](std::int64_t k, std::int64_t entry) {
        if (entry != k) return;
        count += 1;
        total += mass_of(credit, k);
        weighted += mass_of(credit, k) * x[k];
        high = fmax(high, x[k]);
        minus_low = fmax(minus_low, -x[k]);
    });
    ScopeStatistics statistics;
    statistics.count = reduce_block(count, Add{});
    statistics.total = reduce_block(total, Add{});
    statistics.weighted = reduce_block(weighted, Add{});
    const double low = -reduce_block(minus_low, Higher{});
    statistics.has_spread = reduce_block(high, Higher{}) > low;
    const double mean = statistics.has_spread ? statistics.weighted / statistics.total : low;
    statistics.mean = mean;
    double squares = 0;
    for_each_turn(credit, scope, [&](std::int64_t k, std::int64_t entry) {
        if (entry == k) squares += mass_of(credit, k) * (x[k] - mean) * (x[k] - mean);
    });
    statistics.std = sqrt(reduce_block(squares, Add{}) / (statistics.total - static_cast<double>(credit.rule.ddof)));
    for_each_turn(credit, scope, [&](std::int64_t k, std::int64_t entry) {
        const double own_mass = entry < 0 ? 0 : mass_of(credit, entry);
        credit.exact_advantages[k] = normalised(x[k], own_mass, entry < 0 ? 0 : x[entry], statistics, credit.rule);
    });
}

__device__ inline bool is_first_of_group(const DeviceCredit& credit, std::int64_t trajectory) {
    const std::int64_t group = at(credit.group_ids, trajectory);
    // the usual case, trajectories of a group in a row, needs no search
    if (trajectory > 0 && at(credit.group_ids, trajectory - 1) == group) return false;
    double seen = 0;
    for (std::int64_t t = threadIdx.x; t < trajectory; t += kThreads) {
        if (at(credit.group_ids, t) == group) seen = 1;
    }
    return reduce_block(seen, Higher{}) == 0;
}

// How many scopes a group is: one for each turn of its longest trajectory, or just one.
__device__ inline std::int64_t scopes_of_group(const DeviceCredit& credit, std::int64_t first, std::int64_t group) {
    if (credit.rule.scope != Scope::group_turn) return 1;
    double longest = 0;
    for (std::int64_t t = first + threadIdx.x; t < credit.turns.num_trajectories; t += kThreads) {
        const std::int64_t length = at(credit.turns.cu_turns, t + 1) - at(credit.turns.cu_turns, t);
        if (at(credit.group_ids, t) == group) longest = fmax(longest, static_cast<double>(length));
    }
    return static_cast<std::int64_t>(reduce_block(longest, Higher{}));
}

// Whether no turn before k, of the same group, has k's anchor.
__device__ inline bool is_first_of_anchor(const DeviceCredit& credit, std::int64_t trajectory, std::int64_t k) {
    const std::int64_t group = at(credit.group_ids, trajectory), anchor = at(credit.anchor_ids, k);
    double seen = 0;
    for (std::int64_t t = threadIdx.x; t <= trajectory; t += kThreads) {
        if (at(credit.group_ids, t) != group) continue;
        const std::int64_t end = t == trajectory ? k : at(credit.turns.cu_turns, t + 1);
        for (std::int64_t other = at(credit.turns.cu_turns, t); other < end; ++other) {
            if (at(credit.anchor_ids, other) == anchor) seen = 1;
        }
    }
    return reduce_block(seen, Higher{}) == 0;
}

__device__ inline void normalise_all(const DeviceCredit& credit) {
    const Scope scope = credit.rule.scope;
    const std::int64_t last = scope == Scope::batch && credit.turns.num_trajectories > 0 ? 1 : credit.turns.num_trajectories;
    for (std::int64_t t = blockIdx.x; t < last; t += gridDim.x) {
        const std::int64_t group = at(credit.group_ids, t);
        if (scope == Scope::group_anchor) {
            for (std::int64_t k = at(credit.turns.cu_turns, t); k < at(credit.turns.cu_turns, t + 1); ++k) {
                if (is_first_of_anchor(credit, t, k)) normalise(credit, {t, group, at(credit.anchor_ids, k)});
            }
            continue;
        }
        if (scope != Scope::batch && !is_first_of_group(credit, t)) continue;
        const std::int64_t scopes = scopes_of_group(credit, t, group);
        for (std::int64_t position = 0; position < scopes; ++position) normalise(credit, {t, group, position});
    }
}

// visit(begin, end) for this thread's share of the trajectories.
template <class Visit>
__device__ void for_each_trajectory(const DeviceTurns& turns, Visit visit) {
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < turns.num_trajectories; t += stride) {
        visit(at(turns.cu_turns, t), at(turns.cu_turns, t + 1));
    }
}

__device__ inline void write_returns(const DeviceTurns& turns, double gamma, bool per_trajectory, double* returns) {
    for_each_trajectory(turns, [&](std::int64_t begin, std::int64_t end) {
        double after = 0;
        for (std::int64_t k = end - 1; k >= begin; --k) {
            after = reward_at(turns, k) + gamma * after;
            returns[k] = after;
        }
        for (std::int64_t k = begin; per_trajectory && k < end; ++k) returns[k] = after;
    });
}

struct Returns {
    DeviceTurns turns;
    double gamma;
    double* returns;
};

__global__ void __launch_bounds__(kThreads) sweep_returns(Returns sweep) {
    write_returns(sweep.turns, sweep.gamma, false, sweep.returns);
}

__global__ void __launch_bounds__(kThreads, 4) sweep_credit(DeviceCredit credit) {
    const DeviceTurns& turns = credit.turns;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;

    for (std::int64_t k = first; k < turns.num_turns; k += stride) credit.token_counts[k] = 0;
    write_returns(turns, credit.rule.gamma_before, credit.rule.per_trajectory, credit.exact_returns);
    sync_grid();

    for (std::int64_t i = first; i < credit.num_tokens; i += stride) {
        const std::int64_t k = at(credit.turn_ids, i);
        if (k < 0) continue;
        if (credit.rule.population == Population::tokens) {
            atomicAdd(&credit.token_counts[k], 1);
        } else if (i == 0 || at(credit.turn_ids, i - 1) != k) {
            // one write where a run of tokens begins; another run of the same turn may write the same
            atomicExch(&credit.token_counts[k], 1);
        }
    }
    for (std::int64_t k = first; k < turns.num_turns; k += stride) store(credit, credit.returns, k, credit.exact_returns[k]);
    sync_grid();

    if (credit.rule.scope == Scope::none) {
        for (std::int64_t k = first; k < turns.num_turns; k += stride) credit.exact_advantages[k] = credit.exact_returns[k];
    } else {
        normalise_all(credit);
    }
    sync_grid();

    for_each_trajectory(turns, [&](std::int64_t begin, std::int64_t end) {
        double after = 0;
        for (std::int64_t k = end - 1; k >= begin; --k) {
            after = credit.exact_advantages[k] + credit.rule.gamma_after * after;
            store(credit, credit.turn_advantages, k, credit.token_counts[k] > 0 ? after : 0);
        }
    });
    sync_grid();

    for (std::int64_t i = first; i < credit.num_tokens; i += stride) {
        const std::int64_t k = at(credit.turn_ids, i);
        if (credit.wide_results) {
            static_cast<double*>(credit.token_advantages)[i] = k < 0 ? 0 : static_cast<const double*>(credit.turn_advantages)[k];
        } else {
            static_cast<float*>(credit.token_advantages)[i] = k < 0 ? 0 : static_cast<const float*>(credit.turn_advantages)[k];
        }
    }
}

std::int64_t blocks_of(std::int64_t items) { return (items + kThreads - 1) / kThreads; }

}  // namespace

const char* cuda_error_string(int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

int turn_returns_cuda(const DeviceTurns& turns, double gamma, double* returns, void* stream) {
    return launch(&sweep_returns, blocks_of(turns.num_trajectories), kThreads, static_cast<cudaStream_t>(stream),
                  Returns{turns, gamma, returns});
}

int turn_advantages_cuda(const DeviceCredit& credit, void* stream) {
    const std::int64_t blocks = credit.turns.num_trajectories + blocks_of(credit.num_tokens) + blocks_of(credit.turns.num_turns);
    return launch_cooperative(&sweep_credit, blocks, kThreads, static_cast<cudaStream_t>(stream), credit);
}

}  // namespace gtpo
