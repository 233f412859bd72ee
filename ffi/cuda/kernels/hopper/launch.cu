#include <cuda.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "core/ceil_div.h"
#include "cuda/kernels/hopper/kernel.cuh"
#include "cuda/kernels/hopper/launch.h"
#include "cuda/kernels/launch.h"

namespace int4mm::cuda::hopper {
namespace {

// Functions of the driver, found at run time: the library links to the runtime alone.
struct Driver {
  decltype(&cuTensorMapEncodeTiled) encode_tensor_map = nullptr;
};

StatusOr<Driver> FindDriver() {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(kName, &function, 12000, cudaEnableDefault, &found);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
    return Internal() << "int4pack_mm: this driver has no " << kName << ", which the Hopper kernel needs ("
                      << cudaGetErrorString(error) << "). Update the driver, or name implementation=\"ampere\".";
  }
  return Driver{reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)};
}

// Row-major matrices [count][rows][columns] and the box of one that is copied at a time.
struct Matrices {
  CUtensorMapDataType dtype;
  int element_bytes;
  const void* data;
  int64_t count;
  int64_t rows;
  int64_t columns;
  int box_rows;
  int box_columns;
  CUtensorMapSwizzle swizzle;
};

Status Describe(const Matrices& matrices, CUtensorMap& map) {
  static const StatusOr<Driver> driver = FindDriver();
  if (!driver.ok()) return driver.status();
  const int64_t pitch = matrices.columns * matrices.element_bytes;
  const std::array<cuuint64_t, 3> sizes = {static_cast<cuuint64_t>(matrices.columns),
                                           static_cast<cuuint64_t>(matrices.rows),
                                           static_cast<cuuint64_t>(matrices.count)};
  const std::array<cuuint64_t, 2> pitches = {static_cast<cuuint64_t>(pitch),
                                             static_cast<cuuint64_t>(matrices.rows * pitch)};
  const std::array<cuuint32_t, 3> box = {static_cast<cuuint32_t>(matrices.box_columns),
                                         static_cast<cuuint32_t>(matrices.box_rows), 1};
  const std::array<cuuint32_t, 3> strides = {1, 1, 1};
  const CUresult result =
      driver->encode_tensor_map(&map, matrices.dtype, 3, const_cast<void*>(matrices.data), sizes.data(), pitches.data(),
                                box.data(), strides.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, matrices.swizzle,
                                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return Status();
  return Internal() << "int4pack_mm: the tensor map of " << matrices.count << " matrices of " << matrices.rows << " x "
                    << matrices.columns << " cannot be made (CUresult " << static_cast<int>(result) << ").";
}

int Log2(int64_t power_of_two) {
  int log2 = 0;
  while (int64_t{1} << log2 < power_of_two) ++log2;
  return log2;
}

}  // namespace

bool IsCompiled() { return INT4MM_HAS_SM_90A_CODE != 0; }

Status Launch(const Problem& problem, const Operands& operands, const Plan& plan, cudaStream_t stream) {
  static std::array<std::array<SharedMemoryLimit, kForms * kConfigs.size()>, 2> limits;  // Of each dtype.
  const Config& config = kConfigs[plan.config];
  const Schedule& schedule = plan.hopper;
  const int groups = GroupsPerStep(problem.group_size);
  const bool float16 = problem.dtype == DType::kFloat16;
  const CUtensorMapDataType dtype = float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  Arguments arguments = {};
  arguments.staged_output = schedule.split_k == 1 && !problem.float32_result;
  const std::array<std::pair<Matrices, CUtensorMap*>, 4> tensors = {{
      {{dtype, 2, operands.x, problem.shared_x ? 1 : problem.batch, problem.m, problem.k, config.tokens, kBoxK,
        CU_TENSOR_MAP_SWIZZLE_128B},
       &arguments.x},
      {{CU_TENSOR_MAP_DATA_TYPE_INT32, 4, operands.packed, problem.batch, problem.n / 8, problem.k, config.Rows() / 8,
        kStepK, CU_TENSOR_MAP_SWIZZLE_NONE},
       &arguments.packed},
      {{CU_TENSOR_MAP_DATA_TYPE_INT32, 4, operands.scales_and_zeros, problem.batch, problem.k / problem.group_size,
        problem.n, groups, config.Rows(), CU_TENSOR_MAP_SWIZZLE_NONE},
       &arguments.scales},
      {{dtype, 2, operands.y, problem.batch, problem.m, problem.n, config.tokens, kRowTile, CU_TENSOR_MAP_SWIZZLE_128B},
       &arguments.y},
  }};
  for (const auto& [matrices, map] : tensors) {
    if (map == &arguments.y && !arguments.staged_output) continue;
    if (Status status = Describe(matrices, *map); !status.ok()) return status;
  }
  arguments.output = operands.y;
  arguments.m = static_cast<int>(problem.m);
  arguments.n = static_cast<int>(problem.n);
  arguments.shared_x = problem.shared_x;
  arguments.float32_result = problem.float32_result;
  arguments.group_shift = Log2(problem.group_size);
  arguments.inner_k_tiles = static_cast<int>(problem.inner_k_tiles);
  arguments.whole_tiles = static_cast<int>(problem.batch * plan.tiles_m * plan.tiles_n) - schedule.divided_tiles;
  arguments.tasks = arguments.whole_tiles + schedule.divided_tiles * config.warpgroups;
  const int64_t band = std::min<int64_t>(plan.tiles_m, kRaster);
  arguments.bands = static_cast<int>(CeilDiv(plan.tiles_m, band));
  arguments.per_product = Divisor(plan.tiles_m * plan.tiles_n);
  arguments.per_band = Divisor(band * plan.tiles_n);
  arguments.band_tiles_m = Divisor(band);
  arguments.last_band_tiles_m = Divisor(plan.tiles_m - (arguments.bands - 1) * band);
  const int steps = static_cast<int>(CeilDiv(problem.k, kStepK));
  arguments.split_k = schedule.split_k;
  arguments.split_shift = Log2(schedule.split_k);
  arguments.steps_per_part = steps / schedule.split_k;
  arguments.larger_parts = steps % schedule.split_k;
  arguments.stages = schedule.stages;
  arguments.stage_bytes = config.StageBytes(groups);
  arguments.copied_bytes = config.CopiedBytes(groups);
  const Form form = problem.inner_k_tiles != 8 ? Form::kAny : groups > 1 ? Form::kGroups : Form::kOneGroup;
  const void* const kernel = float16 ? Float16Kernel(plan.config, form) : BFloat16Kernel(plan.config, form);
  SharedMemoryLimit& limit = limits[float16][kForms * plan.config + static_cast<int>(form)];
  return LaunchKernel("the launch of the Hopper kernel", kernel, limit,
                      dim3(static_cast<unsigned>(schedule.clusters * schedule.split_k)), config.Threads(),
                      schedule.shared_bytes, &arguments, stream, schedule.split_k);
}

}  // namespace int4mm::cuda::hopper
