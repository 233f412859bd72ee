#include <cstdint>

#include "cuda/kernels/dequantize/kernel.cuh"
#include "cuda/kernels/dequantize/launch.h"
#include "cuda/kernels/dequantize/order.h"
#include "cuda/kernels/launch.h"

namespace int4mm::cuda::dequantize {

Status Launch(const DequantizeProblem& problem, const DequantizeOperands& operands, cudaStream_t stream) {
  const int64_t pieces = PieceCount(problem);
  if (pieces == 0) return Status();
  if (pieces > kMostPieces) {
    return Unimplemented() << "dequantize: " << problem.batch << " weights of n " << problem.n << " and k " << problem.k
                           << " are more than one launch takes, which is " << kMostPieces << " pieces of " << kRows
                           << " x " << kPieceK << ". Split the weight.";
  }
  Arguments arguments{operands, SizesOf(problem)};
  const int inner_k_tiles = static_cast<int>(problem.inner_k_tiles);
  const void* const kernel =
      problem.dtype == DType::kFloat16 ? KernelOf<__half>(inner_k_tiles) : KernelOf<__nv_bfloat16>(inner_k_tiles);
  void* parameters[] = {&arguments};
  const cudaError_t error = cudaLaunchKernel(kernel, dim3(CtaCount(arguments.sizes)), dim3(32 * kWarps), parameters,
                                             /*sharedMem=*/0, stream);
  return CudaStatus("dequantize", "the launch of its kernel", error);
}

}  // namespace int4mm::cuda::dequantize
