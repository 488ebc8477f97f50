// The core of skinny_linear, head_topk and eh_proj: dot products of every weight row with a few
// activation rows. Weights stay in their dtype and are read once for up to kMaxRows activation
// rows. They are made into what the activations are packed as, in registers, and multiplied into
// f32 accumulators: f32, or bf16 pairs where the processor multiplies those (VDPBF16PS, twice the
// products per instruction), activations are bf16 anyway and the weights fit bf16 exactly.
//
// One dot product is always summed the same way: one accumulator register per (weight row,
// activation row), steps in ascending k, then a fixed tree over its lanes. The shape of the tile
// only decides which dots run side by side, so a row's result depends neither on the number of
// activation rows nor on the others.
//
// The tile is kTileM activation rows by tile_n(m) weight rows, so that each loaded activation
// serves several weight rows and each widened weight several activation rows. With few activation
// rows memory is the limit: six dots side by side hide the latency of the sums, and a tile is
// small enough to stay with the next one in the first-level cache. Activations are packed
// beforehand in the order the tile reads them.
//
// With AMX the same blocks are products of tile registers: sixteen weight rows as they lie in
// memory (bytes: widened into a kilobyte of the first-level cache) by sixteen activation rows, one
// instruction per kilobyte of bf16 weights whatever the number of activation rows. A dot product
// is one element of an accumulator there, summed in ascending k.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "cpu/common/dispatch.h"
#include "cpu/common/scratch.h"
#include "cpu/common/tiles.h"
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

// ---- packed activations ----------------------------------------------------------------------

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

// What is packed as bf16 is multiplied by tile registers where there are any.
template <typename X>
constexpr bool kInTiles = MTP_ISA_LEVEL >= 4 && std::is_same_v<X, BF16>;
constexpr int kTileSide = 16;

// Activations for weights of type W, in the order the tiles read them. Rows of a group of kGroup
// stand side by side: [group][step][part][row in group][lane]; the last group holds only the rows
// there are. For tile registers a group is [step][part][pair][row in group], filled up with zeros.
// Packed as bf16, what is finer than that is rounded.
template <typename W, typename X>
class PackedRows {
 public:
  using Operand = cpu::Operand<W, X>;
  static constexpr int kGroup = kInTiles<X> ? kTileSide : kTileM;

  static int64_t length(int64_t k) { return ceil_div<int64_t>(k, Operand::kStep) * Operand::kStep; }

  // fill(row, out) writes the k elements of a row in f32. What is packed lives until this thread
  // packs again.
  template <typename Fill>
  PackedRows(int64_t rows, int64_t k, const Fill& fill) : rows_(rows), k_(k), length_(length(k)) {
    const int64_t padded = kInTiles<X> ? ceil_div<int64_t>(rows, kGroup) * kGroup : rows;
    float* line = scratch<float, 3>(length_ + length_ / 2);
    data_ = scratch<X, 4>(padded * length_);
    starts_ = scratch<float, 5>(padded * kStartLanes);
    if (padded > rows) {
      const int64_t last = padded - kGroup;
      std::memset(data_ + last * length_, 0, kGroup * length_ * sizeof(X));
      std::fill_n(starts_ + last * kStartLanes, kGroup * kStartLanes, 0.0f);
    }
    std::fill(line + k, line + length_, 0.0f);
    for (int64_t row = 0; row < rows; ++row) {
      fill(row, line);
      if constexpr (std::is_same_v<X, float>) {
        set(row, line);
      } else {
        X* narrow = reinterpret_cast<X*>(line + length_);
        for (int64_t i = 0; i < length_; i += kLanes) store(narrow + i, load(line + i));
        set(row, narrow);
      }
    }
  }

  int64_t rows() const { return rows_; }
  int64_t k() const { return k_; }
  const X* group(int64_t first_row) const { return data_ + first_row * length_; }
  // The value that each row's sums start from, if Operand::kStarts: by lane, or for tile registers
  // in one.
  const float* starts(int64_t first_row) const { return starts_ + first_row * kStartLanes; }

