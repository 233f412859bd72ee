// 8 lanes; two vpermps and a blend look up 8 weights. Compiled with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include "cpu/kernels/matmul.h"
#include "cpu/kernels/x86.h"

namespace int4mm::cpu {
namespace {

struct Avx2 : X86Base {
  static constexpr Isa kIsa = Isa::kAvx2;
  static constexpr int kLanes = 8;
  static constexpr int kPack = 1;
  struct PairRange {};
  using Float = __m256;
  using Words = __m256i;
  struct Table {
    __m256 low;   // The weights of q = 0..7.
    __m256 high;  // Of q = 8..15.
  };

  static Float Zero() { return _mm256_setzero_ps(); }
  static Float Load(const float* p) { return _mm256_loadu_ps(p); }
  static void Store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float MultiplyAdd(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static void AddSums(Float a, Float b, Float c, Float d, float* sums) {
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    const __m128 whole = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_loadu_ps(sums), whole));
  }

  static Table LoadTable(const float* table) { return {_mm256_load_ps(table), _mm256_load_ps(table + 8)}; }
  static Float Lookup(Table table, Words words) {
    // vpermps reads three bits of each index; the fourth, moved to the sign, chooses the half.
    const __m256 low = _mm256_permutevar8x32_ps(table.low, words);
    const __m256 high = _mm256_permutevar8x32_ps(table.high, words);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(words, 28)));
  }
  static Words NextNibble(Words words) { return _mm256_srli_epi32(words, 4); }

  template <class O>
  static void LoadUnit(const uint32_t* row, int part, Words* words) {
    if constexpr (!O::kWholeTiles) {
      const __m256i first = _mm256_set1_epi32(part * O::kUnitWordsPerLane);
      if constexpr (O::kRowWords == 8) {
        const __m256i index = _mm256_add_epi32(first, _mm256_setr_epi32(0, 0, 2, 2, 4, 4, 6, 6));
        words[0] = _mm256_permutevar8x32_epi32(Load8(row), index);
      } else {
        // The unit's words of lanes 0 and 1 of the tile, and of lanes 2 and 3, each in both halves.
        constexpr int kNext = O::kWords == 8 ? 1 : 0;
        const __m256i index =
            _mm256_add_epi32(first, _mm256_setr_epi32(0, kNext, 4, 4 + kNext, 0, kNext, 4, 4 + kNext));
        const __m256i lanes01 = _mm256_permutevar8x32_epi32(Load8(row), index);
        const __m256i lanes23 = _mm256_permutevar8x32_epi32(Load8(row + 8), index);
        words[0] = _mm256_blend_epi32(lanes01, lanes23, 0b11110000);
      }
      if constexpr (O::kParts == 2) {
        words[0] = _mm256_srlv_epi32(words[0], _mm256_setr_epi32(0, 16, 0, 16, 0, 16, 0, 16));
      }
    } else if constexpr (O::kWords == 4) {
      words[0] = _mm256_cvtepu16_epi32(Load4(row));
    } else {
      for (int v = 0; v < O::kWordVectors; ++v) {
        if constexpr (O::kRowWords == 4) {
          words[v] = Join(Load4(row + 2 * v * O::kTileWords), Load4(row + (2 * v + 1) * O::kTileWords));
        } else {
          words[v] = Load8(row + 8 * v / O::kRowWords * O::kTileWords + 8 * v % O::kRowWords);
        }
      }
    }
  }

  template <DType dtype>
  static Float Widen(const uint16_t* p) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (dtype == DType::kFloat16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  template <DType dtype>
  static __m256 Round(__m256 sum) {
    if constexpr (dtype == DType::kFloat16) {
      return _mm256_cvtph_ps(_mm256_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m256 power = _mm256_and_ps(sum, _mm256_castsi256_ps(_mm256_set1_epi32(0x7F800000)));
      const __m256 shift = _mm256_set1_ps(kRoundingShift);
      return _mm256_fnmadd_ps(power, shift, _mm256_fmadd_ps(power, shift, sum));
    }
  }

  template <DType dtype>
  static Table MakeTable(float scale, float zero) {
    const __m256 low = _mm256_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1);
    const __m256 high = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7);
    return {Round<dtype>(_mm256_fmadd_ps(low, _mm256_set1_ps(scale), _mm256_set1_ps(zero))),
            Round<dtype>(_mm256_fmadd_ps(high, _mm256_set1_ps(scale), _mm256_set1_ps(zero)))};
  }
};

}  // namespace

constexpr Kernel kAvx2Kernel = Matmul<Avx2>::MakeKernel();

}  // namespace int4mm::cpu
