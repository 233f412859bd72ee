#include <array>
#include <atomic>
#include <cstdint>

#include "cuda/kernels/ampere/kernel.cuh"
#include "cuda/kernels/ampere/launch.h"

namespace int4mm::cuda::ampere {
namespace {

constexpr int kMostDevices = 64;

Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status();
  return Internal() << "int4pack_mm: " << what << " failed: " << cudaGetErrorString(error) << " ("
                    << cudaGetErrorName(error) << ").";
}

// A kernel may use more than 48 KB of shared memory only after it has been told so, once a device.
Status AllowSharedMemory(const void* kernel, DType dtype, int config) {
  static std::array<std::array<std::atomic<uint64_t>, kConfigs.size()>, 2> allowed_devices = {};
  int device = 0;
  if (Status status = CudaStatus(cudaGetDevice(&device), "cudaGetDevice"); !status.ok()) return status;
  std::atomic<uint64_t>& allowed = allowed_devices[dtype == DType::kFloat16][config];
  const uint64_t bit = device < kMostDevices ? uint64_t{1} << device : 0;
  if (allowed.load(std::memory_order_relaxed) & bit) return Status();
  Status status = CudaStatus(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kConfigs[config].SharedBytes()),
      "cudaFuncSetAttribute for shared memory");
  if (status.ok()) allowed.fetch_or(bit, std::memory_order_relaxed);
  return status;
}

}  // namespace

Status Launch(const Problem& problem, const Operands& operands, const Plan& plan, cudaStream_t stream) {
  const Config& tile = kConfigs[plan.config];
  const void* kernel = problem.dtype == DType::kBFloat16 ? BFloat16Kernel(plan.config) : Float16Kernel(plan.config);
  if (Status status = AllowSharedMemory(kernel, problem.dtype, plan.config); !status.ok()) return status;

  Arguments arguments;
  arguments.x = operands.x;
  arguments.packed = operands.packed;
  arguments.scales_and_zeros = operands.scales_and_zeros;
  arguments.y = operands.y;
  arguments.m = problem.m;
  arguments.n = static_cast<int>(problem.n);
  arguments.k = static_cast<int>(problem.k);
  arguments.group_shift = problem.group_size == 32    ? 0
                          : problem.group_size == 64  ? 1
                          : problem.group_size == 128 ? 2
                                                      : 3;
  arguments.inner_k_tiles = static_cast<int>(problem.inner_k_tiles);
  arguments.tiles_n = static_cast<int>(plan.tiles_n);
  void* pointers[] = {&arguments};
  return CudaStatus(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(plan.tiles_m * plan.tiles_n)),
                                     dim3(static_cast<unsigned>(tile.Threads())), pointers,
                                     static_cast<size_t>(tile.SharedBytes()), stream),
                    "the launch of the ampere kernel");
}

}  // namespace int4mm::cuda::ampere
