#include "threads.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#endif

namespace gtpo {
namespace {

struct Tasks {
    std::int64_t count;
    void (*body)(void*, std::int64_t);
    void* context;
    std::atomic<std::int64_t> next{0};
};

void run_tasks(void* data) {
    Tasks& tasks = *static_cast<Tasks*>(data);
    for (std::int64_t i; (i = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;) {
        tasks.body(tasks.context, i);
    }
}

using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// PyTorch's own OpenMP pool, where the process has it: its idle threads spin for a while after every product, and threads
// beside them would compete with that. Looked up, not linked, so that no second runtime comes in.
Parallel find_parallel() {
#ifdef __linux__
    return reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
    return nullptr;
#endif
}

}  // namespace

void for_each_task(std::int64_t count, std::int64_t num_threads, void (*body)(void*, std::int64_t), void* context) {
    Tasks tasks{count, body, context};
    num_threads = std::min(num_threads, count);
    if (num_threads <= 1) return run_tasks(&tasks);
    static const Parallel parallel = find_parallel();
    if (parallel != nullptr) return parallel(run_tasks, &tasks, static_cast<unsigned>(num_threads), 0);
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(num_threads));
    try {
        for (std::int64_t i = 1; i < num_threads; ++i) helpers.emplace_back(run_tasks, &tasks);
    } catch (const std::system_error&) {
        // fewer threads do the same work
    }
    run_tasks(&tasks);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace gtpo
