// CUDA kernels on the host, for tests: what device.cuh gives a .cu file under nvcc, by one fiber a CUDA thread.
//
// Blocks of a wave are all alive at once and take turns at every barrier and shuffle, so the order is fixed and a barrier that
// some thread never reaches is found. Under -fsanitize=thread each fiber is a thread to the sanitizer: block and grid barriers
// order memory, switches and shuffles do not, so an access that lacks a barrier is reported whatever order the fibers ran in.
// The real thing has warps that run together, another exp and tanh, and limits on registers and memory; none of it is here.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define GTPO_IF_SANITIZED(...) __VA_ARGS__
#define GTPO_NOT_SANITIZED __attribute__((no_sanitize("thread"), noinline))
#else
#define GTPO_IF_SANITIZED(...)
#define GTPO_NOT_SANITIZED __attribute__((noinline))
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (gtpo::emulation::index_of_thread())
#define blockIdx (gtpo::emulation::index_of_block())
#define blockDim (gtpo::emulation::size_of_block())
#define gridDim (gtpo::emulation::size_of_grid())

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

namespace gtpo {
namespace emulation {

constexpr int kWarp = 32;
constexpr std::int64_t kBlocksAtOnce = 3;
constexpr std::size_t kStackBytes = 64 << 10;
constexpr int kSharedObjects = 4;
constexpr int kSharedBytes = 4 << 10;

struct Index {
    unsigned x;
};

struct Barrier {
    int size = 0;
    int arrived = 0;
    unsigned generation = 0;
    // One for even and one for odd generations: who leaves late must not learn what others did after they left.
    char order[2] = {0, 0};
};

struct Warp {
    Barrier barrier;
    unsigned char lanes[2][kWarp][8];  // two, so that a slot is read before the shuffle after the next writes it
};

struct Block {
    Index index{};
    Barrier barrier;
    std::vector<Warp> warps;
    alignas(16) unsigned char shared[kSharedBytes];
    const void* shared_keys[kSharedObjects] = {};
};

// Where a fiber, or the host, goes on. The builtins change stacks within nanoseconds; swapcontext asks the kernel twice.
struct Place {
    void* registers[5];
};

struct Fiber {
    ucontext_t entry{};  // taken once
    Place place{};
    bool started = false;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    void* sanitizer = nullptr;
    Block* block = nullptr;
    Index thread{};
    unsigned shuffles = 0;
    const Barrier* waits_for = nullptr;
    unsigned generation = 0;
    bool finished = false;
};

struct Grid {
    Index blocks{}, threads{};
    Barrier barrier;
    void (*body)(const void*) = nullptr;
    const void* call = nullptr;
    Place host{};
    void* host_sanitizer = nullptr;
    Fiber* running = nullptr;
    char end = 0;
};

inline Grid* grid = nullptr;

GTPO_NOT_SANITIZED inline Index index_of_thread() { return grid->running->thread; }
GTPO_NOT_SANITIZED inline Index index_of_block() { return grid->running->block->index; }
GTPO_NOT_SANITIZED inline Index size_of_block() { return grid->threads; }
GTPO_NOT_SANITIZED inline Index size_of_grid() { return grid->blocks; }

// Apart from __builtin_setjmp: one function may not hold both.
[[noreturn]] GTPO_NOT_SANITIZED inline void go_to(Fiber* fiber) {
    if (fiber == nullptr) __builtin_longjmp(grid->host.registers, 1);
    if (fiber->started) __builtin_longjmp(fiber->place.registers, 1);
    fiber->started = true;
    setcontext(&fiber->entry);
    std::abort();
}

GTPO_NOT_SANITIZED inline void leave_fiber() {
    GTPO_IF_SANITIZED(__tsan_switch_to_fiber(grid->host_sanitizer, __tsan_switch_to_fiber_no_sync);)
    if (__builtin_setjmp(grid->running->place.registers) == 0) go_to(nullptr);
}

GTPO_NOT_SANITIZED inline void enter_fiber(Fiber& fiber) {
    grid->running = &fiber;
    GTPO_IF_SANITIZED(__tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);)
    if (__builtin_setjmp(grid->host.registers) == 0) go_to(&fiber);
}

GTPO_NOT_SANITIZED inline void wait(Barrier& barrier, bool orders_memory) {
    const unsigned generation = barrier.generation;
    char* order = &barrier.order[generation % 2];
    GTPO_IF_SANITIZED(if (orders_memory) __tsan_release(order);)
    if (++barrier.arrived == barrier.size) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else {
        grid->running->waits_for = &barrier;
        grid->running->generation = generation;
        leave_fiber();
    }
    GTPO_IF_SANITIZED(if (orders_memory) __tsan_acquire(order);)
    (void)order, (void)orders_memory;
}

GTPO_NOT_SANITIZED inline std::uint64_t shuffle_xor_bits(std::uint64_t bits, int lanes) {
    Fiber* self = grid->running;
    Warp& warp = self->block->warps[self->thread.x / kWarp];
    auto& slots = warp.lanes[self->shuffles++ % 2];
    const unsigned lane = self->thread.x % kWarp;
    *reinterpret_cast<std::uint64_t*>(slots[lane]) = bits;
    wait(warp.barrier, false);
    return *reinterpret_cast<std::uint64_t*>(slots[lane ^ static_cast<unsigned>(lanes)]);
}

// The block's object of a key, a quarter of its shared memory each; allocated before its threads start, as on a device.
GTPO_NOT_SANITIZED inline void* shared_object(const void* key) {
    Block* block = grid->running->block;
    for (int i = 0; i < kSharedObjects; ++i) {
        if (!block->shared_keys[i]) block->shared_keys[i] = key;
        if (block->shared_keys[i] == key) return block->shared + i * (kSharedBytes / kSharedObjects);
    }
    std::fputs("emulation: a block has more shared objects than kSharedObjects\n", stderr);
    std::abort();
}

GTPO_NOT_SANITIZED inline void run_fiber() {
    grid->body(grid->call);
    GTPO_IF_SANITIZED(__tsan_release(&grid->end);)
    grid->running->finished = true;
    leave_fiber();
}

GTPO_NOT_SANITIZED inline void prepare(Fiber& fiber) {
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = kStackBytes;
    makecontext(&fiber.entry, &run_fiber, 0);
    GTPO_IF_SANITIZED(fiber.sanitizer = __tsan_create_fiber(0);)
}

GTPO_NOT_SANITIZED inline void run_wave(std::int64_t first, std::int64_t blocks, int threads) {
    std::vector<Block> wave(static_cast<std::size_t>(blocks));
    std::vector<Fiber> fibers(static_cast<std::size_t>(blocks * threads));
    for (std::size_t i = 0; i < fibers.size(); ++i) {
        Fiber& fiber = fibers[i];
        Block& block = wave[i / static_cast<std::size_t>(threads)];
        fiber.thread.x = static_cast<unsigned>(i % static_cast<std::size_t>(threads));
        fiber.block = &block;
        if (fiber.thread.x == 0) {
            block.index.x = static_cast<unsigned>(first + static_cast<std::int64_t>(i) / threads);
            block.barrier.size = threads;
            block.warps.resize(static_cast<std::size_t>(threads / kWarp));
            for (Warp& warp : block.warps) warp.barrier.size = kWarp;
        }
        prepare(fiber);
    }
    for (std::size_t unfinished = fibers.size(); unfinished > 0;) {
        bool progress = false;
        for (Fiber& fiber : fibers) {
            if (fiber.finished || (fiber.waits_for && fiber.waits_for->generation == fiber.generation)) continue;
            fiber.waits_for = nullptr;
            progress = true;
            enter_fiber(fiber);
            if (fiber.finished) --unfinished;
        }
        if (!progress) {
            std::fputs("emulation: a barrier that not every thread reaches\n", stderr);
            std::abort();
        }
    }
    GTPO_IF_SANITIZED(__tsan_acquire(&grid->end); for (Fiber& fiber : fibers) __tsan_destroy_fiber(fiber.sanitizer);)
}

template <class Arguments>
void run(void (*kernel)(Arguments), std::int64_t blocks, int threads, const Arguments& arguments) {
    struct Call {
        void (*kernel)(Arguments);
        const Arguments* arguments;
    };
    const Call call{kernel, &arguments};
    Grid launched;
    launched.blocks.x = static_cast<unsigned>(blocks);
    launched.threads.x = static_cast<unsigned>(threads);
    launched.barrier.size = static_cast<int>(blocks * threads);
    launched.body = [](const void* pointer) {
        const Call* made = static_cast<const Call*>(pointer);
        made->kernel(*made->arguments);
    };
    launched.call = &call;
    GTPO_IF_SANITIZED(launched.host_sanitizer = __tsan_get_current_fiber();)
    grid = &launched;
    for (std::int64_t first = 0; first < blocks; first += kBlocksAtOnce) {
        run_wave(first, blocks - first < kBlocksAtOnce ? blocks - first : kBlocksAtOnce, threads);
    }
    grid = nullptr;
}

}  // namespace emulation

