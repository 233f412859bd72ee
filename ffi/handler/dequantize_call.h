// Buffers and the attribute of one call of dequantize -> DequantizeProblem and pointers, every property that the kernel
// relies on checked.
#pragma once

#include <array>
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
  const Sizes tiles = packed.dimensions();
  const size_t batched = tiles.size() == 5 ? 1 : 0;
  if (tiles.size() != 4 + batched || tiles[batched + 2] != layout::kLanes) {
    return InvalidArgument() << "dequantize: packed is " << Text(tiles)
                             << "; it must be [n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2], with a batch dimension "
                                "in front or without. Make it with pack_int4.";
  }

  DequantizeCall call;
  DequantizeProblem& p = call.problem;
  p.dtype = dtype == DataType::BF16 ? DType::kBFloat16 : DType::kFloat16;
  p.group_size = group_size;
  p.inner_k_tiles = 2 * tiles[batched + 3];
  if (batched == 1) p.batch = tiles[0];
  p.n = tiles[batched] * layout::kTileN;
  p.k = tiles[batched + 1] * layout::TileK(p.inner_k_tiles);
  if (Status status = Validate(p); !status.ok()) return status;
  const std::array<int64_t, 4> scales_of_batch = {p.batch, p.k / p.group_size, p.n, 2};
  const Sizes scales_sizes(scales_of_batch.data() + 1 - batched, 3 + batched);
  if (!Equal(scales_and_zeros.dimensions(), scales_sizes)) {
    return InvalidArgument() << "dequantize: scales_and_zeros is " << Text(scales_and_zeros.dimensions())
                             << "; with packed " << Text(tiles) << " and group_size " << p.group_size << " it must be "
                             << Text(scales_sizes) << ".";
  }
  const std::array<int64_t, 3> w_of_batch = {p.batch, p.n, p.k};
  const Sizes w_sizes(w_of_batch.data() + 1 - batched, 2 + batched);
  if (!Equal(w.dimensions(), w_sizes)) {
    return InvalidArgument() << "dequantize: w is " << Text(w.dimensions()) << "; with packed " << Text(tiles)
                             << " it must be " << Text(w_sizes) << ".";
  }

  call.operands.packed = static_cast<const uint32_t*>(packed.untyped_data());
  call.operands.scales_and_zeros = static_cast<const uint16_t*>(scales_and_zeros.untyped_data());
  call.operands.w = static_cast<uint16_t*>(w.untyped_data());
  return call;
}

}  // namespace int4mm
