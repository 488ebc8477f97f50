// What the bindings of the training losses share: checks, the products that the CPU kernels
// call, and autograd.
//
// The gradients of `loss` are computed where the logits are, in the forward call of a private
// operator _<op> that returns them beside the results, in f32 and for a gradient of one. The
// backward multiplies them by the gradient of `loss` and rounds them to their tensors' dtypes.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <functional>
#include <vector>

#include "common.h"
#include "mtp/mtp_loss.h"
#include "weights.h"

#define MTP_STRING_OF(x) #x
#define MTP_STRING(x) MTP_STRING_OF(x)

namespace mtp::binding {

// An operator of this library by name, for calls through the dispatcher.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  const std::string full = std::string(MTP_STRING(MTP_NAMESPACE) "::") + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), "").typed<Signature>();
}

// A row-major matrix; of `trans`, its transpose lies there.
inline at::Tensor matrix(const void* p, at::ScalarType type, int64_t rows, int64_t columns,
                         int64_t stride, bool trans = false) {
  const at::Tensor t =
      at::from_blob(const_cast<void*>(p), {trans ? columns : rows, trans ? rows : columns},
                    {stride, 1}, at::TensorOptions(type));
  return trans ? t.t() : t;
}

inline void torch_gemm(bool trans_a, bool trans_b, int64_t m, int64_t n, int64_t k, const float* a,
                       int64_t a_stride, const float* b, int64_t b_stride, bool accumulate,
                       float* c, int64_t c_stride) {
  const at::Tensor x = matrix(a, at::kFloat, m, k, a_stride, trans_a);
  const at::Tensor y = matrix(b, at::kFloat, k, n, b_stride, trans_b);
  at::Tensor out = matrix(c, at::kFloat, m, n, c_stride);
  if (accumulate) {
    at::addmm_out(out, out, x, y);
  } else {
    at::mm_out(out, x, y);
  }
}

inline void torch_gemm_bf16(bool trans_a, int64_t m, int64_t n, int64_t k, const void* a,
                            int64_t a_stride, const void* b, int64_t b_stride, void* c,
                            int64_t c_stride) {
  at::Tensor out = matrix(c, at::kBFloat16, m, n, c_stride);
  at::mm_out(out, matrix(a, at::kBFloat16, m, k, a_stride, trans_a),
             matrix(b, at::kBFloat16, k, n, b_stride));
}

// Which gradients a call of _<op> has to return.
struct WantedGradients {
  bool hidden, weight, bias;
};

// The results of _<op>, in the order of its schema: the public ones, then the gradients, of which
// those not wanted are empty.
struct MtpLossResults {
  at::Tensor loss, depth_loss, num_tokens, depth_extra;
  at::Tensor grad_hidden, grad_weight, grad_bias;
};

using MtpLossTuple =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline MtpLossTuple as_tuple(const MtpLossResults& r) {
  return {r.loss,        r.depth_loss,  r.num_tokens, r.depth_extra,
          r.grad_hidden, r.grad_weight, r.grad_bias};
}

inline MtpLossResults from_tuple(const MtpLossTuple& t) {
  return std::make_from_tuple<MtpLossResults>(t);
}

// The arguments that both operators take.
struct MtpLossArguments {
  const at::Tensor& hidden;
  const at::Tensor& weight;
  const std::optional<at::Tensor>& cu_seqlens;
  const std::optional<at::Tensor>& loss_mask;
  const std::optional<at::Tensor>& depth_weights;
  const std::optional<at::Tensor>& bias;
  int64_t first_shift;
  double softcap;
};

