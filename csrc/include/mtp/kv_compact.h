// Moves accepted tree slots down: slot cache_len + accept_index[j] to cache_len + j.
#pragma once

#include <cstdint>

#include "mtp/paged_cache.h"
#include "mtp/types.h"

namespace mtp {

// Layers share shape and strides and differ in their data only, so one launch takes many.
constexpr int kCompactLayers = 192;

struct KvCompactParams {
  void* k_data[kCompactLayers];
  void* v_data[kCompactLayers];
  int64_t layers;
  PagedRows k_cache;  // data unused
  PagedRows v_cache;  // data unused
  BlockTable table;
  const int32_t* cache_lens;   // [B], before the step
  const void* accept_index;    // [B, max_accept], int32 or int64
  const int32_t* accept_lens;  // [B]
  int64_t batch, kv_heads, max_accept;
  int64_t head_bytes;     // D elements
  int64_t element_bytes;  // strides count these
  DType index_dtype;
};

namespace cpu {
void launch_kv_compact(const KvCompactParams& p);
}
namespace cuda {
void launch_kv_compact(const KvCompactParams& p, void* stream);
}

}  // namespace mtp