struct BFloat16 {
    std::uint16_t bits;
};
struct Half {
    _Float16 value;
};

inline float to_float(BFloat16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline float to_float(Half x) { return static_cast<float>(x.value); }
inline void round_to(BFloat16& out, float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    // to the nearest, ties to even; a NaN keeps a bit that says so
    out.bits = static_cast<std::uint16_t>(std::isnan(x) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void round_to(Half& out, float x) { out.value = static_cast<_Float16>(x); }

template <class T>
T& block_shared() {
    static_assert(sizeof(T) <= emulation::kSharedBytes / emulation::kSharedObjects);
    static const char key = 0;
    return *static_cast<T*>(emulation::shared_object(&key));
}

inline void sync_block() { emulation::wait(emulation::grid->running->block->barrier, true); }
inline void sync_grid() { emulation::wait(emulation::grid->barrier, true); }

template <class T>
T shuffle_xor(T value, int lanes) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = emulation::shuffle_xor_bits(bits, lanes);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline int atomicExch(int* address, int value) { return __atomic_exchange_n(address, value, __ATOMIC_RELAXED); }
inline int atomicAdd(int* address, int value) { return __atomic_fetch_add(address, value, __ATOMIC_RELAXED); }

// Few blocks, so that each has several rows to loop over.
template <class Arguments>
cudaError_t launch(void (*kernel)(Arguments), std::int64_t blocks, int threads, cudaStream_t, Arguments arguments) {
    emulation::run(kernel, blocks < 2 * emulation::kBlocksAtOnce ? blocks : 2 * emulation::kBlocksAtOnce, threads, arguments);
    return cudaSuccess;
}

template <class Arguments>
cudaError_t launch_cooperative(void (*kernel)(Arguments), std::int64_t blocks, int threads, cudaStream_t, Arguments arguments) {
    emulation::run(kernel, blocks < emulation::kBlocksAtOnce ? blocks : emulation::kBlocksAtOnce, threads, arguments);
    return cudaSuccess;
}

}  // namespace gtpo
