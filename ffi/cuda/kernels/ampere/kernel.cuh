// y^T = w x^T on the tensor cores, with the operands swapped: the packed words of two stacked n-tiles are the A
// fragment of mma.m16n8k16, and tokens are its 8 columns. Here the schedule for few tokens: packed words go straight to
// registers.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "cuda/kernels/ampere/arguments.h"
#include "cuda/kernels/ampere/config.h"
#include "cuda/kernels/ampere/staged.cuh"
#include "cuda/kernels/dequant.cuh"
#include "cuda/kernels/float_bits.cuh"
#include "cuda/kernels/ptx.cuh"

namespace int4mm::cuda::ampere {

// Where a warp stands: in the CTA's tile of the output, in its slice of k, and in the sources that its slice copies
// from. All that does not change from step to step is computed here, once.
template <int kConfig>
struct Position {
  static constexpr Config kTile = kConfigs[kConfig];
  static constexpr int kSliceThreads = 32 * kTile.warps_n;
  static constexpr int kChunks = 2 * kStepK / 16;               // 16-byte chunks of a row of x in a stage.
  static constexpr int kTokenStride = kSliceThreads / kChunks;  // A thread copies one chunk of every such token.
  static constexpr int kScaleChunks = kTile.TileN() / 4;        // 16-byte chunks of a group's (scale, zero) pairs.
  static_assert(4 * kScaleChunks <= kSliceThreads, "one copy a thread moves the scales of a step");

  int lane;
  int slice;  // Of k: steps slice, slice + warps_k, ...
  int64_t first_token;
  int tokens;     // Of the tile's tokens, those that x has.
  int first_row;  // First row of w of the CTA's tile.
  int warp_row;   // First row of w of this warp in the tile.

  int x_chunk;  // This thread's chunk of a row of x, and its first token.
  int x_token;
  const uint16_t* x;  // That chunk of the first step.
  int scale_group;    // Which of a step's groups this thread copies scales of, if any.
  int scale_row;
  const uint16_t* scales;                  // Those rows of group 0.
  const uint32_t* words[2 * kTile.pairs];  // This lane's words of its n-tiles in step 0.
  uint32_t b_offset;                       // In a stage, where this lane's ldmatrix addresses start.

  __device__ __forceinline__ explicit Position(const Arguments& args) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int slice_thread = static_cast<int>(threadIdx.x) % kSliceThreads;
    lane = static_cast<int>(threadIdx.x) % 32;
    slice = warp / kTile.warps_n;
    warp_row = warp % kTile.warps_n * 16 * kTile.pairs;
    // Neighbouring CTAs share their tokens: x stays in L2 while the weights stream by.
    const unsigned tile_m = blockIdx.x / static_cast<unsigned>(args.tiles_n);
    first_token = static_cast<int64_t>(tile_m) * kTile.tokens;
    first_row = static_cast<int>(blockIdx.x - tile_m * args.tiles_n) * kTile.TileN();
    tokens = static_cast<int>(min(args.m - first_token, static_cast<int64_t>(kTile.tokens)));

    x_chunk = slice_thread % kChunks;
    x_token = slice_thread / kChunks;
    const int product = ptx::Opaque(static_cast<int>(blockIdx.z));
    x = args.operands.x + (product * args.x_tokens + first_token + x_token) * args.k + 8 * x_chunk;

    scale_group = slice_thread / kScaleChunks;
    scale_row = slice_thread % kScaleChunks * 4;
    const int step_groups = args.group_shift >= 2 ? 1 : 4 >> args.group_shift;
    // Rows past n keep what is in shared memory: they are not stored.
    if (scale_group >= step_groups || first_row + scale_row >= args.n) scale_group = kNoGroup;
    const int64_t first_group = product * args.groups;
    scales = args.operands.scales_and_zeros + 2 * (first_group * args.n + first_row + scale_row);

    // For rows past n the last n-tile is read again.
    const int last_tile = args.tiles - 1;
#pragma unroll
    for (int t = 0; t < 2 * kTile.pairs; ++t) {
      const int tile = product * args.tiles + min((first_row + warp_row) / 8 + t, last_tile);
      words[t] = args.operands.packed + static_cast<int64_t>(tile) * args.k + lane * (args.inner_k_tiles / 2);
    }
    b_offset = (lane & 7) * (2 * kStepK) + ((lane / 8 ^ (lane & 7)) << 4);
  }

