// What plans need to know of a GPU.
#pragma once

namespace int4mm::cuda {

inline constexpr int kOldestArchitecture = 80;  // mma.sync m16n8k16 with bf16 operands, fma on bf16, cp.async.

struct DeviceDescription {
  int compute_capability = 90;  // 10 * major + minor
  int sm_count = 132;
  bool has_sm_90a_code = true;  // Whether the build holds machine code of the Hopper kernel.

  constexpr bool HasHopperKernel() const { return compute_capability == 90 && has_sm_90a_code; }

  // Shared memory that one CTA can ask for, as the CUDA programming guide lists it by compute capability.
  constexpr int SharedBytesPerCta() const {
    switch (compute_capability) {
      case 80:
      case 87:
        return 163 * 1024;
      case 90:
      case 100:
      case 101:
      case 103:
      case 110:
        return 227 * 1024;
      default:
        return 99 * 1024;
    }
  }
};

}  // namespace int4mm::cuda
