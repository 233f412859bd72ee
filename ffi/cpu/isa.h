// The instruction sets that the CPU kernels are written for, and how each one blocks the loop nest. Plain C++, so that
// the planner, which is compiled for the oldest CPU, and the kernels read the same figures.
#pragma once

namespace int4mm::cpu {

enum class Isa { kScalar, kAvx2, kAvx512, kNeon };

constexpr const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kNeon:
      return "neon";
  }
  return "";
}

// Register blocks, rows of w by tokens. Rows divide 8, the rows of one packed tile, and are at least 4.
struct RegisterBlock {
  int rows;
  int tokens;
};

// Up to this many tokens w is looked up in registers and used at once; with more, it is first written to a panel.
inline constexpr int kMaxDirectTokens = 4;

constexpr RegisterBlock DirectBlock(Isa isa, int tokens) {
  return {isa == Isa::kAvx512 && tokens == 1 ? 8 : 4, tokens};
}

constexpr RegisterBlock PanelBlock(Isa isa) {
  switch (isa) {
    case Isa::kAvx512:
    case Isa::kNeon:
      return {4, 6};  // 24 of 32 registers accumulate.
    case Isa::kAvx2:
      return {4, 3};  // 12 of 16.
    case Isa::kScalar:
      return {4, 1};  // 8 of 16: a vector of 8 lanes is two registers.
  }
  return {4, 1};
}

// Rows of w in one panel and the values of k that it holds at a time: 16 KiB of f32, half of a small L1 cache.
inline constexpr int kPanelRows = 16;
inline constexpr int kSlab = 256;  // A multiple of every group size and of every tile of k.

}  // namespace int4mm::cpu
