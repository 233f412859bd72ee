#include "cpu/launch.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "core/ceil_div.h"
#include "core/layout.h"
#include "cpu/float_environment.h"
#include "cpu/kernels/kernel.h"

namespace int4mm::cpu {
namespace {

constexpr int64_t kActivationsPerTask = 32 * 1024;
constexpr int64_t kTasksPerThread = 4;  // So that threads that are late or slow have little left to wait for.
constexpr int64_t kCacheLine = 64;

int64_t WholeLines(int64_t floats) {
  constexpr int64_t kFloatsPerLine = kCacheLine / static_cast<int64_t>(sizeof(float));
  return CeilDiv(floats, kFloatsPerLine) * kFloatsPerLine;
}

const Kernel& KernelOf(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAmx:
      return kAmxKernel;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernel;
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

// Those of one product of the batch.
Operands OperandsOf(const Problem& p, const Operands& all, int64_t product) {
  Operands one;
  one.x = all.x + (p.shared_x ? 0 : product * p.m * p.k);
  one.packed = all.packed + product * layout::PackedWords(p.n, p.k);
  one.scales_and_zeros = all.scales_and_zeros + product * layout::ScaleIndex(p.k / p.group_size, 0, p.n);
  one.y = static_cast<char*>(all.y) + product * p.m * p.n * (p.float32_result ? 4 : 2);
  return one;
}

// What pairs of bfloat16 cannot multiply, on the same blocking.
Status LaunchFullRange(const Problem& problem, const Plan& plan, const Operands& operands, ThreadPool& pool) {
  static_assert(MaxDirectTokens(Isa::kAvx512Bf16) <= MaxDirectTokens(Isa::kAvx512));
  Plan full_range = plan;
  full_range.isa = Isa::kAvx512;
  if (plan.path == Path::kExact) full_range.path = Path::kDirect;
  if (plan.path == Path::kTiles) full_range.path = Path::kPanel;
  return Launch(problem, full_range, operands, pool);
}

// The functions of a kernel that a path takes.
struct Way {
  void (*order)(const MatmulArgs& args, int64_t begin, int64_t end);
  void (*multiply)(const MatmulArgs& args, int64_t row_begin, int64_t row_end, float* scratch);
};

Way WayOf(const Kernel& kernel, Path path) {
  switch (path) {
    case Path::kDirect:
      return {kernel.order_activations, kernel.direct};
    case Path::kExact:
      return {kernel.order_exact, kernel.exact};
    case Path::kTiles:
      return {kernel.order_tiles, kernel.tiles};
    case Path::kPanel:
      break;
  }
  return {kernel.order_activations, kernel.panel};
}

int64_t ScratchFloats(const Plan& plan, int64_t tokens, int64_t rows) {
  if (plan.path == Path::kTiles) return TileScratchFloats(tokens, rows);
  if (plan.path == Path::kPanel) return PanelScratchFloats(tokens, rows);
  return DirectScratchFloats(tokens);
}

}  // namespace

Status Launch(const Problem& problem, const Plan& plan, const Operands& operands, ThreadPool& pool) {
  return Launch(problem, plan, KernelOf(plan.isa), operands, pool);
}

Status Launch(const Problem& problem, const Plan& plan, const Kernel& kernel, const Operands& operands,
              ThreadPool& pool) {
  if (problem.Empty()) return Status();
  const Way way = WayOf(kernel, plan.path);
  const int64_t tokens = std::min(plan.tokens_per_pass, problem.m);
  const int64_t tasks = CeilDiv(problem.n, plan.rows_per_task);  // Of one product.
  // Of a batch of small products, some at a time.
  const int64_t enough = kTasksPerThread * pool.num_threads();
  const int64_t products = std::min(CeilDiv(std::max(enough, int64_t{1}), tasks), problem.batch);
  const int64_t workers = std::max(std::min(pool.num_threads(), products * tasks), int64_t{1});

  const int64_t rows = plan.rows_per_task;
  const bool tiles = plan.path == Path::kTiles;
  const int64_t ordered_floats = WholeLines((tiles ? WholeTiles(tokens) : tokens) * problem.k / kernel.pack);
  const int64_t groups = plan.path == Path::kExact ? problem.k / ExactGroup(problem.group_size) : 0;
  // With the tokens' factors and the groups' sums.
  const int64_t activations = ordered_floats + WholeLines(tokens) + WholeLines(groups * tokens);
  const int64_t scratch = WholeLines(ScratchFloats(plan, tokens, std::min(rows, problem.n)));
  const int64_t floats = (problem.shared_x ? 1 : products) * activations + workers * scratch;
  const int64_t bytes = floats * static_cast<int64_t>(sizeof(float));
  const std::unique_ptr<float, Free> buffer(
      static_cast<float*>(std::aligned_alloc(kCacheLine, static_cast<size_t>(bytes))));
  if (buffer == nullptr) {
    return Internal() << "int4pack_mm: no memory for " << bytes
                      << " bytes of activations and dequantised weights. Split x along m, or free memory.";
  }
  bool out_of_range = false;
  float* const first_scratch = buffer.get() + floats - workers * scratch;

  const int64_t some = std::max(kActivationsPerTask / problem.k, int64_t{1});
  const int64_t step = tiles ? WholeTiles(some) : some;  // Tokens whose activations one task orders.
  for (int64_t first_product = 0; first_product < problem.batch; first_product += products) {
    const int64_t some_products = std::min(products, problem.batch - first_product);
    for (int64_t first_token = 0; first_token < problem.m; first_token += tokens) {
      const int64_t some_tokens = std::min(tokens, problem.m - first_token);
      const auto args_of = [&](int64_t product) {
        MatmulArgs args;
        args.problem = problem;
        args.operands = OperandsOf(problem, operands, first_product + product);
        args.first_token = first_token;
        args.tokens = some_tokens;
        args.x = buffer.get() + (problem.shared_x ? 0 : product * activations);
        args.token_factors = args.x + ordered_floats;
        args.group_sums = args.token_factors + WholeLines(tokens);
        args.out_of_range = &out_of_range;
        return args;
      };
      const int64_t steps = CeilDiv(some_tokens, step);
      const bool ordered = problem.shared_x && first_product > 0 && tokens == problem.m;
      const int64_t to_order = ordered ? 0 : problem.shared_x ? 1 : some_products;
      ParallelFor(pool, to_order * steps, workers, [&](int64_t task, int64_t) {
        const ScopedFloatEnvironment environment;
        const MatmulArgs args = args_of(task / steps);
        const int64_t begin = task % steps * step;
        const int64_t end = std::min(begin + step, some_tokens);
        way.order(args, begin, end);
      });
      ParallelFor(pool, some_products * tasks, workers, [&](int64_t task, int64_t worker) {
        const ScopedFloatEnvironment environment;
        const MatmulArgs args = args_of(task / tasks);
        const int64_t begin = task % tasks * rows;
        const int64_t end = std::min(begin + rows, problem.n);
        way.multiply(args, begin, end, first_scratch + worker * scratch);
      });
      if (__atomic_load_n(&out_of_range, __ATOMIC_RELAXED)) return LaunchFullRange(problem, plan, operands, pool);
    }
  }
  return Status();
}

}  // namespace int4mm::cpu
