// Packed words to the dense matrix of 16-bit weights, at the rate at which it can be written.
// docs/kernels/dequantize.md is the essay.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/problem.h"
#include "cuda/kernels/dequantize/order.h"
#include "cuda/kernels/nibble.cuh"
#include "cuda/kernels/ptx.cuh"

namespace int4mm::cuda::dequantize {

struct Arguments {
  DequantizeOperands operands;
  Sizes sizes;
};

// q - 8 of bits 0..3 of both halves of a word, exactly and, unlike Nibble, as whole numbers in either dtype: no scale
// has to be multiplied, so none overflows.
template <typename Float>
__device__ __forceinline__ uint32_t Centred(uint32_t word) {
  if constexpr (std::is_same_v<Float, __nv_bfloat16>) {
    // 128 + q - 136
    return ptx::FmaPair<Float>(ptx::AndOr<0x000F000F, 0x43004300>(word), 0x3F803F80, 0xC308C308);
  } else {
    static_assert(Nibble<Float>::kUnit == 1.0f);
    return Nibble<Float>::Low(word);
  }
}

template <typename Float, uint32_t kInnerKTiles>
__global__ void __launch_bounds__(32 * kWarps) Kernel(const __grid_constant__ Arguments args) {
  constexpr uint32_t kAllLanes = 0xFFFFFFFF;
  const DequantizeOperands& o = args.operands;
  const uint32_t lane = threadIdx.x % 32;
  const uint32_t first_piece = (blockIdx.x * kWarps + threadIdx.x / 32) * kPiecesOfWarp;

  Piece pieces[kPiecesOfWarp];
  uint32_t words[kPiecesOfWarp][4] = {};
  uint32_t pairs[kPiecesOfWarp] = {};  // Scale and zero of the strip that the lane is to hold.
#pragma unroll
  for (uint32_t p = 0; p < kPiecesOfWarp; ++p) {
    pieces[p] = PieceAt(args.sizes, first_piece + p);
    const uint32_t strip = HeldStrip(kInnerKTiles, lane);
    if (strip < pieces[p].strips) {
      ptx::LoadOnce(words[p], o.packed + WordOffset(args.sizes, pieces[p], lane));
      const int64_t pair = PairOffset(args.sizes, pieces[p], HeldRow(kInnerKTiles, lane), strip);
      pairs[p] = __ldg(reinterpret_cast<const uint32_t*>(o.scales_and_zeros) + pair);
    }
  }

#pragma unroll
  for (uint32_t p = 0; p < kPiecesOfWarp; ++p) {
#pragma unroll
    for (int round = 0; round < Rounds(kInnerKTiles); ++round) {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        const uint32_t given = Given(words[p], lane, round, i);
        Take(words[p], lane, round, i, __shfl_xor_sync(kAllLanes, given, 1 << round));
      }
    }
    const bool stores = StoredStrip(lane) < pieces[p].strips;
    uint16_t* target = o.w + OutputOffset(args.sizes, pieces[p], lane);
#pragma unroll
    for (uint32_t store = 0; store < kStores; ++store, target += StoreStep(args.sizes)) {
      const uint32_t holder = Holder(kInnerKTiles, StoredRow(lane, store), StoredStrip(lane));
      const uint32_t pair = __shfl_sync(kAllLanes, pairs[p], holder);
      const uint32_t scale = ptx::Permute(pair, pair, 0x1010);
      const uint32_t zero = ptx::Permute(pair, pair, 0x3232);
      uint32_t w[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t word = __shfl_sync(kAllLanes, words[p][HeldWord(kInnerKTiles, i)], holder);
        // One fma on an exact difference: the weight is rounded once.
        w[i] = ptx::FmaPair<Float>(Centred<Float>(word >> StoredBit(lane)), scale, zero);
      }
      ptx::StoreIf(stores, target, w);
    }
  }
}

template <typename Float>
const void* KernelOf(int inner_k_tiles) {
  switch (inner_k_tiles) {
    case 2:
      return reinterpret_cast<const void*>(&Kernel<Float, 2>);
    case 4:
      return reinterpret_cast<const void*>(&Kernel<Float, 4>);
    default:
      return reinterpret_cast<const void*>(&Kernel<Float, 8>);
  }
}

}  // namespace int4mm::cuda::dequantize
