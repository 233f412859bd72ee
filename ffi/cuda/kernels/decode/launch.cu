#include <array>
#include <cstdint>

#include "cuda/kernels/decode/kernel.cuh"
#include "cuda/kernels/decode/launch.h"
#include "cuda/kernels/launch.h"

namespace int4mm::cuda::decode {

Status Launch(const Problem& problem, const Operands& operands, const Plan& plan, cudaStream_t stream) {
  static std::array<SharedMemoryLimit, 4 * kConfigs.size()> limits;
  const Schedule& schedule = plan.schedule;
  const int groups = GroupsPerStep(problem.group_size);
  const bool float16 = problem.dtype == DType::kFloat16;
  const void* const kernel = float16 ? Float16Kernel(plan.config, groups) : BFloat16Kernel(plan.config, groups);
  SharedMemoryLimit& limit = limits[4 * plan.config + 2 * (groups > 1) + float16];
  if (Status status = limit.Raise(kernel); !status.ok()) return status;

  const int tiles = static_cast<int>(problem.n / 8);
  Arguments arguments;
  arguments.x = operands.x;
  arguments.packed = operands.packed;
  arguments.scales_and_zeros = operands.scales_and_zeros;
  arguments.y = operands.y;
  arguments.m = static_cast<int>(problem.m);
  arguments.n = static_cast<int>(problem.n);
  arguments.k = static_cast<int>(problem.k);
  arguments.slices = static_cast<int>(problem.k / kStepK);
  arguments.group_shift = problem.group_size == 64 || problem.group_size == 256 ? 1 : 0;
  arguments.tiles_per_cta = tiles / schedule.ctas;
  arguments.larger_ctas = tiles % schedule.ctas;
  arguments.warps_k = schedule.warps_k;
  arguments.warp_pairs = schedule.warp_pairs;
  arguments.chunk_tiles = schedule.chunk_tiles;
  void* pointers[] = {&arguments};
  const dim3 grid(static_cast<unsigned>(schedule.ctas), static_cast<unsigned>(schedule.token_blocks));
  return CudaStatus(cudaLaunchKernel(kernel, grid, dim3(static_cast<unsigned>(32 * schedule.Warps())), pointers,
                                     static_cast<size_t>(schedule.shared_bytes), stream),
                    "the launch of the decode kernel");
}

}  // namespace int4mm::cuda::decode
