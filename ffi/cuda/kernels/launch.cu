#include "cuda/kernels/launch.h"

namespace int4mm::cuda {
namespace {

constexpr const char* kOp = "int4pack_mm";

}  // namespace

Status CudaStatus(const char* op, const char* what, cudaError_t error) {
  if (error == cudaSuccess) return Status();
  return Internal() << op << ": " << what << " failed: " << cudaGetErrorString(error) << " (" << cudaGetErrorName(error)
                    << ").";
}

Status SharedMemoryLimit::Raise(const void* kernel) {
  constexpr int kMostDevices = 64;
  int device = 0;
  if (Status status = CudaStatus(kOp, "cudaGetDevice", cudaGetDevice(&device)); !status.ok()) return status;
  const uint64_t bit = device < kMostDevices ? uint64_t{1} << device : 0;
  if (raised_devices_.load(std::memory_order_relaxed) & bit) return Status();
  int bytes = 0;
  if (Status status = CudaStatus(kOp, "cudaDeviceGetAttribute for shared memory",
                                 cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
      !status.ok()) {
    return status;
  }
  if (Status status = CudaStatus(kOp, "cudaFuncSetAttribute for shared memory",
                                 cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
      !status.ok()) {
    return status;
  }
  raised_devices_.fetch_or(bit, std::memory_order_relaxed);
  return Status();
}

Status LaunchKernel(const char* what, const void* kernel, SharedMemoryLimit& limit, dim3 grid, int threads,
                    int shared_bytes, void* arguments, cudaStream_t stream, int cluster) {
  if (Status status = limit.Raise(kernel); !status.ok()) return status;
  cudaLaunchAttribute dimension = {};
  dimension.id = cudaLaunchAttributeClusterDimension;
  dimension.val.clusterDim.x = static_cast<unsigned>(cluster);
  dimension.val.clusterDim.y = dimension.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &dimension;
  config.numAttrs = cluster > 1 ? 1 : 0;
  return CudaStatus(kOp, what, cudaLaunchKernelExC(&config, kernel, &arguments));
}

}  // namespace int4mm::cuda
