// weight_stream.h by tile registers (AMX): sixteen weight rows as they lie in memory by sixteen
// columns of activations, one instruction per kilobyte of weights whatever the number of columns.
// A dot product is one element of an accumulator, summed in ascending k.
//
// bf16 weights meet bf16 activations, a column for each activation row; e4m3 is widened into
// kilobytes of the first-level cache on the way. int8 weights are multiplied as they are, by
// activations in fixed point: three columns of bytes make a row, whose scale is a power of two.
// Integers add up without rounding, so a product is exact but for what the fixed point cuts off:
// 2^-23 of the row's largest element, and nothing of a bf16 element above 2^-15 of it.
//
// A stream of short rows, read in the order of memory, is too little for the memory: what the
// hardware asks for ahead ends with the page. So a tile's rows are not neighbours. Each reads from
// a run of rows of its own, and tiles take the runs' first rows, their second rows, and so on:
// thirty-two streams side by side, sixteen of e4m3. Sums are stored where their weight row has its
// place.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/common/scratch.h"
#include "cpu/common/tiles.h"
#include "cpu/common/weight_operand.h"

namespace mtp::cpu {
inline namespace MTP_ISA {

// Activations as integers of three bytes, with a power of two for each row.
struct FixedPoint {
  static constexpr int64_t kMaxK = (int64_t{1} << 17) - 1;  // 2^7 * 2^7 * k < 2^31
};

template <typename W, typename X>
class PackedRows;

constexpr int kTileSide = 16;

template <typename W, typename X>
constexpr bool kInTiles = MTP_ISA_LEVEL >= 4 && !std::is_same_v<X, float>;

#if MTP_ISA_LEVEL >= 4

// ---- operands --------------------------------------------------------------------------------

// TileOperand<W, X>: a step is kStep elements, of weights one line of 64 bytes (kStaged: widened to
// kParts lines of bf16), of activations kParts lines in each of a row's kColumns columns. Sum is
// what accumulators hold.
template <typename W, typename X>
struct TileOperand;

template <typename W>
struct TileOperand<W, BF16> : Operand<W, BF16> {
  using Operand<W, BF16>::kStep, Operand<W, BF16>::kParts;
  using Sum = float;
  static constexpr int kColumns = 1;
  static constexpr bool kStaged = kParts == 2;

  template <int c, int a, int b>
  static void dot() {
    tile_dot<c, a, b>();
  }

  // `length` elements into the lines of a column; returns what scale() needs.
  static float arrange_row(const BF16* x, int64_t length, char* lines) {
    for (int64_t k = 0; k < length; k += kStep) {
      repeat<kParts>([&]<int h>() {
        Operand<W, BF16>::store(reinterpret_cast<BF16*>(lines),
                                Operand<W, BF16>::template arrange<h>(x + k));
        lines += 64;
      });
    }
    return 0.0f;
  }
  // Sixteen dot products from the sums of a row's columns.
  static __m512 scale(const __m512i columns[1], float) { return _mm512_castsi512_ps(columns[0]); }
};

template <>
struct TileOperand<int8_t, FixedPoint> {
  using Sum = int32_t;
  static constexpr int kStep = 64, kParts = 1, kColumns = 3;
  static constexpr bool kStaged = false;

  template <int c, int a, int b>
  static void dot() {
    tile_dot_bytes<c, a, b>();
  }

  // Returns the power of two that makes integers of 23 bits and a sign of the row, or NaN if not
  // all of it is finite.
  static float arrange_row(const BF16* x, int64_t length, char* lines) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i highest = _mm512_setzero_si512();
    for (int64_t k = 0; k < length; k += kLanes) {
      const __m512i bits = _mm512_castps_si512(load(x + k).v);
      highest = _mm512_max_epi32(highest, _mm512_and_si512(bits, magnitude));
    }
    const float top = bits_to_float(static_cast<uint32_t>(_mm512_reduce_max_epi32(highest)));
    float shift = 0.0f;
    if (!std::isfinite(top)) {
      shift = std::numeric_limits<float>::quiet_NaN();
    } else if (top > 0.0f) {
      // The highest digit of 255/128 would be 128.
      shift = static_cast<float>(22 - std::ilogb(static_cast<double>(top) * (129.0 / 128.0)));
    }
    // Balanced digits of base 256, the highest first: x = (high * 256 + middle) * 256 + low.
    for (int64_t k = 0; k < length; k += kStep, lines += 64) {
      for (int j = 0; j < kStep / kLanes; ++j) {
        const __m512 scaled = _mm512_scalef_ps(load(x + k + j * kLanes).v, _mm512_set1_ps(shift));
        __m512i integer = _mm512_cvtps_epi32(scaled);
        for (int c = kColumns - 1; c >= 0; --c) {
          _mm_store_si128(reinterpret_cast<__m128i*>(lines + c * length) + j,
                          _mm512_cvtepi32_epi8(integer));
          integer = _mm512_srai_epi32(_mm512_add_epi32(integer, _mm512_set1_epi32(128)), 8);
        }
      }
    }
    return shift;
  }
  static __m512 scale(const __m512i columns[3], float shift) {
    __m512 sum = _mm512_cvtepi32_ps(columns[0]);
    for (int c = 1; c < kColumns; ++c) {
      sum = _mm512_fmadd_ps(sum, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(columns[c]));
    }
    return _mm512_scalef_ps(sum, _mm512_set1_ps(-shift));
  }
};

// ---- packed activations ----------------------------------------------------------------------

// For tile registers: [group of sixteen columns][step][part][word][column], a word being four bytes
// of a column's line. Columns that no row has hold anything: a column meets no other.
template <typename W, typename X>
  requires kInTiles<W, X>
class PackedRows<W, X> {
 public:
  using Operand = TileOperand<W, X>;