 private:
  static constexpr int kStartLanes = kInTiles<X> ? 1 : kRegLanes;

  void set(int64_t row, const X* x) {
    const int64_t first = row / kGroup * kGroup;
    const int64_t stride = std::min<int64_t>(kGroup, rows_ - first) * Operand::kPartLanes;
    X* out = data_ + first * length_;
    Reg start = reg_zero();
    const auto part = [&]<int h>(int64_t k) {
      const typename Operand::Part arranged = Operand::template arrange<h>(x + k);
      if constexpr (kInTiles<X>) {
        out = put_column(arranged, row - first, out);
      } else {
        Operand::store(out + (row - first) * Operand::kPartLanes, arranged);
        out += stride;
      }
      if constexpr (Operand::kStarts) {
        start = Operand::multiply_add(Operand::minus_half(), arranged, start);
      }
    };
    for (int64_t k = 0; k < length_; k += Operand::kStep) {
      part.template operator()<0>(k);
      if constexpr (Operand::kParts == 2) part.template operator()<1>(k);
    }
    if constexpr (Operand::kStarts) {
      if constexpr (kInTiles<X>) {
        float lanes[kLanes];
        reg_store(lanes, start);
        starts_[row] = reduce_add(load(lanes));
      } else {
        reg_store(starts_ + row * kRegLanes, start);
      }
    }
  }

#if MTP_ISA_LEVEL >= 4
  // Sixteen pairs into one column of the tile at `tile`; returns the next tile.
  static X* put_column(__m512bh pairs, int64_t column, X* tile) {
    const __m512i down =
        _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    _mm512_i32scatter_epi32(tile + 2 * column, down, reinterpret_cast<__m512i>(pairs), 4);
    return tile + 2 * kTileSide * kTileSide;
  }
#endif

  X* data_;
  float* starts_;
  int64_t rows_, k_, length_;
};

// ---- tiles of vector registers ---------------------------------------------------------------

// Asks for rows that come later, in the order of memory, while a tile is multiplied: it reads
// several short rows side by side, from which no hardware prefetcher guesses what comes next. What
// is asked for less than kAhead bytes before its use comes late. Into the second-level cache: the
// first level can wait for few lines at a time.
class NextRows {
 public:
  static constexpr int64_t kAhead = 8192;
  // Rows of so many bytes the hardware follows better by itself, on Zen 3 by 8 to 48%. On Zen 4,
  // with AVX-512, they reach 98% of reading as they are.
  static constexpr int64_t kFollowed = MTP_ISA_LEVEL == 1 ? 8192 : 0;

  // From row w on, of which k elements are read.
  template <typename W>
  NextRows(const W* w, int64_t stride, int64_t k)
      : row_bytes_(k * sizeof(W)),
        gap_((stride - k) * sizeof(W)),
        line_(reinterpret_cast<const char*>(w)),
        row_end_(line_ + row_bytes_) {}

  // How many rows later that is if tiles of n rows are read.
  static int64_t distance(int64_t n, int64_t row_bytes) {
    return ceil_div<int64_t>(kAhead, n * row_bytes + 1) * n;
  }

  [[gnu::always_inline]] void prefetch(int bytes) {
    if (kFollowed > 0 && row_bytes_ >= kFollowed) return;
    for (int done = 0; done < bytes; done += kLineBytes) {
      __builtin_prefetch(line_, 0, 2);
      line_ += kLineBytes;
      if (line_ >= row_end_) {
        line_ = row_end_ + gap_;
        row_end_ = line_ + row_bytes_;
      }
    }
  }

 private:
  static constexpr int kLineBytes = 64;
  int64_t row_bytes_, gap_;
  const char *line_, *row_end_;
};

