// y^T = w x^T by products of warpgroups (wgmma), the weights dequantised into registers. docs/kernels/hopper.md is the
// essay.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "core/problem.h"
#include "cuda/kernels/dequant.cuh"
#include "cuda/kernels/float_bits.cuh"
#include "cuda/kernels/hopper/config.h"
#include "cuda/kernels/hopper/ptx.cuh"

namespace int4mm::cuda::hopper {

// Division by a number that is known on the host.
struct Divisor {
  uint32_t divisor = 1;
  uint32_t reciprocal = 0xFFFFFFFF;  // floor(2^32 / divisor), or a little less.

  Divisor() = default;
  explicit Divisor(int64_t value)
      : divisor(static_cast<uint32_t>(value)), reciprocal(static_cast<uint32_t>(0xFFFFFFFF / value)) {}

  // The quotient; `value` becomes the remainder.
  __device__ __forceinline__ uint32_t Divide(uint32_t& value) const {
    uint32_t quotient = __umulhi(value, reciprocal);
    value -= quotient * divisor;
    while (value >= divisor) {
      value -= divisor;
      ++quotient;
    }
    return quotient;
  }
};

struct Arguments {
  // Of the whole batch, but x of one product where all have the same. A box lies within a product.
  CUtensorMap x;       // [batch][m][k], boxes [tokens][kBoxK], swizzled.
  CUtensorMap packed;  // [batch][n / 8][k], boxes [Rows() / 8][kStepK].
  CUtensorMap scales;  // [batch][k / group_size][n], boxes [groups of a step][Rows()].
  CUtensorMap y;       // [batch][m][n], boxes [tokens][kRowTile], swizzled; only where output is staged.
  void* output;        // y, too.
  int m;
  int n;
  bool shared_x;
  bool float32_result;
  bool staged_output;  // Whether y goes through stages: 16 bits, each tile by one CTA. Else threads store it.
  int group_shift;     // log2(group_size)
  int inner_k_tiles;
  // The first whole_tiles tasks are tiles of the output, those after are the rows of one warpgroup in a tile.
  int tasks;
  int whole_tiles;
  // Tiles of neighbouring clusters have tokens in common: up to kRaster token tiles form a band, all rows of which are
  // taken before the next band. The last band may have fewer.
  int bands;
  Divisor per_product;  // Tiles of a product of the batch,
  Divisor per_band;     // and of a band.
  Divisor band_tiles_m;
  Divisor last_band_tiles_m;
  int split_k;
  int split_shift;     // log2(split_k)
  int steps_per_part;  // Of kStepK values of k, of each CTA of a cluster;
  int larger_parts;    // the first so many have one more.
  int stages;
  int stage_bytes;
  int copied_bytes;  // Of a stage.
};

// What is known of a weight when the kernel is compiled: without branches a step is shorter.
enum class Form {
  kOneGroup,  // inner_k_tiles = 8, and a step's scales are those of one group.
  kGroups,    // inner_k_tiles = 8, and they may be of up to four.
  kAny,
};
inline constexpr int kForms = 3;

constexpr int kRaster = 8;
// f32 sums of the tensor cores are truncated, an error of one sign. Tiles with registers for a second set of sums add
// up this many steps from zero and then add in rounded f32.
constexpr int kStretch = 8;

// A cluster's task.
struct Tile {
  static constexpr int kEvery = -1;

  int product;  // Of the batch.
  int first_token;
  int first_row;
  int warpgroup = kEvery;  // Whose rows are wanted.

  __device__ __forceinline__ Tile(const Arguments& args, const Config& config, int task) {
    uint32_t in_band = static_cast<uint32_t>(task);
    if (task >= args.whole_tiles) {
      const int rows = task - args.whole_tiles;
      warpgroup = rows % config.warpgroups;
      in_band = static_cast<uint32_t>(args.whole_tiles + rows / config.warpgroups);
    }
    product = static_cast<int>(args.per_product.Divide(in_band));
    const uint32_t band = args.per_band.Divide(in_band);
    uint32_t tile_m = in_band;
    const bool last = static_cast<int>(band) == args.bands - 1;
    const uint32_t tile_n = (last ? args.last_band_tiles_m : args.band_tiles_m).Divide(tile_m);
    first_row = static_cast<int>(tile_n) * config.Rows();
    first_token = static_cast<int>(band * kRaster + tile_m) * config.tokens;
  }

