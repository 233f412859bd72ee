// What the AVX2 and AVX-512 kernels share: 128-bit steps over four rows. Every function is always inlined, so that none
// is emitted and shared with code for another CPU. Needs F16C, and VEX encodings come from the including file's flags.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels/exact_table.h"

namespace int4mm::cpu::x86 {

struct FourPairs {
  __m128 scales;
  __m128 zeros;
};

// The scales and zeros of four neighbouring rows, which alternate in memory.
template <DType dtype>
[[gnu::always_inline]] inline FourPairs LoadPairs(const uint16_t* scales_and_zeros) {
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales_and_zeros));
  if constexpr (dtype == DType::kBFloat16) {
    return {_mm_castsi128_ps(_mm_slli_epi32(pairs, 16)),
            _mm_castsi128_ps(_mm_and_si128(pairs, _mm_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  } else {
    const __m128i sorted =
        _mm_shuffle_epi8(pairs, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    return {_mm_cvtph_ps(sorted), _mm_cvtph_ps(_mm_unpackhi_epi64(sorted, sorted))};
  }
}

// One row's scale (low half) and zero.
[[gnu::always_inline]] inline int LoadPair(const uint16_t* scale_and_zero) {
  int pair;
  std::memcpy(&pair, scale_and_zero, sizeof(pair));
  return pair;
}

// Bit r: the zero of row r is so small beside its scale that rounding twice may show.
template <DType dtype>
[[gnu::always_inline]] inline unsigned Suspects(const uint16_t* scales_and_zeros) {
  const FourPairs pairs = LoadPairs<dtype>(scales_and_zeros);
  const __m128 sign = _mm_set1_ps(-0.0f);
  const __m128 limit = _mm_mul_ps(_mm_andnot_ps(sign, pairs.scales), _mm_set1_ps(DoubleRoundingLimit(dtype)));
  const __m128 small = _mm_cmplt_ps(_mm_andnot_ps(sign, pairs.zeros), limit);
  return static_cast<unsigned>(_mm_movemask_ps(_mm_and_ps(small, _mm_cmpneq_ps(pairs.zeros, _mm_setzero_ps()))));
}

template <DType dtype>
[[gnu::always_inline]] inline uint16_t Narrow(float value) {
  if constexpr (dtype == DType::kFloat16) return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN stays NaN.
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace int4mm::cpu::x86