// One step of a tile. Of two parts, one after the other: the operand with fewer rows stays in
// registers. Where both come out of one table look-up (kJoint), so do both. Loops over registers
// are unrolled by pragma: left to GCC that happens too late to keep the sums out of memory.
template <typename Operand, int kM, int kN, typename W, typename X>
[[gnu::always_inline]] inline void tile_step(const W* w, int64_t stride, const X* x,
                                             Reg (&acc)[kN][kM]) {
  using Part = typename Operand::Part;
  constexpr int kLanesX = Operand::kPartLanes;
  if constexpr (Operand::kJoint) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      Part b[2];
      Operand::widen(w + n * stride, b);
#pragma GCC unroll 8
      for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const Part a = Operand::load(x + (h * kM + m) * kLanesX);
          acc[n][m] = Operand::multiply_add(b[h], a, acc[n][m]);
        }
      }
    }
  } else {
    const auto part = [&]<int h>() __attribute__((always_inline)) {
      const X* xh = x + h * kM * kLanesX;
      if constexpr (kM <= kN) {
        Part a[kM];
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) a[m] = Operand::load(xh + m * kLanesX);
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) {
          const Part b = Operand::template widen<h>(w + n * stride);
#pragma GCC unroll 8
          for (int m = 0; m < kM; ++m) acc[n][m] = Operand::multiply_add(b, a[m], acc[n][m]);
        }
      } else {
        Part b[kN];
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) b[n] = Operand::template widen<h>(w + n * stride);
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const Part a = Operand::load(xh + m * kLanesX);
#pragma GCC unroll 8
          for (int n = 0; n < kN; ++n) acc[n][m] = Operand::multiply_add(b[n], a, acc[n][m]);
        }
      }
    };
    part.template operator()<0>();
    if constexpr (Operand::kParts == 2) part.template operator()<1>();
  }
}

// out[m * kTileWidth + n] = dot(weight row n, activation row m), from `starts` on. Of rows that
// are read in chunks, all but the first go on from `lanes` and all but the last only leave theirs
// there.
template <typename Operand, int kM, int kN, bool first, bool last, typename W, typename X>
[[gnu::noinline]] void dot_tile(const W* w, int64_t stride, int64_t k, const X* x, int64_t ahead,
                                const float* starts, [[maybe_unused]] float* lanes, float* out) {
  constexpr int kStep = Operand::kStep;
  Reg acc[kN][kM];
#pragma GCC unroll 8
  for (int n = 0; n < kN; ++n) {
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      if constexpr (first) {
        acc[n][m] = Operand::kStarts ? reg_load(starts + m * kRegLanes) : reg_zero();
      } else {
        acc[n][m] = reg_load(lanes + (n * kM + m) * kRegLanes);
      }
    }
  }
  NextRows next(w + ahead * stride, stride, k);
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep, x += Operand::kParts * kM * Operand::kPartLanes) {
    if constexpr (Operand::kStreamed) next.prefetch(kN * kStep * sizeof(W));
    tile_step<Operand, kM, kN>(w + i, stride, x, acc);
  }
  if (i < k) {
    W tail[kN * kStep] = {};
    for (int n = 0; n < kN; ++n) {
      std::memcpy(tail + n * kStep, w + n * stride + i, (k - i) * sizeof(W));
    }
    tile_step<Operand, kM, kN>(tail, kStep, x, acc);
  }
  if constexpr (!last) {
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) reg_store(lanes + (n * kM + m) * kRegLanes, acc[n][m]);
    }
    return;
  }
  float sums[ceil_div(kN * kM, kRegLanes) * kRegLanes];
  reduce_lanes<kN * kM>([&](int i) { return i < kN * kM ? acc[i % kN][i / kN] : reg_zero(); },
                        sums);
  for (int m = 0; m < kM; ++m) {
    std::memcpy(out + m * kTileWidth, sums + m * kN, kN * sizeof(float));
  }
}

