// Turn rewards to returns, group statistics and token advantages in one launch.
// The definition is gtpo_kernels/turn_advantages/reference.py. Pointers are to device memory.
#pragma once

#include <cstdint>

#include "cuda_types.h"
#include "turn_advantages.h"

namespace gtpo {

struct DeviceIds {
    const void* data;
    bool wide;  // int64, else int32
};

struct DeviceTurns {
    const void* turn_rewards;  // [num_turns]
    DType reward_type;
    DeviceIds cu_turns;        // [num_trajectories + 1]
    std::int64_t num_turns;
    std::int64_t num_trajectories;
};

struct DeviceCredit {
    DeviceTurns turns;
    DeviceIds group_ids;       // [num_trajectories]
    DeviceIds turn_ids;        // [num_tokens]
    DeviceIds anchor_ids;      // [num_turns], read for Scope::group_anchor alone
    std::int64_t num_tokens;
    CreditRule rule;
    int* token_counts;         // [num_turns], scratch
    double* exact_returns;     // [num_turns], scratch
    double* exact_advantages;  // [num_turns], scratch
    bool wide_results;         // float64, else float32:
    void* returns;             // [num_turns]
    void* turn_advantages;     // [num_turns]
    void* token_advantages;    // [num_tokens]
};

// Both return a cudaError_t.
int turn_returns_cuda(const DeviceTurns& turns, double gamma, double* returns, void* stream);
int turn_advantages_cuda(const DeviceCredit& credit, void* stream);

}  // namespace gtpo
