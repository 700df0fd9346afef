// What must hold of a call. Nothing that comes from outside is used before it was checked here.

#include <cmath>
#include <vector>

#include "call.h"

namespace sparse_dit {
namespace {

constexpr int64_t HEADER_WORDS = sizeof(Header) / 4, ENTRY_WORDS = sizeof(Entry) / 4;
constexpr int64_t MAX_TOKENS = (1LL << 31) - 1 - MAX_ROWS;

const Entry *entry_at(const Problem &p, int64_t entry) {
    return reinterpret_cast<const Entry *>(p.index + HEADER_WORDS) + entry;
}

// Whether `at` is where `count` words of the index can lie.
bool inside(const Problem &p, int64_t at, int64_t count) {
    return at >= 0 && count >= 0 && at + count <= p.index_words;
}

bool is_width(int64_t channels) {
    return channels >= 8 && channels <= MAX_CHANNELS && channels % 8 == 0;
}

bool is_permutation(const int32_t *order, int64_t n) {
    std::vector<bool> seen(static_cast<size_t>(n), false);
    for (int64_t i = 0; i < n; i++) {
        if (order[i] < 0 || order[i] >= n || seen[order[i]]) return false;
        seen[order[i]] = true;
    }
    return true;
}

bool is_offsets(const int32_t *offsets, int64_t count, int64_t first, int64_t last) {
    if (offsets[0] != first || offsets[count] != last) return false;
    for (int64_t i = 0; i < count; i++)
        if (offsets[i] > offsets[i + 1]) return false;
    return true;
}

// Runs of every group: inside [0, limit), ascending, not empty, not overlapping.
bool are_runs(const int32_t *offsets, const int32_t *runs, int64_t groups, int64_t limit) {
    for (int64_t g = 0; g < groups; g++) {
        int64_t end = 0;
        for (int64_t r = offsets[g]; r < offsets[g + 1]; r++) {
            const int64_t start = runs[2 * r], length = runs[2 * r + 1];
            if (start < end || length < 1) return false;
            end = start + length;
        }
        if (end > limit) return false;
    }
    return true;
}

int64_t check_far(const Problem &p, const Entry &e) {
    if (e.cell_offsets < 0) return OK;
    if (e.cells < 0 || e.num_far_runs < 0 || !inside(p, e.cell_offsets, e.cells + 1LL) ||
        !inside(p, e.far_offsets, e.groups + 1LL) ||
        !inside(p, e.far_runs, 2LL * e.num_far_runs))
        return BAD_INDEX_BOUNDS;
    const int32_t *cells = p.index + e.cell_offsets;
    if (cells[0] < 0 || cells[e.cells] > p.keys) return BAD_INDEX_FAR;
    if (!is_offsets(cells, e.cells, cells[0], cells[e.cells])) return BAD_INDEX_FAR;
    const int32_t *offsets = p.index + e.far_offsets;
    if (!is_offsets(offsets, e.groups, 0, e.num_far_runs)) return BAD_INDEX_FAR;
    if (!are_runs(offsets, p.index + e.far_runs, e.groups, e.cells)) return BAD_INDEX_FAR;
    return OK;
}

int64_t check_entry(const Problem &p, const Entry &e) {
    if (e.groups < 0 || e.num_runs < 0 || !inside(p, e.q_offsets, e.groups + 1LL) ||
        !inside(p, e.run_offsets, e.groups + 1LL) || !inside(p, e.runs, 2LL * e.num_runs) ||
        (e.q_order >= 0 && !inside(p, e.q_order, p.queries)) ||
        (e.k_order >= 0 && !inside(p, e.k_order, p.keys)))
        return BAD_INDEX_BOUNDS;
    if (e.q_order >= 0 && !is_permutation(p.index + e.q_order, p.queries)) return BAD_INDEX_ORDER;
    if (e.k_order >= 0 && !is_permutation(p.index + e.k_order, p.keys)) return BAD_INDEX_ORDER;
    if (!is_offsets(p.index + e.q_offsets, e.groups, 0, p.queries)) return BAD_INDEX_GROUPS;
    const int32_t *offsets = p.index + e.run_offsets;
    if (!is_offsets(offsets, e.groups, 0, e.num_runs)) return BAD_INDEX_RUNS;
    if (!are_runs(offsets, p.index + e.runs, e.groups, p.keys)) return BAD_INDEX_RUNS;
    return check_far(p, e);
}

}  // namespace

int64_t check_problem(const Problem &p) {
    if (p.abi_version != ABI_VERSION) return BAD_ABI;
    if (p.dtype < FLOAT32 || p.dtype > FLOAT16) return BAD_DTYPE;
    if (p.batch < 0 || p.heads < 1 || p.kv_heads < 1 || p.heads % p.kv_heads || p.queries < 0 ||
        p.keys < 0 || p.queries > MAX_TOKENS || p.keys > MAX_TOKENS || !is_width(p.channels) ||
        !is_width(p.value_channels) || p.threads < 1 || !std::isfinite(p.scale))
        return BAD_SHAPE;
    const bool some = p.batch > 0 && p.queries > 0;
    if (!p.index || (some && (!p.q || (p.keys > 0 && !p.k)))) return BAD_POINTER;
    if (some && !p.lse_in && (!p.out || (p.keys > 0 && !p.v))) return BAD_POINTER;
    if (p.lse_in && !p.mass) return BAD_MASS;
    if (p.mass && p.mass_block < 1) return BAD_MASS;
    return OK;
}

int64_t check_index(const Problem &p, Header *header) {
    if (p.index_words < HEADER_WORDS) return BAD_INDEX_HEADER;
    const Header &h = *header = *reinterpret_cast<const Header *>(p.index);
    if (h.magic != MAGIC || h.version != ABI_VERSION || h.heads != p.heads || h.entries < 1 ||
        h.queries != p.queries || h.keys != p.keys)
        return BAD_INDEX_HEADER;
    const int64_t table = HEADER_WORDS + h.entries * ENTRY_WORDS;
    if (!inside(p, table, h.heads)) return BAD_INDEX_BOUNDS;
    for (int64_t head = 0; head < h.heads; head++) {
        const int32_t pattern = p.index[table + head];
        if (pattern < 0 || pattern >= h.entries) return BAD_INDEX_HEADER;
    }
    for (int64_t e = 0; e < h.entries; e++) {
        if (const int64_t status = check_entry(p, *entry_at(p, e))) return status;
        if (p.mass && entry_at(p, e)->groups > p.mass_groups) return BAD_MASS;
    }
    return OK;
}

Pattern read_pattern(const Problem &p, int64_t entry) {
    const Entry &e = *entry_at(p, entry);
    const bool far = e.cell_offsets >= 0;
    return {
        e.q_order < 0 ? nullptr : p.index + e.q_order,
        e.k_order < 0 ? nullptr : p.index + e.k_order,
        p.index + e.q_offsets,
        p.index + e.run_offsets,
        p.index + e.runs,
        far ? p.index + e.cell_offsets : nullptr,
        far ? p.index + e.far_offsets : nullptr,
        far ? p.index + e.far_runs : nullptr,
        e.groups,
        far ? e.cells : 0,
    };
}

}  // namespace sparse_dit
