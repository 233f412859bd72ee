// The sixteen weights of one (row, group), correctly rounded for every scale and zero.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace int4mm::cpu {

// Writes table[q] = round((q - 8) * scale + zero) for q = 0..15, rounded once to `dtype` and widened to f32.
//
// The kernels do it faster: sum = fma(q - 8, scale, zero) in f32, and for bfloat16
//   shift = 1.5 * 2^16 * 2^exponent(sum);  rounded = (sum + shift) - shift
// whose first addition leaves the eight leading bits of sum, rounded to nearest even. That differs from one rounding
// - where the f32 sum is inexact and comes to lie on a midpoint of the narrow type, which takes a zero that is tiny
//   beside the scale. All pairs of significands at all distances of exponents were tried. bf16: none at
//   |zero| > 2^-21.2 |scale|. f16: none but for 161 pairs between 2^-11 and 2^-10.1;
// - where the shift overflows, and for infinities and NaN.
// Such rows come here, and a few more: those with (zero != 0 and |zero| < DoubleRoundingLimit(dtype) * |scale|) or not
// (|scale| < kFastLimit and |zero| < kFastLimit).
void ExactTable(DType dtype, float scale, float zero, float* table);

constexpr float DoubleRoundingLimit(DType dtype) { return dtype == DType::kBFloat16 ? 0x1p-20f : 0x1p-10f; }
inline constexpr float kFastLimit = 0x1p100f;
inline constexpr float kRoundingShift = 0x1.8p16f;

}  // namespace int4mm::cpu
