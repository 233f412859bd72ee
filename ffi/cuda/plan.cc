#include "cuda/plan.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <string>

namespace int4mm::cuda {
namespace {

constexpr int kOldestArchitecture = 80;          // mma.sync m16n8k16 with bf16 operands, cp.async.
constexpr int64_t kMostRows = int64_t{1} << 30;  // Of n and of k: the kernels index within a row of tiles in 32 bits.
constexpr int64_t kMostTiles = std::numeric_limits<int32_t>::max();  // Blocks of one launch.
constexpr std::string_view kAmpereName = "ampere";
constexpr std::string_view kEveryImplementation = "\"ampere\"";

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::string TileName(const ampere::Config& c) { return std::to_string(c.TileN()) + "x" + std::to_string(c.tokens); }

// Estimated time of a whole call in SM clocks: the busiest SM's share of tiles times what one tile takes. The rates are
// those of one SM, fitted to measurements of every tile on an H200 (docs/kernels/ampere.md); only ratios between tiles
// matter.
double EstimatedClocks(const Problem& p, const DeviceDescription& device, const ampere::Config& c) {
  constexpr double kMacsPerClock = 680;              // mma.sync
  constexpr double kWeightsPerClock = 9.6;           // Loaded and dequantised.
  constexpr double kActivationBytesPerClock = 24.5;  // From L2 into shared memory.
  constexpr double kClocksPerPartialSum = 0.0035;    // Written, read back and added at the end of a tile.
  constexpr double kWarpsToHideLatency = 9.3;
  const int64_t tiles = CeilDiv(p.m, c.tokens) * CeilDiv(p.n, c.TileN());
  const int64_t tiles_per_sm = CeilDiv(tiles, device.sm_count);
  const double steps = static_cast<double>(CeilDiv(p.k, ampere::kStepK));
  const double weights = static_cast<double>(c.TileN()) * ampere::kStepK;
  const double step = weights * c.tokens / kMacsPerClock + weights / kWeightsPerClock +
                      static_cast<double>(c.tokens) * ampere::kStepK * 2 / kActivationBytesPerClock;
  const double resident_warps = static_cast<double>(std::min<int64_t>(tiles_per_sm, c.min_ctas)) * c.Threads() / 32;
  const double exposed = std::pow(std::max(1.0, kWarpsToHideLatency / resident_warps), 1.5);
  const double partial_sums = static_cast<double>(c.TileN()) * c.tokens * c.warps_k;
  return static_cast<double>(tiles_per_sm) * (steps * step * exposed + partial_sums * kClocksPerPartialSum);
}

int ChooseConfig(const Problem& p, const DeviceDescription& device) {
  int best = 0;
  double best_clocks = std::numeric_limits<double>::infinity();
  for (int i = 0; i < static_cast<int>(ampere::kConfigs.size()); ++i) {
    const double clocks = EstimatedClocks(p, device, ampere::kConfigs[i]);
    if (clocks < best_clocks) {
      best = i;
      best_clocks = clocks;
    }
  }
  return best;
}

std::string EveryTile() {
  std::string names;
  for (const ampere::Config& c : ampere::kConfigs) {
    names += (names.empty() ? "\"" : ", \"") + std::string(kAmpereName) + "/" + TileName(c) + "\"";
  }
  return names;
}

}  // namespace

StatusOr<Plan> MakePlan(const Problem& problem, const DeviceDescription& device, std::string_view implementation) {
  if (Status status = Validate(problem); !status.ok()) return status;
  if (device.compute_capability < kOldestArchitecture) {
    return Unimplemented() << "int4pack_mm: this GPU is sm_" << device.compute_capability << "; the kernels need sm_"
                           << kOldestArchitecture
                           << " (Ampere) or newer. Use implementation=\"reference\", or run on the CPU.";
  }
  if (problem.n > kMostRows || problem.k > kMostRows) {
    return Unimplemented() << "int4pack_mm: n and k are " << problem.n << " and " << problem.k
                           << "; the CUDA kernels take up to " << kMostRows << " of each. Split the weight.";
  }
  const std::string_view kernel = implementation.substr(0, implementation.find('/'));
  if (!kernel.empty() && kernel != kAmpereName) {
    return Unimplemented() << "int4pack_mm: implementation \"" << implementation
                           << "\" is not a CUDA kernel of this build; it has " << kEveryImplementation
                           << ". Leave implementation=None to choose.";
  }

  int config = -1;
  if (kernel.size() < implementation.size()) {
    const std::string_view tile = implementation.substr(kernel.size() + 1);
    for (int i = 0; i < static_cast<int>(ampere::kConfigs.size()); ++i) {
      if (TileName(ampere::kConfigs[i]) == tile) config = i;
    }
    if (config < 0) {
      return Unimplemented() << "int4pack_mm: implementation \"" << implementation << "\" names no tile; there are "
                             << EveryTile() << ".";
    }
  }

  Plan plan;
  if (problem.m == kUnknownM) {
    plan.config = std::max(config, 0);
    return plan;
  }
  plan.config = config >= 0 ? config : ChooseConfig(problem, device);
  const ampere::Config& c = ampere::kConfigs[plan.config];
  plan.tiles_m = CeilDiv(problem.m, c.tokens);
  plan.tiles_n = CeilDiv(problem.n, c.TileN());
  if (plan.tiles_m > kMostTiles / plan.tiles_n) {
    return Unimplemented() << "int4pack_mm: m " << problem.m << " and n " << problem.n << " make " << plan.tiles_m
                           << " x " << plan.tiles_n << " tiles, more than one launch holds (" << kMostTiles
                           << "). Split x along m.";
  }
  return plan;
}

Explanation Explain(const Problem& problem, const DeviceDescription& device, const Plan& plan) {
  const ampere::Config& c = ampere::kConfigs[plan.config];
  Explanation e;
  e.implementation = kAmpereName;
  e.weights = "rounded";
  e.workspace_bytes = plan.workspace_bytes;
  std::ostringstream reason;
  if (problem.m == kUnknownM) {
    e.tile = "at the call";
    reason << "m is not known when the program is compiled, so the kernel that needs no workspace for any m is taken "
              "and its tile is chosen at the call";
  } else {
    e.tile = TileName(c);
    reason << "mma.sync kernel for sm_80 and newer; " << plan.tiles_n << " x " << plan.tiles_m << " tiles of "
           << c.TileN() << " rows of w by " << c.tokens << " tokens on " << device.sm_count << " SMs, k over "
           << c.warps_k << (c.warps_k == 1 ? " slice" : " slices") << " of each CTA";
  }
  e.reason = reason.str();
  return e;
}

std::string LaunchName(const Plan& plan) {
  return std::string(kAmpereName) + "/" + TileName(ampere::kConfigs[plan.config]);
}

}  // namespace int4mm::cuda
