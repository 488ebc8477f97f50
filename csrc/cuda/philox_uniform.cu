// philox_uniform: the uniforms of ids 0..n-1 for each request.
//
// 4 bytes per value are written and almost nothing is read, so this is bound by stores: one
// thread computes one Philox block, hence four consecutive floats, kept in registers until they
// leave as a 16-byte store where the row allows it. No shared memory.
#include "cuda/common/launch.cuh"
#include "mtp/philox.h"
#include "mtp/philox_uniform.h"

namespace mtp::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) philox_uniform_kernel(const PhiloxUniformParams p) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t first = block * 4;
  if (first >= p.n) return;
  for (int64_t b = blockIdx.y; b < p.batch; b += gridDim.y) {
    const auto key = philox::make_key(p.seeds[b], p.positions[b], p.stream, p.row);
    const auto words = philox::block(key, static_cast<uint32_t>(block));
    float values[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = philox::uniform(words.w[j]);
    float* out = p.out + b * p.n + first;
    if (first + 4 <= p.n && (reinterpret_cast<uintptr_t>(out) & 15) == 0) {
      *reinterpret_cast<float4*>(out) = make_float4(values[0], values[1], values[2], values[3]);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (first + j < p.n) out[j] = values[j];
      }
    }
  }
}

}  // namespace

void launch_philox_uniform(const PhiloxUniformParams& p, void* stream) {
  const int64_t blocks = ceil_div<int64_t>(ceil_div<int64_t>(p.n, 4), kThreads);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(p.batch < 65535 ? p.batch : 65535));
  philox_uniform_kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  check_launch("philox_uniform");
}

}  // namespace mtp::cuda
