// Reads a buffer once, as fast as the memory gives it, as an XLA FFI handler: the floor under every kernel that has to
// read the same bytes. benchmarks/read_floor.py compiles and registers it.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr int kThreads = 512;
constexpr int kLoadsInFlight = 4;
constexpr int64_t kLoadBytes = sizeof(uint4);

// Past L1, which has no use for bytes that are read once.
__device__ __forceinline__ uint4 Load(const uint4* global) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(global));
  return v;
}

// The xor of everything a thread read decides about its only store, so no load can be left out; whether it stores does
// not matter, as nobody reads the result.
__global__ void __launch_bounds__(kThreads) Read(const uint4* data, int64_t loads, uint32_t wanted, uint32_t* result) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  uint32_t seen = 0;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < loads; i += kLoadsInFlight * stride) {
    uint4 v[kLoadsInFlight] = {};
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      if (i + j * stride < loads) v[j] = Load(data + i + j * stride);
    }
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) seen ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (seen == wanted) *result = seen;
}

ffi::Error CudaError(const char* what, cudaError_t error) {
  return ffi::Error::Internal(std::string("read_floor: ") + what + " failed: " + cudaGetErrorString(error) + ".");
}

ffi::Error ReadFloor(cudaStream_t stream, ffi::AnyBuffer data, ffi::Result<ffi::BufferR1<ffi::U32>> result,
                     int32_t ctas_per_sm, uint32_t wanted) {
  const int64_t bytes = static_cast<int64_t>(data.size_bytes());
  if (bytes == 0 || bytes % kLoadBytes != 0 || reinterpret_cast<uintptr_t>(data.untyped_data()) % kLoadBytes != 0) {
    return ffi::Error::InvalidArgument("read_floor: the buffer must hold whole, aligned pieces of 16 bytes.");
  }
  int device = 0, sm_count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return CudaError("asking for the number of SMs", error);
  const int64_t loads = bytes / kLoadBytes;
  const int64_t ctas = std::min<int64_t>(int64_t{ctas_per_sm} * sm_count, (loads + kThreads - 1) / kThreads);
  Read<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(static_cast<const uint4*>(data.untyped_data()), loads,
                                                             wanted, result->typed_data());
  error = cudaGetLastError();
  return error == cudaSuccess ? ffi::Error::Success() : CudaError("the launch", error);
}

}  // namespace

// Nothing is allocated or waited for, so XLA may record the launch in a CUDA graph, as it does with what is compared.
XLA_FFI_DEFINE_HANDLER_SYMBOL(ReadFloorHandler, ReadFloor,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR1<ffi::U32>>()
                                  .Attr<int32_t>("ctas_per_sm")
                                  .Attr<uint32_t>("wanted"),
                              {ffi::Traits::kCmdBufferCompatible});
