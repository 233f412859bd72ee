// What one call of int4pack_mm or dequantize asks for, and the rules that every platform checks before it plans.
#pragma once

#include <cstdint>

#include "core/status.h"

namespace int4mm {

enum class DType { kBFloat16, kFloat16 };

const char* DTypeName(DType dtype);

// m of a program whose number of rows is not known when it is compiled (a symbolic dimension).
inline constexpr int64_t kUnknownM = -1;

// y [m, n] = x [m, k] @ w [n, k]^T with w = (q - 8) * scale + zero for each group of `group_size` values of k; a batch
// of such products, each with its own w.
struct Problem {
  int64_t m = 0;
  int64_t n = 0;
  int64_t k = 0;
  int64_t group_size = 0;          // 32, 64, 128 or 256.
  int64_t inner_k_tiles = 0;       // 2, 4 or 8.
  DType dtype = DType::kBFloat16;  // Of x and scales_and_zeros, and of y, unless
  bool float32_result = false;     // y is float32: the sums, not rounded to dtype.
  int64_t batch = 1;
  bool shared_x = false;  // Whether all products of the batch have the same x.

  // Whether y has no elements, so that nothing is launched.
  constexpr bool Empty() const { return m == 0 || batch == 0; }
};

// w [batch, n, k] = (q - 8) * scale + zero of as many weights of one shape.
struct DequantizeProblem {
  int64_t batch = 1;
  int64_t n = 0;
  int64_t k = 0;
  int64_t group_size = 0;          // 32, 64, 128 or 256.
  int64_t inner_k_tiles = 0;       // 2, 4 or 8.
  DType dtype = DType::kBFloat16;  // Of scales_and_zeros and w.
};

// The four buffers of one call of int4pack_mm, row-major and dense; 16-bit floats are carried as their bits.
struct Operands {
  const uint16_t* x = nullptr;                 // [batch, m, k], or [m, k] where it is shared
  const uint32_t* packed = nullptr;            // [batch, n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]
  const uint16_t* scales_and_zeros = nullptr;  // [batch, k/group_size, n, 2]
  void* y = nullptr;                           // [batch, m, n], of 16 or 32 bits
};

// The buffers of one call of dequantize, alike.
struct DequantizeOperands {
  const uint32_t* packed = nullptr;            // [batch, n/8, k/(16*inner_k_tiles), 32, inner_k_tiles/2]
  const uint16_t* scales_and_zeros = nullptr;  // [batch, k/group_size, n, 2]
  uint16_t* w = nullptr;                       // [batch, n, k]
};

// Checks the rules that no kernel relaxes: sizes, divisibility, group size and inner_k_tiles, and that every array's
// bytes can be counted. m = 0, kUnknownM and batch = 0 are legal.
Status Validate(const Problem& problem);
Status Validate(const DequantizeProblem& problem);

}  // namespace int4mm
