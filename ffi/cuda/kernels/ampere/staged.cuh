// The schedule for many tokens: x, packed words, scales and zeros all go through a ring of stages in shared memory, and
// while a warp multiplies 16 values of k it makes the next 16 into operands.
#pragma once

#include <cstdint>

#include "cuda/kernels/ampere/arguments.h"
#include "cuda/kernels/ampere/config.h"
#include "cuda/kernels/dequant.cuh"
#include "cuda/kernels/float_bits.cuh"
#include "cuda/kernels/ptx.cuh"

namespace int4mm::cuda::ampere {

// The tensor cores add with truncation, an error of one sign that grows with the length of the sum. So they sum this
// many steps from zero, and the result is added in rounded f32.
inline constexpr int kStretchSteps = 4;

// Where a CTA's tile of the output lies.
struct TileOrigin {
  int64_t token;
  int row;

  // Token tiles form bands, and within a band neighbours take the same rows of w: the CTAs at work at one time share
  // few rows of w and few of x, which stay in L2.
  template <int kConfig>
  static __device__ __forceinline__ TileOrigin Of(const Arguments& args) {
    constexpr unsigned kBand = kBandTokens / kConfigs[kConfig].tokens;
    const unsigned tiles_n = static_cast<unsigned>(args.tiles_n);
    const unsigned band = blockIdx.x / (kBand * tiles_n);
    const unsigned in_band = blockIdx.x - band * kBand * tiles_n;
    const unsigned width = min(kBand, gridDim.x / tiles_n - band * kBand);
    const unsigned tile_n = in_band / width;
    const unsigned tile_m = band * kBand + in_band - tile_n * width;
    return {static_cast<int64_t>(tile_m) * kConfigs[kConfig].tokens,
            static_cast<int>(tile_n) * kConfigs[kConfig].TileN()};
  }
};

// A thread's share of the copies. A stage holds kStepK values of k: x [tokens][kStepK], its 16-byte pieces swizzled
// within a row so that the 8 rows of an ldmatrix lie in different banks, packed words [TileN() / 8][32 lanes][4], the
// order that they have in memory where inner_k_tiles is 8, and (scale, zero) [groups][TileN()].
template <int kConfig>
class Copies {
 public:
  static constexpr Config kTile = kConfigs[kConfig];
  static constexpr int kThreads = kTile.Threads();
  static constexpr int kRowBytes = 2 * kStepK;
  static constexpr int kTileBytes = 4 * kStepK;  // Of the words of 8 rows.
  static constexpr int kTokenStride = kThreads / (kRowBytes / 16);
  static constexpr int kTileStride = kThreads / (kTileBytes / 16);
  static constexpr int kScalePieces = kTile.TileN() / 4;  // Of a group.
  static constexpr int kGroupStride = kThreads / kScalePieces;
  static_assert(kThreads % kScalePieces == 0, "a thread copies the same rows of every group");
  static_assert(kTile.tokens % kTokenStride == 0 && (kTokenStride % 8 == 0 || kTokenStride == 4) &&
                kTile.TileN() / 8 % kTileStride == 0);

  __device__ __forceinline__ Copies(const Arguments& args, const TileOrigin& tile) {
    const int thread = static_cast<int>(threadIdx.x);
    const int x_piece = thread % (kRowBytes / 16);
    const int token = thread / (kRowBytes / 16);
    x_k_ = 8 * x_piece;
    tokens_ = static_cast<int>(min(args.m - tile.token, static_cast<int64_t>(kTile.tokens))) - token;
    const int product = static_cast<int>(blockIdx.z);
    x_ = args.operands.x + (product * args.x_tokens + tile.token + token) * args.k + x_k_;
    x_target_ = token * kRowBytes + ((x_piece ^ (token & 7)) << 4);

    const int tile_of_8 = thread / (kTileBytes / 16);
    word_piece_ = thread % (kTileBytes / 16);
    word_k_ = 4 * word_piece_;
    tiles_ = (args.n - tile.row) / 8 - tile_of_8;
    words_ =
        args.operands.packed + static_cast<int64_t>(product * args.tiles + tile.row / 8 + tile_of_8) * args.k + word_k_;
    words_target_ = kTile.tokens * kRowBytes + tile_of_8 * kTileBytes;

    groups_ = args.group_shift >= 2 ? 1 : 4 >> args.group_shift;
    const int scale_row = thread % kScalePieces * 4;
    group_ = thread / kScalePieces;
    if (tile.row + scale_row >= args.n) groups_ = 0;
    const int64_t first_group = product * args.groups;
    scales_ = args.operands.scales_and_zeros + 2 * (first_group * args.n + tile.row + scale_row);
    scales_target_ =
        kTile.tokens * kRowBytes + kTile.TileN() / 8 * kTileBytes + (group_ * kTile.TileN() + scale_row) * 4;
  }

