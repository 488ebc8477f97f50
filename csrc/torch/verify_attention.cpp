#include "mtp/verify_attention.h"

#include <cmath>
#include <tuple>

#include "paged_cache.h"

namespace mtp::binding {
namespace {

std::tuple<at::Tensor, at::Tensor> verify_attention(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, at::Tensor& k_cache,
    at::Tensor& v_cache, const at::Tensor& block_table, const at::Tensor& cache_lens,
    const at::Tensor& cu_q_lens, int64_t max_q_len, const std::optional<at::Tensor>& tree_mask,
    std::optional<double> scale, int64_t window, double softcap,
    const std::optional<at::Tensor>& sinks, const std::optional<at::Tensor>& k_scale,
    const std::optional<at::Tensor>& v_scale, c10::string_view layout) {
  constexpr const char* kOp = "verify_attention";
  const Checker check(kOp, q, "q");
  VerifyAttentionParams p;
  p.append = append_params(check, k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens,
                           k_scale, v_scale, layout);
  check.dtype("q", q, {k.scalar_type()});
  check.shape("q", q, {{"T", p.append.tokens}, {"Hq"}, {"D", p.append.head_dim}});
  check.rows_contiguous("q", q);
  p.q_heads = q.size(1);
  check.require(p.q_heads >= 1 && p.q_heads % p.append.kv_heads == 0,
                "q must have a multiple of k's heads, ", p.append.kv_heads, ", got ", p.q_heads);
  check.tensor("tree_mask", tree_mask, {{"T", p.append.tokens}}, {at::kLong});
  check.require(max_q_len >= 0, "max_q_len must not be negative, got ", max_q_len);
  check.require(!tree_mask.has_value() || max_q_len <= 64,
                "max_q_len must be at most 64 with a tree_mask, got ", max_q_len);
  check.require(window == -1 || window >= 1, "window must be -1 or at least 1, got ", window);
  check.require(softcap >= 0.0 && std::isfinite(softcap),
                "softcap must be finite and not negative, got ", softcap);
  check.tensor("sinks", sinks, {{"Hq", p.q_heads}}, {at::kFloat});
  if (runs_on_cuda(q)) {
    check.dtype("q", q, {at::kHalf, at::kBFloat16});
    check_aligned(check, "q", q);
  }

  at::Tensor out = at::empty(q.sizes(), q.options());
  at::Tensor lse = at::empty({p.append.tokens, p.q_heads}, q.options().dtype(at::kFloat));
  if (p.append.tokens == 0) return {out, lse};
  p.q = data_ptr<const void>(q, "q");
  p.tree_mask = data_ptr<const int64_t>(tree_mask, "tree_mask");
  p.sinks = data_ptr<const float>(sinks, "sinks");
  p.out = data_ptr<void>(out, "out");
  p.lse = data_ptr<float>(lse, "lse");
  p.q_token_stride = q.stride(0);
  p.q_head_stride = q.stride(1);
  p.max_q_len = max_q_len;
  p.window = window;
  p.scale =
      static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(p.append.head_dim))));
  p.softcap = static_cast<float>(softcap);
  const at::Tensor workspace = allocate_workspace(q, p, &cpu::verify_attention_workspace,
                                                  MTP_CUDA_LAUNCHER(verify_attention_workspace));
  run_on(kOp, q, p, &cpu::launch_verify_attention, MTP_CUDA_LAUNCHER(launch_verify_attention));
  return {out, lse};
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(verify_attention, mtp::binding::verify_attention)
