// add_rms_norm: residual += x, then the RMS norm of the sum, one CTA per row.
//
// Bytes that must move per row: 4H read and 4H written of the f32 residual, one read of x and one
// write of the result in their own dtype. The sum stays in registers between the two passes, so
// nothing is read twice up to kThreads * kElements columns; a wider row re-reads its residual,
// which is then in L2. Threads own groups of four neighbouring columns: 16-byte accesses to the
// residual, 8-byte ones to half-precision x. The order of the sum of squares depends on H alone.
#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "mtp/add_rms_norm.h"

namespace mtp::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 4;  // columns per access
constexpr int kHeld = 8;   // groups per thread that stay in registers
constexpr int kStride = kThreads * kGroup;

template <typename T>
struct alignas(sizeof(T) * kGroup) Group {
  T values[kGroup];
};

// Columns at or past `hidden` read as zero. `kVector`: every group is whole and aligned.
template <bool kVector, typename T>
__device__ __forceinline__ void load_group(const T* row, int64_t column, int64_t hidden,
                                           float (&out)[kGroup]) {
  if constexpr (kVector) {
    if (column < hidden) {
      const auto group = *reinterpret_cast<const Group<T>*>(row + column);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) out[j] = to_float(group.values[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kGroup; ++j) out[j] = 0.0f;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      out[j] = column + j < hidden ? to_float(row[column + j]) : 0.0f;
    }
  }
}

template <bool kVector, typename T>
__device__ __forceinline__ void store_group(T* row, int64_t column, int64_t hidden,
                                            const float (&in)[kGroup]) {
  if constexpr (kVector) {
    if (column >= hidden) return;
    Group<T> group;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) group.values[j] = from_float<T>(in[j]);
    *reinterpret_cast<Group<T>*>(row + column) = group;
  } else {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      if (column + j < hidden) row[column + j] = from_float<T>(in[j]);
    }
  }
}

template <typename T, bool kVector>
__global__ void __launch_bounds__(kThreads) add_rms_norm_kernel(const AddRmsNormParams p) {
  __shared__ float scratch[kThreads / kWarp];
  const int64_t row = blockIdx.x;
  float* residual = p.residual + row * p.hidden;
  const T* x = p.x ? static_cast<const T*>(p.x) + row * p.hidden : nullptr;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + row * p.hidden;

  // Add, and sum the squares.
  float held[kHeld][kGroup];
  float squares = 0.0f;
  const auto add = [&](int64_t column, float (&sum)[kGroup]) {
    load_group<kVector>(residual, column, p.hidden, sum);
    if (x) {
      float addend[kGroup];
      load_group<kVector>(x, column, p.hidden, addend);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) sum[j] += addend[j];
      store_group<kVector>(residual, column, p.hidden, sum);
    }
#pragma unroll
    for (int j = 0; j < kGroup; ++j) squares = fmaf(sum[j], sum[j], squares);
  };
  const int64_t first = threadIdx.x * kGroup;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) add(first + i * kStride, held[i]);
  for (int64_t column = first + kHeld * kStride; column < p.hidden; column += kStride) {
    float sum[kGroup];
    add(column, sum);
  }

  // Scale.
  const float mean = block_sum<kThreads>(squares, scratch) / static_cast<float>(p.hidden);
  const float scale = 1.0f / sqrtf(mean + p.eps);
  const float offset = p.gemma_norm ? 1.0f : 0.0f;
  const auto normalise = [&](int64_t column, float (&sum)[kGroup]) {
    float w[kGroup];
    load_group<kVector>(weight, column, p.hidden, w);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum[j] = sum[j] * scale * (w[j] + offset);
    store_group<kVector>(out, column, p.hidden, sum);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) normalise(first + i * kStride, held[i]);
  for (int64_t column = first + kHeld * kStride; column < p.hidden; column += kStride) {
    float sum[kGroup];
    load_group<kVector>(residual, column, p.hidden, sum);
    normalise(column, sum);
  }
}

}  // namespace

void launch_add_rms_norm(const AddRmsNormParams& p, void* stream) {
  const auto grid = static_cast<unsigned>(p.rows);
  const auto s = static_cast<cudaStream_t>(stream);
  const bool vector = p.hidden % kGroup == 0 && aligned_16(p.residual) && aligned_16(p.x) &&
                      aligned_16(p.weight) && aligned_16(p.out);
  with_float_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    if (vector) {
      add_rms_norm_kernel<T, true><<<grid, kThreads, 0, s>>>(p);
    } else {
      add_rms_norm_kernel<T, false><<<grid, kThreads, 0, s>>>(p);
    }
  });
  check_launch("add_rms_norm");
}

}  // namespace mtp::cuda
