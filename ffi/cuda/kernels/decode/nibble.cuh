// Eight nibbles of a packed word -> operands of the tensor cores, by one mask and one fma a pair.
#pragma once

#include <cstdint>

#include "cuda/kernels/ptx.cuh"

namespace int4mm::cuda::decode {

// Nibbles as operands of the tensor cores: (q - 8) / kUnit, exactly; the products' sums are multiplied by kUnit at the
// very end, where a power of two costs nothing. No scale and zero here: they are applied to sums over a group, in f32.
// The upper two nibbles of each 16-bit half are reached by shifting the word by 8 bits.
template <typename Float>
struct Nibble;

template <>
struct Nibble<__nv_bfloat16> {
  static constexpr float kUnit = 4.0f;
  static constexpr uint32_t kOne = 0x3E803E80;  // 1 / kUnit

  // Bits 0..3 become the low bits of 32's significand: 32 + q / 4, minus 34.
  static __device__ __forceinline__ uint32_t Low(uint32_t word) {
    return ptx::FmaPair<__nv_bfloat16>(ptx::AndOr<0x000F000F, 0x42004200>(word), 0x3F803F80, 0xC208C208);
  }
  // Bits 4..7 alone are a number of the smallest exponent, q * 2^-129, subnormal for q < 8: times 2^127, minus 2. The
  // multiplication does the shift, and not in the pipe that is busy with masks.
  static __device__ __forceinline__ uint32_t High(uint32_t word) {
    return ptx::FmaPair<__nv_bfloat16>(word & 0x00F000F0, 0x7F007F00, 0xC000C000);
  }
  static __device__ __forceinline__ float Scale(uint32_t word) { return __uint_as_float(word << 16); }
  static __device__ __forceinline__ float Zero(uint32_t word) { return __uint_as_float(word & 0xFFFF0000); }
  static __device__ __forceinline__ uint16_t Round(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
};

template <>
struct Nibble<__half> {
  static constexpr float kUnit = 32.0f;
  static constexpr uint32_t kOne = 0x28002800;  // 1 / kUnit

  // (1024 + q) / 32 - 32.25
  static __device__ __forceinline__ uint32_t Low(uint32_t word) {
    return ptx::FmaPair<__half>(ptx::AndOr<0x000F000F, 0x64006400>(word), 0x28002800, 0xD008D008);
  }
  // q * 2^-20, subnormal, times 2^15 minus 1/4.
  static __device__ __forceinline__ uint32_t High(uint32_t word) {
    return ptx::FmaPair<__half>(word & 0x00F000F0, 0x78007800, 0xB400B400);
  }
  static __device__ __forceinline__ float Scale(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  }
  static __device__ __forceinline__ float Zero(uint32_t word) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
  static __device__ __forceinline__ uint16_t Round(float value) { return __half_as_ushort(__float2half_rn(value)); }
};

}  // namespace int4mm::cuda::decode
