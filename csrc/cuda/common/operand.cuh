// Tensor-core operands made of values of any element type, in registers.
//
// Products run on bf16, or on f16 where both sides are f16. One-byte values are exact in bf16; an
// f16 value is the exact sum of two bf16 summands, an f32 value of three. Of the products of
// summands those below f32's rounding are left out: summands i and j meet where i + j < 3. tf32
// would keep only 11 of 24 bits.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/common/mma.cuh"
#include "cuda/common/vec.cuh"

namespace mtp::cuda {

// What two element types are multiplied in.
template <typename A, typename B>
using ProductType = std::conditional_t<std::is_same_v<A, __half> && std::is_same_v<B, __half>,
                                       __half, __nv_bfloat16>;

constexpr bool summands_meet(int i, int j) { return i + j < 3; }

// What is left of x after its first summand; nothing where that is not finite.
__device__ __forceinline__ float remainder_of(float x, float first) {
  return fabsf(first) < INFINITY ? x - first : 0.0f;
}

// Widens elements 4 s .. 4 s + 3 of 16 bytes to pairs of C: out[summand][0] holds elements 0 and 1,
// [1] elements 2 and 3.
template <typename W, typename C>
struct Operand {
  static constexpr int kSummands = 1;
  static __device__ __forceinline__ void widen(const uint32_t (&piece)[4], int s,
                                               uint32_t (&out)[1][2]) {
    static_assert(sizeof(W) == 2, "as it is");
    out[0][0] = piece[2 * s];
    out[0][1] = piece[2 * s + 1];
  }
};

template <>
struct Operand<int8_t, __nv_bfloat16> {
  static constexpr int kSummands = 1;
  static __device__ __forceinline__ void widen(const uint32_t (&piece)[4], int s,
                                               uint32_t (&out)[1][2]) {
    // 2^23 + (x + 128) as bits, then exact in f32 and in bf16.
    const uint32_t biased = piece[s] ^ 0x80808080u;
    float f[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      f[i] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440 | i)) - 8388736.0f;
    }
    out[0][0] = pack2<__nv_bfloat16>(f[0], f[1]);
    out[0][1] = pack2<__nv_bfloat16>(f[2], f[3]);
  }
};

template <>
struct Operand<__nv_fp8_e4m3, __nv_bfloat16> {
  static constexpr int kSummands = 1;
  static __device__ __forceinline__ void widen(const uint32_t (&piece)[4], int s,
                                               uint32_t (&out)[1][2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = __byte_perm(piece[s], 0, i == 0 ? 0x4140 : 0x4342);
      const uint32_t magnitude = pair & 0x007f007fu;
      // Exponent and mantissa in bf16's place are 2^-120 of the value, subnormals included.
      uint32_t bits = magnitude << 4 | (pair & 0x00800080u) << 8;
      const __nv_bfloat162 scaled =
          __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&bits),
                  __nv_bfloat162{__nv_bfloat16_raw{0x7b80}, __nv_bfloat16_raw{0x7b80}});
      const uint32_t is_nan = (magnitude + 0x00010001u & 0x00800080u) >> 7;
      out[0][i] = *reinterpret_cast<const uint32_t*>(&scaled) | is_nan * 0x7fc0u;
    }
  }
};

// Values that take several bf16 summands.
template <int kCount>
__device__ __forceinline__ void split4(float (&f)[4], uint32_t (&out)[kCount][2]) {
#pragma unroll
  for (int piece = 0; piece < kCount; ++piece) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out[piece][i] = pack2<__nv_bfloat16>(f[2 * i], f[2 * i + 1]);
      f[2 * i] = remainder_of(f[2 * i], __uint_as_float(out[piece][i] << 16));
      f[2 * i + 1] = remainder_of(f[2 * i + 1], __uint_as_float(out[piece][i] & 0xffff0000u));
    }
  }
}

template <>
struct Operand<__half, __nv_bfloat16> {
  static constexpr int kSummands = 2;
  static __device__ __forceinline__ void widen(const uint32_t (&piece)[4], int s,
                                               uint32_t (&out)[2][2]) {
    const auto* pairs = reinterpret_cast<const __half2*>(&piece[2 * s]);
    const float2 a = __half22float2(pairs[0]), b = __half22float2(pairs[1]);
    float f[4] = {a.x, a.y, b.x, b.y};
    split4(f, out);
  }
};

template <>
struct Operand<float, __nv_bfloat16> {
  static constexpr int kSummands = 3;
  static __device__ __forceinline__ void widen(const uint32_t (&piece)[4], int,
                                               uint32_t (&out)[3][2]) {
    float f[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) f[i] = __uint_as_float(piece[i]);
    split4(f, out);
  }
};

}  // namespace mtp::cuda
