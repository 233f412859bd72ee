// The loop nests of the CPU kernels, written once over a Simd type S, which kernels/<isa>.cc defines in an unnamed
// namespace: everything instantiated from it stays in its file, so that no function compiled for a newer CPU is shared
// with code that runs on an older one. For the same reason nothing here calls an inline function of another header
// that could be emitted (constexpr functions excepted).
//
// S provides, with L = kLanes:
//   kIsa, kLanes, Float (L x f32), Words (L x u32), Table (16 weights)
//   kPack: weights or activations in one lane. 1: each is an f32. 2: both are of 16 bits, and Float holds 2 * L of them
//   Float Zero(), Load(const float*), MultiplyAdd(a, b, c) = a * b + c, of a and b with kPack values in each lane,
//   whose
//     products are added; void Store(float*, Float); void AddSums(Float, Float, Float, Float, float* sums): adds the
//     sum of each one's lanes to one of four sums
//   Table LoadTable(const float*); Float Lookup(Table, Words): table[low nibble of each 1/kPack of a lane]
//   Words NextNibble(Words): each 1/kPack of a lane shifted right by 4
//   void LoadUnit<Order>(const uint32_t* row, int part, Words*): the words of one row of one unit, in Order's order.
//     `row` is the row's first word in the unit's tile; the unit is the part-th of the tile, if it is less than one
//   Float Widen<dtype>(const uint16_t*); void NarrowEach<dtype>(const float*, uint16_t*): eight values
//   unsigned LoadPairs<dtype>(const uint16_t* scales_and_zeros, float* scales, float* zeros): of four rows; a mask of
//     those that need ExactTable
//   Table MakeTable<dtype>(float scale, float zero): fast, as kernels/exact_table.h tells
// and where kPack is 2
//   PairRange: what the scales and zeros are that it has been given, by Add<rows>(const uint16_t* scales_and_zeros);
//     bool Exceeded(): whether one of them is out of range
//   void FindRange(const uint16_t* x, int64_t k, unsigned* least, unsigned* most): of the sizes of what is not zero;
//   all
//     zero: least > most
//   void Scale(const uint16_t* x, float factor, uint16_t* out): of L activations
//
// Each y[m][n] is the sum over the slabs of k, in f32, of sums in the kernel's order in the L lanes of one vector,
// whose lanes are added at the end of the slab; it is rounded unless y is f32. The blocking, the number of tokens and
// the number of threads do not change a bit of it.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/layout.h"
#include "cpu/isa.h"
#include "cpu/kernels/exact_table.h"
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/order.h"

// Before a loop over sums that are to stay in registers: by itself GCC 12 unrolls it too late to take their array
// apart.
#if defined(__clang__)
#define INT4MM_UNROLL _Pragma("unroll")
#else
#define INT4MM_UNROLL _Pragma("GCC unroll 8")
#endif

namespace int4mm::cpu {

template <class S>
struct Matmul {
  using Float = typename S::Float;
  using Words = typename S::Words;
  using Table = typename S::Table;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kTileRows = static_cast<int>(layout::kTileN);

  static constexpr int64_t kWordsPerK = kTileRows / layout::kNibblesPerWord;  // Of one tile's rows.

  static constexpr int kPack = S::kPack;
  static constexpr int kSlabK = kSlab * kPack;

  static int64_t SlabLength(int64_t k, int64_t slab_begin) { return k - slab_begin < kSlabK ? k - slab_begin : kSlabK; }

  // The scales and zeros that are wanted next, beside those of `slab`, are so many values further: those of the next
  // slab, or the first ones of the rows that are `rows` further.
  static int64_t PairsAhead(const Problem& p, int64_t slab, int64_t rows) {
    return 2 * (slab + kSlabK < p.k ? kSlabK / p.group_size * p.n : rows - slab / p.group_size * p.n);
  }

  // The scales and zeros of kRows neighbouring rows in the groups of one slab.
  template <class O, int kRows>
  struct SlabPairs {
    static constexpr int kGroups = kSlabK / O::kUnit;
    float scales[kGroups][kRows];
    float zeros[kGroups][kRows];
    unsigned suspects[kGroups];  // A mask of the rows for which S::MakeTable may be wrong.

