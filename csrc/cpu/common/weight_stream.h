// The core of skinny_linear, head_topk and eh_proj: dot products of every weight row with a few
// activation rows. Weights stay in their dtype and are read once for up to kMaxRows activation
// rows; they are widened in registers, two registers of lanes a step, and multiplied into f32
// accumulators.
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
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

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
inline __m256 fold(Reg a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
}

#elif MTP_ISA_LEVEL == 1

using Reg = __m256;
constexpr int kRegLanes = 8;
constexpr int kTileM = 4;
constexpr int kAccumulators = 12;
inline Reg reg_zero() { return _mm256_setzero_ps(); }
inline Reg reg_load(const float* p) { return _mm256_loadu_ps(p); }
inline void reg_store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
inline Reg reg_fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
inline __m256 fold(Reg a) { return a; }

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

// The sums of the lanes of four registers, each by the same tree of neighbours.
#if MTP_ISA_LEVEL >= 1
inline void reduce4(Reg a, Reg b, Reg c, Reg d, float out[4]) {
  const __m256 ab = _mm256_hadd_ps(fold(a), fold(b)), cd = _mm256_hadd_ps(fold(c), fold(d));
  const __m256 all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
#else
inline void reduce4(Reg a, Reg b, Reg c, Reg d, float out[4]) {
  const Reg* r[4] = {&a, &b, &c, &d};
  for (int i = 0; i < 4; ++i) out[i] = (r[i]->v[0] + r[i]->v[1]) + (r[i]->v[2] + r[i]->v[3]);
}
#endif

// ---- widening --------------------------------------------------------------------------------

// A step is two registers of weights. half<h>(p) widens one of them; pack<h>(x) picks the
// activations of the same elements. The order within a step is the cheapest to widen: for bf16 a
// shift yields the even elements, and a mask or two shifts the odd ones; the others stay in memory
// order.
constexpr int kStep = 2 * kRegLanes;

template <typename W>
struct Widen {
  template <int h>
  static Reg pack(const float* x) {
    return reg_load(x + h * kRegLanes);
  }
  template <int h>
  static Reg half(const W* p) {
#if MTP_ISA_LEVEL >= 2
    return load(p + h * kRegLanes).v;
#elif MTP_ISA_LEVEL == 1
    return load8(p + h * kRegLanes);
#else
    Reg r;
    for (int i = 0; i < kRegLanes; ++i) r.v[i] = to_float(p[h * kRegLanes + i]);
    return r;
#endif
  }

#if MTP_ISA_LEVEL == 1
  static __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
  static __m256 load8(const F16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256 load8(const int8_t* p) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b));
  }
  static __m256 load8(const F8E4M3* p) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return widen_e4m3(_mm256_cvtepu8_epi32(b));
  }
#endif
};

