// rope_qkv: splits rows of a fused projection into q, k and v and rotates q and k.
//
// Every element is read once and written once, and the D cosines and sines of a row's position
// are shared by all its heads through L1. One thread turns one pair (i, i + D/2), or copies the
// two elements where nothing is rotated: v, and rows at positions outside the table.
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "mtp/rope_qkv.h"

namespace mtp::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads) rope_qkv_kernel(const RopeQkvParams p) {
  const int64_t half = p.head_dim / 2;
  const int64_t heads = p.num_heads + 2 * p.num_kv_heads;
  const int64_t pairs = p.rows * heads * half;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t pair = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; pair < pairs;
       pair += stride) {
    const int64_t i = pair % half, head = pair / half % heads, row = pair / half / heads;
    const T* in = static_cast<const T*>(p.qkv) + (row * heads + head) * p.head_dim + i;

    T* out;
    if (head < p.num_heads) {
      out = static_cast<T*>(p.q) + (row * p.num_heads + head) * p.head_dim + i;
    } else {
      const int64_t kv = head - p.num_heads;
      out = kv < p.num_kv_heads
                ? static_cast<T*>(p.k) + (row * p.num_kv_heads + kv) * p.head_dim + i
                : static_cast<T*>(p.v) + (row * p.num_kv_heads + kv - p.num_kv_heads) * p.head_dim +
                      i;
    }

    const int64_t position = p.positions[row];
    const bool rotated =
        head < p.num_heads + p.num_kv_heads && position >= 0 && position < p.num_positions;
    if (rotated) {
      const float cosine = p.cos_sin[position * p.head_dim + i];
      const float sine = p.cos_sin[position * p.head_dim + half + i];
      const float a = to_float(in[0]), b = to_float(in[half]);
      out[0] = from_float<T>(a * cosine - b * sine);
      out[half] = from_float<T>(b * cosine + a * sine);
    } else {
      out[0] = in[0];
      out[half] = in[half];
    }
  }
}

}  // namespace

void launch_rope_qkv(const RopeQkvParams& p, void* stream) {
  const int64_t pairs = p.rows * (p.num_heads + 2 * p.num_kv_heads) * (p.head_dim / 2);
  const int64_t blocks = ceil_div<int64_t>(pairs, kThreads);
  const auto grid = static_cast<unsigned>(blocks < 1 << 20 ? blocks : 1 << 20);
  with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    rope_qkv_kernel<T><<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  });
  check_launch("rope_qkv");
}

}  // namespace mtp::cuda
