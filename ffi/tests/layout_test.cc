// The index functions against the format's specification, worded again, over whole weights.
#include "core/layout.h"

#include <cstdint>
#include <vector>

#include "tests/check.h"

namespace int4mm::layout {
namespace {

// Where the specification's nested array [n/8][k/(16 ikt)][4 * (n & 7) + lane_k][ikt/2] holds q[n][k].
int64_t SpecifiedWord(int64_t n, int64_t k, int64_t size_k, int64_t ikt) {
  const int64_t shape[4] = {0, size_k / (16 * ikt), 32, ikt / 2};
  const int64_t index[4] = {n / 8, k / (16 * ikt), (n % 8) * 4 + (k % 8) / 2, (k % (16 * ikt)) / 32};
  int64_t flat = 0;
  for (int d = 0; d < 4; ++d) flat = flat * shape[d] + index[d];
  return flat;
}

// The order of the eight nibbles of a word, least significant first, as values of k within 32.
int SpecifiedBit(int64_t k) {
  const int first = static_cast<int>(k % 8) / 2 * 2;
  const int order[8] = {first, first + 8, first + 16, first + 24, first + 1, first + 9, first + 17, first + 25};
  for (int nibble = 0; nibble < 8; ++nibble) {
    if (order[nibble] == k % 32) return 4 * nibble;
  }
  return -1;
}

void TestIndicesAndBijection() {
  for (const int64_t ikt : {2, 4, 8}) {
    for (const int64_t n_size : {8, 24}) {
      const int64_t k_size = 3 * TileK(ikt);
      std::vector<int> seen(static_cast<size_t>(n_size * k_size));
      for (int64_t n = 0; n < n_size; ++n) {
        for (int64_t k = 0; k < k_size; ++k) {
          const int64_t word = WordIndex(n, k, k_size, ikt);
          const int bit = BitOffset(k);
          EXPECT(word == SpecifiedWord(n, k, k_size, ikt)) << "n=" << n << " k=" << k << " inner_k_tiles=" << ikt;
          EXPECT(bit == SpecifiedBit(k)) << "k=" << k << " bit=" << bit;
          EXPECT(word >= 0 && word < PackedWords(n_size, k_size)) << word;
          if (word >= 0 && word < PackedWords(n_size, k_size)) ++seen[static_cast<size_t>(word * 8 + bit / 4)];
        }
      }
      for (size_t nibble = 0; nibble < seen.size(); ++nibble) {
        EXPECT(seen[nibble] == 1) << "nibble " << nibble << " is used " << seen[nibble] << " times";
      }
    }
  }
}

void TestNibbleReadsWhatItsBitsHold() {
  const uint32_t word = 0x76543210u;
  EXPECT(Nibble(word, 0) == 0) << Nibble(word, 0);
  EXPECT(Nibble(word, 8) == 1) << Nibble(word, 8);
  EXPECT(Nibble(word, 16) == 2) << Nibble(word, 16);
  EXPECT(Nibble(word, 24) == 3) << Nibble(word, 24);
  EXPECT(Nibble(word, 1) == 4) << Nibble(word, 1);
  EXPECT(Nibble(word, 25) == 7) << Nibble(word, 25);
  EXPECT(Nibble(0xF0000000u, 31) == 15) << Nibble(0xF0000000u, 31);
}

// One row's words of one tile are contiguous: the kernels read them as one piece.
void TestRowsOfATileAreContiguous() {
  for (const int64_t ikt : {2, 4, 8}) {
    const int64_t k_size = 2 * TileK(ikt);
    for (int64_t n = 0; n < 8; ++n) {
      for (int64_t k = 0; k < TileK(ikt); ++k) {
        const int64_t offset = WordIndex(n, k, k_size, ikt) - WordIndex(n, 0, k_size, ikt);
        EXPECT(offset >= 0 && offset < 4 * WordsPerLane(ikt)) << "n=" << n << " k=" << k << " offset=" << offset;
      }
    }
  }
}

void TestLargeIndices() {
  const int64_t n = (int64_t{1} << 20) + 5;
  const int64_t k_size = int64_t{1} << 16;
  const int64_t k = k_size - 1;
  EXPECT(WordIndex(n, k, k_size, 8) == SpecifiedWord(n, k, k_size, 8)) << WordIndex(n, k, k_size, 8);
  EXPECT(WordIndex(n, k, k_size, 8) > INT32_MAX);
}

void TestScaleIndex() {
  EXPECT(ScaleIndex(0, 0, 24) == 0);
  EXPECT(ScaleIndex(0, 23, 24) == 46);
  EXPECT(ScaleIndex(2, 1, 24) == 98) << ScaleIndex(2, 1, 24);
}

}  // namespace
}  // namespace int4mm::layout

int main() {
  using namespace int4mm::layout;
  TestIndicesAndBijection();
  TestNibbleReadsWhatItsBitsHold();
  TestRowsOfATileAreContiguous();
  TestLargeIndices();
  TestScaleIndex();
  return int4mm::test::Result();
}