    // Of the slab that begins with k = `slab`, and of rows n .. n + kRows - 1. Asks for those of the next slab, or for
    // the first ones of the rows that are `next_rows` further.
    template <DType dtype>
    void Load(const MatmulArgs& args, int64_t n, int64_t slab, int64_t length, int64_t next_rows) {
      static_assert(kRows % 4 == 0);
      const Problem& p = args.problem;
      const uint16_t* pairs = args.operands.scales_and_zeros + layout::ScaleIndex(slab / p.group_size, n, p.n);
      const int64_t next = PairsAhead(p, slab, next_rows);
      [[maybe_unused]] typename S::PairRange range;
      for (int64_t group = 0; group < length / p.group_size; ++group, pairs += 2 * p.n) {
        __builtin_prefetch(pairs + next, 0, 2);
        suspects[group] = 0;
        for (int row = 0; row < kRows; row += 4) {
          suspects[group] |= S::template LoadPairs<dtype>(pairs + 2 * row, scales[group] + row, zeros[group] + row)
                             << row;
        }
        if constexpr (kPack == 2) range.template Add<kRows>(pairs);
      }
      if constexpr (kPack == 2) {
        if (__builtin_expect(range.Exceeded(), 0)) __atomic_store_n(args.out_of_range, true, __ATOMIC_RELAXED);
      }
    }

    // The tables of one group.
    template <DType dtype>
    void MakeTables(int group, Table* tables) const {
      for (int row = 0; row < kRows; ++row) {
        tables[row] = S::template MakeTable<dtype>(scales[group][row], zeros[group][row]);
      }
      if (__builtin_expect(suspects[group] != 0, 0)) {
        Table in_memory[kRows];  // So that the tables themselves stay in registers.
        for (int row = 0; row < kRows; ++row) in_memory[row] = tables[row];
        ExactTables<dtype>(scales[group], zeros[group], suspects[group], in_memory);
        for (int row = 0; row < kRows; ++row) tables[row] = in_memory[row];
      }
    }

    template <DType dtype>
    [[gnu::noinline]] static void ExactTables(const float* scale, const float* zero, unsigned mask, Table* tables) {
      alignas(64) float table[16];
      for (int row = 0; row < kRows; ++row) {
        if ((mask >> row & 1) == 0) continue;
        ExactTable(dtype, scale[row], zero[row], table);
        tables[row] = S::LoadTable(table);
      }
    }
  };

  template <class O>
  static int GroupInSlab(const Problem& p, int64_t k_in_slab) {
    return static_cast<int>(p.group_size == 256 ? k_in_slab / 256 : k_in_slab / O::kUnit);
  }

  // The power of two by which a token is multiplied, so that its largest value is near 2^kMostExponent. Neither
  // products nor sums of them are then subnormal, since they are multiples of the product of the units in the last
  // place of the smallest activation, of 2^kLeastExponent or more, and of the smallest scale or zero that is in range;
  // nor do they overflow, of 2^20 values of k.
  static constexpr int kMostExponent = 70;
  static constexpr int kLeastExponent = -70;
  static float TokenFactor(const MatmulArgs& args, int64_t token) {
    const int64_t k = args.problem.k;
    unsigned least;
    unsigned most;
    S::FindRange(args.operands.x + (args.first_token + token) * k, k, &least, &most);
    int exponent = 0;
    if (least <= most) {
      constexpr int kBias = 127;
      const int wanted = kMostExponent - (static_cast<int>(most >> 7) - kBias);
      constexpr int kLargest = 120;  // A token of subnormals is near 1 by that.
      exponent = wanted < kLargest ? wanted : kLargest;
      const int smallest = static_cast<int>(least >> 7) - kBias;
      const bool finite = most < 0x7F80;
      // A subnormal that would be too small is as a normal value that is larger than it: counted by its last place.
      const bool kept = least >= 0x80 ? smallest + exponent >= kLeastExponent : exponent - kBias - 6 >= kLeastExponent;
      if (!finite || !kept) {
        __atomic_store_n(args.out_of_range, true, __ATOMIC_RELAXED);
        exponent = 0;
      }
    }
    args.token_factors[token] = PowerOfTwo(-exponent);
    return PowerOfTwo(exponent);
  }

  // Of an exponent of -126 .. 127.
  static float PowerOfTwo(int exponent) {
    const uint32_t bits = static_cast<uint32_t>(exponent + 127) << 23;
    float power;
    std::memcpy(&power, &bits, sizeof(power));
    return power;
  }

