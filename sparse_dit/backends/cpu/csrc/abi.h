// What Python and the kernel say to each other: one struct of 8-byte fields, and one packed index.
//
// `library.py` and `packed.py` write the same layouts; change both sides together, and ABI_VERSION.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparse_dit {

constexpr int64_t ABI_VERSION = 4;

enum DType : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Strides in elements, of batch, head, token and channel.
struct Strides {
    int64_t batch, head, token, channel;
};

// Strides of row intervals in elements, of batch and query token.
struct RowStrides {
    int64_t batch, row;
};

// One call. B batch, H heads, H_kv key heads, N queries, M keys, D channels, E channels of values.
struct Problem {
    int64_t abi_version;
    int64_t dtype;
    int64_t batch, heads, kv_heads, queries, keys, channels, value_channels;
    const void *q, *k, *v;  // [B, H, N, D], [B, H_kv, M, D], [B, H_kv, M, E]
    void *out;              // [B, H, N, E] of the same dtype; null if only the mass is wanted
    float *lse;             // [B, H, N] contiguous, or null
    float *mass;            // [B, H, mass_groups, ceil(M / mass_block)] contiguous, zeroed; or null
    const float *lse_in;    // [B, H, N] contiguous: with it `mass` is all that is computed; or null
    const int32_t *row_start, *row_stop;  // [B, N], a row sees key tokens from start to stop; null: 0, M
    const int32_t *index;   // packed index, see below
    int64_t index_words;
    Strides q_strides, k_strides, v_strides, out_strides;
    RowStrides start_strides, stop_strides;
    int64_t mass_block, mass_groups;
    int64_t threads;
    int64_t variant;  // place in VARIANTS, or -1 for the best that this machine runs
    double scale;
};

// The packed index, int32 words: the header, one Entry a pattern, head_to_pattern [H], then arrays.
constexpr int32_t MAGIC = 0x53444954;  // "SDIT"

struct Header {
    int32_t magic, version, heads, entries, queries, keys;
};

// Places of arrays in words from the start; -1 where there is none.
struct Entry {
    int32_t q_order, k_order;          // [N], [M]
    int32_t q_offsets, groups;         // [G + 1]
    int32_t run_offsets, runs, num_runs;  // [G + 1], [R, 2]
    int32_t cell_offsets, cells;       // [C + 1]
    int32_t far_offsets, far_runs, num_far_runs;  // [G + 1], [F, 2]
};

// Sums of the probabilities of sampled rows, under causal order: of each key, and of each diagonal bin, 64
// offsets from a row's own key, `row + keys - queries`. R sampled rows of each batch item, L listed heads.
constexpr int64_t DIAGONAL = 64;

struct SumsProblem {
    int64_t abi_version;
    int64_t dtype;
    int64_t batch, heads, kv_heads, queries, keys, channels;
    int64_t sampled, listed;
    int64_t local;                 // offsets below count for no column
    const void *q, *k;             // [B, H, N, D], [B, H_kv, M, D]
    const int32_t *rows;           // [B, R] contiguous, as the next two: the row; it sees keys from start
    const int32_t *start, *stop;   // to stop, none after its own
    const int32_t *head_list;      // [L], ascending
    float *columns, *diagonals;    // [B, L, M], [B, L, ceil(M / DIAGONAL)] contiguous
    Strides q_strides, k_strides;
    int64_t threads;
    int64_t variant;
    double scale;
};

// The best of C candidates for each head, in the order of their scores, for as long as their costs' sum is
// within the budget. Forced ones come first, and are taken at any cost.
struct ChoiceProblem {
    int64_t abi_version;
    int64_t heads, candidates;
    const float *scores;    // [H, C], no NaN
    const int64_t *costs;   // [C], 0 or more
    const uint8_t *forced;  // [C], 0 or 1
    int64_t budget;
    uint8_t *chosen;        // [H, C]
    int64_t threads;
};

