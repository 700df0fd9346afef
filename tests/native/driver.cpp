// Random problems through the C interface, checked against sums in double; then broken indices and
// calls, which must return a status. Built with sanitizers or for another processor by
// test_cpu_kernel_native.py.
//
// driver PROBLEMS BROKEN [SEED]: that many problems, and broken calls of each, on every variant.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "problem.h"

namespace driver {
namespace {

struct Case {
    Random random;
    int64_t dtype, batch, heads, kv_heads, n, m, d;
    Tensor q, k, v, out;
    std::vector<Pattern> patterns;
    std::vector<int32_t> head_to_pattern, words;
    std::vector<int64_t> kv_len;
    std::vector<float> lse, mass;
    int64_t mass_block, groups = 0, causal_offset;
    bool causal, bfloat16_weights = false;
    double scale;

    explicit Case(uint64_t seed)
        : random{std::mt19937_64(seed)}, dtype(random.below(3)), batch(1 + random.below(2)),
          heads(1 + random.below(4)), kv_heads(heads % 2 || random.chance(50) ? heads : heads / 2),
          n(size()), m(size()), d(channels()), q(random, dtype, {batch, heads, n, d}),
          k(random, dtype, {batch, kv_heads, m, d}), v(random, dtype, {batch, kv_heads, m, d}),
          out(random, dtype, {batch, heads, n, d}) {
        for (Tensor *x : {&q, &k, &v}) x->fill(random);
        for (int64_t i = 1 + random.below(2); i > 0; i--)
            patterns.push_back(make_pattern(random, n, m));
        for (int64_t h = 0; h < heads; h++)
            head_to_pattern.push_back(
                static_cast<int32_t>(random.below(static_cast<int64_t>(patterns.size()))));
        for (const Pattern &p : patterns)
            groups = std::max(groups, static_cast<int64_t>(p.q_offsets.size()) - 1);
        causal = random.chance(30);
        causal_offset = causal ? random.below(2 * m) - m : 0;
        words = pack(patterns, head_to_pattern,
                     {MAGIC, static_cast<int32_t>(ABI_VERSION), static_cast<int32_t>(heads),
                      static_cast<int32_t>(patterns.size()), static_cast<int32_t>(n),
                      static_cast<int32_t>(m), causal, static_cast<int32_t>(causal_offset)});
        if (random.chance(30))
            for (int64_t b = 0; b < batch; b++) kv_len.push_back(random.below(m + 1));
        mass_block = std::array<int64_t, 4>{1, 16, 64, m + 3}[static_cast<size_t>(random.below(4))];
        scale = random.chance(15) ? 4.0 : 1.0 / std::sqrt(static_cast<double>(d));
        lse.resize(static_cast<size_t>(batch * heads * n));
        mass.resize(static_cast<size_t>(batch * heads * groups * blocks()));
    }

    int64_t size() { return random.chance(15) ? 1 + random.below(3) : 1 + random.below(150); }
    int64_t channels() {
        constexpr std::array<int64_t, 9> sizes = {8, 16, 24, 40, 64, 80, 128, 136, 256};
        return sizes[static_cast<size_t>(random.below(9))];
    }
    int64_t blocks() const { return (m + mass_block - 1) / mass_block; }

