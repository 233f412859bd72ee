// Problem + device description -> plan: which kernel, which tile, how much workspace. Pure host code, compiled into the
// module that is always built, so that lowering, explain() and the tests use it on machines without a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "core/explanation.h"
#include "core/problem.h"
#include "core/status.h"
#include "cuda/device.h"
#include "cuda/hopper_plan.h"
#include "cuda/kernels/ampere/config.h"
#include "cuda/kernels/decode/config.h"
#include "cuda/kernels/hopper/config.h"

namespace int4mm::cuda {

enum class Kernel { kAmpere, kDecode, kHopper };

struct Plan {
  Kernel kernel = Kernel::kAmpere;
  int config = 0;  // Index into the kernel's table of tiles; meaningless while m is kUnknownM.
  int64_t workspace_bytes = 0;
  // Tiles of the output of each product of the batch, of the ampere and the Hopper kernel.
  int64_t tiles_m = 0;
  int64_t tiles_n = 0;
  decode::Schedule decode;  // Of the kernel of that name, as
  hopper::Schedule hopper;  // is this.
};

// `implementation` is the public name of a kernel, or empty to choose. With m = kUnknownM the plan says how much
// workspace any m needs; the kernel is chosen at the call, unless it was named.
StatusOr<Plan> MakePlan(const Problem& problem, const DeviceDescription& device, std::string_view implementation);

Plan ToPlan(const HopperPlan& hopper);

Explanation Explain(const Problem& problem, const DeviceDescription& device, const Plan& plan);

// "<implementation>/<tile>", as `implementation` takes it and last_launch() reports it; config is an index into the
// kernel's table.
std::string LaunchName(Kernel kernel, int config);

}  // namespace int4mm::cuda