  // y of the product.
  template <typename T>
  __device__ __forceinline__ T* Output(const Arguments& args) const {
    return static_cast<T*>(args.output) + static_cast<int64_t>(product) * args.m * args.n;
  }

  __device__ __forceinline__ bool Wants(int of_warpgroup) const {
    return warpgroup == kEvery || warpgroup == of_warpgroup;
  }
};

// The CTA's place among the clusters, its part of k, and its shared memory: the ring, then the barriers.
struct Place {
  int cluster;
  int clusters;
  int rank;  // In the cluster.
  int first_step;
  int steps;
  uint32_t ring;
  // Barriers of the stages:
  uint32_t full;    // copied, or given to the output,
  uint32_t empty;   // multiplied, or stored,
  uint32_t output;  // filled with output; where k is divided, of blocks of sums: they have come from all other CTAs.

  __device__ __forceinline__ Place(const Arguments& args, uint32_t shared) {
    // From blockIdx, not the registers of clusters: the compiler knows that all threads agree on it.
    const int block = static_cast<int>(blockIdx.x);
    cluster = block >> args.split_shift;
    clusters = static_cast<int>(gridDim.x) >> args.split_shift;
    rank = block & (args.split_k - 1);
    first_step = rank * args.steps_per_part + min(rank, args.larger_parts);
    steps = args.steps_per_part + (rank < args.larger_parts ? 1 : 0);
    ring = shared;
    full = shared + args.stages * args.stage_bytes;
    empty = full + 8 * kMostStages;
    output = empty + 8 * kMostStages;
  }

