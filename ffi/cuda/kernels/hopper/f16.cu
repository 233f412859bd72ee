#include "cuda/kernels/hopper/kernel.cuh"

namespace int4mm::cuda::hopper {

const void* Float16Kernel(int config, int groups) { return KernelOf<__half>(config, groups); }

}  // namespace int4mm::cuda::hopper
