#include "cpu/plan.h"

#include <algorithm>
#include <sstream>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "core/ceil_div.h"
#include "core/layout.h"

namespace int4mm::cpu {
namespace {

constexpr int64_t kProductsPerTask = 256 * 1024;  // Some ten microseconds' work: far more than taking a task costs.
constexpr int64_t kPanelTasks = 32;               // Where n allows: for the threads of a large machine.
constexpr int64_t kMaxPanelsPerTask = 8;          // Their sums fit in an L2 cache, beside a slab of activations.
constexpr int64_t kMaxTileBlocksPerTask = 2;      // And here.

std::string Names(const std::vector<Isa>& isas) {
  std::string names;
  for (const Isa isa : isas) names += (names.empty() ? "\"" : ", \"") + std::string(IsaName(isa)) + "\"";
  return names;
}

const char* PathName(Path path) {
  switch (path) {
    case Path::kDirect:
      return "direct";
    case Path::kExact:
      return "exact";
    case Path::kTiles:
      return "tiles";
    case Path::kPanel:
      break;
  }
  return "panel";
}

std::string TileName(const Plan& plan) {
  return std::string(PathName(plan.path)) + "-" + std::to_string(plan.block.rows) + "x" +
         std::to_string(plan.block.tokens);
}

bool HasExact(const Problem& problem, Isa isa) {
  return isa == Isa::kAvx512Bf16 && problem.m <= MaxExactTokens(problem.group_size) && problem.k % kExactUnit == 0;
}

// m = 0 and kUnknownM are planned as one token is.
Plan Block(const Problem& problem, Isa isa, Path path) {
  const int64_t tokens = std::max(problem.m, int64_t{1});
  Plan plan;
  plan.isa = isa;
  plan.path = path;
  if (path == Path::kPanel || path == Path::kTiles) {
    const int64_t passes = CeilDiv(tokens, int64_t{MaxTokensPerPass(isa)});
    plan.block = PanelBlock(isa);
    plan.tokens_per_pass = CeilDiv(CeilDiv(tokens, passes), plan.block.tokens) * plan.block.tokens;
  } else {
    plan.block = DirectBlock(isa, static_cast<int>(tokens));
    plan.tokens_per_pass = tokens;
  }
  // A slab of activations comes from a far cache once for all rows of a task.
  const auto shared_by = [&](int64_t rows, int64_t most) {
    return rows * std::clamp(problem.n / (rows * kPanelTasks), int64_t{1}, most);
  };
  if (path == Path::kTiles) {
    plan.rows_per_task = shared_by(kTileBlockRows, kMaxTileBlocksPerTask);
    return plan;
  }
  const int64_t rows = path == Path::kPanel ? shared_by(kPanelRows, kMaxPanelsPerTask) : kDirectRows;
  const int64_t products = rows * problem.k * std::min(tokens, plan.tokens_per_pass);
  plan.rows_per_task = rows * std::max(kProductsPerTask / products, int64_t{1});
  return plan;
}

// The path that serves every m.
Path PathOfMany(Isa isa) { return isa == Isa::kAmx ? Path::kTiles : Path::kPanel; }

// What the isa takes if no tile is named.
Path ChoosePath(const Problem& problem, Isa isa) {
  if (isa == Isa::kAmx || problem.m > MaxDirectTokens(isa)) return PathOfMany(isa);
  return HasExact(problem, isa) ? Path::kExact : Path::kDirect;
}

// The plan whose name is `implementation`, "<isa>/<tile>".
StatusOr<Plan> PlanTile(const Problem& problem, Isa isa, std::string_view implementation) {
  std::vector<Plan> plans = {Block(problem, isa, PathOfMany(isa))};  // So it serves an m that is not known, too.
  if (problem.m != kUnknownM && problem.m <= MaxDirectTokens(isa)) {
    plans.push_back(Block(problem, isa, Path::kDirect));
    if (HasExact(problem, isa)) plans.push_back(Block(problem, isa, Path::kExact));
  }
  std::string names;
  for (const Plan& plan : plans) {
    if (LaunchName(plan) == implementation) return plan;
    names += (names.empty() ? "\"" : ", \"") + LaunchName(plan) + "\"";
  }
  return Unimplemented() << "int4pack_mm: implementation \"" << implementation << "\" names no tile for "
                         << (problem.m == kUnknownM ? "every m" : "m = " + std::to_string(problem.m)) << "; it has "
                         << names << ". Leave the tile out to choose.";
}

#if defined(__x86_64__)
bool HasAmxBf16() {
  constexpr unsigned kAmxBf16 = 1u << 22;
  constexpr unsigned kAmxTile = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kAmxBf16) != 0 && (edx & kAmxTile) != 0;
}

// Linux saves tile registers only of a process that has asked for it.
bool MayUseTiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM, which older headers lack.
  constexpr int kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

}  // namespace

CpuFeatures DetectCpuFeatures() {
  CpuFeatures features;
#if defined(__x86_64__)
  __builtin_cpu_init();
  features.avx2 = __builtin_cpu_supports("avx2");
  features.fma = __builtin_cpu_supports("fma");
  features.avx512f = __builtin_cpu_supports("avx512f");
  features.avx512bw = __builtin_cpu_supports("avx512bw");
  features.avx512dq = __builtin_cpu_supports("avx512dq");
  features.avx512vl = __builtin_cpu_supports("avx512vl");
  features.avx512bf16 = __builtin_cpu_supports("avx512bf16");
  features.amx_bf16 = HasAmxBf16() && MayUseTiles();
  // Not every compiler's __builtin_cpu_supports knows F16C. Its instructions use the registers of AVX.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  features.f16c = __builtin_cpu_supports("avx") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
#elif defined(__aarch64__)
  features.neon = true;
#endif
  return features;
}

