// Eight nibbles of a packed word -> four pairs of centred 16-bit numbers, by one mask and one fma a pair.
#pragma once

#include <cstdint>

#include "cuda/kernels/ptx.cuh"

namespace int4mm::cuda {

// Nibbles as pairs of (q - 8) / kUnit, exactly. Low takes bits 0..3 of both halves of a word, High bits 4..7; the upper
// two nibbles of each half are reached by shifting the word by 8 bits.
template <typename Float>
struct Nibble;

template <>
struct Nibble<__nv_bfloat16> {
  static constexpr float kUnit = 4.0f;
  static constexpr uint32_t kOne = 0x3E803E80;         // 1 / kUnit
  static constexpr uint32_t kUnitAndOne = 0x3F804080;  // kUnit in the low half, 1 in the high one

  // Bits 0..3 become the low bits of 32's significand: 32 + q / 4, minus 34.
  static __device__ __forceinline__ uint32_t Low(uint32_t word) {
    return ptx::FmaPair<__nv_bfloat16>(ptx::AndOr<0x000F000F, 0x42004200>(word), 0x3F803F80, 0xC208C208);
  }
  // Bits 4..7 alone are a number of the smallest exponent, q * 2^-129, subnormal for q < 8: times 2^127, minus 2. The
  // multiplication does the shift, and not in the pipe that is busy with masks.
  static __device__ __forceinline__ uint32_t High(uint32_t word) {
    return ptx::FmaPair<__nv_bfloat16>(word & 0x00F000F0, 0x7F007F00, 0xC000C000);
  }
};

template <>
struct Nibble<__half> {
  static constexpr float kUnit = 1.0f;
  static constexpr uint32_t kOne = 0x3C003C00;  // 1 / kUnit
  static constexpr uint32_t kUnitAndOne = 0x3C003C00;

  // 1024 + q - 1032
  static __device__ __forceinline__ uint32_t Low(uint32_t word) {
    return ptx::FmaPair<__half>(ptx::AndOr<0x000F000F, 0x64006400>(word), 0x3C003C00, 0xE408E408);
  }
  // (1024 + 16 q) / 16 - 72
  static __device__ __forceinline__ uint32_t High(uint32_t word) {
    return ptx::FmaPair<__half>(ptx::AndOr<0x00F000F0, 0x64006400>(word), 0x2C002C00, 0xD480D480);
  }
};

}  // namespace int4mm::cuda
