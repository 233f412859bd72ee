// What the CPU's and the GPU's XLA handler of int4pack_mm share: buffers and attributes -> Problem and pointers, every
// property that a kernel relies on checked.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

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
  if (scales_and_zeros.element_type() != dtype) {
    return InvalidArgument() << "int4pack_mm: x and scales_and_zeros must have the same dtype.";
  }
  if (y.element_type() != dtype && y.element_type() != DataType::F32) {
    return InvalidArgument() << "int4pack_mm: y must be float32 or have the same dtype as x.";
  }
  if (packed.element_type() != DataType::S32 || workspace.element_type() != DataType::U8) {
    return InvalidArgument() << "int4pack_mm: packed must be int32 and the workspace uint8.";
  }
  // With a batch every buffer has one dimension more, in front, but for an x that all its products share.
  const Sizes x_sizes = x.dimensions();
  const size_t batched = packed.dimensions().size() == 5 ? 1 : 0;
  const bool own_x = batched == 1 && x_sizes.size() == 3;
  const Sizes tiles = packed.dimensions();
  if (tiles.size() != 4 + batched || tiles[batched + 2] != layout::kLanes || (x_sizes.size() != 2 && !own_x)) {
    return InvalidArgument() << "int4pack_mm: x is " << Text(x_sizes) << " and packed " << Text(tiles)
                             << "; they must be [m, k] and [n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2], or for a "
                                "batch [m, k] or [batch, m, k] and [batch, n/8, k/(16*inner_k_tiles), 32, "
                                "inner_k_tiles/2].";
  }

  Call call;
  Problem& p = call.problem;
  p.dtype = dtype == DataType::BF16 ? DType::kBFloat16 : DType::kFloat16;
  p.float32_result = y.element_type() == DataType::F32;
  p.group_size = group_size;
  p.inner_k_tiles = 2 * tiles[batched + 3];
  p.m = x_sizes[x_sizes.size() - 2];
  p.n = tiles[batched] * layout::kTileN;
  p.k = tiles[batched + 1] * layout::TileK(p.inner_k_tiles);
  if (batched == 1) p.batch = tiles[0];
  p.shared_x = batched == 1 && !own_x;
  if (Status status = Validate(p); !status.ok()) return status;
  if (x_sizes[x_sizes.size() - 1] != p.k || (own_x && x_sizes[0] != p.batch)) {
    return InvalidArgument() << "int4pack_mm: x is " << Text(x_sizes) << ", but packed " << Text(tiles)
                             << (batched == 1 ? " is a batch of " + std::to_string(p.batch) + " with k = "
                                              : " has k = ")
                             << p.k << "; x must be " << (batched == 1 ? "[m, k] or [batch, m, k]." : "[m, k].");
  }
  const std::array<int64_t, 4> scales_of_batch = {p.batch, p.k / p.group_size, p.n, 2};
  const Sizes scales_sizes(scales_of_batch.data() + 1 - batched, 3 + batched);
  if (!Equal(scales_and_zeros.dimensions(), scales_sizes)) {
    return InvalidArgument() << "int4pack_mm: scales_and_zeros is " << Text(scales_and_zeros.dimensions())
                             << "; with packed " << Text(tiles) << " and group_size " << p.group_size << " it must be "
                             << Text(scales_sizes) << ".";
  }
  const std::array<int64_t, 3> y_of_batch = {p.batch, p.m, p.n};
  const Sizes y_sizes(y_of_batch.data() + 1 - batched, 2 + batched);
  if (!Equal(y.dimensions(), y_sizes)) {
    return InvalidArgument() << "int4pack_mm: y is " << Text(y.dimensions()) << "; it must be " << Text(y_sizes) << ".";
  }

  call.operands.x = static_cast<const uint16_t*>(x.untyped_data());
  call.operands.packed = static_cast<const uint32_t*>(packed.untyped_data());
  call.operands.scales_and_zeros = static_cast<const uint16_t*>(scales_and_zeros.untyped_data());
  call.operands.y = y.untyped_data();
  call.workspace = workspace.untyped_data();
  call.workspace_bytes = static_cast<int64_t>(workspace.element_count());
  return call;
}

}  // namespace int4mm
