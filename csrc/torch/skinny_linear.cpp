#include "mtp/skinny_linear.h"

#include "common.h"
#include "weights.h"

namespace mtp::binding {
namespace {

at::Tensor skinny_linear(const at::Tensor& x, const at::Tensor& weight,
                         const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& weight_scale) {
  constexpr const char* kOp = "skinny_linear";
  const Checker check(kOp, x, "x");
  check.dtype("x", x, {at::kFloat, at::kHalf, at::kBFloat16});
  check.shape("x", x, {{"M"}, {"K"}});
  check.rows_contiguous("x", x);
  const int64_t m = x.size(0), k = x.size(1);
  check_weight(check, "weight", weight, {{"N"}, {"K", k}}, weight_scale);
  const int64_t n = weight.size(0);
  check.tensor("bias", bias, {{"N", n}}, {x.scalar_type()});
  check_cuda_rows(check, "weight", weight);

  at::Tensor out = at::empty({m, n}, x.options());
  if (out.numel() == 0) return out;
  SkinnyLinearParams p;
  p.x = data_ptr<const void>(x, "x");
  p.weight = data_ptr<const void>(weight, "weight");
  p.bias = data_ptr<const void>(bias, "bias");
  p.weight_scale = data_ptr<const float>(weight_scale, "weight_scale");
  p.out = data_ptr<void>(out, "out");
  p.m = m;
  p.n = n;
  p.k = k;
  p.x_stride = x.stride(0);
  p.weight_stride = weight.stride(0);
  p.dtype = to_dtype(x.scalar_type());
  p.weight_dtype = to_dtype(weight.scalar_type());
  const at::Tensor workspace =
      allocate_workspace(x, p, nullptr, MTP_CUDA_LAUNCHER(skinny_linear_workspace));
  run_on(kOp, x, p, &cpu::launch_skinny_linear, MTP_CUDA_LAUNCHER(launch_skinny_linear));
  return out;
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(skinny_linear, mtp::binding::skinny_linear)
