// Buffers and the attribute of one call of dequantize -> DequantizeProblem and pointers, every property that the kernel
// relies on checked.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/layout.h"
#include "core/problem.h"
#include "core/status.h"
#include "handler/buffers.h"
#include "xla/ffi/api/ffi.h"

namespace int4mm {

inline constexpr const char* kDequantizeTarget = "jax_int4mm_dequantize";

struct DequantizeCall {
  DequantizeProblem problem;
  DequantizeOperands operands;
};

inline StatusOr<DequantizeCall> DecodeDequantizeCall(const xla::ffi::AnyBuffer& packed,
                                                     const xla::ffi::AnyBuffer& scales_and_zeros,
                                                     const xla::ffi::AnyBuffer& w, int64_t group_size) {
  using xla::ffi::DataType;
  const DataType dtype = scales_and_zeros.element_type();
  if (dtype != DataType::BF16 && dtype != DataType::F16) {
    return InvalidArgument() << "dequantize: scales_and_zeros must be bfloat16 or float16. Cast it.";
  }
  if (w.element_type() != dtype) {
    return InvalidArgument() << "dequantize: scales_and_zeros and w must have the same dtype. Cast w afterwards.";
  }
  if (packed.element_type() != DataType::S32) {
    return InvalidArgument() << "dequantize: packed must be int32, as pack_int4 makes it.";
  }
  const auto tiles = packed.dimensions();
  const bool batched = tiles.size() == 5;
  const size_t first = batched ? 1 : 0;  // Behind the batch.
  if (tiles.size() != first + 4 || tiles[first + 2] != layout::kLanes) {
    return InvalidArgument() << "dequantize: packed is " << Dimensions(packed)
                             << "; it must be [n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2], with a batch dimension "
                                "in front or without. Make it with pack_int4.";
  }

  DequantizeCall call;
  DequantizeProblem& p = call.problem;
  p.dtype = dtype == DataType::BF16 ? DType::kBFloat16 : DType::kFloat16;
  p.group_size = group_size;
  p.inner_k_tiles = 2 * tiles[first + 3];
  p.batch = batched ? tiles[0] : 1;
  p.n = tiles[first] * layout::kTileN;
  p.k = tiles[first + 1] * layout::TileK(p.inner_k_tiles);
  if (Status status = Validate(p); !status.ok()) return status;
  const int64_t groups = p.k / p.group_size;
  if (batched ? !HasDimensions(scales_and_zeros, {p.batch, groups, p.n, 2})
              : !HasDimensions(scales_and_zeros, {groups, p.n, 2})) {
    StatusBuilder refusal = InvalidArgument();
    refusal << "dequantize: scales_and_zeros is " << Dimensions(scales_and_zeros) << "; with packed "
            << Dimensions(packed) << " and group_size " << p.group_size << " it must be [";
    if (batched) refusal << p.batch << ", ";
    return refusal << groups << ", " << p.n << ", 2].";
  }
  if (batched ? !HasDimensions(w, {p.batch, p.n, p.k}) : !HasDimensions(w, {p.n, p.k})) {
    StatusBuilder refusal = InvalidArgument();
    refusal << "dequantize: w is " << Dimensions(w) << "; with packed " << Dimensions(packed) << " it must be [";
    if (batched) refusal << p.batch << ", ";
    return refusal << p.n << ", " << p.k << "].";
  }

  call.operands.packed = static_cast<const uint32_t*>(packed.untyped_data());
  call.operands.scales_and_zeros = static_cast<const uint16_t*>(scales_and_zeros.untyped_data());
  call.operands.w = static_cast<uint16_t*>(w.untyped_data());
  return call;
}

}  // namespace int4mm
