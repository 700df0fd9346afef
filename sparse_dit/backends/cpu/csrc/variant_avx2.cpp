// x86-64 with AVX2, FMA and F16C: compiled with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#define SPARSE_DIT_VARIANT avx2
#include "variant.h"

namespace sparse_dit {
extern const Variant AVX2;
const Variant AVX2 = {"avx2",
                      [] {
                          return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                 __builtin_cpu_supports("f16c");
                      },
                      avx2::scratch_bytes, avx2::key_norm, avx2::pool, avx2::attend,
                      avx2::sums_scratch, avx2::sums, avx2::multiply_adds};
}  // namespace sparse_dit
