// The plan of the CUDA kernels, on machines without a GPU.
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/ampere_plan.h"
#include "cuda/decode_plan.h"
#include "cuda/hopper_plan.h"
#include "cuda/plan.h"
#include "tests/check.h"

namespace int4mm::cuda {
namespace {

constexpr DeviceDescription kH200{90, 132};

Problem MakeProblem(int64_t m, int64_t n, int64_t k, int64_t batch = 1) {
  Problem p;
  p.batch = batch;
  p.m = m;
  p.n = n;
  p.k = k;
  p.group_size = 128;
  p.inner_k_tiles = 8;
  return p;
}

std::string TileOf(const HopperPlan& plan) {
  const hopper::Config& c = hopper::kConfigs[plan.config];
  return std::to_string(c.Rows()) + "x" + std::to_string(c.tokens);
}

bool Contains(const Status& status, const char* text) { return status.message().find(text) != std::string::npos; }

void EveryTileCoversTheOutput() {
  for (const int64_t m : {1, 7, 8, 9, 33, 64, 65, 96, 97, 1000, 8192}) {
    for (const int64_t n : {8, 24, 136, 4096, 28672}) {
      const Problem p = MakeProblem(m, n, 4096);
      const StatusOr<Plan> plan = MakePlan(p, kH200, "ampere");
      EXPECT(plan.ok()) << plan.status().message();
      const ampere::Config& tile = ampere::kConfigs[plan->config];
      EXPECT(plan->tiles_m * tile.tokens >= m && (plan->tiles_m - 1) * tile.tokens < m) << m;
      EXPECT(plan->tiles_n * tile.TileN() >= n && (plan->tiles_n - 1) * tile.TileN() < n) << n;
    }
  }
}

void TilesFitTheSmallestSharedMemory() {
  for (const ampere::Config& tile : ampere::kConfigs) {
    EXPECT(tile.SharedBytes() <= 99 * 1024) << tile.SharedBytes();
    EXPECT(tile.StageBytes() % 256 == 0) << "the swizzle permutes whole 256-byte rows; " << tile.StageBytes();
    EXPECT(tile.Threads() <= 1024 && tile.tokens % 8 == 0) << tile.Threads();
    // A thread of a slice keeps to one 16-byte chunk of a row of x.
    EXPECT((32 * tile.warps_n) % (2 * ampere::kStepK / 16) == 0) << tile.warps_n;
  }
}

void DecodeSumsFitTheRingWhosePlaceTheyTake() {
  for (const decode::Config& c : decode::kConfigs) {
    EXPECT(decode::PartialBytes(c, c.pairs) <= c.ahead * c.WordBytes()) << c.Rows() << " x " << c.tokens;
  }
}

void EveryTileCanBeForcedByName() {
  const Problem p = MakeProblem(33, 4096, 4096);
  std::set<std::string> names;
  const std::pair<Kernel, size_t> kernels[] = {{Kernel::kAmpere, ampere::kConfigs.size()},
                                               {Kernel::kDecode, decode::kConfigs.size()},
                                               {Kernel::kHopper, hopper::kConfigs.size()}};
  for (const auto& [kernel, tiles] : kernels) {
    for (int i = 0; i < static_cast<int>(tiles); ++i) {
      const std::string name = LaunchName(kernel, i);
      EXPECT(names.insert(name).second) << name << ": two tiles share a name";
      const StatusOr<Plan> plan = MakePlan(p, kH200, name);
      EXPECT(plan.ok() && plan->kernel == kernel && plan->config == i) << name;
      const Explanation e = Explain(p, kH200, *plan);
      EXPECT(e.implementation + "/" + e.tile == name) << e.tile;
      EXPECT(e.weights == (kernel == Kernel::kDecode ? "exact" : "rounded")) << e.weights;
      EXPECT(e.workspace_bytes == 0 && !e.reason.empty()) << e.reason;
    }
  }
}

// Every row tile belongs to one CTA, chunk and warp, and all that a warp computes fits its registers.
void DecodeSchedulesCoverTheOutput() {
  for (const DeviceDescription& device : {kH200, DeviceDescription{80, 108}, DeviceDescription{86, 20}}) {
    for (const int64_t m : {0, 1, 2, 8, 9, 16, 40}) {
      for (const int64_t n : {8, 24, 1280, 3072, 14336, 131072}) {
        for (const int64_t k : {128, 640, 4096, 14336}) {
          for (const int64_t group_size : {32, 128}) {
            for (const int64_t batch : {0, 1, 5, 1000}) {
              Problem p = MakeProblem(m, n, k, batch);
              p.group_size = group_size;
              const std::optional<DecodePlan> plan = PlanDecode(p, device, -1);
              EXPECT(plan.has_value()) << m << " x " << n << " x " << k;
              if (!plan) continue;
              const decode::Config& c = decode::kConfigs[plan->config];
              const decode::Schedule& s = plan->schedule;
              const int64_t most_tiles = (n / 8 + s.ctas - 1) / s.ctas;
              EXPECT(s.ctas >= 1 && s.ctas <= n / 8) << s.ctas;
              EXPECT(s.ctas == 1 || s.ctas * batch <= device.sm_count) << s.ctas << " CTAs, batch " << batch;
              EXPECT(int64_t{s.token_blocks} * c.tokens >= m && int64_t{s.token_blocks - 1} * c.tokens < m) << m;
              EXPECT(int64_t{s.chunks} * s.chunk_tiles >= most_tiles) << most_tiles;
              EXPECT(int64_t{s.chunks - 1} * s.chunk_tiles < most_tiles) << most_tiles;
              EXPECT(s.warp_pairs >= 1 && s.warp_pairs <= c.pairs) << s.warp_pairs;
              EXPECT(2 * s.warp_pairs * s.warps_n >= s.chunk_tiles && s.chunk_tiles % 2 == 0) << s.chunk_tiles;
              EXPECT(s.warps_k % 4 == 0 && s.warps_n <= 4 && s.Warps() <= c.most_warps) << s.Warps();
              EXPECT(s.shared_bytes <= device.SharedBytesPerCta()) << s.shared_bytes;
            }
          }
        }
      }
    }
  }
}

void TheDecodeScheduleIsTheOneWithTheFewestSteps() {
  const auto schedule = [](int64_t m, int64_t n, int64_t k) { return PlanDecode(MakeProblem(m, n, k), kH200, -1); };
  // Measured as the fastest of all on an H200.
  EXPECT(schedule(1, 4096, 4096)->schedule.warps_k == 16) << schedule(1, 4096, 4096)->schedule.warps_k;
  EXPECT(schedule(1, 3072, 3072)->schedule.warps_k == 12) << schedule(1, 3072, 3072)->schedule.warps_k;
  EXPECT(schedule(1, 14336, 4096)->schedule.warps_n == 2) << schedule(1, 14336, 4096)->schedule.warps_n;
  EXPECT(schedule(1, 28672, 8192)->schedule.warps_n == 4) << schedule(1, 28672, 8192)->schedule.warps_n;
  for (const int64_t n : {14336, 28672, 131072}) {
    EXPECT(decode::kConfigs[schedule(16, n, 4096)->config].pairs == 7) << schedule(16, n, 4096)->config;
    EXPECT(schedule(16, n, 4096)->schedule.Warps() == 8) << schedule(16, n, 4096)->schedule.Warps();
    EXPECT(schedule(16, n, 4096)->schedule.token_blocks == 1) << "the weight is read more than once";
  }
}

// Every tile, split or not, has its CTAs at work at one time where they wait for each other, and its sums fit the ring.
void HopperSchedulesCoverTheOutput() {
  for (int config = -1; config < static_cast<int>(hopper::kConfigs.size()); ++config) {
    for (const int64_t m : {1, 17, 64, 257, 4500, 100000}) {
      for (const int64_t n : {8, 136, 1280, 3072, 14336, 131072}) {
        for (const int64_t k : {32, 160, 1280, 4096, 28672}) {
          for (const int64_t group_size : {32, 64, 128, 256}) {
            if (k % group_size != 0) continue;
            const int64_t batch = group_size == 64 ? 7 : 1;
            Problem p = MakeProblem(m, n, k, batch);
            p.group_size = group_size;
            p.inner_k_tiles = 2;
            const std::optional<HopperPlan> plan = PlanHopper(p, kH200, config);
            EXPECT(plan.has_value()) << m << " x " << n << " x " << k;
            if (!plan) continue;
            const hopper::Config& c = hopper::kConfigs[plan->config];
            const hopper::Schedule& s = plan->schedule;
            const int64_t tiles = batch * plan->tiles_m * plan->tiles_n;
            EXPECT(plan->tiles_m * c.tokens >= m && (plan->tiles_m - 1) * c.tokens < m) << m;
            EXPECT(plan->tiles_n * c.Rows() >= n && (plan->tiles_n - 1) * c.Rows() < n) << n;
            EXPECT(s.clusters >= 1 && s.clusters <= tiles && s.clusters * s.split_k <= kH200.sm_count) << s.clusters;
            EXPECT(s.split_k == 1 || s.clusters == tiles) << "a CTA of a cluster takes one tile";
            EXPECT((tiles - s.divided_tiles) % s.clusters == 0 || s.divided_tiles == 0) << s.divided_tiles;
            EXPECT(s.divided_tiles * c.warpgroups <= s.clusters && s.divided_tiles < tiles) << s.divided_tiles;
            EXPECT(int64_t{128} * s.split_k < k + 128) << "a CTA without a step of k";
            EXPECT(s.stages > c.OutputStages() && s.stages <= hopper::kMostStages) << s.stages;
            const int ring = s.stages * c.StageBytes(hopper::GroupsPerStep(group_size));
            EXPECT(s.shared_bytes == ring + hopper::kBarrierBytes) << s.shared_bytes;
            EXPECT(s.shared_bytes <= kH200.SharedBytesPerCta()) << s.shared_bytes;
            EXPECT(s.split_k == 1 || ring >= c.ExchangeBytes(s.split_k)) << ring;
          }
        }
      }
    }
  }
}

void TheFewTilesOfALastWaveAreDivided() {
  const auto divided = [](int64_t m, int64_t n, const char* name, int64_t batch = 1) {
    return MakePlan(MakeProblem(m, n, 4096, batch), kH200, name)->hopper.divided_tiles;
  };
  EXPECT(divided(1024, 14336, "hopper/128x256") == 52) << "448 tiles on 132 SMs";
  EXPECT(divided(256, 14336, "hopper/128x256", 4) == 52) << "448 tiles of a batch";
  EXPECT(divided(768, 14336, "hopper/128x256") == 0) << "72 tiles, by two each, do not fit 132 SMs";
  EXPECT(divided(256, 16896, "hopper/128x256") == 0) << "132 tiles";
  EXPECT(divided(256, 4096, "hopper/128x256") == 0) << "32 tiles";
  EXPECT(divided(64, 128 * 64 + 256 * 101, "hopper/256x64") == 1) << "133 tiles";
}

void HopperTilesFitTheHardware() {
  for (const hopper::Config& c : hopper::kConfigs) {
    EXPECT(c.tokens % 16 == 0 && c.tokens <= 256 && c.Rows() <= 256) << c.Rows() << " x " << c.tokens;
    EXPECT(c.XBytes() % (2 * hopper::kStageAlignment) == 0) << "both halves of x are swizzled; " << c.XBytes();
    EXPECT(128 * (c.warpgroups * c.MultiplierRegisters() + c.OtherRegisters()) <= 65536) << c.warpgroups;
    EXPECT(c.MultiplierRegisters() % 8 == 0 && c.OtherRegisters() % 8 == 0) << c.warpgroups;
    EXPECT(2 * c.tokens * hopper::kRowTile * 2 <= c.StageBytes(1)) << "y of two warpgroups does not fit a stage";
    for (const int split_k : {2, 4, 8}) {
      const int bytes_of_block = 8 * c.Rows() * 4;
      EXPECT(c.ExchangeBytes(split_k) % (split_k * bytes_of_block) == 0) << split_k;
      EXPECT(c.ExchangeBytes(split_k) >= c.tokens / 8 * bytes_of_block) << split_k;
    }
    EXPECT(c.batch == 1 || c.batch == 2 || c.batch == 4) << "words of a step";
  }
}

void EveryKernelIsChosenWhereItIsTheFastest() {
  const auto kernel = [](int64_t m, const DeviceDescription& device, int inner_k_tiles = 8) {
    Problem p = MakeProblem(m, 4096, 4096);
    p.inner_k_tiles = inner_k_tiles;
    return MakePlan(p, device, "")->kernel;
  };
  for (const int64_t m : {1, 8, 16}) EXPECT(kernel(m, kH200) == Kernel::kDecode) << m;
  for (const int64_t m : {17, 33, 64, 1000, 8192}) EXPECT(kernel(m, kH200) == Kernel::kHopper) << m;
  EXPECT(kernel(1, kH200, 4) == Kernel::kAmpere) << "inner_k_tiles of 4";
  EXPECT(kernel(17, kH200, 4) == Kernel::kHopper) << "inner_k_tiles of 4";
  DeviceDescription without_sm_90a = kH200;
  without_sm_90a.has_sm_90a_code = false;
  for (const DeviceDescription& device :
       {DeviceDescription{80, 108}, DeviceDescription{89, 142}, DeviceDescription{100, 148}, without_sm_90a}) {
    for (const int64_t m : {1, 16, 32}) EXPECT(kernel(m, device) == Kernel::kDecode) << m;
    for (const int64_t m : {33, 4096}) EXPECT(kernel(m, device) == Kernel::kAmpere) << m;
  }
  const StatusOr<Plan> wide = MakePlan(MakeProblem(4096, 4096, 4096), DeviceDescription{80, 108}, "");
  EXPECT(ampere::kConfigs[wide->config].tokens >= 64) << wide->config;
}

void TheHopperTileIsTheFastestMeasured() {
  const auto tile = [](int64_t m, int64_t n, int64_t k) {
    const HopperPlan plan = *PlanHopper(MakeProblem(m, n, k), kH200, -1);
    return TileOf(plan) + "/" + std::to_string(plan.schedule.split_k);
  };
  EXPECT(tile(1138, 14336, 4096) == "128x144/1") << tile(1138, 14336, 4096);
  EXPECT(tile(512, 14336, 4096) == "192x128/1") << tile(512, 14336, 4096);
  EXPECT(tile(512, 3072, 3072) == "192x128/2") << tile(512, 3072, 3072);
  EXPECT(tile(256, 4096, 14336) == "128x128/2") << tile(256, 4096, 14336);
  EXPECT(tile(64, 14336, 4096) == "128x64/1") << tile(64, 14336, 4096);
  EXPECT(tile(64, 3072, 3072) == "128x64/4") << tile(64, 3072, 3072);
}

void NoTileSumsALongKInOneChain() {
  for (const int64_t k : {16384, 16512, 28672, 65536}) {
    for (const int64_t m : {17, 300, 1000, 8192, 32776}) {
      for (const int64_t n : {8, 2056, 8192}) {
        const HopperPlan plan = *PlanHopper(MakeProblem(m, n, k), kH200, -1);
        EXPECT(hopper::kConfigs[plan.config].Stretches() || k / plan.schedule.split_k <= 16384)
            << m << " x " << n << " x " << k << ": " << TileOf(plan);
      }
    }
  }
  EXPECT(!hopper::kConfigs[PlanHopper(MakeProblem(8192, 4096, 16384), kH200, -1)->config].Stretches()) << "compared";
  EXPECT(MakePlan(MakeProblem(8192, 4096, 65536), kH200, "hopper/128x256").ok()) << "by name";
}

void TheAmpereTileIsTheFastestMeasured() {
  const auto tile = [](int64_t m, int64_t n, int64_t k) {
    const ampere::Config& c = ampere::kConfigs[PlanAmpere(MakeProblem(m, n, k), kH200, -1)->config];
    return std::to_string(c.TileN()) + "x" + std::to_string(c.tokens);
  };
  EXPECT(tile(1, 4096, 4096) == "16x8") << tile(1, 4096, 4096);
  EXPECT(tile(1, 14336, 4096) == "32x8") << tile(1, 14336, 4096);
  EXPECT(tile(16, 4096, 4096) == "16x16") << tile(16, 4096, 4096);
  EXPECT(tile(32, 4096, 4096) == "32x32") << tile(32, 4096, 4096);
  EXPECT(tile(128, 4096, 4096) == "64x32") << tile(128, 4096, 4096);
  EXPECT(tile(512, 3072, 3072) == "128x32") << tile(512, 3072, 3072);
  EXPECT(tile(256, 4096, 14336) == "64x64") << tile(256, 4096, 14336);
  EXPECT(tile(4096, 14336, 4096) == "128x64") << tile(4096, 14336, 4096);
}

void AmpereTilesAreChosenForEveryArchitecture() {
  for (const DeviceDescription& device :
       {DeviceDescription{80, 108}, DeviceDescription{86, 84}, DeviceDescription{120, 170}}) {
    for (const int64_t m : {1, 17, 64, 4096}) {
      const std::optional<AmperePlan> plan = PlanAmpere(MakeProblem(m, 4096, 4096), device, -1);
      EXPECT(ampere::kConfigs[plan->config].SharedBytes() <= device.SharedBytesPerCta()) << m;
      EXPECT((m > 16) == (ampere::kConfigs[plan->config].tokens > 8)) << m;
    }
  }
}

void WhatCannotBeServedIsASentence() {
  const Problem p = MakeProblem(1, 64, 256);
  Status status = MakePlan(p, DeviceDescription{75, 40}, "").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "sm_75")) << status.message();
  EXPECT(Contains(status, "reference")) << status.message();
  status = MakePlan(p, kH200, "avx2").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "avx2")) << status.message();
  status = MakePlan(p, kH200, "ampere/1x1").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "ampere/16x8")) << status.message();
  status = MakePlan(p, kH200, "decode/1x1").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "decode/32x8")) << status.message();
  Problem other_layout = p;
  other_layout.inner_k_tiles = 2;
  status = MakePlan(other_layout, kH200, "decode").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "inner_k_tiles is 2")) << status.message();
  status = MakePlan(MakeProblem(kUnknownM, 64, 256), kH200, "decode").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "not known")) << status.message();
  status = MakePlan(MakeProblem(int64_t{1} << 21, 64, 256), kH200, "decode").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "no schedule")) << status.message();
  status = MakePlan(p, DeviceDescription{100, 148}, "hopper").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "sm_100")) << status.message();
  status = MakePlan(p, DeviceDescription{90, 132, false}, "hopper/128x64").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "no code for sm_90a")) << status.message();
  status = MakePlan(p, kH200, "hopper/1x1").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "hopper/128x256")) << status.message();
  status = MakePlan(MakeProblem(kUnknownM, 64, 256), kH200, "hopper").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "not known")) << status.message();
  status = MakePlan(MakeProblem(int64_t{1} << 31, 64, 256), kH200, "hopper").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "Split")) << status.message();
  status = MakePlan(MakeProblem(1, 12, 256), kH200, "").status();
  EXPECT(status.code() == StatusCode::kInvalidArgument && Contains(status, "12")) << status.message();
  status = MakePlan(MakeProblem(int64_t{1} << 40, 4096, 256), kH200, "").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "Split")) << status.message();
  status = MakePlan(MakeProblem(1, int64_t{1} << 33, 256), kH200, "").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "Split")) << status.message();
}

