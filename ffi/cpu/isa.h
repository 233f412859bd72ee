// The instruction sets that the CPU kernels are written for, and how each one blocks the loop nest. Plain C++, so that
// the planner, which is compiled for the oldest CPU, and the kernels read the same figures.
#pragma once

#include "core/ceil_div.h"
#include "core/problem.h"

namespace int4mm::cpu {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx, kNeon };

constexpr const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
    case Isa::kNeon:
      return "neon";
  }
  return "";
}

constexpr bool MultipliesPairs(Isa isa) { return isa == Isa::kAvx512Bf16 || isa == Isa::kAmx; }
constexpr bool Is512Bits(Isa isa) { return isa == Isa::kAvx512 || MultipliesPairs(isa); }
constexpr bool Has32Registers(Isa isa) { return Is512Bits(isa) || isa == Isa::kNeon; }

// Those whose instructions multiply pairs of bfloat16 have none for float16.
constexpr bool Multiplies(Isa isa, DType dtype) { return !MultipliesPairs(isa) || dtype == DType::kBFloat16; }

// Rows of w by tokens whose sums are in registers. Rows are 4 or 8: they divide the 8 of a packed tile.
struct RegisterBlock {
  int rows;
  int tokens;
};

// Up to this many tokens each weight goes from its table straight to the sums; with more, w is written to a panel in
// cache first. Measured on Zen 4: where registers are few, writing the panel pays at once.
constexpr int MaxDirectTokens(Isa isa) { return isa == Isa::kAmx ? 0 : Has32Registers(isa) ? 8 : 1; }

// From so many tokens on kAmx is chosen, where the CPU has it: tiles take 16 of them in the time of one.
inline constexpr int kFewestTileTokens = 3;

// Up to so many tokens kAvx512Bf16 multiplies by weights that are not rounded: while making their tables, one a row and
// group, is more work than scaling the sums of a group, one a row, group and token. Measured on Zen 4. k is gone
// through in units.
constexpr int MaxExactTokens(int64_t group_size) { return group_size <= 64 ? 8 : 2; }
inline constexpr int kExactUnit = 128;
constexpr int64_t ExactGroup(int64_t group_size) { return group_size < kExactUnit ? group_size : kExactUnit; }

// As many tokens at a time as evenly make `tokens`, but no more than 4: their sums, tables and words fill 32 registers.
constexpr RegisterBlock DirectBlock(Isa isa, int tokens) {
  constexpr int kMost = 4;
  const int passes = (tokens + kMost - 1) / kMost;
  return {Is512Bits(isa) && tokens == 1 ? 8 : 4, (tokens + passes - 1) / passes};
}

constexpr RegisterBlock PanelBlock(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kNeon:
      return {8, 3};  // 24 of 32 registers hold sums.
    case Isa::kAmx:
      return {32, 32};  // Four of eight tile registers hold sums.
    case Isa::kAvx2:
      return {4, 3};  // 12 of 16.
    case Isa::kScalar:
      break;
  }
  return {4, 1};  // 8 of 16 where a vector of 8 lanes is two registers.
}

// The panel: one packed tile's rows, and the lanes of k that it holds at a time: 16 KiB, half of a small L1 cache. The
// lanes of the sums are added up once a slab, which a longer slab does less often.
inline constexpr int kPanelRows = 8;
inline constexpr int kDirectRows = 16;  // Whose scales and zeros share a cache line: their sums are kept slab by slab.
inline constexpr int kSlab = 512;       // Lanes of 32 bits; a multiple of every group size and of every tile of k.

// Tokens whose activations are ordered at a time, about: w is dequantised once for each such pass. Bounded by what a
// slab of them takes of an L2 cache, which is 1 MiB or more where vectors have 512 bits.
constexpr int MaxTokensPerPass(Isa isa) { return Is512Bits(isa) && isa != Isa::kAmx ? 264 : 128; }

// A tile register is a matrix of so many rows, each of so many lanes of 32 bits. Of few tokens as many rows as there
// are registers for sums are multiplied at a time, of more half of them. The panel is 32 or 16 KiB.
inline constexpr int kTileEdge = 16;
inline constexpr int kTileBlockRows = 4 * kTileEdge;
inline constexpr int kTileSlab = 128;  // As kSlab, of which it is a divisor.
constexpr int64_t WholeTiles(int64_t size) { return CeilDiv(size, kTileEdge) * kTileEdge; }

}  // namespace int4mm::cpu
