// What the CPU's and the GPU's XLA handler of int4pack_mm share: buffers and attributes -> Problem and pointers, every
// property that a kernel relies on checked.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "core/problem.h"
#include "core/status.h"
#include "handler/buffers.h"
#include "xla/ffi/api/ffi.h"

namespace int4mm {

// The custom-call target on every platform.
inline constexpr const char* kTarget = "jax_int4mm_int4pack_mm";

struct Call {
  Problem problem;
  Operands operands;
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

inline StatusOr<Call> DecodeCall(const xla::ffi::AnyBuffer& x, const xla::ffi::AnyBuffer& packed,
                                 const xla::ffi::AnyBuffer& scales_and_zeros, const xla::ffi::AnyBuffer& y,
                                 const xla::ffi::AnyBuffer& workspace, int64_t group_size) {
  using xla::ffi::DataType;
  const DataType dtype = x.element_type();
  if (dtype != DataType::BF16 && dtype != DataType::F16) {
    return InvalidArgument() << "int4pack_mm: x must be bfloat16 or float16.";
  }
  if (scales_and_zeros.element_type() != dtype || y.element_type() != dtype) {
    return InvalidArgument() << "int4pack_mm: x, scales_and_zeros and y must have the same dtype.";
  }
  if (packed.element_type() != DataType::S32 || workspace.element_type() != DataType::U8) {
    return InvalidArgument() << "int4pack_mm: packed must be int32 and the workspace uint8.";
  }
  const auto tiles = packed.dimensions();
  if (x.dimensions().size() != 2 || tiles.size() != 4 || tiles[2] != layout::kLanes) {
    return InvalidArgument() << "int4pack_mm: x is " << Dimensions(x) << " and packed " << Dimensions(packed)
                             << "; they must be [m, k] and [n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2].";
  }

  Call call;
  Problem& p = call.problem;
  p.dtype = dtype == DataType::BF16 ? DType::kBFloat16 : DType::kFloat16;
  p.group_size = group_size;
  p.inner_k_tiles = 2 * tiles[3];
  p.m = x.dimensions()[0];
  p.n = tiles[0] * layout::kTileN;
  p.k = tiles[1] * layout::TileK(p.inner_k_tiles);
  if (Status status = Validate(p); !status.ok()) return status;
  if (x.dimensions()[1] != p.k) {
    return InvalidArgument() << "int4pack_mm: x is " << Dimensions(x) << ", but packed " << Dimensions(packed)
                             << " has k = " << p.k << "; x must be [m, k].";
  }
  if (!HasDimensions(scales_and_zeros, {p.k / p.group_size, p.n, 2})) {
    return InvalidArgument() << "int4pack_mm: scales_and_zeros is " << Dimensions(scales_and_zeros)
                             << "; with group_size " << p.group_size << " it must be [" << p.k / p.group_size << ", "
                             << p.n << ", 2].";
  }
  if (!HasDimensions(y, {p.m, p.n})) {
    return InvalidArgument() << "int4pack_mm: y is " << Dimensions(y) << "; it must be [" << p.m << ", " << p.n << "].";
  }

  call.operands.x = static_cast<const uint16_t*>(x.untyped_data());
  call.operands.packed = static_cast<const uint32_t*>(packed.untyped_data());
  call.operands.scales_and_zeros = static_cast<const uint16_t*>(scales_and_zeros.untyped_data());
  call.operands.y = static_cast<uint16_t*>(y.untyped_data());
  call.workspace = workspace.untyped_data();
  call.workspace_bytes = static_cast<int64_t>(workspace.element_count());
  return call;
}

}  // namespace int4mm
