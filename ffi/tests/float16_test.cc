// Conversions against arithmetic on the numbers' definitions: every 16-bit pattern, and every kind of f32.
#include "core/float16.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>

#include "tests/check.h"

namespace int4mm {
namespace {

struct Format {
  DType dtype;
  int fraction_bits;
  int smallest_exponent;
  uint16_t infinity;
};
constexpr Format kFormats[] = {{DType::kBFloat16, 7, -126, 0x7F80}, {DType::kFloat16, 10, -14, 0x7C00}};

double Defined(const Format& f, uint16_t bits) {
  const int exponent = (bits & 0x7FFF) >> f.fraction_bits;
  const int fraction = bits & ((1 << f.fraction_bits) - 1);
  const double significand = exponent == 0 ? fraction : fraction + (1 << f.fraction_bits);
  const double magnitude = std::ldexp(significand, f.smallest_exponent - f.fraction_bits + std::max(exponent - 1, 0));
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

void TestWidenEveryPattern() {
  for (const Format& f : kFormats) {
    for (int i = 0; i < 0x10000; ++i) {
      const uint16_t bits = static_cast<uint16_t>(i);
      const float wide = Widen(f.dtype, bits);
      EXPECT(std::signbit(wide) == ((bits & 0x8000) != 0)) << DTypeName(f.dtype) << " " << bits;
      if ((bits & 0x7FFF) > f.infinity) {
        EXPECT(std::isnan(wide)) << DTypeName(f.dtype) << " " << bits;
        const uint16_t narrow = Narrow(f.dtype, wide);
        EXPECT((narrow & 0x7FFF) > f.infinity) << DTypeName(f.dtype) << " " << bits << " NaN became " << narrow;
      } else {
        EXPECT(std::isinf(wide) == ((bits & 0x7FFF) == f.infinity)) << DTypeName(f.dtype) << " " << bits;
        if (!std::isinf(wide)) {
          EXPECT(wide == Defined(f, bits)) << DTypeName(f.dtype) << " " << bits << " is " << wide;
        }
        EXPECT(Narrow(f.dtype, wide) == bits)
            << DTypeName(f.dtype) << " " << bits << " became " << Narrow(f.dtype, wide);
      }
    }
  }
}

// `value` must go to the nearer of two neighbours, and to the even one from half-way.
void ExpectNearest(const Format& f, float value) {
  const uint16_t narrow = Narrow(f.dtype, value);
  EXPECT(((narrow & 0x8000) != 0) == std::signbit(value)) << DTypeName(f.dtype) << " " << value;
  const uint16_t magnitude = narrow & 0x7FFF;
  // Infinity stands where the next number would, so that it is a neighbour like any other.
  const double target = std::fabs(static_cast<double>(value));
  const double distance = std::fabs(Defined(f, magnitude) - target);
  const bool below_nearer = magnitude > 0 && std::fabs(Defined(f, magnitude - 1) - target) < distance;
  const bool above_nearer = magnitude < f.infinity && std::fabs(Defined(f, magnitude + 1) - target) < distance;
  const bool tie = (magnitude > 0 && std::fabs(Defined(f, magnitude - 1) - target) == distance) ||
                   (magnitude < f.infinity && std::fabs(Defined(f, magnitude + 1) - target) == distance);
  if (magnitude == f.infinity && target > Defined(f, f.infinity)) return;
  EXPECT(!below_nearer && !above_nearer) << DTypeName(f.dtype) << " " << value << " became " << narrow;
  EXPECT(!tie || magnitude % 2 == 0) << DTypeName(f.dtype) << " " << value << " became " << narrow << ", not even";
}

void TestNarrowAroundEveryPattern() {
  for (const Format& f : kFormats) {
    for (uint16_t bits = 0; bits < f.infinity; ++bits) {
      const float midpoint = static_cast<float>((Defined(f, bits) + Defined(f, bits + 1)) / 2);
      for (const float sign : {1.0f, -1.0f}) {
        ExpectNearest(f, sign * midpoint);
        ExpectNearest(f, sign * std::nextafter(midpoint, 0.0f));
        ExpectNearest(f, sign * std::nextafter(midpoint, INFINITY));
      }
    }
  }
}

void TestNarrowRandomBits(uint64_t seed) {
  std::mt19937 random(static_cast<std::mt19937::result_type>(seed));
  for (int i = 0; i < 1000000; ++i) {
    const float value = FloatOf(random());
    if (std::isnan(value)) continue;
    for (const Format& f : kFormats) {
      if (!std::isinf(value)) ExpectNearest(f, value);
    }
  }
  for (const Format& f : kFormats) {
    EXPECT(Narrow(f.dtype, INFINITY) == f.infinity);
    EXPECT(Narrow(f.dtype, -INFINITY) == (f.infinity | 0x8000));
    EXPECT((Narrow(f.dtype, FloatOf(0x7F800001u)) & 0x7FFF) > f.infinity) << "a NaN whose payload is cut off";
    EXPECT((Narrow(f.dtype, FloatOf(0xFFFFFFFFu)) & 0x7FFF) > f.infinity) << "a NaN whose rounding would overflow";
  }
}

}  // namespace
}  // namespace int4mm

int main() {
  int4mm::TestWidenEveryPattern();
  int4mm::TestNarrowAroundEveryPattern();
  int4mm::TestNarrowRandomBits(int4mm::test::Seed());
  return int4mm::test::Result();
}
