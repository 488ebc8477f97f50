// e^z and the exponential variate of a race, each as one fixed sequence of IEEE f32 operations
// without libm: the vector kernels of the CPU (AVX2 and up) and the CUDA kernels compute the same
// bits. F is float or a vector of floats that brings the same functions.
//
// No multiplication here feeds an addition directly, unless its result is exact: a compiler that
// contracts a * b + c has nothing to contract.
//
// Weights are summed as 64-bit integers, multiples of 2^-40: an integer sum is the same in any
// order, so no split of a row over threads, blocks or processors can change a result.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "mtp/philox.h"

namespace mtp {

// ---- the operations, for float ---------------------------------------------------------------

MTP_HOST_DEVICE float float_from_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
MTP_HOST_DEVICE uint32_t bits_from_float(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

template <typename F>
MTP_HOST_DEVICE F splat(float x);
template <>
MTP_HOST_DEVICE float splat<float>(float x) {
  return x;
}

MTP_HOST_DEVICE float fmadd(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}
MTP_HOST_DEVICE float min(float a, float b) { return a < b ? a : b; }
MTP_HOST_DEVICE float max(float a, float b) { return a > b ? a : b; }
MTP_HOST_DEVICE float round_to_int(float a) {
#ifdef __CUDA_ARCH__
  return rintf(a);
#else
  return std::nearbyint(a);
#endif
}
// 2^n for integral n in [-126, 127].
MTP_HOST_DEVICE float pow2i(float n) {
  return float_from_bits(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}
MTP_HOST_DEVICE float zero_below(float bound, float x, float y) { return x < bound ? 0.0f : y; }
// Splits a normal u > 0 into 2^k * m with m in [sqrt(1/2), sqrt(2)).
MTP_HOST_DEVICE float split_exponent(float u, float* k) {
  const uint32_t bits = bits_from_float(u);
  const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  *k = static_cast<float>(e);
  return float_from_bits(bits - (static_cast<uint32_t>(e) << 23));
}

// ---- the functions ---------------------------------------------------------------------------

// e^z for z <= 0, to about 1 ulp; 0 below -87.
template <typename F>
MTP_HOST_DEVICE F exp_nonpositive(F z) {
  const F x = max(z, splat<F>(-88.0f));
  const F n = max(round_to_int(x * splat<F>(1.44269504f)), splat<F>(-126.0f));
  F r = fmadd(n, splat<F>(-0.693359375f), x);
  r = fmadd(n, splat<F>(2.12194440e-4f), r);
  F y = splat<F>(0.0013950486900284886f);
  y = fmadd(y, r, splat<F>(0.008368887938559055f));
  y = fmadd(y, r, splat<F>(0.04166620597243309f));
  y = fmadd(y, r, splat<F>(0.166665181517601f));
  y = fmadd(y, r, splat<F>(0.5f));
  y = fmadd(r * r, y, r) + splat<F>(1.0f);
  return zero_below(splat<F>(-87.0f), z, y * pow2i(n));
}

// The weight of a logit relative to the row's maximum: e^((logit - max) / T).
template <typename F>
MTP_HOST_DEVICE F weight(F logit, F max_logit, F inv_temperature) {
  return exp_nonpositive((logit - max_logit) * inv_temperature);
}

MTP_HOST_DEVICE float inverse_temperature(float t) {
  const float inverse = 1.0f / t;
  return inverse < 3.0e38f ? inverse : 3.0e38f;
}

// x in (0, 1) of a Philox word.
MTP_HOST_DEVICE float race_uniform(uint32_t word) {
  const float x = (static_cast<float>(word) + 0.5f) * 2.3283064365386963e-10f;
  return x < 0.99999994f ? x : 0.99999994f;
}

// -log1p(-x) to about 2 ulp, for x in [2^-33, 1 - 2^-24].
template <typename F>
MTP_HOST_DEVICE F exponential(F x) {
  const F one = splat<F>(1.0f);
  const F u = one - x;
  const F lost = (one - u) - x;  // exactly 1 - x - u; not 0 only for x < 1/2
  F k;
  const F f = split_exponent(u, &k) - one;
  F q = splat<F>(-0.07623068243265152f);
  q = fmadd(q, f, splat<F>(0.12905515730381012f));
  q = fmadd(q, f, splat<F>(-0.13242985308170319f));
  q = fmadd(q, f, splat<F>(0.14181633293628693f));
  q = fmadd(q, f, splat<F>(-0.16609056293964386f));
  q = fmadd(q, f, splat<F>(0.20001985132694244f));
  q = fmadd(q, f, splat<F>(-0.25001585483551025f));
  q = fmadd(q, f, splat<F>(0.33333325386047363f));
  q = fmadd(q, f, splat<F>(-0.49999988079071045f));
  // log(u + lost) = log(m) + k log 2 + lost / u, with 1 / u close to 1 + x where it matters.
  const F tail = fmadd(f * f, q, lost * (one + x));
  return splat<F>(0.0f) - fmadd(k, splat<F>(0.6931471824645996f), f + tail);
}

// ---- exact sums ------------------------------------------------------------------------------

constexpr double kFixedOne = 1099511627776.0;  // 2^40

// A value in [0, 2] as a multiple of 2^-40, to nearest even.
MTP_HOST_DEVICE int64_t to_fixed(float value) {
#ifdef __CUDA_ARCH__
  return __float2ll_rn(value * 1099511627776.0f);
#else
  // Adding 1.5 * 2^12 leaves the multiple of 2^-40 in the low bits of the f64.
  const double shifted = static_cast<double>(value) + 6144.0;
  int64_t bits;
  std::memcpy(&bits, &shifted, 8);
  return bits - 0x40B8000000000000ll;
#endif
}

// A sum relative to one maximum, rescaled by the weight of that maximum.
MTP_HOST_DEVICE int64_t rescale_fixed(int64_t sum, float factor) {
  const double product = static_cast<double>(sum) * static_cast<double>(factor);
#ifdef __CUDA_ARCH__
  return __double2ll_rn(product);
#else
  return std::llrint(product);
#endif
}

}  // namespace mtp
