// The data flow of the dequantize kernel, every lane of every warp in turn, with the number of a word in its place:
// each value of w has to be stored once, from the word, bits, scale and zero that the format gives it.
#include <cstdint>
#include <random>
#include <vector>

#include "cuda/kernels/dequantize/order.h"
#include "tests/check.h"

namespace int4mm::cuda::dequantize {
namespace {

constexpr uint32_t kLanes = static_cast<uint32_t>(layout::kLanes);

DequantizeProblem MakeProblem(int64_t batch, int64_t n, int64_t k, int64_t group_size, int64_t inner_k_tiles) {
  return {batch, n, k, group_size, inner_k_tiles, DType::kBFloat16};
}

// Where one value of w came from.
struct Source {
  int64_t word = -1;
  uint32_t bit = 0;
  int64_t pair = -1;
};

// What the lanes of a warp hold.
struct Warp {
  uint32_t words[kLanes][4] = {};
  int64_t pairs[kLanes] = {};
};

Warp Load(const Sizes& s, const Piece& piece, uint32_t inner_k_tiles, std::vector<int>& reads) {
  Warp warp;
  for (uint32_t lane = 0; lane < kLanes; ++lane) {
    warp.pairs[lane] = -1;
    const uint32_t strip = HeldStrip(inner_k_tiles, lane);
    if (strip >= piece.strips) continue;
    const int64_t first = WordOffset(s, piece, lane);
    EXPECT(first % 4 == 0 && first >= 0 && first + 4 <= static_cast<int64_t>(reads.size())) << first;
    for (int i = 0; i < 4; ++i) {
      warp.words[lane][i] = static_cast<uint32_t>(first + i);
      ++reads.at(static_cast<size_t>(first + i));
    }
    warp.pairs[lane] = PairOffset(s, piece, HeldRow(inner_k_tiles, lane), strip);
  }
  return warp;
}

void Exchange(Warp& warp, uint32_t inner_k_tiles) {
  for (int round = 0; round < Rounds(inner_k_tiles); ++round) {
    for (uint32_t i = 0; i < 2; ++i) {
      uint32_t given[kLanes] = {};
      for (uint32_t lane = 0; lane < kLanes; ++lane) given[lane] = Given(warp.words[lane], lane, round, i);
      for (uint32_t lane = 0; lane < kLanes; ++lane) {
        Take(warp.words[lane], lane, round, i, given[lane ^ (1u << round)]);
      }
    }
  }
}

void Store(const Warp& warp, const Sizes& s, const Piece& piece, uint32_t inner_k_tiles, std::vector<Source>& w) {
  for (uint32_t store = 0; store < kStores; ++store) {
    for (uint32_t lane = 0; lane < kLanes; ++lane) {
      if (StoredStrip(lane) >= piece.strips) continue;
      const uint32_t holder = Holder(inner_k_tiles, StoredRow(lane, store), StoredStrip(lane));
      const int64_t first = OutputOffset(s, piece, lane) + store * StoreStep(s);
      EXPECT(first % 8 == 0 && first >= 0 && first + 8 <= static_cast<int64_t>(w.size())) << first;
      // The lanes before it in the row have stored what lies before.
      EXPECT(lane % 16 == 0 || first == OutputOffset(s, piece, lane - 1) + store * StoreStep(s) + 8) << lane;
      for (uint32_t i = 0; i < 8; ++i) {
        Source& source = w.at(static_cast<size_t>(first + i));
        EXPECT(source.word == -1) << "stored twice: " << first + i;
        source.word = warp.words[holder][HeldWord(inner_k_tiles, i / 2)];
        source.bit = StoredBit(lane) + 16 * (i % 2);
        source.pair = warp.pairs[holder];
      }
    }
  }
}

void Walk(const DequantizeProblem& p) {
  const Sizes s = SizesOf(p);
  const uint32_t inner_k_tiles = static_cast<uint32_t>(p.inner_k_tiles);
  const int64_t words = layout::PackedWords(p.n, p.k);
  std::vector<int> reads(static_cast<size_t>(p.batch * words));
  std::vector<Source> w(static_cast<size_t>(p.batch * p.n * p.k));
  for (uint32_t index = 0; index < CtaCount(s) * kWarps * kPiecesOfWarp; ++index) {
    const Piece piece = PieceAt(s, index);
    Warp warp = Load(s, piece, inner_k_tiles, reads);
    Exchange(warp, inner_k_tiles);
    Store(warp, s, piece, inner_k_tiles, w);
  }
  for (size_t word = 0; word < reads.size(); ++word) EXPECT(reads[word] == 1) << word << " is read " << reads[word];
  for (int64_t weight = 0, i = 0; weight < p.batch; ++weight) {
    for (int64_t n = 0; n < p.n; ++n) {
      for (int64_t k = 0; k < p.k; ++k, ++i) {
        const Source& source = w[static_cast<size_t>(i)];
        const int64_t pair = weight * (p.k / p.group_size) * p.n + layout::ScaleIndex(k / p.group_size, n, p.n) / 2;
        EXPECT(source.word == weight * words + layout::WordIndex(n, k, p.k, p.inner_k_tiles) &&
               source.bit == static_cast<uint32_t>(layout::BitOffset(k)) && source.pair == pair)
            << "batch " << p.batch << " n " << p.n << " k " << p.k << " group_size " << p.group_size
            << " inner_k_tiles " << p.inner_k_tiles << ": w[" << weight << "][" << n << "][" << k << "] of word "
            << source.word << " bit " << source.bit << " pair " << source.pair;
      }
    }
  }
}

void TestEveryValueComesFromItsPlace() {
  for (const int64_t inner_k_tiles : {2, 4, 8}) {
    for (const int64_t group_size : {32, 64, 128, 256}) {
      for (int64_t k = 32; k <= 768; k += 32) {
        if (k % layout::TileK(inner_k_tiles) != 0 || k % group_size != 0) continue;
        for (const int64_t n : {8, 16, 24, 136}) {
          for (const int64_t batch : {1, 2, 3}) Walk(MakeProblem(batch, n, k, group_size, inner_k_tiles));
        }
      }
    }
  }
}

void TestOffsetsBeyond32Bits() {
  const DequantizeProblem p = MakeProblem(3, int64_t{1} << 20, 28672, 128, 8);
  const Sizes s = SizesOf(p);
  const Piece last = PieceAt(s, s.pieces - 1);
  const int64_t weight_words = layout::PackedWords(p.n, p.k);
  EXPECT(WordOffset(s, last, 31) == 3 * weight_words - 4) << WordOffset(s, last, 31);
  EXPECT(WordOffset(s, last, 31) > INT32_MAX);
  EXPECT(OutputOffset(s, last, 31) + 3 * StoreStep(s) == 3 * p.n * p.k - 8) << OutputOffset(s, last, 31);
  EXPECT(PairOffset(s, last, 7, 3) == 3 * p.n * (p.k / p.group_size) - 1) << PairOffset(s, last, 7, 3);
}

void TestDivision() {
  std::mt19937_64 random(test::Seed());
  constexpr uint32_t kMost = INT32_MAX;
  for (uint32_t value = 1; value < 3000; ++value) {
    const Divisor divisor = MakeDivisor(value);
    for (const uint32_t multiple : {uint32_t{0}, value, kMost / value * value}) {
      EXPECT(divisor.Divide(multiple) == multiple / value) << multiple << " / " << value;
      EXPECT(multiple == 0 || divisor.Divide(multiple - 1) == multiple / value - 1) << multiple << " - 1 / " << value;
    }
  }
  for (int i = 0; i < 1000000; ++i) {
    const uint64_t shift = random() % 31;
    const uint32_t value = static_cast<uint32_t>(random() % kMost >> shift) + 1;
    const uint32_t dividend = static_cast<uint32_t>(random() % (uint64_t{kMost} + 1));
    EXPECT(MakeDivisor(value).Divide(dividend) == dividend / value) << dividend << " / " << value;
  }
}

}  // namespace
}  // namespace int4mm::cuda::dequantize

int main() {
  using namespace int4mm::cuda::dequantize;
  TestEveryValueComesFromItsPlace();
  TestOffsetsBeyond32Bits();
  TestDivision();
  return int4mm::test::Result();
}
