// The dequantize kernel: packed words to dense weights, sm_80 and newer. docs/kernels/dequantize.md describes it.
#pragma once

#include <cuda_runtime_api.h>

#include "core/problem.h"
#include "core/status.h"

namespace int4mm::cuda::dequantize {

// Enqueues the kernel on the stream of the current device. The buffers are aligned to 16 bytes.
Status Launch(const DequantizeProblem& problem, const DequantizeOperands& operands, cudaStream_t stream);

}  // namespace int4mm::cuda::dequantize
