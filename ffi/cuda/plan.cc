#include "cuda/plan.h"

#include <algorithm>
#include <optional>
#include <sstream>
#include <string>

#include "cuda/ampere_plan.h"
#include "cuda/decode_plan.h"
#include "cuda/hopper_plan.h"

namespace int4mm::cuda {
namespace {

constexpr int64_t kMostRows = int64_t{1} << 30;  // Of n and of k: the kernels index within a row of tiles in 32 bits,
constexpr int64_t kMostRowsOfBatch = int64_t{1} << 33;  // and count n-tiles and groups of the whole batch in 32 bits.
constexpr std::string_view kRemedy = "Leave implementation=None to choose.";
constexpr std::string_view kAmpereName = "ampere";
constexpr std::string_view kDecodeName = "decode";
constexpr std::string_view kHopperName = "hopper";
constexpr std::string_view kEveryImplementation = "\"decode\", \"hopper\" and \"ampere\"";

std::string_view KernelName(Kernel kernel) {
  switch (kernel) {
    case Kernel::kAmpere:
      return kAmpereName;
    case Kernel::kDecode:
      return kDecodeName;
    default:
      return kHopperName;
  }
}

// Rows of w by tokens; of the decode kernel those of a warp's step.
std::string TileName(Kernel kernel, int config) {
  const auto name = [](int rows, int tokens) { return std::to_string(rows) + "x" + std::to_string(tokens); };
  switch (kernel) {
    case Kernel::kAmpere:
      return name(ampere::kConfigs[config].TileN(), ampere::kConfigs[config].tokens);
    case Kernel::kDecode:
      return name(decode::kConfigs[config].Rows(), decode::kConfigs[config].tokens);
    default:
      return name(hopper::kConfigs[config].Rows(), hopper::kConfigs[config].tokens);
  }
}

int TileCount(Kernel kernel) {
  switch (kernel) {
    case Kernel::kAmpere:
      return static_cast<int>(ampere::kConfigs.size());
    case Kernel::kDecode:
      return static_cast<int>(decode::kConfigs.size());
    default:
      return static_cast<int>(hopper::kConfigs.size());
  }
}

std::string EveryTile(Kernel kernel) {
  std::string names;
  for (int i = 0; i < TileCount(kernel); ++i) names += (i == 0 ? "\"" : ", \"") + LaunchName(kernel, i) + "\"";
  return names;
}

Plan ToPlan(const AmperePlan& ampere) {
  Plan plan;
  plan.config = ampere.config;
  plan.tiles_m = ampere.tiles_m;
  plan.tiles_n = ampere.tiles_n;
  return plan;
}

Plan ToPlan(const DecodePlan& decode) {
  Plan plan;
  plan.kernel = Kernel::kDecode;
  plan.config = decode.config;
  plan.decode = decode.schedule;
  return plan;
}

// A kernel that is planned for one m was named where m is not known.
Status NeedsM(Kernel kernel) {
  return Unimplemented() << "int4pack_mm: m is not known when the program is compiled, and the " << KernelName(kernel)
                         << " kernel is planned for one m. " << kRemedy;
}

// The decode kernel because it was named.
StatusOr<Plan> MakeDecodePlan(const Problem& problem, const DeviceDescription& device, int config) {
  if (problem.m == kUnknownM) return NeedsM(Kernel::kDecode);
  if (problem.inner_k_tiles != 8) {
    return Unimplemented() << "int4pack_mm: inner_k_tiles is " << problem.inner_k_tiles
                           << "; the decode kernel takes 8. Pack the weight with inner_k_tiles=8, or leave "
                              "implementation=None to choose.";
  }
  const std::optional<DecodePlan> decode = PlanDecode(problem, device, config);
  if (!decode) {
    return Unimplemented() << "int4pack_mm: the decode kernel has no schedule for m " << problem.m << " and batch "
                           << problem.batch << " on sm_" << device.compute_capability << " with "
                           << device.SharedBytesPerCta() << " bytes of shared memory a CTA. " << kRemedy;
  }
  return ToPlan(*decode);
}

// The Hopper kernel because it was named.
StatusOr<Plan> MakeHopperPlan(const Problem& problem, const DeviceDescription& device, int config) {
  if (problem.m == kUnknownM) return NeedsM(Kernel::kHopper);
  if (!device.HasHopperKernel()) {
    return Unimplemented() << "int4pack_mm: the Hopper kernel needs a GPU of sm_90 and a build for sm_90a; this is sm_"
                           << device.compute_capability
                           << (device.has_sm_90a_code ? "" : ", and the build has no code for sm_90a") << ". "
                           << kRemedy;
  }
  if (problem.Empty()) return ToPlan(HopperPlan{std::max(config, 0), 0, 0, hopper::Schedule()});
  const std::optional<HopperPlan> hopper = PlanHopper(problem, device, config);
  if (!hopper) {
    return Unimplemented() << "int4pack_mm: m " << problem.m << ", n " << problem.n << " and batch " << problem.batch
                           << " make more tiles than one launch of the Hopper kernel holds. Split x along m, or the "
                              "batch.";
  }
  return ToPlan(*hopper);
}

// The ampere kernel because it was named, or because no other takes the problem.
StatusOr<Plan> MakeAmperePlan(const Problem& problem, const DeviceDescription& device, int config) {
  if (problem.m == kUnknownM) return ToPlan(AmperePlan{std::max(config, 0), 0, 0});
  const std::optional<AmperePlan> ampere = PlanAmpere(problem, device, config);
  if (!ampere) {
    return Unimplemented() << "int4pack_mm: m " << problem.m << ", n " << problem.n << " and batch " << problem.batch
                           << " make more tiles, or more than the 65535 products, that one launch holds. Split x along "
                              "m, or the batch.";
  }
  return ToPlan(*ampere);
}

}  // namespace

Plan ToPlan(const HopperPlan& hopper) {
  Plan plan;
  plan.kernel = Kernel::kHopper;
  plan.config = hopper.config;
  plan.tiles_m = hopper.tiles_m;
  plan.tiles_n = hopper.tiles_n;
  plan.hopper = hopper.schedule;
  return plan;
}

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
  if (problem.batch > kMostRowsOfBatch / std::max(problem.n, problem.k)) {
    return Unimplemented() << "int4pack_mm: n, k and batch are " << problem.n << ", " << problem.k << " and "
                           << problem.batch << "; the CUDA kernels take up to " << kMostRowsOfBatch
                           << " of n, and of k, in the whole batch. Split the batch.";
  }
  const std::string_view name = implementation.substr(0, implementation.find('/'));
  const Kernel kernel = name == kDecodeName ? Kernel::kDecode : name == kHopperName ? Kernel::kHopper : Kernel::kAmpere;
  if (!name.empty() && name != KernelName(kernel)) {
    return Unimplemented() << "int4pack_mm: implementation \"" << implementation
                           << "\" is not a CUDA kernel of this build; it has " << kEveryImplementation << ". "
                           << kRemedy;
  }
  int config = -1;
  if (name.size() < implementation.size()) {
    for (int i = 0; i < TileCount(kernel); ++i) {
      if (LaunchName(kernel, i) == implementation) config = i;
    }
    if (config < 0) {
      return Unimplemented() << "int4pack_mm: implementation \"" << implementation << "\" names no tile; there are "
                             << EveryTile(kernel) << ".";
    }
  }

