// y^T = w x^T for few tokens, at the rate at which the packed words can be read. docs/kernels/decode.md is the essay.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "core/problem.h"
#include "cuda/kernels/decode/config.h"
#include "cuda/kernels/float_bits.cuh"
#include "cuda/kernels/nibble.cuh"
#include "cuda/kernels/ptx.cuh"

namespace int4mm::cuda::decode {

struct Arguments {
  Operands operands;
  int m;
  int n;
  int k;
  bool float32_result;
  // From one product of the batch to the next are (these at the end of the struct made a step 8 instructions longer):
  int x_tokens;       // tokens of x: m, or 0 where all have the same x;
  int tiles;          // n-tiles;
  int parts;          // parts of k: steps or, with four groups a step, quarters of one.
  int slices;         // k / kStepK
  int group_shift;    // With one group a step: log2(group_size / kStepK). With four: log2(group_size / 32).
  int tiles_per_cta;  // n-tiles;
  int larger_ctas;    // the first so many CTAs have one more.
  int warps_k;
  int warp_pairs;
  int chunk_tiles;
};

// Where a warp stands in the CTA, and the CTA's n-tiles.
struct Place {
  int product;  // Of the batch.
  int lane;
  int warp;
  int slice;  // Of k: steps slice, slice + warps_k, ...
  int first_token;
  int tokens;      // Of the CTA: those that x has from first_token on, at most the config's.
  int first_tile;  // Of the CTA.
  int tiles;       // Of the CTA.
  int warp_tile;   // First n-tile of this warp in a chunk.

  __device__ __forceinline__ Place(const Arguments& args, int most_tokens) {
    product = static_cast<int>(blockIdx.z);
    lane = static_cast<int>(threadIdx.x) % 32;
    // The shuffle tells the compiler that all lanes agree, so what follows from it is kept and tested once a warp.
    warp = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / 32, 0);
    const int column = Column(warp, args.warps_k);
    slice = warp - column * args.warps_k;
    warp_tile = 2 * args.warp_pairs * column;
    first_token = static_cast<int>(blockIdx.y) * most_tokens;
    tokens = min(args.m - first_token, most_tokens);
    const int cta = static_cast<int>(blockIdx.x);
    first_tile = cta * args.tiles_per_cta + min(cta, args.larger_ctas);
    tiles = args.tiles_per_cta + (cta < args.larger_ctas ? 1 : 0);
  }

  // index / size for the up to four columns of warps.
  static __device__ __forceinline__ int Column(int index, int size) {
    return (index >= size) + (index >= 2 * size) + (index >= 3 * size);
  }

  // How many of a chunk's n-tiles are this warp's; zero or less if none.
  __device__ __forceinline__ int WarpTiles(const Arguments& args, int chunk) const {
    return min(min(tiles - chunk, args.chunk_tiles) - warp_tile, 2 * args.warp_pairs);
  }
};

// Shared memory of a warp: a ring of packed words of `ahead` steps, then a ring of one stage more, x [tokens][kStepK]
// with the 16-byte chunks of a row swizzled so that the 8 rows of an ldmatrix lie in different banks, and (scale, zero)
// [groups][rows]. A stage is one more than the steps under way, because x of the next step is copied while a slower
// lane may still read its own.
template <int kConfig, int kGroups>
struct Rings {
  uint32_t words;
  uint32_t stages;
  uint32_t stages_end;
  int x_bytes;
  int stage_bytes;

  __device__ __forceinline__ Rings(const Arguments& args, const Place& at, uint32_t shared) {
    constexpr Config kTile = kConfigs[kConfig];
    const int most_tokens = min(args.m, kTile.tokens);
    x_bytes = most_tokens * kStepK * 2;
    stage_bytes = kTile.StageBytes(most_tokens, kGroups);
    words = shared + at.warp * BytesPerWarp();
    stages = words + kTile.ahead * kTile.WordBytes();
    stages_end = words + BytesPerWarp();
  }
  __device__ __forceinline__ int BytesPerWarp() const {
    constexpr Config kTile = kConfigs[kConfig];
    return kTile.RingBytes(stage_bytes);
  }
};