  // Starts the copies of a step. What lies outside of x and w is not read and becomes zeros.
  __device__ __forceinline__ void Start(const Arguments& args, int step, uint32_t stage) const {
    const int step_k = step * kStepK;
    const int left = args.k - step_k;
    const uint16_t* x = x_ + step_k;
#pragma unroll
    for (int i = 0; i < kTile.tokens / kTokenStride; ++i) {
      const bool valid = x_k_ < left && i * kTokenStride < tokens_;
      // The swizzle repeats every 8 tokens.
      const uint32_t target = (x_target_ ^ (i * kTokenStride % 8 << 4)) + i * kTokenStride * kRowBytes;
      ptx::CopyAsync16(stage + target, x, valid);
      x += static_cast<int64_t>(kTokenStride) * args.k;
    }
    // 16 bytes of packed words are one lane's where inner_k_tiles is 8, else those of 2 or 4 lanes.
    if (args.inner_k_tiles == 8) {
      CopyWords<16>(args, step_k, left, stage + words_target_ + 16 * word_piece_);
    } else if (args.inner_k_tiles == 4) {
      CopyWords<8>(args, step_k, left, stage + words_target_ + word_piece_ % 16 * 32 + word_piece_ / 16 * 8);
    } else {
      CopyWords<4>(args, step_k, left, stage + words_target_ + word_piece_ % 8 * 64 + word_piece_ / 8 * 4);
    }
    // Rows past n keep what is in shared memory: they are not stored.
    const int shift = args.group_shift + 5;
    const int first_group = step_k >> shift;
#pragma unroll
    for (int i = 0; i < 4; i += kGroupStride) {
      const int group = i + group_;
      if (group < groups_) {
        const bool valid = first_group + group < args.k >> shift;
        ptx::CopyAsync16(stage + scales_target_ + i * kTile.TileN() * 4,
                         scales_ + static_cast<int64_t>(first_group + group) * 2 * args.n, valid);
      }
    }
  }

 private:
  // Copies this thread's pieces of words, in parts that go to neighbouring lanes.
  template <int kPartBytes>
  __device__ __forceinline__ void CopyWords(const Arguments& args, int step_k, int left, uint32_t target) const {
    const uint32_t* words = words_ + step_k;
#pragma unroll
    for (int i = 0; i < kTile.TileN() / 8 / kTileStride; ++i) {
      const bool valid = word_k_ < left && i * kTileStride < tiles_;
      if constexpr (kPartBytes == 16) {
        ptx::CopyAsync16(target, words, valid);
      } else {
#pragma unroll
        for (int part = 0; part < 16 / kPartBytes; ++part) {
          ptx::CopyAsyncFew<kPartBytes>(target + 16 * part, words + part * kPartBytes / 4, valid);
        }
      }
      target += kTileStride * kTileBytes;
      words += static_cast<int64_t>(kTileStride) * args.k;
    }
  }

  // The first piece of x: its k in a step, how many tokens there are from it on, its place in memory and in a stage.
  int x_k_;
  int tokens_;
  const uint16_t* x_;
  uint32_t x_target_;
  // The same of words, whose rows are n-tiles.
  int word_piece_;
  int word_k_;
  int tiles_;
  const uint32_t* words_;
  uint32_t words_target_;
  // The same of scales and zeros: the first group in a step, of how many.
  int group_;
  int groups_;
  const uint16_t* scales_;
  uint32_t scales_target_;
};

// A warp's share of a step: its rows of w, all tokens, and kParts parts of 16 values of k. While it multiplies one
// part, whose operands are all in registers, it loads and dequantises those of the next.
template <typename Float, int kConfig>
class Warp {
 public:
  static constexpr Config kTile = kConfigs[kConfig];
  static constexpr int kBlocks = kStepK / 32 / kTile.warps_k;  // Of 32 values of k: what a word covers.
  static constexpr int kParts = 2 * kBlocks;
  static constexpr int kPairs = kTile.pairs;
  static constexpr int kTokenTiles = kTile.tokens / 8;
  static_assert(kBlocks == 2 || kBlocks == 4, "a lane's words of a step are one load");
  static_assert(kTile.tokens % 16 == 0, "an ldmatrix takes 16 tokens");

