// The functions of one variant. A file variant_*.cpp sets SPARSE_DIT_VARIANT (its namespace), includes the
// intrinsics that it needs, and then this file. The .inc files are no headers: they are parts of this one, in
// this order, inside its namespaces.

#include "call.h"

namespace sparse_dit {
namespace SPARSE_DIT_VARIANT {
namespace {

#include "vec.inc"
#include "rows.inc"
#include "tiles.inc"
#include "panel.inc"
#include "float_path.inc"
#if defined(__AVX512BF16__)
#include "bfloat16_path.inc"
#endif
#include "attend.inc"
#include "sums.inc"

template <class T>
float largest_square(const Problem &p, int64_t batch, int64_t kv_head, int64_t first, int64_t last) {
    const T *k = static_cast<const T *>(p.k) + batch * p.k_strides.batch + kv_head * p.k_strides.head;
    float largest = 0, row[MAX_CHANNELS];
    for (int64_t j = first; j < last; j++) {
        const T *at = k + j * p.k_strides.token;
        const float *values = row;
        if (sizeof(T) == 4 && p.k_strides.channel == 1)
            values = reinterpret_cast<const float *>(at);
        else
            read_row(at, p.k_strides.channel, p.channels, row);
        V sum = set1(0.f), more = set1(0.f);
        int64_t d = 0;
        for (; d + 2 * W <= p.channels; d += 2 * W) {
            const V x = load(values + d), y = load(values + d + W);
            sum = fma(x, x, sum);
            more = fma(y, y, more);
        }
        float square = lane_sum(sum + more);
        for (; d < p.channels; d++) square += values[d] * values[d];
        if (!(square <= largest)) largest = square;
        if (square != square) return square;
    }
    return largest;
}

template <class T>
void pool_cells(const Call &call, int64_t batch, int64_t kv_head, const Pattern &pattern,
                const Pooled &pooled, int64_t first, int64_t last) {
    const Problem &p = call.problem;
    const int64_t d = p.channels, e = p.value_channels;
    const KeyRange valid = call.valid[batch];
    const T *k = static_cast<const T *>(p.k) + batch * p.k_strides.batch + kv_head * p.k_strides.head;
    const T *v = nullptr;  // if only the mass is wanted
    if (p.v) v = static_cast<const T *>(p.v) + batch * p.v_strides.batch + kv_head * p.v_strides.head;
    float row[MAX_CHANNELS];
    for (int64_t cell = first; cell < last; cell++) {
        float *mean_k = pooled.k + cell * d, *mean_v = pooled.v + cell * e;
        __builtin_memset(mean_k, 0, static_cast<size_t>(d) * 4);
        __builtin_memset(mean_v, 0, static_cast<size_t>(e) * 4);
        int64_t count = 0;
        int32_t smallest = INT32_MAX, largest = -1;
        for (int64_t at = pattern.cell_offsets[cell]; at < pattern.cell_offsets[cell + 1]; at++) {
            const int32_t token = pattern.k_order ? pattern.k_order[at] : static_cast<int32_t>(at);
            if (token < valid.start || token >= valid.stop) continue;
            count++;
            if (token < smallest) smallest = token;
            if (token > largest) largest = token;
            read_row(k + token * p.k_strides.token, p.k_strides.channel, d, row);
            for (int64_t c = 0; c < d; c++) mean_k[c] += row[c];
            if (!p.v) continue;
            read_row(v + token * p.v_strides.token, p.v_strides.channel, e, row);
            for (int64_t c = 0; c < e; c++) mean_v[c] += row[c];
        }
        const float factor = count ? 1.f / static_cast<float>(count) : 0.f;
        for (int64_t c = 0; c < d; c++) mean_k[c] *= factor;
        for (int64_t c = 0; c < e; c++) mean_v[c] *= factor;
        pooled.bias[cell] = count ? __builtin_log2f(static_cast<float>(count)) : 0.f;
        pooled.first[cell] = smallest;
        pooled.last[cell] = largest;
    }
}

int64_t scratch_bytes(const Call &call) {
#if defined(__AVX512BF16__)
    if (call.problem.dtype == BFLOAT16)
        return Workspace<BFloat16Path>::lay_out(call, nullptr, nullptr);
#endif
    return Workspace<FloatPath<float>>::lay_out(call, nullptr, nullptr);
}

float key_norm(const Call &call, int64_t batch, int64_t kv_head, int64_t first, int64_t last) {
    const Problem &p = call.problem;
    switch (p.dtype) {
        case BFLOAT16: return largest_square<BFloat16>(p, batch, kv_head, first, last);
        case FLOAT16: return largest_square<Float16>(p, batch, kv_head, first, last);
        default: return largest_square<float>(p, batch, kv_head, first, last);
    }
}

void pool(const Call &call, int64_t batch, int64_t kv_head, const Pattern &pattern,
          const Pooled &pooled, int64_t first, int64_t last) {
    switch (call.problem.dtype) {
        case BFLOAT16:
            return pool_cells<BFloat16>(call, batch, kv_head, pattern, pooled, first, last);
        case FLOAT16:
            return pool_cells<Float16>(call, batch, kv_head, pattern, pooled, first, last);
        default: return pool_cells<float>(call, batch, kv_head, pattern, pooled, first, last);
    }
}

void attend(const Call &call, const Task &task, void *scratch) {
    switch (call.problem.dtype) {
#if defined(__AVX512BF16__)
        case BFLOAT16: return attend_task<BFloat16Path>(call, task, scratch);
#else
        case BFLOAT16: return attend_task<FloatPath<BFloat16>>(call, task, scratch);
#endif
        case FLOAT16: return attend_task<FloatPath<Float16>>(call, task, scratch);
        default: return attend_task<FloatPath<float>>(call, task, scratch);
    }
}

int64_t sums_scratch(const SumsProblem &problem, int64_t rows) {
    return SumsWorkspace::lay_out(problem, rows, nullptr, nullptr);
}

void sums(const SumsProblem &problem, const SumsTask &task, void *scratch) {
    switch (problem.dtype) {
        case BFLOAT16: return run_sums<BFloat16>(problem, task, scratch);
        case FLOAT16: return run_sums<Float16>(problem, task, scratch);
        default: return run_sums<float>(problem, task, scratch);
    }
}

// Independent sums, enough to hide the latency of each.
int64_t multiply_adds(int64_t turns) {
#if defined(__AVX512F__) || defined(__ARM_NEON)
    constexpr int SUMS = 24;
#else
    constexpr int SUMS = 12;
#endif
    V sums[SUMS];
    for (int i = 0; i < SUMS; i++) sums[i] = set1(static_cast<float>(i));
    const V factor = set1(0.999f), addend = set1(0.001f);
    for (int64_t turn = 0; turn < turns; turn++)
#pragma GCC unroll 24
        for (int i = 0; i < SUMS; i++) sums[i] = fma(sums[i], factor, addend);
    for (int i = 1; i < SUMS; i++) sums[0] += sums[i];
    volatile float kept = lane_sum(sums[0]);  // so that the loop isn't left out
    static_cast<void>(kept);
    return turns * SUMS * W * 2;
}

}  // namespace
}  // namespace SPARSE_DIT_VARIANT
}  // namespace sparse_dit
