// The tiles of the ampere kernel, shared by the plan (host code, no CUDA) and the instantiations.
#pragma once

#include <array>
#include <cstdint>

namespace int4mm::cuda::ampere {

// Values of k per pipeline step: one 16-byte load per lane and n-tile with inner_k_tiles = 8.
inline constexpr int kStepK = 128;

// A CTA computes `TileN()` rows of w times `tokens` rows of x. Its warps form `warps_k` slices, which take k steps in
// turn, of `warps_n` warps each, which take different rows of w; the slices' partial sums meet in shared memory.
struct Config {
  int tokens;    // Rows of x per CTA: a multiple of 8.
  int pairs;     // Row tiles of 16 per warp: two packed n-tiles stacked are one A fragment.
  int warps_n;   // Warps side by side along n.
  int warps_k;   // Slices of k.
  int stages;    // Depth of the cp.async ring of x and scales, in k steps.
  int ring;      // Depth of the register ring of packed weights, in k steps.
  int min_ctas;  // CTAs per SM that registers and shared memory leave room for.

  constexpr int TileN() const { return 16 * pairs * warps_n; }
  constexpr int Threads() const { return 32 * warps_n * warps_k; }
  // One stage of one slice: x [tokens][kStepK] and (scale, zero) [kStepK / 32][TileN()].
  constexpr int StageBytes() const { return tokens * kStepK * 2 + (kStepK / 32) * TileN() * 4; }
  // f32 partial sums of one slice; the row pitch keeps fragment stores free of bank conflicts.
  constexpr int PartialPitch() const { return TileN() + 4; }
  constexpr int PartialBytes() const { return tokens * PartialPitch() * 4; }
  constexpr int SharedBytes() const {
    const int pipeline = warps_k * stages * StageBytes();
    const int partials = warps_k * PartialBytes();
    return pipeline > partials ? pipeline : partials;
  }
};

// Every tile fits the 99 KB of shared memory that sm_86, sm_89 and sm_120 give a CTA.
inline constexpr std::array<Config, 7> kConfigs = {{
    {8, 1, 1, 8, 4, 4, 2},    // decode: 16 rows of w x 8 tokens
    {8, 2, 1, 4, 4, 2, 4},    // decode: 32 x 8
    {16, 1, 1, 8, 2, 4, 2},   // decode: 16 x 16
    {32, 1, 2, 4, 2, 2, 2},   // 32 x 32
    {64, 1, 2, 2, 2, 2, 3},   // 32 x 64
    {64, 2, 4, 2, 2, 1, 1},   // 128 x 64
    {128, 2, 4, 1, 2, 2, 2},  // prefill: 128 x 128
}};

}  // namespace int4mm::cuda::ampere