#if MTP_ISA_LEVEL >= 1
template <>
struct Widen<BF16> {
  template <int h>
  static Reg pack(const float* x) {
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
  static Reg half(const BF16* p) {
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

// ---- packed activations ----------------------------------------------------------------------

constexpr int kMaxRows = 64;    // activation rows per pass over the weights
constexpr int kTileWidth = 48;  // weight rows per call of the epilogue

inline int64_t packed_length(int64_t k) { return ceil_div<int64_t>(k, kStep) * kStep; }

// out[0..k) = x in f32.
inline void widen_row(DType dtype, const void* x, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += kLanes) {
    store_partial(out + i, load_partial_as(dtype, x, i, k - i), k - i);
  }
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
  for (int64_t i = 0; i < k; i += kLanes) {
    const F32x16 w = load_partial_as(dtype, weight, i, k - i) + broadcast(offset);
    store_partial(x + i, load_partial(x + i, k - i) * scale * w, k - i);
  }
}

// Activations in the order the tiles read them. Rows of a group of kTileM stand side by side:
// [group][step][half][row in group][lane]; the last group holds only the rows there are.
class PackedRows {
 public:
  static int64_t floats(int64_t rows, int64_t k) { return (rows + 1) * packed_length(k); }

  // Packs `rows` rows for weights of type W into data, which holds floats(rows, k). fill(row, out)
  // writes the k elements of a row.
  template <typename W, typename Fill>
  static PackedRows pack(float* data, int64_t rows, int64_t k, const Fill& fill) {
    PackedRows packed(data, rows, k);
    float* line = data + rows * packed.length_;
    for (int64_t row = 0; row < rows; ++row) {
      fill(row, line);
      std::fill(line + k, line + packed.length_, 0.0f);
      packed.set<W>(row, line);
    }
    return packed;
  }

  int64_t rows() const { return rows_; }
  int64_t k() const { return k_; }
  const float* group(int64_t first_row) const { return data_ + first_row * length_; }

 private:
  PackedRows(float* data, int64_t rows, int64_t k)
      : data_(data), rows_(rows), k_(k), length_(packed_length(k)) {}

  template <typename W>
  void set(int64_t row, const float* x) {
    const int64_t first = row / kTileM * kTileM;
    const int64_t stride = std::min<int64_t>(kTileM, rows_ - first) * kRegLanes;
    float* out = data_ + first * length_ + (row - first) * kRegLanes;
    for (int64_t k = 0; k < length_; k += kStep, out += 2 * stride) {
      reg_store(out, Widen<W>::template pack<0>(x + k));
      reg_store(out + stride, Widen<W>::template pack<1>(x + k));
    }
  }

  float* data_;
  int64_t rows_, k_, length_;
};

// ---- tiles -----------------------------------------------------------------------------------

// Asks for the rows of the tile after this one. A tile reads several short rows side by side, from
// which no hardware prefetcher guesses what comes next; in the order of memory they are one stream.
class NextRows {
 public:
  template <typename W>
  NextRows(const W* first, int64_t stride, int64_t k)
      : line_(reinterpret_cast<const char*>(first)),
        row_end_(line_ + k * sizeof(W)),
        gap_((stride - k) * sizeof(W)),
        row_bytes_(k * sizeof(W)) {}

  [[gnu::always_inline]] void prefetch(int bytes) {
    for (int done = 0; done < bytes; done += kLineBytes) {
      __builtin_prefetch(line_);
      line_ += kLineBytes;
      if (line_ >= row_end_) {
        line_ = row_end_ + gap_;
        row_end_ = line_ + row_bytes_;
      }
    }
  }

 private:
  static constexpr int kLineBytes = 64;
  const char *line_, *row_end_;
  int64_t gap_, row_bytes_;
};

// One step of a tile. The operand with fewer rows stays in registers.
template <typename W, int kM, int kN>
[[gnu::always_inline]] inline void tile_step(const W* w, int64_t stride, const float* x,
                                             Reg (&acc)[kN][kM]) {
  const auto half = [&]<int h>() {
    const float* xh = x + h * kM * kRegLanes;
    if constexpr (kM <= kN) {
      Reg a[kM];
      for (int m = 0; m < kM; ++m) a[m] = reg_load(xh + m * kRegLanes);
      for (int n = 0; n < kN; ++n) {
        const Reg b = Widen<W>::template half<h>(w + n * stride);
        for (int m = 0; m < kM; ++m) acc[n][m] = reg_fma(b, a[m], acc[n][m]);
      }
    } else {
      Reg b[kN];
      for (int n = 0; n < kN; ++n) b[n] = Widen<W>::template half<h>(w + n * stride);
      for (int m = 0; m < kM; ++m) {
        const Reg a = reg_load(xh + m * kRegLanes);
        for (int n = 0; n < kN; ++n) acc[n][m] = reg_fma(b[n], a, acc[n][m]);
      }
    }
  };
  half.template operator()<0>();
  half.template operator()<1>();
}

// out[m * kTileWidth + n] = dot(weight row n, activation row m).
template <typename W, int kM, int kN>
[[gnu::noinline]] void dot_tile(const W* w, int64_t stride, int64_t k, const float* x, float* out) {
  Reg acc[kN][kM];
  for (int n = 0; n < kN; ++n) {
    for (int m = 0; m < kM; ++m) acc[n][m] = reg_zero();
  }
  NextRows next(w + kN * stride, stride, k);
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep, x += 2 * kM * kRegLanes) {
    next.prefetch(kN * kStep * sizeof(W));
    tile_step<W, kM, kN>(w + i, stride, x, acc);
  }
  if (i < k) {
    W tail[kN * kStep] = {};
    for (int n = 0; n < kN; ++n) {
      std::memcpy(tail + n * kStep, w + n * stride + i, (k - i) * sizeof(W));
    }
    tile_step<W, kM, kN>(tail, kStep, x, acc);
  }
  if constexpr (kN % 4 == 0) {
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; n += 4) {
        reduce4(acc[n][m], acc[n + 1][m], acc[n + 2][m], acc[n + 3][m], out + m * kTileWidth + n);
      }
    }
  } else {
    float sums[(kN * kM + 3) / 4 * 4];
    const auto at = [&](int i) { return i < kN * kM ? acc[i % kN][i / kN] : reg_zero(); };
    for (int j = 0; j < kN * kM; j += 4) reduce4(at(j), at(j + 1), at(j + 2), at(j + 3), sums + j);
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) out[m * kTileWidth + n] = sums[m * kN + n];
    }
  }
}