// Starts the copies of a warp's steps, one row tile of 16 a call, in the order in which they are computed.
template <int kConfig, int kGroups>
struct Copies {
  static constexpr Config kTile = kConfigs[kConfig];
  static constexpr int kScaleChunks = kTile.pairs * 4;  // 16-byte chunks of a group's (scale, zero) pairs.

  int slice;
  int chunk = 0;
  int tiles;              // Of this warp in the chunk; none after the last step.
  const uint32_t* words;  // This lane's of the step's first n-tile.
  uint32_t stage;
  uint32_t x_target;  // In a stage, this lane's chunk of its first token.
  const uint16_t* x;  // This lane's chunk of its first token in step 0.
  int first_part;     // Of k, of the CTA's product.

  __device__ __forceinline__ Copies(const Arguments& args, const Place& at, const Rings<kConfig, kGroups>& rings) {
    slice = at.slice;
    tiles = slice < args.slices ? at.WarpTiles(args, 0) : 0;
    words = Words(args, at);
    stage = rings.stages;
    const int token = at.lane / 16;
    x_target = token * (kStepK * 2) + ((at.lane % 16 ^ token) << 4);
    first_part = at.product * args.parts;
    const int first_token = at.product * args.x_tokens + at.first_token;
    x = args.operands.x + static_cast<int64_t>(first_token + token) * args.k + at.lane % 16 * 8;
  }

  __device__ __forceinline__ const uint32_t* Words(const Arguments& args, const Place& at) const {
    const int first_tile = at.product * args.tiles + at.first_tile;
    return args.operands.packed + static_cast<int64_t>(first_tile + at.warp_tile + chunk) * args.k + slice * kStepK +
           at.lane * 4;
  }

  // Row tile `pair` of the next step into `slot` of the words' ring; with the first one x and the scales.
  __device__ __forceinline__ void Start(const Arguments& args, const Place& at, const Rings<kConfig, kGroups>& rings,
                                        int pair, uint32_t slot) {
    if (tiles > 0) {
      const uint32_t target = slot + pair * kPairBytes + at.lane * 16;
      ptx::CopyAsync16If(2 * pair < tiles, target, words + int64_t{2} * pair * args.k);
      ptx::CopyAsync16If(2 * pair + 1 < tiles, target + kPairBytes / 2, words + (int64_t{2} * pair + 1) * args.k);
      if (pair == 0) StartStage(args, at, rings);
      if (pair == kTile.pairs - 1) Advance(args, at);
    }
    ptx::CopyAsyncCommit();
  }

  __device__ __forceinline__ void StartStage(const Arguments& args, const Place& at,
                                             const Rings<kConfig, kGroups>& rings) {
    const uint16_t* const source = x + slice * kStepK;
    ptx::CopyAsync16If(at.lane / 16 < at.tokens, stage + x_target, source);
    if (at.tokens > 2) {
#pragma unroll
      for (int i = 1; i < kTile.tokens / 2; ++i) {
        // Tokens 2i and 2i + 1; the swizzle repeats every 8.
        ptx::CopyAsync16If(2 * i + at.lane / 16 < at.tokens, stage + i * (kStepK * 4) + (x_target ^ (i % 4 << 5)),
                           source + int64_t{2} * i * args.k);
      }
    }
#pragma unroll
    for (int i = 0; i < (kGroups * kScaleChunks + 31) / 32; ++i) {
      const int index = i * 32 + at.lane;
      const int quarter = index / kScaleChunks;
      const int rows = index % kScaleChunks * 4;
      const int64_t group = (first_part + (kGroups == 1 ? slice : slice * 4 + quarter)) >> args.group_shift;
      const int row = (at.first_tile + at.warp_tile + chunk) * 8 + rows;
      ptx::CopyAsync16If(quarter < kGroups && rows < 8 * tiles, stage + rings.x_bytes + index * 16,
                         args.operands.scales_and_zeros + 2 * (group * args.n + row));
    }
    stage += rings.stage_bytes;
    if (stage == rings.stages_end) stage = rings.stages;
  }

