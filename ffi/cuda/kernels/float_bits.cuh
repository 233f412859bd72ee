// bfloat16 and float16, as bits, from and to float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace int4mm::cuda {

template <typename Float>
struct FloatBits;

template <>
struct FloatBits<__nv_bfloat16> {
  static __device__ __forceinline__ float Low(uint32_t pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float High(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000); }
  static __device__ __forceinline__ uint16_t Round(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
  static __device__ __forceinline__ uint32_t RoundPair(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

template <>
struct FloatBits<__half> {
  static __device__ __forceinline__ float Low(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
  }
  static __device__ __forceinline__ float High(uint32_t pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16)));
  }
  static __device__ __forceinline__ uint16_t Round(float value) { return __half_as_ushort(__float2half_rn(value)); }
  static __device__ __forceinline__ uint32_t RoundPair(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
};

}  // namespace int4mm::cuda
