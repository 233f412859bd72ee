#include "cuda/ampere_plan.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/ceil_div.h"

namespace int4mm::cuda {
namespace {

using ampere::Config;
using ampere::kConfigs;
using ampere::kStepK;

constexpr int64_t kMostTiles = std::numeric_limits<int32_t>::max();  // Blocks of one launch.

// Estimated time of a whole call in SM clocks: the busiest SM's share of tiles times what one tile takes. The rates are
// those of one SM, fitted to measurements of every tile on an H200 (docs/kernels/ampere.md); only ratios between tiles
// matter.
double EstimatedClocks(const Problem& p, const DeviceDescription& device, const Config& c) {
  constexpr double kMacsPerClock = 680;              // mma.sync
  constexpr double kWeightsPerClock = 9.6;           // Loaded and dequantised.
  constexpr double kActivationBytesPerClock = 24.5;  // From L2 into shared memory.
  constexpr double kClocksPerPartialSum = 0.0035;    // Written, read back and added at the end of a tile.
  constexpr double kWarpsToHideLatency = 9.3;
  const int64_t tiles = CeilDiv(p.m, c.tokens) * CeilDiv(p.n, c.TileN());
  const int64_t tiles_per_sm = CeilDiv(tiles, device.sm_count);
  const double steps = static_cast<double>(CeilDiv(p.k, kStepK));
  const double weights = static_cast<double>(c.TileN()) * kStepK;
  const double step = weights * c.tokens / kMacsPerClock + weights / kWeightsPerClock +
                      static_cast<double>(c.tokens) * kStepK * 2 / kActivationBytesPerClock;
  const double resident_warps = static_cast<double>(std::min<int64_t>(tiles_per_sm, c.min_ctas)) * c.Threads() / 32;
  const double exposed = std::pow(std::max(1.0, kWarpsToHideLatency / resident_warps), 1.5);
  const double partial_sums = static_cast<double>(c.TileN()) * c.tokens * c.warps_k;
  return static_cast<double>(tiles_per_sm) * (steps * step * exposed + partial_sums * kClocksPerPartialSum);
}

int ChooseConfig(const Problem& p, const DeviceDescription& device) {
  int best = 0;
  double best_clocks = std::numeric_limits<double>::infinity();
  for (int i = 0; i < static_cast<int>(kConfigs.size()); ++i) {
    const double clocks = EstimatedClocks(p, device, kConfigs[i]);
    if (clocks < best_clocks) {
      best = i;
      best_clocks = clocks;
    }
  }
  return best;
}

}  // namespace

std::optional<AmperePlan> PlanAmpere(const Problem& problem, const DeviceDescription& device, int config) {
  AmperePlan plan;
  plan.config = config >= 0 ? config : ChooseConfig(problem, device);
  const Config& c = kConfigs[plan.config];
  plan.tiles_m = CeilDiv(problem.m, c.tokens);
  plan.tiles_n = CeilDiv(problem.n, c.TileN());
  if (plan.tiles_m > kMostTiles / plan.tiles_n) return std::nullopt;
  return plan;
}

}  // namespace int4mm::cuda
