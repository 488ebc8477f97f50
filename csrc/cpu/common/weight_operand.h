// What weight_stream.h and tile_stream.h multiply with: registers, how weights of a type meet
// activations, and rows of activations before they are packed.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/common/dispatch.h"
#include "cpu/common/vec.h"

namespace mtp::cpu {
inline namespace MTP_ISA {

// ---- one register of f32 lanes ---------------------------------------------------------------

#if MTP_ISA_LEVEL >= 2

using Reg = __m512;
constexpr int kRegLanes = 16;
constexpr int kTileM = 8;
constexpr int kAccumulators = 24;
inline Reg reg_zero() { return _mm512_setzero_ps(); }
inline Reg reg_load(const float* p) { return _mm512_loadu_ps(p); }
inline void reg_store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
inline Reg reg_fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }

#elif MTP_ISA_LEVEL == 1

using Reg = __m256;
constexpr int kRegLanes = 8;
constexpr int kTileM = 4;
constexpr int kAccumulators = 12;
inline Reg reg_zero() { return _mm256_setzero_ps(); }
inline Reg reg_load(const float* p) { return _mm256_loadu_ps(p); }
inline void reg_store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
inline Reg reg_fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }

#else

struct Reg {
  float v[4];
};
constexpr int kRegLanes = 4;
constexpr int kTileM = 4;
constexpr int kAccumulators = 12;
inline Reg reg_zero() { return {}; }
inline Reg reg_load(const float* p) {
  Reg r;
  std::memcpy(r.v, p, sizeof(r.v));
  return r;
}
inline void reg_store(float* p, Reg a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline Reg reg_fma(Reg a, Reg b, Reg c) {
  for (int i = 0; i < kRegLanes; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}

#endif

// out[i] = the sum of the lanes of at(i) for i < n, each by the same tree. Whole registers are
// written; at(i) is zero from n on.
template <int n, typename At>
[[gnu::always_inline]] inline void reduce_lanes(const At& at, float* out) {
#if MTP_ISA_LEVEL >= 2
  const auto four = [&](int i) {  // in each quarter: its sums of four registers
    const Reg a = at(i), b = at(i + 1), c = at(i + 2), d = at(i + 3);
    const Reg ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const Reg cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  };
  const auto add_quarters = [](Reg a, Reg b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
#pragma GCC unroll 2
  for (int i = 0; i < n; i += 16) {
    reg_store(out + i, add_quarters(add_quarters(four(i), four(i + 4)),
                                    add_quarters(four(i + 8), four(i + 12))));
  }
#elif MTP_ISA_LEVEL == 1
#pragma GCC unroll 4
  for (int i = 0; i < n; i += 8) {
    const auto four = [&](int j) {
      return _mm256_hadd_ps(_mm256_hadd_ps(at(j), at(j + 1)), _mm256_hadd_ps(at(j + 2), at(j + 3)));
    };
    const Reg a = four(i), b = four(i + 4);
    reg_store(out + i, _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20),
                                     _mm256_permute2f128_ps(a, b, 0x31)));
  }
#else
  for (int i = 0; i < n; ++i) {
    const Reg r = at(i);
    out[i] = (r.v[0] + r.v[1]) + (r.v[2] + r.v[3]);
  }
#endif
}

// ---- operands --------------------------------------------------------------------------------

// Operand<W, X>: how weights of type W meet activations packed as X. A step is kStep elements, in
// kParts registers of weights (widen) and as many of activations (arrange). Elements are packed in
// the order that is cheapest to widen. With kStarts a row's sums start from PackedRows::starts().
// With kPanels long rows are multiplied in panels (dot_panels); bytes, which take longer to widen
// than activations to load, only lose by it. From kWidenFrom activation rows on, weight rows are
// widened once for all of them (widen_rows), before that by each group anew. kStreamed rows come
// from memory and are asked for ahead.
template <typename W, typename X>
struct Operand;

template <typename W>
struct Operand<W, float> {
  using Part = Reg;
  static constexpr int kParts = 2, kPartLanes = kRegLanes, kStep = 2 * kRegLanes;
  static constexpr bool kJoint = false, kStarts = false, kPanels = true, kStreamed = true;
  static constexpr int kWidenFrom = (MTP_ISA_LEVEL == 1 ? 5 : 2) * kTileM;

  static Part load(const float* p) { return reg_load(p); }
  static void store(float* p, Part a) { reg_store(p, a); }
  static Reg multiply_add(Part w, Part x, Reg acc) { return reg_fma(w, x, acc); }

  template <int h>
  static Part arrange(const float* x) {
    return reg_load(x + h * kRegLanes);
  }
  template <int h>
  static Part widen(const W* p) {
#if MTP_ISA_LEVEL >= 2
    return mtp::cpu::load(p + h * kRegLanes).v;
#elif MTP_ISA_LEVEL == 1
    return load8(p + h * kRegLanes);
#else
    Reg r;
    for (int i = 0; i < kRegLanes; ++i) r.v[i] = to_float(p[h * kRegLanes + i]);
    return r;
#endif
  }
};

#if MTP_ISA_LEVEL >= 1
// A shift yields the even elements, and a mask or two shifts the odd ones.
template <>
struct Operand<BF16, float> : Operand<float, float> {
  template <int h>
  static Part arrange(const float* x) {
#if MTP_ISA_LEVEL >= 2
    const __m512i first =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return _mm512_permutex2var_ps(reg_load(x), _mm512_add_epi32(first, _mm512_set1_epi32(h)),
                                  reg_load(x + kRegLanes));
#else
    const __m256 picked =
        _mm256_shuffle_ps(reg_load(x), reg_load(x + kRegLanes), h == 0 ? 0x88 : 0xdd);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(picked), 0xd8));
#endif
  }
  template <int h>
  static Part widen(const BF16* p) {
#if MTP_ISA_LEVEL >= 2
    const __m512i pairs = _mm512_loadu_si512(p);
    return _mm512_castsi512_ps(
        h == 0 ? _mm512_slli_epi32(pairs, 16)
               : _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
#else
    // Two shifts rather than a mask: the largest tile leaves no register for a constant.
    const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i low = h == 0 ? pairs : _mm256_srli_epi32(pairs, 16);
    return _mm256_castsi256_ps(_mm256_slli_epi32(low, 16));
#endif
  }
};
#endif

