// The loop nest of matrix registers, a template over a type Tiles that has eight of them, so that a test can run it on
// a CPU without. Tiles provides
//   Scope: as long as one lives, the registers are this thread's to use
//   template <int t> void Zero(), Load(const float*), Store(float*): register t, kTileEdge x kTileEdge lanes in memory
//   template <int c, int a, int b> void MultiplyAdd(): of registers of pairs of bfloat16 a and b, c[i][j] += the sum
//     over lanes l of a[i][l] * b[l][j]
//
// Weights are a, 16 rows by 16 lanes of one vector each; activations are b, 16 lanes by 16 tokens; so c is 16 rows by
// 16 tokens. Each y[m][n] is the sum over k in the order of kernels/order.h, 32 values at a time: the blocking, the
// number of tokens and the number of threads do not change a bit of it.
#pragma once

#include "cpu/kernels/avx512_bf16.h"

namespace int4mm::cpu {
namespace {

struct PairsForTiles : Avx512Bf16 {
  static constexpr Isa kIsa = Isa::kAmx;
};

template <class Tiles>
struct TileMatmul {
  using S = PairsForTiles;
  using M = Matmul<S>;
  static constexpr int kEdge = kTileEdge;
  static constexpr int kTile = kEdge * kEdge;  // Lanes of a register.
  static constexpr int kPanelTile = kEdge * kTileSlab;
  static constexpr int64_t kSlabK = kTileSlab * S::kPack;
  static_assert(S::kLanes == kEdge && M::kSlabK % kSlabK == 0);

  static int64_t SlabLength(int64_t k, int64_t slab) { return k - slab < kSlabK ? k - slab : kSlabK; }

  template <class O>
  static void OrderActivations(const MatmulArgs& args, int64_t begin, int64_t end) {
    constexpr int kLanesOfUnit = O::kUnit / S::kPack;
    const int64_t k = args.problem.k;
    alignas(64) float unit_lanes[kEdge][kLanesOfUnit] = {};  // Of each token.
    const __m512i column = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                              _mm512_set1_epi32(kLanesOfUnit));
    for (int64_t first = begin; first < end; first += kEdge) {
      const int tokens = static_cast<int>(end - first < kEdge ? end - first : kEdge);
      const uint16_t* source = args.operands.x + (args.first_token + first) * k;
      float factors[kEdge];
      for (int t = 0; t < tokens; ++t) factors[t] = M::TokenFactor(args, first + t);
      for (int64_t slab = 0; slab < k; slab += kSlabK) {
        const int64_t length = SlabLength(k, slab);
        float* out = args.x + (slab * WholeTiles(args.tokens) + first * length) / S::kPack;
        for (int64_t unit = slab; unit < slab + length; unit += O::kUnit) {
          for (int t = 0; t < tokens; ++t) M::template OrderUnit<O>(source + t * k + unit, factors[t], unit_lanes[t]);
          for (int lane = 0; lane < kLanesOfUnit; ++lane, out += kEdge) {
            _mm512_storeu_ps(out, _mm512_i32gather_ps(column, unit_lanes[0] + lane, sizeof(float)));
          }
        }
      }
    }
  }

  // sums of kA x kB registers (+)= panel times activations, over one slab of `vectors` vectors of lanes. Registers that
  // share rows are `row_stride` floats apart in sums. Four sums hide the latency of a product.
  template <int kA, int kB>
  static void MultiplyBlock(const float* panel, const float* x, int64_t vectors, bool first, float* sums,
                            int64_t row_stride) {
    ForEach<kA * kB>([&](auto c) {
      if (first) {
        Tiles::template Zero<c()>();
      } else {
        Tiles::template Load<c()>(sums + c() / kB * row_stride + c() % kB * kTile);
      }
    });
    // Of eight registers four are left, for kB of activations and the others in turn for weights.
    static_assert(kA * kB <= 4 && kB <= 2);
    constexpr int kFirstB = 8 - kB;
    for (int64_t v = 0; v < vectors; ++v, panel += kTile, x += kTile) {
      ForEach<kB>([&](auto b) { Tiles::template Load<kFirstB + b()>(x + b() * vectors * kTile); });
      ForEach<kA>([&](auto a) {
        constexpr int kRegister = 4 + a() % (4 - kB);
        Tiles::template Load<kRegister>(panel + a() * kPanelTile);
        ForEach<kB>([&](auto b) { Tiles::template MultiplyAdd<a() * kB + b(), kRegister, kFirstB + b()>(); });
      });
    }
    ForEach<kA * kB>([&](auto c) { Tiles::template Store<c()>(sums + c() / kB * row_stride + c() % kB * kTile); });
  }

