#include "mtp/head_topk.h"

#include "common.h"
#include "weights.h"

namespace mtp::binding {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> head_topk(
    const at::Tensor& hidden, const at::Tensor& weight, int64_t k,
    const std::optional<at::Tensor>& norm_weight, const std::optional<at::Tensor>& bias,
    const std::optional<at::Tensor>& weight_scale, const std::optional<at::Tensor>& token_map,
    double eps, bool gemma_norm, double softcap, int64_t vocab_offset) {
  constexpr const char* kOp = "head_topk";
  const Checker check(kOp, hidden, "hidden");
  check.dtype("hidden", hidden, {at::kFloat, at::kHalf, at::kBFloat16});
  check.shape("hidden", hidden, {{"M"}, {"H"}});
  check.rows_contiguous("hidden", hidden);
  const int64_t m = hidden.size(0), h = hidden.size(1);
  check_weight(check, "weight", weight, {{"V"}, {"H", h}}, weight_scale);
  const int64_t v = weight.size(0);
  check.require(k >= 1 && k <= kMaxTopK && k <= v, "k must be in [1, ", kMaxTopK,
                "] and at most V=", v, ", got ", k);
  check.tensor("norm_weight", norm_weight, {{"H", h}}, {hidden.scalar_type()});
  check.tensor("bias", bias, {{"V", v}}, {hidden.scalar_type()});
  check.tensor("token_map", token_map, {{"V", v}}, {at::kInt, at::kLong});
  check.require(softcap >= 0.0, "softcap must be 0 (off) or positive, got ", softcap);
  check_cuda_rows(check, "weight", weight);

  at::Tensor logits = at::empty({m, k}, hidden.options().dtype(at::kFloat));
  at::Tensor ids = at::empty({m, k}, hidden.options().dtype(at::kLong));
  at::Tensor lse = at::empty({m}, logits.options());
  if (m == 0) return {logits, ids, lse};
  HeadTopkParams p;
  p.hidden = data_ptr<const void>(hidden, "hidden");
  p.weight = data_ptr<const void>(weight, "weight");
  p.norm_weight = data_ptr<const void>(norm_weight, "norm_weight");
  p.bias = data_ptr<const void>(bias, "bias");
  p.weight_scale = data_ptr<const float>(weight_scale, "weight_scale");
  p.token_map = data_ptr<const void>(token_map, "token_map");
  p.logits = data_ptr<float>(logits, "logits");
  p.ids = data_ptr<int64_t>(ids, "ids");
  p.lse = data_ptr<float>(lse, "lse");
  p.m = m;
  p.h = h;
  p.v = v;
  p.hidden_stride = hidden.stride(0);
  p.weight_stride = weight.stride(0);
  p.vocab_offset = vocab_offset;
  p.dtype = to_dtype(hidden.scalar_type());
  p.weight_dtype = to_dtype(weight.scalar_type());
  p.map_dtype = token_map ? to_dtype(token_map->scalar_type()) : DType::kI64;
  p.k = static_cast<int>(k);
  p.eps = static_cast<float>(eps);
  p.softcap = static_cast<float>(softcap);
  p.gemma_norm = gemma_norm;
  const at::Tensor workspace =
      allocate_workspace(hidden, p, nullptr, MTP_CUDA_LAUNCHER(head_topk_workspace));
  run_on(kOp, hidden, p, &cpu::launch_head_topk, MTP_CUDA_LAUNCHER(launch_head_topk));
  return {logits, ids, lse};
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(head_topk, mtp::binding::head_topk)