  __device__ __forceinline__ void Advance(const Arguments& args, const Place& at) {
    slice += args.warps_k;
    words += args.warps_k * kStepK;
    if (slice < args.slices) return;
    slice = at.slice;
    chunk += args.chunk_tiles;
    tiles = at.WarpTiles(args, chunk);
    words = Words(args, at);
  }
};

// The B fragments of one step of x, and the sums of x over its groups, divided by kUnit.
template <typename Float, int kConfig, int kGroups>
struct Activations {
  static constexpr int kBlocks = kConfigs[kConfig].tokens / 8;

  uint32_t b[kBlocks][4][4];  // [8 tokens][32 values of k][8 of them]
  float sum[kBlocks][kGroups][2];

  __device__ __forceinline__ void Load(uint32_t stage, const uint32_t (&offset)[kBlocks]) {
#pragma unroll
    for (int t = 0; t < kBlocks; ++t) {
#pragma unroll
      for (int j = 0; j < 4; ++j) ptx::LoadMatrixX4(b[t][j], stage + (offset[t] ^ (j << 6)));
    }
  }

  // Two chains of mma, half as deep as one.
  __device__ __forceinline__ void Sum() {
    constexpr uint32_t kOne = Nibble<Float>::kOne;
    const uint32_t ones[4] = {kOne, kOne, kOne, kOne};
#pragma unroll
    for (int t = 0; t < kBlocks; ++t) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        float even[4] = {};
        float odd[4] = {};
#pragma unroll
        for (int j = 4 / kGroups * g; j < 4 / kGroups * (g + 1); ++j) {
          ptx::MmaM16N8K16<Float>(even, ones, b[t][j][0], b[t][j][1]);
          ptx::MmaM16N8K16<Float>(odd, ones, b[t][j][2], b[t][j][3]);
        }
        sum[t][g][0] = even[0] + odd[0];
        sum[t][g][1] = even[1] + odd[1];
      }
    }
  }
};

// sums += w x^T of one row tile over one step, divided by kUnit.
template <typename Float, int kConfig, int kGroups>
__device__ __forceinline__ void MultiplyPair(float (&sums)[kConfigs[kConfig].tokens / 8][4],
                                             const Activations<Float, kConfig, kGroups>& x,
                                             const uint32_t (&low_tile)[4], const uint32_t (&high_tile)[4],
                                             uint32_t scales_address) {
  using Code = Nibble<Float>;
  constexpr Config kTile = kConfigs[kConfig];
  constexpr int kBlocks = kTile.tokens / 8;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    uint32_t scales[2];
    scales[0] = ptx::LoadShared(scales_address + g * kTile.Rows() * 4);
    scales[1] = ptx::LoadShared(scales_address + (g * kTile.Rows() + 8) * 4);
    // The tensor cores add with truncation; they sum a group's part of the step from zero, the rest is rounded f32. A
    // long group takes two chains: half the latency.
    float first[kBlocks][4] = {};
    float second[kBlocks][4] = {};
#pragma unroll
    for (int j = 4 / kGroups * g; j < 4 / kGroups * (g + 1); ++j) {
      const uint32_t low = low_tile[j];
      const uint32_t high = high_tile[j];
      const uint32_t a[4] = {Code::Low(low), Code::Low(high), Code::High(low), Code::High(high)};
      const uint32_t c[4] = {Code::Low(low >> 8), Code::Low(high >> 8), Code::High(low >> 8), Code::High(high >> 8)};
#pragma unroll
      for (int t = 0; t < kBlocks; ++t) {
        ptx::MmaM16N8K16<Float>(first[t], a, x.b[t][j][0], x.b[t][j][1]);
        ptx::MmaM16N8K16<Float>(kGroups == 1 ? second[t] : first[t], c, x.b[t][j][2], x.b[t][j][3]);
      }
    }
    // sum ((q - 8) scale + zero) x = scale sum (q - 8) x + zero sum x
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = FloatBits<Float>::Low(scales[half]);
      const float zero = FloatBits<Float>::High(scales[half]);
#pragma unroll
      for (int t = 0; t < kBlocks; ++t) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 2 * half + i;
          const float q = kGroups == 1 ? first[t][at] + second[t][at] : first[t][at];
          sums[t][at] = fmaf(zero, x.sum[t][g][i], fmaf(scale, q, sums[t][at]));
        }
      }
    }
  }
}