  // Puts the pairs of one unit of a token into the order of the weights, scaled.
  template <class O>
  static void OrderUnit(const uint16_t* source, float factor, float* out) {
    constexpr int kUnit = O::kUnit;
    constexpr int kPairs = kUnit / 2;
    struct Positions {
      uint8_t pair[kPairs];
    };
    constexpr Positions positions = [] {
      Positions p{};
      for (int i = 0; i < kPairs; ++i) p.pair[i] = static_cast<uint8_t>(O::K(2 * i) / 2);
      return p;
    }();
    alignas(64) uint16_t scaled[kUnit];
    alignas(64) float pairs[kPairs];
    for (int i = 0; i < kUnit; i += kLanes) S::Scale(source + i, factor, scaled + i);
    std::memcpy(pairs, scaled, sizeof(pairs));
    for (int i = 0; i < kPairs; ++i) std::memcpy(out + i, pairs + positions.pair[i], sizeof(float));
  }

  // The same of a whole token.
  template <class O>
  static void OrderPairs(const MatmulArgs& args, int64_t token) {
    const int64_t k = args.problem.k;
    const uint16_t* source = args.operands.x + (args.first_token + token) * k;
    const float factor = TokenFactor(args, token);
    for (int64_t slab = 0; slab < k; slab += kSlabK) {
      const int64_t length = SlabLength(k, slab);
      float* out = args.x + (slab * args.tokens + token * length) / 2;
      for (int64_t unit = 0; unit < length; unit += O::kUnit, source += O::kUnit, out += O::kUnit / 2) {
        OrderUnit<O>(source, factor, out);
      }
    }
  }

  // Widens one token of x and puts each unit of it into the order of the weights.
  template <DType dtype, class O>
  static void OrderActivations(const MatmulArgs& args, int64_t token) {
    if constexpr (kPack == 2) {
      OrderPairs<O>(args, token);
    } else {
      OrderWidened<dtype, O>(args, token);
    }
  }

  template <DType dtype, class O>
  static void OrderWidened(const MatmulArgs& args, int64_t token) {
    constexpr int kUnit = O::kUnit;
    struct Positions {
      uint8_t k[kUnit];
    };
    constexpr Positions positions = [] {
      Positions p{};
      for (int i = 0; i < kUnit; ++i) p.k[i] = static_cast<uint8_t>(O::K(i));
      return p;
    }();
    const int64_t k = args.problem.k;
    const uint16_t* source = args.operands.x + (args.first_token + token) * k;
    alignas(64) float widened[kUnit];
    for (int64_t slab = 0; slab < k; slab += kSlabK) {
      const int64_t length = SlabLength(k, slab);
      float* out = args.x + slab * args.tokens + token * length;
      for (int64_t unit = 0; unit < length; unit += kUnit, source += kUnit, out += kUnit) {
        for (int i = 0; i < kUnit; i += kLanes) S::Store(widened + i, S::template Widen<dtype>(source + i));
        for (int i = 0; i < kUnit; ++i) out[i] = widened[positions.k[i]];
      }
    }
  }

  // Few tokens: each weight goes from the table to the sums. Slab by slab for kDirectRows rows, so that whole cache
  // lines of scales and zeros are used at once: they lie 4 * n bytes apart, often in the same set of a cache, which
  // keeps few.
  template <DType dtype, class O>
  static void Direct(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
    constexpr int kMostTokens = DirectBlock(S::kIsa, MaxDirectTokens(S::kIsa)).tokens;
    WalkDirect<dtype>(
        args, row_begin, row_end, scratch, [&](int64_t tokens, int64_t tile, int64_t slab, int64_t token, float* sums) {
          WithCount<kMostTokens>(tokens, [&](auto n) { DirectTokens<dtype, O, n()>(args, tile, slab, token, sums); });
        });
  }

  // multiply(tokens, tile, slab, token, sums) for each of them, and y from the sums.
  template <DType dtype, class F>
  static void WalkDirect(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch, F&& multiply) {
    const Problem& p = args.problem;
    const int64_t block = DirectBlock(S::kIsa, static_cast<int>(args.tokens)).tokens;
    for (int64_t begin = row_begin; begin < row_end; begin += kDirectRows) {
      const int64_t end = row_end - begin < kDirectRows ? row_end : begin + kDirectRows;
      ClearSums(args, end - begin, scratch);
      for (int64_t slab = 0; slab < p.k; slab += kSlabK) {
        float* sums = scratch;  // [tile][token][kTileRows]
        for (int64_t tile = begin; tile < end; tile += kTileRows) {
          for (int64_t token = 0; token < args.tokens; token += block) {
            const int64_t tokens = args.tokens - token < block ? args.tokens - token : block;
            multiply(tokens, tile, slab, token, sums);
            sums += tokens * kTileRows;
          }
        }
      }
      StoreSums<dtype>(args, begin, end, scratch);
    }
  }

