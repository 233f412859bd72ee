#include "core/problem.h"

#include <algorithm>
#include <initializer_list>

#include "core/layout.h"

namespace int4mm {
namespace {

// Whether the product is an int64_t.
bool Fits(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(product, factor, &product)) return false;
  }
  return true;
}

// The rules of weights; `op` heads the sentence.
Status ValidateWeights(const char* op, int64_t batch, int64_t n, int64_t k, int64_t group_size, int64_t inner_k_tiles) {
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
  if (batch < 0) {
    return InvalidArgument() << op << ": batch is " << batch << "; it must not be negative.";
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

const char* DTypeName(DType dtype) { return dtype == DType::kBFloat16 ? "bfloat16" : "float16"; }

Status Validate(const Problem& p) {
  if (Status status = ValidateWeights("int4pack_mm", p.batch, p.n, p.k, p.group_size, p.inner_k_tiles); !status.ok()) {
    return status;
  }
  if (p.m < 0 && p.m != kUnknownM) {
    return InvalidArgument() << "int4pack_mm: m is " << p.m << "; it must not be negative.";
  }
  constexpr int64_t kMostBytes = 4;  // Of an element.
  const int64_t batch = std::max(p.batch, int64_t{1});
  const int64_t m = std::max(p.m, int64_t{1});
  if (!Fits({batch, p.n, p.k, kMostBytes}) || !Fits({batch, m, p.k, kMostBytes}) ||
      !Fits({batch, m, p.n, kMostBytes})) {
    return InvalidArgument() << "int4pack_mm: batch, m, n, k are " << p.batch << ", " << p.m << ", " << p.n << ", "
                             << p.k << "; the bytes of x, w and y must each be fewer than 2^63. Split the batch, or x "
                             << "along m.";
  }
  return Status();
}

Status Validate(const DequantizeProblem& p) {
  return ValidateWeights("dequantize", p.batch, p.n, p.k, p.group_size, p.inner_k_tiles);
}

}  // namespace int4mm
