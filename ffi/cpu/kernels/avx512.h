// What the two kernels of 512-bit vectors share. In an unnamed namespace, so that each file has code of its own.
#pragma once

#include <immintrin.h>

#include "cpu/kernels/x86.h"

namespace int4mm::cpu {
namespace {

struct Avx512Base : X86Base {
  static constexpr int kLanes = 16;
  using Float = __m512;
  using Words = __m512i;

  static Float Zero() { return _mm512_setzero_ps(); }
  static Float Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, Float v) { _mm512_storeu_ps(p, v); }

  static void AddSums(Float a, Float b, Float c, Float d, float* sums) {
    // Each step adds the halves of what is left of two vectors, side by side.
    const __m512 ac = _mm512_add_ps(_mm512_shuffle_f32x4(a, c, 0x44), _mm512_shuffle_f32x4(a, c, 0xEE));
    const __m512 bd = _mm512_add_ps(_mm512_shuffle_f32x4(b, d, 0x44), _mm512_shuffle_f32x4(b, d, 0xEE));
    const __m512 four = _mm512_add_ps(_mm512_shuffle_f32x4(ac, bd, 0x88), _mm512_shuffle_f32x4(ac, bd, 0xDD));
    const __m256 low = _mm512_castps512_ps256(four);
    const __m256 high = _mm512_extractf32x8_ps(four, 1);
    const __m256 two = _mm256_add_ps(_mm256_shuffle_ps(low, high, 0x88), _mm256_shuffle_ps(low, high, 0xDD));
    const __m128 ab = _mm256_castps256_ps128(two);
    const __m128 cd = _mm256_extractf128_ps(two, 1);
    const __m128 one = _mm_add_ps(_mm_shuffle_ps(ab, cd, 0x88), _mm_shuffle_ps(ab, cd, 0xDD));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), one));
  }

  // Of one (row, group), before they are rounded.
  static __m512 Weights(float scale, float zero) {
    const __m512 q = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_fmadd_ps(q, _mm512_set1_ps(scale), _mm512_set1_ps(zero));
  }

  using X86Base::Join;
  static __m512i Join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

  template <DType dtype>
  static Float Widen(const uint16_t* p) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (dtype == DType::kFloat16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};

}  // namespace
}  // namespace int4mm::cpu