void ABatchIsPlannedAsAWhole() {
  // A product alone divides k, or takes small tiles, where the GPU would otherwise have little to do; a batch need not.
  EXPECT(PlanHopper(MakeProblem(64, 3072, 3072), kH200, -1)->schedule.split_k == 4) << "alone";
  EXPECT(PlanHopper(MakeProblem(64, 3072, 3072, 16), kH200, -1)->schedule.split_k == 1) << "16 of them";
  EXPECT(PlanHopper(MakeProblem(64, 3072, 3072, 16), kH200, -1)->tiles_m == 1) << "tiles are those of one product";
  const auto ampere = [](int64_t batch) {
    return ampere::kConfigs[PlanAmpere(MakeProblem(128, 4096, 4096, batch), DeviceDescription{80, 108}, -1)->config];
  };
  EXPECT(ampere(32).TileN() * ampere(32).tokens > ampere(1).TileN() * ampere(1).tokens) << ampere(32).TileN();
  const DecodePlan decode = *PlanDecode(MakeProblem(1, 4096, 4096, 8), kH200, -1);
  EXPECT(decode.schedule.ctas == 132 / 8) << decode.schedule.ctas;
  EXPECT(PlanDecode(MakeProblem(1, 4096, 4096, 300), kH200, -1)->schedule.ctas == 1) << "more products than SMs";

  for (const char* kernel : {"", "decode", "hopper", "ampere"}) {
    const Problem p = MakeProblem(20, 4096, 4096, 8);
    const StatusOr<Plan> plan = MakePlan(p, kH200, kernel);
    EXPECT(plan.ok() && plan->workspace_bytes == 0) << kernel << ": " << plan.status().message();
    const std::string reason = Explain(p, kH200, *plan).reason;
    EXPECT(reason.find("one launch for all 8 products of the batch") != std::string::npos) << reason;
    // What y is made of does not change the plan.
    Problem other = p;
    other.float32_result = other.shared_x = true;
    EXPECT(Explain(other, kH200, *MakePlan(other, kH200, kernel)).reason == reason) << kernel;
    for (const auto& [m, batch] : {std::pair<int64_t, int64_t>{20, 0}, {0, 8}, {0, 0}}) {
      EXPECT(MakePlan(MakeProblem(m, 4096, 4096, batch), kH200, kernel).ok()) << kernel << " m " << m << " x " << batch;
    }
  }

  // gridDim.z ends at 65535, and the Hopper kernel's tasks at 2^30.
  EXPECT(MakePlan(MakeProblem(1, 8, 128, 65535), kH200, "decode").ok());
  EXPECT(MakePlan(MakeProblem(1, 8, 128, 65535), kH200, "ampere").ok());
  EXPECT(MakePlan(MakeProblem(32, 8, 128, 65536), kH200, "")->kernel == Kernel::kHopper);
  EXPECT(MakePlan(MakeProblem(kUnknownM, 4096, 4096, 8), kH200, "").ok());
  for (const auto& [kernel, m, batch] : {std::tuple<const char*, int64_t, int64_t>{"decode", 1, 65536},
                                         {"decode", 1 << 20, 1 << 11},
                                         {"ampere", 1, 65536},
                                         {"", 1, 65536},
                                         {"hopper", 1 << 30, 1 << 10},
                                         {"hopper/128x16", 16, (1 << 30) + 1}}) {
    const Status status = MakePlan(MakeProblem(m, 8, 128, batch), kH200, kernel).status();
    EXPECT(status.code() == StatusCode::kUnimplemented) << kernel << " m " << m << " x " << batch;
    EXPECT(Contains(status, "batch") && Contains(status, std::to_string(batch).c_str())) << status.message();
  }
}

