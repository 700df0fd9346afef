// A choice of columns and diagonal bins within a budget, and the key runs of what was chosen.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <vector>

#include "call.h"
#include "parallel.h"

namespace sparse_dit {
namespace {

constexpr int64_t GROUP = 64;  // query rows
constexpr int64_t MAX_TOKENS = (1LL << 31) - 1 - 2 * GROUP;

// Runs `one(context, head)` for all heads; NO_MEMORY if one of them got none.
template <class Problem>
int64_t for_all_heads(const Problem &problem, void (*one)(const Problem &, int64_t)) {
    struct Context {
        const Problem &problem;
        void (*one)(const Problem &, int64_t);
        std::atomic<bool> out_of_memory{false};
    } context{problem, one};
    run_items(
        problem.threads, problem.heads,
        [](void *raw, int64_t head) {
            auto &c = *static_cast<Context *>(raw);
            try {
                c.one(c.problem, head);
            } catch (const std::bad_alloc &) {
                c.out_of_memory = true;
            }
        },
        &context);
    return context.out_of_memory ? NO_MEMORY : OK;
}

struct Candidate {
    float score;
    int32_t place;
    bool operator<(const Candidate &other) const {  // the better one comes first
        return score > other.score || (score == other.score && place < other.place);
    }
};

constexpr int BUCKETS = 1 << 12;

// Better scores have a smaller one; equal scores the same.
int32_t bucket_of(float score) {
    const float canonical = score + 0.f;  // one zero
    uint32_t bits;
    std::memcpy(&bits, &canonical, 4);
    bits = bits >> 31 ? ~bits : bits | 1u << 31;  // rises with the score
    return static_cast<int32_t>(BUCKETS - 1 - (bits >> 20));
}

// The longest beginning of the sorted candidates that `left` pays for, without sorting them.
void take_best(std::vector<Candidate> &candidates, const int64_t *costs, int64_t left, uint8_t *chosen) {
    auto first = candidates.begin(), last = candidates.end();
    while (first != last) {
        const auto middle = first + (last - first + 1) / 2;
        std::nth_element(first, middle - 1, last);
        int64_t cost = 0;
        for (auto at = first; at != middle; ++at) cost += costs[at->place];
        if (cost <= left) {
            for (auto at = first; at != middle; ++at) chosen[at->place] = 1;
            left -= cost;
            first = middle;
        } else if (last - first == 1) {
            break;
        } else {
            last = middle;
        }
    }
}

// Whole buckets of scores first, then the best ones of the bucket that the budget ends in.
void choose_for_head(const ChoiceProblem &p, int64_t head) {
    const float *scores = p.scores + head * p.candidates;
    uint8_t *chosen = p.chosen + head * p.candidates;
    std::vector<int64_t> cost(BUCKETS, 0);
    int64_t left = p.budget;
    for (int64_t i = 0; i < p.candidates; i++)
        (p.forced[i] ? left : cost[bucket_of(scores[i])]) += p.forced[i] ? -p.costs[i] : p.costs[i];
    int32_t whole = 0;
    while (whole < BUCKETS && cost[whole] <= left) left -= cost[whole++];
    std::vector<Candidate> rest;
    for (int64_t i = 0; i < p.candidates; i++) {
        const int32_t bucket = p.forced[i] ? -1 : bucket_of(scores[i]);
        chosen[i] = bucket < whole;
        if (bucket == whole) rest.push_back({scores[i], static_cast<int32_t>(i)});
    }
    take_best(rest, p.costs, left, chosen);
}

int64_t choose(const ChoiceProblem &p) {
    if (p.abi_version != ABI_VERSION) return BAD_ABI;
    if (p.heads < 0 || p.candidates < 0 || p.candidates > MAX_TOKENS || p.threads < 1) return BAD_SIZE;
    if (!(p.scores && p.costs && p.forced && p.chosen)) return BAD_POINTER;
    for (int64_t i = 0; i < p.candidates; i++)
        if (p.costs[i] < 0 || p.costs[i] > INT64_MAX / (p.candidates + 1) || p.forced[i] > 1)
            return BAD_CHOICE;
    for (int64_t i = 0; i < p.heads * p.candidates; i++)
        if (p.scores[i] != p.scores[i]) return BAD_CHOICE;
    return for_all_heads(p, choose_for_head);
}

struct Run {
    int32_t start, stop;
};

// Runs of nonzero bytes.
std::vector<Run> runs_of(const uint8_t *bytes, int64_t count) {
    std::vector<Run> runs;
    for (int64_t i = 0; i < count; i++) {
        if (!bytes[i]) continue;
        const int64_t start = i;
        while (i < count && bytes[i]) i++;
        runs.push_back({static_cast<int32_t>(start), static_cast<int32_t>(i)});
    }
    return runs;
}

// Runs of one group, written as start and length, or only counted.
struct Writer {
    int32_t *to;  // or null
    int64_t count = 0;

