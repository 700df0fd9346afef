#include "parallel.h"

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "abi.h"

namespace sparse_dit {
namespace {

using GompParallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
std::atomic<GompParallel> gomp_parallel{nullptr};

struct Items {
    std::atomic<int64_t> next{0};
    int64_t count;
    void (*item)(void *, int64_t);
    void *context;
};

void work(void *context) {
    auto &items = *static_cast<Items *>(context);
    for (int64_t i; (i = items.next.fetch_add(1)) < items.count;)
        items.item(items.context, i);
}

void run_on_own_threads(int64_t threads, void (*body)(void *), void *context) {
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(threads - 1));
    for (int64_t i = 1; i < threads; i++) {
        try {
            others.emplace_back(body, context);
        } catch (const std::system_error &) {  // no more threads to be had: the others do the work
            break;
        }
    }
    body(context);
    for (auto &thread : others) thread.join();
}

}  // namespace

void run_parallel(int64_t threads, void (*body)(void *), void *context) {
    if (threads <= 1) return body(context);
    if (auto *gomp = gomp_parallel.load())
        return gomp(body, context, static_cast<unsigned>(threads), 0);
    run_on_own_threads(threads, body, context);
}

void run_items(int64_t threads, int64_t count, void (*item)(void *, int64_t), void *context) {
    Items items;
    items.count = count;
    items.item = item;
    items.context = context;
    run_parallel(threads < count ? threads : count, work, &items);
}

}  // namespace sparse_dit

void sparse_dit_use_gomp(void *address) {
    sparse_dit::gomp_parallel = reinterpret_cast<sparse_dit::GompParallel>(address);
}