  if (kernel == Kernel::kDecode) return MakeDecodePlan(problem, device, config);
  if (kernel == Kernel::kHopper) return MakeHopperPlan(problem, device, config);
  if (name.empty() && problem.m >= kHopperTokens) {
    if (const std::optional<HopperPlan> hopper = PlanHopper(problem, device, -1)) return ToPlan(*hopper);
  }
  if (name.empty() && problem.m >= 1 && problem.m <= kDecodeTokens) {
    if (const std::optional<DecodePlan> decode = PlanDecode(problem, device, -1)) return ToPlan(*decode);
  }
  return MakeAmperePlan(problem, device, config);
}

Explanation Explain(const Problem& problem, const DeviceDescription& device, const Plan& plan) {
  Explanation e;
  e.implementation = KernelName(plan.kernel);
  e.weights = plan.kernel == Kernel::kDecode ? "exact" : "rounded";
  e.workspace_bytes = plan.workspace_bytes;
  e.tile = TileName(plan.kernel, plan.config);
  std::ostringstream reason;
  if (problem.m == kUnknownM) {
    e.implementation = "";
    e.weights = e.tile = "at the call";
    reason << "m is not known when the program is compiled, so the kernel and its tile are chosen at the call; none "
              "needs a workspace";
  } else if (plan.kernel == Kernel::kDecode) {
    const decode::Config& c = decode::kConfigs[plan.config];
    const decode::Schedule& s = plan.decode;
    reason << "kernel for few tokens, " << c.tokens << " at a time: " << s.ctas << " CTAs on " << device.sm_count
           << " SMs, each " << s.chunk_tiles * 8 << " rows of w at once by " << s.warps_k << " slices of k of "
           << s.warps_n << (s.warps_n == 1 ? " warp" : " warps") << ", which read the weight "
           << (s.token_blocks == 1 ? "once" : std::to_string(s.token_blocks) + " times");
  } else if (plan.kernel == Kernel::kHopper) {
    const hopper::Config& c = hopper::kConfigs[plan.config];
    const hopper::Schedule& s = plan.hopper;
    reason << "wgmma kernel for Hopper GPUs; " << plan.tiles_n << " x " << plan.tiles_m << " tiles of " << c.Rows()
           << " rows of w by " << c.tokens << " tokens on " << device.sm_count << " SMs, "
           << (s.split_k == 1 ? "each by one CTA" : "each by " + std::to_string(s.split_k) + " CTAs that divide k");
  } else {
    const ampere::Config& c = ampere::kConfigs[plan.config];
    reason << "mma.sync kernel for sm_80 and newer; " << plan.tiles_n << " x " << plan.tiles_m << " tiles of "
           << c.TileN() << " rows of w by " << c.tokens << " tokens on " << device.sm_count << " SMs, k over "
           << c.warps_k << (c.warps_k == 1 ? " slice" : " slices") << " of each CTA";
  }
  if (problem.batch != 1) reason << "; one launch for all " << problem.batch << " products of the batch";
  e.reason = reason.str();
  return e;
}

std::string LaunchName(Kernel kernel, int config) {
  return std::string(KernelName(kernel)) + "/" + TileName(kernel, config);
}

}  // namespace int4mm::cuda