  // As weight_stream.h's.
  template <typename Fill>
  PackedRows(int64_t rows, int64_t k, const Fill& fill)
      : rows_(rows), k_(k), groups_(ceil_div<int64_t>(rows * Operand::kColumns, kTileSide)) {
    const int64_t steps = ceil_div<int64_t>(k, Operand::kStep), length = steps * Operand::kStep;
    const int64_t line_bytes = steps * Operand::kParts * 64;
    group_bytes_ = line_bytes * kTileSide;
    const int64_t quads = ceil_div<int64_t>(rows, 4);
    const int64_t columns = ceil_div<int64_t>(quads * 4 * Operand::kColumns, kTileSide) * kTileSide;
    data_ = scratch<char, 4>(columns * line_bytes);
    shift_ = scratch<float, 5>(quads * 4);
    float* row = scratch<float, 3>(length + length / 2);
    BF16* narrow = reinterpret_cast<BF16*>(row + length);
    char* lines = scratch<char, 6>(4 * Operand::kColumns * line_bytes);
    std::fill(row + k, row + length, 0.0f);
    for (int64_t first = 0; first < rows; first += 4) {
      for (int64_t i = 0; i < std::min<int64_t>(4, rows - first); ++i) {
        fill(first + i, row);
        for (int64_t j = 0; j < length; j += kLanes) store(narrow + j, load(row + j));
        shift_[first + i] =
            Operand::arrange_row(narrow, length, lines + i * Operand::kColumns * line_bytes);
      }
      for (int64_t c = 0; c < 4 * Operand::kColumns; c += 4) {
        put_columns(lines + c * line_bytes, line_bytes, first * Operand::kColumns + c);
      }
    }
  }

  int64_t rows() const { return rows_; }
  int64_t k() const { return k_; }
  int64_t groups() const { return groups_; }
  const char* group(int64_t g) const { return data_ + g * group_bytes_; }
  int64_t group_bytes() const { return group_bytes_; }
  float shift(int64_t row) const { return shift_[row]; }

 private:
  // Four columns from `column` on.
  void put_columns(const char* lines, int64_t line_bytes, int64_t column) {
    char* out = data_ + column / kTileSide * group_bytes_ + column % kTileSide * 4;
    for (int64_t at = 0; at < line_bytes; at += 64) {
      __m512i words[4];
      for (int i = 0; i < 4; ++i) words[i] = _mm512_load_si512(lines + i * line_bytes + at);
      transpose_quarters(words);
      for (int i = 0; i < 4; ++i) {
        repeat<4>([&]<int quarter>() {
          _mm_store_si128(reinterpret_cast<__m128i*>(out + (4 * quarter + i) * 64),
                          _mm512_extracti32x4_epi32(words[i], quarter));
        });
      }
      out += 1024;
    }
  }

