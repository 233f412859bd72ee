#include "cuda/kernels/hopper/kernel.cuh"

namespace int4mm::cuda::hopper {

const void* Float16Kernel(int config, Form form) { return KernelOf<__half>(config, form); }

}  // namespace int4mm::cuda::hopper