std::vector<Isa> SupportedIsas(const CpuFeatures& f) {
  std::vector<Isa> isas;
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512 = avx2 && f.avx512f && f.avx512bw && f.avx512dq && f.avx512vl;
  if (avx512 && f.avx512bf16 && f.amx_bf16) isas.push_back(Isa::kAmx);
  if (avx512 && f.avx512bf16) isas.push_back(Isa::kAvx512Bf16);
  if (avx512) isas.push_back(Isa::kAvx512);
  if (avx2) isas.push_back(Isa::kAvx2);
  if (f.neon) isas.push_back(Isa::kNeon);
  isas.push_back(Isa::kScalar);
  return isas;
}

StatusOr<Plan> MakePlan(const Problem& problem, const CpuFeatures& features, std::string_view implementation) {
  if (Status status = Validate(problem); !status.ok()) return status;

  const std::vector<Isa> isas = SupportedIsas(features);
  Isa isa = *std::find_if(isas.begin(), isas.end(), [&](Isa one) {
    return Multiplies(one, problem.dtype) && (one != Isa::kAmx || problem.m >= kFewestTileTokens);
  });
  if (!implementation.empty()) {
    const std::string_view name = implementation.substr(0, implementation.find('/'));
    const auto named = std::find_if(isas.begin(), isas.end(), [&](Isa one) { return name == IsaName(one); });
    if (named == isas.end()) {
      return Unimplemented() << "int4pack_mm: implementation \"" << implementation
                             << "\" does not run on this CPU, which can run " << Names(isas)
                             << ". Leave implementation=None to choose.";
    }
    isa = *named;
    if (!Multiplies(isa, problem.dtype)) {
      return Unimplemented() << "int4pack_mm: implementation \"" << implementation << "\" multiplies no "
                             << DTypeName(problem.dtype) << ", which \"" << IsaName(Isa::kAvx512)
                             << "\" does. Leave implementation=None to choose.";
    }
    if (name.size() < implementation.size()) return PlanTile(problem, isa, implementation);
  }
  Plan plan = Block(problem, isa, ChoosePath(problem, isa));
  plan.any_isa = problem.m == kUnknownM && implementation.empty() && isas.front() == Isa::kAmx &&
                 Multiplies(isas.front(), problem.dtype);
  return plan;
}

std::string LaunchName(const Plan& plan) { return std::string(IsaName(plan.isa)) + "/" + TileName(plan); }

Explanation Explain(const Problem& problem, const Plan& plan) {
  Explanation e;
  e.implementation = IsaName(plan.isa);
  e.tile = TileName(plan);
  const bool exact = plan.path == Path::kExact;
  const bool tiles = plan.path == Path::kTiles;
  const bool panel = plan.path == Path::kPanel;
  e.weights = exact ? "exact" : "rounded";
  std::ostringstream reason;
  if (problem.m == kUnknownM && !panel && !tiles) {
    e.tile = "at the call";
    if (exact) e.weights = e.tile;
    if (plan.any_isa) e.implementation = "";
    reason << "m is not known when the program is compiled, so the " << (plan.any_isa ? "kernel and its " : "")
           << "tile " << (plan.any_isa ? "are" : "is") << " chosen at the call";
  } else if (tiles) {
    reason << plan.block.rows << " rows of w at a time are dequantised into cache, of up to " << kTileEdge << " tokens "
           << kTileBlockRows << ", and multiplied by up to " << plan.tokens_per_pass
           << " tokens in the CPU's matrix registers, " << kTileEdge << " rows by " << kTileEdge
           << " tokens each; for fewer than " << kFewestTileTokens << " tokens \"" << IsaName(Isa::kAvx512Bf16)
           << "\" is chosen";
  } else if (panel) {
    reason << kPanelRows << " rows of w at a time are dequantised into cache and multiplied by up to "
           << plan.tokens_per_pass << " tokens, " << plan.block.rows << " rows by " << plan.block.tokens
           << " tokens in registers; " << MaxDirectTokens(plan.isa) << " tokens or fewer would need no such copy";
  } else if (exact) {
    reason << "for " << MaxExactTokens(problem.group_size)
           << " tokens or fewer q - 8 is multiplied, and scale and zero are "
           << "applied to the sums of each group in f32, " << plan.block.rows << " rows by " << plan.block.tokens
           << " tokens in registers";
  } else {
    reason << "for " << MaxDirectTokens(plan.isa) << " tokens or fewer each weight goes from its group's table of 16 "
           << "straight to the sums, which are " << plan.block.rows << " rows by " << plan.block.tokens
           << " tokens in registers";
  }
  if (MultipliesPairs(plan.isa)) {
    reason
        << "; where a scale, a zero or an activation is so far from the others that the CPU's bfloat16 products would "
        << "flush it to zero, " << IsaName(Isa::kAvx512) << " multiplies instead, by weights that are rounded";
  }
  e.reason = reason.str();
  return e;
}

}  // namespace int4mm::cpu