  static constexpr int kNoGroup = 1 << 16;
};

// Starts the copies of one k step into a stage: x [tokens][kStepK], its 16-byte chunks swizzled within a row so that
// the 8 rows of an ldmatrix lie in different banks, then (scale, zero) [kStepK / 32][TileN()]. Past k come zeros.
// Tokens that x does not have are left as they are: they reach only columns of the output that are not stored.
template <int kConfig>
__device__ __forceinline__ void CopyStage(const Arguments& args, const Position<kConfig>& at, int step,
                                          uint32_t stage) {
  using At = Position<kConfig>;
  constexpr Config kTile = kConfigs[kConfig];
  constexpr int kRowBytes = 2 * kStepK;
  const int first_k = step * kStepK;
  const bool in_k = first_k + 8 * at.x_chunk < args.k;
  const uint16_t* source = at.x + first_k;
  const uint32_t row = stage + at.x_token * kRowBytes;
#pragma unroll
  for (int i = 0; i < kTile.tokens / At::kTokenStride; ++i) {
    const int token = at.x_token + i * At::kTokenStride;
    // The swizzle repeats every 8 tokens.
    const uint32_t target = row + i * At::kTokenStride * kRowBytes + ((at.x_chunk ^ (token & 7)) << 4);
    if (token < at.tokens) ptx::CopyAsync16(target, source, in_k);
    source += static_cast<int64_t>(At::kTokenStride) * args.k;
  }
  if (at.scale_group != At::kNoGroup) {
    const int shift = args.group_shift + 5;
    const int group = (first_k >> shift) + at.scale_group;
    const bool valid = group < args.k >> shift;
    const uint32_t target = stage + kTile.tokens * kRowBytes + (at.scale_group * kTile.TileN() + at.scale_row) * 4;
    ptx::CopyAsync16(target, at.scales + static_cast<int64_t>(group) * 2 * args.n, valid);
  }
}

// The packed words of one k step: word j of n-tile t covers values 32j..32j+31 of k of 8 rows.
template <int kConfig>
struct Words {
  static constexpr int kTilesN = 2 * kConfigs[kConfig].pairs;

  uint32_t word[kTilesN][4];

  // The words of an n-tile in turn; register indices stay constant in a loop that is not unrolled.
  __device__ __forceinline__ uint32_t TakeFirst(int tile) {
    const uint32_t first = word[tile][0];
    word[tile][0] = word[tile][1];
    word[tile][1] = word[tile][2];
    word[tile][2] = word[tile][3];
    return first;
  }

  __device__ __forceinline__ void Load(const Arguments& args, const Position<kConfig>& at, int step) {
    if (args.inner_k_tiles == 8) {
#pragma unroll
      for (int t = 0; t < kTilesN; ++t) ptx::LoadOnce(word[t], at.words[t] + step * kStepK);
      return;
    }
    // Smaller tiles: k may end inside of the step, and zeros stand for what follows.
    const int left = args.k - step * kStepK;
#pragma unroll
    for (int t = 0; t < kTilesN; ++t) {
      const uint32_t* source = at.words[t] + step * kStepK;
      if (args.inner_k_tiles == 4) {
        word[t][2] = word[t][3] = 0;
        ptx::LoadOnce(word[t][0], word[t][1], source);
        if (left > 64) ptx::LoadOnce(word[t][2], word[t][3], source + 64);
      } else {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          word[t][j] = 0;
          if (left > 32 * j) ptx::LoadOnce(word[t][j], source + 32 * j);
        }
      }
    }
  }
};

