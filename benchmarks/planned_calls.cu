// Calls of int4pack_mm below XLA, for timing: every plan that there is for a problem, or the chosen one; and calls of
// dequantize. C functions, for ctypes.
#include <cstdint>
#include <string>
#include <vector>

#include "core/problem.h"
#include "cuda/hopper_plan.h"
#include "cuda/kernels/dequantize/launch.h"
#include "cuda/launch.h"
#include "cuda/plan.h"

namespace {

using namespace int4mm;
using namespace int4mm::cuda;

struct Planned {
  Problem problem;
  Plan plan;
};

std::vector<Planned> planned;  // By handle.
std::string text;              // Of the last call; valid until the next.

// 0, or -1 with the reason in last_text().
int Report(const Status& status) {
  if (status.ok()) return 0;
  text = status.message();
  return -1;
}

}  // namespace

extern "C" {

struct Sizes {
  int64_t m, n, k, group_size, inner_k_tiles;
  int64_t float16;
};

// Plans the problem for an sm_<compute_capability> GPU of so many SMs: with every tile of the Hopper kernel and way to
// divide k, or as the op does. The handles of the plans are the `count` from the returned one on; -1 with the reason in
// last_text().
int plan_calls(const Sizes* sizes, int compute_capability, int sm_count, int every, int* count) {
  Problem problem;
  problem.m = sizes->m;
  problem.n = sizes->n;
  problem.k = sizes->k;
  problem.group_size = sizes->group_size;
  problem.inner_k_tiles = sizes->inner_k_tiles;
  problem.dtype = sizes->float16 != 0 ? DType::kFloat16 : DType::kBFloat16;
  const DeviceDescription device{compute_capability, sm_count, hopper::IsCompiled()};
  const int first = static_cast<int>(planned.size());
  if (every != 0) {
    for (const HopperPlan& plan : EveryHopperPlan(problem, device)) planned.push_back({problem, ToPlan(plan)});
  } else {
    const StatusOr<Plan> plan = MakePlan(problem, device, "");
    if (!plan.ok()) return Report(plan.status());
    planned.push_back({problem, *plan});
  }
  *count = static_cast<int>(planned.size()) - first;
  return first;
}

// "<implementation>/<tile>"
const char* name_of(int handle) {
  text = LaunchName(planned[handle].plan.kernel, planned[handle].plan.config);
  return text.c_str();
}

// CTAs that divide k among them.
int split_k_of(int handle) {
  const Plan& plan = planned[handle].plan;
  return plan.kernel == Kernel::kHopper ? plan.hopper.split_k : 1;
}

// Enqueues the call; 0, or -1 with the reason in last_text().
int launch(int handle, const void* x, const void* packed, const void* scales_and_zeros, void* y, void* stream) {
  Operands operands;
  operands.x = static_cast<const uint16_t*>(x);
  operands.packed = static_cast<const uint32_t*>(packed);
  operands.scales_and_zeros = static_cast<const uint16_t*>(scales_and_zeros);
  operands.y = y;
  return Report(Launch(planned[handle].problem, operands, planned[handle].plan, static_cast<cudaStream_t>(stream)));
}

// Enqueues dequantize of a weight of these sizes, but for m; 0, or -1 with the reason in last_text().
int dequantize(const Sizes* sizes, const void* packed, const void* scales_and_zeros, void* w, void* stream) {
  DequantizeProblem problem;
  problem.n = sizes->n;
  problem.k = sizes->k;
  problem.group_size = sizes->group_size;
  problem.inner_k_tiles = sizes->inner_k_tiles;
  problem.dtype = sizes->float16 != 0 ? DType::kFloat16 : DType::kBFloat16;
  DequantizeOperands operands;
  operands.packed = static_cast<const uint32_t*>(packed);
  operands.scales_and_zeros = static_cast<const uint16_t*>(scales_and_zeros);
  operands.w = static_cast<uint16_t*>(w);
  return Report(dequantize::Launch(problem, operands, static_cast<cudaStream_t>(stream)));
}

const char* last_text() { return text.c_str(); }

}  // extern "C"
