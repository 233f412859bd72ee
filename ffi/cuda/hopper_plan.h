// Problem + device -> tile and schedule of the Hopper kernel, or none where it does not take the problem. Pure host
// code.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "core/problem.h"
#include "cuda/device.h"
#include "cuda/kernels/hopper/config.h"

namespace int4mm::cuda {

struct HopperPlan {
  int config = 0;       // Index into hopper::kConfigs.
  int64_t tiles_m = 0;  // Of each product of the batch.
  int64_t tiles_n = 0;
  hopper::Schedule schedule;
};

// From so many tokens on the plan prefers it to the decode kernel.
inline constexpr int kHopperTokens = 17;

// Every tile and way to divide k that the device has room for, to be timed.
std::vector<HopperPlan> EveryHopperPlan(const Problem& problem, const DeviceDescription& device);

// The best schedule, of one config or of all (config < 0); m is known. None where y is empty, where the device is not a
// Hopper GPU with the kernel compiled for it, or where there are more tiles than a launch holds.
std::optional<HopperPlan> PlanHopper(const Problem& problem, const DeviceDescription& device, int config);

}  // namespace int4mm::cuda