// sums += w x^T over one k step.
template <typename Float, int kConfig>
__device__ __forceinline__ void MultiplyStep(float (&sums)[kConfigs[kConfig].pairs][kConfigs[kConfig].tokens / 8][4],
                                             const Arguments& args, const Position<kConfig>& at, uint32_t stage,
                                             Words<kConfig> words) {
  constexpr Config kTile = kConfigs[kConfig];
  const uint32_t scales = stage + kTile.tokens * 2 * kStepK + (at.warp_row + at.lane / 4) * 4;
  const int group_mask = (1 << args.group_shift) - 1;
  // The tensor cores add with truncation, an error of one sign that grows with the length of the sum. So they sum short
  // stretches of k from zero, which are then added to the sums in rounded f32: the whole step where there are registers
  // for it, else 32 values of k.
  constexpr int kWordsPerStretch = kTile.pairs * kTile.tokens <= 16 ? kStepK / 32 : 1;
  float stretch[kTile.pairs][kTile.tokens / 8][4];
  ScaleAndZero groups[kTile.pairs][2];
  // Wide tiles stay a loop: unrolled, the compiler would hold more fragments than there are registers.
#pragma unroll kWordsPerStretch
  for (int j = 0; j < kStepK / 32; ++j) {
    if (j == 0 || (j & group_mask) == 0) {
      const uint32_t group = scales + (j >> args.group_shift) * kTile.TileN() * 4;
#pragma unroll
      for (int p = 0; p < kTile.pairs; ++p) {
        groups[p][0] = SplitScaleAndZero<Float>(ptx::LoadShared(group + 16 * p * 4));
        groups[p][1] = SplitScaleAndZero<Float>(ptx::LoadShared(group + (16 * p + 8) * 4));
      }
    }

    uint32_t a[kTile.pairs][2][4];
#pragma unroll
    for (int p = 0; p < kTile.pairs; ++p) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t word = words.TakeFirst(2 * p + half);
        a[p][0][half] = DequantizePair<Float, 0>(word, groups[p][half]);
        a[p][0][2 + half] = DequantizePair<Float, 1>(word, groups[p][half]);
        a[p][1][half] = DequantizePair<Float, 2>(word, groups[p][half]);
        a[p][1][2 + half] = DequantizePair<Float, 3>(word, groups[p][half]);
      }
    }

    // Chunk 4j of a row, swizzled: stages are aligned to rows, so the exclusive or stays within one.
    const uint32_t b_row = stage + (at.b_offset ^ (j << 6));
#pragma unroll
    for (int t = 0; t < kTile.tokens / 8; ++t) {
      uint32_t b[4];
      ptx::LoadMatrixX4(b, b_row + t * 8 * 2 * kStepK);
#pragma unroll
      for (int p = 0; p < kTile.pairs; ++p) {
        float (&part)[4] = stretch[p][t];
        if (j % kWordsPerStretch == 0) part[0] = part[1] = part[2] = part[3] = 0.0f;
        ptx::MmaM16N8K16<Float>(part, a[p][0], b[0], b[1]);
        ptx::MmaM16N8K16<Float>(part, a[p][1], b[2], b[3]);
        if ((j + 1) % kWordsPerStretch == 0) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[p][t][i] += part[i];
        }
      }
    }
  }
}