inline void check_mtp_loss(const Checker& check, const MtpLossArguments& a) {
  check.dtype("hidden", a.hidden, {at::kFloat, at::kHalf, at::kBFloat16});
  check.shape("hidden", a.hidden, {{"K"}, {"T"}, {"H"}});
  check.rows_contiguous("hidden", a.hidden);
  const int64_t k = a.hidden.size(0), t = a.hidden.size(1), h = a.hidden.size(2);
  check.require(k >= 1 && k <= kMaxDepths, "hidden must have 1 to ", kMaxDepths, " depths, got ",
                k);
  check.require(h >= 1, "hidden must have at least one column, got shape ", a.hidden.sizes());
  check.device("weight", a.weight);
  check.dtype("weight", a.weight, {a.hidden.scalar_type()});
  check.shape("weight", a.weight, {{"V"}, {"H", h}});
  check.rows_contiguous("weight", a.weight);
  check.require(a.weight.size(0) >= 1, "weight must have at least one row");
  check.tensor("cu_seqlens", a.cu_seqlens, {{"B+1"}}, {at::kInt});
  check.require(!a.cu_seqlens || a.cu_seqlens->size(0) >= 1,
                "cu_seqlens must have at least one element");
  check.tensor("loss_mask", a.loss_mask, {{"T", t}}, {at::kBool});
  check.tensor("depth_weights", a.depth_weights, {{"K", k}}, {at::kFloat});
  check.tensor("bias", a.bias, {{"V", a.weight.size(0)}}, {a.hidden.scalar_type()});
  check.require(a.first_shift >= 1, "first_shift must be at least 1, got ", a.first_shift);
  check_cuda_rows(check, "weight", a.weight);
  check.require(a.softcap >= 0.0, "softcap must be 0 (off) or positive, got ", a.softcap);
}

inline MtpLossResults allocate_results(const MtpLossArguments& a, at::ScalarType extra,
                                       const WantedGradients& wanted) {
  const auto floats = a.hidden.options().dtype(at::kFloat);
  const int64_t k = a.hidden.size(0);
  MtpLossResults r;
  r.loss = at::empty({}, floats);
  r.depth_loss = at::empty({k}, floats);
  r.num_tokens = at::empty({k}, floats.dtype(at::kLong));
  r.depth_extra = at::empty({k}, floats.dtype(extra));
  const auto gradient = [&](bool is_wanted, c10::IntArrayRef sizes) {
    return is_wanted ? at::empty(sizes, floats) : at::empty({0}, floats);
  };
  r.grad_hidden = gradient(wanted.hidden, a.hidden.sizes());
  r.grad_weight = gradient(wanted.weight, a.weight.sizes());
  r.grad_bias = gradient(wanted.bias, {a.weight.size(0)});
  return r;
}

inline void fill_params(MtpLossParams& p, const MtpLossArguments& a, const MtpLossResults& r,
                        int64_t shift) {
  p.hidden = data_ptr<const void>(a.hidden, "hidden");
  p.weight = data_ptr<const void>(a.weight, "weight");
  p.bias = data_ptr<const void>(a.bias, "bias");
  p.cu_seqlens = data_ptr<const int32_t>(a.cu_seqlens, "cu_seqlens");
  p.loss_mask = data_ptr<const bool>(a.loss_mask, "loss_mask");
  p.depth_weights = data_ptr<const float>(a.depth_weights, "depth_weights");
  p.loss = data_ptr<float>(r.loss, "loss");
  p.depth_loss = data_ptr<float>(r.depth_loss, "depth_loss");
  p.num_tokens = data_ptr<int64_t>(r.num_tokens, "num_tokens");
  p.grad_hidden = data_ptr<float>(r.grad_hidden, "grad_hidden");
  p.grad_weight = data_ptr<float>(r.grad_weight, "grad_weight");
  p.grad_bias = data_ptr<float>(r.grad_bias, "grad_bias");
  p.gemm = &torch_gemm;
  p.gemm_bf16 = &torch_gemm_bf16;
  p.k = a.hidden.size(0);
  p.t = a.hidden.size(1);
  p.h = a.hidden.size(2);
  p.v = a.weight.size(0);
  p.documents = a.cu_seqlens ? a.cu_seqlens->size(0) - 1 : 1;
  p.depth_stride = a.hidden.stride(0);
  p.row_stride = a.hidden.stride(1);
  p.weight_stride = a.weight.stride(0);
  p.dtype = to_dtype(a.hidden.scalar_type());
  p.shift = std::min(shift, p.t);  // from T on, no row counts
  p.softcap = static_cast<float>(a.softcap);
}

