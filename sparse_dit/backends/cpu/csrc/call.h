// One call, read and prepared: what every variant of the kernel works on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "abi.h"

namespace sparse_dit {

constexpr int64_t MAX_CHANNELS = 512;
constexpr int32_t MAX_ROWS = 128;  // query rows of a task

// The arrays of one pattern, inside the packed index.
struct Pattern {
    const int32_t *q_order, *k_order;  // null where tokens stay in place
    const int32_t *q_offsets, *run_offsets, *runs;
    const int32_t *cell_offsets, *far_offsets, *far_runs;  // null without a far field
    int32_t groups, cells;
};

// Key tokens from `start` to `stop`, which isn't one of them; none if they don't ascend.
struct KeyRange {
    int32_t start, stop;

    bool empty() const { return start >= stop; }
    // Widens it to hold another one.
    void take(KeyRange other) {
        if (other.empty()) return;
        if (empty()) *this = other;
        if (other.start < start) start = other.start;
        if (other.stop > stop) stop = other.stop;
    }
};

// Pooled keys of one (batch item, key head, pattern), all float32.
struct Pooled {
    float *k, *v;       // [C, D], [C, E]
    float *bias;        // [C], log2 of the number of valid keys
    int32_t *first, *last;  // [C], the smallest and largest valid token; last is -1 for a cell without one
};

// Rows of one group that one thread computes.
struct Task {
    int32_t batch, head, group;
    int32_t first, rows;  // sorted query rows
    int64_t keys;         // how many keys and cells the group sees
    float *mass;          // [blocks] of these rows; or null
};

struct Call {
    Problem problem;
    Header header;
    const Pattern *patterns;
    const int32_t *head_to_pattern;
    const KeyRange *valid;   // [B]: the keys that are in some row's interval
    const float *key_norms;  // [B, H_kv]: the largest norm of a valid key; Inf or NaN if one is
    const Pooled *pooled;    // [B, H_kv, patterns]; k is null where a pattern has no far field

    bool has_intervals() const { return problem.row_start || problem.row_stop; }
    // The keys that a row sees of those that the index lists.
    KeyRange interval(int64_t batch, int64_t query) const {
        const RowStrides &a = problem.start_strides, &b = problem.stop_strides;
        int32_t start = problem.row_start ? problem.row_start[batch * a.batch + query * a.row] : 0;
        int32_t stop = static_cast<int32_t>(problem.keys);
        if (problem.row_stop) {
            const int32_t given = problem.row_stop[batch * b.batch + query * b.row];
            if (given < stop) stop = given;
        }
        if (start < 0) start = 0;
        return start < stop ? KeyRange{start, stop} : KeyRange{0, 0};
    }
    const Pooled &pooled_of(int64_t batch, int64_t kv_head, int64_t pattern) const {
        return pooled[(batch * problem.kv_heads + kv_head) * header.entries + pattern];
    }
};

// Sampled rows of the listed heads of one key head, that one thread sums up.
struct SumsTask {
    int64_t batch, kv_head;
    const int32_t *heads;       // [num_heads]
    int64_t num_heads;
    int64_t first, count;       // sampled rows
    float *columns, *diagonals;  // [num_heads, padded keys], [num_heads, bins], zeroed
};

constexpr int64_t SUMS_TILE = 64;  // keys; columns are padded to whole tiles

// One compiled form of the kernel.
struct Variant {
    const char *name;
    bool (*runs)();  // whether this machine executes it
    int64_t (*scratch_bytes)(const Call &call);
    // The largest squared norm among keys [first, last) of a head; NaN if one is.
    float (*key_norm)(const Call &call, int64_t batch, int64_t kv_head, int64_t first,
                      int64_t last);
    // Fills cells [first, last) of `pooled`.
    void (*pool)(const Call &call, int64_t batch, int64_t kv_head, const Pattern &pattern,
                 const Pooled &pooled, int64_t first, int64_t last);
    void (*attend)(const Call &call, const Task &task, void *scratch);
    // Memory that sums of so many rows (sampled ones of all heads) need, and the sums.
    int64_t (*sums_scratch)(const SumsProblem &problem, int64_t rows);
    void (*sums)(const SumsProblem &problem, const SumsTask &task, void *scratch);
    // Multiply-adds on registers alone, as fast as this machine has them; how many operations that were.
    int64_t (*multiply_adds)(int64_t turns);
};

// Compiled variants, best first, up to one whose name is null.
extern const Variant *const VARIANTS[];

// The variant at a place in the list, or, for -1, the best that runs here; null if it doesn't run.
const Variant *choose_variant(int64_t wanted);

// A Status; fills `patterns` with one entry for each of the header's.
int64_t check_problem(const Problem &problem);
int64_t check_index(const Problem &problem, Header *header);
Pattern read_pattern(const Problem &problem, int64_t entry);

}  // namespace sparse_dit
