// x86-64 with AVX-512 as in every server since Skylake: -mavx512f -mavx512bw -mavx512dq -mavx512vl.
#include <immintrin.h>

#define SPARSE_DIT_VARIANT avx512
#include "variant.h"

namespace sparse_dit {
extern const Variant AVX512;
const Variant AVX512 = {"avx512",
                        [] {
                            return __builtin_cpu_supports("avx512f") &&
                                   __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512vl") &&
                                   __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
                        },
                        avx512::scratch_bytes, avx512::key_norm, avx512::pool, avx512::attend,
                        avx512::sums_scratch, avx512::sums, avx512::multiply_adds};
}  // namespace sparse_dit