// A table and both parts of a widened weight take registers from the accumulators.
template <typename Operand>
constexpr int tile_n(int m) {
  constexpr int accumulators = kAccumulators * (Operand::kJoint ? 2 : 3) / 3;
  for (int n : {6, 4, 3, 2}) {
    if (n * m <= accumulators && kTileWidth % n == 0) return n;
  }
  return 1;
}

// Long activation rows are read in chunks that stay in the first-level cache for a panel of tiles.
constexpr int kPanelTiles = 4;
template <typename Operand, typename X>
constexpr int64_t chunk_length(int m) {
  return 16384 / (m * static_cast<int64_t>(sizeof(X))) / Operand::kStep * Operand::kStep;
}
template <typename Operand, typename X>
bool in_chunks(int m, int64_t k) {
  return Operand::kPanels && k > chunk_length<Operand, X>(m);
}

// As dot_rows, of whole panels of tiles of kN rows; returns how many rows those had.
template <typename Operand, int kM, int kN, typename W, typename X>
int64_t dot_panels(const W* w, int64_t stride, int64_t n, int64_t k, const X* x,
                   const float* starts, float* out) {
  constexpr int64_t kChunk = chunk_length<Operand, X>(kM), kRows = kPanelTiles * kN;
  alignas(64) float lanes[kPanelTiles][kN * kM * kRegLanes];
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows) {
    for (int64_t at = 0; at < k; at += kChunk) {
      const bool last = at + kChunk >= k;
      const auto tile = at == 0 ? dot_tile<Operand, kM, kN, true, false, W, X>
                        : last  ? dot_tile<Operand, kM, kN, false, true, W, X>
                                : dot_tile<Operand, kM, kN, false, false, W, X>;
      for (int t = 0; t < kPanelTiles; ++t) {
        const int64_t row = i + t * kN;
        tile(w + row * stride + at, stride, std::min(kChunk, k - at), x + at * kM, kRows, starts,
             lanes[t], out + row);
      }
    }
  }
  return i;
}

// Weight rows [0, n) against the kM activation rows at x.
template <typename Operand, int kM, typename W, typename X>
void dot_rows(const W* w, int64_t stride, int64_t n, int64_t k, const X* x, const float* starts,
              float* out) {
  constexpr int kN = tile_n<Operand>(kM);
  int64_t i = 0;
  if constexpr (Operand::kPanels) {
    if (in_chunks<Operand, X>(kM, k)) {
      i = dot_panels<Operand, kM, kN>(w, stride, n, k, x, starts, out);
    }
  }
  const int64_t ahead = NextRows::distance(kN, k * sizeof(W));
  const auto whole = [&]<int rows>() {
    for (; i + rows <= n; i += rows) {
      dot_tile<Operand, kM, rows, true, true>(w + i * stride, stride, k, x, ahead, starts, nullptr,
                                              out + i);
    }
  };
  whole.template operator()<kN>();
  if constexpr (kN > 1) whole.template operator()<1>();
}

template <typename Operand, int kM = kTileM - 1, typename W, typename X>
void dot_rows_rest(int rest, const W* w, int64_t stride, int64_t n, int64_t k, const X* x,
                   const float* starts, float* out) {
  if constexpr (kM > 0) {
    if (rest == kM) return dot_rows<Operand, kM>(w, stride, n, k, x, starts, out);
    dot_rows_rest<Operand, kM - 1>(rest, w, stride, n, k, x, starts, out);
  }
}

// What widened rows are multiplied as. There are never enough of them for a panel.
template <typename X, bool starts>
struct WidenedOperand : Operand<X, X> {
  static constexpr bool kStarts = starts, kPanels = false, kStreamed = false;
};

