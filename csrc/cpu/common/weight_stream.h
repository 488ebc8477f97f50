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
// With AMX it is tile registers that multiply what is packed as bf16, or int8: tile_stream.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/common/scratch.h"
#include "cpu/common/tile_stream.h"
#include "cpu/common/weight_operand.h"

namespace mtp::cpu {
inline namespace MTP_ISA {

// ---- packed activations ----------------------------------------------------------------------

// Activations for weights of type W, in the order the tiles read them. Rows of a group of kGroup
// stand side by side: [group][step][part][row in group][lane]; the last group holds only the rows
// there are. Packed as bf16, what is finer than that is rounded.
template <typename W, typename X>
class PackedRows {
 public:
  using Operand = cpu::Operand<W, X>;
  static int64_t length(int64_t k) { return ceil_div<int64_t>(k, Operand::kStep) * Operand::kStep; }

  // fill(row, out) writes the k elements of a row in f32. What is packed lives until this thread
  // packs again.
  template <typename Fill>
  PackedRows(int64_t rows, int64_t k, const Fill& fill) : rows_(rows), k_(k), length_(length(k)) {
    float* line = scratch<float, 3>(length_ + length_ / 2);
    data_ = scratch<X, 4>(rows * length_);
    starts_ = scratch<float, 5>(rows * kRegLanes);
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
  // What each row's sums start from, by lane, if Operand::kStarts.
  const float* starts(int64_t first_row) const { return starts_ + first_row * kRegLanes; }

 private:
  void set(int64_t row, const X* x) {
    const int64_t first = row / kTileM * kTileM;
    const int64_t stride = std::min<int64_t>(kTileM, rows_ - first) * Operand::kPartLanes;
    X* out = data_ + first * length_ + (row - first) * Operand::kPartLanes;
    Reg start = reg_zero();
    const auto part = [&]<int h>(int64_t k) {
      const typename Operand::Part arranged = Operand::template arrange<h>(x + k);
      Operand::store(out, arranged);
      out += stride;
      if constexpr (Operand::kStarts) {
        start = Operand::multiply_add(Operand::minus_half(), arranged, start);
      }
    };
    for (int64_t k = 0; k < length_; k += Operand::kStep) {
      part.template operator()<0>(k);
      if constexpr (Operand::kParts == 2) part.template operator()<1>(k);
    }
    if constexpr (Operand::kStarts) reg_store(starts_ + row * kRegLanes, start);
  }

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
template <typename W, typename X, typename Epilogue>
void stream_weights(const W* weight, int64_t stride, int64_t begin, int64_t end,
                    const PackedRows<W, X>& x, const Epilogue& epilogue) {
  using Operand = cpu::Operand<W, X>;
  float* const tile = scratch<float, 8>(x.rows() * kTileWidth);
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

// Calls body(X{}) with what rows of k activations are packed as for weights of type W.
template <typename W, typename Body>
void with_packed_type([[maybe_unused]] DType activations, [[maybe_unused]] int64_t k,
                      const Body& body) {
#if MTP_ISA_LEVEL >= 3
  if constexpr (MTP_ISA_LEVEL >= 4 && std::is_same_v<W, int8_t>) {
    if (activations == DType::kBF16 && k <= FixedPoint::kMaxK) return body(FixedPoint{});
  } else if constexpr (!std::is_same_v<W, float> && !std::is_same_v<W, F16>) {
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
