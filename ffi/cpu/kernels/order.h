// The order in which a kernel meets the values of k. Words are loaded as they lie, and each step of a shift by one
// nibble yields a vector of weights, so the order follows from the format; the activations are put into it once a call.
//
// A lane of 32 bits holds kPack activations or weights: an f32, or two values of 16 bits, k and k + 1, which the format
// has 16 bits apart in a word.
//
// k is walked in units of 32, 64 or 128 values: min(group_size, 128), so that a unit has one scale and one zero. A unit
// of one row is kUnit / 8 words: whole tiles, or some of the words of one tile.
#pragma once

#include "core/layout.h"

namespace int4mm::cpu {

template <int kLanes, int kPack, int kInnerKTiles, int kUnitK>
struct UnitOrder {
  static constexpr int kUnit = kUnitK;
  static constexpr int kTileK = static_cast<int>(layout::TileK(kInnerKTiles));
  static constexpr int kWordsPerLane = static_cast<int>(layout::WordsPerLane(kInnerKTiles));
  static constexpr int kRowWords = 4 * kWordsPerLane;  // Words of one row in one tile; they are contiguous.
  static constexpr int kTileWords = static_cast<int>(layout::kTileN) * kRowWords;
  static constexpr bool kWholeTiles = kUnit >= kTileK;

  static constexpr int kWords = kUnit / static_cast<int>(layout::kNibblesPerWord);
  // Of each lane of the tile: the words that are in the unit.
  static constexpr int kUnitWordsPerLane = kWholeTiles ? kWordsPerLane : kWords / 4;
  // Where a vector has more lanes than the unit has words, neighbouring lanes hold the parts of one word.
  static constexpr int kWordVectors = kWords > kLanes ? kWords / kLanes : 1;
  static constexpr int kParts = kLanes > kWords ? kLanes / kWords : 1;
  static constexpr int kNibblesPerValue = static_cast<int>(layout::kNibblesPerWord) / kPack;
  static constexpr int kSteps = kNibblesPerValue / kParts;

  // The smallest k, relative to the unit, in the unit's `word`-th word, in memory order.
  static constexpr int WordK(int word) {
    const int tile = word / (4 * kUnitWordsPerLane);
    const int lane = word / kUnitWordsPerLane % 4;
    return kTileK * tile + 32 * (word % kUnitWordsPerLane) + 2 * lane;
  }

  // What the nibble at bit 4 * nibble adds: the inverse of layout::BitOffset.
  static constexpr int NibbleK(int nibble) { return 16 * ((nibble >> 1) & 1) + 8 * (nibble & 1) + (nibble >> 2); }

  // The k, relative to the unit, of position 0 .. kUnit-1 of the kernel's order.
  static constexpr int K(int position) {
    const int lane = position / kPack % kLanes;
    const int step = position / kPack / kLanes % kSteps;
    const int vector = position / kPack / kLanes / kSteps;
    return WordK(vector * kLanes + lane / kParts) +
           NibbleK(step + kSteps * (lane % kParts) + kNibblesPerValue * (position % kPack));
  }
};

}  // namespace int4mm::cpu
