// Random estimates for the driver: sums against sums in double, choices and runs against their definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "expected.h"

namespace driver {

inline void check_status(int64_t status, bool sound, const char *what) {
    if ((status == OK) != sound) fail(std::string(what) + ": " + sparse_dit_error(status));
}

// Sums of a few rows of the listed heads.
inline void check_sums(Random &random, int64_t variant) {
    const int64_t m = 1 + random.below(200), n = 1 + random.below(m), kv_heads = 1 + random.below(2);
    const int64_t heads = kv_heads * (1 + random.below(3)), d = 8 * (1 + random.below(9));
    const int64_t dtype = random.below(3), batch = 1 + random.below(2), sampled = 1 + random.below(20);
    Tensor q(random, dtype, {batch, heads, n, d}), k(random, dtype, {batch, kv_heads, m, d});
    q.fill(random), k.fill(random);
    std::vector<int32_t> rows, start, stop, listed;
    for (int64_t i = 0; i < batch * sampled; i++) {
        const int64_t row = random.below(n), own = row + m - n;
        rows.push_back(static_cast<int32_t>(row));
        start.push_back(static_cast<int32_t>(random.chance(60) ? 0 : random.below(own + 1)));
        stop.push_back(static_cast<int32_t>(random.chance(80) ? own + 1 : random.below(own + 2)));
    }
    for (int32_t h = 0; h < heads; h++)
        if (random.chance(70) || h + 1 == heads) listed.push_back(h);
    const auto count = static_cast<int64_t>(listed.size());
    const int64_t bins = (m + DIAGONAL - 1) / DIAGONAL, local = random.chance(50) ? 0 : random.below(m + 1);
    std::vector<float> columns(static_cast<size_t>(batch * count * m), NAN);
    std::vector<float> diagonals(static_cast<size_t>(batch * count * bins), NAN);
    SumsProblem p{ABI_VERSION, dtype, batch, heads, kv_heads, n, m, d, sampled, count, local,
                  q.bytes.data(), k.bytes.data(), rows.data(), start.data(), stop.data(), listed.data(),
                  columns.data(), diagonals.data(), q.strides, k.strides, 1 + random.below(3), variant, 0.3};
    check_status(sparse_dit_sums(&p), true, "sums");
    std::vector<double> want(columns.size(), 0), slashes(diagonals.size(), 0);
    for (int64_t b = 0; b < batch; b++)
        for (int64_t l = 0; l < count; l++)
            for (int64_t r = b * sampled; r < (b + 1) * sampled; r++) {
                const int64_t own = rows[r] + m - n, h = listed[static_cast<size_t>(l)];
                std::vector<double> e(static_cast<size_t>(m), 0);
                double sum = 0;
                for (int64_t j = start[r]; j < stop[r]; j++) {
                    double logit = 0;
                    for (int64_t c = 0; c < d; c++)
                        logit += q.at(b, h, rows[r], c) * k.at(b, h / (heads / kv_heads), j, c);
                    sum += e[static_cast<size_t>(j)] = std::exp(logit * 0.3);
                }
                for (int64_t j = start[r]; j < stop[r]; j++) {
                    const double x = e[static_cast<size_t>(j)] / sum;
                    if (own - j >= local) want[static_cast<size_t>((b * count + l) * m + j)] += x;
                    slashes[static_cast<size_t>((b * count + l) * bins + (own - j) / DIAGONAL)] += x;
                }
            }
    for (size_t i = 0; i < want.size(); i++)
        if (!(std::fabs(columns[i] - want[i]) <= 2e-3 * want[i] + 2e-5)) fail("a column's sum");
    for (size_t i = 0; i < slashes.size(); i++)
        if (!(std::fabs(diagonals[i] - slashes[i]) <= 2e-3 * slashes[i] + 2e-5)) fail("a diagonal's sum");
    rows[0] = static_cast<int32_t>(random.chance(50) ? n : -1);
    check_status(sparse_dit_sums(&p), false, "a row outside of the call");
}

// What is chosen is a beginning of the sorted candidates; runs cover it up to each group's last row.
inline void check_choice(Random &random) {
    const int64_t m = 1 + random.below(300), n = 1 + random.below(m), heads = 1 + random.below(3);
    const int64_t bins = (m + DIAGONAL - 1) / DIAGONAL, all = m + bins, groups = (n + 63) / 64;
    std::vector<float> scores;
    std::vector<int64_t> costs;
    std::vector<uint8_t> forced, chosen(static_cast<size_t>(heads * all), 9);
    for (int64_t i = 0; i < heads * all; i++) scores.push_back(static_cast<float>(random.below(40)) - 5);
    for (int64_t i = 0; i < all; i++) costs.push_back(random.below(9)), forced.push_back(random.chance(5));
    ChoiceProblem c{ABI_VERSION, heads, all, scores.data(), costs.data(), forced.data(),
                    random.below(4 * all), chosen.data(), 2};
    check_status(sparse_dit_choose(&c), true, "a choice");
    for (int64_t h = 0; h < heads; h++) {
        std::vector<int64_t> order;
        int64_t left = c.budget;
        for (int64_t i = 0; i < all; i++)
            if (forced[i])
                left -= costs[i];
            else
                order.push_back(i);
        const float *of = scores.data() + h * all;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return of[a] > of[b]; });
        for (const int64_t i : order)
            if (chosen[h * all + i] != ((left -= costs[i]) >= 0)) fail("a choice");
    }
    std::vector<int32_t> offsets(static_cast<size_t>(heads * (groups + 1)));
    RunsProblem r{ABI_VERSION, heads, n, m, chosen.data(), offsets.data(), nullptr, 2};
    check_status(sparse_dit_lay_runs(&r), true, "runs");
    int64_t total = 0;
    for (int64_t h = 0; h < heads; h++) total += offsets[h * (groups + 1) + groups];
    std::vector<int32_t> runs(static_cast<size_t>(2 * total));
    r.runs = runs.data();
    if (total) check_status(sparse_dit_lay_runs(&r), true, "runs");
    const int32_t *run = runs.data();
    for (int64_t h = 0; h < heads; h++)
        for (int64_t g = 0; g < groups; g++) {
            const int64_t own = 64 * g + m - n, stop = std::min(64 * g + 64, n) + m - n;
            std::vector<bool> want(static_cast<size_t>(m), false), seen(want);
            for (int64_t j = 0; j < stop; j++) {
                want[j] = chosen[h * all + j];
                for (int64_t b = 0; b < bins; b++)
                    if (chosen[h * all + m + b] && j >= own - 64 * b - 64 && j < own - 64 * b + 64)
                        want[j] = true;
            }
            int64_t end = -1;
            const int32_t *at = &offsets[h * (groups + 1) + g];
            for (int32_t i = at[0]; i < at[1]; i++, run += 2) {
                if (run[0] <= end || run[1] < 1) fail("runs that touch");
                end = run[0] + run[1];
                for (int64_t j = run[0]; j < end; j++) seen.at(static_cast<size_t>(j)) = true;
            }
            if (seen != want) fail("runs that cover something else");
        }
    costs[0] = -1;
    check_status(sparse_dit_choose(&c), false, "a cost below 0");
    r.queries = m + 1;
    check_status(sparse_dit_lay_runs(&r), false, "more queries than keys");
}

}  // namespace driver
