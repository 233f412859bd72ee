// Problem + what this CPU can do -> plan: which instruction set, which blocking. Compiled for the oldest CPU and free
// of intrinsics, so that every machine can test every choice.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "core/explanation.h"
#include "core/problem.h"
#include "core/status.h"
#include "cpu/isa.h"

namespace int4mm::cpu {

// What the CPU has and the operating system saves.
struct CpuFeatures {
  bool avx2 = false;
  bool fma = false;
  bool f16c = false;
  bool avx512f = false;
  bool avx512bw = false;
  bool avx512dq = false;
  bool avx512vl = false;
  bool avx512bf16 = false;
  bool amx_bf16 = false;  // And this process may use it.
  bool neon = false;
};

CpuFeatures DetectCpuFeatures();

// The instruction sets whose kernels run on such a CPU, best first; never empty.
std::vector<Isa> SupportedIsas(const CpuFeatures& features);

// The way of w: from the table straight to the sums, the same with scale and zero applied to the sums of a group, or
// through a panel in cache, to vectors or to tiles.
enum class Path : uint8_t { kDirect, kExact, kPanel, kTiles };

struct Plan {
  Isa isa = Isa::kScalar;
  Path path = Path::kDirect;
  RegisterBlock block{0, 0};    // Rows of w by tokens whose sums are in registers.
  int64_t rows_per_task = 0;    // Multiple of 8.
  int64_t tokens_per_pass = 0;  // Tokens whose activations are ordered at a time; w is read once a pass.
  bool any_isa = false;         // m is not known, and which isa is best depends on it.
};

// `implementation` is the name of an instruction set, alone or with one of its tiles ("avx2/panel-4x3"), or empty to
// choose. The m of the problem may be kUnknownM: the tile is then chosen at the call.
StatusOr<Plan> MakePlan(const Problem& problem, const CpuFeatures& features, std::string_view implementation);

Explanation Explain(const Problem& problem, const Plan& plan);

// "<implementation>/<tile>", as `implementation` takes it and last_launch() reports it. The tile is the path of w and
// the register block, rows of w by tokens: "direct-8x1", "exact-8x1", "panel-8x3", "tiles-32x32".
std::string LaunchName(const Plan& plan);

}  // namespace int4mm::cpu
