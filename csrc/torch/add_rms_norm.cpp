#include "mtp/add_rms_norm.h"

#include "common.h"

namespace mtp::binding {
namespace {

at::Tensor add_rms_norm(const at::Tensor& residual, const at::Tensor& weight,
                        const std::optional<at::Tensor>& x, double eps, bool gemma_norm) {
  constexpr const char* kOp = "add_rms_norm";
  const Checker check(kOp, residual, "residual");
  check.tensor("residual", residual, {{"T"}, {"H"}}, {at::kFloat});
  const int64_t rows = residual.size(0), hidden = residual.size(1);
  check.tensor("weight", weight, {{"H", hidden}}, {at::kFloat, at::kHalf, at::kBFloat16});
  check.tensor("x", x, {{"T", rows}, {"H", hidden}}, {weight.scalar_type()});

  at::Tensor out = at::empty({rows, hidden}, weight.options());
  if (out.numel() == 0) return out;
  AddRmsNormParams p;
  p.residual = data_ptr<float>(residual, "residual");
  p.x = data_ptr<const void>(x, "x");
  p.weight = data_ptr<const void>(weight, "weight");
  p.out = data_ptr<void>(out, "out");
  p.dtype = to_dtype(weight.scalar_type());
  p.rows = rows;
  p.hidden = hidden;
  p.eps = static_cast<float>(eps);
  p.gemma_norm = gemma_norm;
  run_on(kOp, residual, p, &cpu::launch_add_rms_norm, MTP_CUDA_LAUNCHER(launch_add_rms_norm));
  return out;
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(add_rms_norm, mtp::binding::add_rms_norm)
