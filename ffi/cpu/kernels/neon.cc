// 4 lanes; one TBL looks up the bytes of 4 weights. NEON is part of every aarch64 CPU, so no flags.
#include <arm_neon.h>

#include "cpu/kernels/matmul.h"

namespace int4mm::cpu {
namespace {

struct Neon {
  static constexpr Isa kIsa = Isa::kNeon;
  static constexpr int kLanes = 4;
  static constexpr int kPack = 1;
  struct PairRange {};
  using Float = float32x4_t;
  using Words = uint32x4_t;
  // Bytes 1, 2 and 3 of the sixteen weights: byte 0 of a widened bfloat16 or float16 is zero.
  using Table = uint8x16x3_t;

  static Float Zero() { return vdupq_n_f32(0); }
  static Float Load(const float* p) { return vld1q_f32(p); }
  static void Store(float* p, Float v) { vst1q_f32(p, v); }
  static Float MultiplyAdd(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static void AddSums(Float a, Float b, Float c, Float d, float* sums) {
    Store(sums, vaddq_f32(Load(sums), vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))));
  }

  static Table LoadTable(const float* table) {
    const uint8x16x4_t bytes = vld4q_u8(reinterpret_cast<const uint8_t*>(table));
    return {{bytes.val[1], bytes.val[2], bytes.val[3]}};
  }
  static Float Lookup(Table table, Words words) {
    // Each byte of a lane indexes its own sixteen bytes of the table; an index out of range gives zero.
    const uint8x16_t low_bytes = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};
    const uint8x16_t plane = vreinterpretq_u8_u32(vdupq_n_u32(0x201000F0u));
    const uint8x16_t nibbles = vandq_u8(vqtbl1q_u8(vreinterpretq_u8_u32(words), low_bytes), vdupq_n_u8(15));
    return vreinterpretq_f32_u8(vqtbl3q_u8(table, vorrq_u8(nibbles, plane)));
  }
  static Words NextNibble(Words words) { return vshrq_n_u32(words, 4); }

  template <class O>
  static void LoadUnit(const uint32_t* row, int part, Words* words) {
    static_assert(O::kParts == 1);
    for (int v = 0; v < O::kWordVectors; ++v) {
      if constexpr (O::kWholeTiles) {
        words[v] = vld1q_u32(row + 4 * v / O::kRowWords * O::kTileWords + 4 * v % O::kRowWords);
      } else if constexpr (O::kUnitWordsPerLane == 2) {
        const uint32_t* lanes = row + 2 * v * O::kWordsPerLane + 2 * part;
        words[v] = vcombine_u32(vld1_u32(lanes), vld1_u32(lanes + O::kWordsPerLane));
      } else if constexpr (O::kWordsPerLane == 4) {
        words[v] = vld4q_u32(row).val[part];
      } else {
        words[v] = vld2q_u32(row).val[part];
      }
    }
  }

  template <DType dtype>
  static Float WidenFour(uint16x4_t bits) {
    if constexpr (dtype == DType::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  }

  template <DType dtype>
  static Float Widen(const uint16_t* p) {
    return WidenFour<dtype>(vld1_u16(p));
  }

  template <DType dtype>
  static void NarrowEach(const float* values, uint16_t* out) {
    for (int i = 0; i < 8; i += 4) {
      const Float wide = vld1q_f32(values + i);
      if constexpr (dtype == DType::kFloat16) {
        vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(wide)));
      } else {
        const uint32x4_t bits = vreinterpretq_u32_f32(wide);
        const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
        const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
        const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
        vst1_u16(out + i, vshrn_n_u32(vbslq_u32(vceqq_f32(wide, wide), rounded, quiet), 16));
      }
    }
  }

  template <DType dtype>
  static Float Round(Float sum) {
    if constexpr (dtype == DType::kFloat16) {
      return vcvt_f32_f16(vcvt_f16_f32(sum));
    } else {
      const Float power = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(sum), vdupq_n_u32(0x7F800000u)));
      const Float shift = vdupq_n_f32(kRoundingShift);
      return vfmsq_f32(vfmaq_f32(sum, power, shift), power, shift);
    }
  }

  template <DType dtype>
  static unsigned LoadPairs(const uint16_t* scales_and_zeros, float* scales, float* zeros) {
    const uint16x4x2_t pairs = vld2_u16(scales_and_zeros);
    const Float scale = WidenFour<dtype>(pairs.val[0]);
    const Float zero = WidenFour<dtype>(pairs.val[1]);
    vst1q_f32(scales, scale);
    vst1q_f32(zeros, zero);
    const Float scale_size = vabsq_f32(scale);
    const Float zero_size = vabsq_f32(zero);
    const uint32x4_t tiny = vcltq_f32(zero_size, vmulq_n_f32(scale_size, DoubleRoundingLimit(dtype)));
    const Float limit = vdupq_n_f32(kFastLimit);
    const uint32x4_t fast = vandq_u32(vcltq_f32(scale_size, limit), vcltq_f32(zero_size, limit));
    const uint32x4_t suspect = vornq_u32(vbicq_u32(tiny, vceqzq_f32(zero)), fast);
    const uint32x4_t bit = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(suspect, bit));
  }

  template <DType dtype>
  static Table MakeTable(float scale, float zero) {
    const float32x4_t first = {-8, -7, -6, -5};
    float table[16];
    for (int i = 0; i < 16; i += 4) {
      const Float q = vaddq_f32(first, vdupq_n_f32(static_cast<float>(i)));
      vst1q_f32(table + i, Round<dtype>(vfmaq_n_f32(vdupq_n_f32(zero), q, scale)));
    }
    return LoadTable(table);
  }
};

}  // namespace

constexpr Kernel kNeonKernel = Matmul<Neon>::MakeKernel();

}  // namespace int4mm::cpu
