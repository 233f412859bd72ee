// The loop nests of the CPU kernels, written once over a Simd type S, which kernels/<isa>.cc defines in an unnamed
// namespace: everything instantiated from it stays in its file, so that no function compiled for a newer CPU is shared
// with code that runs on an older one. For the same reason nothing here calls an inline function of another header
// that could be emitted (constexpr functions excepted).
//
// S provides, with L = kLanes:
//   kIsa, kLanes, Float (L x f32), Words (L x u32), Table (16 weights)
//   Float Zero(), Load(const float*), MultiplyAdd(a, b, c) = a * b + c; void Store(float*, Float); float Sum(Float)
//   Table LoadTable(const float*); Float Lookup(Table, Words): table[low nibble of each lane]
//   Words NextNibble(Words): each lane shifted right by 4
//   void LoadUnit<Order>(const uint32_t* row, int part, Words*): the words of one row of one unit, in Order's order; the
//     unit is the part-th of its tile, if it is less than a tile
//   Float Widen<dtype>(const uint16_t*); uint16_t Narrow<dtype>(float)
//   unsigned LoadPairs<dtype>(const uint16_t* scales_and_zeros, float* scales, float* zeros): of four rows; a mask of
//     those that need ExactTable
//   void FastTable<dtype>(float scale, float zero, float* table)
//
// Each y[m][n] is the sum over k, in the kernel's order, in the L lanes of one f32 vector, whose lanes are added at the
// end; the blocking, the number of tokens and the number of threads do not change a bit of it.
#pragma once

#include <cstdint>

#include "core/layout.h"
#include "cpu/isa.h"
#include "cpu/kernels/exact_table.h"
#include "cpu/kernels/kernel.h"
#include "cpu/kernels/order.h"

namespace int4mm::cpu {

template <class S>
struct Matmul {
  using Float = typename S::Float;
  using Words = typename S::Words;
  using Table = typename S::Table;
  static constexpr int kLanes = S::kLanes;
  static constexpr int kTileRows = static_cast<int>(layout::kTileN);

  template <int kInnerKTiles, int kUnit>
  using Order = UnitOrder<kLanes, kInnerKTiles, kUnit>;

  static int64_t SlabLength(int64_t k, int64_t slab_begin) { return k - slab_begin < kSlab ? k - slab_begin : kSlab; }

  // The most groups of one slab.
  template <class O>
  static constexpr int kSlabGroups = kSlab / O::kUnit;

  // tables [length / group_size][kRows][16] of `kRows` neighbouring rows, beginning with row n, in one slab. Not inlined:
  // its caller would keep its sums in memory around the rare call of ExactTable, everywhere.
  template <DType dtype, int kRows>
  [[gnu::noinline]] static void BuildTables(const MatmulArgs& args, int64_t n, int64_t slab, int64_t length,
                                            float* tables) {
    static_assert(kRows % 4 == 0);
    const Problem& p = args.problem;
    for (int64_t k = slab; k < slab + length; k += p.group_size, tables += 16 * kRows) {
      const uint16_t* pairs = args.operands.scales_and_zeros + layout::ScaleIndex(k / p.group_size, n, p.n);
      float scales[kRows];
      float zeros[kRows];
      unsigned suspects = 0;
      for (int row = 0; row < kRows; row += 4) {
        suspects |= S::template LoadPairs<dtype>(pairs + 2 * row, scales + row, zeros + row) << row;
      }
      // One row's pair is then broadcast from memory, which costs less than taking it out of the vector of four.
      __asm__ volatile("" : : "r"(scales), "r"(zeros) : "memory");
      for (int row = 0; row < kRows; ++row) S::template FastTable<dtype>(scales[row], zeros[row], tables + 16 * row);
      for (int row = 0; suspects != 0; ++row, suspects >>= 1) {
        if ((suspects & 1) != 0) ExactTable(dtype, pairs[2 * row], pairs[2 * row + 1], tables + 16 * row);
      }
    }
  }

  template <int kRows>
  static auto TableBuilder(DType dtype) {
    return dtype == DType::kBFloat16 ? &BuildTables<DType::kBFloat16, kRows> : &BuildTables<DType::kFloat16, kRows>;
  }

  template <class O>
  static int64_t GroupInSlab(const Problem& p, int64_t k_in_slab) {
    return O::kUnit == 128 && p.group_size == 256 ? 0 : k_in_slab / O::kUnit;
  }

  static uint16_t Narrow(DType dtype, float value) {
    return dtype == DType::kBFloat16 ? S::template Narrow<DType::kBFloat16>(value)
                                     : S::template Narrow<DType::kFloat16>(value);
  }

  // ---- Activations --------------------------------------------------------------------------------------------------

  template <DType dtype, class O>
  static void OrderActivations(const MatmulArgs& args, int64_t token) {
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
    for (int64_t slab = 0; slab < k; slab += kSlab) {
      const int64_t length = SlabLength(k, slab);
      float* out = args.x + slab * args.tokens + token * length;
      for (int64_t unit = 0; unit < length; unit += kUnit, source += kUnit, out += kUnit) {
        for (int i = 0; i < kUnit; i += kLanes) S::Store(widened + i, S::template Widen<dtype>(source + i));
        for (int i = 0; i < kUnit; ++i) out[i] = widened[positions.k[i]];
      }
    }
  }

