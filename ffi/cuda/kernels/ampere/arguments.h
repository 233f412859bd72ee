// What every ampere kernel is launched with.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace int4mm::cuda::ampere {

struct Arguments {
  Operands operands;
  int64_t m;
  int n;
  int k;
  bool float32_result;
  int group_shift;  // log2(group_size / 32)
  int inner_k_tiles;
  int tiles_n;
  // From one product of the batch to the next:
  int64_t x_tokens;  // m, or 0 where all have the same x;
  int tiles;         // of 8 rows of w;
  int groups;
};

}  // namespace int4mm::cuda::ampere
