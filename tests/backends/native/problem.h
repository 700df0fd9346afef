// Random problems for the driver: inputs in heap blocks of exactly their size, so that a sanitizer
// sees every step outside of them, and a packed index of any shape.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "abi.h"

namespace driver {

using namespace sparse_dit;
using Run = std::array<int32_t, 2>;

struct Random {
    std::mt19937_64 engine;
    int64_t below(int64_t n) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(n)); }
    bool chance(int percent) { return below(100) < percent; }
    // A number that bfloat16 and float16 hold exactly, up to about 4.
    float number() {
        float x = static_cast<float>(below(2001) - 1000) / 250.f;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        bits &= 0xffff0000u;
        std::memcpy(&x, &bits, 4);
        return x > -0.001f && x < 0.001f ? 0.f : x;
    }
};

inline void encode(float x, int64_t dtype, void *at) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t exponent = bits >> 23 & 0xffu;
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (dtype == FLOAT16)
        half = static_cast<uint16_t>(
            exponent ? bits >> 31 << 15 | (exponent - 112) << 10 | (bits >> 13 & 0x3ffu) : 0);
    if (dtype == FLOAT32)
        std::memcpy(at, &bits, 4);
    else
        std::memcpy(at, &half, 2);
}

inline double decode(int64_t dtype, const void *at) {
    uint32_t bits = 0;
    uint16_t half = 0;
    if (dtype == FLOAT32)
        std::memcpy(&bits, at, 4);
    else
        std::memcpy(&half, at, 2);
    if (dtype == FLOAT16) {
        const int exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
        const double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                           : std::ldexp(fraction, -24);
        return half >> 15 ? -size : size;
    }
    if (dtype == BFLOAT16) bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// [batch, heads, tokens, channels] in any order of memory, with gaps.
struct Tensor {
    int64_t dtype, size, item;
    Strides strides;
    std::vector<unsigned char> bytes;

    Tensor(Random &random, int64_t type, std::array<int64_t, 4> shape) : dtype(type) {
        item = type == FLOAT32 ? 4 : 2;
        std::array<int, 4> axes = {0, 1, 2, 3};  // outermost first
        if (random.chance(50)) std::swap(axes[1], axes[2]);
        if (random.chance(10)) std::swap(axes[2], axes[3]);
        std::array<int64_t, 4> step{};
        int64_t next = random.chance(15) ? 2 : 1;
        for (int i = 3; i >= 0; i--) {
            step[axes[i]] = next;
            next = next * shape[axes[i]] + (random.chance(30) ? random.below(9) : 0);
        }
        strides = {step[0], step[1], step[2], step[3]};
        size = 1;
        for (int i = 0; i < 4; i++) size += (shape[i] - 1) * step[i];
        bytes.assign(static_cast<size_t>(size * item), 0xff);  // NaN in each dtype
    }
    int64_t place(int64_t b, int64_t h, int64_t t, int64_t d) const {
        return b * strides.batch + h * strides.head + t * strides.token + d * strides.channel;
    }
    double at(int64_t b, int64_t h, int64_t t, int64_t d) const {
        return decode(dtype, &bytes[static_cast<size_t>(place(b, h, t, d) * item)]);
    }
    void fill(Random &random) {
        for (int64_t i = 0; i < size; i++)
            encode(random.number(), dtype, &bytes[static_cast<size_t>(i * item)]);
    }
};

struct Pattern {
    std::vector<int32_t> q_order, k_order;  // empty where tokens stay in place
    std::vector<int32_t> q_offsets, run_offsets, cells, far_offsets;
    std::vector<Run> runs, far_runs;
};

inline std::vector<int32_t> permutation(Random &random, int64_t n) {
    std::vector<int32_t> order(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; i++) {
        const int64_t j = random.below(i + 1);
        order[static_cast<size_t>(i)] = order[static_cast<size_t>(j)];
        order[static_cast<size_t>(j)] = static_cast<int32_t>(i);
    }
    return order;
}

// Ascending runs that don't touch, in [0, n).
inline void add_runs(Random &random, int64_t n, std::vector<Run> &runs) {
    const int64_t longest = random.chance(30) ? 1 : random.chance(50) ? 5 : n;
    const int64_t gap = random.chance(50) ? 3 : n;
    int64_t at = random.chance(40) ? 0 : random.below(gap + 1);
    while (at < n) {
        const int64_t length = std::min(n - at, 1 + random.below(longest));
        runs.push_back({static_cast<int32_t>(at), static_cast<int32_t>(length)});
        at += length + 1 + random.below(gap);
    }
}

inline Pattern make_pattern(Random &random, int64_t n, int64_t m) {
    Pattern p;
    if (random.chance(50)) p.q_order = permutation(random, n);
    if (random.chance(50)) p.k_order = permutation(random, m);
    const bool far = random.chance(40);
    if (far) {
        for (int64_t at = random.below(m); at < m; at += 1 + random.below(12))
            p.cells.push_back(static_cast<int32_t>(at));
        p.far_offsets.push_back(0);
    }
    const int64_t size = random.chance(20) ? n : 1 + random.below(128);
    p.q_offsets.push_back(0);
    p.run_offsets.push_back(0);
    for (int64_t row = 0; row < n; row += size) {
        p.q_offsets.push_back(static_cast<int32_t>(std::min(n, row + size)));
        if (random.chance(15)) p.runs.push_back({0, static_cast<int32_t>(m)});
        else if (random.chance(80)) add_runs(random, m, p.runs);
        p.run_offsets.push_back(static_cast<int32_t>(p.runs.size()));
        if (!far) continue;
        const int64_t cells = static_cast<int64_t>(p.cells.size()) - 1;
        if (cells > 0 && random.chance(80)) add_runs(random, cells, p.far_runs);
        p.far_offsets.push_back(static_cast<int32_t>(p.far_runs.size()));
    }
    return p;
}

inline int32_t append(std::vector<int32_t> &words, const std::vector<int32_t> &array) {
    const auto at = static_cast<int32_t>(words.size());
    words.insert(words.end(), array.begin(), array.end());
    return at;
}
inline int32_t append(std::vector<int32_t> &words, const std::vector<Run> &runs) {
    const auto at = static_cast<int32_t>(words.size());
    for (const Run &run : runs) words.insert(words.end(), run.begin(), run.end());
    return at;
}

inline std::vector<int32_t> pack(const std::vector<Pattern> &patterns,
                                 const std::vector<int32_t> &heads, Header header) {
    constexpr size_t HEADER = sizeof(Header) / 4, ENTRY = sizeof(Entry) / 4;
    std::vector<int32_t> words(HEADER + ENTRY * patterns.size());
    std::memcpy(words.data(), &header, sizeof header);
    append(words, heads);
    for (size_t i = 0; i < patterns.size(); i++) {
        const Pattern &p = patterns[i];
        Entry e;
        e.q_order = p.q_order.empty() ? -1 : append(words, p.q_order);
        e.k_order = p.k_order.empty() ? -1 : append(words, p.k_order);
        e.q_offsets = append(words, p.q_offsets);
        e.groups = static_cast<int32_t>(p.q_offsets.size()) - 1;
        e.run_offsets = append(words, p.run_offsets);
        e.runs = append(words, p.runs);
        e.num_runs = static_cast<int32_t>(p.runs.size());
        e.cell_offsets = p.cells.empty() ? -1 : append(words, p.cells);
        e.cells = p.cells.empty() ? 0 : static_cast<int32_t>(p.cells.size()) - 1;
        e.far_offsets = p.cells.empty() ? -1 : append(words, p.far_offsets);
        e.far_runs = p.cells.empty() ? -1 : append(words, p.far_runs);
        e.num_far_runs = static_cast<int32_t>(p.far_runs.size());
        std::memcpy(&words[HEADER + ENTRY * i], &e, sizeof e);
    }
    return {words.begin(), words.end()};  // a block of exactly this size
}

struct Case {
    Random random;
    int64_t dtype, batch, heads, kv_heads, n, m, d, e;
    Tensor q, k, v, out;
    std::vector<Pattern> patterns;
    std::vector<int32_t> head_to_pattern, words;
    std::vector<int32_t> row_start, row_stop;  // [batch, n], or empty
    std::vector<float> lse, mass;
    int64_t mass_block, groups = 0;
    bool bfloat16_weights = false;
    double scale;

    explicit Case(uint64_t seed)
        : random{std::mt19937_64(seed)}, dtype(random.below(3)), batch(1 + random.below(2)),
          heads(1 + random.below(4)), kv_heads(heads % 2 || random.chance(50) ? heads : heads / 2),
          n(size()), m(size()), d(channels()), e(random.chance(70) ? d : channels()),
          q(random, dtype, {batch, heads, n, d}), k(random, dtype, {batch, kv_heads, m, d}),
          v(random, dtype, {batch, kv_heads, m, e}), out(random, dtype, {batch, heads, n, e}) {
        for (Tensor *x : {&q, &k, &v}) x->fill(random);
        for (int64_t i = 1 + random.below(2); i > 0; i--)
            patterns.push_back(make_pattern(random, n, m));
        for (int64_t h = 0; h < heads; h++)
            head_to_pattern.push_back(
                static_cast<int32_t>(random.below(static_cast<int64_t>(patterns.size()))));
        for (const Pattern &p : patterns)
            groups = std::max(groups, static_cast<int64_t>(p.q_offsets.size()) - 1);
        words = pack(patterns, head_to_pattern,
                     {MAGIC, static_cast<int32_t>(ABI_VERSION), static_cast<int32_t>(heads),
                      static_cast<int32_t>(patterns.size()), static_cast<int32_t>(n),
                      static_cast<int32_t>(m)});
        if (random.chance(50)) make_intervals();
        mass_block = std::array<int64_t, 4>{1, 16, 64, m + 3}[static_cast<size_t>(random.below(4))];
        scale = random.chance(30) ? (random.chance(50) ? 4.0 : 0.7)
                                  : 1.0 / std::sqrt(static_cast<double>(d));
        lse.resize(static_cast<size_t>(batch * heads * n));
        mass.resize(static_cast<size_t>(batch * heads * groups * blocks()));
    }

    // Causal order, a window, padding, or anything, now and then beyond the keys; of one side or both.
    void make_intervals() {
        const int64_t kind = random.below(4), offset = random.below(2 * m) - m, width = random.below(m);
        const bool starts = random.chance(70), stops = !starts || random.chance(70);
        for (int64_t b = 0; b < batch; b++) {
            const int64_t first = random.below(m + 1), last = random.below(m + 3);
            for (int64_t row = 0; row < n; row++) {
                int64_t start = first, stop = last;
                if (kind < 2) stop = row + offset + 1, start = kind ? stop - width - 1 : first;
                if (kind == 3) start = random.below(m + 1) - 1, stop = random.below(m + 3);
                if (starts) row_start.push_back(static_cast<int32_t>(start));
                if (stops) row_stop.push_back(static_cast<int32_t>(stop));
            }
        }
    }
    int64_t start_of(int64_t b, int64_t row) const {
        return row_start.empty() ? 0 : row_start[static_cast<size_t>(b * n + row)];
    }
    int64_t stop_of(int64_t b, int64_t row) const {
        return row_stop.empty() ? m : row_stop[static_cast<size_t>(b * n + row)];
    }
    int64_t size() {
        if (random.chance(15)) return 1 + random.below(3);
        return 1 + random.below(random.chance(10) ? 400 : 150);
    }
    int64_t channels() {
        constexpr std::array<int64_t, 10> sizes = {8, 16, 24, 40, 64, 80, 128, 136, 256, 512};
        return sizes[static_cast<size_t>(random.below(10))];
    }
    int64_t blocks() const { return (m + mass_block - 1) / mass_block; }

    Problem problem(int64_t variant) {
        Problem p{};
        p.abi_version = ABI_VERSION;
        p.dtype = dtype;
        p.batch = batch, p.heads = heads, p.kv_heads = kv_heads;
        p.queries = n, p.keys = m, p.channels = d, p.value_channels = e;
        p.q = q.bytes.data(), p.k = k.bytes.data(), p.v = v.bytes.data();
        p.out = out.bytes.data();
        p.lse = lse.data();
        p.mass = mass.data();
        p.row_start = row_start.empty() ? nullptr : row_start.data();
        p.row_stop = row_stop.empty() ? nullptr : row_stop.data();
        p.start_strides = p.stop_strides = {n, 1};
        p.index = words.data();
        p.index_words = static_cast<int64_t>(words.size());
        p.q_strides = q.strides, p.k_strides = k.strides, p.v_strides = v.strides;
        p.out_strides = out.strides;
        p.mass_block = mass_block, p.mass_groups = groups;
        p.threads = 1 + random.below(4);
        p.variant = variant;
        p.scale = scale;
        return p;
    }
    void clear() {
        std::fill(out.bytes.begin(), out.bytes.end(), static_cast<unsigned char>(0xff));
        std::fill(lse.begin(), lse.end(), NAN);
        std::fill(mass.begin(), mass.end(), 0.f);
    }
};

}  // namespace driver
