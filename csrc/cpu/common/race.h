// Vector side of mtp/exponential.h: its operations for F32x16, Philox for 32 consecutive ids, and
// exact sums of weights.
#pragma once

#include <initializer_list>

#include "cpu/common/vec.h"
#include "mtp/exponential.h"

namespace mtp {

template <>
inline __attribute__((always_inline)) cpu::F32x16 splat<cpu::F32x16>(float x) {
  return cpu::broadcast(x);
}

namespace cpu {
inline namespace MTP_ISA {

inline F32x16 zero_below(F32x16 bound, F32x16 x, F32x16 y) { return select(x < bound, zero(), y); }

#if MTP_ISA_LEVEL >= 2

inline F32x16 split_exponent(F32x16 u, F32x16* k) {
  const __m512i bits = _mm512_castps_si512(u.v);
  const __m512i e = _mm512_srai_epi32(_mm512_sub_epi32(bits, _mm512_set1_epi32(0x3f3504f3)), 23);
  k->v = _mm512_cvtepi32_ps(e);
  return {_mm512_castsi512_ps(_mm512_sub_epi32(bits, _mm512_slli_epi32(e, 23)))};
}

inline F32x16 race_uniform(__m512i words) {
  const __m512 f = _mm512_add_ps(_mm512_cvtepu32_ps(words), _mm512_set1_ps(0.5f));
  return {_mm512_min_ps(_mm512_mul_ps(f, _mm512_set1_ps(2.3283064365386963e-10f)),
                        _mm512_set1_ps(0.99999994f))};
}

// As the AVX2 version below, eight blocks to a register.
inline void race_uniforms(const philox::Key& key, uint32_t first_block, F32x16* out) {
  const auto both = [](uint32_t lo, uint32_t hi) {
    return _mm512_set1_epi64(static_cast<int64_t>(static_cast<uint64_t>(hi) << 32 | lo));
  };
  const __m512i mul0 = both(0xD2511F53u, 0), mul1 = both(0xCD9E8D57u, 0);
  const __m512i index = _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i id = _mm512_add_epi64(_mm512_set1_epi64(first_block), index);
  __m512i a = _mm512_or_si512(_mm512_slli_epi64(id, 32), both(key.stream_row, 0));
  __m512i b = both(key.position_hi, key.position_lo);
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
  for (int round = 0; round < 10; ++round) {
    const __m512i p0 = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), mul0);
    const __m512i p1 = _mm512_mul_epu32(_mm512_srli_epi64(b, 32), mul1);
    const __m512i next_a =
        _mm512_xor_si512(p1, _mm512_xor_si512(_mm512_slli_epi64(a, 32), both(0, k0)));
    b = _mm512_xor_si512(p0, _mm512_xor_si512(_mm512_slli_epi64(b, 32), both(0, k1)));
    a = next_a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  a = _mm512_shuffle_epi32(a, _MM_PERM_CDAB);
  b = _mm512_shuffle_epi32(b, _MM_PERM_CDAB);
  const __m512i lo = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
  const __m512i hi = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  out[0] = race_uniform(_mm512_permutex2var_epi64(a, lo, b));
  out[1] = race_uniform(_mm512_permutex2var_epi64(a, hi, b));
}

// Sums of to_fixed(weight), any order.
struct FixedSum {
  __m512i total = _mm512_setzero_si512();
  void add(F32x16 w) {
    const __m512d shift = _mm512_set1_pd(6144.0);
    for (const __m256 half : {_mm512_castps512_ps256(w.v), _mm512_extractf32x8_ps(w.v, 1)}) {
      const __m512d x = _mm512_add_pd(_mm512_cvtps_pd(half), shift);
      total = _mm512_add_epi64(
          total, _mm512_sub_epi64(_mm512_castpd_si512(x), _mm512_castpd_si512(shift)));
    }
  }
  int64_t sum() const { return _mm512_reduce_add_epi64(total); }
};

#elif MTP_ISA_LEVEL == 1

inline F32x16 split_exponent(F32x16 u, F32x16* k) {
  const auto half = [](__m256 x, __m256* exponent) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i e = _mm256_srai_epi32(_mm256_sub_epi32(bits, _mm256_set1_epi32(0x3f3504f3)), 23);
    *exponent = _mm256_cvtepi32_ps(e);
    return _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_slli_epi32(e, 23)));
  };
  F32x16 m;
  m.lo = half(u.lo, &k->lo);
  m.hi = half(u.hi, &k->hi);
  return m;
}

