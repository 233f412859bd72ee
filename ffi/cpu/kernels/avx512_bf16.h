// 16 lanes of two bfloat16 each: one vpermw looks up 32 weights, one vdpbf16ps multiplies and adds them. In an unnamed
// namespace, so that each file has code of its own.
#pragma once

#include "cpu/kernels/avx512.h"
#include "cpu/kernels/matmul.h"

namespace int4mm::cpu {
namespace {

struct Avx512Bf16 : Avx512Base {
  static constexpr Isa kIsa = Isa::kAvx512Bf16;
  static constexpr int kPack = 2;
  using Table = __m512i;  // The sixteen weights twice: vpermw reads five bits of an index.

  static Float MultiplyAdd(Float a, Float b, Float c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }

  static Table Rounded(__m512 weights) { return (__m512i)_mm512_cvtne2ps_pbh(weights, weights); }
  static Table LoadTable(const float* table) { return Rounded(_mm512_load_ps(table)); }
  static Float Lookup(Table table, Words words) { return _mm512_castsi512_ps(_mm512_permutexvar_epi16(words, table)); }
  static Words NextNibble(Words words) { return _mm512_srli_epi16(words, 4); }

  template <class O>
  static void LoadUnit(const uint32_t* row, int part, Words* words) {
    __m512i all;
    if constexpr (O::kRowWords == 16) {
      all = _mm512_loadu_si512(row);
    } else if constexpr (O::kRowWords == 8) {
      const __m256i first = Load8(row);
      all = Join(first, O::kWords > 8 ? Load8(row + O::kTileWords) : first);
    } else {
      const __m128i first = Load4(row);
      const __m128i second = O::kWords > 4 ? Load4(row + O::kTileWords) : first;
      const __m256i low = Join(first, second);
      if constexpr (O::kWords > 8) {
        all = Join(low, Join(Load4(row + 2 * O::kTileWords), Load4(row + 3 * O::kTileWords)));
      } else {
        all = Join(low, low);
      }
    }
    if constexpr (O::kParts > 1) {
      // kParts neighbouring lanes get one word of the unit, each its own nibbles first.
      struct Lanes {
        alignas(64) int word[kLanes];
        alignas(64) uint16_t shift[2 * kLanes];
      };
      static constexpr Lanes kOf = [] {
        Lanes lanes{};
        for (int i = 0; i < kLanes; ++i) {
          const int word = i / O::kParts;
          lanes.word[i] =
              O::kWholeTiles ? word : word / O::kUnitWordsPerLane * O::kWordsPerLane + word % O::kUnitWordsPerLane;
          const int shift = 4 * O::kSteps * (i % O::kParts);
          lanes.shift[2 * i] = lanes.shift[2 * i + 1] = static_cast<uint16_t>(shift);
        }
        return lanes;
      }();
      const __m512i first = _mm512_set1_epi32(part * O::kUnitWordsPerLane);
      all = _mm512_permutexvar_epi32(_mm512_add_epi32(_mm512_load_si512(kOf.word), first), all);
      all = _mm512_srlv_epi16(all, _mm512_load_si512(kOf.shift));
    }
    words[0] = all;
  }

  template <DType dtype>
  static Table MakeTable(float scale, float zero) {
    return Rounded(Weights(scale, zero));
  }

  // In range: zero, or from 2^-30 to 2^26. The weights are then less than 2^30, and multiples of 2^-37.
  struct PairRange {
    static constexpr int kLeast = (127 - 30) << 7;
    static constexpr int kEnd = (127 + 26) << 7;
    __m256i least_less_one = _mm256_set1_epi16(-1);  // Zero less one is the largest.
    __m256i most = _mm256_setzero_si256();

    template <int kRows>
    void Add(const uint16_t* scales_and_zeros) {
      const auto* pairs = reinterpret_cast<const __m128i*>(scales_and_zeros);
      const __m256i all = kRows == 8 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs))
                                     : _mm256_broadcastsi128_si256(_mm_loadu_si128(pairs));
      static_assert(kRows == 4 || kRows == 8);
      const __m256i size = _mm256_and_si256(all, _mm256_set1_epi16(0x7FFF));
      most = _mm256_max_epu16(most, size);
      least_less_one = _mm256_min_epu16(least_less_one, _mm256_sub_epi16(size, _mm256_set1_epi16(1)));
    }

    bool Exceeded() const {
      return (_mm256_cmplt_epu16_mask(least_less_one, _mm256_set1_epi16(kLeast - 1)) |
              _mm256_cmpge_epu16_mask(most, _mm256_set1_epi16(kEnd))) != 0;
    }
  };

  static void FindRange(const uint16_t* x, int64_t k, unsigned* least, unsigned* most) {
    const __m512i one = _mm512_set1_epi16(1);
    __m512i least_less_one = _mm512_set1_epi16(-1);  // Zero less one is the largest.
    __m512i largest = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += 32) {
      const __m512i size = _mm512_and_si512(_mm512_loadu_si512(x + i), _mm512_set1_epi16(0x7FFF));
      largest = _mm512_max_epu16(largest, size);
      least_less_one = _mm512_min_epu16(least_less_one, _mm512_sub_epi16(size, one));
    }
    alignas(64) uint16_t low[32];
    alignas(64) uint16_t high[32];
    _mm512_store_si512(low, least_less_one);
    _mm512_store_si512(high, largest);
    *least = 0x10000;
    *most = 0;
    for (int i = 0; i < 32; ++i) {
      if (low[i] + 1u < *least) *least = low[i] + 1u;
      if (high[i] > *most) *most = high[i];
    }
  }

  // Exact, if no result is subnormal.
  static void Scale(const uint16_t* x, float factor, uint16_t* out) {
    const __m512 scaled = _mm512_mul_ps(Widen<DType::kBFloat16>(x), _mm512_set1_ps(factor));
    const __m256i high = _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(scaled), 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), high);
  }
};

}  // namespace
}  // namespace int4mm::cpu
