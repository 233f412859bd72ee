// The packed int4 format as constexpr index functions: the C++ twin of jax_int4mm/layout.py; docs/format.md is the
// specification. For q[n][k] in 0..15 and inner_k_tiles in {2, 4, 8} the packed array is int32
//   [n / 8][k / (16 * inner_k_tiles)][32 lanes][inner_k_tiles / 2 words].
#pragma once

#include <cstdint>

namespace int4mm::layout {

inline constexpr int64_t kTileN = 8;   // Rows of n in one tile: the columns of an mma.m16n8k16 B fragment.
inline constexpr int64_t kLanes = 32;  // One warp reads one tile.
inline constexpr int64_t kWordK = 32;  // A word holds 8 nibbles of one row, spread over 32 values of k.
inline constexpr int64_t kNibblesPerWord = 8;

// Values of k in one tile: 16 * inner_k_tiles.
constexpr int64_t TileK(int64_t inner_k_tiles) { return 16 * inner_k_tiles; }

// 32-bit words that one lane holds of one tile.
constexpr int64_t WordsPerLane(int64_t inner_k_tiles) { return inner_k_tiles / 2; }

// 32-bit words of the whole packed array.
constexpr int64_t PackedWords(int64_t n, int64_t k) { return n * k / kNibblesPerWord; }

// The lane that holds q[n][k].
constexpr int64_t Lane(int64_t n, int64_t k) { return 4 * (n & 7) + ((k >> 1) & 3); }

// The word (flat index into the packed array of a weight with `size_k` values of k) that holds q[n][k].
constexpr int64_t WordIndex(int64_t n, int64_t k, int64_t size_k, int64_t inner_k_tiles) {
  const int64_t tile_k = TileK(inner_k_tiles);
  const int64_t tile = (n >> 3) * (size_k / tile_k) + k / tile_k;
  const int64_t word = (k % tile_k) >> 5;
  return (tile * kLanes + Lane(n, k)) * WordsPerLane(inner_k_tiles) + word;
}

// The least significant bit of the nibble of q[n][k] in its word: even k in the low half in the order k, k+8, k+16,
// k+24 and odd k in the high half, so that (word >> 4 * i) & 0x000F000F is a pair of neighbours in k.
constexpr int BitOffset(int64_t k) { return static_cast<int>(16 * (k & 1) + 8 * ((k >> 4) & 1) + 4 * ((k >> 3) & 1)); }

constexpr uint32_t Nibble(uint32_t word, int64_t k) { return (word >> BitOffset(k)) & 0xFu; }

// The scale of (group, n) in scales_and_zeros [k / group_size][n][2]; the zero follows it.
constexpr int64_t ScaleIndex(int64_t group, int64_t n, int64_t size_n) { return 2 * (group * size_n + n); }

}  // namespace int4mm::layout
