// Checks and parameters that the operators on the paged KV cache share.
#pragma once

#include <string>

#include "common.h"
#include "mtp/kv_append.h"

namespace mtp::binding {

inline bool is_hnd(const Checker& check, c10::string_view layout) {
  check.require(layout == "NHD" || layout == "HND", "layout must be \"NHD\" or \"HND\", got \"",
                layout, "\"");
  return layout == "HND";
}

// The CUDA kernels move 16 bytes at a time.
inline void check_aligned(const Checker& check, const char* name, const at::Tensor& t) {
  bool ok = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    const int64_t bytes = (d + 1 < t.dim() ? t.stride(d) : t.size(d)) * t.element_size();
    ok = ok && (bytes % 16 == 0 || t.size(d) <= 1);
  }
  check.require(
      t.numel() == 0 || ok, name,
      " must start at a multiple of 16 bytes and have rows and strides that are multiples "
      "of 16 bytes on cuda, got strides ",
      t.strides(), " for shape ", t.sizes(), " of ", t.scalar_type());
}

inline PagedRows paged_rows(const at::Tensor& cache, bool hnd) {
  return {nullptr, cache.stride(0), cache.stride(hnd ? 2 : 1), cache.stride(hnd ? 1 : 2)};
}

inline void check_cache(const Checker& check, const char* name, const at::Tensor& cache, bool hnd,
                        int64_t kv_heads, int64_t head_dim) {
  check.device(name, cache);
  if (hnd) {
    check.shape(name, cache, {{"P"}, {"Hkv", kv_heads}, {"page"}, {"D", head_dim}});
  } else {
    check.shape(name, cache, {{"P"}, {"page"}, {"Hkv", kv_heads}, {"D", head_dim}});
  }
  check.require(cache.size(hnd ? 2 : 1) >= 1, name, " must have a page size of at least 1, got 0");
  check.require(cache.size(0) < int64_t{1} << 31, name, " must have fewer than 2^31 pages, got ",
                cache.size(0));
  check.rows_contiguous(name, cache);
}

inline void check_same_cache(const Checker& check, const char* name, const at::Tensor& cache,
                             const char* other_name, const at::Tensor& other) {
  check.require(cache.sizes() == other.sizes() && cache.scalar_type() == other.scalar_type(), name,
                " must have the shape and dtype of ", other_name, ", ", other.sizes(), " of ",
                other.scalar_type(), ", got ", cache.sizes(), " of ", cache.scalar_type());
}

inline BlockTable block_table_params(const Checker& check, const at::Tensor& block_table,
                                     const at::Tensor& cache, bool hnd) {
  check.device("block_table", block_table);
  check.dtype("block_table", block_table, {at::kInt});
  check.shape("block_table", block_table, {{"B"}, {"max_pages"}});
  check.rows_contiguous("block_table", block_table);
  return {data_ptr<const int32_t>(block_table, "block_table"), block_table.stride(0),
          block_table.size(1), cache.size(0), cache.size(hnd ? 2 : 1)};
}

inline int64_t scale_stride(const Checker& check, const char* name,
                            const std::optional<at::Tensor>& scale, int64_t kv_heads, bool fp8) {
  if (!scale.has_value()) return 0;
  check.require(fp8, name, " needs a cache of dtype Float8_e4m3fn");
  const bool single = scale->dim() == 1 && scale->size(0) == 1;
  check.tensor(name, scale, {{"1 or Hkv", single ? 1 : kv_heads}}, {at::kFloat});
  return single ? 0 : 1;
}

// Everything that kv_append takes, and verify_attention with it; checks k first.
inline KvAppendParams append_params(const Checker& check, const at::Tensor& k, const at::Tensor& v,
                                    const at::Tensor& k_cache, const at::Tensor& v_cache,
                                    const at::Tensor& block_table, const at::Tensor& cache_lens,
                                    const at::Tensor& cu_q_lens,
                                    const std::optional<at::Tensor>& k_scale,
                                    const std::optional<at::Tensor>& v_scale,
                                    c10::string_view layout) {
  check.device("k", k);
  check.dtype("k", k, {at::kFloat, at::kHalf, at::kBFloat16});
  check.shape("k", k, {{"T"}, {"Hkv"}, {"D"}});
  const int64_t tokens = k.size(0), kv_heads = k.size(1), head_dim = k.size(2);
  check.require(kv_heads >= 1, "k must have at least one head, got 0");
  check.require(head_dim >= 8 && head_dim <= 256 && head_dim % 8 == 0,
                "D must be a multiple of 8 from 8 to 256, got ", head_dim);
  check.rows_contiguous("k", k);
  check.device("v", v);
  check.dtype("v", v, {k.scalar_type()});
  check.shape("v", v, {{"T", tokens}, {"Hkv", kv_heads}, {"D", head_dim}});
  check.rows_contiguous("v", v);

  const bool hnd = is_hnd(check, layout);
  check_cache(check, "k_cache", k_cache, hnd, kv_heads, head_dim);
  check.dtype("k_cache", k_cache, {k.scalar_type(), at::kFloat8_e4m3fn});
  check_cache(check, "v_cache", v_cache, hnd, kv_heads, head_dim);
  check_same_cache(check, "v_cache", v_cache, "k_cache", k_cache);
  if (runs_on_cuda(k)) {
    check_aligned(check, "k", k);
    check_aligned(check, "v", v);
    check_aligned(check, "k_cache", k_cache);
    check_aligned(check, "v_cache", v_cache);
  }

  KvAppendParams p;
  p.table = block_table_params(check, block_table, k_cache, hnd);
  p.batch = block_table.size(0);
  check.tensor("cache_lens", cache_lens, {{"B", p.batch}}, {at::kInt});
  check.tensor("cu_q_lens", cu_q_lens, {{"B+1", p.batch + 1}}, {at::kInt});
  const bool fp8 = k_cache.scalar_type() == at::kFloat8_e4m3fn;
  p.k_scale_stride = scale_stride(check, "k_scale", k_scale, kv_heads, fp8);
  p.v_scale_stride = scale_stride(check, "v_scale", v_scale, kv_heads, fp8);

  p.k = data_ptr<const void>(k, "k");
  p.v = data_ptr<const void>(v, "v");
  p.k_cache = paged_rows(k_cache, hnd);
  p.k_cache.data = data_ptr<void>(k_cache, "k_cache");
  p.v_cache = paged_rows(v_cache, hnd);
  p.v_cache.data = data_ptr<void>(v_cache, "v_cache");
  p.cache_lens = data_ptr<const int32_t>(cache_lens, "cache_lens");
  p.cu_q_lens = data_ptr<const int32_t>(cu_q_lens, "cu_q_lens");
  p.k_scale = data_ptr<const float>(k_scale, "k_scale");
  p.v_scale = data_ptr<const float>(v_scale, "v_scale");
  p.k_token_stride = k.stride(0);
  p.k_head_stride = k.stride(1);
  p.v_token_stride = v.stride(0);
  p.v_head_stride = v.stride(1);
  p.tokens = tokens;
  p.kv_heads = kv_heads;
  p.head_dim = head_dim;
  p.dtype = to_dtype(k.scalar_type());
  p.cache_dtype = to_dtype(k_cache.scalar_type());
  return p;
}

}  // namespace mtp::binding
