#include "cuda/kernels/decode/kernel.cuh"

namespace int4mm::cuda::decode {

const void* Float16Kernel(int config, int groups) { return KernelOf<__half>(config, groups); }

}  // namespace int4mm::cuda::decode