void AnUnknownMLeavesTheChoiceToTheCall() {
  const Problem p = MakeProblem(kUnknownM, 64, 256);
  const StatusOr<Plan> plan = MakePlan(p, kH200, "");
  EXPECT(plan.ok() && plan->workspace_bytes == 0) << plan.status().message();
  EXPECT(Explain(p, kH200, *plan).implementation.empty()) << Explain(p, kH200, *plan).implementation;
  // What is needed then is there: no kernel, for whatever m, asks for more.
  for (const int64_t m : {1, 16, 17, 33, 4096}) {
    for (const DeviceDescription& device : {kH200, DeviceDescription{80, 108}}) {
      EXPECT(MakePlan(MakeProblem(m, 64, 256), device, "")->workspace_bytes == 0) << m;
    }
  }
  EXPECT(MakePlan(p, kH200, "ampere").ok()) << "the kernel that takes any m, by name";
}

}  // namespace
}  // namespace int4mm::cuda

int main() {
  int4mm::cuda::EveryTileCoversTheOutput();
  int4mm::cuda::TilesFitTheSmallestSharedMemory();
  int4mm::cuda::EveryTileCanBeForcedByName();
  int4mm::cuda::DecodeSumsFitTheRingWhosePlaceTheyTake();
  int4mm::cuda::DecodeSchedulesCoverTheOutput();
  int4mm::cuda::TheDecodeScheduleIsTheOneWithTheFewestSteps();
  int4mm::cuda::HopperSchedulesCoverTheOutput();
  int4mm::cuda::TheFewTilesOfALastWaveAreDivided();
  int4mm::cuda::HopperTilesFitTheHardware();
  int4mm::cuda::EveryKernelIsChosenWhereItIsTheFastest();
  int4mm::cuda::TheHopperTileIsTheFastestMeasured();
  int4mm::cuda::NoTileSumsALongKInOneChain();
  int4mm::cuda::TheAmpereTileIsTheFastestMeasured();
  int4mm::cuda::AmpereTilesAreChosenForEveryArchitecture();
  int4mm::cuda::WhatCannotBeServedIsASentence();
  int4mm::cuda::ABatchIsPlannedAsAWhole();
  int4mm::cuda::AnUnknownMLeavesTheChoiceToTheCall();
  return int4mm::test::Result();
}
