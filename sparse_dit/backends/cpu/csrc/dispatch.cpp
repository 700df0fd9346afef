// The entry point: checks a call, cuts it into tasks, and runs them with the best variant.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "call.h"
#include "parallel.h"

namespace sparse_dit {
namespace {

constexpr int64_t NORM_CHUNK = 2048;   // keys
constexpr int64_t POOL_CHUNK = 64;     // cells
constexpr double SMALL = 1 << 20;      // multiply-adds below which one thread is faster than two
constexpr size_t CACHE_LINE = 64;
constexpr size_t KEPT_SCRATCH = 2 << 20;  // bytes; a larger one is let go in the next call

struct Free {
    void operator()(void *p) const { std::free(p); }
};
using Buffer = std::unique_ptr<void, Free>;

Buffer allocate_or_null(size_t bytes) {
    void *p = nullptr;
    if (posix_memalign(&p, 4096, std::max<size_t>(bytes, CACHE_LINE))) return nullptr;
    return Buffer(p);
}

Buffer allocate(size_t bytes) {
    Buffer buffer = allocate_or_null(bytes);
    if (!buffer) throw std::bad_alloc();
    return buffer;
}

// Memory of this thread, kept for its next call: fresh pages cost more than a small call computes.
// Null if there is none to be had.
void *scratch_of_thread(size_t bytes) {
    static thread_local Buffer kept;
    static thread_local size_t size = 0;
    if (size < bytes || size > KEPT_SCRATCH) {
        kept.reset();
        kept = allocate_or_null(bytes);
        size = kept ? bytes : 0;
    }
    return kept.get();
}

// Everything that a call needs beside its inputs and outputs.
struct Prepared {
    Call call;
    const Variant *variant;
    int64_t threads;
    std::vector<Pattern> patterns;
    std::vector<KeyRange> valid;
    std::vector<float> norms;
    std::vector<Pooled> pooled;
    std::vector<Buffer> buffers;
    std::vector<Task> tasks;
    size_t scratch_bytes;
    std::atomic<bool> out_of_memory{false};
};

void find_valid_keys(Prepared &s) {
    const Problem &p = s.call.problem;
    s.valid.assign(static_cast<size_t>(p.batch), KeyRange{0, 0});
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t n = 0; n < (s.call.has_intervals() ? p.queries : 1); n++)
            s.valid[b].take(s.call.interval(b, n));
    s.call.valid = s.valid.data();
}

// Places in a group's runs that lie in `range`.
int64_t seen(const int32_t *offsets, const int32_t *runs, int32_t group, KeyRange range) {
    int64_t total = 0;
    for (int32_t r = offsets[group]; r < offsets[group + 1]; r++) {
        const int32_t start = std::max(runs[2 * r], range.start);
        total += std::max(0, std::min(runs[2 * r] + runs[2 * r + 1], range.stop) - start);
    }
    return total;
}

// The sorted keys that rows of a task may see, as far as the order of tokens tells.
KeyRange reach(const Call &call, const Pattern &pattern, const Task &t) {
    if (pattern.k_order || !call.has_intervals()) return {0, INT32_MAX};
    KeyRange range{0, 0};
    for (int32_t row = t.first; row < t.first + t.rows; row++)
        range.take(call.interval(t.batch, pattern.q_order ? pattern.q_order[row] : row));
    return range;
}

// Tasks of all heads, those with the most work first, so that no thread ends long after the others.
void cut_into_tasks(Prepared &s) {
    const Problem &p = s.call.problem;
    for (int32_t h = 0; h < p.heads; h++) {
        const Pattern &pattern = s.patterns[s.call.head_to_pattern[h]];
        for (int32_t g = 0; g < pattern.groups; g++) {
            const KeyRange all{0, INT32_MAX};
            const int64_t cells =
                pattern.cells ? seen(pattern.far_offsets, pattern.far_runs, g, all) : 0;
            const int32_t last = pattern.q_offsets[g + 1];
            for (int32_t row = pattern.q_offsets[g]; row < last; row += MAX_ROWS) {
                const int32_t rows = std::min(MAX_ROWS, last - row);
                for (int32_t b = 0; b < p.batch; b++) {
                    Task task{b, h, g, row, rows, cells, nullptr};
                    task.keys += seen(pattern.run_offsets, pattern.runs, g, reach(s.call, pattern, task));
                    s.tasks.push_back(task);
                }
            }
        }
    }
    std::stable_sort(s.tasks.begin(), s.tasks.end(), [](const Task &a, const Task &b) {
        return a.keys * a.rows > b.keys * b.rows;
    });
}

int64_t mass_blocks(const Problem &p) { return (p.keys + p.mass_block - 1) / p.mass_block; }

float *mass_of(const Problem &p, const Task &t) {
    return p.mass + ((t.batch * p.heads + t.head) * p.mass_groups + t.group) * mass_blocks(p);
}

// Where tasks write the mass of their rows: to the result, or, if their group is cut in several, aside.
void place_mass(Prepared &s) {
    const Problem &p = s.call.problem;
    for (Task &t : s.tasks) {
        const int32_t *offsets = s.patterns[s.call.head_to_pattern[t.head]].q_offsets;
        if (offsets[t.group + 1] - offsets[t.group] <= MAX_ROWS) {
            t.mass = mass_of(p, t);
        } else {
            s.buffers.push_back(allocate(static_cast<size_t>(mass_blocks(p)) * sizeof(float)));
            t.mass = static_cast<float *>(s.buffers.back().get());
        }
    }
}

// Adds what was written aside, in the order of the tasks, so that threads make no difference.
void gather_mass(const Prepared &s) {
    const Problem &p = s.call.problem;
    for (const Task &t : s.tasks) {
        float *mass = mass_of(p, t);
        if (t.mass == mass) continue;
        for (int64_t i = 0; i < mass_blocks(p); i++) mass[i] += t.mass[i];
    }
}

double work(const Prepared &s) {
    double total = 0;
    for (const Task &t : s.tasks) total += static_cast<double>(t.keys) * t.rows;
    const Problem &p = s.call.problem;
    return total * static_cast<double>(p.channels + p.value_channels);
}

void find_key_norms(Prepared &s) {
    const Problem &p = s.call.problem;
    const int64_t chunks = (p.keys + NORM_CHUNK - 1) / NORM_CHUNK;
    std::vector<float> parts(static_cast<size_t>(p.batch * p.kv_heads * chunks));
    struct Context {
        Prepared &s;
        std::vector<float> &parts;
        int64_t chunks;
    } context{s, parts, chunks};
    run_items(
        s.threads, static_cast<int64_t>(parts.size()),
        [](void *raw, int64_t i) {
            auto &c = *static_cast<Context *>(raw);
            const int64_t head = i / c.chunks, first = i % c.chunks * NORM_CHUNK;
            const int64_t b = head / c.s.call.problem.kv_heads;
            const KeyRange valid = c.s.call.valid[b];
            c.parts[i] = c.s.variant->key_norm(c.s.call, b, head % c.s.call.problem.kv_heads,
                                               std::max<int64_t>(first, valid.start),
                                               std::min<int64_t>(first + NORM_CHUNK, valid.stop));
        },
        &context);
    s.norms.assign(static_cast<size_t>(p.batch * p.kv_heads), 0.f);
    for (size_t i = 0; i < parts.size(); i++) {
        float &norm = s.norms[i / chunks];
        if (!(parts[i] <= norm)) norm = parts[i];  // takes NaN, and keeps it: nothing is above it
    }
    for (float &norm : s.norms) norm = std::sqrt(norm);
    s.call.key_norms = s.norms.data();
}

void pool_keys(Prepared &s) {
    const Problem &p = s.call.problem;
    const int64_t entries = s.call.header.entries, group = p.heads / p.kv_heads;
    s.pooled.assign(static_cast<size_t>(p.batch * p.kv_heads * entries), Pooled{});
    s.call.pooled = s.pooled.data();
    struct Item {
        int64_t batch, kv_head, entry, first;
    };
    std::vector<Item> items;
    for (int64_t b = 0; b < p.batch; b++)
        for (int64_t h = 0; h < p.heads; h++) {
            const int32_t entry = s.call.head_to_pattern[h];
            const int64_t cells = s.patterns[entry].cells, kv_head = h / group;
            Pooled &pooled = s.pooled[(b * p.kv_heads + kv_head) * entries + entry];
            if (!cells || pooled.k) continue;
            const size_t floats = static_cast<size_t>(cells) * (p.channels + p.value_channels + 3);
            s.buffers.push_back(allocate(floats * sizeof(float)));
            pooled.k = static_cast<float *>(s.buffers.back().get());
            pooled.v = pooled.k + cells * p.channels;
            pooled.bias = pooled.v + cells * p.value_channels;
            pooled.first = reinterpret_cast<int32_t *>(pooled.bias + cells);
            pooled.last = pooled.first + cells;
            for (int64_t c = 0; c < cells; c += POOL_CHUNK) items.push_back({b, kv_head, entry, c});
        }
    struct Context {
        Prepared &s;
        std::vector<Item> &items;
    } context{s, items};
    run_items(
        s.threads, static_cast<int64_t>(items.size()),
        [](void *raw, int64_t i) {
            auto &c = *static_cast<Context *>(raw);
            const Item &item = c.items[i];
            const Pattern &pattern = c.s.patterns[item.entry];
            const int64_t last = std::min<int64_t>(item.first + POOL_CHUNK, pattern.cells);
            c.s.variant->pool(c.s.call, item.batch, item.kv_head, pattern,
                              c.s.call.pooled_of(item.batch, item.kv_head, item.entry), item.first,
                              last);
        },
        &context);
}

void run_tasks(Prepared &s) {
    s.scratch_bytes = static_cast<size_t>(s.variant->scratch_bytes(s.call));
    run_items(
        s.threads, static_cast<int64_t>(s.tasks.size()),
        [](void *raw, int64_t i) {
            auto &s = *static_cast<Prepared *>(raw);
            void *scratch = scratch_of_thread(s.scratch_bytes);
            if (scratch)
                s.variant->attend(s.call, s.tasks[i], scratch);
            else
                s.out_of_memory = true;
        },
        &s);
    if (s.out_of_memory) throw std::bad_alloc();
}

int64_t attend(const Problem &problem) {
    Prepared s;
    if (const int64_t status = check_problem(problem)) return status;
    if (const int64_t status = check_index(problem, &s.call.header)) return status;
    s.variant = choose_variant(problem.variant);
    if (!s.variant) return BAD_VARIANT;
    s.call.problem = problem;
    for (int64_t e = 0; e < s.call.header.entries; e++)
        s.patterns.push_back(read_pattern(problem, e));
    s.call.patterns = s.patterns.data();
    const auto table = (sizeof(Header) + s.call.header.entries * sizeof(Entry)) / 4;
    s.call.head_to_pattern = problem.index + table;
    if (problem.batch == 0 || problem.queries == 0) return OK;
    find_valid_keys(s);
    cut_into_tasks(s);
    s.threads = work(s) < SMALL ? 1 : problem.threads;
    s.threads = std::max<int64_t>(1, std::min<int64_t>(s.threads, s.tasks.size()));
    find_key_norms(s);
    pool_keys(s);
    if (problem.mass) place_mass(s);
    run_tasks(s);
    if (problem.mass) gather_mass(s);
    return OK;
}

}  // namespace

