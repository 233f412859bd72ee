// The order in which a kernel meets the values of k. Words are loaded as they lie, and each step of a shift by one
// nibble yields a vector of weights, so the order follows from the format; the activations are put into it once a call.
//
// k is walked in units of 32, 64 or 128 values: min(group_size, 128), so that a unit has one scale and one zero. A unit
// of one row is kUnit / 8 words: whole tiles, or some of the words of one tile.
#pragma once

#include "core/layout.h"

namespace int4mm::cpu {

template <int kLanes, int kInnerKTiles, int kUnit>
struct UnitOrder {
  static constexpr int kTileK = static_cast<int>(layout::TileK(kInnerKTiles));
  static constexpr int kWordsPerLane = static_cast<int>(layout::WordsPerLane(kInnerKTiles));
  static constexpr int kRowWords = 4 * kWordsPerLane;  // Words of one row in one tile; they are contiguous.
  static constexpr int kTileWords = static_cast<int>(layout::kTileN) * kRowWords;
  static constexpr bool kWholeTiles = kUnit >= kTileK;

  static constexpr int kWords = kUnit / static_cast<int>(layout::kNibblesPerWord);
  // A vector with more lanes than the unit has words holds copies of them, each copy shifted to its own nibbles.
  static constexpr int kWordVectors = kWords > kLanes ? kWords / kLanes : 1;
  static constexpr int kCopies = kLanes > kWords ? kLanes / kWords : 1;
  static constexpr int kSteps = static_cast<int>(layout::kNibblesPerWord) / kCopies;

  // The smallest k, relative to the unit, in the `word`-th word as the kernels load them: in memory order where the
  // unit is whole tiles; otherwise the four lanes' words of one j, then those of the next.
  static constexpr int WordK(int word) {
    if (!kWholeTiles) return 32 * (word / 4) + 2 * (word % 4);
    const int in_tile = word % kRowWords;
    return kTileK * (word / kRowWords) + 32 * (in_tile % kWordsPerLane) + 2 * (in_tile / kWordsPerLane);
  }

  // What the nibble at bit 4 * nibble adds: the inverse of layout::BitOffset.
  static constexpr int NibbleK(int nibble) { return 16 * ((nibble >> 1) & 1) + 8 * (nibble & 1) + (nibble >> 2); }

  // The k, relative to the unit, of position 0 .. kUnit-1 of the kernel's order.
  static constexpr int K(int position) {
    const int lane = position % kLanes;
    const int step = position / kLanes % kSteps;
    const int vector = position / kLanes / kSteps;
    const int word = kLanes >= kWords ? lane % kWords : vector * kLanes + lane;
    return WordK(word) + NibbleK(step + kSteps * (lane / kWords));
  }
};

}  // namespace int4mm::cpu