constexpr int tile_n(int m) {
  for (int n : {6, 4, 3}) {
    if (n * m <= kAccumulators && kTileWidth % n == 0) return n;
  }
  return 1;
}

// Weight rows [0, n) against the kM activation rows at x.
template <typename W, int kM>
void dot_rows(const W* w, int64_t stride, int64_t n, int64_t k, const float* x, float* out) {
  constexpr int kN = tile_n(kM);
  int64_t i = 0;
  for (; i + kN <= n; i += kN) dot_tile<W, kM, kN>(w + i * stride, stride, k, x, out + i);
  for (; i < n; ++i) dot_tile<W, kM, 1>(w + i * stride, stride, k, x, out + i);
}

template <typename W, int kM = kTileM - 1>
void dot_rows_rest(int rest, const W* w, int64_t stride, int64_t n, int64_t k, const float* x,
                   float* out) {
  if constexpr (kM > 0) {
    if (rest == kM) return dot_rows<W, kM>(w, stride, n, k, x, out);
    dot_rows_rest<W, kM - 1>(rest, w, stride, n, k, x, out);
  }
}

// Weight rows widened once for many groups of activation rows: n rows of packed_length(k) floats,
// in the order that PackedRows::pack<W>() gives activations. Widening is exact, so the dots stay
// the same.
template <typename W>
void widen_rows(const W* w, int64_t stride, int64_t n, int64_t k, float* out) {
  for (int64_t row = 0; row < n; ++row, w += stride) {
    int64_t i = 0;
    const auto step = [&](const W* p) {
      reg_store(out, Widen<W>::template half<0>(p));
      reg_store(out + kRegLanes, Widen<W>::template half<1>(p));
      out += kStep;
    };
    for (; i + kStep <= k; i += kStep) step(w + i);
    if (i < k) {
      W tail[kStep] = {};
      std::memcpy(tail, w + i, (k - i) * sizeof(W));
      step(tail);
    }
  }
}

// Calls epilogue(first, count, tile) for consecutive blocks of at most kTileWidth weight rows of
// [begin, end); tile[m * kTileWidth + i] is the dot product of weight row first + i with
// activation row m.
template <typename W, typename Epilogue>
void stream_weights(const W* weight, int64_t stride, int64_t begin, int64_t end,
                    const PackedRows& x, const Epilogue& epilogue) {
  constexpr int kPanel = tile_n(kTileM);
  constexpr int64_t kWideFloats = 6144;  // what of the first-level cache a widened panel may take
  alignas(64) float wide[kWideFloats];
  alignas(64) float tile[kMaxRows * kTileWidth];
  const int64_t full = x.rows() / kTileM * kTileM, length = packed_length(x.k());
  const bool widen = full > kTileM && kPanel * length <= kWideFloats && sizeof(W) < sizeof(float);
  for (int64_t first = begin; first < end; first += kTileWidth) {
    const int64_t count = std::min<int64_t>(kTileWidth, end - first);
    const W* w = weight + first * stride;
    // A panel stays in the first-level cache while all full groups of rows pass over it.
    for (int64_t i = 0; full > 0 && i < count; i += kPanel) {
      const int64_t n = std::min<int64_t>(kPanel, count - i);
      if (widen) widen_rows(w + i * stride, stride, n, x.k(), wide);
      for (int64_t m = 0; m < full; m += kTileM) {
        float* out = tile + m * kTileWidth + i;
        if (widen) {
          dot_rows<float, kTileM>(wide, length, n, length, x.group(m), out);
        } else {
          dot_rows<W, kTileM>(w + i * stride, stride, n, x.k(), x.group(m), out);
        }
      }
    }
    if (full < x.rows()) {
      dot_rows_rest<W>(static_cast<int>(x.rows() - full), w, stride, count, x.k(), x.group(full),
                       tile + full * kTileWidth);
    }
    epilogue(first, count, tile);
  }
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
