// The tiles and schedules of the Hopper kernel, shared by the plan (host code, no CUDA) and the instantiations.
#pragma once

#include <array>
#include <cstdint>

#include "core/ceil_div.h"

namespace int4mm::cuda::hopper {

inline constexpr int kStepK = 128;   // Values of k of a stage.
inline constexpr int kBoxK = 64;     // Of a copied box of x: 128 bytes, the width of the swizzle.
inline constexpr int kRowTile = 64;  // Rows of w of a warpgroup, the height of a wgmma.
inline constexpr int kMostStages = 16;
inline constexpr int kStageAlignment = 1024;  // Bytes; the swizzle repeats.
inline constexpr int kBarrierBytes = 3 * 8 * kMostStages;

// What is compiled in: a CTA's tile of y^T, rows of w by tokens.
struct Config {
  int warpgroups;  // That multiply, 2 to 4, each 64 rows; one more copies.
  int tokens;      // A multiple of 16, at most 256.
  int batch;       // Words of each n-tile (of the 4 of a step) whose products are started together: 1, 2 or 4.

  constexpr int Threads() const { return 128 * (1 + warpgroups); }
  constexpr int Rows() const { return kRowTile * warpgroups; }
  // A stage: x [2][tokens][kBoxK], packed words [Rows() / 8][kStepK], (scale, zero) [groups][Rows()]. At the end of a
  // tile, stages hold y of two warpgroups each, [2][tokens][kRowTile].
  constexpr int XBytes() const { return tokens * kStepK * 2; }
  constexpr int WordBytes() const { return Rows() * kStepK / 2; }
  constexpr int ScaleBytes(int groups) const { return groups * Rows() * 4; }
  constexpr int CopiedBytes(int groups) const { return XBytes() + WordBytes() + ScaleBytes(groups); }
  constexpr int StageBytes(int groups) const { return CeilDiv(CopiedBytes(groups), kStageAlignment) * kStageAlignment; }
  constexpr int OutputStages() const { return (warpgroups + 1) / 2; }
  // All that a multiprocessor has, 65536, are divided unevenly.
  constexpr int MultiplierRegisters() const { return warpgroups == 2 ? 232 : warpgroups == 3 ? 160 : 112; }
  constexpr int OtherRegisters() const { return warpgroups == 2 ? 40 : 32; }
  // Whether a thread has registers for a second set of sums.
  constexpr bool Stretches() const { return tokens <= (warpgroups == 2 ? 128 : warpgroups == 3 ? 96 : 64); }
  // CTAs that share a tile send each other f32 sums, of blocks of 8 tokens. Each owns every split_k-th block, and has a
  // place for that of each of the split_k CTAs.
  constexpr int SumsBytes() const { return 128 * warpgroups * 16; }
  constexpr int ExchangeBytes(int split_k) const { return CeilDiv(tokens / 8, split_k) * split_k * SumsBytes(); }
};

// How one call is spread over the GPU, decided by the plan. `split_k` CTAs, a cluster, share a tile: each sums its part
// of k, and then their sums meet. Clusters take tiles in turn. Where few tiles are left for the last turn, each of them
// is divided by rows: as many CTAs as it has warpgroups compute 64 rows each.
struct Schedule {
  int clusters = 0;
  int divided_tiles = 0;  // The last so many.
  int split_k = 0;        // 1, 2, 4 or 8.
  int stages = 0;
  int shared_bytes = 0;
};

// Groups whose scales a step needs.
constexpr int GroupsPerStep(int64_t group_size) {
  return group_size >= kStepK ? 1 : static_cast<int>(kStepK / group_size);
}

inline constexpr std::array<Config, 26> kConfigs = {{
    {2, 16, 4},   // 128 rows of w x 16 tokens
    {2, 32, 4},   // 128 x 32
    {4, 32, 4},   // 256 x 32
    {2, 48, 4},   // 128 x 48
    {2, 64, 4},   // 128 x 64
    {3, 64, 4},   // 192 x 64
    {4, 64, 4},   // 256 x 64
    {2, 80, 4},   // 128 x 80
    {2, 96, 4},   // 128 x 96
    {3, 96, 4},   // 192 x 96
    {2, 112, 4},  // 128 x 112
    {3, 112, 1},  // 192 x 112
    {2, 128, 4},  // 128 x 128
    {3, 128, 2},  // 192 x 128
    {2, 144, 2},  // 128 x 144
    {2, 160, 2},  // 128 x 160
    {3, 144, 2},  // 192 x 144
    {3, 160, 2},  // 192 x 160
    {2, 176, 2},  // 128 x 176
    {3, 176, 2},  // 192 x 176
    {2, 192, 2},  // 128 x 192
    {3, 192, 1},  // 192 x 192
    {2, 208, 2},  // 128 x 208
    {2, 224, 2},  // 128 x 224
    {2, 240, 2},  // 128 x 240
    {2, 256, 2},  // 128 x 256
}};

}  // namespace int4mm::cuda::hopper
