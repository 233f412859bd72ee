// A plan -> the launch of its kernel.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.h"
#include "core/status.h"
#include "cuda/kernels/ampere/launch.h"
#include "cuda/kernels/decode/launch.h"
#include "cuda/kernels/hopper/launch.h"
#include "cuda/plan.h"

namespace int4mm::cuda {

// The plan is for this problem, with rows of x, and for the current device.
inline Status Launch(const Problem& problem, const Operands& operands, const Plan& plan, cudaStream_t stream) {
  switch (plan.kernel) {
    case Kernel::kDecode:
      return decode::Launch(problem, operands, plan, stream);
    case Kernel::kHopper:
      return hopper::Launch(problem, operands, plan, stream);
    default:
      return ampere::Launch(problem, operands, plan, stream);
  }
}

}  // namespace int4mm::cuda
