// What the paged-cache kernels share: whose row is whose, and a key or value row as it is stored.
// cu_q_lens is data and may be wrong: offsets are clamped to 0..T and made non-decreasing by a
// running maximum, which every warp that needs it takes for itself.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "mtp/kv_append.h"

namespace mtp::cuda {

// The clamped offset cu_q_lens[i]; every lane of the warp calls and gets it.
__device__ __forceinline__ int64_t row_offset(const int32_t* cu_q_lens, int64_t i, int64_t tokens) {
  int32_t last = 0;
  for (int64_t j = threadIdx.x % kWarp; j <= i; j += kWarp) last = max(last, cu_q_lens[j]);
  last = warp_reduce(last, [](int32_t a, int32_t b) { return max(a, b); });
  return last < tokens ? last : tokens;
}

// Eight elements as the cache stores them; for e4m3, x / scale to nearest even, saturating.
template <typename T, typename C>
__device__ __forceinline__ void store_encoded8(C* to, const T* from, float scale) {
  if constexpr (std::is_same_v<T, C>) {
#pragma unroll
    for (int i = 0; i < 8; i += Pack<T>::kSize) store_pack(to + i, load_pack(from + i));
  } else {
    alignas(8) C stored[8];
#pragma unroll
    for (int i = 0; i < 8; i += Pack<T>::kSize) {
      const Pack<T> pack = load_pack(from + i);
#pragma unroll
      for (int j = 0; j < Pack<T>::kSize; ++j) {
        stored[i + j] = from_float<C>(to_float(pack.values[j]) / scale);
      }
    }
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(stored);
  }
}

__device__ __forceinline__ float head_scale(const float* scales, int64_t stride, int64_t head) {
  return scales ? scales[head * stride] : 1.0f;
}

// Writes dims [d, d + 8) of token t's key and value, which sits at `position` of request b.
template <typename T, typename C>
__device__ __forceinline__ void append8(const KvAppendParams& p, int64_t b, int64_t t,
                                        int64_t position, int64_t head, int64_t d) {
  const auto page_size = static_cast<uint32_t>(p.table.page_size);
  const auto at = static_cast<uint32_t>(position);
  const int64_t page = p.table.page(b, at / page_size);
  if (page < 0) return;
  const int64_t slot = at % page_size;
  store_encoded8(static_cast<C*>(p.k_cache.data) + p.k_cache.offset(page, slot, head) + d,
                 static_cast<const T*>(p.k) + t * p.k_token_stride + head * p.k_head_stride + d,
                 head_scale(p.k_scale, p.k_scale_stride, head));
  store_encoded8(static_cast<C*>(p.v_cache.data) + p.v_cache.offset(page, slot, head) + d,
                 static_cast<const T*>(p.v) + t * p.v_token_stride + head * p.v_head_stride + d,
                 head_scale(p.v_scale, p.v_scale_stride, head));
}

}  // namespace mtp::cuda