  __device__ __forceinline__ uint32_t Stage(const Arguments& args, int stage) const {
    return ring + stage * args.stage_bytes;
  }
};

// The next stage of the ring and the parity of its round.
struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void Next(const Arguments& args) {
    if (++stage == args.stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Starts the copies of one step of a tile.
template <int kConfig>
__device__ __forceinline__ void CopyStage(const Arguments& args, const Place& at, const Tile& tile, int step,
                                          int stage) {
  constexpr Config kTile = kConfigs[kConfig];
  const uint32_t full = at.full + 8 * stage;
  const uint32_t x = at.Stage(args, stage);
  const uint32_t words = x + kTile.XBytes();
  const int k = step * kStepK;
  const int x_product = args.shared_x ? 0 : tile.product;
  ptx::ExpectBytes(full, args.copied_bytes);
  ptx::CopyTensorTile(words, &args.packed, tile.product, tile.first_row / 8, k, full);
  ptx::CopyTensorTile(words + kTile.WordBytes(), &args.scales, tile.product, k >> args.group_shift, tile.first_row,
                      full);
  ptx::CopyTensorTile(x, &args.x, x_product, tile.first_token, k, full);
  ptx::CopyTensorTile(x + kTile.XBytes() / 2, &args.x, x_product, tile.first_token, k + kBoxK, full);
}

// One thread copies every stage of every tile but the first, which is under way, and hands stages to the output.
template <int kConfig>
__device__ __forceinline__ void Produce(const Arguments& args, const Place& at) {
  constexpr Config kTile = kConfigs[kConfig];
  Turn turn;
  turn.Next(args);
  int step = at.first_step + 1;
  for (int task = at.cluster; task < args.tasks; task += at.clusters) {
    const Tile tile(args, kTile, task);
    // Four steps unrolled, as the compiler would have them, take more registers than these warps keep.
#pragma unroll 1
    for (; step < at.first_step + at.steps; ++step) {
      ptx::WaitBarrier(at.empty + 8 * turn.stage, turn.parity ^ 1);
      CopyStage<kConfig>(args, at, tile, step, turn.stage);
      turn.Next(args);
    }
    step = at.first_step;
    if (!args.staged_output) continue;
    for (int i = 0; i < kTile.OutputStages(); ++i) {
      ptx::WaitBarrier(at.empty + 8 * turn.stage, turn.parity ^ 1);
      ptx::Arrive(at.full + 8 * turn.stage, 1);
      turn.Next(args);
    }
  }
}

// One thread of another warp stores what the multiplying warps have put into stages.
template <int kConfig>
__device__ __forceinline__ void StoreOutput(const Arguments& args, const Place& at) {
  constexpr Config kTile = kConfigs[kConfig];
  constexpr int kBytes = kTile.tokens * kRowTile * 2;
  int stage = 0;
  uint32_t parities = 0;  // Of the barriers of all stages.
  for (int task = at.cluster; task < args.tasks; task += at.clusters) {
    const Tile tile(args, kTile, task);
    stage = (stage + at.steps) % args.stages;
#pragma unroll
    for (int i = 0; i < kTile.OutputStages(); ++i) {
      ptx::WaitBarrier(at.output + 8 * stage, parities >> stage & 1);
      parities ^= 1u << stage;
#pragma unroll
      for (int warpgroup = 2 * i; warpgroup < 2 * i + 2; ++warpgroup) {
        const int row = tile.first_row + warpgroup * kRowTile;
        if (warpgroup >= kTile.warpgroups || row >= args.n || !tile.Wants(warpgroup)) continue;
        ptx::StoreTensorTile(&args.y, tile.product, tile.first_token, row,
                             at.Stage(args, stage) + warpgroup % 2 * kBytes);
      }
      ptx::WaitStoresRead();
      ptx::Arrive(at.empty + 8 * stage, 4 * kTile.warpgroups);
      if (++stage == args.stages) stage = 0;
    }
  }
}

// A lane's words of an n-tile in one step, word j of values 32 j and on.
template <Form kForm>
__device__ __forceinline__ void LoadWords(uint32_t (&word)[4], uint32_t tile, int lane, int inner_k_tiles) {
  if (kForm != Form::kAny || inner_k_tiles == 8) {
    ptx::LoadShared(word, tile + lane * 16);
  } else if (inner_k_tiles == 4) {
#pragma unroll
    for (int j = 0; j < 4; ++j) word[j] = ptx::LoadShared(tile + j / 2 * 256 + lane * 8 + j % 2 * 4);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) word[j] = ptx::LoadShared(tile + j * 128 + lane * 4);
  }
}

// Where k is divided, a CTA adds up so many of its blocks of 8 tokens at a time, and others are on their way meanwhile.
constexpr int kBlocksAtOnce = 4;
static_assert(CeilDiv(CeilDiv(256 / 8, 2), kBlocksAtOnce) <= kMostStages, "each has a barrier");

// What the other CTAs of the cluster will send.
template <int kConfig>
__device__ __forceinline__ void ExpectSums(const Arguments& args, const Place& at) {
  constexpr Config kTile = kConfigs[kConfig];
  const int blocks = (kTile.tokens / 8 - at.rank + args.split_k - 1) >> args.split_shift;
  for (int i = 0; kBlocksAtOnce * i < blocks; ++i) {
    ptx::InitBarrier(at.output + 8 * i, 1);
    ptx::ExpectBytes(at.output + 8 * i,
                     (args.split_k - 1) * min(kBlocksAtOnce, blocks - kBlocksAtOnce * i) * kTile.SumsBytes());
  }
}

// y of a tile as f32, for a warp with 16 rows from `row` on and every `stride`-th block of 8 tokens from `block` on. Of
// a block a thread has two neighbouring tokens, and two rows that are 8 apart: one instruction stores 8 rows, a sector
// of memory, of each of four tokens.
class Float32Output {
 public:
  __device__ __forceinline__ Float32Output(const Arguments& args, const Config& config, const Tile& tile, int row,
                                           int lane, int block, int stride) {
    const int token = 8 * block + lane % 4 * 2;
    tokens_ = min(args.m - tile.first_token, config.tokens) - token;
    stride_tokens_ = 8 * stride;
    upper_ = row < args.n;
    lower_ = row + 8 < args.n;
    even_ = tile.Output<float>(args) + static_cast<int64_t>(tile.first_token + token) * args.n + row + lane / 4;
    odd_ = even_ + args.n;
    stride_ = static_cast<int64_t>(stride_tokens_) * args.n;
  }

  // Stores the sums of the next block, if there is one.
  __device__ __forceinline__ void Store(const float (&sums)[4]) {
    if (tokens_ > 0 && upper_) even_[0] = sums[0];
    if (tokens_ > 1 && upper_) odd_[0] = sums[1];
    if (tokens_ > 0 && lower_) even_[8] = sums[2];
    if (tokens_ > 1 && lower_) odd_[8] = sums[3];
    tokens_ -= stride_tokens_;
    even_ += stride_;
    odd_ += stride_;
  }

 private:
  int tokens_;  // Of the tile, from the thread's first of the block on.
  int stride_tokens_;
  bool upper_;  // Whether w has the first 8 rows,
  bool lower_;  // and the next.
  float* even_;
  float* odd_;
  int64_t stride_;
};

// Stores a warp's 16 rows by 8 tokens, rounded. They are transposed, so that four lanes hold the 16 rows of a token.
template <typename Float>
__device__ __forceinline__ void StoreRounded(const Arguments& args, uint16_t* y, int first_token, int row, int lane,
                                             const float (&sums)[4]) {
  const uint32_t upper = ptx::Transpose8x8(FloatBits<Float>::RoundPair(sums[0], sums[1]));
  const uint32_t lower = ptx::Transpose8x8(FloatBits<Float>::RoundPair(sums[2], sums[3]));
  // A lane has two rows of each half; an even one takes its neighbour's of the upper, an odd one of the lower.
  const bool odd = lane % 2 == 1;
  const uint32_t received = __shfl_xor_sync(0xFFFFFFFF, odd ? upper : lower, 1);
  const uint2 rows = odd ? make_uint2(received, lower) : make_uint2(upper, received);
  const int token = first_token + lane / 4;
  const int first = row + (odd ? 6 : 0) + lane % 4 * 2;
  y += static_cast<int64_t>(token) * args.n + first;
  if (token < args.m && first < args.n) *reinterpret_cast<uint2*>(y) = rows;
}

// Adds up the sums of the CTAs of a cluster. Block b of 8 tokens is added up by the CTA of rank b % split_k, in the
// order of k. The others send it theirs, into its ring, which nobody reads any more; a thread's come from the threads
// of its own index.
template <typename Float, int kConfig>
__device__ __forceinline__ void AddUp(const Arguments& args, const Place& at, const Tile& tile, int thread,
                                      const float (&sums)[kConfigs[kConfig].tokens / 8][4]) {
  constexpr Config kTile = kConfigs[kConfig];
  constexpr int kBlocks = kTile.tokens / 8;
  const uint32_t exchange = at.ring + thread * 16;
  ptx::ClusterMeet();
#pragma unroll
  for (int b = 0; b < kBlocks; ++b) {
    const int owner = b & (args.split_k - 1);
    const uint32_t to = exchange + (b - owner + at.rank) * kTile.SumsBytes();
    if (owner == at.rank) {
      ptx::StoreShared4(to, sums[b]);
    } else {
      const uint32_t barrier = at.output + 8 * ((b >> args.split_shift) / kBlocksAtOnce);
      ptx::StoreToRank(ptx::MapToRank(to, owner), sums[b], ptx::MapToRank(barrier, owner));
    }
  }
  const int row = tile.first_row + thread / 32 * 16;
  const int last = (kBlocks - 1) & ~(args.split_k - 1);
  // A loop, since code that runs once is fetched cold.
#pragma unroll 1
  for (int i = 0; at.rank + (kBlocksAtOnce * i << args.split_shift) < kBlocks; ++i) {
    ptx::WaitBarrierOfCluster(at.output + 8 * i, 0);
    float total[kBlocksAtOnce][4] = {};
    for (int rank = 0; rank < args.split_k; ++rank) {
      // All loads before all stores: the compiler keeps their order.
#pragma unroll
      for (int j = 0; j < kBlocksAtOnce; ++j) {
        const int first = min((kBlocksAtOnce * i + j) << args.split_shift, last);
        const float4 part = ptx::LoadShared4(exchange + (first + rank) * kTile.SumsBytes());
        total[j][0] += part.x;
        total[j][1] += part.y;
        total[j][2] += part.z;
        total[j][3] += part.w;
      }
    }
    if (args.float32_result) {
      const int block = at.rank + (kBlocksAtOnce * i << args.split_shift);
      Float32Output output(args, kTile, tile, row, thread % 32, block, args.split_k);
#pragma unroll
      for (int j = 0; j < kBlocksAtOnce; ++j) output.Store(total[j]);
      continue;
    }
#pragma unroll
    for (int j = 0; j < kBlocksAtOnce; ++j) {
      const int block = at.rank + ((kBlocksAtOnce * i + j) << args.split_shift);
      if (block < kBlocks)
        StoreRounded<Float>(args, tile.Output<uint16_t>(args), tile.first_token + 8 * block, row, thread % 32,
                            total[j]);
    }
  }
}

template <typename Float, int kConfig, Form kForm>
__device__ __forceinline__ void Consume(const Arguments& args, const Place& at, int thread) {
  constexpr Config kTile = kConfigs[kConfig];
  constexpr int kBlocks = kTile.tokens / 8;
  constexpr bool kStretches = kTile.Stretches();
  constexpr int kBatch = kTile.batch;
  const int lane = thread % 32;
  // The shuffle tells the compiler that all lanes agree, so that what follows from it, branches too, is a warp's.
  const int warp = __shfl_sync(0xFFFFFFFF, thread / 32, 0);
  const int first_row = warp * 16;  // In the tile.
  const uint32_t words_offset = kTile.XBytes() + first_row / 8 * (kStepK * 4);
  const uint32_t scales_offset = kTile.XBytes() + kTile.WordBytes() + (first_row + lane / 4) * 4;

  // Weights are dequantised into one set of registers while products of the other run. Where a whole step is one batch
  // there is one set: another warpgroup's products run meanwhile.
  constexpr int kSets = kBatch == 4 ? 1 : 2;

  Turn turn;
  for (int task = at.cluster; task < args.tasks; task += at.clusters) {
    const Tile tile(args, kTile, task);
    if (!tile.Wants(warp / 4)) {
      for (int step = 0; step < at.steps; ++step) {
        ptx::WaitBarrier(at.full + 8 * turn.stage, turn.parity);
        ptx::ArriveIf(lane == 0, at.empty + 8 * turn.stage);
        turn.Next(args);
      }
      for (int i = 0; args.staged_output && i < kTile.OutputStages(); ++i) turn.Next(args);
      continue;
    }
    float sums[kBlocks][4] = {};
    float stretch[kStretches ? kBlocks : 1][4];
    const auto add_stretch = [&] {
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[b][i] += stretch[b][i];
      }
    };
    uint32_t a[kSets][kBatch][2][4];
    int previous = 0;  // Stage.
    for (int step = 0; step < at.steps; ++step) {
      ptx::WaitBarrier(at.full + 8 * turn.stage, turn.parity);
      const uint32_t stage = at.Stage(args, turn.stage);
      const uint64_t x = ptx::SwizzledMatrix(stage);
      uint32_t word[2][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        LoadWords<kForm>(word[half], stage + words_offset + half * (kStepK * 4), lane, args.inner_k_tiles);
      }
      if constexpr (kSets == 1) {
        ptx::WgmmaWait<0>();
        ptx::ArriveIf(lane == 0 && step > 0, at.empty + 8 * previous);
        if (kStretches && step > 0 && step % kStretch == 0) add_stretch();
      }
      ScaleAndZero groups[2];
#pragma unroll
      for (int batch = 0; batch < 4 / kBatch; ++batch) {
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int j = batch * kBatch + i;
          if (j == 0 || kForm != Form::kOneGroup) {
            const uint32_t group = (32 * j) >> args.group_shift;
            const uint32_t scales = stage + scales_offset + group * (kTile.Rows() * 4);
            groups[0] = SplitScaleAndZero<Float>(ptx::LoadShared(scales));
            groups[1] = SplitScaleAndZero<Float>(ptx::LoadShared(scales + 8 * 4));
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint32_t (&to)[2][4] = a[batch % kSets][i];
            to[0][half] = DequantizePair<Float, 0>(word[half][j], groups[half]);
            to[0][2 + half] = DequantizePair<Float, 1>(word[half][j], groups[half]);
            to[1][half] = DequantizePair<Float, 2>(word[half][j], groups[half]);
            to[1][2 + half] = DequantizePair<Float, 3>(word[half][j], groups[half]);
          }
        }
        ptx::WgmmaFence();
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
            const int k16 = 2 * (batch * kBatch + i) + s;  // Which 16 values of the step; 32 bytes of a row of x.
            const uint64_t b = x + (k16 / 4 * (kTile.XBytes() / 2) + k16 % 4 * 32) / 16;
            if constexpr (kStretches) {
              ptx::Wgmma<Float, kTile.tokens>::Start(stretch, a[batch % kSets][i][s], b, k16 > 0 ? 1 : step % kStretch);
            } else {
              ptx::Wgmma<Float, kTile.tokens>::Start(sums, a[batch % kSets][i][s], b, 1);
            }
          }
        }
        ptx::WgmmaCommit();
        if constexpr (kSets == 2) {
          ptx::WgmmaWait<1>();
          if (batch == 0) ptx::ArriveIf(lane == 0 && step > 0, at.empty + 8 * previous);
        }
      }
      if (kSets == 2 && kStretches && (step % kStretch == kStretch - 1 || step + 1 == at.steps)) {
        ptx::WgmmaWait<0>();
        add_stretch();
      }
      previous = turn.stage;
      turn.Next(args);
    }
    ptx::WgmmaWait<0>();
    ptx::ArriveIf(lane == 0, at.empty + 8 * previous);
    if (kSets == 1 && kStretches) add_stretch();

    if (args.staged_output) {
      // Into the stage of this pair of warpgroups, as the copy engine takes it: [token][row], chunks of 16 bytes (8
      // rows) swizzled. The stage's barrier counts the warps of two warpgroups; one without a partner counts twice, and
      // one that is alone in the tile counts for every stage.
      const bool alone = tile.warpgroup != Tile::kEvery;
      for (int i = 0; i < kTile.OutputStages(); ++i) {
        const bool mine = kTile.OutputStages() == 1 || i == warp / 8;
        if (mine || alone) {
          ptx::WaitBarrier(at.full + 8 * turn.stage, turn.parity);
          if (mine) {
            const int token = lane / 16 * 8 + lane % 8;
            const int chunk = warp % 4 * 2 + lane / 8 % 2;
            uint32_t y = at.Stage(args, turn.stage) + warp / 4 % 2 * (kTile.tokens * kRowTile * 2) +
                         token * (kRowTile * 2) + ((chunk ^ token % 8) << 4);
#pragma unroll
            for (int b = 0; b < kBlocks; b += 2, y += 16 * kRowTile * 2) {
              ptx::StoreMatrixTransposedX4(y, FloatBits<Float>::RoundPair(sums[b][0], sums[b][1]),
                                           FloatBits<Float>::RoundPair(sums[b][2], sums[b][3]),
                                           FloatBits<Float>::RoundPair(sums[b + 1][0], sums[b + 1][1]),
                                           FloatBits<Float>::RoundPair(sums[b + 1][2], sums[b + 1][3]));
            }
            ptx::FenceCopyEngine();
            __syncwarp();
          }
          if (lane == 0) ptx::Arrive(at.output + 8 * turn.stage, alone || 2 * i + 1 == kTile.warpgroups ? 2 : 1);
        }
        turn.Next(args);
      }
      continue;
    }

    if (args.split_k > 1) {
      AddUp<Float, kConfig>(args, at, tile, thread, sums);
      continue;
    }
    Float32Output output(args, kTile, tile, tile.first_row + first_row, lane, 0, 1);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) output.Store(sums[b]);
  }
}