  static void ClearSums(const MatmulArgs& args, int64_t rows, float* sums) {
    std::memset(sums, 0, static_cast<size_t>(rows * args.tokens) * sizeof(float));
  }

  // y of some rows from sums [tile][token][kTileRows]. Token by token, so that lines of y are written whole: those of
  // neighbouring tokens are often in the same set of a cache.
  template <DType dtype>
  static void StoreSums(const MatmulArgs& args, int64_t row_begin, int64_t row_end, const float* sums) {
    for (int64_t token = 0; token < args.tokens; ++token) {
      for (int64_t tile = row_begin; tile < row_end; tile += kTileRows) {
        StoreTile<dtype>(args, tile, token, sums + (tile - row_begin) * args.tokens + token * kTileRows);
      }
    }
  }

  // Of one tile's rows and one token.
  template <DType dtype>
  static void StoreTile(const MatmulArgs& args, int64_t tile, int64_t token, const float* sums) {
    static_assert(kTileRows == 8);
    const int64_t first = (args.first_token + token) * args.problem.n + tile;
    const float factor = kPack == 2 ? args.token_factors[token] : 1;
    float y[kTileRows];
    for (int r = 0; r < kTileRows; ++r) y[r] = sums[r] * factor;
    if (args.problem.float32_result) {
      std::memcpy(static_cast<float*>(args.operands.y) + first, y, sizeof(y));
    } else {
      S::template NarrowEach<dtype>(y, static_cast<uint16_t*>(args.operands.y) + first);
    }
  }

  // sums [kTokens][kTileRows] += the lanes of some of the rows. Inlined early, so that the vectors stay in registers.
  template <int kRows, int kTokens>
  [[gnu::always_inline]] static void AddSums(const Float (&sum)[kRows][kTokens], float* sums) {
    static_assert(kRows % 4 == 0);
    INT4MM_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      INT4MM_UNROLL
      for (int r = 0; r < kRows; r += 4) {
        S::AddSums(sum[r][t], sum[r + 1][t], sum[r + 2][t], sum[r + 3][t], sums + t * kTileRows + r);
      }
    }
  }

  // f(count), as a type, of 1 .. kMost.
  template <int kMost, class F>
  static void WithCount(int64_t count, F&& f) {
    if (count == kMost) return f(std::integral_constant<int, kMost>());
    if constexpr (kMost > 1) WithCount<kMost - 1>(count, f);
  }

  // Asks for the words of a tile's rows in one unit: of slabs of 2 or 4 KiB the hardware makes no stream. Into the L2
  // cache: the few misses that an L1 cache can have under way are not enough to read memory at its rate.
  template <class O>
  static void PrefetchUnit(const uint32_t* words) {
    constexpr int kLine = 64 / sizeof(uint32_t);
    for (int i = 0; i < kTileRows * O::kWords; i += kLine) __builtin_prefetch(words + i, 0, 2);
  }

  // The words that are wanted next, beside those of `slab`, are so much further: those of the next slab, or of the
  // first one of the rows that are `rows` further. Behind the last a prefetch does nothing.
  static int64_t WordsAhead(const Problem& p, int64_t slab, int64_t rows) {
    if (slab + kSlabK < p.k) return kSlabK * kWordsPerK;
    return (rows / kTileRows * p.k - slab) * kWordsPerK;
  }