  char* data_;
  float* shift_;
  int64_t rows_, k_, groups_, group_bytes_;
};

// ---- tiles -----------------------------------------------------------------------------------

// Tiles of weight rows side by side, and groups of columns. What is widened is widened for as many
// groups as there are accumulators.
template <typename Operand>
constexpr int kRowTiles = Operand::kStaged ? 1 : 2;
template <typename Operand>
constexpr int kMaxGroups = 4 / kRowTiles<Operand>;

// sums[(g * group_rows + row * pitch) * kTileSide + column] = the dot product of weight row `row`
// with that column of group g, for row < kRowTiles * kTileSide and g < kG. Of fewer weight rows the
// last one is repeated. Accumulators are the tile registers up to 3; two for weights follow, and
// two for activations.
template <typename Operand, int kG, typename W>
[[gnu::noinline]] void dot_tiles(const W* w, int64_t stride, int64_t rows, int64_t k, const char* x,
                                 int64_t group_bytes, typename Operand::Sum* sums, int64_t pitch,
                                 int64_t group_rows) {
  constexpr int kStep = Operand::kStep, kParts = Operand::kParts, kR = kRowTiles<Operand>;
  constexpr int kWeights = 4, kActivations = 6;
  static_assert(kR * kG <= 4 && kR <= 2);
  alignas(64) char staged[kR][kParts][1024];

  repeat<kR * kG>([&]<int t>() { tile_zero<t>(); });

  const auto stage = [&](int64_t i, int64_t left) {
    for (int j = 0; j < kR * kTileSide; ++j) {
      const W* row = w + std::min<int64_t>(j, rows - 1) * stride + i;
      W tail[kStep] = {};
      if (left < kStep) {
        std::memcpy(tail, row, left * sizeof(W));
        row = tail;
      }
      char* out = staged[j / kTileSide][0] + j % kTileSide * 64;
      if constexpr (Operand::kStaged) {
        typename Operand::Part parts[2];
        Operand::widen(row, parts);
        repeat<2>(
            [&]<int h>() { Operand::store(reinterpret_cast<BF16*>(out + h * 1024), parts[h]); });
      } else {
        _mm512_store_si512(out, _mm512_loadu_si512(row));
      }
    }
  };
  const auto multiply = [&](const auto& load_weights) {
    repeat<kParts>([&]<int h>() {
      repeat<kR>([&]<int r>() { load_weights.template operator()<r, h>(); });
      repeat<kG>([&]<int g>() {
        constexpr int activations = kActivations + g % 2;
        tile_load<activations>(x + g * group_bytes + h * 1024, 64);
        repeat<kR>(
            [&]<int r>() { Operand::template dot<r * kG + g, kWeights + r, activations>(); });
      });
    });
    x += kParts * 1024;
  };
  const auto load_staged = [&]<int r, int h>() { tile_load<kWeights + r>(staged[r][h], 64); };

  const bool in_place = !Operand::kStaged && rows == kR * kTileSide;
  int64_t i = 0;
  for (; i + kStep <= k; i += kStep) {
    if (in_place) {
      multiply([&]<int r, int>() {
        tile_load<kWeights + r>(w + r * kTileSide * stride + i, stride * sizeof(W));
      });
    } else {
      stage(i, kStep);
      multiply(load_staged);
    }
  }
  if (i < k) {
    stage(i, k - i);
    multiply(load_staged);
  }

  repeat<kR>([&]<int r>() {
    repeat<kG>([&]<int g>() {
      tile_store<r * kG + g>(sums + (g * group_rows + r * kTileSide * pitch) * kTileSide,
                             pitch * 64);
    });
  });
}

// As dot_tiles, of all columns.
template <typename Operand, int kG = kMaxGroups<Operand>, typename W, typename X>
void dot_tile_groups(const W* w, int64_t stride, int64_t rows, const PackedRows<W, X>& x,
                     typename Operand::Sum* sums, int64_t pitch, int64_t group_rows,
                     int64_t first = 0) {
  for (; first + kG <= x.groups(); first += kG) {
    dot_tiles<Operand, kG>(w, stride, rows, x.k(), x.group(first), x.group_bytes(),
                           sums + first * group_rows * kTileSide, pitch, group_rows);
  }
  if constexpr (kG > 1) {
    if (first < x.groups()) {
      dot_tile_groups<Operand, kG - 1>(w, stride, rows, x, sums, pitch, group_rows, first);
    }
  }
}

// tile[m * kTileWidth + j] for `count` weight rows and all activation rows, from their sums.
template <typename W, typename X>
void finish_tile(const PackedRows<W, X>& x, const typename TileOperand<W, X>::Sum* sums,
                 int64_t group_rows, int64_t count, float* tile) {
  using Operand = TileOperand<W, X>;
  for (int64_t j = 0; j < count; j += kTileSide) {
    for (int64_t first = 0; first < x.rows(); first += 4) {
      __m512i columns[4 * Operand::kColumns];
      for (int q = 0; q < Operand::kColumns; ++q) {
        const int64_t column = first * Operand::kColumns + 4 * q;
        if (column >= x.rows() * Operand::kColumns) break;
        const auto* at =
            sums + (column / kTileSide * group_rows + j) * kTileSide + column % kTileSide;
        __m512i words[4];
        for (int i = 0; i < 4; ++i) {
          const auto quarter = [&](int l) {
            return _mm_load_si128(reinterpret_cast<const __m128i*>(at + (4 * l + i) * kTileSide));
          };
          words[i] = _mm512_castsi128_si512(quarter(0));
          words[i] = _mm512_inserti32x4(words[i], quarter(1), 1);
          words[i] = _mm512_inserti32x4(words[i], quarter(2), 2);
          words[i] = _mm512_inserti32x4(words[i], quarter(3), 3);
        }
        transpose_quarters(words);
        for (int i = 0; i < 4; ++i) columns[4 * q + i] = words[i];
      }
      for (int64_t i = 0; i < std::min<int64_t>(4, x.rows() - first); ++i) {
        _mm512_storeu_ps(tile + (first + i) * kTileWidth + j,
                         Operand::scale(columns + i * Operand::kColumns, x.shift(first + i)));
      }
    }
  }
}

// ---- the stream ------------------------------------------------------------------------------

template <typename W, typename X, typename Epilogue>
  requires kInTiles<W, X>
void stream_weights(const W* weight, int64_t stride, int64_t begin, int64_t end,
                    const PackedRows<W, X>& x, const Epilogue& epilogue) {
  using Operand = TileOperand<W, X>;
  constexpr int64_t kRows = kRowTiles<Operand> * kTileSide;
  // A run is a few pages; longer rows need no company.
  constexpr int64_t kRunBytes = 16384, kLongestRun = 24;
  const int64_t row_bytes = std::max<int64_t>(x.k() * sizeof(W), 1);
  const int64_t longest = std::clamp<int64_t>(kRunBytes / row_bytes, 1, kLongestRun);
  const int64_t group_rows = longest * kRows;
  auto* sums = scratch<typename Operand::Sum, 7>(x.groups() * group_rows * kTileSide);
  float* const tile = scratch<float, 8>(x.rows() * kTileWidth);
  const Tiles registers;
  for (int64_t first = begin; first < end;) {
    const int64_t left = end - first, run = std::clamp<int64_t>(left / kRows, 1, longest);
    const int64_t rows = std::min(left, run * kRows);
    for (int64_t i = 0; i < run; ++i) {
      dot_tile_groups<Operand>(weight + (first + i) * stride, run * stride, std::min(rows, kRows),
                               x, sums + i * kTileSide, run, group_rows);
    }
    for (int64_t i = 0; i < rows; i += kTileWidth) {
      const int64_t count = std::min<int64_t>(kTileWidth, rows - i);
      finish_tile(x, sums + i * kTileSide, group_rows, count, tile);
      epilogue(first + i, count, tile);
    }
    first += rows;
  }
}

#endif

}  // namespace MTP_ISA
}  // namespace mtp::cpu