  __device__ __forceinline__ explicit Warp(const Arguments& args) {
    lane_ = static_cast<int>(threadIdx.x) % 32;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    slice_ = kTile.warps_k == 1 ? 0 : warp / kTile.warps_n;
    row_ = warp % kTile.warps_n * 16 * kPairs;
    first_block_ = slice_ * kBlocks;
    group_shift_ = args.group_shift;
    group_mask_ = (1 << args.group_shift) - 1;
    // Word j of a lane covers values 32j..32j+31 of k.
    words_ = kTile.tokens * 2 * kStepK + row_ * (kStepK / 2) + lane_ * 16 + first_block_ * 4;
    scales_ = kTile.tokens * 2 * kStepK + kTile.TileN() * (kStepK / 2) + (row_ + lane_ / 4) * 4;
    // Of the four matrices of an ldmatrix two are 16 values of k of 8 tokens, and two of the next 8.
    const int token = lane_ / 16 * 8 + lane_ % 8;
    tokens_ = token * (2 * kStepK) + ((lane_ / 8 % 2 ^ 4 * first_block_ ^ lane_ % 8) << 4);
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[p][t][i] = part_[p][t][i] = 0.0f;
      }
    }
  }

  // The operands of the first part of the first step.
  __device__ __forceinline__ void LoadFirst(uint32_t stage) {
    LoadWords(stage);
    LoadScales<0>(stage);
    SplitScales<0>();
    LoadTokens<0>(stage);
    Dequantize<0>();
  }

  // Multiplies part kPart of a step and makes the operands of the next: from `stage`, or, for the next step, from
  // `next_stage`, which has to be there from the last block on.
  template <int kPart>
  __device__ __forceinline__ void MultiplyPart(uint32_t stage, uint32_t next_stage) {
    constexpr int kNext = (kPart + 1) % kParts;
    constexpr int kNextBlock = (kPart / 2 + 1) % kBlocks;
    const uint32_t stage_of_next_block = kNextBlock == 0 ? next_stage : stage;
    if constexpr (kPart % 2 == 0) {
      LoadScales<kNextBlock>(stage_of_next_block);
      if constexpr (kNextBlock == 0) LoadWords(next_stage);
    } else {
      SplitScales<kNextBlock>();
    }
    LoadTokens<kNext>(kNext == 0 ? next_stage : stage);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
      for (int p = 0; p < kPairs; ++p) {
        const uint32_t (&b)[4] = b_[kPart % 2][t / 2];
        ptx::MmaM16N8K16<Float>(part_[p][t], a_[kPart % 2][p], b[t % 2 * 2], b[t % 2 * 2 + 1]);
      }
    }
    Dequantize<kNext>();
  }

  // Adds what the tensor cores summed, and lets them begin at zero again.
  __device__ __forceinline__ void Flush() {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums_[p][t][i] += part_[p][t][i];
          part_[p][t][i] = 0.0f;
        }
      }
    }
  }

  // Writes the sums of this warp's slice: [slice][token][row] in f32.
  __device__ __forceinline__ void StoreSums(float* partials) {
    constexpr int kPitch = kTile.PartialPitch();
    float* const mine = partials + slice_ * kTile.tokens * kPitch;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const int row = row_ + 16 * p + lane_ / 4;
        const int token = 8 * t + 2 * (lane_ % 4);
        mine[token * kPitch + row] = sums_[p][t][0];
        mine[(token + 1) * kPitch + row] = sums_[p][t][1];
        mine[token * kPitch + row + 8] = sums_[p][t][2];
        mine[(token + 1) * kPitch + row + 8] = sums_[p][t][3];
      }
    }
  }

 private:
  // The words of all blocks of a step.
  __device__ __forceinline__ void LoadWords(uint32_t stage) {
#pragma unroll
    for (int t = 0; t < 2 * kPairs; ++t) ptx::LoadShared(next_words_[t], stage + words_ + t * 4 * kStepK);
  }

  // Whether a block's scales and zeros are others than those of the block before.
  template <int kBlock>
  __device__ __forceinline__ bool StartsGroup() const {
    return kBlock == 0 || ((first_block_ + kBlock) & group_mask_) == 0;
  }

  template <int kBlock>
  __device__ __forceinline__ void LoadScales(uint32_t stage) {
    if (!StartsGroup<kBlock>()) return;
    const uint32_t group = stage + scales_ + ((first_block_ + kBlock) >> group_shift_) * kTile.TileN() * 4;
#pragma unroll
    for (int t = 0; t < 2 * kPairs; ++t) next_groups_[t] = ptx::LoadShared(group + 8 * t * 4);
  }

  template <int kBlock>
  __device__ __forceinline__ void SplitScales() {
    if (!StartsGroup<kBlock>()) return;
#pragma unroll
    for (int t = 0; t < 2 * kPairs; ++t) groups_[t] = SplitScaleAndZero<Float>(next_groups_[t]);
  }

  template <int kPart>
  __device__ __forceinline__ void LoadTokens(uint32_t stage) {
#pragma unroll
    for (int t = 0; t < kTokenTiles / 2; ++t) {
      ptx::LoadMatrixX4(b_[kPart % 2][t], stage + (tokens_ ^ (kPart << 5)) + t * 16 * 2 * kStepK);
    }
  }

  template <int kPart>
  __device__ __forceinline__ void Dequantize() {
#pragma unroll
    for (int t = 0; t < 2 * kPairs; ++t) {
      if constexpr (kPart == 0) {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) words_of_step_[t][block] = next_words_[t][block];
      }
      const uint32_t word = words_of_step_[t][kPart / 2];
      a_[kPart % 2][t / 2][t % 2] = DequantizePair<Float, kPart % 2 * 2>(word, groups_[t]);
      a_[kPart % 2][t / 2][2 + t % 2] = DequantizePair<Float, kPart % 2 * 2 + 1>(word, groups_[t]);
    }
  }

  int lane_;
  int slice_;        // Of k.
  int row_;          // First row of w of this warp in the tile.
  int first_block_;  // Of this slice in a step.
  int group_shift_;
  int group_mask_;
  // In a stage, where this lane's words, scales and ldmatrix addresses start.
  uint32_t words_;
  uint32_t scales_;
  uint32_t tokens_;

  float sums_[kPairs][kTokenTiles][4];
  float part_[kPairs][kTokenTiles][4];
  uint32_t a_[2][kPairs][4];
  uint32_t b_[2][kTokenTiles / 2][4];
  uint32_t words_of_step_[2 * kPairs][kBlocks];
  uint32_t next_words_[2 * kPairs][kBlocks];
  uint32_t next_groups_[2 * kPairs];
  ScaleAndZero groups_[2 * kPairs];
};

