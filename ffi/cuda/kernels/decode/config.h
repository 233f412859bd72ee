// The tiles and schedules of the decode kernel, shared by the plan (host code, no CUDA) and the instantiations.
#pragma once

#include <array>
#include <cstdint>

namespace int4mm::cuda::decode {

// Values of k per step of a warp: one 16-byte load per lane and n-tile with inner_k_tiles = 8, the only one supported.
inline constexpr int kStepK = 128;
// Bytes of the packed words of 16 rows of w in one step.
inline constexpr int kPairBytes = 16 * kStepK / 2;

// What is compiled in: the shape of a warp's step, `pairs` row tiles of 16 times kStepK times up to `tokens` rows of x.
struct Config {
  int tokens;      // Rows of x: 8 or 16.
  int pairs;       // Row tiles of 16 of a step: two packed n-tiles stacked are one A fragment.
  int ahead;       // Steps whose copies are under way while one is computed.
  int at_once;     // Row tiles whose instructions are interleaved, where warps are too few to hide their latency.
  int most_warps;  // Of a CTA; sets the registers of a thread.

  constexpr int Rows() const { return 16 * pairs; }
  // Copied for one step: packed words; then x [tokens][kStepK] and (scale, zero) [groups][Rows()].
  constexpr int WordBytes() const { return pairs * kPairBytes; }
  constexpr int StageBytes(int most_tokens, int groups) const { return most_tokens * kStepK * 2 + groups * Rows() * 4; }
  // A warp's ring of words and, one longer, its ring of stages.
  constexpr int RingBytes(int stage_bytes) const { return ahead * WordBytes() + (ahead + 1) * stage_bytes; }
};

// How a product is spread over the GPU, decided by the plan; those of a batch are alike. A CTA owns neighbouring
// n-tiles and all of k. It takes its n-tiles in chunks; in a chunk its warps form warps_k slices of k of warps_n warps
// each, and every warp has warp_pairs row tiles of its own.
struct Schedule {
  int ctas = 0;          // Side by side along n,
  int token_blocks = 0;  // and for every so many tokens of the config.
  int warps_k = 0;       // A multiple of 4.
  int warps_n = 0;       // At most 4.
  int warp_pairs = 0;    // At most the config's pairs.
  int chunk_tiles = 0;   // n-tiles of a chunk, even.
  int chunks = 0;
  int shared_bytes = 0;

  constexpr int Warps() const { return warps_k * warps_n; }
};

// Scales of how many groups a step holds: those of one group cover it, or four quarters have their own.
constexpr int GroupsPerStep(int64_t group_size) { return group_size >= kStepK ? 1 : 4; }

// f32 partial sums of a warp, as lanes hold them. They fit its ring of packed words, and take its place at the end.
constexpr int PartialBytes(const Config& c, int warp_pairs) { return warp_pairs * 16 * c.tokens * 4; }

// `tokens` are those that a CTA has: m, at most the config's. While other chunks follow, the ring stays in use, and two
// buffers of partial sums take turns.
constexpr int SharedBytes(const Config& c, const Schedule& s, int tokens, int groups) {
  const int rings = c.RingBytes(c.StageBytes(tokens, groups));
  return s.Warps() * (rings + (s.chunks > 1 ? 2 * PartialBytes(c, s.warp_pairs) : 0));
}

inline constexpr std::array<Config, 4> kConfigs = {{
    {8, 2, 2, 1, 16},   // 32 rows of w x 8 tokens
    {8, 4, 1, 1, 16},   // 64 x 8
    {16, 2, 2, 1, 12},  // 32 x 16
    {16, 7, 1, 2, 8},   // 112 x 16
}};

}  // namespace int4mm::cuda::decode
