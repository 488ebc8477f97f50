// Writes new keys and values into the paged cache, quantising to e4m3 where the cache is e4m3.
#pragma once

#include <cstdint>

#include "mtp/paged_cache.h"
#include "mtp/types.h"

namespace mtp {

struct KvAppendParams {
  const void* k;  // [T, Hkv, D]
  const void* v;  // [T, Hkv, D]
  PagedRows k_cache;
  PagedRows v_cache;
  BlockTable table;
  const int32_t* cache_lens;  // [B], before the append
  const int32_t* cu_q_lens;   // [B + 1]
  const float* k_scale;       // [1] or [Hkv], or null
  const float* v_scale;       // [1] or [Hkv], or null
  int64_t k_token_stride, k_head_stride;
  int64_t v_token_stride, v_head_stride;
  int64_t k_scale_stride, v_scale_stride;  // 0 for one scale, 1 for one per head
  int64_t batch, tokens, kv_heads, head_dim;
  DType dtype;        // of k and v
  DType cache_dtype;  // the same, or kF8E4M3
};

namespace cpu {
void launch_kv_append(const KvAppendParams& p);
}
namespace cuda {
void launch_kv_append(const KvAppendParams& p, void* stream);
}

}  // namespace mtp
