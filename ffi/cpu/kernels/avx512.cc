// 16 lanes; one vpermps looks up 16 weights. Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c.
#include "cpu/kernels/avx512.h"

#include "cpu/kernels/matmul.h"

namespace int4mm::cpu {
namespace {

struct Avx512 : Avx512Base {
  static constexpr Isa kIsa = Isa::kAvx512;
  static constexpr int kPack = 1;
  struct PairRange {};
  using Table = __m512;

  static Float MultiplyAdd(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Table LoadTable(const float* table) { return _mm512_load_ps(table); }
  static Float Lookup(Table table, Words words) { return _mm512_permutexvar_ps(words, table); }
  static Words NextNibble(Words words) { return _mm512_srli_epi32(words, 4); }

  template <class O>
  static void LoadUnit(const uint32_t* row, int part, Words* words) {
    if constexpr (!O::kWholeTiles) {
      // Each 128 bits hold the words of one lane of the tile; theirs that are in the unit are spread over four dwords.
      const __m512i lanes = O::kRowWords == 16 ? _mm512_loadu_si512(row)
                                               : _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 0, 1, 1, 2, 2, 3, 3),
                                                                          _mm512_castsi256_si512(Load8(row)));
      constexpr int kZero = -1;
      const __m128i spread =
          O::kWords == 8 ? _mm_setr_epi8(0, 1, kZero, kZero, 2, 3, kZero, kZero, 4, 5, kZero, kZero, 6, 7, kZero, kZero)
                         : _mm_setr_epi8(0, kZero, kZero, kZero, 1, kZero, kZero, kZero, 2, kZero, kZero, kZero, 3,
                                         kZero, kZero, kZero);
      const __m128i first = _mm_set1_epi8(static_cast<char>(part * 4 * O::kUnitWordsPerLane));
      words[0] = _mm512_shuffle_epi8(lanes, _mm512_broadcast_i32x4(_mm_or_si128(spread, first)));
    } else if constexpr (O::kWords == 4) {
      words[0] = _mm512_cvtepu8_epi32(Load4(row));
    } else if constexpr (O::kWords == 8) {
      const __m256i all = O::kRowWords == 8 ? Load8(row) : Join(Load4(row), Load4(row + O::kTileWords));
      words[0] = _mm512_cvtepu16_epi32(all);
    } else if constexpr (O::kRowWords == 16) {
      words[0] = _mm512_loadu_si512(row);
    } else if constexpr (O::kRowWords == 8) {
      words[0] = Join(Load8(row), Load8(row + O::kTileWords));
    } else {
      words[0] = Join(Join(Load4(row), Load4(row + O::kTileWords)),
                      Join(Load4(row + 2 * O::kTileWords), Load4(row + 3 * O::kTileWords)));
    }
  }

  template <DType dtype>
  static Table MakeTable(float scale, float zero) {
    const __m512 sum = Weights(scale, zero);
    if constexpr (dtype == DType::kFloat16) {
      return _mm512_cvtph_ps(_mm512_cvtps_ph(sum, _MM_FROUND_TO_NEAREST_INT));
    } else {
      const __m512 power = _mm512_and_ps(sum, _mm512_castsi512_ps(_mm512_set1_epi32(0x7F800000)));
      const __m512 shift = _mm512_set1_ps(kRoundingShift);
      return _mm512_fnmadd_ps(power, shift, _mm512_fmadd_ps(power, shift, sum));
    }
  }
};

}  // namespace

constexpr Kernel kAvx512Kernel = Matmul<Avx512>::MakeKernel();

}  // namespace int4mm::cpu
