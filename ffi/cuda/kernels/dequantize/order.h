// What each lane of the dequantize kernel loads, and where it stores what: constexpr functions, so that a CTest walks
// whole weights through them on the host and compares with core/layout.h.
//
// A strip is 32 values of k of one row: four words, and 64 bytes of w. A piece is the 8 rows of an n-tile by four
// strips. Its words lie together whatever inner_k_tiles is, 16 bytes for each lane of a warp; of w it is 256 bytes of
// each of its rows.
#pragma once

#include <cstdint>

#include "core/ceil_div.h"
#include "core/layout.h"
#include "core/problem.h"

namespace int4mm::cuda::dequantize {

inline constexpr uint32_t kRows = layout::kTileN;
inline constexpr uint32_t kStripK = layout::kWordK;
inline constexpr uint32_t kPieceStrips = 4;
inline constexpr uint32_t kPieceK = kPieceStrips * kStripK;
inline constexpr uint32_t kPiecesOfWarp = 2;  // Neighbours, both loaded before the first is stored.
inline constexpr uint32_t kWarps = 4;         // Of a CTA.
inline constexpr uint32_t kStores = 4;        // Of a lane for one piece, 16 bytes each.

// Divides numbers below 2^31 by one that is not known when the kernel is compiled: multiplies by its reciprocal,
// rounded up so little that the quotient is exact (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t value;
  uint32_t reciprocal;
  uint32_t shift;

  constexpr uint32_t Divide(uint32_t dividend) const {
    return static_cast<uint32_t>(uint64_t{dividend} * reciprocal >> shift);
  }
};

// 1 <= value < 2^31.
constexpr Divisor MakeDivisor(uint32_t value) {
  uint32_t bits = 0;
  while ((uint64_t{1} << bits) < value) ++bits;
  const uint32_t shift = 31 + bits;
  return {value, static_cast<uint32_t>(CeilDiv(uint64_t{1} << shift, uint64_t{value})), shift};
}

// The batch of weights as pieces that are counted along a row, then from n-tile to n-tile, then from weight to weight.
struct Sizes {
  Divisor tiles_n;       // n-tiles of one weight.
  Divisor row_pieces;    // Pieces that cover a row of w; the last may have fewer strips than others.
  uint32_t row_strips;   // Strips of a row of w.
  uint32_t group_shift;  // log2 of the strips of a group.
  uint32_t pieces;       // Of all.
};

// So that strips, too, are counted in 32 bits.
inline constexpr int64_t kMostPieces = (int64_t{1} << 30) - 1;

constexpr int64_t PieceCount(const DequantizeProblem& p) {
  return p.batch * (p.n / kRows) * CeilDiv(p.k, int64_t{kPieceK});
}

// Of a problem whose PieceCount is from 1 to kMostPieces.
constexpr Sizes SizesOf(const DequantizeProblem& p) {
  const uint32_t group_shift = p.group_size == 32 ? 0 : p.group_size == 64 ? 1 : p.group_size == 128 ? 2 : 3;
  return {MakeDivisor(static_cast<uint32_t>(p.n / kRows)),
          MakeDivisor(static_cast<uint32_t>(CeilDiv(p.k, int64_t{kPieceK}))), static_cast<uint32_t>(p.k / kStripK),
          group_shift, static_cast<uint32_t>(PieceCount(p))};
}

constexpr uint32_t CtaCount(const Sizes& s) { return CeilDiv(s.pieces, kWarps * kPiecesOfWarp); }

struct Piece {
  uint32_t tile;    // n-tile, counted through the batch.
  uint32_t column;  // How many pieces are before it in its rows.
  uint32_t strips;  // None past the last piece.
};

constexpr Piece PieceAt(const Sizes& s, uint32_t index) {
  const uint32_t tile = s.row_pieces.Divide(index);
  const uint32_t column = index - tile * s.row_pieces.value;
  const uint32_t rest = s.row_strips - column * kPieceStrips;
  return {tile, column, index >= s.pieces ? 0 : rest < kPieceStrips ? rest : kPieceStrips};
}

// In packed: the first of the four words that a lane loads.
constexpr int64_t WordOffset(const Sizes& s, const Piece& piece, uint32_t lane) {
  constexpr uint32_t kTileWords = kRows * kStripK / layout::kNibblesPerWord;  // Of its 8 rows by one strip.
  return (int64_t{piece.tile} * s.row_strips + int64_t{piece.column} * kPieceStrips) * kTileWords + 4 * lane;
}

