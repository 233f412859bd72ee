// The decode kernel: mma.sync for sm_80 and newer, few tokens, inner_k_tiles = 8. docs/kernels/decode.md describes it.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.h"
#include "core/status.h"
#include "cuda/plan.h"

namespace int4mm::cuda::decode {

// Enqueues the plan's kernel on the stream of the current device. The buffers are aligned to 16 bytes.
Status Launch(const Problem& problem, const Operands& operands, const Plan& plan, cudaStream_t stream);

}  // namespace int4mm::cuda::decode
