// Problem + device -> schedule of the decode kernel, or none where it does not take the problem. Pure host code.
#pragma once

#include <optional>

#include "core/problem.h"
#include "cuda/device.h"
#include "cuda/kernels/decode/config.h"

namespace int4mm::cuda {

struct DecodePlan {
  int config = 0;  // Index into decode::kConfigs.
  decode::Schedule schedule;
};

// For so few tokens the plan prefers it, although it reads the weight once for every 16 of them.
inline constexpr int kDecodeTokens = 32;

// The best schedule, of one config or of all (config < 0); m is known. None where inner_k_tiles is not 8, or where m or
// the batch is more than a grid holds.
std::optional<DecodePlan> PlanDecode(const Problem& problem, const DeviceDescription& device, int config);

}  // namespace int4mm::cuda
