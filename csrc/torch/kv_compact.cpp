#include "mtp/kv_compact.h"

#include "paged_cache.h"

namespace mtp::binding {
namespace {

void kv_compact(at::TensorList k_caches, at::TensorList v_caches, const at::Tensor& block_table,
                const at::Tensor& cache_lens, const at::Tensor& accept_index,
                const at::Tensor& accept_lens, c10::string_view layout) {
  constexpr const char* kOp = "kv_compact";
  const Checker check(kOp, block_table, "block_table");
  check.require(k_caches.size() == v_caches.size(),
                "v_caches must have as many layers as k_caches, ", k_caches.size(), ", got ",
                v_caches.size());
  const bool hnd = is_hnd(check, layout);
  if (k_caches.empty()) return;

  const at::Tensor& k0 = k_caches[0];
  check.dtype("k_caches[0]", k0, {at::kFloat, at::kHalf, at::kBFloat16, at::kFloat8_e4m3fn});
  check.require(k0.dim() == 4, "k_caches[0] must have 4 dimensions, got shape ", k0.sizes());
  const auto check_layer = [&](const char* list, size_t i, const at::Tensor& cache,
                               const at::Tensor& first) {
    const std::string name = std::string(list) + "[" + std::to_string(i) + "]";
    check_cache(check, name.c_str(), cache, hnd, k0.size(hnd ? 1 : 2), k0.size(3));
    check_same_cache(check, name.c_str(), cache, "k_caches[0]", k0);
    check.require(cache.strides() == first.strides(), name, " must have the strides of ", list,
                  "[0], ", first.strides(), ", got ", cache.strides());
    if (runs_on_cuda(block_table)) check_aligned(check, name.c_str(), cache);
  };
  for (size_t i = 0; i < k_caches.size(); ++i) {
    check_layer("k_caches", i, k_caches[i], k_caches[0]);
    check_layer("v_caches", i, v_caches[i], v_caches[0]);
  }

  KvCompactParams p;
  p.table = block_table_params(check, block_table, k0, hnd);
  p.batch = block_table.size(0);
  check.tensor("cache_lens", cache_lens, {{"B", p.batch}}, {at::kInt});
  check.tensor("accept_index", accept_index, {{"B", p.batch}, {"max_accept"}},
               {at::kInt, at::kLong});
  check.tensor("accept_lens", accept_lens, {{"B", p.batch}}, {at::kInt});
  if (accept_index.numel() == 0 || k0.numel() == 0 || block_table.numel() == 0) return;

  p.k_cache = paged_rows(k0, hnd);
  p.v_cache = paged_rows(v_caches[0], hnd);
  p.cache_lens = data_ptr<const int32_t>(cache_lens, "cache_lens");
  p.accept_index = data_ptr<const void>(accept_index, "accept_index");
  p.accept_lens = data_ptr<const int32_t>(accept_lens, "accept_lens");
  p.kv_heads = k0.size(hnd ? 1 : 2);
  p.max_accept = accept_index.size(1);
  p.element_bytes = k0.element_size();
  p.head_bytes = k0.size(3) * p.element_bytes;
  p.index_dtype = to_dtype(accept_index.scalar_type());
  // One launch, unless the model has more layers than a launch has parameters for.
  for (size_t first = 0; first < k_caches.size(); first += kCompactLayers) {
    p.layers = std::min<int64_t>(kCompactLayers, k_caches.size() - first);
    for (int64_t i = 0; i < p.layers; ++i) {
      p.k_data[i] = data_ptr<void>(k_caches[first + i], "k_caches");
      p.v_data[i] = data_ptr<void>(v_caches[first + i], "v_caches");
    }
    run_on(kOp, block_table, p, &cpu::launch_kv_compact, MTP_CUDA_LAUNCHER(launch_kv_compact));
  }
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(kv_compact, mtp::binding::kv_compact)