const Variant *choose_variant(int64_t wanted) {
    int64_t place = 0;
    for (const Variant *const *v = VARIANTS; *v; v++, place++)
        if ((wanted < 0 || wanted == place) && (*v)->runs()) return *v;
    return nullptr;
}

}  // namespace sparse_dit

using sparse_dit::VARIANTS;

int64_t sparse_dit_abi() { return sparse_dit::ABI_VERSION; }

int64_t sparse_dit_attend(const sparse_dit::Problem *problem) {
    if (!problem) return sparse_dit::BAD_POINTER;
    try {
        return sparse_dit::attend(*problem);
    } catch (const std::bad_alloc &) {
        return sparse_dit::NO_MEMORY;
    }
}

const char *sparse_dit_error(int64_t status) {
    using namespace sparse_dit;
    switch (status) {
        case OK: return "done";
        case BAD_ABI: return "the library and the package are of different versions: reinstall";
        case BAD_DTYPE: return "dtype must be float32, bfloat16 or float16";
        case BAD_SHAPE:
            return "head_dim must be a multiple of 8 up to 512, heads a multiple of the key heads, "
                   "the scale finite and threads at least 1";
        case BAD_POINTER: return "a tensor that is needed is missing";
        case BAD_VARIANT: return "the variant of the kernel does not run on this machine";
        case BAD_INDEX_HEADER: return "the index was packed for other heads or lengths";
        case BAD_INDEX_BOUNDS: return "the index is truncated: an array lies outside of it";
        case BAD_INDEX_ORDER: return "a token order of the index is not a permutation";
        case BAD_INDEX_GROUPS: return "the query groups of the index do not cover all queries";
        case BAD_INDEX_RUNS: return "key runs of the index must ascend, not overlap, and end in time";
        case BAD_INDEX_FAR: return "the far field of the index does not fit its keys";
        case BAD_MASS: return "block mass needs a block size, and room for the largest group count";
        case NO_MEMORY: return "not enough memory for the kernel's buffers";
        case BAD_SAMPLE: return "sampled rows, their keys or their heads lie outside of the call";
        case BAD_CHOICE: return "costs must be 0 or more, and scores no NaN";
        case BAD_SIZE: return "runs of these sizes don't fit into 32 bits, or there are more queries than keys";
        case BAD_BLOCKS: return "bounds of blocks must ascend inside of the tokens, and groups belong to them";
        default: return "unknown status";
    }
}

const char *sparse_dit_variants() {
    static const auto *names = [] {
        auto *text = new std::string;
        for (const auto *const *v = VARIANTS; *v; v++)
            *text += (text->empty() ? "" : " ") + std::string((*v)->name);
        return text;
    }();
    return names->c_str();
}

int64_t sparse_dit_runs(int64_t variant) {
    int64_t place = 0;
    for (const auto *const *v = VARIANTS; *v; v++, place++)
        if (place == variant) return (*v)->runs();
    return 0;
}

int64_t sparse_dit_multiply_adds(int64_t variant, int64_t turns) {
    const auto *chosen = sparse_dit::choose_variant(variant);
    return chosen ? chosen->multiply_adds(turns) : 0;
}
