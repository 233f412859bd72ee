// Eight nibbles of a packed word -> four pairs of 16-bit weights, bit for bit those of PyTorch's CUDA op.
#pragma once

#include "cuda/kernels/ptx.cuh"

namespace int4mm::cuda {

// A nibble in the low bits of `kMagic`'s significand makes the number kMagic + q, exactly; adding kMinusBias leaves
// q - 8, exactly.
template <typename Float>
struct NibbleCode;

template <>
struct NibbleCode<__nv_bfloat16> {
  static constexpr uint32_t kMagic = 0x43004300;      // 128
  static constexpr uint32_t kOne = 0x3F803F80;        // 1
  static constexpr uint32_t kMinusBias = 0xC308C308;  // -136
};

template <>
struct NibbleCode<__half> {
  static constexpr uint32_t kMagic = 0x64006400;      // 1024
  static constexpr uint32_t kOne = 0x3C003C00;        // 1
  static constexpr uint32_t kMinusBias = 0xE408E408;  // -1032
};

// Scale and zero of one row and group, each in both halves of a word.
struct ScaleAndZero {
  uint32_t scale;
  uint32_t zero;
};

// From a word of scales_and_zeros: scale in the low half, zero in the high one.
__device__ __forceinline__ ScaleAndZero SplitScaleAndZero(uint32_t word) {
  return {ptx::Permute(word, word, 0x1010), ptx::Permute(word, word, 0x3232)};
}

// The pair of neighbours in k whose nibbles start at bits 4 * kPair and 16 + 4 * kPair: k + 8 * kPair and the next.
// One fma on an exact difference: the weight is rounded once.
template <typename Float, int kPair>
__device__ __forceinline__ uint32_t DequantizePair(uint32_t word, const ScaleAndZero& group) {
  using Code = NibbleCode<Float>;
  const uint32_t biased = ptx::AndOr<0x000F000F, Code::kMagic>(word >> (4 * kPair));
  const uint32_t centred = ptx::FmaPair<Float>(biased, Code::kOne, Code::kMinusBias);
  return ptx::FmaPair<Float>(centred, group.scale, group.zero);
}

}  // namespace int4mm::cuda
