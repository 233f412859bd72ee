#include "cuda/kernels/hopper/kernel.cuh"

namespace int4mm::cuda::hopper {

const void* BFloat16Kernel(int config, int groups) { return KernelOf<__nv_bfloat16>(config, groups); }

}  // namespace int4mm::cuda::hopper
