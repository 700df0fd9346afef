// x86-64 with AVX-512 and its bfloat16 dot products (Cooper Lake, Sapphire Rapids, Zen 4): as avx512, and
// -mavx512bf16.
#include <immintrin.h>

#define SPARSE_DIT_VARIANT avx512_bf16
#include "variant.h"

namespace sparse_dit {
extern const Variant AVX512_BF16;
const Variant AVX512_BF16 = {
    "avx512_bf16",
    [] {
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    },
    avx512_bf16::scratch_bytes, avx512_bf16::key_norm, avx512_bf16::pool, avx512_bf16::attend,
    avx512_bf16::sums_scratch, avx512_bf16::sums, avx512_bf16::multiply_adds};
}  // namespace sparse_dit
