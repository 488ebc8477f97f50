// Element types and small helpers shared by every operator. No torch, no CUDA headers.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MTP_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inline: the CPU kernels compile these once per instruction-set level, and no level may end
// up with another level's copy.
#define MTP_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace mtp {

enum class DType : int32_t { kF32, kF16, kBF16, kI8, kF8E4M3, kI32, kI64 };

constexpr int dtype_bytes(DType t) {
  switch (t) {
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kI8:
    case DType::kF8E4M3:
      return 1;
  }
  return 0;
}

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace mtp
