// XLA's CPU handler and the nanobind module _cpu: buffers -> call -> plan -> launch. The module also plans for GPUs,
// because it is the one that every machine has.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/launch.h"
#include "cpu/parallel.h"
#include "cpu/plan.h"
#include "cuda/plan.h"
#include "handler/buffers.h"
#include "handler/call.h"
#include "xla/ffi/api/ffi.h"

namespace int4mm::cpu {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;

// What the newest launch in this process ran; tests compare it with the plan.
struct Launched {
  Isa isa;
  Path path;
  uint8_t rows;
  uint8_t tokens;  // 0: nothing was launched.
};
std::atomic<Launched> last_launched{Launched{Isa::kScalar, Path::kDirect, 0, 0}};

const CpuFeatures& ThisCpu() {
  static const CpuFeatures features = DetectCpuFeatures();
  return features;
}

class XlaThreadPool final : public ThreadPool {
 public:
  explicit XlaThreadPool(ffi::ThreadPool pool) : pool_(pool) {}
  int64_t num_threads() const override { return pool_.num_threads(); }
  void Schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool pool_;
};

Status Run(const Call& call, std::string_view implementation, ffi::ThreadPool ffi_pool) {
  const StatusOr<Plan> plan = MakePlan(call.problem, ThisCpu(), implementation);
  if (!plan.ok()) return plan.status();
  if (call.problem.Empty()) return Status();
  XlaThreadPool pool(ffi_pool);
  Status status = Launch(call.problem, *plan, call.operands, pool);
  if (status.ok()) {
    last_launched.store(
        {plan->isa, plan->path, static_cast<uint8_t>(plan->block.rows), static_cast<uint8_t>(plan->block.tokens)},
        std::memory_order_relaxed);
  }
  return status;
}

ffi::Error Int4PackMm(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer scales_and_zeros,
                      ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace, int64_t group_size,
                      std::string_view implementation) {
  try {
    const StatusOr<Call> call = DecodeCall(x, packed, scales_and_zeros, *y, *workspace, group_size);
    if (!call.ok()) return ToXla(call.status());
    return ToXla(Run(*call, implementation, pool));
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "int4pack_mm: out of memory.");
  }
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(Int4PackMmHandler, Int4PackMm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("implementation"));

std::optional<std::string> LastLaunch() {
  const Launched launched = last_launched.load(std::memory_order_relaxed);
  if (launched.tokens == 0) return std::nullopt;
  Plan plan;
  plan.isa = launched.isa;
  plan.path = launched.path;
  plan.block = {launched.rows, launched.tokens};
  return LaunchName(plan);
}

std::vector<std::string> Isas() {
  std::vector<std::string> names;
  for (const Isa isa : SupportedIsas(ThisCpu())) names.emplace_back(IsaName(isa));
  return names;
}

Problem MakeProblem(int64_t m, int64_t n, int64_t k, int64_t group_size, int64_t inner_k_tiles,
                    const std::string& dtype, int64_t batch, bool shared_x, bool float32_result) {
  Problem problem{m, n, k, group_size, inner_k_tiles, DType::kBFloat16, float32_result, batch, shared_x};
  for (const DType one : {DType::kBFloat16, DType::kFloat16}) {
    problem.dtype = one;
    if (dtype == DTypeName(one)) return problem;
  }
  throw nb::value_error(("int4pack_mm: dtype is " + dtype + "; it must be bfloat16 or float16.").c_str());
}

nb::dict ToPython(const Explanation& e) {
  nb::dict plan;
  plan["implementation"] = e.implementation;
  plan["tile"] = e.tile;
  plan["weights"] = e.weights;
  plan["workspace_bytes"] = e.workspace_bytes;
  plan["reason"] = e.reason;
  return plan;
}

nb::dict PlanHere(int64_t m, int64_t n, int64_t k, int64_t group_size, int64_t inner_k_tiles, const std::string& dtype,
                  const std::string& implementation, int64_t batch, bool shared_x, bool float32_result) {
  const Problem problem = MakeProblem(m, n, k, group_size, inner_k_tiles, dtype, batch, shared_x, float32_result);
  const StatusOr<Plan> plan = MakePlan(problem, ThisCpu(), implementation);
  if (!plan.ok()) throw nb::value_error(plan.status().message().c_str());
  return ToPython(Explain(problem, *plan));
}

nb::dict PlanCuda(int64_t m, int64_t n, int64_t k, int64_t group_size, int64_t inner_k_tiles, const std::string& dtype,
                  const std::string& implementation, int compute_capability, int sm_count, int64_t batch, bool shared_x,
                  bool float32_result) {
  const Problem problem = MakeProblem(m, n, k, group_size, inner_k_tiles, dtype, batch, shared_x, float32_result);
  const cuda::DeviceDescription device{compute_capability, sm_count};
  const StatusOr<cuda::Plan> plan = cuda::MakePlan(problem, device, implementation);
  if (!plan.ok()) throw nb::value_error(plan.status().message().c_str());
  return ToPython(cuda::Explain(problem, device, *plan));
}

}  // namespace

NB_MODULE(_cpu, module) {
  using nb::literals::operator""_a;
  module.doc() = "CPU kernels of jax_int4mm as XLA FFI handlers, and the plans of every platform.";
  module.attr("built_with_cuda") = INT4MM_BUILT_WITH_CUDA != 0;
  module.attr("oldest_compute_capability") = cuda::kOldestArchitecture;
  module.def(
      "registrations",
      [] {
        nb::dict handlers;
        handlers[kTarget] = nb::capsule(reinterpret_cast<void*>(&Int4PackMmHandler));
        return handlers;
      },
      "Custom-call target names and their handlers, for jax.ffi.register_ffi_target.");
  module.def("last_launch", &LastLaunch,
             "\"<implementation>/<tile>\" of the last kernel that this process launched, or None.");
  module.def("isas", &Isas, "The implementations that this CPU can run, best first.");
  module.def(
      "plan", &PlanHere, "m"_a, "n"_a, "k"_a, "group_size"_a, "inner_k_tiles"_a, "dtype"_a, "implementation"_a,
      "batch"_a = 1, "shared_x"_a = false, "float32_result"_a = false,
      "The plan of one problem on this CPU; m = -1 is not known yet. Raises ValueError where none can serve it.");
  module.def("cuda_plan", &PlanCuda, "m"_a, "n"_a, "k"_a, "group_size"_a, "inner_k_tiles"_a, "dtype"_a,
             "implementation"_a, "compute_capability"_a, "sm_count"_a, "batch"_a = 1, "shared_x"_a = false,
             "float32_result"_a = false,
             "The plan of one problem on a GPU of this compute capability (10 * major + minor) and number of SMs.");
}

}  // namespace int4mm::cpu