    void add(int64_t start, int64_t stop) {
        if (to) {
            to[2 * count] = static_cast<int32_t>(start);
            to[2 * count + 1] = static_cast<int32_t>(stop - start);
        }
        count++;
    }
    void add_all(const Run *first, const Run *last) {
        if (!to) {
            count += last - first;
            return;
        }
        for (; first != last; ++first) add(first->start, first->stop);
    }
};

// One group's runs up to key `stop`, from those of columns and, relative to the group's first key, of bins.
// Columns between two bins are taken as they are, so that the work is that of copying.
int64_t merge(const std::vector<Run> &columns, const std::vector<Run> &bins, int64_t own, int64_t stop,
              int32_t *to) {
    Writer writer{to};
    const Run *column = columns.data(), *const last = column + columns.size();
    for (size_t bin = bins.size(); bin > 0;) {  // bins of large offsets are early keys
        int64_t start = std::max<int64_t>(0, own - bins[bin - 1].stop * DIAGONAL);
        int64_t end = own - (bins[--bin].start - 1) * DIAGONAL;
        if (end <= start) continue;
        const Run *next = std::lower_bound(column, last, start, [](const Run &run, int64_t key) {
            return run.stop < key;  // a run that ends at `start` touches
        });
        writer.add_all(column, next);
        column = next;
        if (column != last && column->start < start) start = column->start;
        for (;;) {  // what touches is one run
            if (column != last && column->start <= end) {
                end = std::max<int64_t>(end, column++->stop);
            } else if (bin > 0 && own - bins[bin - 1].stop * DIAGONAL <= end) {
                end = std::max(end, own - (bins[--bin].start - 1) * DIAGONAL);
            } else {
                break;
            }
        }
        writer.add(start, std::min(end, stop));
        if (end >= stop) return writer.count;
    }
    const Run *next = std::lower_bound(column, last, stop, [](const Run &run, int64_t key) {
        return run.stop <= key;
    });
    writer.add_all(column, next);
    if (next != last && next->start < stop) writer.add(next->start, stop);
    return writer.count;
}

void lay_runs_of_head(const RunsProblem &p, int64_t head) {
    const int64_t bins = (p.keys + DIAGONAL - 1) / DIAGONAL, groups = (p.queries + GROUP - 1) / GROUP;
    const uint8_t *chosen = p.chosen + head * (p.keys + bins);
    const std::vector<Run> columns = runs_of(chosen, p.keys), slashes = runs_of(chosen + p.keys, bins);
    int32_t *offsets = p.offsets + head * (groups + 1);
    int64_t before = 0;  // runs of earlier heads
    if (p.runs)
        for (int64_t h = 0; h < head; h++) before += p.offsets[h * (groups + 1) + groups];
    if (!p.runs) offsets[0] = 0;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t own = g * GROUP + p.keys - p.queries;
        const int64_t stop = std::min((g + 1) * GROUP, p.queries) + p.keys - p.queries;
        int32_t *to = p.runs ? p.runs + 2 * (before + offsets[g]) : nullptr;
        const int64_t count = merge(columns, slashes, own, stop, to);
        if (!p.runs) offsets[g + 1] = static_cast<int32_t>(offsets[g] + count);
    }
}

int64_t lay_runs(const RunsProblem &p) {
    if (p.abi_version != ABI_VERSION) return BAD_ABI;
    if (p.heads < 0 || p.queries < 1 || p.queries > p.keys || p.keys > MAX_TOKENS || p.threads < 1)
        return BAD_SIZE;
    // at worst every other key is a run
    if ((p.queries + GROUP - 1) / GROUP > INT32_MAX / ((p.keys + 3) / 2)) return BAD_SIZE;
    if (!p.chosen || !p.offsets) return BAD_POINTER;
    return for_all_heads(p, lay_runs_of_head);
}

}  // namespace
}  // namespace sparse_dit

int64_t sparse_dit_choose(const sparse_dit::ChoiceProblem *problem) {
    return problem ? sparse_dit::choose(*problem) : sparse_dit::BAD_POINTER;
}

int64_t sparse_dit_lay_runs(const sparse_dit::RunsProblem *problem) {
    return problem ? sparse_dit::lay_runs(*problem) : sparse_dit::BAD_POINTER;
}
