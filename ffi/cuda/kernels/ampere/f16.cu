#include "cuda/kernels/ampere/kernel.cuh"

namespace int4mm::cuda::ampere {

const void* Float16Kernel(int config) { return KernelOf<__half>(config); }

}  // namespace int4mm::cuda::ampere
