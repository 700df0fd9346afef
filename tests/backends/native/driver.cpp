// Random problems and estimates through the C interface, checked against sums in double; then broken indices
// and calls, which must return a status. Built with sanitizers or for another processor by
// test_cpu_kernel_native.py.
//
// driver PROBLEMS BROKEN [SEED]: that many problems, and broken calls of each, on every variant.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <string>

#include "estimates.h"

namespace driver {
namespace {

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

// Inputs of any bits: NaN, Inf, denormals, the largest. They are compared with nothing.
void call_with_any_bits(Case &c, const Problem &p) {
    for (Tensor *x : {&c.q, &c.k, &c.v})
        for (unsigned char &byte : x->bytes)
            if (c.random.chance(2)) byte = static_cast<unsigned char>(c.random.engine());
    if (const int64_t status = sparse_dit_attend(&p)) fail(sparse_dit_error(status));
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
    const std::array<int64_t *, 8> fields = {&p.abi_version, &p.dtype, &p.heads,    &p.kv_heads,
                                             &p.queries,     &p.keys,  &p.channels, &p.value_channels};
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
}

// Intervals of any numbers are taken: what lies outside of the keys counts for none.
void call_with_any_intervals(Case &c, Problem p) {
    std::vector<int32_t> starts(static_cast<size_t>(c.batch * c.n)), stops(starts.size());
    for (std::vector<int32_t> *x : {&starts, &stops})
        for (int32_t &word : *x) word = static_cast<int32_t>(c.random.engine());
    p.row_start = starts.data();
    p.row_stop = stops.data();
    p.start_strides = p.stop_strides = {c.n, 1};
    if (const int64_t status = sparse_dit_attend(&p)) fail(sparse_dit_error(status));
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
        call_with_any_bits(c, p);
        call_with_any_intervals(c, p);
        check_sums(c.random, variant);
        check_choice(c.random);
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
