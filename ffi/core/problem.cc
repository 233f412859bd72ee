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

}  // namespace

const char* DTypeName(DType dtype) { return dtype == DType::kBFloat16 ? "bfloat16" : "float16"; }

Status Validate(const Problem& p) {
  if (p.group_size != 32 && p.group_size != 64 && p.group_size != 128 && p.group_size != 256) {
    return InvalidArgument() << "int4pack_mm: group_size is " << p.group_size
                             << "; it must be 32, 64, 128 or 256. Requantise with one of these.";
  }
  if (p.inner_k_tiles != 2 && p.inner_k_tiles != 4 && p.inner_k_tiles != 8) {
    return InvalidArgument() << "int4pack_mm: inner_k_tiles is " << p.inner_k_tiles
                             << "; it must be 2, 4 or 8. Pack again with pack_int4(q, inner_k_tiles=8).";
  }
  if ((p.m < 0 && p.m != kUnknownM) || p.n <= 0 || p.k <= 0) {
    return InvalidArgument() << "int4pack_mm: m, n, k are " << p.m << ", " << p.n << ", " << p.k
                             << "; m must not be negative, n and k must be positive.";
  }
  if (p.batch < 0) {
    return InvalidArgument() << "int4pack_mm: batch is " << p.batch << "; it must not be negative.";
  }
  if (p.n % layout::kTileN != 0) {
    return InvalidArgument() << "int4pack_mm: n is " << p.n << "; it must be a multiple of " << layout::kTileN
                             << ". Int4Weight pads n when the weight is made.";
  }
  const int64_t tile_k = layout::TileK(p.inner_k_tiles);
  if (p.k % tile_k != 0) {
    return InvalidArgument() << "int4pack_mm: k is " << p.k << "; with inner_k_tiles " << p.inner_k_tiles
                             << " it must be a multiple of " << tile_k
                             << ". Int4Weight pads k when the weight is made.";
  }
  if (p.k % p.group_size != 0) {
    return InvalidArgument() << "int4pack_mm: group_size " << p.group_size << " does not divide k, which is " << p.k
                             << ". Int4Weight pads k when the weight is made.";
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

}  // namespace int4mm