#if MTP_ISA_LEVEL == 1
// Sixteen bytes as what is almost bf16, which is widened as such and scaled: sign, a gap, and the
// other bits where exponent and mantissa meet, so that 2^120 moves the bias from 7 to 127.
template <>
struct Operand<F8E4M3, float> : Operand<BF16, float> {
  static constexpr bool kJoint = true;
  static constexpr int kWidenFrom = 2 * kTileM;

  static void widen(const F8E4M3* p, Part (&out)[2]) {
    const __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    __m256i x = _mm256_and_si256(_mm256_srai_epi16(_mm256_slli_epi16(b, 8), 4),
                                 _mm256_set1_epi16(static_cast<int16_t>(0x87f0)));
    const __m256i nan = _mm256_set1_epi16(0x07f0);
    x = _mm256_or_si256(x, _mm256_cmpeq_epi16(_mm256_and_si256(x, nan), nan));
    const __m256 scale = _mm256_castsi256_ps(_mm256_set1_epi32(0x7b800000));
    const __m256i odd = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    out[0] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)), scale);
    out[1] = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_and_si256(x, odd)), scale);
  }
};
#endif

#if MTP_ISA_LEVEL >= 3

template <>
struct Operand<BF16, BF16> {
  using Part = __m512bh;
  static constexpr int kParts = 1, kPartLanes = 32, kStep = 32;
  static constexpr bool kJoint = false, kStarts = false, kPanels = true, kStreamed = true;
  static constexpr int kWidenFrom = 2 * kTileM;

  static Part load(const BF16* p) { return reinterpret_cast<Part>(_mm512_loadu_si512(p)); }
  static void store(BF16* p, Part a) { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(a)); }
  static Reg multiply_add(Part w, Part x, Reg acc) { return _mm512_dpbf16_ps(acc, w, x); }

  template <int h>
  static Part arrange(const BF16* x) {
    return load(x);
  }
  template <int h>
  static Part widen(const BF16* p) {
    return load(p);
  }
};

// 64 bytes become bf16 by table: the seven low bits of each pick both bytes of its magnitude, the
// eighth is the sign. Interleaving the bytes gives runs of eight elements to the two parts in turn.
struct ByteOperand : Operand<BF16, BF16> {
  static constexpr int kParts = 2, kStep = 64;
  static constexpr bool kJoint = true, kPanels = false;

  struct Tables {
    alignas(64) uint8_t low[128], high[128];
  };
  template <typename Magnitude>
  static constexpr Tables make_tables(const Magnitude& magnitude) {
    Tables t = {};
    for (int i = 0; i < 128; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(magnitude(i)) >> 16;
      t.low[i] = static_cast<uint8_t>(bits);
      t.high[i] = static_cast<uint8_t>(bits >> 8);
    }
    return t;
  }

