#include "cuda/kernels/ampere/kernel.cuh"

namespace int4mm::cuda::ampere {

const void* BFloat16Kernel(int config) { return KernelOf<__nv_bfloat16>(config); }

}  // namespace int4mm::cuda::ampere