template <typename Float, int kConfig, Form kForm>
__global__ void __launch_bounds__(kConfigs[kConfig].Threads(), 1) Kernel(const __grid_constant__ Arguments args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr Config kTile = kConfigs[kConfig];
  extern __shared__ __align__(1024) uint8_t shared[];
  const Place at(args, ptx::SharedAddress(shared));
  // The shuffle tells the compiler that all lanes agree.
  const int warp = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x) / 32, 0);
  constexpr int kProducerWarp = 0;
  constexpr int kStoreWarp = 1;
  constexpr int kPrefetchWarp = 2;
  constexpr int kOtherWarps = 4;
  if (warp < kOtherWarps) {
    ptx::ShrinkRegisters<kTile.OtherRegisters()>();
    // What a call of few steps waits for is its first stage: it is under way before the other barriers are ready.
    if (warp == kProducerWarp && ptx::Elected()) {
      ptx::InitBarrier(at.full, 1);
      ptx::FenceBarrierInit();
      CopyStage<kConfig>(args, at, Tile(args, kTile, at.cluster), at.first_step, 0);
      for (int i = 1; i < args.stages; ++i) ptx::InitBarrier(at.full + 8 * i, 1);
      ptx::FenceBarrierInit();
    } else if (warp == kStoreWarp && ptx::Elected()) {
      for (int i = 0; i < args.stages; ++i) {
        ptx::InitBarrier(at.empty + 8 * i, 4 * kTile.warpgroups);
        if (args.staged_output) ptx::InitBarrier(at.output + 8 * i, 8);
      }
      if (args.split_k > 1) ExpectSums<kConfig>(args, at);
      ptx::FenceBarrierInit();
    } else if (warp == kPrefetchWarp && ptx::Elected()) {
      ptx::PrefetchTensorMap(&args.packed);
      ptx::PrefetchTensorMap(&args.scales);
      ptx::PrefetchTensorMap(&args.x);
    }
    __syncthreads();
    if (warp == kProducerWarp && ptx::Elected()) Produce<kConfig>(args, at);
    if (args.staged_output && warp == kStoreWarp && ptx::Elected()) StoreOutput<kConfig>(args, at);
    // Before sums are exchanged, all threads of a cluster meet.
    if (args.split_k > 1) ptx::ClusterMeet();
  } else {
    ptx::GrowRegisters<kTile.MultiplierRegisters()>();
    __syncthreads();
    Consume<Float, kConfig, kForm>(args, at, static_cast<int>(threadIdx.x) - 32 * kOtherWarps);
  }
#endif
}

// The kernel of a tile and a form, for one dtype.
template <typename Float, int... kEvery>
const void* KernelOf(int config, Form form, std::integer_sequence<int, kEvery...>) {
  static const std::array<std::array<const void*, sizeof...(kEvery)>, kForms> kernels = {{
      {reinterpret_cast<const void*>(&Kernel<Float, kEvery, Form::kOneGroup>)...},
      {reinterpret_cast<const void*>(&Kernel<Float, kEvery, Form::kGroups>)...},
      {reinterpret_cast<const void*>(&Kernel<Float, kEvery, Form::kAny>)...},
  }};
  return kernels[static_cast<size_t>(form)][config];
}

template <typename Float>
const void* KernelOf(int config, Form form) {
  return KernelOf<Float>(config, form, std::make_integer_sequence<int, static_cast<int>(kConfigs.size())>());
}

// One translation unit a dtype defines one of these.
const void* BFloat16Kernel(int config, Form form);
const void* Float16Kernel(int config, Form form);

}  // namespace int4mm::cuda::hopper
