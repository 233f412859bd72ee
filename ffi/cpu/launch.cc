#include "cpu/launch.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "core/ceil_div.h"
#include "cpu/float_environment.h"
#include "cpu/kernels/kernel.h"

namespace int4mm::cpu {
namespace {

constexpr int64_t kActivationsPerTask = 32 * 1024;
constexpr int64_t kCacheLine = 64;

int64_t WholeLines(int64_t floats) {
  constexpr int64_t kFloatsPerLine = kCacheLine / static_cast<int64_t>(sizeof(float));
  return CeilDiv(floats, kFloatsPerLine) * kFloatsPerLine;
}

const Kernel& KernelOf(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx512:
      return kAvx512Kernel;
    case Isa::kAvx2:
      return kAvx2Kernel;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return kNeonKernel;
#endif
    default:
      return kScalarKernel;
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

}  // namespace

Status Launch(const Problem& problem, const Plan& plan, const Operands& operands, ThreadPool& pool) {
  if (problem.m == 0) return Status();
  const Kernel& kernel = KernelOf(plan.isa);
  const int64_t tokens = std::min(plan.tokens_per_pass, problem.m);
  const int64_t tasks = CeilDiv(problem.n, plan.rows_per_task);
  const int64_t workers = std::max(std::min(pool.num_threads(), tasks), int64_t{1});

  const int64_t rows = plan.rows_per_task;
  const int64_t activations = WholeLines(tokens * problem.k);
  const int64_t scratch = WholeLines(plan.panel ? PanelScratchFloats(tokens, kernel.lanes)
                                                : DirectScratchFloats(rows, tokens, kernel.lanes));
  const int64_t bytes = (activations + workers * scratch) * static_cast<int64_t>(sizeof(float));
  const std::unique_ptr<float, Free> buffer(
      static_cast<float*>(std::aligned_alloc(kCacheLine, static_cast<size_t>(bytes))));
  if (buffer == nullptr) {
    return Internal() << "int4pack_mm: no memory for " << bytes
                      << " bytes of activations and dequantised weights. Split x along m, or free memory.";
  }

  MatmulArgs args;
  args.problem = problem;
  args.operands = operands;
  args.x = buffer.get();
  for (args.first_token = 0; args.first_token < problem.m; args.first_token += tokens) {
    args.tokens = std::min(tokens, problem.m - args.first_token);
    const int64_t step = std::max(kActivationsPerTask / problem.k, int64_t{1});
    ParallelFor(pool, CeilDiv(args.tokens, step), workers, [&](int64_t task, int64_t) {
      const ScopedFloatEnvironment environment;
      const int64_t end = std::min((task + 1) * step, args.tokens);
      for (int64_t token = task * step; token < end; ++token) kernel.order_activations(args, token);
    });
    ParallelFor(pool, tasks, workers, [&](int64_t task, int64_t worker) {
      const ScopedFloatEnvironment environment;
      const int64_t begin = task * rows;
      const int64_t end = std::min(begin + rows, problem.n);
      (plan.panel ? kernel.panel : kernel.direct)(args, begin, end, buffer.get() + activations + worker * scratch);
    });
  }
  return Status();
}

}  // namespace int4mm::cpu
