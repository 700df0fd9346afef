// The entry point of sums over sampled rows: checks a call, cuts it into tasks, and adds up what they found.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "call.h"
#include "parallel.h"

namespace sparse_dit {
namespace {

constexpr int64_t MAX_SAMPLED = 1 << 16;
constexpr int64_t TASK_ROWS = 192;          // sampled rows of all heads in a task
constexpr int64_t TASK_FLOATS = 4 << 20;    // of their probabilities, where that allows fewer rows
constexpr int64_t CACHE_LINE = 64;

int64_t bins_of(const SumsProblem &p) { return (p.keys + DIAGONAL - 1) / DIAGONAL; }
int64_t padded_keys(const SumsProblem &p) { return (p.keys + SUMS_TILE - 1) / SUMS_TILE * SUMS_TILE; }

int64_t check_sample(const SumsProblem &p) {
    for (int64_t i = 0; i < p.listed; i++)
        if (p.head_list[i] < (i ? p.head_list[i - 1] + 1 : 0) || p.head_list[i] >= p.heads)
            return BAD_SAMPLE;
    for (int64_t i = 0; i < p.batch * p.sampled; i++) {
        const int64_t row = p.rows[i], own = row + p.keys - p.queries;
        if (row < 0 || row >= p.queries || p.start[i] < 0 || p.stop[i] > own + 1) return BAD_SAMPLE;
    }
    return OK;
}

int64_t check_sums(const SumsProblem &p) {
    constexpr int64_t MAX_TOKENS = (1LL << 31) - 1 - SUMS_TILE;
    if (p.abi_version != ABI_VERSION) return BAD_ABI;
    if (p.dtype < FLOAT32 || p.dtype > FLOAT16) return BAD_DTYPE;
    if (p.batch < 0 || p.batch > MAX_TOKENS || p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads ||
        p.channels < 8 || p.channels > MAX_CHANNELS || p.channels % 8 || p.threads < 1 ||
        !std::isfinite(p.scale))
        return BAD_SHAPE;
    if (p.queries < 1 || p.queries > p.keys || p.keys > MAX_TOKENS) return BAD_SIZE;
    if (p.sampled < 1 || p.sampled > MAX_SAMPLED || p.listed < 1 || p.listed > p.heads ||
        p.local < 0 || p.local > p.keys)
        return BAD_SAMPLE;
    if (p.batch && !(p.q && p.k && p.rows && p.start && p.stop && p.head_list && p.columns && p.diagonals))
        return BAD_POINTER;
    return p.batch ? check_sample(p) : OK;
}

struct Sums {
    const SumsProblem &problem;
    const Variant *variant;
    std::vector<SumsTask> tasks;
    std::vector<int64_t> places;  // in the list of heads, of each task's first
    std::vector<float> parts;     // columns and diagonals of all tasks
    int64_t part = 0, rows = 0;   // floats of one head's; most rows of a task
    std::atomic<size_t> next{0};
    std::atomic<bool> out_of_memory{false};
};

// Tasks of one key head's rows, for all its listed heads at once, so that a key is read once for them.
void cut_into_tasks(Sums &s) {
    const SumsProblem &p = s.problem;
    const int64_t group = p.heads / p.kv_heads;
    s.part = padded_keys(p) + bins_of(p);
    const int64_t rows = std::max<int64_t>(8, std::min(TASK_ROWS, TASK_FLOATS / padded_keys(p)));
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t at = 0, next; at < p.listed; at = next) {
            const int64_t kv_head = p.head_list[at] / group;
            for (next = at; next < p.listed && p.head_list[next] / group == kv_head;) next++;
            const int64_t heads = next - at;
            const int64_t parts = (p.sampled * heads + rows - 1) / rows;
            const int64_t count = (p.sampled + parts - 1) / parts;
            s.rows = std::max(s.rows, count * heads);
            for (int64_t first = 0; first < p.sampled; first += count) {
                s.tasks.push_back({b, kv_head, p.head_list + at, heads, first,
                                   std::min(count, p.sampled - first), nullptr, nullptr});
                s.places.push_back(at);
            }
        }
    int64_t floats = 0;
    for (const SumsTask &task : s.tasks) floats += task.num_heads * s.part;
    s.parts.assign(static_cast<size_t>(floats), 0.f);
    float *at = s.parts.data();
    for (SumsTask &task : s.tasks) {
        task.columns = at;
        task.diagonals = at + task.num_heads * padded_keys(p);
        at += task.num_heads * s.part;
    }
}

// Adds up what the tasks found, in their order, so that threads make no difference.
void gather(const Sums &s) {
    const SumsProblem &p = s.problem;
    const int64_t bins = bins_of(p);
    std::fill(p.columns, p.columns + p.batch * p.listed * p.keys, 0.f);
    std::fill(p.diagonals, p.diagonals + p.batch * p.listed * bins, 0.f);
    for (size_t i = 0; i < s.tasks.size(); i++) {
        const SumsTask &task = s.tasks[i];
        for (int64_t h = 0; h < task.num_heads; h++) {
            const int64_t head = task.batch * p.listed + s.places[i] + h;
            const float *columns = task.columns + h * padded_keys(p);
            for (int64_t j = 0; j < p.keys; j++) p.columns[head * p.keys + j] += columns[j];
            for (int64_t j = 0; j < bins; j++)
                p.diagonals[head * bins + j] += task.diagonals[h * bins + j];
        }
    }
}

struct Free {
    void operator()(void *p) const { std::free(p); }
};

// What each thread does: one scratch for all of its tasks, as fresh pages take time.
void run_tasks(void *raw) {
    auto &s = *static_cast<Sums *>(raw);
    void *memory = nullptr;
    const auto bytes = static_cast<size_t>(s.variant->sums_scratch(s.problem, s.rows));
    if (posix_memalign(&memory, CACHE_LINE, bytes)) {
        s.out_of_memory = true;
        return;
    }
    const std::unique_ptr<void, Free> scratch(memory);
    for (size_t i; (i = s.next.fetch_add(1)) < s.tasks.size();)
        s.variant->sums(s.problem, s.tasks[i], scratch.get());
}

int64_t sums(const SumsProblem &problem) {
    if (const int64_t status = check_sums(problem)) return status;
    Sums s{problem, choose_variant(problem.variant), {}, {}, {}};
    if (!s.variant) return BAD_VARIANT;
    cut_into_tasks(s);
    run_parallel(std::min(problem.threads, static_cast<int64_t>(s.tasks.size())), run_tasks, &s);
    if (s.out_of_memory) return NO_MEMORY;
    gather(s);
    return OK;
}

}  // namespace
}  // namespace sparse_dit

int64_t sparse_dit_sums(const sparse_dit::SumsProblem *problem) {
    if (!problem) return sparse_dit::BAD_POINTER;
    try {
        return sparse_dit::sums(*problem);
    } catch (const std::bad_alloc &) {
        return sparse_dit::NO_MEMORY;
    }
}
