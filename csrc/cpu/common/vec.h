// Sixteen-lane vectors, one type for every instruction-set level: a kernel is written once and
// compiled for each. F32x16 is one zmm register with AVX-512, two ymm registers with AVX2 and a
// plain array that the compiler vectorises elsewhere. Reductions add the lanes in one fixed
// order on every level.
//
// bf16, f16 and e4m3 are storage formats: they are widened to f32 on load and rounded to nearest
// even on store.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if MTP_ISA_LEVEL >= 1
#include <immintrin.h>
#endif

#include "mtp/types.h"

namespace mtp::cpu {
inline namespace MTP_ISA {

// ---- storage formats -------------------------------------------------------------------------

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
struct F8E4M3 {
  uint8_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return static_cast<float>(x); }
inline float to_float(BF16 x) { return bits_to_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(F16 x) {
#if MTP_ISA_LEVEL >= 1
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // Scaling by 2^112 moves the exponent bias from 15 to 127 and renormalises subnormals.
  float f = bits_to_float(magnitude) * bits_to_float(0x77800000u);
  if ((x.bits & 0x7c00) == 0x7c00) f = bits_to_float(magnitude | 0x7f800000u);
  return bits_to_float(float_to_bits(f) | sign);
#endif
}
inline float to_float(F8E4M3 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x80) << 24;
  const uint32_t magnitude = x.bits & 0x7f;
  // Scaling by 2^120 moves the exponent bias from 7 to 127 and renormalises subnormals.
  float f = bits_to_float(magnitude << 20) * bits_to_float(0x7b800000u);
  if (magnitude == 0x7f) f = std::numeric_limits<float>::quiet_NaN();
  return bits_to_float(float_to_bits(f) | sign);
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(float x, BF16* out) {
  uint32_t bits = float_to_bits(x);
  if (x != x) {
    out->bits = static_cast<uint16_t>(bits >> 16 | 0x40);
    return;
  }
  bits += 0x7fff + (bits >> 16 & 1);
  out->bits = static_cast<uint16_t>(bits >> 16);
}
inline void from_float(float x, F16* out) {
#if MTP_ISA_LEVEL >= 1
  out->bits = static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const uint32_t bits = float_to_bits(x);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude >= 0x7f800000) {  // inf or NaN
    half = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  } else if (magnitude >= 0x477ff000) {  // rounds past the largest finite value
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let the adder round at 2^-24
    half = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
#endif
}
// Saturates at 448, as stored KV caches do.
inline void from_float(float x, F8E4M3* out) {
  const uint32_t sign = float_to_bits(x) >> 24 & 0x80;
  const float magnitude = std::fabs(x);
  uint32_t code;
  if (x != x) {
    code = 0x7f;
  } else if (magnitude >= 448.0f) {
    code = 0x7e;
  } else if (magnitude < 0.015625f) {  // subnormal: let the adder round at 2^-9
    code = float_to_bits(magnitude + 16384.0f) - 0x46800000u;
  } else {
    const uint32_t bits = float_to_bits(magnitude);
    code = (bits - 0x3c000000u + 0x7ffff + (bits >> 20 & 1)) >> 20;
  }
  out->bits = static_cast<uint8_t>(code | sign);
}

#if MTP_ISA_LEVEL >= 1
inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const BF16* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline __m256 load8(const F16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline __m256 load8(const int8_t* p) {
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
}
inline __m256 load8(const F8E4M3* p) {
  const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  // The sign, and below a gap the other bits where exponent and mantissa of an f32 meet.
  const __m256i bits = _mm256_and_si256(_mm256_srai_epi32(_mm256_slli_epi32(b, 24), 4),
                                        _mm256_set1_epi32(static_cast<int>(0x87f00000u)));
  // 2^120 moves the exponent bias from 7 to 127.
  const __m256 f =
      _mm256_mul_ps(_mm256_castsi256_ps(bits), _mm256_castsi256_ps(_mm256_set1_epi32(0x7b800000)));
  const __m256i ones = _mm256_set1_epi32(0x07f00000);
  const __m256i nan = _mm256_cmpeq_epi32(_mm256_and_si256(bits, ones), ones);
  return _mm256_or_ps(f, _mm256_castsi256_ps(nan));
}
#endif

// ---- F32x16 ----------------------------------------------------------------------------------

constexpr int kLanes = 16;

#if MTP_ISA_LEVEL >= 2

struct F32x16 {
  __m512 v;
};
struct Mask16 {
  __mmask16 v;
};

inline F32x16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline F32x16 load(const BF16* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline F32x16 load(const F16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline F32x16 load(const int8_t* p) {
  const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b))};
}
inline F32x16 load(const F8E4M3* p) {
  const __m512i b = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m512i magnitude = _mm512_and_si512(b, _mm512_set1_epi32(0x7f));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(0x80)), 24);
  __m512 f = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 20)),
                           _mm512_castsi512_ps(_mm512_set1_epi32(0x7b800000)));
  f = _mm512_mask_mov_ps(f, _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7f)),
                         _mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()));
  return {_mm512_or_ps(f, _mm512_castsi512_ps(sign))};
}
inline void store(float* p, F32x16 a) { _mm512_storeu_ps(p, a.v); }
inline F32x16 operator+(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32x16 operator-(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32x16 operator*(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32x16 operator/(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// The second operand where either is NaN, as the instruction does.
inline F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32x16 abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
inline Mask16 operator<(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask16 operator<=(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask16 operator==(F32x16 a, F32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline Mask16 is_nan(F32x16 a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  return {_mm512_mask_blend_ps(m.v, no.v, yes.v)};
}
// Bit i is lane i.
inline uint32_t to_bits(Mask16 m) { return m.v; }
inline Mask16 mask_from_bits(uint32_t bits) { return {static_cast<__mmask16>(bits)}; }
// To the nearest, of ties the even one.
inline F32x16 round_to_int(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F32x16 floor(F32x16 a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
}
inline F32x16 pow2i(F32x16 n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(e, 23))};
}
inline void split8(F32x16 a, __m256* lo, __m256* hi) {
  *lo = _mm512_castps512_ps256(a.v);
  *hi = _mm512_extractf32x8_ps(a.v, 1);
}

#elif MTP_ISA_LEVEL == 1

struct F32x16 {
  __m256 lo, hi;
};
struct Mask16 {
  __m256 lo, hi;
};

inline F32x16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
template <typename T>
F32x16 load(const T* p) {
  return {load8(p), load8(p + 8)};
}
inline void store(float* p, F32x16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
#define MTP_VEC_BINARY(name, intrinsic) \
  inline F32x16 name(F32x16 a, F32x16 b) { return {intrinsic(a.lo, b.lo), intrinsic(a.hi, b.hi)}; }
MTP_VEC_BINARY(operator+, _mm256_add_ps)
MTP_VEC_BINARY(operator-, _mm256_sub_ps)
MTP_VEC_BINARY(operator*, _mm256_mul_ps)
MTP_VEC_BINARY(operator/, _mm256_div_ps)
// The second operand where either is NaN, as the instruction does.
MTP_VEC_BINARY(max, _mm256_max_ps)
MTP_VEC_BINARY(min, _mm256_min_ps)
#undef MTP_VEC_BINARY
inline F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline F32x16 abs(F32x16 a) {
  const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, m), _mm256_and_ps(a.hi, m)};
}
inline Mask16 operator<(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)};
}
inline Mask16 operator<=(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_LE_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_LE_OQ)};
}
inline Mask16 operator==(F32x16 a, F32x16 b) {
  return {_mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ), _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ)};
}
inline Mask16 is_nan(F32x16 a) {
  return {_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q), _mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q)};
}
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  return {_mm256_blendv_ps(no.lo, yes.lo, m.lo), _mm256_blendv_ps(no.hi, yes.hi, m.hi)};
}
// Bit i is lane i.
inline uint32_t to_bits(Mask16 m) {
  return static_cast<uint32_t>(_mm256_movemask_ps(m.lo)) |
         static_cast<uint32_t>(_mm256_movemask_ps(m.hi)) << 8;
}
inline Mask16 mask_from_bits(uint32_t bits) {
  const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const auto half = [&](uint32_t b) {
    const __m256i x = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b)), lane);
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(x, lane));
  };
  return {half(bits & 0xff), half(bits >> 8 & 0xff)};
}
inline F32x16 round_to_int(F32x16 a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}
inline F32x16 floor(F32x16 a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
// 2^n for integral n in [-127, 127]; 2^-127 flushes to 0.
inline F32x16 pow2i(F32x16 n) {
  const auto half = [](__m256 x) {
    const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
  };
  return {half(n.lo), half(n.hi)};
}
inline void split8(F32x16 a, __m256* lo, __m256* hi) {
  *lo = a.lo;
  *hi = a.hi;
}

#else

struct F32x16 {
  float v[16];
};
struct Mask16 {
  uint32_t bits;
};

template <typename F>
inline F32x16 lanes(const F& f) {
  F32x16 r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
  return r;
}
template <typename F>
inline Mask16 lane_mask(const F& f) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(f(i)) << i;
  return {bits};
}
inline F32x16 broadcast(float x) {
  return lanes([&](int) { return x; });
}
template <typename T>
inline F32x16 load(const T* p) {
  return lanes([&](int i) { return to_float(p[i]); });
}
inline void store(float* p, F32x16 a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline F32x16 operator+(F32x16 a, F32x16 b) {
  return lanes([&](int i) { return a.v[i] + b.v[i]; });
}
inline F32x16 operator-(F32x16 a, F32x16 b) {
  return lanes([&](int i) { return a.v[i] - b.v[i]; });
}
inline F32x16 operator*(F32x16 a, F32x16 b) {
  return lanes([&](int i) { return a.v[i] * b.v[i]; });
}
inline F32x16 operator/(F32x16 a, F32x16 b) {
  return lanes([&](int i) { return a.v[i] / b.v[i]; });
}
inline F32x16 fmadd(F32x16 a, F32x16 b, F32x16 c) {
  return lanes([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
// The second operand where either is NaN, as the x86 instruction does.
inline F32x16 max(F32x16 a, F32x16 b) {
  return lanes([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 min(F32x16 a, F32x16 b) {
  return lanes([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline F32x16 abs(F32x16 a) {
  return lanes([&](int i) { return std::fabs(a.v[i]); });
}
inline Mask16 operator<(F32x16 a, F32x16 b) {
  return lane_mask([&](int i) { return a.v[i] < b.v[i]; });
}
inline Mask16 operator<=(F32x16 a, F32x16 b) {
  return lane_mask([&](int i) { return a.v[i] <= b.v[i]; });
}
inline Mask16 operator==(F32x16 a, F32x16 b) {
  return lane_mask([&](int i) { return a.v[i] == b.v[i]; });
}
inline Mask16 is_nan(F32x16 a) {
  return lane_mask([&](int i) { return a.v[i] != a.v[i]; });
}
inline F32x16 select(Mask16 m, F32x16 yes, F32x16 no) {
  return lanes([&](int i) { return m.bits >> i & 1 ? yes.v[i] : no.v[i]; });
}
// Bit i is lane i.
inline uint32_t to_bits(Mask16 m) { return m.bits; }
inline Mask16 mask_from_bits(uint32_t bits) { return {bits & 0xffff}; }
inline F32x16 round_to_int(F32x16 a) {
  return lanes([&](int i) { return std::nearbyintf(a.v[i]); });
}
inline F32x16 floor(F32x16 a) {
  return lanes([&](int i) { return std::floor(a.v[i]); });
}
// 2^n for integral n in [-127, 127]; 2^-127 flushes to 0.
inline F32x16 pow2i(F32x16 n) {
  return lanes([&](int i) {
    return bits_to_float(static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23);
  });
}

#endif

// ---- built on the above ----------------------------------------------------------------------

inline F32x16 zero() { return broadcast(0.0f); }
inline Mask16 operator>(F32x16 a, F32x16 b) { return b < a; }
inline Mask16 operator>=(F32x16 a, F32x16 b) { return b <= a; }

inline Mask16 first_lanes(int64_t n) {
  return mask_from_bits(n >= kLanes ? 0xffffu : (1u << (n < 0 ? 0 : n)) - 1u);
}

// Lanes at or past n are `fill` and their memory is not read.
template <typename T>
inline F32x16 load_partial(const T* p, int64_t n, float fill = 0.0f) {
  if (n >= kLanes) return load(p);
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i < n ? to_float(p[i]) : fill;
  return load(lane);
}

inline void store(BF16* p, F32x16 a) {
#if MTP_ISA_LEVEL >= 1
  __m256 half[2];
  split8(a, &half[0], &half[1]);
  __m256i rounded[2];
  for (int h = 0; h < 2; ++h) {
    const __m256i bits = _mm256_castps_si256(half[h]);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 nan = _mm256_cmp_ps(half[h], half[h], _CMP_UNORD_Q);
    rounded[h] = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, _mm256_castps_si256(nan)), 16);
  }
  const __m256i packed = _mm256_packus_epi32(rounded[0], rounded[1]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0)));
#else
  for (int i = 0; i < kLanes; ++i) from_float(a.v[i], p + i);
#endif
}

inline void store(F16* p, F32x16 a) {
#if MTP_ISA_LEVEL >= 1
  __m256 half[2];
  split8(a, &half[0], &half[1]);
  for (int h = 0; h < 2; ++h) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8 * h),
                     _mm256_cvtps_ph(half[h], _MM_FROUND_TO_NEAREST_INT));
  }
#else
  for (int i = 0; i < kLanes; ++i) from_float(a.v[i], p + i);
#endif
}

inline void store(F8E4M3* p, F32x16 a) {
  float lane[kLanes];
  store(lane, a);
  for (int i = 0; i < kLanes; ++i) from_float(lane[i], p + i);
}

template <typename T>
inline void store_partial(T* p, F32x16 a, int64_t n) {
  if (n >= kLanes) {
    store(p, a);
    return;
  }
  float lane[kLanes];
  store(lane, a);
  for (int64_t i = 0; i < n; ++i) from_float(lane[i], p + i);
}

// Halves are folded onto each other: (i) + (i + 8), then + 4, + 2, + 1.
inline float reduce_add(F32x16 a) {
#if MTP_ISA_LEVEL >= 1
  __m256 lo, hi;
  split8(a, &lo, &hi);
  const __m256 eight = _mm256_add_ps(lo, hi);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  float lane[kLanes];
  store(lane, a);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
#endif
}

inline float reduce_max(F32x16 a) {
#if MTP_ISA_LEVEL >= 1
  __m256 lo, hi;
  split8(a, &lo, &hi);
  const __m256 eight = _mm256_max_ps(lo, hi);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
#else
  float lane[kLanes];
  store(lane, a);
  for (int width = 8; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
#endif
}

// e^x to 1 ulp or so for x in [-87, 88]; 0 below, +inf above, NaN stays NaN.
inline F32x16 exp(F32x16 x) {
#if MTP_ISA_LEVEL >= 2
  const F32x16 any = x;
  x = min(broadcast(89.0f), max(broadcast(-88.0f), x));  // the second operand, if that is NaN
  const F32x16 n = round_to_int(x * broadcast(1.44269504088896341f));
#else
  const F32x16 n = round_to_int(
      min(max(x * broadcast(1.44269504088896341f), broadcast(-126.0f)), broadcast(127.0f)));
#endif
  F32x16 r = fmadd(n, broadcast(-0.693359375f), x);
  r = fmadd(n, broadcast(2.12194440e-4f), r);
  F32x16 y = broadcast(1.9875691500e-4f);
  y = fmadd(y, r, broadcast(1.3981999507e-3f));
  y = fmadd(y, r, broadcast(8.3334519073e-3f));
  y = fmadd(y, r, broadcast(4.1665795894e-2f));
  y = fmadd(y, r, broadcast(1.6666665459e-1f));
  y = fmadd(y, r, broadcast(5.0000001201e-1f));
  y = fmadd(y, r * r, r + broadcast(1.0f));
#if MTP_ISA_LEVEL >= 2
  const __mmask16 normal = _mm512_cmp_ps_mask(any.v, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, y.v, n.v)};
#else
  y = y * pow2i(n);
  y = select(x < broadcast(-87.3f), zero(), y);
  y = select(x > broadcast(88.72f), broadcast(std::numeric_limits<float>::infinity()), y);
  return select(is_nan(x), x, y);
#endif
}

// tanh to about 2 ulp: an odd polynomial near zero, where 1 - 2 / (e^2x + 1) would cancel.
inline F32x16 tanh(F32x16 x) {
  const F32x16 x2 = x * x;
  F32x16 small = broadcast(62.0f / 2835.0f);
  small = fmadd(small, x2, broadcast(-17.0f / 315.0f));
  small = fmadd(small, x2, broadcast(2.0f / 15.0f));
  small = fmadd(small, x2, broadcast(-1.0f / 3.0f));
  small = fmadd(small * x2, x, x);
  const F32x16 large = broadcast(1.0f) - broadcast(2.0f) / (exp(x + x) + broadcast(1.0f));
  return select(abs(x) < broadcast(0.25f), small, large);
}

}  // namespace MTP_ISA
}  // namespace mtp::cpu
