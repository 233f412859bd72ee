#include <algorithm>
#include <string>
#include <vector>

#include "core/layout.h"
#include "cpu/plan.h"
#include "tests/check.h"

namespace int4mm::cpu {
namespace {

constexpr Problem kProblem{1, 4096, 4096, 128, 8, DType::kBFloat16};

CpuFeatures Avx2Cpu() {
  CpuFeatures features;
  features.avx2 = features.fma = features.f16c = true;
  return features;
}

CpuFeatures Avx512Cpu() {
  CpuFeatures features = Avx2Cpu();
  features.avx512f = features.avx512bw = features.avx512dq = features.avx512vl = true;
  return features;
}

CpuFeatures Avx512Bf16Cpu() {
  CpuFeatures features = Avx512Cpu();
  features.avx512bf16 = true;
  return features;
}

CpuFeatures AmxCpu() {
  CpuFeatures features = Avx512Bf16Cpu();
  features.amx_bf16 = true;
  return features;
}

CpuFeatures NeonCpu() {
  CpuFeatures features;
  features.neon = true;
  return features;
}

Problem WithM(int64_t m) {
  Problem problem = kProblem;
  problem.m = m;
  return problem;
}

void TestSupportedIsas() {
  EXPECT((SupportedIsas(AmxCpu()) ==
          std::vector<Isa>{Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kScalar}));
  EXPECT(
      (SupportedIsas(Avx512Bf16Cpu()) == std::vector<Isa>{Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kScalar}));
  EXPECT((SupportedIsas(Avx512Cpu()) == std::vector<Isa>{Isa::kAvx512, Isa::kAvx2, Isa::kScalar}));
  EXPECT((SupportedIsas(Avx2Cpu()) == std::vector<Isa>{Isa::kAvx2, Isa::kScalar}));
  EXPECT((SupportedIsas(NeonCpu()) == std::vector<Isa>{Isa::kNeon, Isa::kScalar}));
  EXPECT((SupportedIsas({}) == std::vector<Isa>{Isa::kScalar}));
}

// A kernel may use every instruction that its file is compiled for, so it needs all of them.
void TestEveryFeatureIsNeeded() {
  CpuFeatures tiles_alone = AmxCpu();
  tiles_alone.avx512bf16 = false;
  EXPECT((SupportedIsas(tiles_alone) == SupportedIsas(Avx512Cpu())));
  for (bool CpuFeatures::* feature :
       {&CpuFeatures::avx512f, &CpuFeatures::avx512bw, &CpuFeatures::avx512dq, &CpuFeatures::avx512vl}) {
    CpuFeatures features = Avx512Bf16Cpu();
    features.*feature = false;
    EXPECT((SupportedIsas(features) == std::vector<Isa>{Isa::kAvx2, Isa::kScalar}));
  }
  for (bool CpuFeatures::* feature : {&CpuFeatures::avx2, &CpuFeatures::fma, &CpuFeatures::f16c}) {
    CpuFeatures features = Avx512Cpu();
    features.*feature = false;
    EXPECT((SupportedIsas(features) == std::vector<Isa>{Isa::kScalar}));
  }
}

void TestThisMachine() {
  const std::vector<Isa> isas = SupportedIsas(DetectCpuFeatures());
  EXPECT(isas.back() == Isa::kScalar);
  for (const Isa isa : isas) std::cout << "this CPU can run " << IsaName(isa) << "\n";
}

void TestChoosesTheBest() {
  const struct {
    CpuFeatures features;
    Isa isa;
  } machines[] = {{AmxCpu(), Isa::kAmx},       {Avx512Bf16Cpu(), Isa::kAvx512Bf16},
                  {Avx512Cpu(), Isa::kAvx512}, {Avx2Cpu(), Isa::kAvx2},
                  {NeonCpu(), Isa::kNeon},     {{}, Isa::kScalar}};
  for (const auto& machine : machines) {
    const StatusOr<Plan> plan = MakePlan(WithM(64), machine.features, "");
    EXPECT(plan.ok()) << plan.status().message();
    EXPECT(plan->isa == machine.isa) << IsaName(plan->isa);
  }
}

// Pairs of float16 have no instruction: the next best multiplies them.
void TestChoosesByDtype() {
  Problem problem = kProblem;
  problem.dtype = DType::kFloat16;
  for (const CpuFeatures& features : {AmxCpu(), Avx512Bf16Cpu()}) {
    const StatusOr<Plan> plan = MakePlan(problem, features, "");
    EXPECT(plan.ok() && plan->isa == Isa::kAvx512) << plan.status().message();
  }
  for (const std::string name : {"amx", "avx512_bf16"}) {
    const StatusOr<Plan> named = MakePlan(problem, AmxCpu(), name);
    EXPECT(named.status().code() == StatusCode::kUnimplemented);
    EXPECT(named.status().message().find("\"" + name + "\" multiplies no float16, which \"avx512\" does") !=
           std::string::npos)
        << named.status().message();
  }
}

// Few tokens do not fill a tile. While their number is not known, the kernel is not either.
void TestChoosesTilesByTokens() {
  const struct {
    int64_t m;
    const char* name;
  } cases[] = {{1, "avx512_bf16/exact-8x1"},
               {kFewestTileTokens - 1, "avx512_bf16/exact-4x2"},
               {kFewestTileTokens, "amx/tiles-32x32"},
               {4096, "amx/tiles-32x32"}};
  for (const auto& one : cases) {
    const StatusOr<Plan> plan = MakePlan(WithM(one.m), AmxCpu(), "");
    EXPECT(plan.ok() && LaunchName(*plan) == one.name) << LaunchName(*plan);
    EXPECT(Explain(WithM(one.m), *plan).implementation + "/" + Explain(WithM(one.m), *plan).tile == one.name);
    const StatusOr<Plan> named = MakePlan(WithM(one.m), AmxCpu(), "amx");
    EXPECT(named.ok() && named->path == Path::kTiles) << named.status().message();
  }
  Problem symbolic = WithM(kUnknownM);
  EXPECT(Explain(symbolic, *MakePlan(symbolic, AmxCpu(), "")).implementation.empty());
  EXPECT(Explain(symbolic, *MakePlan(symbolic, AmxCpu(), "amx")).implementation == "amx");
  EXPECT(Explain(symbolic, *MakePlan(symbolic, AmxCpu(), "avx512_bf16")).implementation == "avx512_bf16");
  symbolic.dtype = DType::kFloat16;
  EXPECT(Explain(symbolic, *MakePlan(symbolic, AmxCpu(), "")).implementation == "avx512");
}

void TestTakesTheNamedOne() {
  for (const Isa isa : {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kScalar}) {
    for (const int64_t m : {int64_t{1}, int64_t{64}, kUnknownM}) {
      const StatusOr<Plan> plan = MakePlan(WithM(m), AmxCpu(), IsaName(isa));
      EXPECT(plan.ok()) << plan.status().message();
      EXPECT(plan->isa == isa) << IsaName(plan->isa);
    }
  }
}

void TestRefusesWhatCannotRun() {
  const struct {
    CpuFeatures features;
    const char* implementation;
    const char* says;
  } refusals[] = {
      {Avx2Cpu(), "avx512", "implementation \"avx512\" does not run on this CPU, which can run \"avx2\", \"scalar\""},
      {Avx512Cpu(), "neon", "which can run \"avx512\", \"avx2\", \"scalar\""},
      {NeonCpu(), "avx2", "which can run \"neon\", \"scalar\""},
      {Avx512Cpu(), "hopper", "\"hopper\""},
      {Avx512Cpu(), "AVX2", "\"AVX2\""},
      {Avx512Cpu(), "avx", "\"avx\""},
      {Avx512Cpu(), "/panel-8x3", "\"/panel-8x3\""},
  };
  for (const auto& refusal : refusals) {
    const StatusOr<Plan> plan = MakePlan(kProblem, refusal.features, refusal.implementation);
    EXPECT(plan.status().code() == StatusCode::kUnimplemented) << refusal.implementation;
    EXPECT(plan.status().message().find(refusal.says) != std::string::npos) << plan.status().message();
  }
}

void TestRefusesABadProblem() {
  Problem problem = kProblem;
  problem.k = 4000;
  const StatusOr<Plan> plan = MakePlan(problem, Avx512Cpu(), "");
  EXPECT(plan.status().code() == StatusCode::kInvalidArgument);
  EXPECT(plan.status().message().find("k is 4000") != std::string::npos) << plan.status().message();
}

// A plan's own name gives the same plan; every tile serves every m that it says it does.
void TestNamedTiles() {
  for (const Isa isa : {Isa::kAmx, Isa::kAvx512, Isa::kAvx2, Isa::kScalar}) {
    for (const int64_t m : {0, 1, 2, 3, 4, 5, 64, 1000}) {
      const StatusOr<Plan> chosen = MakePlan(WithM(m), AmxCpu(), IsaName(isa));
      const StatusOr<Plan> named = MakePlan(WithM(m), AmxCpu(), LaunchName(*chosen));
      EXPECT(named.ok()) << named.status().message();
      EXPECT(named.ok() && LaunchName(*named) == LaunchName(*chosen) && named->rows_per_task == chosen->rows_per_task &&
             named->tokens_per_pass == chosen->tokens_per_pass)
          << LaunchName(*chosen) << " m=" << m;
    }
  }
  const StatusOr<Plan> panel = MakePlan(WithM(1), Avx512Cpu(), "avx512/panel-8x3");
  EXPECT(panel.ok() && panel->path == Path::kPanel) << panel.status().message();
  const StatusOr<Plan> direct = MakePlan(WithM(100), Avx512Cpu(), "avx512/direct-8x1");
  EXPECT(direct.status().code() == StatusCode::kUnimplemented);
  EXPECT(direct.status().message().find("m = 100; it has \"avx512/panel-8x3\".") != std::string::npos)
      << direct.status().message();
  EXPECT(!MakePlan(WithM(1), Avx512Cpu(), "avx512/").ok());

  const StatusOr<Plan> any = MakePlan(WithM(kUnknownM), Avx512Cpu(), "avx512/panel-8x3");
  EXPECT(any.ok() && Explain(WithM(kUnknownM), *any).tile == "panel-8x3") << any.status().message();
  const StatusOr<Plan> one = MakePlan(WithM(kUnknownM), Avx512Cpu(), "avx512/direct-8x1");
  EXPECT(one.status().message().find("for every m; it has") != std::string::npos) << one.status().message();
}

// Few tokens take weights that are not rounded, where k is whole units: the fewer, the larger a group is.
void TestExact() {
  const struct {
    int64_t m, k, group_size;
    const CpuFeatures features;
    const char* name;
    const char* weights;
  } cases[] = {
      {1, 4096, 32, Avx512Bf16Cpu(), "avx512_bf16/exact-8x1", "exact"},
      {8, 4096, 32, Avx512Bf16Cpu(), "avx512_bf16/exact-4x4", "exact"},
      {9, 4096, 32, Avx512Bf16Cpu(), "avx512_bf16/panel-8x3", "rounded"},
      {8, 4096, 64, Avx512Bf16Cpu(), "avx512_bf16/exact-4x4", "exact"},
      {2, 4096, 128, Avx512Bf16Cpu(), "avx512_bf16/exact-4x2", "exact"},
      {2, 4096, 256, Avx512Bf16Cpu(), "avx512_bf16/exact-4x2", "exact"},
      {3, 4096, 128, Avx512Bf16Cpu(), "avx512_bf16/direct-4x3", "rounded"},
      {1, 4160, 64, Avx512Bf16Cpu(), "avx512_bf16/direct-8x1", "rounded"},
      {1, 4128, 32, Avx512Bf16Cpu(), "avx512_bf16/direct-8x1", "rounded"},
      {1, 4096, 32, Avx512Cpu(), "avx512/direct-8x1", "rounded"},
      {kUnknownM, 4096, 32, Avx512Bf16Cpu(), "avx512_bf16/exact-8x1", "at the call"},
      {kUnknownM, 4128, 32, Avx512Bf16Cpu(), "avx512_bf16/direct-8x1", "rounded"},
  };
  for (const auto& one : cases) {
    Problem problem = WithM(one.m);
    problem.k = one.k;
    problem.group_size = one.group_size;
    problem.inner_k_tiles = 2;
    const StatusOr<Plan> plan = MakePlan(problem, one.features, "");
    EXPECT(plan.ok()) << plan.status().message();
    EXPECT(LaunchName(*plan) == one.name) << LaunchName(*plan);
    EXPECT(Explain(problem, *plan).weights == one.weights) << one.name;
    if (one.m == kUnknownM) continue;
    const StatusOr<Plan> named = MakePlan(problem, one.features, one.name);
    EXPECT(named.ok() && named->path == plan->path) << named.status().message();
  }
  Problem problem = WithM(4);
  problem.group_size = 128;
  EXPECT(!MakePlan(problem, Avx512Bf16Cpu(), "avx512_bf16/exact-4x4").ok());
}

// What the launcher relies on.
void TestBlocking() {
  for (const CpuFeatures& features : {AmxCpu(), Avx512Bf16Cpu(), Avx512Cpu(), Avx2Cpu(), NeonCpu(), CpuFeatures()}) {
    for (const int64_t m : {1, 2, 4, 5, 6, 7, 127, 128, 129, 264, 265, 1000, 4096}) {
      for (const int64_t k : {256, 4096, 1 << 20}) {
        Problem problem = WithM(m);
        problem.k = k;
        const StatusOr<Plan> plan = MakePlan(problem, features, "");
        EXPECT(plan.ok()) << plan.status().message();
        const std::string name = LaunchName(*plan) + " m=" + std::to_string(m) + " k=" + std::to_string(k);
        EXPECT((plan->path == Path::kPanel || plan->path == Path::kTiles) == (m > MaxDirectTokens(plan->isa))) << name;
        EXPECT(plan->rows_per_task > 0 && plan->rows_per_task % layout::kTileN == 0) << name;
        const bool little = plan->rows_per_task * k * std::min(m, plan->tokens_per_pass) <= 1 << 18;
        const int64_t least = plan->path == Path::kTiles ? kTileBlockRows : kPanelRows;
        if (plan->path == Path::kTiles) {
          EXPECT(plan->rows_per_task % kTileBlockRows == 0 && plan->rows_per_task <= 2 * kTileBlockRows) << name;
        } else {
          EXPECT(little || plan->rows_per_task <= (plan->path == Path::kPanel ? 64 : kDirectRows)) << name;
          EXPECT(layout::kTileN % plan->block.rows == 0 && plan->block.rows % 4 == 0) << name;
        }
        if (plan->path == Path::kTiles || (plan->path == Path::kPanel && !little)) {
          EXPECT(problem.n / plan->rows_per_task >= std::min(problem.n / least, int64_t{32})) << name;
        }
        EXPECT(plan->tokens_per_pass > 0) << name;
        if (plan->path == Path::kPanel || plan->path == Path::kTiles) {
          EXPECT(plan->tokens_per_pass % plan->block.tokens == 0) << name;
          EXPECT(plan->tokens_per_pass < MaxTokensPerPass(plan->isa) + plan->block.tokens) << name;
        } else {
          EXPECT(plan->tokens_per_pass == m && plan->block.tokens <= m) << name;
        }
      }
    }
  }
}

void TestExplain() {
  const StatusOr<Plan> one = MakePlan(WithM(1), Avx512Cpu(), "");
  const Explanation direct = Explain(WithM(1), *one);
  EXPECT(direct.implementation == "avx512");
  EXPECT(direct.implementation + "/" + direct.tile == LaunchName(*one)) << direct.tile;
  EXPECT(direct.tile.rfind("direct-", 0) == 0) << direct.tile;
  EXPECT(direct.weights == "rounded");
  EXPECT(direct.workspace_bytes == 0);

  const StatusOr<Plan> many = MakePlan(WithM(64), Avx2Cpu(), "");
  const Explanation panel = Explain(WithM(64), *many);
  EXPECT(panel.implementation == "avx2");
  EXPECT(panel.tile.rfind("panel-", 0) == 0) << panel.tile;
  EXPECT(panel.reason != direct.reason && !panel.reason.empty()) << panel.reason;

  const StatusOr<Plan> unknown = MakePlan(WithM(kUnknownM), NeonCpu(), "");
  const Explanation symbolic = Explain(WithM(kUnknownM), *unknown);
  EXPECT(symbolic.implementation == "neon");
  EXPECT(symbolic.tile == "at the call") << symbolic.tile;
  EXPECT(symbolic.reason.find("m is not known") != std::string::npos) << symbolic.reason;
}

}  // namespace
}  // namespace int4mm::cpu

int main() {
  using namespace int4mm::cpu;
  TestSupportedIsas();
  TestEveryFeatureIsNeeded();
  TestThisMachine();
  TestChoosesTheBest();
  TestChoosesByDtype();
  TestChoosesTilesByTokens();
  TestTakesTheNamedOne();
  TestRefusesWhatCannotRun();
  TestRefusesABadProblem();
  TestNamedTiles();
  TestExact();
  TestBlocking();
  TestExplain();
  return int4mm::test::Result();
}
