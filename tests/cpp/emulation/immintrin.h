// Stands in for the compiler's <immintrin.h>: the AVX-512 intrinsics of the CPU kernels become
// SIMDe's portable functions, so that their code runs on processors without AVX-512. What the
// packaged SIMDe lacks is written out below, lane by lane.
#pragma once

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#ifndef _MM_FROUND_NO_EXC
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
#endif

using __mmask16 = uint16_t;

namespace emulation {

inline float widen_f16(uint16_t h) {
  _Float16 x;
  std::memcpy(&x, &h, 2);
  return static_cast<float>(x);
}
inline uint16_t narrow_f16(float f) {
  const _Float16 x = static_cast<_Float16>(f);
  uint16_t h;
  std::memcpy(&h, &x, 2);
  return h;
}

// Applies f to each of `kCount` elements, from the low end of `in` to the low end of the result.
template <typename Out, typename To, typename From, int kCount, typename In, typename F>
inline Out map(const In& in, const F& f) {
  From from[sizeof(In) / sizeof(From)];
  To to[sizeof(Out) / sizeof(To)] = {};
  std::memcpy(from, &in, sizeof(in));
  for (int i = 0; i < kCount; ++i) to[i] = f(from[i]);
  Out out;
  std::memcpy(&out, to, sizeof(out));
  return out;
}

}  // namespace emulation

#define EMULATE_CONVERT(name, Out, To, In, From, count)                            \
  inline Out name(In in) {                                                         \
    return emulation::map<Out, To, From, count>(in, [](From x) { return To(x); }); \
  }
EMULATE_CONVERT(_mm512_cvtepu16_epi32, __m512i, int32_t, __m256i, uint16_t, 16)
EMULATE_CONVERT(_mm512_cvtepi16_epi32, __m512i, int32_t, __m256i, int16_t, 16)
EMULATE_CONVERT(_mm512_cvtepu8_epi32, __m512i, int32_t, __m128i, uint8_t, 16)
EMULATE_CONVERT(_mm512_cvtepi8_epi32, __m512i, int32_t, __m128i, int8_t, 16)
EMULATE_CONVERT(_mm512_cvtepi32_ps, __m512, float, __m512i, int32_t, 16)
EMULATE_CONVERT(_mm512_cvtepu32_ps, __m512, float, __m512i, uint32_t, 16)
EMULATE_CONVERT(_mm512_cvtps_pd, __m512d, double, __m256, float, 8)
#undef EMULATE_CONVERT

inline __m512i _mm512_srai_epi32(__m512i in, unsigned count) {
  return emulation::map<__m512i, int32_t, int32_t, 16>(in, [=](int32_t x) { return x >> count; });
}
enum { _MM_PERM_CDAB = 0xB1 };
inline __m512i _mm512_shuffle_epi32(__m512i in, int order) {
  int32_t from[16], to[16];
  std::memcpy(from, &in, sizeof(in));
  for (int i = 0; i < 16; ++i) to[i] = from[i / 4 * 4 + (order >> (i % 4 * 2) & 3)];
  __m512i out;
  std::memcpy(&out, to, sizeof(out));
  return out;
}
inline int64_t _mm512_reduce_add_epi64(__m512i in) {
  int64_t lane[8], sum = 0;
  std::memcpy(lane, &in, sizeof(in));
  for (int64_t x : lane) sum += x;
  return sum;
}

inline float _cvtsh_ss(uint16_t h) { return emulation::widen_f16(h); }
inline uint16_t _cvtss_sh(float f, int) { return emulation::narrow_f16(f); }
inline __m512 _mm512_cvtph_ps(__m256i in) {
  return emulation::map<__m512, float, uint16_t, 16>(in, emulation::widen_f16);
}
inline __m256 _mm256_cvtph_ps(__m128i in) {
  return emulation::map<__m256, float, uint16_t, 8>(in, emulation::widen_f16);
}
inline __m128i emulate_mm256_cvtps_ph(__m256 in) {
  return emulation::map<__m128i, uint16_t, float, 8>(in, emulation::narrow_f16);
}
#define _mm256_cvtps_ph(in, rounding) emulate_mm256_cvtps_ph(in)
inline __m512i _mm512_cvtps_epi32(__m512 in) {
  return emulation::map<__m512i, int32_t, float, 16>(
      in, [](float x) { return static_cast<int32_t>(std::nearbyintf(x)); });
}
inline __m256 _mm512_extractf32x8_ps(__m512 in, int half) {
  __m256 out;
  std::memcpy(&out, reinterpret_cast<const char*>(&in) + 32 * half, 32);
  return out;
}
