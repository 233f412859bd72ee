// The Hopper kernel: wgmma on sm_90a, for more than a few tokens. docs/kernels/hopper.md describes it.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.h"
#include "core/status.h"
#include "cuda/plan.h"

namespace int4mm::cuda::hopper {

// Whether this build holds machine code of the kernel: it was told to compile for sm_90a.
bool IsCompiled();

// Enqueues the plan's kernel on the stream of the current device. The buffers are aligned to 16 bytes.
Status Launch(const Problem& problem, const Operands& operands, const Plan& plan, cudaStream_t stream);

}  // namespace int4mm::cuda::hopper
