#include "mtp/kv_append.h"

#include "paged_cache.h"

namespace mtp::binding {
namespace {

void kv_append(const at::Tensor& k, const at::Tensor& v, at::Tensor& k_cache, at::Tensor& v_cache,
               const at::Tensor& block_table, const at::Tensor& cache_lens,
               const at::Tensor& cu_q_lens, const std::optional<at::Tensor>& k_scale,
               const std::optional<at::Tensor>& v_scale, c10::string_view layout) {
  constexpr const char* kOp = "kv_append";
  const Checker check(kOp, k, "k");
  const KvAppendParams p = append_params(check, k, v, k_cache, v_cache, block_table, cache_lens,
                                         cu_q_lens, k_scale, v_scale, layout);
  if (p.tokens == 0 || p.batch == 0 || k_cache.numel() == 0 || block_table.numel() == 0) return;
  run_on(kOp, k, p, &cpu::launch_kv_append, MTP_CUDA_LAUNCHER(launch_kv_append));
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(kv_append, mtp::binding::kv_append)