    Problem problem(int64_t variant) {
        Problem p{};
        p.abi_version = ABI_VERSION;
        p.dtype = dtype;
        p.batch = batch, p.heads = heads, p.kv_heads = kv_heads;
        p.queries = n, p.keys = m, p.channels = d;
        p.q = q.bytes.data(), p.k = k.bytes.data(), p.v = v.bytes.data();
        p.out = out.bytes.data();
        p.lse = lse.data();
        p.mass = mass.data();
        p.kv_len = kv_len.empty() ? nullptr : kv_len.data();
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

[[noreturn]] void fail(const std::string &what) {
    std::printf("FAILED: %s\n", what.c_str());
    std::exit(1);
}

void expect(double ours, double want, double bound, const char *name, int64_t row, int64_t at) {
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
    double largest = 0;           // bound of the logits
};

struct Row {
    Case &c;
    const Pattern &p;
    int64_t batch, head, group, token, valid, limit;

    int64_t kv_head() const { return head / (c.heads / c.kv_heads); }
    int64_t key(int64_t position) const {
        return p.k_order.empty() ? position : p.k_order[static_cast<size_t>(position)];
    }
    void add(Seen &seen, const std::vector<int64_t> &tokens, int64_t block) const {
        std::vector<double> mean(static_cast<size_t>(c.d)), value(static_cast<size_t>(c.d));
        const double count = static_cast<double>(tokens.size());
        double logit = 0, q_norm = 0, k_norm = 0;
        for (int64_t d = 0; d < c.d; d++) {
            for (const int64_t t : tokens) {
                mean[static_cast<size_t>(d)] += c.k.at(batch, kv_head(), t, d) / count;
                value[static_cast<size_t>(d)] += c.v.at(batch, kv_head(), t, d) / count;
            }
            const double x = c.q.at(batch, head, token, d), y = mean[static_cast<size_t>(d)];
            logit += x * y, q_norm += x * x, k_norm += y * y;
        }
        seen.logits.push_back(logit * c.scale + std::log(count));
        const double largest = std::sqrt(q_norm * k_norm) * c.scale + std::log(count);
        seen.largest = std::max(seen.largest, largest);
        seen.values.push_back(value);
        seen.blocks.push_back(block);
    }
    Seen seen() const {
        Seen result;
        const auto g = static_cast<size_t>(group);
        for (int32_t r = p.run_offsets[g]; r < p.run_offsets[g + 1]; r++)
            for (int64_t i = 0, at = p.runs[static_cast<size_t>(r)][0];
                 i < p.runs[static_cast<size_t>(r)][1]; i++, at++)
                if (key(at) < valid && key(at) <= limit)
                    add(result, {key(at)}, at / c.mass_block);
        if (p.cells.empty()) return result;
        for (int32_t r = p.far_offsets[g]; r < p.far_offsets[g + 1]; r++) {
            const auto [first, count] = p.far_runs[static_cast<size_t>(r)];
            for (int32_t cell = first; cell < first + count; cell++) {
                std::vector<int64_t> tokens;
                for (int32_t at = p.cells[static_cast<size_t>(cell)];
                     at < p.cells[static_cast<size_t>(cell) + 1]; at++)
                    if (key(at) < valid) tokens.push_back(key(at));
                if (tokens.empty() || *std::max_element(tokens.begin(), tokens.end()) > limit)
                    continue;
                add(result, tokens, -1);
            }
        }
        return result;
    }
};

double unit(int64_t dtype) {
    return std::ldexp(1, dtype == FLOAT32 ? -24 : dtype == BFLOAT16 ? -8 : -11);
}

// Checks one row's output and LSE, and adds its weights to the mass of its group.
double check_row(const Row &row, std::vector<double> &mass) {
    Case &c = row.c;
    const Seen seen = row.seen();
    double top = -INFINITY, total = 0;
    for (const double x : seen.logits) top = std::max(top, x);
    for (const double x : seen.logits) total += std::exp(x - top);
    const double share = std::ldexp(16 + 4 * seen.largest, -24);
    const double lse = seen.logits.empty() ? -INFINITY : top + std::log(total);
    expect(c.lse[static_cast<size_t>((row.batch * c.heads + row.head) * c.n + row.token)], lse,
           share + std::ldexp(std::abs(lse), -23), "lse", row.token, row.head);
    for (size_t i = 0; i < seen.logits.size(); i++)
        if (seen.blocks[i] >= 0)
            mass[static_cast<size_t>(row.group * c.blocks() + seen.blocks[i])] +=
                std::exp(seen.logits[i] - lse);
    for (int64_t d = 0; d < c.d; d++) {
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

void check_mass(const Case &c, int64_t batch, int64_t head, const std::vector<double> &want,
                double share) {
    const auto size = static_cast<size_t>(c.groups * c.blocks());
    const size_t start = static_cast<size_t>(batch * c.heads + head) * size;
    for (size_t i = 0; i < size; i++)
        expect(c.mass[start + i], want[i], 2 * share * want[i] + 1e-30, "mass", head,
               static_cast<int64_t>(i));
}

void check_result(Case &c) {
    for (int64_t b = 0; b < c.batch; b++)
        for (int64_t h = 0; h < c.heads; h++) {
            const Pattern &p = c.patterns[static_cast<size_t>(c.head_to_pattern[h])];
            std::vector<double> mass(static_cast<size_t>(c.groups * c.blocks()));
            double share = 0;
            for (size_t g = 0; g + 1 < p.q_offsets.size(); g++)
                for (int32_t at = p.q_offsets[g]; at < p.q_offsets[g + 1]; at++) {
                    const int64_t token =
                        p.q_order.empty() ? at : p.q_order[static_cast<size_t>(at)];
                    const Row row{c, p, b, h, static_cast<int64_t>(g), token,
                                  c.kv_len.empty() ? c.m : c.kv_len[static_cast<size_t>(b)],
                                  c.causal ? token + c.causal_offset : INT64_MAX};
                    share = std::max(share, check_row(row, mass));
                }
            check_mass(c, b, h, mass, share);
        }
    std::vector<bool> written(c.out.bytes.size(), false);
    for (int64_t i = 0; i < c.batch * c.heads * c.n * c.d; i++) {
        const int64_t row = i / c.d, at = c.out.place(row / c.n / c.heads, row / c.n % c.heads,
                                                      row % c.n, i % c.d);
        const auto start = written.begin() + at * c.out.item;
        std::fill(start, start + c.out.item, true);
    }
    for (size_t i = 0; i < written.size(); i++)
        if (!written[i] && c.out.bytes[i] != 0xff) fail("out was written between its rows");
}

// The mass from the LSE of a first call, without output.
void check_mass_alone(Case &c, Problem p) {
    const std::vector<float> lse = c.lse, mass = c.mass;
    c.clear();
    p.lse_in = lse.data();
    p.lse = nullptr;
    p.out = nullptr;
    p.v = nullptr;
    if (const int64_t status = sparse_dit_attend(&p))
        fail(std::string("mass alone: ") + sparse_dit_error(status));
    for (size_t i = 0; i < mass.size(); i++)
        expect(c.mass[i], mass[i], 1e-3 * mass[i] + 1e-30, "mass alone", 0,
               static_cast<int64_t>(i));
}

void call_broken(const Problem &p) {
    const int64_t status = sparse_dit_attend(&p);
    if (status < OK || status > NO_MEMORY) fail("unknown status");
    const char *text = sparse_dit_error(status);
    if (!text || !*text) fail("a status without words");
}

void break_index(Case &c, const Problem &sound) {
    std::vector<int32_t> words = c.words;
    Random &random = c.random;
    const auto count = static_cast<int64_t>(words.size());
    for (int64_t i = 1 + random.below(3); i > 0; i--) {
        const int64_t range = random.chance(50) ? count : std::min<int64_t>(count, 40);
        int32_t &word = words[static_cast<size_t>(random.below(range))];
        const auto bit = static_cast<uint32_t>(1) << random.below(32);
        const int64_t kind = random.below(4);
        if (kind == 0) word = static_cast<int32_t>(static_cast<uint32_t>(word) ^ bit);
        if (kind == 1) word = static_cast<int32_t>(random.engine());
        if (kind == 2) word = static_cast<int32_t>(static_cast<uint32_t>(word) + 1);
        if (kind == 3) word = static_cast<int32_t>(random.below(count + 2)) - 1;
    }
    Problem p = sound;
    p.index = words.data();
    call_broken(p);
    const std::vector<int32_t> shorter(c.words.begin(), c.words.begin() + random.below(count));
    p.index = shorter.data();
    p.index_words = static_cast<int64_t>(shorter.size());
    if (sparse_dit_attend(&p) == OK) fail("an index that ends too early was taken");
}

void break_call(const Problem &sound) {
    Problem p = sound;
    const std::array<int64_t *, 7> fields = {&p.abi_version, &p.dtype, &p.heads,   &p.kv_heads,
                                             &p.queries,     &p.keys,  &p.channels};
    for (int64_t *field : fields)
        for (const int64_t value : {INT64_C(-7), INT64_C(1) << 40, INT64_MIN, INT64_MAX}) {
            const int64_t old = *field;
            *field = value;
            if (sparse_dit_attend(&p) == OK)
                fail("a call with word " + std::to_string(field - &p.abi_version) + " = " +
                     std::to_string(value) + " was taken");
            *field = old;
        }
    p.variant = 1000;
    if (sparse_dit_attend(&p) == OK) fail("an unknown variant was taken");
    p = sound;
    for (const void **pointer : {&p.q, &p.k, &p.v}) {
        const void *old = *pointer;
        *pointer = nullptr;
        if (sparse_dit_attend(&p) == OK) fail("a null pointer was taken");
        *pointer = old;
    }
    p.scale = NAN;
    if (sparse_dit_attend(&p) == OK) fail("a scale of NaN was taken");
    p = sound;
    p.mass_block = 0;
    if (sparse_dit_attend(&p) == OK) fail("a mass block of 0 was taken");
    p = sound;
    p.mass_groups--;
    if (sparse_dit_attend(&p) == OK) fail("too few mass groups were taken");
    p = sound;
    const std::vector<int64_t> lengths(static_cast<size_t>(p.batch), p.keys + 1);
    p.kv_len = lengths.data();
    if (sparse_dit_attend(&p) == OK) fail("a kv_len beyond the keys was taken");
}

void run_variant(int64_t variant, const std::string &name, int64_t problems, int64_t broken,
                 uint64_t seed) {
    for (int64_t i = 0; i < problems; i++) {
        std::printf("%s problem %lld\n", name.c_str(), static_cast<long long>(i));
        std::fflush(stdout);
        Case c(seed + static_cast<uint64_t>(i));
        c.bfloat16_weights = c.dtype == BFLOAT16 && name.find("bf16") != std::string::npos;
        c.clear();
        const Problem p = c.problem(variant);
        if (const int64_t status = sparse_dit_attend(&p)) fail(sparse_dit_error(status));
        check_result(c);
        check_mass_alone(c, p);
        for (int64_t j = 0; j < broken; j++) break_index(c, p);
        if (broken) break_call(p);
    }
}

}  // namespace
}  // namespace driver

int main(int count, char **words) {
    if (count < 3) return 2;
    const uint64_t seed = count > 3 ? std::strtoull(words[3], nullptr, 10) : 1;
    if (sparse_dit_abi() != sparse_dit::ABI_VERSION) return 2;
    std::istringstream names(sparse_dit_variants());
    std::string name;
    for (int64_t variant = 0; names >> name; variant++) {
        if (!sparse_dit_runs(variant)) continue;
        driver::run_variant(variant, name, std::atoll(words[1]), std::atoll(words[2]), seed);
        std::printf("passed %s\n", name.c_str());
    }
}
