#include <array>
#include <cstdint>

#include "cuda/kernels/ampere/kernel.cuh"
#include "cuda/kernels/ampere/launch.h"
#include "cuda/kernels/launch.h"

namespace int4mm::cuda::ampere {
Status Launch(const Problem& problem, const Operands& operands, const Plan& plan, cudaStream_t stream) {
  static std::array<SharedMemoryLimit, 2 * kConfigs.size()> limits;
  const Config& tile = kConfigs[plan.config];
  const bool float16 = problem.dtype == DType::kFloat16;
  const void* const kernel = float16 ? Float16Kernel(plan.config) : BFloat16Kernel(plan.config);
  if (Status status = limits[2 * plan.config + float16].Raise(kernel); !status.ok()) return status;

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