  // ---- Direct: few tokens; each weight goes from the table to the sums ----------------------------------------------

  template <class O, int kTokens>
  static void DirectTokens(const MatmulArgs& args, int64_t row_begin, int64_t row_end) {
    constexpr int kRows = DirectBlock(S::kIsa, kTokens).rows;
    const Problem& p = args.problem;
    const auto build_tables = TableBuilder<kRows>(p.dtype);
    alignas(64) float tables[kSlabGroups<O> * kRows * 16];

    for (int64_t n = row_begin; n < row_end; n += kRows) {
      const uint32_t* rows =
          args.operands.packed + n / kTileRows * (p.k / O::kTileK) * O::kTileWords + n % kTileRows * O::kRowWords;
      Float sums[kRows][kTokens];
      for (auto& row : sums) {
        for (Float& sum : row) sum = S::Zero();
      }
      for (int64_t slab = 0; slab < p.k; slab += kSlab) {
        const int64_t length = SlabLength(p.k, slab);
        build_tables(args, n, slab, length, tables);
        const float* x = args.x + slab * kTokens;
        for (int64_t k = slab; k < slab + length; k += O::kUnit, x += O::kUnit) {
          const float* unit_tables = tables + GroupInSlab<O>(p, k - slab) * kRows * 16;
          const uint32_t* unit = rows + k / O::kTileK * O::kTileWords;
          const int part = O::kWholeTiles ? 0 : static_cast<int>(k % O::kTileK / O::kUnit);
          Table table[kRows];
          Words words[kRows][O::kWordVectors];
          for (int r = 0; r < kRows; ++r) {
            table[r] = S::LoadTable(unit_tables + 16 * r);
            S::template LoadUnit<O>(unit + r * O::kRowWords, part, words[r]);
          }
          for (int v = 0; v < O::kWordVectors; ++v) {
            for (int step = 0; step < O::kSteps; ++step) {
              Float activations[kTokens];
              for (int t = 0; t < kTokens; ++t) {
                activations[t] = S::Load(x + t * length + (v * O::kSteps + step) * kLanes);
              }
              for (int r = 0; r < kRows; ++r) {
                const Float weights = S::Lookup(table[r], words[r][v]);
                words[r][v] = S::NextNibble(words[r][v]);
                for (int t = 0; t < kTokens; ++t) {
                  sums[r][t] = S::MultiplyAdd(weights, activations[t], sums[r][t]);
                }
              }
            }
          }
        }
      }
      for (int t = 0; t < kTokens; ++t) {
        uint16_t* y = args.operands.y + (args.first_token + t) * p.n + n;
        for (int r = 0; r < kRows; ++r) y[r] = Narrow(p.dtype, S::Sum(sums[r][t]));
      }
    }
  }

  template <class O>
  static void Direct(const MatmulArgs& args, int64_t row_begin, int64_t row_end) {
    static_assert(kMaxDirectTokens == 4);
    switch (args.tokens) {
      case 1:
        return DirectTokens<O, 1>(args, row_begin, row_end);
      case 2:
        return DirectTokens<O, 2>(args, row_begin, row_end);
      case 3:
        return DirectTokens<O, 3>(args, row_begin, row_end);
      case 4:
        return DirectTokens<O, 4>(args, row_begin, row_end);
      default:
        return;
    }
  }

  // ---- Panel: many tokens; a slab of a few rows of w is written to scratch and used for all of them -----------------

  // panel [rows][kSlab] = the weights of rows n .. n + rows - 1, k = slab .. slab + length - 1.
  template <class O>
  static void FillPanel(const MatmulArgs& args, int64_t n, int64_t rows, int64_t slab, int64_t length, float* panel) {
    const Problem& p = args.problem;
    const auto build_tables = TableBuilder<kTileRows>(p.dtype);
    alignas(64) float tables[kSlabGroups<O> * kTileRows * 16];

    for (int64_t tile = n; tile < n + rows; tile += kTileRows) {
      const uint32_t* tile_words = args.operands.packed + tile / kTileRows * (p.k / O::kTileK) * O::kTileWords;
      build_tables(args, tile, slab, length, tables);
      for (int64_t k = slab; k < slab + length; k += O::kUnit) {
        const float* unit_tables = tables + GroupInSlab<O>(p, k - slab) * kTileRows * 16;
        const uint32_t* unit = tile_words + k / O::kTileK * O::kTileWords;
        const int part = O::kWholeTiles ? 0 : static_cast<int>(k % O::kTileK / O::kUnit);
        for (int r = 0; r < kTileRows; ++r) {
          float* out = panel + (tile - n + r) * kSlab + (k - slab);
          const Table table = S::LoadTable(unit_tables + 16 * r);
          Words words[O::kWordVectors];
          S::template LoadUnit<O>(unit + r * O::kRowWords, part, words);
          for (int v = 0; v < O::kWordVectors; ++v) {
            for (int step = 0; step < O::kSteps; ++step, out += kLanes) {
              S::Store(out, S::Lookup(table, words[v]));
              words[v] = S::NextNibble(words[v]);
            }
          }
        }
      }
    }
  }

