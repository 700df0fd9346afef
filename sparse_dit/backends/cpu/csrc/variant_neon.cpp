// 64-bit Arm: NEON is part of it.
#include <arm_neon.h>

#define SPARSE_DIT_VARIANT neon
#include "variant.h"

namespace sparse_dit {
extern const Variant NEON;
const Variant NEON = {"neon",          [] { return true; }, neon::scratch_bytes,
                      neon::key_norm, neon::pool,          neon::attend,
                      neon::sums_scratch, neon::sums, neon::multiply_adds};
}  // namespace sparse_dit
