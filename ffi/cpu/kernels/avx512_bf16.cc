// The kernel of bfloat16 pairs. Compiled with the flags of avx512.cc and -mavx512bf16.
#include "cpu/kernels/avx512_bf16.h"

namespace int4mm::cpu {
namespace {

// Few tokens: q - 8, which bfloat16 holds, is multiplied, and the sums of a group by its scale; its zero is multiplied
// by the sum of its activations. One table serves all, where rounded weights need one for each row and group.
//
// A unit is sixteen words of one row, each of them within one group. Four shifts and lookups multiply them, and the
// lanes' sums by a vector of their groups' scales, or by the scale of the unit. kGroup is ExactGroup of the group size.
template <int kInnerKTiles, int kGroup>
struct Exact {
  using S = Avx512Bf16;
  using M = Matmul<S>;
  using O = UnitOrder<S::kLanes, S::kPack, kInnerKTiles, kExactUnit>;
  static_assert(O::kWords == S::kLanes && O::kSteps == 4);
  static constexpr int kGroups = kExactUnit / kGroup;    // Of a unit; one that is larger counts for each of its units.
  static constexpr int kScales = kGroups == 1 ? 1 : 4;   // Of a row in a unit.
  static constexpr int kUnits = M::kSlabK / kExactUnit;  // Of a slab.
  static constexpr int kRows = M::kTileRows;

  static void OrderActivations(const MatmulArgs& args, int64_t token) {
    M::template OrderPairs<O>(args, token);
    const Problem& p = args.problem;
    const uint16_t* x = args.operands.x + (args.first_token + token) * p.k;
    const __m512 factor = _mm512_set1_ps(1 / args.token_factors[token]);
    float* sums = args.group_sums + token;
    for (int64_t k = 0; k < p.k; k += kGroup, sums += args.tokens) {
      __m512 sum = S::Zero();
      for (int64_t i = k; i < k + kGroup; i += S::kLanes) {
        sum = _mm512_fmadd_ps(S::template Widen<DType::kBFloat16>(x + i), factor, sum);
      }
      *sums = _mm512_reduce_add_ps(sum);
    }
  }

  // The scales of a tile's rows in a slab.
  struct SlabScales {
    alignas(64) float of[kUnits][kRows][kScales];
  };

  // From pairs [group][row] to scales [row][quarter of the unit], or of the whole unit.
  static void StoreScales(const __m256i (&pairs)[kGroups], float (*scales)[kScales]) {
    if constexpr (kGroups == 1) {
      _mm256_store_ps(scales[0], _mm256_castsi256_ps(_mm256_slli_epi32(pairs[0], 16)));
    } else {
      const auto of = [&](int quarter) { return pairs[quarter * kGroups / 4]; };
      const __m256i low01 = _mm256_unpacklo_epi32(of(0), of(1));
      const __m256i high01 = _mm256_unpackhi_epi32(of(0), of(1));
      const __m256i low23 = _mm256_unpacklo_epi32(of(2), of(3));
      const __m256i high23 = _mm256_unpackhi_epi32(of(2), of(3));
      const __m256i rows[4] = {_mm256_unpacklo_epi64(low01, low23), _mm256_unpackhi_epi64(low01, low23),
                               _mm256_unpacklo_epi64(high01, high23), _mm256_unpackhi_epi64(high01, high23)};
      for (int r = 0; r < 4; ++r) {
        const __m256 wide = _mm256_castsi256_ps(_mm256_slli_epi32(rows[r], 16));
        _mm_store_ps(scales[r], _mm256_castps256_ps128(wide));
        _mm_store_ps(scales[r + 4], _mm256_extractf128_ps(wide, 1));
      }
    }
  }

  // Fills `scales`, and adds to zero_sums [kTokens][kRows] the zeros times the sums of the activations. Asks for the
  // pairs that are wanted next, as SlabPairs does.
  template <int kTokens>
  static void LoadPairs(const MatmulArgs& args, int64_t tile, int64_t slab, int64_t length, int64_t token,
                        SlabScales* scales, __m256 (&zero_sums)[kTokens]) {
    const Problem& p = args.problem;
    const float* group_sums = args.group_sums + slab / kGroup * args.tokens + token;
    const int64_t next = M::PairsAhead(p, slab, kDirectRows);
    const __m256i high_half = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
    typename S::PairRange range;
    for (int64_t unit = 0; unit < length / kExactUnit; ++unit) {
      __m256i of_groups[kGroups];
      for (int g = 0; g < kGroups; ++g, group_sums += args.tokens) {
        const int64_t group = (slab + unit * kExactUnit) / p.group_size + g;
        const uint16_t* pairs = args.operands.scales_and_zeros + layout::ScaleIndex(group, tile, p.n);
        __builtin_prefetch(pairs + next, 0, 2);
        of_groups[g] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pairs));
        range.template Add<kRows>(pairs);
        const __m256 zeros = _mm256_castsi256_ps(_mm256_and_si256(of_groups[g], high_half));
        for (int t = 0; t < kTokens; ++t) {
          zero_sums[t] = _mm256_fmadd_ps(zeros, _mm256_set1_ps(group_sums[t]), zero_sums[t]);
        }
      }
      StoreScales(of_groups, scales->of[unit]);
    }
    if (__builtin_expect(range.Exceeded(), 0)) __atomic_store_n(args.out_of_range, true, __ATOMIC_RELAXED);
  }