// Weight rows widened once for many groups of activation rows: n rows in the order that PackedRows
// gives activations. Widening is exact, so the dots stay the same.
template <typename Operand, typename W, typename X>
void widen_rows(const W* w, int64_t stride, int64_t n, int64_t k, X* out) {
  constexpr int kStep = Operand::kStep;
  NextRows next(w + NextRows::distance(n, k * sizeof(W)) * stride, stride, k);
  for (int64_t row = 0; row < n; ++row, w += stride) {
    const auto step = [&](const W* p) {
      typename Operand::Part parts[2];
      if constexpr (Operand::kJoint) {
        Operand::widen(p, parts);
      } else {
        parts[0] = Operand::template widen<0>(p);
        parts[1] = Operand::template widen<1>(p);
      }
      Operand::store(out, parts[0]);
      Operand::store(out + Operand::kPartLanes, parts[1]);
      out += kStep;
    };
    int64_t i = 0;
    for (; i + kStep <= k; i += kStep) {
      next.prefetch(kStep * sizeof(W));
      step(w + i);
    }
    if (i < k) {
      W tail[kStep] = {};
      std::memcpy(tail, w + i, (k - i) * sizeof(W));
      step(tail);
    }
  }
}

// ---- tiles of AMX ----------------------------------------------------------------------------

#if MTP_ISA_LEVEL >= 4

// out[m * kTileWidth + n] = dot(weight row n, activation row m) + starts[m] for n < rows and the kG
// groups of activation rows from x, which lie `group` elements apart. Accumulators are the tile
// registers up to 3; kR more hold weight rows, and the last one activations.
template <typename Operand, int kR, int kG, typename W>
[[gnu::noinline]] void dot_tiles(const W* w, int64_t stride, int64_t rows, int64_t k, const BF16* x,
                                 int64_t group, const float* starts, float* out) {
  static_assert(kR * kG <= 4 && kR <= 3);
  constexpr int kStep = Operand::kStep, kParts = Operand::kParts, kSide = kTileSide;
  constexpr int kWeights = 4, kActivations = 7, kTileElements = 2 * kSide * kSide;
  // Of byte rows the next ones are asked for up to here. The hardware follows each from there on,
  // and rows of bf16 from their start: asking for those as well was slower.
  constexpr int64_t kLead = 512;
  alignas(64) BF16 staged[kR][kParts][kTileElements];
  alignas(64) float sums[kSide * kSide];

  repeat<kR>([&]<int r>() {
    repeat<kG>([&]<int g>() {
      if (starts) {
        tile_load<r * kG + g>(starts + g * kSide, 0);
      } else {
        tile_zero<r * kG + g>();
      }
    });
  });

  // Sixteen weight rows as bf16 into `staged`; rows that do not exist repeat the last one.
  const auto stage = [&](int r, const W* from, int64_t left) {
    for (int j = 0; j < kSide; ++j) {
      const W* row = from + std::min<int64_t>(r * kSide + j, rows - 1) * stride;
      W tail[kStep] = {};
      if (left < kStep) {
        std::memcpy(tail, row, left * sizeof(W));
        row = tail;
      }
      typename Operand::Part parts[2];
      if constexpr (kParts == 2) {
        Operand::widen(row, parts);
      } else {
        parts[0] = Operand::load(row);
      }
      for (int h = 0; h < kParts; ++h) {
        Operand::store(staged[r][h] + j * 2 * kSide, parts[h]);
      }
    }
  };
  const auto multiply = [&](const auto& load_weights) {
    repeat<kParts>([&]<int h>() {
      repeat<kR>([&]<int r>() { load_weights.template operator()<r, h>(); });
      repeat<kG>([&]<int g>() {
        tile_load<kActivations>(x + g * group + h * kTileElements, 64);
        repeat<kR>([&]<int r>() { tile_dot<r * kG + g, kWeights + r, kActivations>(); });
      });
    });
    x += kParts * kTileElements;
  };
  const auto load_staged = [&]<int r, int h>() { tile_load<kWeights + r>(staged[r][h], 64); };

  const bool in_place = kParts == 1 && rows == kR * kSide;
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    if (kParts == 2 && i < kLead) {
      for (int j = 0; j < kR * kSide; ++j) {
        __builtin_prefetch(w + (kR * kSide + j) * stride + i, 0, 2);
      }
    }
    if (in_place) {
      multiply([&]<int r, int>() {
        tile_load<kWeights + r>(w + r * kSide * stride + i, stride * sizeof(W));
      });
    } else {
      for (int r = 0; r < kR; ++r) stage(r, w + i, kStep);
      multiply(load_staged);
    }
  }
  if (i < k) {
    for (int r = 0; r < kR; ++r) stage(r, w + i, k - i);
    multiply(load_staged);
  }

  repeat<kR>([&]<int r>() {
    repeat<kG>([&]<int g>() {
      tile_store<r * kG + g>(sums, kSide * sizeof(float));
      __m512i lines[kSide];
      for (int j = 0; j < kSide; ++j) lines[j] = _mm512_load_si512(sums + j * kSide);
      transpose16(lines);
      for (int m = 0; m < kSide; ++m) {
        _mm512_storeu_si512(out + (g * kSide + m) * kTileWidth + r * kSide, lines[m]);
      }
    });
  });
}

