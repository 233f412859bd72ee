#include "cpu/kernels/exact_table.h"

#include <cmath>
#include <cstring>

#include "core/float16.h"

namespace int4mm::cpu {
namespace {

// a + b rounded to odd: toward zero, with the last bit set if anything was cut off. A rounding to odd that keeps at
// least two bits more than a later rounding to nearest does not disturb it.
double AddToOdd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double b_part = sum - a;
  const double error = (a - (sum - b_part)) + (b - b_part);
  uint64_t bits;
  std::memcpy(&bits, &sum, sizeof(bits));
  if (error == 0 || (bits & 1) != 0) return sum;
  bits += (error > 0) == (sum > 0) ? 1 : -1;
  double odd;
  std::memcpy(&odd, &bits, sizeof(odd));
  return odd;
}

// The f32 nearest to zero's side of `value`, its last bit set if `value` is not an f32.
float NarrowToOdd(double value) {
  const float nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || static_cast<double>(nearest) == value) return nearest;
  uint32_t bits;
  std::memcpy(&bits, &nearest, sizeof(bits));
  if ((bits & 1) != 0) return nearest;
  bits += (std::fabs(value) > std::fabs(static_cast<double>(nearest))) ? 1 : -1;
  float odd;
  std::memcpy(&odd, &bits, sizeof(odd));
  return odd;
}

}  // namespace

void ExactTable(DType dtype, float scale, float zero, float* table) {
  const double s = scale;
  const double z = zero;
  for (int q = 0; q < 16; ++q) {
    table[q] = Widen(dtype, Narrow(dtype, NarrowToOdd(AddToOdd((q - 8) * s, z))));
  }
}

}  // namespace int4mm::cpu
