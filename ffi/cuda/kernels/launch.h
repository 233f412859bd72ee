// What the launches of all kernels share.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

#include "core/status.h"

namespace int4mm::cuda {

// What CUDA said of `what`, as the result of `op`.
Status CudaStatus(const char* op, const char* what, cudaError_t error);

// A kernel may use more than 48 KB of shared memory only after it has been told so, once a device. One of these belongs
// to one kernel.
class SharedMemoryLimit {
 public:
  // Raises the limit to all that a CTA of the current device can have.
  Status Raise(const void* kernel);

 private:
  std::atomic<uint64_t> raised_devices_{0};
};

// Enqueues a kernel of int4pack_mm that takes one struct; `what` is the launch's name in an error, and `cluster` how
// many CTAs beside each other along x form a cluster.
Status LaunchKernel(const char* what, const void* kernel, SharedMemoryLimit& limit, dim3 grid, int threads,
                    int shared_bytes, void* arguments, cudaStream_t stream, int cluster = 1);

}  // namespace int4mm::cuda
