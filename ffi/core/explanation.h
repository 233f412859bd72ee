// What a plan says of itself: the same text for explain(), for error messages and for the test that compares the
// planned kernel with the one that ran.
#pragma once

#include <cstdint>
#include <string>

namespace int4mm {

struct Explanation {
  std::string implementation;  // The kernel's public name: "ampere", "avx2", ...; empty if it is chosen at the call.
  std::string tile;            // Its tile, in the kernel's own terms.
  // "rounded" (what dequantize returns), "exact" (scale and zero applied in f32), or "at the call" where m decides.
  std::string weights;
  std::string reason;  // One sentence: why this kernel and tile.
  int64_t workspace_bytes = 0;
};

}  // namespace int4mm
