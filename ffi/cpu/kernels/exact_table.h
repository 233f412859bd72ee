// The sixteen weights of one (row, group), correctly rounded for every scale and zero.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace int4mm::cpu {

// Writes table[q] = round((q - 8) * scale + zero) for q = 0..15, rounded once to `dtype` and widened to f32.
//
// The kernels compute fma(q - 8, scale, zero) in f32 and round that, which is quicker. The two roundings give another
// result than one only where the f32 sum is inexact and comes to lie on a midpoint of the narrow type: for a zero that
// is tiny beside the scale. Trying every pair of significands at every distance of exponents shows it for no
// |zero| >= DoubleRoundingLimit(dtype) * |scale|; below, the kernels call this function.
void ExactTable(DType dtype, float scale, float zero, float* table);

// bf16: none above 2^-21.2. f16: none above 2^-21.2 but for 161 pairs of significands between 2^-11 and 2^-10.2.
constexpr float DoubleRoundingLimit(DType dtype) { return dtype == DType::kBFloat16 ? 0x1p-20f : 0x1p-10f; }

}  // namespace int4mm::cpu
