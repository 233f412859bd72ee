// The tiles of the ampere kernel, shared by the plan (host code, no CUDA) and the instantiations.
#pragma once

#include <array>
#include <cstdint>

namespace int4mm::cuda::ampere {

// Values of k per pipeline step: one 16-byte load per lane and n-tile with inner_k_tiles = 8.
inline constexpr int kStepK = 128;

// Token tiles of one band share the rows of w that they take at one time.
inline constexpr int kBandTokens = 512;

// A CTA computes `TileN()` rows of w times `tokens` rows of x. Its warps form `warps_k` slices of k of `warps_n` warps
// each, which take different rows of w; the slices' partial sums meet in shared memory. Slices take whole k steps in
// turn, or, where packed words are staged, each a part of every step.
struct Config {
  int tokens;    // Rows of x per CTA: a multiple of 8.
  int pairs;     // Row tiles of 16 per warp: two packed n-tiles stacked are one A fragment.
  int warps_n;   // Warps side by side along n.
  int warps_k;   // Slices of k.
  int stages;    // Depth of the cp.async ring.
  int ring;      // Depth of the register ring of packed weights, in k steps; 0 where they are in the cp.async ring.
  int min_ctas;  // CTAs per SM that registers and shared memory leave room for.

  constexpr bool Staged() const { return ring == 0; }
  constexpr int TileN() const { return 16 * pairs * warps_n; }
  constexpr int Threads() const { return 32 * warps_n * warps_k; }
  // One stage: x [tokens][kStepK], (scale, zero) [kStepK / 32][TileN()] and, where staged, packed words.
  constexpr int StageBytes() const {
    return tokens * kStepK * 2 + (kStepK / 32) * TileN() * 4 + (Staged() ? TileN() * kStepK / 2 : 0);
  }
  // f32 partial sums of one slice; the row pitch keeps fragment stores free of bank conflicts.
  constexpr int PartialPitch() const { return TileN() + 4; }
  constexpr int PartialBytes() const { return tokens * PartialPitch() * 4; }
  constexpr int SharedBytes() const {
    // A staged tile has one ring, another one a slice.
    const int pipeline = (Staged() ? 1 : warps_k) * stages * StageBytes();
    const int partials = warps_k * PartialBytes();
    return pipeline > partials ? pipeline : partials;
  }
};

// Every tile fits the 99 KB of shared memory that sm_86, sm_89 and sm_120 give a CTA.
inline constexpr std::array<Config, 8> kConfigs = {{
    {8, 1, 1, 8, 4, 4, 2},   // decode: 16 rows of w x 8 tokens
    {8, 2, 1, 4, 4, 2, 4},   // decode: 32 x 8
    {16, 1, 1, 8, 2, 4, 2},  // decode: 16 x 16
    {32, 1, 2, 4, 2, 2, 2},  // 32 x 32
    {32, 2, 2, 2, 4, 0, 3},  // 64 x 32
    {32, 2, 4, 1, 4, 0, 3},  // 128 x 32
    {64, 2, 2, 2, 3, 0, 2},  // 64 x 64
    {64, 2, 4, 1, 3, 0, 2},  // prefill: 128 x 64
}};

}  // namespace int4mm::cuda::ampere