  template <int h>
  static Part arrange(const BF16* x) {
    const __m512i runs = _mm512_setr_epi64(2 * h, 2 * h + 1, 4 + 2 * h, 5 + 2 * h, 8 + 2 * h,
                                           9 + 2 * h, 12 + 2 * h, 13 + 2 * h);
    return reinterpret_cast<Part>(
        _mm512_permutex2var_epi64(_mm512_loadu_si512(x), runs, _mm512_loadu_si512(x + 32)));
  }
  static void look_up(const Tables& tables, __m512i index, __m512i sign, Part (&out)[2]) {
    const __m512i low = _mm512_permutex2var_epi8(_mm512_load_si512(tables.low), index,
                                                 _mm512_load_si512(tables.low + 64));
    __m512i high = _mm512_permutex2var_epi8(_mm512_load_si512(tables.high), index,
                                            _mm512_load_si512(tables.high + 64));
    // high | (sign & 0x80)
    high = _mm512_ternarylogic_epi64(high, sign, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    out[0] = reinterpret_cast<Part>(_mm512_unpacklo_epi8(low, high));
    out[1] = reinterpret_cast<Part>(_mm512_unpackhi_epi8(low, high));
  }
};

template <>
struct Operand<F8E4M3, BF16> : ByteOperand {
  static constexpr Tables kTables = make_tables([](int i) {
    const int exponent = i >> 3, mantissa = i & 7;
    if (i == 0x7f) return std::numeric_limits<float>::quiet_NaN();
    float x = exponent == 0 ? mantissa : 8 + mantissa;  // in units of the last place
    for (int e = exponent == 0 ? 1 : exponent; e < 10; ++e) x /= 2;
    for (int e = exponent; e > 10; --e) x *= 2;
    return x;
  });
  static void widen(const F8E4M3* p, Part (&out)[2]) {
    const __m512i bytes = _mm512_loadu_si512(p);
    look_up(kTables, bytes, bytes, out);
  }
};

#if MTP_ISA_LEVEL == 3
// An int8 v is looked up as v + 1/2, whose magnitude is the same for v and for its complement and
// has eight bits; sums start at minus what the halves will add.
template <>
struct Operand<int8_t, BF16> : ByteOperand {
  static constexpr bool kStarts = true;
  static constexpr Tables kTables = make_tables([](int i) { return i + 0.5f; });
  static void widen(const int8_t* p, Part (&out)[2]) {
    const __m512i bytes = _mm512_loadu_si512(p);
    const __m512i index =
        _mm512_mask_sub_epi8(bytes, _mm512_movepi8_mask(bytes), _mm512_set1_epi8(-1), bytes);
    look_up(kTables, index, bytes, out);
  }
  static Part minus_half() { return reinterpret_cast<Part>(_mm512_set1_epi16(-0x4100)); }
};
#endif

#endif

// ---- rows of activations ---------------------------------------------------------------------

constexpr int kMaxRows = 64;    // activation rows per pass over the weights
constexpr int kTileWidth = 48;  // weight rows per call of the epilogue

// out[0..k) = x in f32.
inline void widen_row(DType dtype, const void* x, int64_t k, float* out) {
  with_float_type(dtype, [&](auto type) {
    const auto* in = static_cast<const decltype(type)*>(x);
    for (int64_t i = 0; i < k; i += kLanes) {
      store_partial(out + i, load_partial(in + i, k - i), k - i);
    }
  });
}

// x * weight / sqrt(mean(x^2) + eps) in place; `offset` is added to the weight.
inline void rms_norm_row(float* x, int64_t k, DType dtype, const void* weight, float offset,
                         float eps) {
  F32x16 squares = zero();
  for (int64_t i = 0; i < k; i += kLanes) {
    const F32x16 v = load_partial(x + i, k - i);
    squares = fmadd(v, v, squares);
  }
  const F32x16 scale =
      broadcast(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(k) + eps));
  with_float_type(dtype, [&](auto type) {
    const auto* weights = static_cast<const decltype(type)*>(weight);
    for (int64_t i = 0; i < k; i += kLanes) {
      const F32x16 w = load_partial(weights + i, k - i) + broadcast(offset);
      store_partial(x + i, load_partial(x + i, k - i) * scale * w, k - i);
    }
  });
}

}  // namespace MTP_ISA
}  // namespace mtp::cpu
