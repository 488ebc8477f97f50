#include "mtp/soft_mtp_loss.h"

#include "mtp_loss.h"

namespace mtp::binding {
namespace {

using OptionalTensor = std::optional<at::Tensor>;
using Results = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

MtpLossResults compute(const at::Tensor& hidden, const at::Tensor& weight,
                       const OptionalTensor& teacher_hidden, const OptionalTensor& teacher_ids,
                       const OptionalTensor& teacher_logprobs, const OptionalTensor& cu_seqlens,
                       const OptionalTensor& loss_mask, const OptionalTensor& depth_weights,
                       const OptionalTensor& bias, int64_t first_shift, double kl_weight,
                       double tv_weight, double softcap, const WantedGradients& wanted) {
  constexpr const char* kOp = "soft_mtp_loss";
  const Checker check(kOp, hidden, "hidden");
  const MtpLossArguments arguments = {hidden,        weight, cu_seqlens,  loss_mask,
                                      depth_weights, bias,   first_shift, softcap};
  check_mtp_loss(check, arguments);
  const int64_t t = hidden.size(1);
  check.require(teacher_ids.has_value() == teacher_logprobs.has_value(),
                "teacher_ids and teacher_logprobs go together");
  check.require(teacher_hidden.has_value() != teacher_ids.has_value(),
                "the teacher must be either teacher_hidden, or teacher_ids and teacher_logprobs");
  if (teacher_hidden) {
    check.device("teacher_hidden", *teacher_hidden);
    check.dtype("teacher_hidden", *teacher_hidden, {hidden.scalar_type()});
    check.shape("teacher_hidden", *teacher_hidden, {{"T", t}, {"H", hidden.size(2)}});
    check.rows_contiguous("teacher_hidden", *teacher_hidden);
  }
  check.tensor("teacher_ids", teacher_ids, {{"T", t}, {"m"}}, {at::kInt, at::kLong});
  const int64_t m = teacher_ids ? teacher_ids->size(1) : 0;
  check.require(m <= kMaxTeacherPairs, "teacher_ids must have at most ", kMaxTeacherPairs,
                " columns, got ", m);
  check.tensor("teacher_logprobs", teacher_logprobs, {{"T", t}, {"m", m}}, {at::kFloat});

  MtpLossResults r = allocate_results(arguments, at::kFloat, wanted);
  SoftMtpLossParams p;
  fill_params(p, arguments, r, first_shift - 1);
  p.teacher_hidden = data_ptr<const void>(teacher_hidden, "teacher_hidden");
  p.teacher_ids = data_ptr<const void>(teacher_ids, "teacher_ids");
  p.teacher_logprobs = data_ptr<const float>(teacher_logprobs, "teacher_logprobs");
  p.acceptance = data_ptr<float>(r.depth_extra, "acceptance");
  p.m = m;
  p.teacher_row_stride = teacher_hidden ? teacher_hidden->stride(0) : 0;
  p.ids_dtype = teacher_ids ? to_dtype(teacher_ids->scalar_type()) : DType::kI64;
  p.kl_weight = static_cast<float>(kl_weight);
  p.tv_weight = static_cast<float>(tv_weight);
  const at::Tensor workspace = allocate_workspace(hidden, p, &cpu::soft_mtp_loss_workspace,
                                                  MTP_CUDA_LAUNCHER(soft_mtp_loss_workspace));
  run_on(kOp, hidden, p, &cpu::launch_soft_mtp_loss, MTP_CUDA_LAUNCHER(launch_soft_mtp_loss));
  return r;
}

Results soft_mtp_loss(const at::Tensor& hidden, const at::Tensor& weight,
                      const OptionalTensor& teacher_hidden, const OptionalTensor& teacher_ids,
                      const OptionalTensor& teacher_logprobs, const OptionalTensor& cu_seqlens,
                      const OptionalTensor& loss_mask, const OptionalTensor& depth_weights,
                      const OptionalTensor& bias, const OptionalTensor& /*weight_grad_accum*/,
                      int64_t first_shift, double kl_weight, double tv_weight, double softcap) {
  MtpLossResults r = compute(hidden, weight, teacher_hidden, teacher_ids, teacher_logprobs,
                             cu_seqlens, loss_mask, depth_weights, bias, first_shift, kl_weight,
                             tv_weight, softcap, {false, false, false});
  return {r.loss, r.depth_loss, r.num_tokens, r.depth_extra};
}

MtpLossTuple soft_mtp_loss_with_gradients(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& teacher_hidden,
    const OptionalTensor& teacher_ids, const OptionalTensor& teacher_logprobs,
    const OptionalTensor& cu_seqlens, const OptionalTensor& loss_mask,
    const OptionalTensor& depth_weights, const OptionalTensor& bias, int64_t first_shift,
    double kl_weight, double tv_weight, double softcap, bool grad_hidden, bool grad_weight,
    bool grad_bias) {
  return as_tuple(compute(hidden, weight, teacher_hidden, teacher_ids, teacher_logprobs, cu_seqlens,
                          loss_mask, depth_weights, bias, first_shift, kl_weight, tv_weight,
                          softcap, {grad_hidden, grad_weight, grad_bias}));
}

Results soft_mtp_loss_autograd(const at::Tensor& hidden, const at::Tensor& weight,
                               const OptionalTensor& teacher_hidden,
                               const OptionalTensor& teacher_ids,
                               const OptionalTensor& teacher_logprobs,
                               const OptionalTensor& cu_seqlens, const OptionalTensor& loss_mask,
                               const OptionalTensor& depth_weights, const OptionalTensor& bias,
                               const OptionalTensor& weight_grad_accum, int64_t first_shift,
                               double kl_weight, double tv_weight, double softcap) {
  check_autograd("soft_mtp_loss", weight, depth_weights, weight_grad_accum);
  if (!wants_autograd(hidden, weight, bias)) {
    static const auto op = find_op<decltype(soft_mtp_loss)>("soft_mtp_loss");
    const at::AutoDispatchBelowADInplaceOrView below;
    return op.call(hidden, weight, teacher_hidden, teacher_ids, teacher_logprobs, cu_seqlens,
                   loss_mask, depth_weights, bias, weight_grad_accum, first_shift, kl_weight,
                   tv_weight, softcap);
  }
  static const auto op = find_op<decltype(soft_mtp_loss_with_gradients)>("_soft_mtp_loss");
  auto out = MtpLossFunction::apply(
      hidden, weight, bias, weight_grad_accum, [&](const WantedGradients& wanted) {
        return from_tuple(op.call(hidden, weight, teacher_hidden, teacher_ids, teacher_logprobs,
                                  cu_seqlens, loss_mask, depth_weights, bias, first_shift,
                                  kl_weight, tv_weight, softcap, wanted.hidden, wanted.weight,
                                  wanted.bias));
      });
  return {out[0], out[1], out[2], out[3]};
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(soft_mtp_loss, mtp::binding::soft_mtp_loss)
MTP_REGISTER(_soft_mtp_loss, mtp::binding::soft_mtp_loss_with_gradients)
MTP_TORCH_LIBRARY_IMPL(MTP_NAMESPACE, Autograd, m) {
  m.impl("soft_mtp_loss", TORCH_FN(mtp::binding::soft_mtp_loss_autograd));
}
