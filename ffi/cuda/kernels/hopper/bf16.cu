#include "cuda/kernels/hopper/kernel.cuh"

namespace int4mm::cuda::hopper {

const void* BFloat16Kernel(int config, Form form) { return KernelOf<__nv_bfloat16>(config, form); }

}  // namespace int4mm::cuda::hopper