  // sums [kTokens][kTileRows] += the products of one slab, of one tile's rows and kTokens tokens.
  template <DType dtype, class O, int kTokens>
  static void DirectTokens(const MatmulArgs& args, int64_t tile, int64_t slab, int64_t token, float* sums) {
    constexpr int kRows = DirectBlock(S::kIsa, kTokens).rows;
    const Problem& p = args.problem;
    const int64_t length = SlabLength(p.k, slab);
    const uint32_t* tile_words = args.operands.packed + tile / kTileRows * (p.k / O::kTileK) * O::kTileWords;
    const int64_t words_ahead = WordsAhead(p, slab, kDirectRows);
    const float* first_x = args.x + (slab * args.tokens + token * length) / kPack;
    SlabPairs<O, kRows> pairs;
    for (int first_row = 0; first_row < kTileRows; first_row += kRows) {
      pairs.template Load<dtype>(args, tile + first_row, slab, length, kDirectRows);
      Float sum[kRows][kTokens];
      for (int r = 0; r < kRows; ++r) {
        for (int t = 0; t < kTokens; ++t) sum[r][t] = S::Zero();
      }
      const float* x = first_x;
      for (int64_t k = slab; k < slab + length; k += O::kUnit, x += O::kUnit / kPack) {
        const uint32_t* unit = tile_words + k / O::kTileK * O::kTileWords + first_row * O::kRowWords;
        const int part = O::kWholeTiles ? 0 : static_cast<int>(k % O::kTileK / O::kUnit);
        if (first_row == 0 && token == 0) PrefetchUnit<O>(tile_words + k * kWordsPerK + words_ahead);
        Table tables[kRows];
        pairs.template MakeTables<dtype>(GroupInSlab<O>(p, k - slab), tables);
        Words words[kRows][O::kWordVectors];
        for (int r = 0; r < kRows; ++r) S::template LoadUnit<O>(unit + r * O::kRowWords, part, words[r]);
        for (int v = 0; v < O::kWordVectors; ++v) {
          for (int step = 0; step < O::kSteps; ++step) {
            Float activations[kTokens];
            for (int t = 0; t < kTokens; ++t) {
              activations[t] = S::Load(x + t * length / kPack + (v * O::kSteps + step) * kLanes);
            }
            for (int r = 0; r < kRows; ++r) {
              const Float weights = S::Lookup(tables[r], words[r][v]);
              words[r][v] = S::NextNibble(words[r][v]);
              for (int t = 0; t < kTokens; ++t) sum[r][t] = S::MultiplyAdd(weights, activations[t], sum[r][t]);
            }
          }
        }
      }
      AddSums(sum, sums + first_row);
    }
  }

  // Many tokens: one slab of a tile's rows is written to a panel and used for all of them.
  // panel = the weights of the rows, k = slab .. slab + length - 1, kPack in each lane: a vector of kLanes every
  // kVectorStride floats of a row, and a row every kRowStride. Behind the last slab the rows that are `next_rows`
  // further are next.
  template <DType dtype, class O, int kRowStride, int kVectorStride>
  static void FillPanel(const MatmulArgs& args, int64_t tile, int64_t slab, int64_t length, int64_t next_rows,
                        float* panel) {
    static_assert(kPanelRows == kTileRows);
    const Problem& p = args.problem;
    const uint32_t* tile_words = args.operands.packed + tile / kTileRows * (p.k / O::kTileK) * O::kTileWords;
    SlabPairs<O, kPanelRows> pairs;
    pairs.template Load<dtype>(args, tile, slab, length, next_rows);
    const int64_t words_ahead = WordsAhead(p, slab, next_rows);
    for (int64_t k = slab; k < slab + length; k += O::kUnit) {
      Table tables[kPanelRows];
      pairs.template MakeTables<dtype>(GroupInSlab<O>(p, k - slab), tables);
      PrefetchUnit<O>(tile_words + k * kWordsPerK + words_ahead);
      const uint32_t* unit = tile_words + k / O::kTileK * O::kTileWords;
      const int part = O::kWholeTiles ? 0 : static_cast<int>(k % O::kTileK / O::kUnit);
      for (int r = 0; r < kPanelRows; ++r) {
        float* out = panel + r * kRowStride + (k - slab) / (kPack * kLanes) * kVectorStride;
        Words words[O::kWordVectors];
        S::template LoadUnit<O>(unit + r * O::kRowWords, part, words);
        for (int v = 0; v < O::kWordVectors; ++v) {
          for (int step = 0; step < O::kSteps; ++step, out += kVectorStride) {
            S::Store(out, S::Lookup(tables[r], words[v]));
            words[v] = S::NextNibble(words[v]);
          }
        }
      }
    }
  }

