// XLA's GPU handlers and the nanobind module _cuda: buffers -> call -> plan -> launch.
#include <cuda_runtime_api.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "cuda/kernels/dequantize/launch.h"
#include "cuda/kernels/hopper/launch.h"
#include "cuda/launch.h"
#include "cuda/plan.h"
#include "handler/buffers.h"
#include "handler/call.h"
#include "handler/dequantize_call.h"
#include "xla/ffi/api/ffi.h"

namespace int4mm::cuda {
namespace {

namespace ffi = xla::ffi;
namespace nb = nanobind;

constexpr uintptr_t kAlignment = 16;  // Of the widest load and copy.
constexpr int kMostDevices = 64;

// Kernel and tile of the newest launch in this process; tests compare them with the plan.
struct Launched {
  Kernel kernel = Kernel::kAmpere;
  int config = -1;
};
std::atomic<Launched> last_launched{Launched()};

StatusOr<DeviceDescription> QueryDevice(const char* op, int device) {
  int major = 0, minor = 0, sm_count = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    return Internal() << op << ": the properties of GPU " << device << " cannot be read: " << cudaGetErrorString(error)
                      << ".";
  }
  return DeviceDescription{10 * major + minor, sm_count, hopper::IsCompiled()};
}

// The current device's description, queried once a device; `op` heads an error.
StatusOr<DeviceDescription> CurrentDevice(const char* op) {
  static std::array<std::atomic<uint64_t>, kMostDevices> known = {};
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    return Internal() << op << ": cudaGetDevice failed: " << cudaGetErrorString(error) << ".";
  }
  if (device >= kMostDevices) return QueryDevice(op, device);
  if (const uint64_t seen = known[device].load(std::memory_order_relaxed); seen != 0) {
    return DeviceDescription{static_cast<int>(seen >> 32), static_cast<int>(seen & 0xFFFFFFFF), hopper::IsCompiled()};
  }
  StatusOr<DeviceDescription> found = QueryDevice(op, device);
  if (found.ok()) {
    known[device].store(static_cast<uint64_t>(found->compute_capability) << 32 | static_cast<uint32_t>(found->sm_count),
                        std::memory_order_relaxed);
  }
  return found;
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0; }

Status Run(const Call& call, std::string_view implementation, cudaStream_t stream) {
  const StatusOr<DeviceDescription> device = CurrentDevice("int4pack_mm");
  if (!device.ok()) return device.status();
  const StatusOr<Plan> plan = MakePlan(call.problem, *device, implementation);
  if (!plan.ok()) return plan.status();
  if (call.problem.Empty()) return Status();
  if (plan->workspace_bytes > call.workspace_bytes) {
    return FailedPrecondition() << "int4pack_mm: this GPU (sm_" << device->compute_capability << ", "
                                << device->sm_count << " SMs) needs a workspace of " << plan->workspace_bytes
                                << " bytes, and the program was compiled with " << call.workspace_bytes
                                << " for another one. Compile it on the device that runs it.";
  }
  const Operands& o = call.operands;
  if (!Aligned(o.x) || !Aligned(o.packed) || !Aligned(o.scales_and_zeros) || !Aligned(o.y)) {
    return InvalidArgument() << "int4pack_mm: a buffer is not aligned to " << kAlignment << " bytes.";
  }
  Status status = Launch(call.problem, o, *plan, stream);
  if (status.ok()) last_launched.store(Launched{plan->kernel, plan->config}, std::memory_order_relaxed);
  return status;
}

ffi::Error Int4PackMm(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer packed, ffi::AnyBuffer scales_and_zeros,
                      ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> workspace, int64_t group_size,
                      std::string_view implementation) {
  const StatusOr<Call> call = DecodeCall(x, packed, scales_and_zeros, *y, *workspace, group_size);
  if (!call.ok()) return ToXla(call.status());
  return ToXla(Run(*call, implementation, stream));
}

// The launch is the same at every call and nothing is allocated or waited for, so XLA may record it in a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(Int4PackMmHandler, Int4PackMm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("implementation"),
                              {ffi::Traits::kCmdBufferCompatible});

Status Run(const DequantizeCall& call, cudaStream_t stream) {
  const StatusOr<DeviceDescription> device = CurrentDevice("dequantize");
  if (!device.ok()) return device.status();
  if (device->compute_capability < kOldestArchitecture) {
    return Unimplemented() << "dequantize: this GPU is sm_" << device->compute_capability << "; the kernel needs sm_"
                           << kOldestArchitecture
                           << " (Ampere) or newer. A program that is compiled on this machine does without it.";
  }
  const DequantizeOperands& o = call.operands;
  if (!Aligned(o.packed) || !Aligned(o.scales_and_zeros) || !Aligned(o.w)) {
    return InvalidArgument() << "dequantize: a buffer is not aligned to " << kAlignment << " bytes.";
  }
  return dequantize::Launch(call.problem, o, stream);
}

ffi::Error Dequantize(cudaStream_t stream, ffi::AnyBuffer packed, ffi::AnyBuffer scales_and_zeros,
                      ffi::Result<ffi::AnyBuffer> w, int64_t group_size) {
  const StatusOr<DequantizeCall> call = DecodeDequantizeCall(packed, scales_and_zeros, *w, group_size);
  if (!call.ok()) return ToXla(call.status());
  return ToXla(Run(*call, stream));
}

// As above, a launch and nothing else.
XLA_FFI_DEFINE_HANDLER_SYMBOL(DequantizeHandler, Dequantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("group_size"),
                              {ffi::Traits::kCmdBufferCompatible});

std::optional<std::string> LastLaunch() {
  const Launched launched = last_launched.load(std::memory_order_relaxed);
  if (launched.config < 0) return std::nullopt;
  return LaunchName(launched.kernel, launched.config);
}

}  // namespace

NB_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of jax_int4mm as XLA FFI handlers.";
  module.def(
      "registrations",
      [] {
        nb::dict handlers;
        handlers[kTarget] = nb::capsule(reinterpret_cast<void*>(&Int4PackMmHandler));
        handlers[kDequantizeTarget] = nb::capsule(reinterpret_cast<void*>(&DequantizeHandler));
        return handlers;
      },
      "Custom-call target names and their handlers, for jax.ffi.register_ffi_target.");
  module.def("last_launch", &LastLaunch,
             "\"<implementation>/<tile>\" of the last kernel that this process launched, or None.");
}

}  // namespace int4mm::cuda
