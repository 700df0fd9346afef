// Any machine that a C++ compiler targets.
#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define SPARSE_DIT_VARIANT portable
#include "variant.h"

namespace sparse_dit {
extern const Variant PORTABLE;
const Variant PORTABLE = {"portable", [] { return true; },
                          portable::scratch_bytes, portable::key_norm,
                          portable::pool, portable::attend,
                          portable::sums_scratch, portable::sums, portable::multiply_adds};
}  // namespace sparse_dit
