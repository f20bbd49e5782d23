#include <atomic>

#include "token_logprobs.h"

namespace gtpo {
namespace {

std::atomic<InstructionSet>& chosen() {
    static std::atomic<InstructionSet> set{instruction_sets().back()};
    return set;
}

}  // namespace

std::vector<InstructionSet> instruction_sets() {
    std::vector<InstructionSet> sets{InstructionSet::portable};
#ifdef GTPO_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        sets.push_back(InstructionSet::avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            sets.push_back(InstructionSet::avx512);
        }
    }
#endif
    return sets;
}

void set_instruction_set(InstructionSet set) { chosen() = set; }

InstructionSet instruction_set() { return chosen(); }

const Kernels& kernels() {
#ifdef GTPO_X86
    switch (instruction_set()) {
        case InstructionSet::avx512: return kernels_avx512;
        case InstructionSet::avx2: return kernels_avx2;
        case InstructionSet::portable: break;
    }
#endif
    return kernels_portable;
}

}  // namespace gtpo
