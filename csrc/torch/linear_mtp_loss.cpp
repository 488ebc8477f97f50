#include "mtp/linear_mtp_loss.h"

#include "mtp_loss.h"

namespace mtp::binding {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

MtpLossResults compute(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
                       const OptionalTensor& cu_seqlens, const OptionalTensor& loss_mask,
                       const OptionalTensor& depth_weights, const OptionalTensor& bias,
                       int64_t first_shift, int64_t ignore_index, double label_smoothing,
                       double z_loss, double softcap, const WantedGradients& wanted) {
  constexpr const char* kOp = "linear_mtp_loss";
  const Checker check(kOp, hidden, "hidden");
  const MtpLossArguments arguments = {hidden,        weight, cu_seqlens,  loss_mask,
                                      depth_weights, bias,   first_shift, softcap};
  check_mtp_loss(check, arguments);
  check.tensor("labels", labels, {{"T", hidden.size(1)}}, {at::kLong});
  check.require(label_smoothing >= 0.0 && label_smoothing <= 1.0,
                "label_smoothing must be in [0, 1], got ", label_smoothing);

  MtpLossResults r = allocate_results(arguments, at::kLong, wanted);
  LinearMtpLossParams p;
  fill_params(p, arguments, r, first_shift);
  p.labels = data_ptr<const int64_t>(labels, "labels");
  p.num_correct = data_ptr<int64_t>(r.depth_extra, "num_correct");
  p.ignore_index = ignore_index;
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.z_loss = static_cast<float>(z_loss);
  const at::Tensor workspace = allocate_workspace(hidden, p, &cpu::linear_mtp_loss_workspace,
                                                  MTP_CUDA_LAUNCHER(linear_mtp_loss_workspace));
  run_on(kOp, hidden, p, &cpu::launch_linear_mtp_loss, MTP_CUDA_LAUNCHER(launch_linear_mtp_loss));
  return r;
}

Results linear_mtp_loss(const at::Tensor& hidden, const at::Tensor& weight,
                        const at::Tensor& labels, const OptionalTensor& cu_seqlens,
                        const OptionalTensor& loss_mask, const OptionalTensor& depth_weights,
                        const OptionalTensor& bias, const OptionalTensor& /*weight_grad_accum*/,
                        int64_t first_shift, int64_t ignore_index, double label_smoothing,
                        double z_loss, double softcap) {
  MtpLossResults r =
      compute(hidden, weight, labels, cu_seqlens, loss_mask, depth_weights, bias, first_shift,
              ignore_index, label_smoothing, z_loss, softcap, {false, false, false});
  return {r.loss, r.depth_loss, r.num_tokens, r.depth_extra};
}

MtpLossTuple linear_mtp_loss_with_gradients(
    const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
    const OptionalTensor& cu_seqlens, const OptionalTensor& loss_mask,
    const OptionalTensor& depth_weights, const OptionalTensor& bias, int64_t first_shift,
    int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool grad_hidden,
    bool grad_weight, bool grad_bias) {
  return as_tuple(compute(hidden, weight, labels, cu_seqlens, loss_mask, depth_weights, bias,
                          first_shift, ignore_index, label_smoothing, z_loss, softcap,
                          {grad_hidden, grad_weight, grad_bias}));
}

Results linear_mtp_loss_autograd(const at::Tensor& hidden, const at::Tensor& weight,
                                 const at::Tensor& labels, const OptionalTensor& cu_seqlens,
                                 const OptionalTensor& loss_mask,
                                 const OptionalTensor& depth_weights, const OptionalTensor& bias,
                                 const OptionalTensor& weight_grad_accum, int64_t first_shift,
                                 int64_t ignore_index, double label_smoothing, double z_loss,
                                 double softcap) {
  check_autograd("linear_mtp_loss", weight, depth_weights, weight_grad_accum);
  if (!wants_autograd(hidden, weight, bias)) {
    static const auto op = find_op<decltype(linear_mtp_loss)>("linear_mtp_loss");
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(hidden, weight, labels, cu_seqlens, loss_mask, depth_weights, bias,
                   weight_grad_accum, first_shift, ignore_index, label_smoothing, z_loss, softcap);
  }
  static const auto op = find_op<decltype(linear_mtp_loss_with_gradients)>("_linear_mtp_loss");
  auto out = MtpLossFunction::apply(
      hidden, weight, bias, weight_grad_accum, [&](const WantedGradients& wanted) {
        return from_tuple(op.call(hidden, weight, labels, cu_seqlens, loss_mask, depth_weights,
                                  bias, first_shift, ignore_index, label_smoothing, z_loss, softcap,
                                  wanted.hidden, wanted.weight, wanted.bias));
      });
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(linear_mtp_loss, mtp::binding::linear_mtp_loss)
MTP_REGISTER(_linear_mtp_loss, mtp::binding::linear_mtp_loss_with_gradients)
MTP_TORCH_LIBRARY_IMPL(MTP_NAMESPACE, Autograd, m) {
  m.impl("linear_mtp_loss", TORCH_FN(mtp::binding::linear_mtp_loss_autograd));
}