template <typename Float, int kConfig, int kGroups>
__global__ void __launch_bounds__(32 * kConfigs[kConfig].most_warps, 1) Kernel(const __grid_constant__ Arguments args) {
  constexpr Config kTile = kConfigs[kConfig];
  constexpr int kBlocks = kTile.tokens / 8;
  extern __shared__ __align__(128) uint8_t shared[];
  const Place at(args, kTile.tokens);
  const Rings<kConfig, kGroups> rings(args, at, ptx::SharedAddress(shared));
  Copies<kConfig, kGroups> copies(args, at, rings);
#pragma unroll 1
  for (int step = 0; step < kTile.ahead; ++step) {
#pragma unroll
    for (int p = 0; p < kTile.pairs; ++p) copies.Start(args, at, rings, p, rings.words + step * kTile.WordBytes());
  }

  // Lanes of tokens that x does not have read token 0: their columns of the sums are not stored.
  uint32_t b_offset[kBlocks];
#pragma unroll
  for (int t = 0; t < kBlocks; ++t) {
    const int token = 8 * t + at.lane % 8;
    const int row = token < at.tokens ? token : 0;
    b_offset[t] = row * (kStepK * 2) + ((at.lane / 8 ^ row % 8) << 4);
  }

  uint32_t slot = rings.words;
  uint32_t stage = rings.stages;
  // Partial sums of a warp, [row tile][8 tokens][lane][4]: in the place of its ring of words or, where other chunks
  // follow, behind the rings, in two buffers that take turns, so that one barrier a chunk is enough.
  const bool one_chunk = at.tiles <= args.chunk_tiles;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const int partial_bytes = PartialBytes(kTile, args.warp_pairs);
  const int warp_stride = one_chunk ? rings.BytesPerWarp() : partial_bytes;
  uint8_t* partials = shared + (one_chunk ? 0 : warps * rings.BytesPerWarp()) + at.lane * 16;
  int other_partials = warps * partial_bytes;

#pragma unroll 1
  for (int chunk = 0; chunk < at.tiles; chunk += args.chunk_tiles) {
    const int warp_tiles = at.WarpTiles(args, chunk);
    float sums[kTile.pairs][kBlocks][4] = {};
#pragma unroll 1
    for (int slice = at.slice; slice < args.slices; slice += args.warps_k) {
      Activations<Float, kConfig, kGroups> x;
      const uint32_t scale_row = stage + rings.x_bytes + at.lane / 4 * 4;
#pragma unroll
      for (int first = 0; first < kTile.pairs; first += kTile.at_once) {
        constexpr int kAtOnce = kTile.at_once;
        // One group of copies is committed a row tile, pairs * ahead of them before it is needed.
        constexpr int kRest = kTile.pairs % kAtOnce;
        if (kRest == 0 || first + kAtOnce <= kTile.pairs) {
          ptx::CopyAsyncWait<kTile.pairs * kTile.ahead - kAtOnce>();
        } else {
          ptx::CopyAsyncWait<kTile.pairs * kTile.ahead - kRest>();
        }
        // A lane copies the words that it reads, but x and the scales come from all of them, with the first row tile.
        if (first == 0) __syncwarp();
        uint32_t low_tile[kAtOnce][4];
        uint32_t high_tile[kAtOnce][4];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int p = first + i;
          if (p >= kTile.pairs) break;
          const uint32_t words = slot + p * kPairBytes + at.lane * 16;
          ptx::LoadShared(low_tile[i], words);
          ptx::LoadShared(high_tile[i], words + kPairBytes / 2);
        }
        if (first == 0) x.Load(stage, b_offset);
        // The words' slots are free again. The stage that is filled next was read in the step before.
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (first + i < kTile.pairs) copies.Start(args, at, rings, first + i, slot);
        }
        if (first == 0) x.Sum();
        // One branch for all, so that their instructions can be interleaved; sums past the warp's tiles are not stored.
        if (2 * first < warp_tiles) {
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const int p = first + i;
            if (p < kTile.pairs) MultiplyPair(sums[p], x, low_tile[i], high_tile[i], scale_row + 16 * p * 4);
          }
        }
      }
      slot += kTile.WordBytes();
      if (slot == rings.stages) slot = rings.words;
      stage += rings.stage_bytes;
      if (stage == rings.stages_end) stage = rings.stages;
    }

    __syncwarp();