// Adds the slices' sums in order, so that the same inputs give the same bits, and stores 8 rows a thread.
template <typename Float, int kConfig>
__device__ __forceinline__ void StoreTile(const Arguments& args, const TileOrigin& tile, const float* partials) {
  constexpr Config kTile = kConfigs[kConfig];
  constexpr int kPieces = kTile.TileN() / 8;
#pragma unroll 1
  for (int index = static_cast<int>(threadIdx.x); index < kTile.tokens * kPieces; index += kTile.Threads()) {
    const int token = index / kPieces;
    const int row = index % kPieces * 8;
    if (tile.token + token >= args.m || tile.row + row >= args.n) continue;
    float sum[8] = {};
#pragma unroll
    for (int s = 0; s < kTile.warps_k; ++s) {
      const float* const source = partials + (s * kTile.tokens + token) * kTile.PartialPitch() + row;
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const float4 part = *reinterpret_cast<const float4*>(source + i);
        sum[i] += part.x;
        sum[i + 1] += part.y;
        sum[i + 2] += part.z;
        sum[i + 3] += part.w;
      }
    }
    const int64_t to = (blockIdx.z * args.m + tile.token + token) * args.n + tile.row + row;
    if (args.float32_result) {
      float4* const y = reinterpret_cast<float4*>(static_cast<float*>(args.operands.y) + to);
      y[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      y[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
      continue;
    }
    uint4 rounded;
    rounded.x = FloatBits<Float>::RoundPair(sum[0], sum[1]);
    rounded.y = FloatBits<Float>::RoundPair(sum[2], sum[3]);
    rounded.z = FloatBits<Float>::RoundPair(sum[4], sum[5]);
    rounded.w = FloatBits<Float>::RoundPair(sum[6], sum[7]);
    *reinterpret_cast<uint4*>(static_cast<uint16_t*>(args.operands.y) + to) = rounded;
  }
}

template <typename Float, int kConfig>
__global__ void __launch_bounds__(kConfigs[kConfig].Threads(), kConfigs[kConfig].min_ctas)
    StagedKernel(const __grid_constant__ Arguments args) {
  constexpr Config kTile = kConfigs[kConfig];
  static_assert(kTile.stages >= 3, "one stage is multiplied, one has to be there, and one is filled");
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t ring = ptx::SharedAddress(shared);
  const uint32_t ring_end = ring + kTile.stages * kTile.StageBytes();
  const auto after = [&](uint32_t stage) {
    return stage + kTile.StageBytes() == ring_end ? ring : stage + kTile.StageBytes();
  };
  const TileOrigin tile = TileOrigin::Of<kConfig>(args);
  const Copies<kConfig> copies(args, tile);
  const int steps = (args.k + kStepK - 1) / kStepK;
#pragma unroll
  for (int i = 0; i < kTile.stages - 1; ++i) {
    if (i < steps) copies.Start(args, i, ring + i * kTile.StageBytes());
    ptx::CopyAsyncCommit();
  }
  Warp<Float, kConfig> warp(args);
  ptx::CopyAsyncWait<kTile.stages - 2>();
  __syncthreads();
  warp.LoadFirst(ring);

  uint32_t stage = ring;
  uint32_t free_stage = ring_end - kTile.StageBytes();
#pragma unroll 1
  for (int i = 0; i < steps; ++i) {
    const uint32_t next_stage = after(stage);
    // Before its last block, which makes the first operands of the next step, that step's copies have landed for all
    // warps, and all have left the stage of the step before, which is filled next.
    const auto turn = [&] {
      ptx::CopyAsyncWait<kTile.stages - 3>();
      __syncthreads();
      const int next = i + kTile.stages - 1;
      if (next < steps) copies.Start(args, next, free_stage);
      ptx::CopyAsyncCommit();
    };
    if constexpr (Warp<Float, kConfig>::kBlocks == 4) {
      warp.template MultiplyPart<0>(stage, next_stage);
      warp.template MultiplyPart<1>(stage, next_stage);
      warp.template MultiplyPart<2>(stage, next_stage);
      warp.template MultiplyPart<3>(stage, next_stage);
      warp.template MultiplyPart<4>(stage, next_stage);
      warp.template MultiplyPart<5>(stage, next_stage);
      turn();
      warp.template MultiplyPart<6>(stage, next_stage);
      warp.template MultiplyPart<7>(stage, next_stage);
    } else {
      warp.template MultiplyPart<0>(stage, next_stage);
      warp.template MultiplyPart<1>(stage, next_stage);
      turn();
      warp.template MultiplyPart<2>(stage, next_stage);
      warp.template MultiplyPart<3>(stage, next_stage);
    }
    if ((i + 1) % kStretchSteps == 0) warp.Flush();
    free_stage = stage;
    stage = next_stage;
  }
  warp.Flush();

  // The sums take the place of the ring once no copy is under way and no warp reads it.
  ptx::CopyAsyncWait<0>();
  __syncthreads();
  float* const partials = reinterpret_cast<float*>(shared);
  warp.StoreSums(partials);
  __syncthreads();
  StoreTile<Float, kConfig>(args, tile, partials);
}

}  // namespace int4mm::cuda::ampere
