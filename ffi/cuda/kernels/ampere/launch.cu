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
  Arguments arguments;
  arguments.operands = operands;
  arguments.m = problem.m;
  arguments.n = static_cast<int>(problem.n);
  arguments.k = static_cast<int>(problem.k);
  arguments.float32_result = problem.float32_result;
  arguments.group_shift = problem.group_size == 32    ? 0
                          : problem.group_size == 64  ? 1
                          : problem.group_size == 128 ? 2
                                                      : 3;
  arguments.inner_k_tiles = static_cast<int>(problem.inner_k_tiles);
  arguments.tiles_n = static_cast<int>(plan.tiles_n);
  arguments.x_tokens = problem.shared_x ? 0 : problem.m;
  arguments.tiles = arguments.n / 8;
  arguments.groups = static_cast<int>(problem.k / problem.group_size);
  const void* const kernel = float16 ? Float16Kernel(plan.config) : BFloat16Kernel(plan.config);
  const dim3 grid(static_cast<unsigned>(plan.tiles_m * plan.tiles_n), 1, static_cast<unsigned>(problem.batch));
  return LaunchKernel("the launch of the ampere kernel", kernel, limits[2 * plan.config + float16], grid,
                      tile.Threads(), tile.SharedBytes(), &arguments, stream);
}

}  // namespace int4mm::cuda::ampere