template <typename Float, int kConfig>
__global__ void __launch_bounds__(kConfigs[kConfig].Threads(), kConfigs[kConfig].min_ctas)
    Kernel(const __grid_constant__ Arguments args) {
  constexpr Config kTile = kConfigs[kConfig];
  constexpr int kTileN = kTile.TileN();
  extern __shared__ __align__(128) uint8_t shared[];
  const Position<kConfig> at(args);

  // The slice's ring of stages, and how many k steps fall to it: its steps are `slice`, `slice` + warps_k, ...
  const uint32_t ring = ptx::SharedAddress(shared) + at.slice * kTile.stages * kTile.StageBytes();
  const auto stage = [&](int i) { return ring + (i % kTile.stages) * kTile.StageBytes(); };
  const auto step = [&](int i) { return at.slice + i * kTile.warps_k; };
  const int all_steps = (args.k + kStepK - 1) / kStepK;
  const int steps = (all_steps - at.slice + kTile.warps_k - 1) / kTile.warps_k;
  // Slices of several warps meet at barriers of the whole CTA, so they go round equally often.
  const int rounds = kTile.warps_n == 1 ? steps : (all_steps + kTile.warps_k - 1) / kTile.warps_k;

  // Packed words go straight to registers, kTile.ring steps ahead; x and scales go through shared memory.
  Words<kConfig> words[kTile.ring];
#pragma unroll
  for (int i = 0; i < kTile.ring; ++i) {
    if (i < steps) words[i].Load(args, at, step(i));
  }
#pragma unroll
  for (int i = 0; i < kTile.stages - 1; ++i) {
    if (i < steps) CopyStage(args, at, step(i), stage(i));
    ptx::CopyAsyncCommit();
  }

  float sums[kTile.pairs][kTile.tokens / 8][4] = {};
  for (int first = 0; first < rounds; first += kTile.ring) {
#pragma unroll
    for (int r = 0; r < kTile.ring; ++r) {
      const int i = first + r;
      if (i < rounds) {
        // The step's copies have landed for all of the slice, which has also left the stage that is filled next.
        ptx::CopyAsyncWait<kTile.stages - 2>();
        if constexpr (kTile.warps_n == 1) {
          __syncwarp();
        } else {
          __syncthreads();
        }
        const int next = i + kTile.stages - 1;
        if (next < steps) CopyStage(args, at, step(next), stage(next));
        ptx::CopyAsyncCommit();
        if (kTile.warps_n == 1 || i < steps) MultiplyStep<Float>(sums, args, at, stage(i), words[r]);
        if (i + kTile.ring < steps) words[r].Load(args, at, step(i + kTile.ring));
      }
    }
  }

  // Partial sums [slice][token][row] take the place of the ring once no copy is under way and no warp reads it.
  ptx::CopyAsyncWait<0>();
  __syncthreads();
  constexpr int kPitch = kTile.PartialPitch();
  float* const partials = reinterpret_cast<float*>(shared);
  float* const mine = partials + at.slice * kTile.tokens * kPitch;
#pragma unroll
  for (int p = 0; p < kTile.pairs; ++p) {
#pragma unroll
    for (int t = 0; t < kTile.tokens / 8; ++t) {
      const int row = at.warp_row + 16 * p + at.lane / 4;
      const int token = 8 * t + 2 * (at.lane % 4);
      mine[token * kPitch + row] = sums[p][t][0];
      mine[(token + 1) * kPitch + row] = sums[p][t][1];
      mine[token * kPitch + row + 8] = sums[p][t][2];
      mine[(token + 1) * kPitch + row + 8] = sums[p][t][3];
    }
  }
  __syncthreads();

  // Slices are added in order, so that the same inputs give the same bits; neighbours in n are stored together.
  for (int index = static_cast<int>(threadIdx.x); index < kTile.tokens * kTileN / 2; index += kTile.Threads()) {
    const int token = index / (kTileN / 2);
    const int row = index % (kTileN / 2) * 2;
    if (at.first_token + token >= args.m || at.first_row + row >= args.n) continue;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int s = 0; s < kTile.warps_k; ++s) {
      const float2 part = *reinterpret_cast<const float2*>(partials + (s * kTile.tokens + token) * kPitch + row);
      sum.x += part.x;
      sum.y += part.y;
    }
    const int64_t to = (blockIdx.z * args.m + at.first_token + token) * args.n + at.first_row + row;
    if (args.float32_result) {
      *reinterpret_cast<float2*>(static_cast<float*>(args.operands.y) + to) = sum;
    } else {
      *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(args.operands.y) + to) =
          FloatBits<Float>::RoundPair(sum.x, sum.y);
    }
  }
}

template <typename Float, int kConfig>
const void* AddressOf() {
  if constexpr (kConfigs[kConfig].Staged()) {
    return reinterpret_cast<const void*>(&StagedKernel<Float, kConfig>);
  } else {
    return reinterpret_cast<const void*>(&Kernel<Float, kConfig>);
  }
}

// The kernels of every tile for one dtype, in the order of kConfigs.
template <typename Float, int... kEvery>
const void* KernelOf(int config, std::integer_sequence<int, kEvery...>) {
  static const std::array<const void*, sizeof...(kEvery)> kernels = {AddressOf<Float, kEvery>()...};
  return kernels[config];
}

template <typename Float>
const void* KernelOf(int config) {
  return KernelOf<Float>(config, std::make_integer_sequence<int, static_cast<int>(kConfigs.size())>());
}

// One translation unit a dtype defines one of these.
const void* BFloat16Kernel(int config);
const void* Float16Kernel(int config);

}  // namespace int4mm::cuda::ampere
