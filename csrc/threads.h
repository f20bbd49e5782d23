// Work shared among threads, without a pool of its own.
#pragma once

#include <cstdint>

namespace gtpo {

// body(context, i) for every i in [0, count), in any order and on up to num_threads threads; it must not throw.
// The results do not depend on the order as long as no two calls write the same memory.
void for_each_task(std::int64_t count, std::int64_t num_threads, void (*body)(void*, std::int64_t), void* context);

template <class Body>
void for_each_task(std::int64_t count, std::int64_t num_threads, Body body) {
    for_each_task(count, num_threads, [](void* context, std::int64_t i) { (*static_cast<Body*>(context))(i); }, &body);
}

}  // namespace gtpo