  // sums [kTokens][kTileRows] += panel rows times tokens, over one slab of `length` lanes of 32 bits.
  template <int kTokens>
  static void MultiplyBlock(const float* panel, const float* x, int64_t length, float* sums) {
    constexpr int kRows = PanelBlock(S::kIsa).rows;
    Float sum[kRows][kTokens];
    INT4MM_UNROLL
    for (int r = 0; r < kRows; ++r) {
      INT4MM_UNROLL
      for (int t = 0; t < kTokens; ++t) sum[r][t] = S::Zero();
    }
    for (int64_t k = 0; k < length; k += kLanes) {
      Float activations[kTokens];
      INT4MM_UNROLL
      for (int t = 0; t < kTokens; ++t) activations[t] = S::Load(x + t * length + k);
      INT4MM_UNROLL
      for (int r = 0; r < kRows; ++r) {
        const Float weights = S::Load(panel + r * kSlab + k);
        INT4MM_UNROLL
        for (int t = 0; t < kTokens; ++t) sum[r][t] = S::MultiplyAdd(weights, activations[t], sum[r][t]);
      }
    }
    AddSums(sum, sums);
  }

  // Slab by slab for all rows, so that the tokens' part of it stays in the L2 cache.
  template <DType dtype, class O>
  static void Panel(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
    constexpr RegisterBlock kBlock = PanelBlock(S::kIsa);
    const Problem& p = args.problem;
    const int64_t rows = row_end - row_begin;
    float* panel = scratch;
    float* first_sums = scratch + kPanelRows * kSlab;
    ClearSums(args, rows, first_sums);
    for (int64_t slab = 0; slab < p.k; slab += kSlabK) {
      const int64_t length = SlabLength(p.k, slab);
      float* sums = first_sums;  // [tile][token][kTileRows]
      for (int64_t tile = row_begin; tile < row_end; tile += kTileRows) {
        FillPanel<dtype, O, kSlab, kLanes>(args, tile, slab, length, rows, panel);
        for (int64_t token = 0; token < args.tokens; token += kBlock.tokens) {
          const int64_t tokens = args.tokens - token < kBlock.tokens ? args.tokens - token : kBlock.tokens;
          const float* x = args.x + (slab * args.tokens + token * length) / kPack;
          for (int r = 0; r < kPanelRows; r += kBlock.rows) {
            WithCount<kBlock.tokens>(
                tokens, [&](auto n) { MultiplyBlock<n()>(panel + r * kSlab, x, length / kPack, sums + r); });
          }
          sums += tokens * kTileRows;
        }
      }
    }
    StoreSums<dtype>(args, row_begin, row_end, first_sums);
  }

  // f(dtype, order), both as types.
  template <class F>
  static void Dispatch(const Problem& p, F&& f) {
    if constexpr (Multiplies(S::kIsa, DType::kFloat16)) {
      if (p.dtype == DType::kFloat16) return WithOrder<DType::kFloat16>(p, f);
    }
    WithOrder<DType::kBFloat16>(p, f);
  }

  template <DType dtype, class F>
  static void WithOrder(const Problem& p, F&& f) {
    const std::integral_constant<DType, dtype> type;
    WithInnerKTiles(p, [&](auto inner_k_tiles) {
      constexpr int kInnerKTiles = decltype(inner_k_tiles)::value;
      if (p.group_size == 32) return f(type, UnitOrder<kLanes, kPack, kInnerKTiles, 32>());
      if (p.group_size == 64) return f(type, UnitOrder<kLanes, kPack, kInnerKTiles, 64>());
      f(type, UnitOrder<kLanes, kPack, kInnerKTiles, 128>());
    });
  }

  // f(inner_k_tiles), as a type.
  template <class F>
  static void WithInnerKTiles(const Problem& p, F&& f) {
    if (p.inner_k_tiles == 2) return f(std::integral_constant<int, 2>());
    if (p.inner_k_tiles == 4) return f(std::integral_constant<int, 4>());
    f(std::integral_constant<int, 8>());
  }

  static constexpr Kernel MakeKernel() {
    Kernel kernel{};
    kernel.order_activations = [](const MatmulArgs& args, int64_t begin, int64_t end) {
      Dispatch(args.problem, [&](auto dtype, auto order) {
        for (int64_t token = begin; token < end; ++token) OrderActivations<dtype(), decltype(order)>(args, token);
      });
    };
    kernel.direct = [](const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
      Dispatch(args.problem,
               [&](auto dtype, auto order) { Direct<dtype(), decltype(order)>(args, row_begin, row_end, scratch); });
    };
    kernel.panel = [](const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
      Dispatch(args.problem,
               [&](auto dtype, auto order) { Panel<dtype(), decltype(order)>(args, row_begin, row_end, scratch); });
    };
    kernel.pack = kPack;
    return kernel;
  }
};

}  // namespace int4mm::cpu
