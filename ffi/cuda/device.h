// What plans need to know of a GPU.
#pragma once

namespace int4mm::cuda {

struct DeviceDescription {
  int compute_capability = 90;  // 10 * major + minor
  int sm_count = 132;

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
