// The loop nest of matrix registers where the CPU has none.
#pragma once

#include "cpu/kernels/kernel.h"

namespace int4mm::cpu {

extern const Kernel kEmulatedTilesKernel;  // For CPUs with AVX512-BF16.

}  // namespace int4mm::cpu
