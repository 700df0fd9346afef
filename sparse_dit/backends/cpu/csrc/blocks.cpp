// Estimates over the blocks of a grid: means of stretches of sorted tokens, and the runs of chosen blocks.

#include <algorithm>
#include <cmath>
#include <cstring>

#include "call.h"
#include "parallel.h"

namespace sparse_dit {
namespace {

constexpr int64_t MAX_TOKENS = (1LL << 31) - 1;

float widened(const float *x) { return *x; }

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

float widened(const BFloat16 *x) {
    const uint32_t bits = static_cast<uint32_t>(x->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float widened(const Float16 *x) {
    const uint32_t sign = static_cast<uint32_t>(x->bits & 0x8000) << 16;
    const uint32_t exponent = x->bits >> 10 & 31, fraction = x->bits & 1023;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    if (exponent == 31) bits = sign | 0x7f800000u | fraction << 13;
    float value;
    if (exponent == 0) {
        value = std::ldexp(static_cast<float>(fraction), -24);
        return sign ? -value : value;
    }
    std::memcpy(&value, &bits, 4);
    return value;
}

// The means of one head's stretches.
template <class T>
void means_of_head(const MeansProblem &p, int64_t item) {
    const int64_t batch = item / p.heads, head = item % p.heads, d = p.channels;
    const T *x = static_cast<const T *>(p.x) + batch * p.strides.batch + head * p.strides.head;
    for (int64_t s = 0; s < p.stretches; s++) {
        float *out = p.means + (item * p.stretches + s) * d;
        std::fill(out, out + d, 0.f);
        for (int64_t at = p.bounds[s]; at < p.bounds[s + 1]; at++) {
            const T *row = x + (p.order ? p.order[at] : at) * p.strides.token;
            if (p.strides.channel == 1)
                for (int64_t c = 0; c < d; c++) out[c] += widened(row + c);
            else
                for (int64_t c = 0; c < d; c++) out[c] += widened(row + c * p.strides.channel);
        }
        const float share = 1.f / static_cast<float>(p.bounds[s + 1] - p.bounds[s]);
        for (int64_t c = 0; c < d; c++) out[c] *= share;
    }
}

// Whether bounds ascend by at least one from 0 or later to at most `last`.
bool are_bounds(const int32_t *bounds, int64_t count, int64_t last) {
    if (bounds[0] < 0 || bounds[count] > last) return false;
    for (int64_t i = 0; i < count; i++)
        if (bounds[i] >= bounds[i + 1]) return false;
    return true;
}

int64_t means(const MeansProblem &p) {
    if (p.abi_version != ABI_VERSION) return BAD_ABI;
    if (p.batch < 0 || p.heads < 1 || p.channels < 1 || p.threads < 1) return BAD_SHAPE;
    if (p.tokens < 1 || p.tokens > MAX_TOKENS || p.stretches < 1 || p.stretches > p.tokens) return BAD_SIZE;
    if (!(p.x && p.bounds && p.means)) return BAD_POINTER;
    if (!are_bounds(p.bounds, p.stretches, p.tokens)) return BAD_BLOCKS;
    for (int64_t i = 0; p.order && i < p.tokens; i++)
        if (p.order[i] < 0 || p.order[i] >= p.tokens) return BAD_BLOCKS;
    void (*one)(const MeansProblem &, int64_t);
    switch (p.dtype) {
        case FLOAT32: one = means_of_head<float>; break;
        case BFLOAT16: one = means_of_head<BFloat16>; break;
        case FLOAT16: one = means_of_head<Float16>; break;
        default: return BAD_DTYPE;
    }
    struct Context {
        const MeansProblem &problem;
        void (*one)(const MeansProblem &, int64_t);
    } context{p, one};
    run_items(
        p.threads, p.batch * p.heads,
        [](void *raw, int64_t item) {
            const auto &c = *static_cast<Context *>(raw);
            c.one(c.problem, item);
        },
        &context);
    return OK;
}

// Runs of a list, written as start and length, or only counted; runs that touch become one.
struct RunList {
    int32_t *to;  // or null
    int64_t count = 0, start = -1, stop = -1;

    void add(int64_t from, int64_t until) {
        if (from == until) return;
        if (from != stop) {
            finish();
            start = from;
        }
        stop = until;
    }
    void finish() {
        if (start < 0) return;
        if (to) {
            to[2 * count] = static_cast<int32_t>(start);
            to[2 * count + 1] = static_cast<int32_t>(stop - start);
        }
        count++;
        start = -1;
    }
};

// What the rows of block `owner` see exactly, or of which pooled keys.
int64_t lay_exact(const BlocksProblem &p, const uint8_t *chosen, int32_t owner, int32_t *to) {
    RunList list{to};
    if (owner < 0) {
        list.add(0, p.tokens);
    } else {
        list.add(0, p.bounds[0]);
        for (int64_t c = 0; c < p.blocks; c++)
            if (chosen[owner * p.blocks + c]) list.add(p.bounds[c], p.bounds[c + 1]);
        list.add(p.bounds[p.blocks], p.tokens);
    }
    list.finish();
    return list.count;
}

int64_t lay_far(const BlocksProblem &p, const uint8_t *chosen, int32_t owner, int32_t *to) {
    RunList list{to};
    if (owner >= 0)
        for (int64_t c = 0; c < p.blocks; c++)
            if (!chosen[owner * p.blocks + c]) list.add(p.pool_of[c], p.pool_of[c + 1]);
    list.finish();
    return list.count;
}

void lay_head(const BlocksProblem &p, int64_t head) {
    const uint8_t *chosen = p.chosen + head * p.blocks * p.blocks;
    struct {
        int32_t *offsets, *runs;
        int64_t (*lay)(const BlocksProblem &, const uint8_t *, int32_t, int32_t *);
    } lists[] = {{p.offsets, p.runs, lay_exact}, {p.far_offsets, p.far_runs, lay_far}};
    for (auto &list : lists) {
        if (!list.offsets) continue;
        int32_t *offsets = list.offsets + head * (p.groups + 1);
        int64_t before = 0;  // runs of earlier heads
        if (p.lay)
            for (int64_t h = 0; h < head; h++) before += list.offsets[h * (p.groups + 1) + p.groups];
        if (!p.lay) offsets[0] = 0;
        for (int64_t g = 0; g < p.groups; g++) {
            int32_t *to = p.lay ? list.runs + 2 * (before + offsets[g]) : nullptr;
            if (!p.lay || offsets[g + 1] > offsets[g]) {
                const int64_t count = list.lay(p, chosen, p.owner[g], to);
                if (!p.lay) offsets[g + 1] = static_cast<int32_t>(offsets[g] + count);
            }
        }
    }
}

int64_t lay_blocks(const BlocksProblem &p) {
    if (p.abi_version != ABI_VERSION) return BAD_ABI;
    if (p.heads < 0 || p.blocks < 1 || p.groups < 1 || p.tokens < 1 || p.tokens > MAX_TOKENS ||
        p.blocks > p.tokens || p.groups > p.tokens || p.threads < 1)
        return BAD_SIZE;
    if (p.groups > INT32_MAX / (p.blocks / 2 + 2)) return BAD_SIZE;  // at worst every other block is a run
    if (!(p.chosen && p.bounds && p.owner && p.offsets) || !p.pool_of != !p.far_offsets) return BAD_POINTER;
    if (p.lay && (!p.runs || (p.far_offsets && !p.far_runs))) return BAD_POINTER;
    if (!are_bounds(p.bounds, p.blocks, p.tokens)) return BAD_BLOCKS;
    if (p.pool_of && !are_bounds(p.pool_of, p.blocks, p.tokens)) return BAD_BLOCKS;
    for (int64_t g = 0; g < p.groups; g++)
        if (p.owner[g] < -1 || p.owner[g] >= p.blocks) return BAD_BLOCKS;
    BlocksProblem problem = p;
    run_items(
        p.threads, p.heads,
        [](void *raw, int64_t head) { lay_head(*static_cast<const BlocksProblem *>(raw), head); },
        &problem);
    return OK;
}

}  // namespace
}  // namespace sparse_dit

int64_t sparse_dit_means(const sparse_dit::MeansProblem *problem) {
    return problem ? sparse_dit::means(*problem) : sparse_dit::BAD_POINTER;
}

int64_t sparse_dit_lay_blocks(const sparse_dit::BlocksProblem *problem) {
    return problem ? sparse_dit::lay_blocks(*problem) : sparse_dit::BAD_POINTER;
}