  // sums [PanelBlock.rows][kTokens][kLanes] (+)= panel rows times tokens, over one slab.
  template <int kTokens>
  static void MultiplyBlock(const float* panel, const float* x, int64_t length, bool first, float* sums) {
    constexpr int kRows = PanelBlock(S::kIsa).rows;
    Float sum[kRows][kTokens];
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) {
        sum[r][t] = first ? S::Zero() : S::Load(sums + (r * kTokens + t) * kLanes);
      }
    }
    for (int64_t k = 0; k < length; k += kLanes) {
      Float weights[kRows];
      for (int r = 0; r < kRows; ++r) weights[r] = S::Load(panel + r * kSlab + k);
      for (int t = 0; t < kTokens; ++t) {
        const Float activations = S::Load(x + t * length + k);
        for (int r = 0; r < kRows; ++r) sum[r][t] = S::MultiplyAdd(weights[r], activations, sum[r][t]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int t = 0; t < kTokens; ++t) S::Store(sums + (r * kTokens + t) * kLanes, sum[r][t]);
    }
  }

  template <int kTokens>
  static void MultiplyTokens(int64_t tokens, const float* panel, const float* x, int64_t length, bool first,
                             float* sums) {
    if (tokens == kTokens) return MultiplyBlock<kTokens>(panel, x, length, first, sums);
    if constexpr (kTokens > 1) MultiplyTokens<kTokens - 1>(tokens, panel, x, length, first, sums);
  }

  template <class O>
  static void Panel(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
    constexpr RegisterBlock kBlock = PanelBlock(S::kIsa);
    const Problem& p = args.problem;
    const int64_t rows = row_end - row_begin;
    float* panel = scratch;
    float* sums = scratch + kPanelRows * kSlab;  // [rows / kBlock.rows][blocks of tokens][kBlock.rows][block's tokens]

    for (int64_t slab = 0; slab < p.k; slab += kSlab) {
      const int64_t length = SlabLength(p.k, slab);
      FillPanel<O>(args, row_begin, rows, slab, length, panel);
      for (int64_t token = 0; token < args.tokens; token += kBlock.tokens) {
        const int64_t left = args.tokens - token;
        const int64_t block = left < kBlock.tokens ? left : kBlock.tokens;
        const float* x = args.x + slab * args.tokens + token * length;
        for (int64_t r = 0; r < rows; r += kBlock.rows) {
          float* block_sums = sums + (r * args.tokens + token * kBlock.rows) * kLanes;
          MultiplyTokens<kBlock.tokens>(block, panel + r * kSlab, x, length, slab == 0, block_sums);
        }
      }
    }

    for (int64_t token = 0; token < args.tokens; ++token) {
      const int64_t first = token / kBlock.tokens * kBlock.tokens;  // Of the token's block.
      const int64_t left = args.tokens - first;
      const int64_t block = left < kBlock.tokens ? left : kBlock.tokens;
      uint16_t* y = args.operands.y + (args.first_token + token) * p.n + row_begin;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t block_row = r / kBlock.rows * kBlock.rows;
        const float* block_sums = sums + (block_row * args.tokens + first * kBlock.rows) * kLanes;
        y[r] = Narrow(p.dtype,
                      S::Sum(S::Load(block_sums + ((r % kBlock.rows) * block + token - first) * kLanes)));
      }
    }
  }

  // ---- The choice of the template -----------------------------------------------------------------------------------

  template <int kInnerKTiles, class F>
  static void WithUnit(const Problem& p, F&& f) {
    if (p.group_size == 32) return f(Order<kInnerKTiles, 32>());
    if (p.group_size == 64) return f(Order<kInnerKTiles, 64>());
    f(Order<kInnerKTiles, 128>());
  }

  template <class F>
  static void WithOrder(const Problem& p, F&& f) {
    if (p.inner_k_tiles == 2) return WithUnit<2>(p, f);
    if (p.inner_k_tiles == 4) return WithUnit<4>(p, f);
    WithUnit<8>(p, f);
  }

  static constexpr Kernel MakeKernel() {
    Kernel kernel{};
    kernel.order_activations = [](const MatmulArgs& args, int64_t token) {
      WithOrder(args.problem, [&](auto order) {
        using O = decltype(order);
        if (args.problem.dtype == DType::kBFloat16) {
          OrderActivations<DType::kBFloat16, O>(args, token);
        } else {
          OrderActivations<DType::kFloat16, O>(args, token);
        }
      });
    };
    kernel.direct = [](const MatmulArgs& args, int64_t row_begin, int64_t row_end) {
      WithOrder(args.problem, [&](auto order) { Direct<decltype(order)>(args, row_begin, row_end); });
    };
    kernel.panel = [](const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
      WithOrder(args.problem, [&](auto order) { Panel<decltype(order)>(args, row_begin, row_end, scratch); });
    };
    kernel.lanes = kLanes;
    return kernel;
  }
};

}  // namespace int4mm::cpu
