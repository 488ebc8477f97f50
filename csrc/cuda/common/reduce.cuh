// Reductions in one fixed order: the same bits in every launch.
#pragma once

#include <cstdint>

namespace mtp::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Every lane gets the result.
template <typename T, typename Combine>
__device__ __forceinline__ T warp_reduce(T value, const Combine& combine) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
  return warp_reduce(value, [](float a, float b) { return a + b; });
}

// Every thread gets the result. `scratch` holds one value per warp, in shared memory; it may be
// reused after the next barrier.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value, float* scratch) {
  constexpr int kWarps = kThreads / kWarp;
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total += scratch[w];
  return total;
}

// Every thread gets the result; `scratch` holds one value per warp and may be reused at once. For
// operations whose order cannot matter: integers, maxima, flags.
template <int kThreads, typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T* scratch, const Combine& combine) {
  constexpr int kWarps = kThreads / kWarp;
  value = warp_reduce(value, combine);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  T total = scratch[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) total = combine(total, scratch[w]);
  return total;
}

}  // namespace mtp::cuda
