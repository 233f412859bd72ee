// What the AVX2 and AVX-512 kernels share: 128-bit steps over four rows. Every function is always inlined, so that none
// is emitted and shared with code for another CPU. Needs F16C, and VEX encodings come from the including file's flags.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/kernels/exact_table.h"

namespace int4mm::cpu::x86 {

// The scales and zeros of four neighbouring rows, which alternate in memory. Returns a mask of the rows that need
// ExactTable.
template <DType dtype>
[[gnu::always_inline]] inline unsigned LoadPairs(const uint16_t* scales_and_zeros, float* scales, float* zeros) {
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales_and_zeros));
  __m128 scale;
  __m128 zero;
  if constexpr (dtype == DType::kBFloat16) {
    scale = _mm_castsi128_ps(_mm_slli_epi32(pairs, 16));
    zero = _mm_castsi128_ps(_mm_and_si128(pairs, _mm_set1_epi32(static_cast<int>(0xFFFF0000u))));
  } else {
    const __m128i sorted = _mm_shuffle_epi8(pairs, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
    scale = _mm_cvtph_ps(sorted);
    zero = _mm_cvtph_ps(_mm_unpackhi_epi64(sorted, sorted));
  }
  _mm_storeu_ps(scales, scale);
  _mm_storeu_ps(zeros, zero);
  const __m128 sign = _mm_set1_ps(-0.0f);
  const __m128 scale_size = _mm_andnot_ps(sign, scale);
  const __m128 zero_size = _mm_andnot_ps(sign, zero);
  const __m128 tiny = _mm_cmplt_ps(zero_size, _mm_mul_ps(scale_size, _mm_set1_ps(DoubleRoundingLimit(dtype))));
  const __m128 not_zero = _mm_cmpneq_ps(zero, _mm_setzero_ps());
  const __m128 limit = _mm_set1_ps(kFastLimit);
  const __m128 large = _mm_or_ps(_mm_cmpnlt_ps(scale_size, limit), _mm_cmpnlt_ps(zero_size, limit));
  return static_cast<unsigned>(_mm_movemask_ps(_mm_or_ps(_mm_and_ps(tiny, not_zero), large)));
}

}  // namespace int4mm::cpu::x86

namespace int4mm::cpu {
namespace {

// Of every Simd type with these registers. In an unnamed namespace, so that each file has code of its own.
struct X86Base {
  static __m128i Load4(const uint32_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m256i Load8(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static __m256i Join(__m128i low, __m128i high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }

  template <DType dtype>
  static void NarrowEach(const float* values, uint16_t* out) {
    const __m256 wide = _mm256_loadu_ps(values);
    __m128i narrow;
    if constexpr (dtype == DType::kFloat16) {
      narrow = _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT);
    } else {
      const __m256i bits = _mm256_castps_si256(wide);
      const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
      const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
      const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
      const __m256 nan = _mm256_cmp_ps(wide, wide, _CMP_UNORD_Q);
      const __m256i chosen =
          _mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan));
      const __m256i high = _mm256_srli_epi32(chosen, 16);
      narrow = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow);
  }

  template <DType dtype>
  static unsigned LoadPairs(const uint16_t* scales_and_zeros, float* scales, float* zeros) {
    return x86::LoadPairs<dtype>(scales_and_zeros, scales, zeros);
  }
};

}  // namespace
}  // namespace int4mm::cpu