// ---- autograd --------------------------------------------------------------------------------

// Calls _<op> with the gradients it is asked for.
using ComputeMtpLoss = std::function<MtpLossResults(const WantedGradients&)>;

class MtpLossFunction : public torch::autograd::Function<MtpLossFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* context,
                                                const at::Tensor& hidden, const at::Tensor& weight,
                                                const std::optional<at::Tensor>& bias,
                                                const std::optional<at::Tensor>& accumulator,
                                                const ComputeMtpLoss& compute) {
    const WantedGradients wanted = {hidden.requires_grad(), weight.requires_grad(),
                                    bias && bias->requires_grad()};
    const at::AutoDispatchBelowADInplaceOrView below;
    MtpLossResults r = compute(wanted);
    context->mark_non_differentiable({r.depth_loss, r.num_tokens, r.depth_extra});
    auto& saved = context->saved_data;
    if (wanted.hidden) saved["hidden"] = r.grad_hidden;
    if (wanted.weight) saved["weight"] = r.grad_weight;
    if (wanted.bias) saved["bias"] = r.grad_bias;
    saved["hidden_dtype"] = hidden.scalar_type();
    saved["weight_dtype"] = weight.scalar_type();
    if (accumulator) saved["accumulator"] = *accumulator;
    return {r.loss, r.depth_loss, r.num_tokens, r.depth_extra};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& gradients) {
    auto& saved = context->saved_data;
    TORCH_CHECK(!saved.empty(), torch::autograd::ERR_BACKWARD_TWICE);
    TORCH_CHECK(!at::GradMode::is_enabled(), "mtp: the losses have no second derivative");
    // The last backward gives its buffers away instead of copying them.
    const bool keep = torch::autograd::get_current_graph_task_keep_graph();
    const at::Tensor& g = gradients[0];
    const auto scaled = [&](const char* name, const char* dtype, size_t input) {
      if (saved.find(name) == saved.end() || !context->needs_input_grad(input)) return at::Tensor();
      at::Tensor t = saved[name].toTensor();
      return (keep ? t.mul(g) : t.mul_(g)).to(saved[dtype].toScalarType());
    };
    torch::autograd::variable_list out(5);
    out[0] = scaled("hidden", "hidden_dtype", 0);
    const auto accumulator = saved.find("accumulator");
    if (accumulator == saved.end()) {
      out[1] = scaled("weight", "weight_dtype", 1);
    } else if (context->needs_input_grad(1)) {
      accumulator->second.toTensor().addcmul_(saved["weight"].toTensor(), g);
    }
    out[2] = scaled("bias", "hidden_dtype", 2);
    if (!keep) saved.clear();
    return out;
  }
};

inline bool wants_autograd(const at::Tensor& hidden, const at::Tensor& weight,
                           const std::optional<at::Tensor>& bias) {
  return at::GradMode::is_enabled() &&
         (hidden.requires_grad() || weight.requires_grad() || (bias && bias->requires_grad()));
}

inline void check_autograd(const char* op, const at::Tensor& weight,
                           const std::optional<at::Tensor>& depth_weights,
                           const std::optional<at::Tensor>& accumulator) {
  TORCH_CHECK(!depth_weights || !depth_weights->requires_grad(), op,
              ": depth_weights gets no gradient; pass it detached");
  if (!accumulator) return;
  TORCH_CHECK(accumulator->scalar_type() == at::kFloat &&
                  accumulator->sym_sizes() == weight.sym_sizes() &&
                  accumulator->device() == weight.device() && !accumulator->requires_grad(),
              op, ": weight_grad_accum must be Float ", weight.sym_sizes(), " on ", weight.device(),
              " without requires_grad, got ", accumulator->scalar_type(), " ",
              accumulator->sym_sizes(), " on ", accumulator->device());
}

}  // namespace mtp::binding
