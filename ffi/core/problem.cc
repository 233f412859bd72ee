#include "core/problem.h"

#include "core/layout.h"

namespace int4mm {

const char* DTypeName(DType dtype) { return dtype == DType::kBFloat16 ? "bfloat16" : "float16"; }

namespace {

// The rules of one weight; `op` heads the sentence.
Status ValidateWeight(const char* op, int64_t n, int64_t k, int64_t group_size, int64_t inner_k_tiles) {
  if (group_size != 32 && group_size != 64 && group_size != 128 && group_size != 256) {
    return InvalidArgument() << op << ": group_size is " << group_size
                             << "; it must be 32, 64, 128 or 256. Requantise with one of these.";
  }
  if (inner_k_tiles != 2 && inner_k_tiles != 4 && inner_k_tiles != 8) {
    return InvalidArgument() << op << ": inner_k_tiles is " << inner_k_tiles
                             << "; it must be 2, 4 or 8. Pack again with pack_int4(q, inner_k_tiles=8).";
  }
  if (n <= 0 || k <= 0) {
    return InvalidArgument() << op << ": n and k are " << n << " and " << k << "; n and k must be positive.";
  }
  if (n % layout::kTileN != 0) {
    return InvalidArgument() << op << ": n is " << n << "; it must be a multiple of " << layout::kTileN
                             << ". Int4Weight pads n when the weight is made.";
  }
  const int64_t tile_k = layout::TileK(inner_k_tiles);
  if (k % tile_k != 0) {
    return InvalidArgument() << op << ": k is " << k << "; with inner_k_tiles " << inner_k_tiles
                             << " it must be a multiple of " << tile_k
                             << ". Int4Weight pads k when the weight is made.";
  }
  if (k % group_size != 0) {
    return InvalidArgument() << op << ": group_size " << group_size << " does not divide k, which is " << k
                             << ". Int4Weight pads k when the weight is made.";
  }
  return Status();
}

}  // namespace

Status Validate(const Problem& p) {
  if (Status status = ValidateWeight("int4pack_mm", p.n, p.k, p.group_size, p.inner_k_tiles); !status.ok()) {
    return status;
  }
  if (p.m < 0 && p.m != kUnknownM) {
    return InvalidArgument() << "int4pack_mm: m is " << p.m << "; it must not be negative.";
  }
  return Status();
}

Status Validate(const DequantizeProblem& p) {
  if (Status status = ValidateWeight("dequantize", p.n, p.k, p.group_size, p.inner_k_tiles); !status.ok()) {
    return status;
  }
  if (p.batch < 0) {
    return InvalidArgument() << "dequantize: the batch is " << p.batch << "; it must not be negative.";
  }
  return Status();
}

}  // namespace int4mm