// Key runs of groups of 64 rows that see some columns and some diagonal bins, for each head.
struct RunsProblem {
    int64_t abi_version;
    int64_t heads, queries, keys;
    const uint8_t *chosen;  // [H, M + ceil(M / DIAGONAL)], columns first
    int32_t *offsets;       // [H, G + 1]; written if `runs` is null, read otherwise
    int32_t *runs;          // [R, 2], one head's after another's; or null
    int64_t threads;
};

// Means of S stretches of sorted tokens, of each head.
struct MeansProblem {
    int64_t abi_version;
    int64_t dtype;
    int64_t batch, heads, tokens, channels, stretches;
    const void *x;          // [B, H, N, D]
    const int32_t *order;   // [N]: the token at each sorted position; null where tokens stay in place
    const int32_t *bounds;  // [S + 1]: sorted positions
    float *means;           // [B, H, S, D] contiguous
    Strides strides;
    int64_t threads;
};

// Key runs of G groups of rows, each of which belongs to one of C blocks of tokens and sees some of them, and
// all tokens outside of them.
struct BlocksProblem {
    int64_t abi_version;
    int64_t heads, tokens, blocks, groups;
    const uint8_t *chosen;   // [H, C, C]: which blocks of keys a block of queries sees
    const int32_t *bounds;   // [C + 1]: sorted positions
    const int32_t *owner;    // [G]: block of the group's rows; -1 for rows that see everything
    const int32_t *pool_of;  // [C + 1]: number of the first pooled key of each block; null without a far field
    int64_t lay;             // 0: write offsets alone; 1: read them, and write runs
    int32_t *offsets;        // [H, G + 1]
    int32_t *runs;           // [R, 2], one head's after another's; or null
    int32_t *far_offsets, *far_runs;  // the same of pooled keys that stand for what isn't seen; or null
    int64_t threads;
};

enum Status : int64_t {
    OK = 0,
    BAD_ABI,
    BAD_DTYPE,
    BAD_SHAPE,
    BAD_POINTER,
    BAD_VARIANT,
    BAD_INDEX_HEADER,
    BAD_INDEX_BOUNDS,
    BAD_INDEX_ORDER,
    BAD_INDEX_GROUPS,
    BAD_INDEX_RUNS,
    BAD_INDEX_FAR,
    BAD_MASS,
    NO_MEMORY,
    BAD_SAMPLE,
    BAD_CHOICE,
    BAD_SIZE,
    BAD_BLOCKS,
};

}  // namespace sparse_dit

#pragma GCC visibility push(default)
extern "C" {
int64_t sparse_dit_abi();
// 0, or a Status
int64_t sparse_dit_attend(const sparse_dit::Problem *problem);
// The same for estimates: sums, a choice by them, and the runs of what was chosen.
int64_t sparse_dit_sums(const sparse_dit::SumsProblem *problem);
int64_t sparse_dit_choose(const sparse_dit::ChoiceProblem *problem);
int64_t sparse_dit_lay_runs(const sparse_dit::RunsProblem *problem);
int64_t sparse_dit_means(const sparse_dit::MeansProblem *problem);
int64_t sparse_dit_lay_blocks(const sparse_dit::BlocksProblem *problem);
// What a Status means, in English.
const char *sparse_dit_error(int64_t status);
// Names of the compiled variants, best first, separated by spaces.
const char *sparse_dit_variants();
// Whether this machine runs a variant (its place in the list above): 1 or 0.
int64_t sparse_dit_runs(int64_t variant);
// Runs `turns` of independent float32 multiply-adds on this thread, with a variant's vectors or, for -1, those
// of the best that runs here; the number of floating-point operations, 0 if the variant doesn't run.
int64_t sparse_dit_multiply_adds(int64_t variant, int64_t turns);
// Run in the thread pool that `GOMP_parallel` of an OpenMP library belongs to; null for own threads.
void sparse_dit_use_gomp(void *gomp_parallel);
}
#pragma GCC visibility pop