#pragma unroll
    for (int t = 0; t < kBlocks; ++t) {
      if (8 * t + at.lane % 4 * 2 >= at.tokens) continue;
#pragma unroll
      for (int p = 0; p < kTile.pairs; ++p) {
        if (2 * p < warp_tiles) {
          const float (&sum)[4] = sums[p][t];
          *reinterpret_cast<float4*>(partials + at.warp * warp_stride + (p * kBlocks + t) * 512) =
              make_float4(sum[0], sum[1], sum[2], sum[3]);
        }
      }
    }
    __syncthreads();

    // Slices are added in order, so that the same inputs give the same bits.
    const int pairs = (min(args.chunk_tiles, at.tiles - chunk) + 1) / 2;
    for (int block = at.warp; block < pairs * kBlocks; block += warps) {
      const int token = block % kBlocks * 8 + at.lane % 4 * 2;
      if (token >= at.tokens) continue;
      const int column = at.Column(block / kBlocks, args.warp_pairs);
      const uint8_t* part =
          partials + column * args.warps_k * warp_stride + (block - column * args.warp_pairs * kBlocks) * 512;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
      for (int s = 0; s < args.warps_k; s += 4) {
#pragma unroll
        for (int i = 0; i < 4; ++i, part += warp_stride) {
          const float4 value = *reinterpret_cast<const float4*>(part);
          sum.x += value.x;
          sum.y += value.y;
          sum.z += value.z;
          sum.w += value.w;
        }
      }
      using Bits = FloatBits<Float>;
      constexpr float kUnit = Nibble<Float>::kUnit;
      const int tile = chunk + block / kBlocks * 2;
      const bool two_tiles = tile + 1 < at.tiles;
      const bool two_tokens = token + 1 < at.tokens;
      const int64_t first = static_cast<int64_t>(at.product * args.m + at.first_token + token) * args.n +
                            (at.first_tile + tile) * 8 + at.lane / 4;
      if (args.float32_result) {
        float* const y = static_cast<float*>(args.operands.y) + first;
        y[0] = kUnit * sum.x;
        if (two_tiles) y[8] = kUnit * sum.z;
        if (two_tokens) y[args.n] = kUnit * sum.y;
        if (two_tiles && two_tokens) y[args.n + 8] = kUnit * sum.w;
      } else {
        uint16_t* const y = static_cast<uint16_t*>(args.operands.y) + first;
        y[0] = Bits::Round(kUnit * sum.x);
        if (two_tiles) y[8] = Bits::Round(kUnit * sum.z);
        if (two_tokens) y[args.n] = Bits::Round(kUnit * sum.y);
        if (two_tiles && two_tokens) y[args.n + 8] = Bits::Round(kUnit * sum.w);
      }
    }
    partials += other_partials;
    other_partials = -other_partials;
  }
}

// The kernels for one dtype, in the order of kConfigs, with one group of scales a step or four.
template <typename Float, int... kEvery>
const void* KernelOf(int config, int groups, std::integer_sequence<int, kEvery...>) {
  static const std::array<const void*, 2 * sizeof...(kEvery)> kernels = {
      reinterpret_cast<const void*>(&Kernel<Float, kEvery, 1>)...,
      reinterpret_cast<const void*>(&Kernel<Float, kEvery, 4>)...};
  return kernels[(groups == 1 ? 0 : sizeof...(kEvery)) + config];
}

template <typename Float>
const void* KernelOf(int config, int groups) {
  return KernelOf<Float>(config, groups, std::make_integer_sequence<int, static_cast<int>(kConfigs.size())>());
}

// One translation unit a dtype defines one of these.
const void* BFloat16Kernel(int config, int groups);
const void* Float16Kernel(int config, int groups);

}  // namespace int4mm::cuda::decode
