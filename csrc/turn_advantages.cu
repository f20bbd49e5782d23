// One cooperative launch; what one phase writes and another reads is parted by a barrier of the grid.
// A block owns a scope: it visits the scope's trajectories three times, for the mean, the deviations and the result. Sums run in
// an order fixed by the block size, whatever the grid is. Members are found by comparing group ids, so the work is linear in
// turns and tokens, and trajectories times groups / 128 for the ids. scope="batch" is one block's work.
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

// Turns that share statistics: those of the trajectories of one group, or of all.
struct ScopeTurns {
    std::int64_t first;     // the scope's first trajectory
    std::int64_t group;
    std::int64_t position;  // in the trajectory, of its only turn here; -1: all its turns
};

// visit(k, in_population) for this thread's share of the scope's turns; turns without tokens are in no population.
template <class Visit>
__device__ void for_each_turn(const DeviceCredit& credit, const ScopeTurns& scope, Visit visit) {
    const DeviceTurns& turns = credit.turns;
    for (std::int64_t t = scope.first + threadIdx.x; t < turns.num_trajectories; t += kThreads) {
        if (credit.rule.scope != Scope::batch && at(credit.group_ids, t) != scope.group) continue;
        const std::int64_t begin = at(turns.cu_turns, t);
        const std::int64_t end = at(turns.cu_turns, t + 1);
        bool before_first = true;
        for (std::int64_t k = scope.position < 0 ? begin : begin + scope.position; k < end; ++k) {
            const bool has_tokens = credit.has_tokens[k];
            visit(k, has_tokens && (before_first || credit.rule.population == Population::turns));
            before_first = before_first && !has_tokens;
            if (scope.position >= 0) break;
        }
    }
}

__device__ __forceinline__ void normalise(const DeviceCredit& credit, const ScopeTurns& scope) {
    const double* returns = credit.exact_returns;
    double count = 0, sum = 0, high = -INFINITY, minus_low = -INFINITY;
    for_each_turn(credit, scope, [&](std::int64_t k, bool in_population) {
        if (!in_population) return;
        count += 1;
        sum += returns[k];
        high = fmax(high, returns[k]);
        minus_low = fmax(minus_low, -returns[k]);
    });
    count = reduce_block(count, Add{});
    const double mean = reduce_block(sum, Add{}) / count;
    // without a spread the rounding error of the mean would be divided by eps, and look like a difference
    const bool has_spread = reduce_block(high, Higher{}) > -reduce_block(minus_low, Higher{});
    double squares = 0;
    for_each_turn(credit, scope, [&](std::int64_t k, bool in_population) {
        if (in_population) squares += (returns[k] - mean) * (returns[k] - mean);
    });
    const double std = sqrt(reduce_block(squares, Add{}) / (count - static_cast<double>(credit.rule.ddof)));
    for_each_turn(credit, scope, [&](std::int64_t k, bool) {
        const bool nonzero = has_spread && credit.has_tokens[k];
        store(credit, credit.turn_advantages, k, nonzero ? (returns[k] - mean) / (std + credit.rule.eps) : 0);
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

__device__ inline void normalise_all(const DeviceCredit& credit) {
    const bool one_scope = credit.rule.scope == Scope::batch;
    const std::int64_t last = one_scope && credit.turns.num_trajectories > 0 ? 1 : credit.turns.num_trajectories;
    for (std::int64_t t = blockIdx.x; t < last; t += gridDim.x) {
        if (!one_scope && !is_first_of_group(credit, t)) continue;
        const std::int64_t group = at(credit.group_ids, t);
        const std::int64_t scopes = scopes_of_group(credit, t, group);
        for (std::int64_t position = 0; position < scopes; ++position) {
            normalise(credit, {t, group, credit.rule.scope == Scope::group_turn ? position : -1});
        }
    }
}

__device__ inline void write_returns(const DeviceTurns& turns, double gamma, double* returns) {
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;
    for (std::int64_t t = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; t < turns.num_trajectories; t += stride) {
        double after = 0;
        for (std::int64_t k = at(turns.cu_turns, t + 1) - 1; k >= at(turns.cu_turns, t); --k) {
            after = reward_at(turns, k) + gamma * after;
            returns[k] = after;
        }
    }
}

struct Returns {
    DeviceTurns turns;
    double gamma;
    double* returns;
};

__global__ void __launch_bounds__(kThreads) sweep_returns(Returns sweep) {
    write_returns(sweep.turns, sweep.gamma, sweep.returns);
}

__global__ void __launch_bounds__(kThreads, 4) sweep_credit(DeviceCredit credit) {
    const DeviceTurns& turns = credit.turns;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * kThreads;

    for (std::int64_t k = first; k < turns.num_turns; k += stride) credit.has_tokens[k] = 0;
    write_returns(turns, credit.rule.gamma, credit.exact_returns);
    sync_grid();

    for (std::int64_t i = first; i < credit.num_tokens; i += stride) {
        const std::int64_t k = at(credit.turn_ids, i);
        // one write where a run of tokens begins; another run of the same turn may write the same
        if (k >= 0 && (i == 0 || at(credit.turn_ids, i - 1) != k)) atomicExch(&credit.has_tokens[k], 1);
    }
    for (std::int64_t k = first; k < turns.num_turns; k += stride) store(credit, credit.returns, k, credit.exact_returns[k]);
    sync_grid();

    if (credit.rule.scope == Scope::none) {
        for (std::int64_t k = first; k < turns.num_turns; k += stride) {
            store(credit, credit.turn_advantages, k, credit.has_tokens[k] ? credit.exact_returns[k] : 0);
        }
    } else {
        normalise_all(credit);
    }
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
