// Which forms of the kernel this library carries; the build defines a macro for each.

#include "call.h"

namespace sparse_dit {

extern const Variant AVX512_BF16, AVX512, AVX2, NEON, PORTABLE;

const Variant *const VARIANTS[] = {
#ifdef SPARSE_DIT_AVX512_BF16
    &AVX512_BF16,
#endif
#ifdef SPARSE_DIT_AVX512
    &AVX512,
#endif
#ifdef SPARSE_DIT_AVX2
    &AVX2,
#endif
#ifdef SPARSE_DIT_NEON
    &NEON,
#endif
    &PORTABLE, nullptr};

}  // namespace sparse_dit
