// What every binding needs: checks whose message names the operator, the argument, what was
// expected and what came; pointers; and the choice between the CPU and the CUDA launcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <type_traits>

#include "mtp/types.h"
#include "registration.h"

#ifdef MTP_PTXSIM
extern "C" void ptxsim_register_buffer(const void* address, size_t bytes, const char* name);
#endif

namespace mtp::binding {

// A dimension of an expected shape: its symbol and its size, -1 where any size will do.
struct Dim {
  const char* name;
  int64_t size = -1;
};

// The checks of one call; `op` opens every message.
class Checker {
 public:
  Checker(const char* op, const at::Tensor& anchor, const char* anchor_name)
      : op_(op), device_(anchor.device()), anchor_name_(anchor_name) {
    TORCH_CHECK(device_.is_cpu() || device_.is_cuda(), op_, ": ", anchor_name,
                " must be on cpu or cuda, got ", device_);
  }

  void shape(const char* name, const at::Tensor& t, std::initializer_list<Dim> dims) const {
    bool ok = t.dim() == static_cast<int64_t>(dims.size());
    int64_t i = 0;
    for (const Dim& d : dims) {
      if (!ok) break;
      ok = d.size < 0 || t.size(i) == d.size;
      ++i;
    }
    if (ok) return;
    std::string expected = "[";
    i = 0;
    for (const Dim& d : dims) {
      expected += i++ ? ", " : "";
      expected += d.name;
      if (d.size >= 0) expected.append("=").append(std::to_string(d.size));
    }
    TORCH_CHECK(false, op_, ": ", name, " must have shape ", expected, "], got ", t.sizes());
  }

  void dtype(const char* name, const at::Tensor& t,
             std::initializer_list<at::ScalarType> allowed) const {
    for (auto type : allowed) {
      if (t.scalar_type() == type) return;
    }
    std::string expected;
    for (auto type : allowed) {
      expected.append(expected.empty() ? "" : " or ").append(c10::toString(type));
    }
    TORCH_CHECK(false, op_, ": ", name, " must have dtype ", expected, ", got ", t.scalar_type());
  }

  void device(const char* name, const at::Tensor& t) const {
    TORCH_CHECK(t.device() == device_, op_, ": ", name, " must be on ", device_, " like ",
                anchor_name_, ", got ", t.device());
  }

  void contiguous(const char* name, const at::Tensor& t) const {
    TORCH_CHECK(t.is_contiguous(), op_, ": ", name, " must be contiguous, got strides ",
                t.strides(), " for shape ", t.sizes());
  }

  // The last dimension is dense; the others may be strided.
  void rows_contiguous(const char* name, const at::Tensor& t) const {
    TORCH_CHECK(t.numel() == 0 || t.size(-1) <= 1 || t.stride(-1) == 1, op_, ": ", name,
                " must be contiguous in its last dimension, got strides ", t.strides(),
                " for shape ", t.sizes());
  }

  // Shape, dtype, device and full contiguity in one line.
  void tensor(const char* name, const at::Tensor& t, std::initializer_list<Dim> dims,
              std::initializer_list<at::ScalarType> dtypes) const {
    device(name, t);
    dtype(name, t, dtypes);
    shape(name, t, dims);
    contiguous(name, t);
  }

  void tensor(const char* name, const std::optional<at::Tensor>& t, std::initializer_list<Dim> dims,
              std::initializer_list<at::ScalarType> dtypes) const {
    if (t.has_value()) tensor(name, *t, dims, dtypes);
  }

  template <typename... Message>
  void require(bool ok, const Message&... message) const {
    TORCH_CHECK(ok, op_, ": ", message...);
  }

 private:
  const char* op_;
  c10::Device device_;
  const char* anchor_name_;
};

inline DType to_dtype(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DType::kF32;
    case at::kHalf:
      return DType::kF16;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kChar:
      return DType::kI8;
    case at::kFloat8_e4m3fn:
      return DType::kF8E4M3;
    case at::kInt:
      return DType::kI32;
    case at::kLong:
      return DType::kI64;
    default:
      TORCH_CHECK(false, "mtp: unsupported dtype ", type);
  }
}

// The only way a binding takes a pointer: the simulator learns here which bytes belong to whom.
template <typename T>
T* data_ptr(const at::Tensor& t, [[maybe_unused]] const char* name) {
  void* p = t.numel() ? const_cast<void*>(t.const_data_ptr()) : nullptr;
#ifdef MTP_PTXSIM
  if (p) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
    ptxsim_register_buffer(p, (last + 1) * t.element_size(), name);
  }
#endif
  return static_cast<T*>(p);
}

template <typename T>
T* data_ptr(const std::optional<at::Tensor>& t, const char* name) {
  return t.has_value() ? data_ptr<T>(*t, name) : nullptr;
}

inline void* current_stream([[maybe_unused]] c10::Device device) {
#ifdef MTP_PTXSIM
  return nullptr;
#else
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
#endif
}

// The CUDA launcher of an operator where this build has one; pass nullptr for an operator that
// has no CUDA kernel at all.
#ifdef MTP_WITH_CUDA
#define MTP_CUDA_LAUNCHER(launch) &::mtp::cuda::launch
#else
#define MTP_CUDA_LAUNCHER(launch) nullptr
#endif

// Whether run_on will take the CUDA launcher.
inline bool runs_on_cuda([[maybe_unused]] const at::Tensor& anchor) {
#ifdef MTP_PTXSIM
  return true;
#else
  return anchor.is_cuda();
#endif
}

// Sets p.workspace to as many bytes as the launcher of the anchor's device asks for, null if none;
// they live as long as the returned tensor. nullptr stands for a device that never needs any.
template <typename Params>
[[nodiscard]] at::Tensor allocate_workspace(const at::Tensor& anchor, Params& p,
                                            std::type_identity_t<int64_t (*)(const Params&)> cpu,
                                            std::type_identity_t<int64_t (*)(const Params&)> cuda) {
  const c10::DeviceGuard guard(anchor.device());  // some sizes depend on its processors
  const auto bytes_on_device = runs_on_cuda(anchor) ? cuda : cpu;
  const int64_t bytes = bytes_on_device != nullptr ? bytes_on_device(p) : 0;
  at::Tensor workspace;
  p.workspace = nullptr;
  if (bytes > 0) {
    workspace = at::empty({bytes}, anchor.options().dtype(at::kByte));
    p.workspace = data_ptr<std::remove_pointer_t<decltype(p.workspace)>>(workspace, "workspace");
  }
  return workspace;
}

// Launches on the anchor's device.
template <typename Params>
void run_on(const char* op, const at::Tensor& anchor, const Params& params,
            void (*cpu)(const Params&),
            [[maybe_unused]] std::type_identity_t<void (*)(const Params&, void*)> cuda) {
#ifdef MTP_WITH_CUDA
  if (runs_on_cuda(anchor)) {
    TORCH_CHECK(cuda != nullptr, op, ": there is no CUDA kernel for this operator yet");
    const c10::DeviceGuard guard(anchor.device());
    cuda(params, current_stream(anchor.device()));
    return;
  }
#endif
  TORCH_CHECK(anchor.is_cpu(), op, ": this build has no CUDA kernels; rebuild with MTP_CUDA=1");
  cpu(params);
}

}  // namespace mtp::binding