  // The scales of each lane's group.
  static __m512 LaneScales(const float* scales) {
    if constexpr (kGroups == 1) {
      return _mm512_set1_ps(*scales);
    } else if constexpr (kInnerKTiles == 8) {
      return _mm512_broadcast_f32x4(_mm_load_ps(scales));
    } else {
      struct Lanes {
        alignas(64) int quarter[S::kLanes];
      };
      static constexpr Lanes kOf = [] {
        Lanes lanes{};
        for (int i = 0; i < S::kLanes; ++i) lanes.quarter[i] = O::WordK(i) / (kExactUnit / 4);
        return lanes;
      }();
      return _mm512_permutexvar_ps(_mm512_load_si512(kOf.quarter), _mm512_broadcast_f32x4(_mm_load_ps(scales)));
    }
  }

  // sums [kTokens][kRows] += the products of one slab, of one tile's rows and kTokens tokens.
  template <int kTokens>
  static void Tokens(const MatmulArgs& args, int64_t tile, int64_t slab, int64_t token, float* sums) {
    constexpr int kBlockRows = DirectBlock(S::kIsa, kTokens).rows;
    const Problem& p = args.problem;
    const int64_t length = M::SlabLength(p.k, slab);
    const uint32_t* words = args.operands.packed + (tile * p.k + slab * kRows) / layout::kNibblesPerWord;
    const int64_t words_ahead = M::WordsAhead(p, slab, kDirectRows);
    const float* first_x = args.x + (slab * args.tokens + token * length) / S::kPack;
    const S::Table codes = S::Rounded(_mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7));
    SlabScales scales;
    __m256 zero_sums[kTokens] = {};
    LoadPairs<kTokens>(args, tile, slab, length, token, &scales, zero_sums);
    for (int first_row = 0; first_row < kRows; first_row += kBlockRows) {
      __m512 sum[kBlockRows][kTokens];
      INT4MM_UNROLL
      for (int r = 0; r < kBlockRows; ++r) {
        INT4MM_UNROLL
        for (int t = 0; t < kTokens; ++t) sum[r][t] = S::Zero();
      }
      const float* x = first_x;
      const uint32_t* unit = words;
      for (int64_t u = 0; u < length / kExactUnit; ++u, unit += kRows * O::kWords, x += kExactUnit / S::kPack) {
        if (first_row == 0 && token == 0) M::template PrefetchUnit<O>(unit + words_ahead);
        INT4MM_UNROLL
        for (int r = 0; r < kBlockRows; ++r) {
          __m512i row;
          S::template LoadUnit<O>(unit + (first_row + r) * O::kRowWords, 0, &row);
          __m512 part[kTokens];
          INT4MM_UNROLL
          for (int t = 0; t < kTokens; ++t) part[t] = S::Zero();
          INT4MM_UNROLL
          for (int step = 0; step < O::kSteps; ++step) {
            const __m512 weights = S::Lookup(codes, row);
            row = S::NextNibble(row);
            INT4MM_UNROLL
            for (int t = 0; t < kTokens; ++t) {
              part[t] = S::MultiplyAdd(weights, S::Load(x + t * length / S::kPack + step * S::kLanes), part[t]);
            }
          }
          const __m512 lane_scales = LaneScales(scales.of[u][first_row + r]);
          INT4MM_UNROLL
          for (int t = 0; t < kTokens; ++t) sum[r][t] = _mm512_fmadd_ps(part[t], lane_scales, sum[r][t]);
        }
      }
      M::AddSums(sum, sums + first_row);
    }
    INT4MM_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      float* of_token = sums + t * kRows;
      _mm256_storeu_ps(of_token, _mm256_add_ps(_mm256_loadu_ps(of_token), zero_sums[t]));
    }
  }

  static void Multiply(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
    M::template WalkDirect<DType::kBFloat16>(
        args, row_begin, row_end, scratch, [&](int64_t tokens, int64_t tile, int64_t slab, int64_t token, float* sums) {
          M::template WithCount<DirectBlock(S::kIsa, MaxDirectTokens(S::kIsa)).tokens>(
              tokens, [&](auto n) { Tokens<n()>(args, tile, slab, token, sums); });
        });
  }
};

// f(Exact) of the problem's format.
template <class F>
void WithExact(const Problem& p, F&& f) {
  Matmul<Avx512Bf16>::WithInnerKTiles(p, [&](auto n) {
    if (p.group_size == 32) return f(Exact<n(), 32>());
    if (p.group_size == 64) return f(Exact<n(), 64>());
    f(Exact<n(), 128>());
  });
}

constexpr Kernel MakeKernel() {
  Kernel kernel = Matmul<Avx512Bf16>::MakeKernel();
  kernel.order_exact = [](const MatmulArgs& args, int64_t begin, int64_t end) {
    WithExact(args.problem, [&](auto exact) {
      for (int64_t token = begin; token < end; ++token) decltype(exact)::OrderActivations(args, token);
    });
  };
  kernel.exact = [](const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch) {
    WithExact(args.problem, [&](auto exact) { decltype(exact)::Multiply(args, row_begin, row_end, scratch); });
  };
  return kernel;
}

}  // namespace

constexpr Kernel kAvx512Bf16Kernel = MakeKernel();

}  // namespace int4mm::cpu
