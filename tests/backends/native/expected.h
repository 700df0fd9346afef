// What must come out of a problem: sums in double, key by key, and how far from them is right.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "problem.h"

namespace driver {

[[noreturn]] inline void fail(const std::string &what) {
    std::printf("FAILED: %s\n", what.c_str());
    std::exit(1);
}

inline void expect(double ours, double want, double bound, const char *name, int64_t row,
                   int64_t at) {
    if (std::abs(ours - want) <= bound || ours == want) return;
    std::ostringstream text;
    text << name << " of row " << row << " at " << at << " is " << ours << ", should be " << want
         << " to " << bound;
    fail(text.str());
}

// What one row sees: keys, or means over cells.
struct Seen {
    std::vector<double> logits;
    std::vector<std::vector<double>> values;
    std::vector<int64_t> blocks;  // -1 for cells
    double largest = 0, cells = 0;  // bounds of the logits, and of the logs of cell sizes
};

struct Row {
    Case &c;
    const Pattern &p;
    int64_t batch, head, group, token;
    int64_t first, last;  // valid keys: those in some row's interval; there are none from `last` on

    int64_t kv_head() const { return head / (c.heads / c.kv_heads); }
    int64_t key(int64_t position) const {
        return p.k_order.empty() ? position : p.k_order[static_cast<size_t>(position)];
    }
    bool sees(int64_t t) const { return t >= c.start_of(batch, token) && t < c.stop_of(batch, token); }
    void add(Seen &seen, const std::vector<int64_t> &tokens, int64_t block) const {
        std::vector<double> mean(static_cast<size_t>(c.d)), value(static_cast<size_t>(c.e));
        const double count = static_cast<double>(tokens.size());
        double logit = 0, q_norm = 0, k_norm = 0;
        for (int64_t d = 0; d < c.d; d++) {
            for (const int64_t t : tokens)
                mean[static_cast<size_t>(d)] += c.k.at(batch, kv_head(), t, d) / count;
            const double x = c.q.at(batch, head, token, d), y = mean[static_cast<size_t>(d)];
            logit += x * y, q_norm += x * x, k_norm += y * y;
        }
        for (int64_t d = 0; d < c.e; d++)
            for (const int64_t t : tokens)
                value[static_cast<size_t>(d)] += c.v.at(batch, kv_head(), t, d) / count;
        seen.logits.push_back(logit * c.scale + std::log(count));
        seen.largest = std::max(seen.largest, std::sqrt(q_norm * k_norm) * c.scale);
        seen.cells = std::max(seen.cells, std::log(count));
        seen.values.push_back(value);
        seen.blocks.push_back(block);
    }
    Seen seen() const {
        Seen result;
        const auto g = static_cast<size_t>(group);
        for (int32_t r = p.run_offsets[g]; r < p.run_offsets[g + 1]; r++)
            for (int64_t i = 0, at = p.runs[static_cast<size_t>(r)][0];
                 i < p.runs[static_cast<size_t>(r)][1]; i++, at++)
                if (sees(key(at)))
                    add(result, {key(at)}, at / c.mass_block);
        if (p.cells.empty()) return result;
        for (int32_t r = p.far_offsets[g]; r < p.far_offsets[g + 1]; r++) {
            const auto [start, count] = p.far_runs[static_cast<size_t>(r)];
            for (int32_t cell = start; cell < start + count; cell++) {
                std::vector<int64_t> tokens;
                for (int32_t at = p.cells[static_cast<size_t>(cell)];
                     at < p.cells[static_cast<size_t>(cell) + 1]; at++)
                    if (key(at) >= first && key(at) < last) tokens.push_back(key(at));
                if (!tokens.empty() &&
                    std::all_of(tokens.begin(), tokens.end(), [&](int64_t t) { return sees(t); }))
                    add(result, tokens, -1);
            }
        }
        return result;
    }
};

inline double unit(int64_t dtype) {
    return std::ldexp(1, dtype == FLOAT32 ? -24 : dtype == BFLOAT16 ? -8 : -11);
}

// Checks one row's output and LSE, and adds its weights to the mass of its group.
inline double check_row(const Row &row, std::vector<double> &mass) {
    Case &c = row.c;
    const Seen seen = row.seen();
    double top = -INFINITY, total = 0;
    for (const double x : seen.logits) top = std::max(top, x);
    for (const double x : seen.logits) total += std::exp(x - top);
    const double wander = std::sqrt(static_cast<double>(c.d));  // as in kernel_cases.py
    const double logits = std::max(4.0, wander / 2) * seen.largest + 3 * wander * seen.cells;
    const double share = std::ldexp(16 + logits, -24);
    const double lse = seen.logits.empty() ? -INFINITY : top + std::log(total);
    expect(c.lse[static_cast<size_t>((row.batch * c.heads + row.head) * c.n + row.token)], lse,
           share + std::ldexp(std::abs(lse), -23), "lse", row.token, row.head);
    for (size_t i = 0; i < seen.logits.size(); i++)
        if (seen.blocks[i] >= 0)
            mass[static_cast<size_t>(row.group * c.blocks() + seen.blocks[i])] +=
                std::exp(seen.logits[i] - lse);
    for (int64_t d = 0; d < c.e; d++) {
        double want = 0, size = 0;
        for (size_t i = 0; i < seen.logits.size(); i++) {
            const double value = seen.values[i][static_cast<size_t>(d)];
            want += std::exp(seen.logits[i] - lse) * value;
            size += std::exp(seen.logits[i] - lse) * std::abs(value);
        }
        const double weights = c.bfloat16_weights ? unit(BFLOAT16) : 0;
        const double bound = (share + weights) * size + unit(c.dtype) * std::abs(want) + 1e-7;
        expect(c.out.at(row.batch, row.head, row.token, d), want, bound, "out", row.token, d);
    }
    return share;
}

inline void check_mass(const Case &c, int64_t batch, int64_t head, const std::vector<double> &want,
                double share) {
    const auto size = static_cast<size_t>(c.groups * c.blocks());
    const size_t start = static_cast<size_t>(batch * c.heads + head) * size;
    for (size_t i = 0; i < size; i++)
        expect(c.mass[start + i], want[i], 2 * share * want[i] + 1e-30, "mass", head,
               static_cast<int64_t>(i));
}

inline void check_result(Case &c) {
    for (int64_t b = 0; b < c.batch; b++) {
        int64_t first = c.m, last = 0;
        for (int64_t row = 0; row < c.n; row++) {
            const int64_t start = std::max<int64_t>(0, c.start_of(b, row));
            const int64_t stop = std::min(c.m, c.stop_of(b, row));
            if (start < stop) first = std::min(first, start), last = std::max(last, stop);
        }
        for (int64_t h = 0; h < c.heads; h++) {
            const Pattern &p = c.patterns[static_cast<size_t>(c.head_to_pattern[h])];
            std::vector<double> mass(static_cast<size_t>(c.groups * c.blocks()));
            double share = 0;
            for (size_t g = 0; g + 1 < p.q_offsets.size(); g++)
                for (int32_t at = p.q_offsets[g]; at < p.q_offsets[g + 1]; at++) {
                    const int64_t token =
                        p.q_order.empty() ? at : p.q_order[static_cast<size_t>(at)];
                    const Row row{c, p, b, h, static_cast<int64_t>(g), token, first, last};
                    share = std::max(share, check_row(row, mass));
                }
            check_mass(c, b, h, mass, share);
        }
    }
    std::vector<bool> written(c.out.bytes.size(), false);
    for (int64_t i = 0; i < c.batch * c.heads * c.n * c.e; i++) {
        const int64_t row = i / c.e, at = c.out.place(row / c.n / c.heads, row / c.n % c.heads,
                                                      row % c.n, i % c.e);
        const auto start = written.begin() + at * c.out.item;
        std::fill(start, start + c.out.item, true);
    }
    for (size_t i = 0; i < written.size(); i++)
        if (!written[i] && c.out.bytes[i] != 0xff) fail("out was written between its rows");
}

}  // namespace driver
