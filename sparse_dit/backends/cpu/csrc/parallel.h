// Run a function on several threads at once, in PyTorch's own pool where there is one.
#pragma once

#include <cstdint>

namespace sparse_dit {

// Calls `body(context)` on up to `threads` threads, the caller's among them, and waits for all.
// How many really run may be fewer: bodies share out work through counters of their own.
void run_parallel(int64_t threads, void (*body)(void *), void *context);

// Calls `item(context, i)` for every i below `count`, shared out among threads in order.
void run_items(int64_t threads, int64_t count, void (*item)(void *, int64_t), void *context);

}  // namespace sparse_dit
