// Eight nibbles of a packed word -> four pairs of 16-bit weights, bit for bit those of PyTorch's CUDA op.
#pragma once

#include "cuda/kernels/nibble.cuh"
#include "cuda/kernels/ptx.cuh"

namespace int4mm::cuda {

// Scale, times Nibble::kUnit, and zero of one row and group, each in both halves of a word.
struct ScaleAndZero {
  uint32_t scale;
  uint32_t zero;
};

// From a word of scales_and_zeros: scale in the low half, zero in the high one.
template <typename Float>
__device__ __forceinline__ ScaleAndZero SplitScaleAndZero(uint32_t word) {
  constexpr uint32_t kMinusZero = 0x80008000;
  if constexpr (Nibble<Float>::kUnit != 1.0f) word = ptx::FmaPair<Float>(word, Nibble<Float>::kUnitAndOne, kMinusZero);
  return {ptx::Permute(word, word, 0x1010), ptx::Permute(word, word, 0x3232)};
}

// The pair of neighbours in k whose nibbles start at bits 4 * kPair and 16 + 4 * kPair: k + 8 * kPair and the next.
// One fma on an exact difference: the weight is rounded once.
template <typename Float, int kPair>
__device__ __forceinline__ uint32_t DequantizePair(uint32_t word, const ScaleAndZero& group) {
  const uint32_t shifted = kPair < 2 ? word : word >> 8;
  const uint32_t centred = kPair % 2 == 0 ? Nibble<Float>::Low(shifted) : Nibble<Float>::High(shifted);
  return ptx::FmaPair<Float>(centred, group.scale, group.zero);
}

}  // namespace int4mm::cuda