  // f(i), as a type, for i = 0 .. kCount - 1.
  template <int kCount, class F>
  static void ForEach(F&& f) {
    if constexpr (kCount > 1) ForEach<kCount - 1>(f);
    f(std::integral_constant<int, kCount - 1>());
  }

  // The rows of kA registers and all tokens.
  template <int kA>
  static void MultiplyTokens(const MatmulArgs& args, const float* panel, int64_t slab, int64_t length, float* sums) {
    const int64_t tokens = WholeTiles(args.tokens);
    const int64_t vectors = length / (S::kPack * S::kLanes);
    const float* x = args.x + slab * tokens / S::kPack;
    for (int64_t token = 0; token < tokens; token += 2 * kEdge) {
      const float* own_x = x + token * length / S::kPack;
      float* own_sums = sums + token * kEdge;
      if constexpr (kA <= 2) {
        if (token + kEdge < tokens) {
          MultiplyBlock<kA, 2>(panel, own_x, vectors, slab == 0, own_sums, tokens * kEdge);
          continue;
        }
      }
      MultiplyBlock<kA, 1>(panel, own_x, vectors, slab == 0, own_sums, tokens * kEdge);
    }
  }

  template <class O>
  static void Multiply(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
    const typename Tiles::Scope scope;
    const Problem& p = args.problem;
    const int64_t tokens = WholeTiles(args.tokens);
    float* panel = scratch;                                  // [register][vector][row][lane]
    float* all_sums = scratch + kTileBlockRows * kTileSlab;  // [rows / kEdge][tokens / kEdge][row][token]
    const int64_t block_rows = tokens == kEdge ? kTileBlockRows : kTileBlockRows / 2;
    for (int64_t slab = 0; slab < p.k; slab += kSlabK) {
      const int64_t length = SlabLength(p.k, slab);
      for (int64_t row = row_begin; row < row_end; row += block_rows) {
        const int64_t rows = row_end - row < block_rows ? row_end - row : block_rows;
        for (int64_t r = 0; r < rows; r += kPanelRows) {
          float* out = panel + r / kEdge * kPanelTile + r % kEdge * kEdge;
          M::template FillPanel<DType::kBFloat16, O, kEdge, kTile>(args, row + r, slab, length, row_end - row_begin,
                                                                   out);
        }
        float* sums = all_sums + (row - row_begin) * tokens;
        M::template WithCount<kTileBlockRows / kEdge>(CeilDiv(rows, kEdge), [&](auto registers) {
          MultiplyTokens<registers()>(args, panel, slab, length, sums);
        });
      }
    }
    for (int64_t row = row_begin; row < row_end; row += kEdge) {
      const int64_t rows = row_end - row < kEdge ? row_end - row : kEdge;
      for (int64_t token = 0; token < args.tokens; ++token) {
        const float* sums = all_sums + (row - row_begin) * tokens + token / kEdge * kTile + token % kEdge;
        StoreRows(args, row, rows, token, sums);
      }
    }
  }

  // y of `rows` rows, 8 or 16, and one token, from its column of sums.
  static void StoreRows(const MatmulArgs& args, int64_t row, int64_t rows, int64_t token, const float* sums) {
    const __m512i column =
        _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
    static_assert(kEdge == 1 << 4);
    const __mmask16 mask = static_cast<__mmask16>((1u << rows) - 1);
    float of_rows[kEdge];
    S::Store(of_rows, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, column, sums, sizeof(float)));
    for (int64_t r = 0; r < rows; r += kPanelRows) {
      M::template StoreTile<DType::kBFloat16>(args, row + r, token, of_rows + r);
    }
  }

  static constexpr Kernel MakeKernel() {
    Kernel kernel{};
    kernel.order_tiles = [](const MatmulArgs& args, int64_t begin, int64_t end) {
      M::template WithOrder<DType::kBFloat16>(
          args.problem, [&](auto, auto order) { OrderActivations<decltype(order)>(args, begin, end); });
    };
    kernel.tiles = [](const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
      M::template WithOrder<DType::kBFloat16>(
          args.problem, [&](auto, auto order) { Multiply<decltype(order)>(args, row_begin, row_end, scratch); });
    };
    kernel.pack = S::kPack;
    return kernel;
  }
};

}  // namespace
}  // namespace int4mm::cpu
