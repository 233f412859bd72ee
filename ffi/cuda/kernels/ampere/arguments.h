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
  int group_shift;  // log2(group_size / 32)
  int inner_k_tiles;
  int tiles_n;
};

}  // namespace int4mm::cuda::ampere
