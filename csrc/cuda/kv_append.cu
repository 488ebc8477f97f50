// kv_append: a token's K and V rows go to one slot each.
//
// Every byte moves once, from 16-byte loads to 16-byte stores (8-byte ones into an e4m3 cache). A
// warp takes one token with all its heads, so the search for the token's request and its page is
// paid once per 2 * Hkv * D elements. No shared memory; nothing is kept but the 8 elements at hand.
#include "cuda/common/launch.cuh"
#include "cuda/common/paged_cache.cuh"
#include "mtp/kv_append.h"

namespace mtp::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;

// The request of row t, or -1: the last one whose clamped offset is not past t.
__device__ __forceinline__ int64_t request_of(const KvAppendParams& p, int64_t t) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = 0; first <= p.batch; first += kWarp) {
    const int64_t i = first + lane;
    const unsigned past = __ballot_sync(kAllLanes, i <= p.batch && p.cu_q_lens[i] > t);
    if (past) return first + __ffs(past) - 2;
  }
  return -1;
}

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads) kv_append_kernel(const KvAppendParams p) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (t >= p.tokens) return;
  const int64_t b = request_of(p, t);
  if (b < 0) return;
  const int64_t length = max(p.cache_lens[b], 0);
  const int64_t position = length + t - row_offset(p.cu_q_lens, b, p.tokens);
  const int chunks = static_cast<int>(p.head_dim / 8);
  for (int e = threadIdx.x % kWarp; e < p.kv_heads * chunks; e += kWarp) {
    append8<T, C>(p, b, t, position, e / chunks, e % chunks * 8);
  }
}

}  // namespace

void launch_kv_append(const KvAppendParams& p, void* stream) {
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(p.tokens, kWarps));
  with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const auto s = static_cast<cudaStream_t>(stream);
    if (p.cache_dtype == DType::kF8E4M3) {
      kv_append_kernel<T, __nv_fp8_e4m3><<<blocks, kThreads, 0, s>>>(p);
    } else {
      kv_append_kernel<T, T><<<blocks, kThreads, 0, s>>>(p);
    }
  });
  check_launch("kv_append");
}

}  // namespace mtp::cuda
