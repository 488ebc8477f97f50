// Activation rows as the projections read them: gathered or not, any float dtype, any alignment,
// with an optional norm.
#pragma once

#include <cstdint>

#include "cuda/common/mma.cuh"
#include "cuda/common/vec.cuh"
#include "mtp/types.h"

namespace mtp::cuda {

// A stretch of every activation row: row m of `data`, or, with `ids`, row ids[m], which counts as
// zero where it is outside [0, limit) or positions[m] is 0. Normalised if there is a norm_weight.
struct Segment {
  const void* data;
  const void* norm_weight;  // [length], norm_dtype, or null
  const void* ids;          // or null
  const void* positions;    // or null
  int64_t stride, length, limit;
  DType dtype, norm_dtype, id_dtype, position_dtype;
  bool aligned, norm_aligned;  // every row, and the norm's weight, to 16 bytes

  // Of the rows from `first` on.
  Segment from_row(int64_t first) const {
    Segment s = *this;
    if (!ids) s.data = static_cast<const char*>(data) + first * stride * dtype_bytes(dtype);
    if (ids) s.ids = static_cast<const char*>(ids) + first * dtype_bytes(id_dtype);
    if (positions) {
      s.positions = static_cast<const char*>(positions) + first * dtype_bytes(position_dtype);
    }
    return s;
  }
};

inline Segment make_segment(const void* data, int64_t stride, int64_t length, DType dtype,
                            const void* norm_weight, DType norm_dtype) {
  Segment s = {};
  s.data = data;
  s.norm_weight = norm_weight;
  s.stride = stride;
  s.length = length;
  s.dtype = dtype;
  s.norm_dtype = norm_dtype;
  s.aligned = aligned_16(data) && stride * dtype_bytes(dtype) % 16 == 0;
  s.norm_aligned = aligned_16(norm_weight);
  return s;
}

__device__ __forceinline__ float load_as(DType dtype, const void* p, int64_t i) {
  switch (dtype) {
    case DType::kF16:
      return to_float(static_cast<const __half*>(p)[i]);
    case DType::kBF16:
      return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}

__device__ __forceinline__ void store_as(DType dtype, void* p, int64_t i, float x) {
  switch (dtype) {
    case DType::kF16:
      static_cast<__half*>(p)[i] = from_float<__half>(x);
      break;
    case DType::kBF16:
      static_cast<__nv_bfloat16*>(p)[i] = from_float<__nv_bfloat16>(x);
      break;
    default:
      static_cast<float*>(p)[i] = x;
  }
}

__device__ __forceinline__ int64_t load_index(DType dtype, const void* p, int64_t i) {
  return dtype == DType::kI32 ? static_cast<const int32_t*>(p)[i]
                              : static_cast<const int64_t*>(p)[i];
}

// The offset of row m's first element; negative where the row is zero.
__device__ __forceinline__ int64_t start_of_row(const Segment& s, int64_t m) {
  if (!s.ids) return m * s.stride;
  const int64_t row = load_index(s.id_dtype, s.ids, m);
  if (row < 0 || row >= s.limit) return -1;
  if (s.positions && load_index(s.position_dtype, s.positions, m) == 0) return -1;
  return row * s.stride;
}

// Eight elements as they lie in memory.
struct RawPiece {
  uint4 low, high;  // high: f32 only
};

__device__ __forceinline__ RawPiece load_raw(DType dtype, const void* data, int64_t at,
                                             bool aligned) {
  RawPiece raw = {};
  if (dtype == DType::kF32) {
    const auto* p = static_cast<const uint32_t*>(data) + at;
    if (aligned) {
      raw.low = *reinterpret_cast<const uint4*>(p);
      raw.high = *reinterpret_cast<const uint4*>(p + 4);
    } else {
      raw.low = make_uint4(p[0], p[1], p[2], p[3]);
      raw.high = make_uint4(p[4], p[5], p[6], p[7]);
    }
  } else {
    const auto* p = static_cast<const uint16_t*>(data) + at;
    if (aligned) {
      raw.low = *reinterpret_cast<const uint4*>(p);
    } else {
      raw.low =
          make_uint4(p[0] | p[1] << 16, p[2] | p[3] << 16, p[4] | p[5] << 16, p[6] | p[7] << 16);
    }
  }
  return raw;
}

__device__ __forceinline__ void widen_raw(DType dtype, const RawPiece& raw, float (&x)[8]) {
  const uint32_t words[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                             raw.high.x, raw.high.y, raw.high.z, raw.high.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (dtype == DType::kF16) {
      const float2 pair = unpack2<__half>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    } else if (dtype == DType::kBF16) {
      const float2 pair = unpack2<__nv_bfloat16>(words[i]);
      x[2 * i] = pair.x;
      x[2 * i + 1] = pair.y;
    } else {
      x[2 * i] = __uint_as_float(words[2 * i]);
      x[2 * i + 1] = __uint_as_float(words[2 * i + 1]);
    }
  }
}

__device__ __forceinline__ RawPiece load_raw(const Segment& s, int64_t at) {
  return load_raw(s.dtype, s.data, at, s.aligned);
}

// Elements k, k + 1, .. of what a norm multiplies by.
template <int kCount>
__device__ __forceinline__ void load_norm_weight(const Segment& s, int64_t k, float offset,
                                                 float (&w)[kCount]) {
  if constexpr (kCount == 8) {
    widen_raw(s.norm_dtype, load_raw(s.norm_dtype, s.norm_weight, k, s.norm_aligned), w);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) w[i] = load_as(s.norm_dtype, s.norm_weight, k + i);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) w[i] += offset;
}

__device__ __forceinline__ void scale_by_norm_weight(const Segment& s, int64_t k, float offset,
                                                     float (&x)[8]) {
  float w[8];
  load_norm_weight(s, k, offset, w);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] *= w[i];
}

__device__ __forceinline__ float rms_factor(float squares, int64_t length, float eps) {
  return 1.0f / sqrtf(squares / static_cast<float>(length) + eps);
}

}  // namespace mtp::cuda