inline __m256 race_uniform(__m256i words) {
  // Halves convert exactly, so the one rounding is that of their sum.
  const __m256 hi = _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 16));
  const __m256 lo = _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(0xffff)));
  const __m256 f = _mm256_fmadd_ps(hi, _mm256_set1_ps(65536.0f), lo);
  const __m256 x = _mm256_mul_ps(_mm256_add_ps(f, _mm256_set1_ps(0.5f)),
                                 _mm256_set1_ps(2.3283064365386963e-10f));
  return _mm256_min_ps(x, _mm256_set1_ps(0.99999994f));
}

// race_uniform of the 32 ids from 4 * first_block on. Each 64-bit lane holds two words of one
// block's counter, (c1, c0) in `a` and (c3, c2) in `b`, low word first: the 64-bit product of a
// round then already lies where the next round wants it.
inline void race_uniforms(const philox::Key& key, uint32_t first_block, F32x16* out) {
  const auto both = [](uint32_t lo, uint32_t hi) {
    return _mm256_set1_epi64x(static_cast<int64_t>(static_cast<uint64_t>(hi) << 32 | lo));
  };
  const __m256i mul0 = both(0xD2511F53u, 0), mul1 = both(0xCD9E8D57u, 0);
  __m256i a[2], b[2];
  for (int i = 0; i < 2; ++i) {
    const __m256i index =
        _mm256_add_epi64(_mm256_set1_epi64x(first_block),
                         _mm256_setr_epi64x(4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3));
    a[i] = _mm256_or_si256(_mm256_slli_epi64(index, 32), both(key.stream_row, 0));
    b[i] = both(key.position_hi, key.position_lo);
  }
  uint32_t k0 = key.seed_lo, k1 = key.seed_hi;
  for (int round = 0; round < 10; ++round) {
    const __m256i key0 = both(0, k0), key1 = both(0, k1);
    for (int i = 0; i < 2; ++i) {
      const __m256i p0 = _mm256_mul_epu32(_mm256_srli_epi64(a[i], 32), mul0);
      const __m256i p1 = _mm256_mul_epu32(_mm256_srli_epi64(b[i], 32), mul1);
      a[i] = _mm256_xor_si256(p1, _mm256_xor_si256(_mm256_slli_epi64(a[i], 32), key0));
      b[i] = _mm256_xor_si256(p0, _mm256_xor_si256(_mm256_slli_epi64(b[i], 32), key1));
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < 2; ++i) {
    const __m256i c01 = _mm256_shuffle_epi32(a[i], _MM_SHUFFLE(2, 3, 0, 1));
    const __m256i c23 = _mm256_shuffle_epi32(b[i], _MM_SHUFFLE(2, 3, 0, 1));
    const __m256i even = _mm256_unpacklo_epi64(c01, c23), odd = _mm256_unpackhi_epi64(c01, c23);
    out[i].lo = race_uniform(_mm256_permute2x128_si256(even, odd, 0x20));
    out[i].hi = race_uniform(_mm256_permute2x128_si256(even, odd, 0x31));
  }
}

// Sums of to_fixed(weight), any order.
struct FixedSum {
  __m256i total = _mm256_setzero_si256();
  void add(F32x16 w) {
    const __m256d shift = _mm256_set1_pd(6144.0);
    for (const __m256 half : {w.lo, w.hi}) {
      const __m256d lo = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(half)), shift);
      const __m256d hi = _mm256_add_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(half, 1)), shift);
      const __m256i base = _mm256_castpd_si256(shift);
      total = _mm256_add_epi64(total, _mm256_sub_epi64(_mm256_castpd_si256(lo), base));
      total = _mm256_add_epi64(total, _mm256_sub_epi64(_mm256_castpd_si256(hi), base));
    }
  }
  int64_t sum() const {
    int64_t lane[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lane), total);
    return lane[0] + lane[1] + lane[2] + lane[3];
  }
};

#else

inline F32x16 split_exponent(F32x16 u, F32x16* k) {
  F32x16 m;
  for (int i = 0; i < kLanes; ++i) m.v[i] = mtp::split_exponent(u.v[i], &k->v[i]);
  return m;
}

inline void race_uniforms(const philox::Key& key, uint32_t first_block, F32x16* out) {
  for (int i = 0; i < 8; ++i) {
    const philox::Words words = philox::block(key, first_block + i);
    for (int j = 0; j < 4; ++j) out[i / 4].v[i % 4 * 4 + j] = race_uniform(words.w[j]);
  }
}

// Sums of to_fixed(weight), any order.
struct FixedSum {
  int64_t total = 0;
  void add(F32x16 w) {
    for (int i = 0; i < kLanes; ++i) total += to_fixed(w.v[i]);
  }
  int64_t sum() const { return total; }
};

#endif

}  // namespace MTP_ISA
}  // namespace cpu
}  // namespace mtp
