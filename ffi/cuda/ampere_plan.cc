#include "cuda/ampere_plan.h"

#include <algorithm>
#include <array>
#include <limits>

#include "core/ceil_div.h"

namespace int4mm::cuda {
namespace {

using ampere::Config;
using ampere::kConfigs;
using ampere::kStepK;

constexpr int64_t kMostTiles = std::numeric_limits<int32_t>::max();  // gridDim.x
constexpr int64_t kMostProducts = 65535;                             // gridDim.z

// Clocks of a step in a tile, measured on an H200 (docs/kernels/ampere.md): with one CTA on an SM, and with min_ctas.
struct StepClocks {
  double alone;
  double full;
};

// In the order of kConfigs.
constexpr std::array<StepClocks, 8> kStepClocks = {{
    {207, 244},
    {410, 750},
    {268, 289},
    {569, 776},
    {853, 1595},
    {1321, 2668},
    {1347, 1749},
    {1847, 2988},
}};
static_assert(kStepClocks.size() == kConfigs.size());

// Estimated time of a whole call in SM clocks, less what every call takes. The busiest SM takes its tiles in rounds of
// as many as it holds at one time.
double EstimatedClocks(const Problem& p, const DeviceDescription& device, int config) {
  constexpr double kPerRound = 727;  // Until the first stage is there, and the last sum stored.
  constexpr double kPerOutput = 0.453;
  constexpr int kReservedBytes = 1024;  // Of shared memory, for each CTA.
  const Config& c = kConfigs[config];
  const int64_t tiles = p.batch * CeilDiv(p.m, c.tokens) * CeilDiv(p.n, c.TileN());
  const int64_t tiles_per_sm = CeilDiv(tiles, device.sm_count);
  const int fitting = (device.SharedBytesPerCta() + kReservedBytes) / (c.SharedBytes() + kReservedBytes);
  const int resident = std::min(c.min_ctas, fitting);
  const double steps = static_cast<double>(CeilDiv(p.k, kStepK));
  const double per_round = kPerRound + kPerOutput * c.TileN() * c.tokens;
  const auto round = [&](int64_t ctas) {
    const StepClocks& step = kStepClocks[config];
    const double filled = static_cast<double>(ctas - 1) / (c.min_ctas - 1);
    return per_round + steps * (step.alone + (step.full - step.alone) * filled);
  };
  const int64_t rest = tiles_per_sm % resident;
  return static_cast<double>(tiles_per_sm / resident) * round(resident) + (rest == 0 ? 0.0 : round(rest));
}

int ChooseConfig(const Problem& p, const DeviceDescription& device) {
  int best = 0;
  double best_clocks = std::numeric_limits<double>::infinity();
  for (int i = 0; i < static_cast<int>(kConfigs.size()); ++i) {
    // Not measured: tiles that would read the weight three times and more.
    if (kConfigs[i].tokens == 8 && p.m > 16) continue;
    const double clocks = EstimatedClocks(p, device, i);
    if (clocks < best_clocks) {
      best = i;
      best_clocks = clocks;
    }
  }
  return best;
}

}  // namespace

std::optional<AmperePlan> PlanAmpere(const Problem& problem, const DeviceDescription& device, int config) {
  if (problem.batch > kMostProducts) return std::nullopt;
  AmperePlan plan;
  plan.config = config >= 0 ? config : ChooseConfig(problem, device);
  const Config& c = kConfigs[plan.config];
  plan.tiles_m = CeilDiv(problem.m, c.tokens);
  plan.tiles_n = CeilDiv(problem.n, c.TileN());
  if (plan.tiles_m > kMostTiles / plan.tiles_n) return std::nullopt;
  return plan;
}

}  // namespace int4mm::cuda
