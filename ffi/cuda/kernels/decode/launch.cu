#include <array>
#include <cstdint>

#include "cuda/kernels/decode/kernel.cuh"
#include "cuda/kernels/decode/launch.h"
#include "cuda/kernels/launch.h"

namespace int4mm::cuda::decode {

Status Launch(const Problem& problem, const Operands& operands, const Plan& plan, cudaStream_t stream) {
  static std::array<SharedMemoryLimit, 4 * kConfigs.size()> limits;
  const Schedule& schedule = plan.decode;
  const int groups = GroupsPerStep(problem.group_size);
  const bool float16 = problem.dtype == DType::kFloat16;
  const int tiles = static_cast<int>(problem.n / 8);
  Arguments arguments;
  arguments.operands = operands;
  arguments.m = static_cast<int>(problem.m);
  arguments.n = static_cast<int>(problem.n);
  arguments.k = static_cast<int>(problem.k);
  arguments.float32_result = problem.float32_result;
  arguments.x_tokens = problem.shared_x ? 0 : arguments.m;
  arguments.tiles = tiles;
  arguments.slices = static_cast<int>(problem.k / kStepK);
  arguments.parts = groups * arguments.slices;
  arguments.group_shift = problem.group_size == 64 || problem.group_size == 256 ? 1 : 0;
  arguments.tiles_per_cta = tiles / schedule.ctas;
  arguments.larger_ctas = tiles % schedule.ctas;
  arguments.warps_k = schedule.warps_k;
  arguments.warp_pairs = schedule.warp_pairs;
  arguments.chunk_tiles = schedule.chunk_tiles;
  const void* const kernel = float16 ? Float16Kernel(plan.config, groups) : BFloat16Kernel(plan.config, groups);
  const dim3 grid(static_cast<unsigned>(schedule.ctas), static_cast<unsigned>(schedule.token_blocks),
                  static_cast<unsigned>(problem.batch));
  return LaunchKernel("the launch of the decode kernel", kernel, limits[4 * plan.config + 2 * (groups > 1) + float16],
                      grid, 32 * schedule.Warps(), schedule.shared_bytes, &arguments, stream);
}

}  // namespace int4mm::cuda::decode
