// The portable kernel: 8 lanes as plain arrays, for CPUs without a kernel of their own. Compiled for the oldest CPU.
#include <cmath>

#include "core/float16.h"
#include "cpu/kernels/matmul.h"

namespace int4mm::cpu {
namespace {

struct Scalar {
  static constexpr Isa kIsa = Isa::kScalar;
  static constexpr int kLanes = 8;
  static constexpr int kPack = 1;
  struct PairRange {};
  struct Float {
    float lane[kLanes];
  };
  struct Words {
    uint32_t lane[kLanes];
  };
  struct Table {
    float weight[16];
  };

  static Float Zero() { return {}; }
  static Float Load(const float* p) {
    Float v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void Store(float* p, const Float& v) { std::memcpy(p, &v, sizeof(v)); }
  static Float MultiplyAdd(const Float& a, const Float& b, Float c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static void AddSums(const Float& a, const Float& b, const Float& c, const Float& d, float* sums) {
    for (const Float* v : {&a, &b, &c, &d}) {
      const float* x = v->lane;
      *sums++ += ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
    }
  }

  static Table LoadTable(const float* weights) {
    Table table;
    std::memcpy(&table, weights, sizeof(table));
    return table;
  }
  static Float Lookup(const Table& table, const Words& words) {
    Float v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = table.weight[words.lane[i] & 15];
    return v;
  }
  static Words NextNibble(Words words) {
    for (uint32_t& word : words.lane) word >>= 4;
    return words;
  }

  template <class O>
  static void LoadUnit(const uint32_t* row, int part, Words* words) {
    for (int v = 0; v < O::kWordVectors; ++v) {
      for (int i = 0; i < kLanes; ++i) {
        const int word = v * kLanes + i / O::kParts;
        const int tile = word / (4 * O::kUnitWordsPerLane);
        const int lane = word / O::kUnitWordsPerLane % 4;
        const int in_lane = part * O::kUnitWordsPerLane + word % O::kUnitWordsPerLane;
        words[v].lane[i] =
            row[tile * O::kTileWords + lane * O::kWordsPerLane + in_lane] >> (4 * O::kSteps * (i % O::kParts));
      }
    }
  }

  template <DType dtype>
  static Float Widen(const uint16_t* p) {
    Float v;
    for (int i = 0; i < kLanes; ++i) v.lane[i] = int4mm::Widen(dtype, p[i]);
    return v;
  }

  template <DType dtype>
  static void NarrowEach(const float* values, uint16_t* out) {
    for (int i = 0; i < 8; ++i) out[i] = int4mm::Narrow(dtype, values[i]);
  }

  template <DType dtype>
  static unsigned LoadPairs(const uint16_t* scales_and_zeros, float* scales, float* zeros) {
    unsigned suspects = 0;
    for (int row = 0; row < 4; ++row) {
      scales[row] = int4mm::Widen(dtype, scales_and_zeros[2 * row]);
      zeros[row] = int4mm::Widen(dtype, scales_and_zeros[2 * row + 1]);
      const float scale = std::fabs(scales[row]);
      const float zero = std::fabs(zeros[row]);
      const bool fast = scale < kFastLimit && zero < kFastLimit;
      if (!fast || (zero != 0 && zero < DoubleRoundingLimit(dtype) * scale)) suspects |= 1u << row;
    }
    return suspects;
  }

  template <DType dtype>
  static Table MakeTable(float scale, float zero) {
    Table table;
    for (int q = 0; q < 16; ++q) {
      table.weight[q] = int4mm::Widen(dtype, int4mm::Narrow(dtype, static_cast<float>(q - 8) * scale + zero));
    }
    return table;
  }
};

}  // namespace

constexpr Kernel kScalarKernel = Matmul<Scalar>::MakeKernel();

}  // namespace int4mm::cpu
