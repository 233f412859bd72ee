#include "cuda/hopper_plan.h"

#include <algorithm>
#include <array>
#include <limits>

#include "core/ceil_div.h"

namespace int4mm::cuda {
namespace {

using hopper::Config;
using hopper::kConfigs;
using hopper::Schedule;

constexpr int64_t kMostTiles = int64_t{1} << 30;   // Their indices, and one stride more, fit 32 bits.
constexpr int64_t kMostTokens = int64_t{1} << 30;  // Copies address rows of x and y in 32 bits.
// Values of k that a CTA may sum in one chain: the tensor cores truncate where they add, and the error grows with the
// chain. One of 14336 was compared with float64 and near enough, one of 65536 was not.
constexpr int64_t kLongestChain = 16384;

// Microseconds of a step of 128 values of k in each tile of kConfigs, with one group a step and with two or four,
// fitted by benchmarks/fit_hopper_plan.py to the time of every tile and split on an H200; only ratios between tiles
// matter.
struct StepTime {
  double one_group;
  double more_groups;
};
constexpr std::array<StepTime, kConfigs.size()> kStepTimes = {{
    {0.344, 0.368},  // 128 x 16
    {0.374, 0.408},  // 128 x 32
    {0.694, 0.775},  // 256 x 32
    {0.409, 0.450},  // 128 x 48
    {0.457, 0.495},  // 128 x 64
    {0.630, 0.693},  // 192 x 64
    {0.828, 0.924},  // 256 x 64
    {0.512, 0.560},  // 128 x 80
    {0.569, 0.609},  // 128 x 96
    {0.761, 0.827},  // 192 x 96
    {0.606, 0.667},  // 128 x 112
    {0.843, 0.918},  // 192 x 112
    {0.657, 0.711},  // 128 x 128
    {0.942, 1.003},  // 192 x 128
    {0.705, 0.738},  // 128 x 144
    {0.792, 0.803},  // 128 x 160
    {1.069, 1.101},  // 192 x 144
    {1.190, 1.206},  // 192 x 160
    {0.871, 0.875},  // 128 x 176
    {1.313, 1.319},  // 192 x 176
    {0.949, 0.961},  // 128 x 192
    {1.438, 1.446},  // 192 x 192
    {1.039, 1.049},  // 128 x 208
    {1.117, 1.127},  // 128 x 224
    {1.201, 1.211},  // 128 x 240
    {1.265, 1.270},  // 128 x 256
}};

// Clusters that find room at the same time: one lies within a group of 16 or 18 SMs, and not all groups are whole.
int64_t MostClusters(const DeviceDescription& device, int split_k) {
  const double share = split_k <= 2 ? 1.0 : split_k == 4 ? 0.85 : 0.73;
  return static_cast<int64_t>(device.sm_count * share) / split_k;
}

// Steps of the CTA of a tile that has the most.
int64_t MostSteps(const Problem& p, int split_k) { return CeilDiv(CeilDiv(p.k, hopper::kStepK), split_k); }

int64_t Tiles(const Problem& p, const HopperPlan& plan) { return p.batch * plan.tiles_m * plan.tiles_n; }

// Estimated microseconds of a call, but for what all schedules have in common.
double Cost(const Problem& p, const DeviceDescription& device, const HopperPlan& plan) {
  constexpr double kPerTile = -0.0188;        // Its start and its output,
  constexpr double kPerTileToken = 0.0044;    // which grows with the tile.
  constexpr double kSplit = 0.7766;           // A meeting of a cluster;
  constexpr double kPerSplitToken = 0.0177;   // sums of all tokens are sent,
  constexpr double kPerOwnedToken = -0.0257;  // but not those of tokens that the CTA itself adds up.
  constexpr double kBusy = 0.1455;            // All SMs at work are slower than one: power, and the rate of the L2.
  constexpr double kUsuallyBusy = 0.9;
  constexpr double kAlone = 1.3437;  // A warpgroup alone in a CTA: the CTA copies as much, for less work.
  const Config& c = kConfigs[plan.config];
  const int split_k = plan.schedule.split_k;
  const int64_t tiles = Tiles(p, plan);
  const StepTime& time = kStepTimes[plan.config];
  const double step = hopper::GroupsPerStep(p.group_size) == 1 ? time.one_group : time.more_groups;
  const double busy = static_cast<double>(std::min<int64_t>(tiles * split_k, device.sm_count)) / device.sm_count;
  const double tokens = c.tokens * c.Rows() / 128.0;
  const double steps = static_cast<double>(MostSteps(p, split_k));
  const int64_t divided = plan.schedule.divided_tiles;
  double waves = static_cast<double>(CeilDiv(tiles - divided, plan.schedule.clusters));
  if (divided > 0) waves += kAlone / c.warpgroups;
  double cost = waves * (steps * step * (1 + kBusy * (busy - kUsuallyBusy)) + kPerTile + kPerTileToken * tokens);
  if (split_k > 1) cost += kSplit + (kPerSplitToken + kPerOwnedToken / split_k) * tokens;
  return cost;
}

std::optional<HopperPlan> MakeHopperPlan(const Problem& problem, const DeviceDescription& device, int config,
                                         int split_k) {
  const Config& c = kConfigs[config];
  HopperPlan plan;
  plan.config = config;
  plan.tiles_m = CeilDiv(problem.m, c.tokens);
  plan.tiles_n = CeilDiv(problem.n, c.Rows());
  const int64_t tiles = Tiles(problem, plan);
  if (tiles > kMostTiles) return std::nullopt;
  const int64_t most_clusters = MostClusters(device, split_k);
  // Sums are exchanged through shared memory that the next tile would need: no CTA takes two tiles.
  if (split_k > 1 && (tiles > most_clusters || split_k > CeilDiv(problem.k, hopper::kStepK))) return std::nullopt;
  Schedule& s = plan.schedule;
  s.clusters = static_cast<int>(std::min(tiles, most_clusters));
  s.split_k = split_k;
  const int64_t left = tiles % s.clusters;
  if (split_k == 1 && tiles > s.clusters && left * c.warpgroups <= s.clusters) s.divided_tiles = static_cast<int>(left);
  const int stage_bytes = c.StageBytes(hopper::GroupsPerStep(problem.group_size));
  s.stages = std::min((device.SharedBytesPerCta() - hopper::kBarrierBytes) / stage_bytes, hopper::kMostStages);
  s.shared_bytes = s.stages * stage_bytes + hopper::kBarrierBytes;
  if (s.stages <= c.OutputStages()) return std::nullopt;
  if (split_k > 1 && s.stages * stage_bytes < c.ExchangeBytes(split_k)) return std::nullopt;
  return plan;
}

template <typename Visit>
void ForEachPlan(const Problem& problem, const DeviceDescription& device, int config, const Visit& visit) {
  if (!device.HasHopperKernel() || problem.m > kMostTokens || problem.Empty()) return;
  for (int i = 0; i < static_cast<int>(kConfigs.size()); ++i) {
    if (config >= 0 && i != config) continue;
    for (const int split_k : {1, 2, 4, 8}) {
      if (const std::optional<HopperPlan> plan = MakeHopperPlan(problem, device, i, split_k)) visit(*plan);
    }
  }
}

}  // namespace

std::vector<HopperPlan> EveryHopperPlan(const Problem& problem, const DeviceDescription& device) {
  std::vector<HopperPlan> plans;
  ForEachPlan(problem, device, -1, [&](const HopperPlan& plan) { plans.push_back(plan); });
  return plans;
}

std::optional<HopperPlan> PlanHopper(const Problem& problem, const DeviceDescription& device, int config) {
  std::optional<HopperPlan> best;
  double least = std::numeric_limits<double>::infinity();
  ForEachPlan(problem, device, config, [&](const HopperPlan& plan) {
    const bool long_chain = !kConfigs[plan.config].Stretches() &&
                            MostSteps(problem, plan.schedule.split_k) * hopper::kStepK > kLongestChain;
    if (config < 0 && long_chain) return;
    const double cost = Cost(problem, device, plan);
    if (cost >= least) return;
    best = plan;
    least = cost;
  });
  return best;
}

}  // namespace int4mm::cuda
