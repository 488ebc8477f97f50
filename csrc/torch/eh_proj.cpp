#include "mtp/eh_proj.h"

#include "common.h"
#include "weights.h"

namespace mtp::binding {
namespace {

at::Tensor eh_proj(const at::Tensor& token_ids, const at::Tensor& hidden,
                   const at::Tensor& embedding, const at::Tensor& weight,
                   const std::optional<at::Tensor>& enorm_weight,
                   const std::optional<at::Tensor>& hnorm_weight,
                   const std::optional<at::Tensor>& bias,
                   const std::optional<at::Tensor>& positions, double eps, bool gemma_norm,
                   bool hidden_first) {
  constexpr const char* kOp = "eh_proj";
  const Checker check(kOp, hidden, "hidden");
  check.dtype("hidden", hidden, {at::kFloat, at::kHalf, at::kBFloat16});
  check.shape("hidden", hidden, {{"T"}, {"H"}});
  check.rows_contiguous("hidden", hidden);
  const int64_t t = hidden.size(0), h = hidden.size(1);
  check.tensor("token_ids", token_ids, {{"T", t}}, {at::kInt, at::kLong});
  check.device("embedding", embedding);
  check.dtype("embedding", embedding, {at::kFloat, at::kHalf, at::kBFloat16});
  check.shape("embedding", embedding, {{"V"}, {"H", h}});
  check.rows_contiguous("embedding", embedding);
  check.device("weight", weight);
  check.dtype("weight", weight, {at::kFloat, at::kHalf, at::kBFloat16});
  check.shape("weight", weight, {{"Ho"}, {"2H", 2 * h}});
  check.rows_contiguous("weight", weight);
  const int64_t n = weight.size(0);
  check.tensor("enorm_weight", enorm_weight, {{"H", h}}, {hidden.scalar_type()});
  check.tensor("hnorm_weight", hnorm_weight, {{"H", h}}, {hidden.scalar_type()});
  check.tensor("bias", bias, {{"Ho", n}}, {hidden.scalar_type()});
  check.tensor("positions", positions, {{"T", t}}, {at::kInt, at::kLong});
  check_cuda_rows(check, "weight", weight);
  check.require(!runs_on_cuda(hidden) || h % 8 == 0, "H must be a multiple of 8 on cuda, got ", h);

  at::Tensor out = at::empty({t, n}, hidden.options());
  if (out.numel() == 0) return out;
  EhProjParams p;
  p.token_ids = data_ptr<const void>(token_ids, "token_ids");
  p.hidden = data_ptr<const void>(hidden, "hidden");
  p.embedding = data_ptr<const void>(embedding, "embedding");
  p.weight = data_ptr<const void>(weight, "weight");
  p.enorm_weight = data_ptr<const void>(enorm_weight, "enorm_weight");
  p.hnorm_weight = data_ptr<const void>(hnorm_weight, "hnorm_weight");
  p.bias = data_ptr<const void>(bias, "bias");
  p.positions = data_ptr<const void>(positions, "positions");
  p.out = data_ptr<void>(out, "out");
  p.t = t;
  p.h = h;
  p.v = embedding.size(0);
  p.n = n;
  p.hidden_stride = hidden.stride(0);
  p.embedding_stride = embedding.stride(0);
  p.weight_stride = weight.stride(0);
  p.dtype = to_dtype(hidden.scalar_type());
  p.embedding_dtype = to_dtype(embedding.scalar_type());
  p.weight_dtype = to_dtype(weight.scalar_type());
  p.id_dtype = to_dtype(token_ids.scalar_type());
  p.position_dtype = positions ? to_dtype(positions->scalar_type()) : DType::kI64;
  p.eps = static_cast<float>(eps);
  p.gemma_norm = gemma_norm;
  p.hidden_first = hidden_first;
  const at::Tensor workspace =
      allocate_workspace(hidden, p, nullptr, MTP_CUDA_LAUNCHER(eh_proj_workspace));
  run_on(kOp, hidden, p, &cpu::launch_eh_proj, MTP_CUDA_LAUNCHER(launch_eh_proj));
  return out;
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(eh_proj, mtp::binding::eh_proj)
