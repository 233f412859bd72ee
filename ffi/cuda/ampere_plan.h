// Problem + device -> tile of the ampere kernel. Pure host code.
#pragma once

#include <cstdint>
#include <optional>

#include "core/problem.h"
#include "cuda/device.h"
#include "cuda/kernels/ampere/config.h"

namespace int4mm::cuda {

struct AmperePlan {
  int config = 0;       // Index into ampere::kConfigs.
  int64_t tiles_m = 0;  // Of each product of the batch.
  int64_t tiles_n = 0;
};

// The best tile, or that of a config (config >= 0); m is known. None where there are more tiles, or products in the
// batch, than a launch holds.
std::optional<AmperePlan> PlanAmpere(const Problem& problem, const DeviceDescription& device, int config);

}  // namespace int4mm::cuda