// Tiles of weight rows side by side: of bf16 as many as there are accumulators for; of bytes one,
// which measured faster.
template <typename Operand>
constexpr int tile_rows(int groups) {
  return Operand::kParts == 2 ? 1 : std::min(3, 4 / groups);
}

// Weight rows [0, n) against kG groups of activation rows.
template <typename Operand, int kG, int kR = tile_rows<Operand>(kG), typename W>
void dot_tile_rows(const W* w, int64_t stride, int64_t n, int64_t k, const BF16* x, int64_t group,
                   const float* starts, float* out) {
  constexpr int kRows = kR * kTileSide;
  int64_t i = 0;
  for (; i + kRows <= n; i += kRows) {
    dot_tiles<Operand, kR, kG>(w + i * stride, stride, kRows, k, x, group, starts, out + i);
  }
  if (i == n) return;
  if constexpr (kR > 1) {
    if (n - i <= kRows - kTileSide) {
      return dot_tile_rows<Operand, kG, kR - 1>(w + i * stride, stride, n - i, k, x, group, starts,
                                                out + i);
    }
  }
  dot_tiles<Operand, kR, kG>(w + i * stride, stride, n - i, k, x, group, starts, out + i);
}

template <typename Operand, int kG = kMaxRows / kTileSide, typename W>
void dot_tile_groups(int64_t groups, const W* w, int64_t stride, int64_t n, int64_t k,
                     const BF16* x, int64_t group, const float* starts, float* out) {
  if (groups == kG) return dot_tile_rows<Operand, kG>(w, stride, n, k, x, group, starts, out);
  if constexpr (kG > 1) {
    dot_tile_groups<Operand, kG - 1>(groups, w, stride, n, k, x, group, starts, out);
  }
}

#endif

// ---- the stream ------------------------------------------------------------------------------

// Weight rows that are worth a thread; small layers stay on the caller's.
template <typename W>
int64_t grain_of(int64_t k) {
  constexpr int64_t kLeast = 32768;
  const int64_t block_bytes = kTileWidth * std::max<int64_t>(k, 1) * sizeof(W);
  return kTileWidth * ceil_div<int64_t>(kLeast, block_bytes);
}

