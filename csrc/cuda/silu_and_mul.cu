// silu_and_mul: out = silu(gate) * up, element by element.
//
// 2F elements read and F written per row, each once; bound by memory. A thread computes one
// 16-byte pack of a row, single elements where the width or an address does not allow packs.
#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"
#include "mtp/silu_and_mul.h"

namespace mtp::cuda {
namespace {

constexpr int kThreads = 256;

// The division is exact on both sides of an overflowing exponential: silu(-inf) is NaN as in torch.
template <typename T>
__device__ __forceinline__ T silu_mul(T gate, T up) {
  const float g = to_float(gate);
  return from_float<T>(g / (1.0f + expf(-g)) * to_float(up));
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) silu_and_mul_kernel(const SiluAndMulParams p) {
  constexpr int kStep = kVector ? Pack<T>::kSize : 1;
  const int64_t per_row = p.width / kStep;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.rows * per_row;
       i += stride) {
    const int64_t row = i / per_row, column = i % per_row * kStep;
    const T* gate = static_cast<const T*>(p.gate_up) + row * 2 * p.width + column;
    T* out = static_cast<T*>(p.out) + row * p.width + column;
    if constexpr (kVector) {
      const Pack<T> g = load_pack(gate), u = load_pack(gate + p.width);
      Pack<T> result;
#pragma unroll
      for (int j = 0; j < kStep; ++j) result.values[j] = silu_mul(g.values[j], u.values[j]);
      store_pack(out, result);
    } else {
      *out = silu_mul(*gate, gate[p.width]);
    }
  }
}

}  // namespace

void launch_silu_and_mul(const SiluAndMulParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const bool vector = p.width % Pack<T>::kSize == 0 && aligned_16(p.gate_up) && aligned_16(p.out);
    const int64_t items = p.rows * p.width / (vector ? Pack<T>::kSize : 1);
    const int64_t blocks = ceil_div<int64_t>(items, kThreads);
    const auto grid = static_cast<unsigned>(blocks < 1 << 20 ? blocks : 1 << 20);
    if (vector) {
      silu_and_mul_kernel<T, true><<<grid, kThreads, 0, s>>>(p);
    } else {
      silu_and_mul_kernel<T, false><<<grid, kThreads, 0, s>>>(p);
    }
  });
  check_launch("silu_and_mul");
}

}  // namespace mtp::cuda
