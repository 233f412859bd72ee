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

  static void SumEach(const float* vectors, float* sums) {
    // Each step adds the halves of what is left of two vectors, side by side.
    __m512 two[4];
    for (int i = 0; i < 4; ++i) {
      const __m512 a = Load(vectors + 2 * i * kLanes);
      const __m512 b = Load(vectors + (2 * i + 1) * kLanes);
      two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
    }
    const __m512 low =
        _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xDD));
    const __m512 high =
        _mm512_add_ps(_mm512_shuffle_f32x4(two[2], two[3], 0x88), _mm512_shuffle_f32x4(two[2], two[3], 0xDD));
    const __m512 pairs = _mm512_add_ps(_mm512_shuffle_ps(low, high, 0x88), _mm512_shuffle_ps(low, high, 0xDD));
    const __m512 eight = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xB1));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(sums, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, eight)));
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
