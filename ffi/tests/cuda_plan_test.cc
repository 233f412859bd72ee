// The plan of the CUDA kernels, on machines without a GPU.
#include <set>
#include <string>

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
      const StatusOr<Plan> plan = MakePlan(p, kH200, "");
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

void EveryTileCanBeForcedByName() {
  const Problem p = MakeProblem(33, 4096, 4096);
  std::set<std::string> names;
  for (int i = 0; i < static_cast<int>(ampere::kConfigs.size()); ++i) {
    Plan wanted;
    wanted.config = i;
    const std::string name = LaunchName(wanted);
    names.insert(name);
    const StatusOr<Plan> plan = MakePlan(p, kH200, name);
    EXPECT(plan.ok() && plan->config == i) << name;
    const Explanation e = Explain(p, kH200, *plan);
    EXPECT(e.implementation + "/" + e.tile == name) << e.tile;
    EXPECT(e.weights == "rounded" && e.workspace_bytes == 0 && !e.reason.empty()) << e.weights;
  }
  EXPECT(names.size() == ampere::kConfigs.size()) << "two tiles share a name";
}

void FewTokensTakeNarrowTilesAndManyTakeWideOnes() {
  const auto tokens = [](int64_t m) {
    return ampere::kConfigs[MakePlan(MakeProblem(m, 4096, 4096), kH200, "")->config].tokens;
  };
  EXPECT(tokens(1) == 8) << tokens(1);
  EXPECT(tokens(8) == 8) << tokens(8);
  EXPECT(tokens(16) == 16) << tokens(16);
  EXPECT(tokens(4096) >= 64) << tokens(4096);
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
  int4mm::cuda::FewTokensTakeNarrowTilesAndManyTakeWideOnes();
  int4mm::cuda::WhatCannotBeServedIsASentence();
  int4mm::cuda::AnUnknownMTakesAKernelWithoutWorkspace();
  return int4mm::test::Result();
}