// In scales_and_zeros, counted in pairs of scale and zero.
constexpr int64_t PairOffset(const Sizes& s, const Piece& piece, uint32_t row, uint32_t strip) {
  const uint32_t weight = s.tiles_n.Divide(piece.tile);
  const uint32_t groups = s.row_strips >> s.group_shift;
  const uint32_t group = (piece.column * kPieceStrips + strip) >> s.group_shift;
  const uint32_t tile = piece.tile - weight * s.tiles_n.value;
  return ((int64_t{weight} * groups + group) * s.tiles_n.value + tile) * kRows + row;
}

// The four words of a strip are loaded by one, two or four lanes, with inner_k_tiles 2, 4 or 8. In so many rounds, by
// exchanging two words with lane ^ (1 << round), each lane comes to hold a strip.
constexpr int Rounds(uint32_t inner_k_tiles) { return inner_k_tiles == 8 ? 2 : inner_k_tiles == 4 ? 1 : 0; }

// Of the two words of which a lane gives one in a round, the first; the other is 1 << round words behind it.
constexpr uint32_t FirstOfTwo(int round, uint32_t i) { return round == 0 ? 2 * i : i; }

// The word that a lane gives, for i = 0 and 1.
constexpr uint32_t Given(const uint32_t (&words)[4], uint32_t lane, int round, uint32_t i) {
  const uint32_t first = FirstOfTwo(round, i);
  return (lane >> round & 1) != 0 ? words[first] : words[first + (1 << round)];
}

// What it gets takes the place of what it gave.
constexpr void Take(uint32_t (&words)[4], uint32_t lane, int round, uint32_t i, uint32_t word) {
  const uint32_t first = FirstOfTwo(round, i);
  const uint32_t second = first + (1 << round);
  const bool gave_first = (lane >> round & 1) != 0;
  words[first] = gave_first ? word : words[first];
  words[second] = gave_first ? words[second] : word;
}

// Strips of a row in one tile of the packed format.
constexpr uint32_t TileStrips(uint32_t inner_k_tiles) { return inner_k_tiles / 2; }

// The strip that a lane then holds. Until then it shares it with its partners, whose tile has the same strips.
constexpr uint32_t HeldRow(uint32_t inner_k_tiles, uint32_t lane) { return lane / TileStrips(inner_k_tiles) % kRows; }
constexpr uint32_t HeldStrip(uint32_t inner_k_tiles, uint32_t lane) {
  const uint32_t strips = TileStrips(inner_k_tiles);
  return lane / (kRows * strips) * strips + lane % strips;
}

// The lane that holds a strip.
constexpr uint32_t Holder(uint32_t inner_k_tiles, uint32_t row, uint32_t strip) {
  const uint32_t strips = TileStrips(inner_k_tiles);
  return (strip / strips * kRows + row) * strips + strip % strips;
}

// Which of its four words has values 2 * i and 2 * i + 1 of each 8.
constexpr uint32_t HeldWord(uint32_t inner_k_tiles, uint32_t i) { return inner_k_tiles == 4 ? i % 2 * 2 + i / 2 : i; }

// A store of the warp is two whole rows of a piece. A lane's part of it is 8 neighbours in k of this row and strip, two
// from each word: the nibbles from this bit on and from 16 bits above it.
constexpr uint32_t StoredRow(uint32_t lane, uint32_t store) { return 2 * store + lane / 16; }
constexpr uint32_t StoredStrip(uint32_t lane) { return lane % 16 / 4; }
constexpr uint32_t StoredBit(uint32_t lane) { return lane % 4 * 4; }

// In w: the first of a lane's first 8 values, and how far it is from there to those of its next store.
constexpr int64_t OutputOffset(const Sizes& s, const Piece& piece, uint32_t lane) {
  const int64_t first_strip = (int64_t{piece.tile} * kRows + StoredRow(lane, 0)) * s.row_strips;
  return (first_strip + int64_t{piece.column} * kPieceStrips) * kStripK + 8 * (lane % 16);
}
constexpr int64_t StoreStep(const Sizes& s) { return int64_t{s.row_strips} * (2 * kStripK); }

}  // namespace int4mm::cuda::dequantize