// Calls epilogue(first, count, tile) for consecutive blocks of at most kTileWidth weight rows of
// [begin, end); tile[m * kTileWidth + i] is the dot product of weight row first + i with
// activation row m.
#if MTP_ISA_LEVEL >= 4
template <typename W, typename Epilogue>
void stream_weights(const W* weight, int64_t stride, int64_t begin, int64_t end,
                    const PackedRows<W, BF16>& x, const Epilogue& epilogue) {
  using Operand = cpu::Operand<W, BF16>;
  alignas(64) float tile[kMaxRows * kTileWidth];
  const Tiles registers;
  const int64_t groups = ceil_div<int64_t>(x.rows(), kTileSide);
  const float* starts = Operand::kStarts ? x.starts(0) : nullptr;
  for (int64_t first = begin; first < end; first += kTileWidth) {
    const int64_t count = std::min<int64_t>(kTileWidth, end - first);
    dot_tile_groups<Operand>(groups, weight + first * stride, stride, count, x.k(), x.group(0),
                             kTileSide * x.length(x.k()), starts, tile);
    epilogue(first, count, tile);
  }
}
#endif

template <typename W, typename X, typename Epilogue>
void stream_weights(const W* weight, int64_t stride, int64_t begin, int64_t end,
                    const PackedRows<W, X>& x, const Epilogue& epilogue) {
  using Operand = cpu::Operand<W, X>;
  alignas(64) float tile[kMaxRows * kTileWidth];
  using Widened = WidenedOperand<X, Operand::kStarts>;
  constexpr int kWidenedN = tile_n<Widened>(kTileM);
  constexpr int64_t kWide = 24576 / sizeof(X);  // what of the first-level cache a panel may take
  alignas(64) X wide[kWide];
  const int64_t full = x.rows() / kTileM * kTileM, length = x.length(x.k());
  const bool widen = Operand::kParts == 2 && !std::is_same_v<W, X> && full >= Operand::kWidenFrom &&
                     kWidenedN * length <= kWide;
  const int tiles = in_chunks<Operand, X>(kTileM, x.k()) ? kPanelTiles : 1;
  const int64_t panel = widen ? kWidenedN : tiles * tile_n<Operand>(kTileM);
  const auto starts = [&](int64_t row) { return Operand::kStarts ? x.starts(row) : nullptr; };
  for (int64_t first = begin; first < end; first += kTileWidth) {
    const int64_t count = std::min<int64_t>(kTileWidth, end - first);
    const W* w = weight + first * stride;
    // A panel stays in the first-level cache while all full groups of rows pass over it.
    for (int64_t i = 0; full > 0 && i < count; i += panel) {
      const int64_t n = std::min<int64_t>(panel, count - i);
      if (widen) widen_rows<Operand>(w + i * stride, stride, n, x.k(), wide);
      for (int64_t m = 0; m < full; m += kTileM) {
        float* out = tile + m * kTileWidth + i;
        if (widen) {
          dot_rows<Widened, kTileM>(wide, length, n, length, x.group(m), starts(m), out);
        } else {
          dot_rows<Operand, kTileM>(w + i * stride, stride, n, x.k(), x.group(m), starts(m), out);
        }
      }
    }
    if (full < x.rows()) {
      dot_rows_rest<Operand>(static_cast<int>(x.rows() - full), w, stride, count, x.k(),
                             x.group(full), starts(full), tile + full * kTileWidth);
    }
    epilogue(first, count, tile);
  }
}

// Calls body(X{}) with what activations are packed as for weights of type W.
template <typename W, typename Body>
void with_packed_type([[maybe_unused]] DType activations, const Body& body) {
#if MTP_ISA_LEVEL >= 3
  if constexpr (!std::is_same_v<W, float> && !std::is_same_v<W, F16>) {
    if (activations == DType::kBF16) return body(BF16{});
  }
#endif
  body(float{});
}

// Calls body(typed pointer) for any weight dtype.
template <typename Body>
void with_weight_type(DType dtype, const void* weight, const Body& body) {
  switch (dtype) {
    case DType::kI8:
      return body(static_cast<const int8_t*>(weight));
    case DType::kF8E4M3:
      return body(static_cast<const F8E4M3*>(weight));
    default:
      with_float_type(dtype, [&](auto type) { body(static_cast<const decltype(type)*>(weight)); });
  }
}

}  // namespace MTP_ISA
}  // namespace mtp::cpu
