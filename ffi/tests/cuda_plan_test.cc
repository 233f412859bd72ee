// The plan of the CUDA kernels, on machines without a GPU.
#include <set>
#include <string>

#include "cuda/decode_plan.h"
#include "cuda/plan.h"
#include "tests/check.h"

namespace int4mm::cuda {
namespace {

constexpr DeviceDescription kH200{90, 132};

Problem MakeProblem(int64_t m, int64_t n, int64_t k) {
  Problem p;
  p.m = m;
  p.n = n;
  p.k = k;
  p.group_size = 128;
  p.inner_k_tiles = 8;
  return p;
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
  for (const Kernel kernel : {Kernel::kAmpere, Kernel::kDecode}) {
    const bool ampere = kernel == Kernel::kAmpere;
    const int tiles = static_cast<int>(ampere ? ampere::kConfigs.size() : decode::kConfigs.size());
    for (int i = 0; i < tiles; ++i) {
      const std::string name = LaunchName(kernel, i);
      EXPECT(names.insert(name).second) << name << ": two tiles share a name";
      const StatusOr<Plan> plan = MakePlan(p, kH200, name);
      EXPECT(plan.ok() && plan->kernel == kernel && plan->config == i) << name;
      const Explanation e = Explain(p, kH200, *plan);
      EXPECT(e.implementation + "/" + e.tile == name) << e.tile;
      EXPECT(e.weights == (ampere ? "rounded" : "exact")) << e.weights;
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
            Problem p = MakeProblem(m, n, k);
            p.group_size = group_size;
            const std::optional<DecodePlan> plan = PlanDecode(p, device, -1);
            EXPECT(plan.has_value()) << m << " x " << n << " x " << k;
            if (!plan) continue;
            const decode::Config& c = decode::kConfigs[plan->config];
            const decode::Schedule& s = plan->schedule;
            const int64_t most_tiles = (n / 8 + s.ctas - 1) / s.ctas;
            EXPECT(s.ctas <= device.sm_count && s.ctas <= n / 8) << s.ctas;
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

void FewTokensTakeTheDecodeKernelAndManyWideTiles() {
  const auto plan = [](int64_t m) { return *MakePlan(MakeProblem(m, 4096, 4096), kH200, ""); };
  for (const int64_t m : {1, 8, 16, 32}) EXPECT(plan(m).kernel == Kernel::kDecode) << m;
  EXPECT(plan(33).kernel == Kernel::kAmpere) << "33 tokens";
  EXPECT(ampere::kConfigs[plan(4096).config].tokens >= 64) << plan(4096).config;
  Problem p = MakeProblem(1, 4096, 4096);
  p.inner_k_tiles = 4;
  EXPECT(MakePlan(p, kH200, "")->kernel == Kernel::kAmpere) << "inner_k_tiles of 4";
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
  status = MakePlan(MakeProblem(1, 12, 256), kH200, "").status();
  EXPECT(status.code() == StatusCode::kInvalidArgument && Contains(status, "12")) << status.message();
  status = MakePlan(MakeProblem(int64_t{1} << 40, 4096, 256), kH200, "").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "Split")) << status.message();
  status = MakePlan(MakeProblem(1, int64_t{1} << 33, 256), kH200, "").status();
  EXPECT(status.code() == StatusCode::kUnimplemented && Contains(status, "Split")) << status.message();
}

void AnUnknownMTakesAKernelWithoutWorkspace() {
  const Problem p = MakeProblem(kUnknownM, 64, 256);
  const StatusOr<Plan> plan = MakePlan(p, kH200, "");
  EXPECT(plan.ok() && plan->workspace_bytes == 0) << plan.status().message();
  EXPECT(Explain(p, kH200, *plan).implementation == "ampere") << Explain(p, kH200, *plan).implementation;
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
  int4mm::cuda::FewTokensTakeTheDecodeKernelAndManyWideTiles();
  int4mm::cuda::WhatCannotBeServedIsASentence();
  int4mm::cuda::AnUnknownMTakesAKernelWithoutWorkspace();
  return int4mm::test::Result();
}
