// A warp's view of 1024 consecutive logits of a row.
//
// Rows start anywhere (V may be odd), so the window of 16-byte packs is aligned in memory and may
// hang over the chunk by less than a pack on either side; what lies outside the chunk, or is
// masked, reads as -inf. Packs that would leave the row are loaded element by element.
#pragma once

#include <type_traits>

#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"
#include "mtp/rejection_rules.h"

namespace mtp::cuda {

constexpr float kMinusInf = -__builtin_huge_valf();

template <typename T>
__device__ __forceinline__ float logit_at(const rejection::TargetRow<T>& row, int64_t id) {
  return row.allowed(id) ? to_float(row.logits[id]) : kMinusInf;
}

template <typename T>
struct Chunk {
  static constexpr int kPer = Pack<T>::kSize;
  static constexpr int kStep = kWarp * kPer;
  static constexpr int kPacks = static_cast<int>(rejection::kChunk) / kStep + 1;

  const rejection::TargetRow<T>& row;
  int64_t start, stop;  // ids of the chunk
  int64_t first;        // id of this lane's first element; may lie outside the chunk

  __device__ __forceinline__ Chunk(const rejection::TargetRow<T>& row, int64_t c) : row(row) {
    start = c * rejection::kChunk;
    stop = row.vocab < start + rejection::kChunk ? row.vocab : start + rejection::kChunk;
    const auto misaligned =
        static_cast<int64_t>((reinterpret_cast<uintptr_t>(row.logits + start) & 15) / sizeof(T));
    first = start - misaligned + static_cast<int64_t>(threadIdx.x % kWarp) * kPer;
  }

  // The lane's pack of number k: ids first + k * kStep and following.
  __device__ __forceinline__ void load(int k, float (&x)[kPer]) const {
    const int64_t at = first + k * kStep;
    Pack<T> pack;
    const bool needed = at < stop && at + kPer > start;
    const bool whole = at >= 0 && at + kPer <= row.vocab;
    if (needed && whole) pack = load_pack(row.logits + at);
    uint32_t allowed = needed ? ~0u : 0u;
    if (needed && row.mask) {
      // The bits of ids at .. at + kPer - 1; a word before the row's first or after its last is not
      // read.
      const int64_t from = at < 0 ? 0 : at, last = (row.vocab - 1) / 32;
      const uint64_t low = row.mask[from / 32];
      const uint64_t high = from / 32 < last ? row.mask[from / 32 + 1] : 0u;
      allowed = static_cast<uint32_t>((high << 32 | low) >> (from % 32)) << (from - at);
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const bool inside = at + j >= start && at + j < stop && (allowed >> j & 1);
      x[j] = kMinusInf;
      if (inside) x[j] = to_float(whole ? pack.values[j] : row.logits[at + j]);
    }
  }

  // Entries of a dense f32 row beside those of pack k; 0 outside the row.
  __device__ __forceinline__ void load_beside(const float* dense, int k, float (&q)[kPer]) const {
    const int64_t at = first + k * kStep;
    if (at >= 0 && at + kPer <= row.vocab && aligned_16(dense + at)) {
#pragma unroll
      for (int i = 0; i < kPer; i += Pack<float>::kSize) {
        const Pack<float> pack = load_pack(dense + at + i);
#pragma unroll
        for (int j = 0; j < Pack<float>::kSize; ++j) q[i + j] = pack.values[j];
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      q[j] = at + j >= 0 && at + j < row.vocab ? dense[at + j] : 0.0f;
    }
  }

  // body(x, q, id) for every element of this lane, in ascending order of ids. x is -inf outside the
  // chunk; q comes from the row `dense`, or is 0 if that is null.
  template <typename Body>
  __device__ __forceinline__ void each_beside(const float* dense, const Body& body) const {
#pragma unroll 1
    for (int k = 0; k < kPacks; ++k) {
      float x[kPer], q[kPer] = {};
      load(k, x);
      if (dense) load_beside(dense, k, q);
#pragma unroll
      for (int j = 0; j < kPer; ++j) body(x[j], q[j], first + k * kStep + j);
    }
  }

  // body(x, id), likewise.
  template <typename Body>
  __device__ __forceinline__ void each(const Body& body) const {
    each_beside(nullptr, [&](float x, float, int64_t id) { body(x, id); });
  }
};

}  // namespace mtp::cuda
