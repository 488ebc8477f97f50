// Every K and V byte is read once per request and KV head, in its own dtype and straight from its
// page: the q_len x group query rows that share it are packed and meet it while it is in L1.
//
// Keys come in tiles of 32 positions. A tile's keys are transposed once ([words][16 keys]); then
// both products are small matrix products of register blocks (rows x keys, rows x dims), and the
// softmax is online per tile. The transposition pays even for one head's few rows: dots straight
// from the rows would need as many shuffles to add up their lanes.
//
// A word is an f32, widened from whatever the cache holds, or, where the processor multiplies them,
// a pair of bf16: two dims of a key, or one dim of two neighbouring keys' values. Then keys and
// values stay bf16, and p is rounded to bf16 for the second product; its sum is not.
// With AVX2 a bf16 cache comes in the same pairs, split into f32 in passing.
//
// With AMX nothing is transposed but p: sixteen keys as they lie in their page are one operand of
// the first product and sixteen query rows the other, so scores come out as [key][row] and the
// softmax has a query row in every lane. The second product takes p as [row][key]. A softmax step
// is four tiles there, so that sums stay in tile registers and products wait for each other less.
//
// Memory: an item takes several KV heads of a request and goes through them step by step, since
// with NHD their rows are neighbours. The rows of the next step are asked for in the order of
// memory and in small portions while this one is multiplied; in one go they would fill the queue
// and stall.
//
// Steps and splits of 1024 keys start at absolute multiples, a split's sums start from zero, and
// splits are merged in ascending order whether one thread walks them all or many take one each.
// Within a row every sum runs over ascending d or ascending keys. So a row's bits depend on its
// query, keys and position, never on the rows that share its tile, on the threads or on the pages.
#include "mtp/verify_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "cpu/common/isa.h"
#include "cpu/common/kv_rows.h"
#include "cpu/common/parallel.h"
#include "cpu/common/tiles.h"

namespace mtp::cpu::MTP_ISA {
namespace {

constexpr int kTile = 32;         // keys
constexpr int64_t kSplit = 1024;  // keys per partial result
constexpr int kRows = 64;         // packed query rows of a head per work item
constexpr int kItemRows = 128;    // and of all its heads,
constexpr int kState = 8192;      // with so many outputs
constexpr int kMaxDim = 256;
constexpr int kPanels = kTile / kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

using KeyBits = uint32_t;  // one per key of a tile

// Register blocks: with 16 ymm registers, six rows by one 16-lane vector or two by two; with 32
// zmm registers, six rows by four.
constexpr int kBlockRows = 6;
constexpr int wide(int rows) { return MTP_ISA_LEVEL >= 2 ? 4 : rows <= 2 ? 2 : 1; }

int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

// ---- how the work is cut ---------------------------------------------------------------------

struct Plan {
  int64_t heads = 1;      // KV heads per work item
  int64_t row_tiles = 0;  // of the longest request
  int64_t splits = 0;     // of the longest context
  bool partials = false;  // one work item per split, merged by a second pass
  bool parallel = false;
};

Plan make_plan(const VerifyAttentionParams& p) {
  const KvAppendParams& a = p.append;
  const int64_t group = p.q_heads / a.kv_heads;
  int64_t longest = 0, keys = 0, work = 0;
  for_each_request(a.cu_q_lens, a.batch, a.tokens, [&](int64_t b, RowRange rows) {
    const int64_t count = std::min(rows.end - rows.begin, p.max_q_len);
    if (count <= 0) return;
    const int64_t end = std::min(std::max<int64_t>(a.cache_lens[b], 0) + count, a.table.capacity());
    longest = std::max(longest, count);
    keys = std::max(keys, end);
    work += end * count * p.q_heads * a.head_dim;
  });
  Plan plan;
  const int64_t rows = std::clamp<int64_t>(longest * group, 1, kRows);
  const int64_t padded = std::max<int64_t>(rows, 8), dim = round_up(a.head_dim, 2 * kLanes);
  plan.heads =
      std::clamp<int64_t>(std::min<int64_t>(kState / dim, kItemRows) / padded, 1, a.kv_heads);
  plan.row_tiles = ceil_div<int64_t>(longest * group, kRows);
  plan.splits = std::max<int64_t>(1, ceil_div(keys, kSplit));
  constexpr int64_t kWorthThreads = 1 << 18;
  plan.parallel = work >= kWorthThreads && max_threads() > 1;
  if (!plan.parallel) return plan;
  // Some items for each thread: from splits, and if those do not suffice, from heads.
  const int64_t wanted = 4 * max_threads(), tiles = a.batch * plan.row_tiles;
  plan.partials = plan.splits > 1 && tiles * ceil_div(a.kv_heads, plan.heads) < wanted;
  const int64_t units = tiles * (plan.partials ? plan.splits : 1);
  if (units * ceil_div(a.kv_heads, plan.heads) < wanted) {
    plan.heads = std::clamp<int64_t>(units * a.kv_heads / wanted, 1, plan.heads);
  }
  return plan;
}

// ---- words -----------------------------------------------------------------------------------

// Both products multiply words of 32 bits: one f32, or, where the processor multiplies them, two
// bf16 that are neighbours along the sum.
template <typename Q, typename C>
constexpr bool kPairs = MTP_ISA_LEVEL >= 3 && std::is_same_v<Q, BF16> &&
                        (std::is_same_v<C, BF16> || std::is_same_v<C, F8E4M3>);

template <typename Q, typename C>
constexpr bool kInTiles = MTP_ISA_LEVEL >= 4 && kPairs<Q, C>;

// Tiles per softmax step. With AMX it costs less to wait once for several.
template <typename Q, typename C>
constexpr int kSpan = kInTiles<Q, C> ? 4 : 1;

// AVX2 multiplies f32 but takes two bf16 of the cache at a time: a shift makes the first of a word
// one, a mask the second.
template <bool pairs, typename C>
constexpr bool kHalves = MTP_ISA_LEVEL == 1 && !pairs && std::is_same_v<C, BF16>;
template <bool pairs, typename C>
constexpr int kWordDims = pairs || kHalves<pairs, C> ? 2 : 1;  // of a key, in a word

template <bool pairs>
F32x16 dot(F32x16 a, F32x16 b, F32x16 sum) {
#if MTP_ISA_LEVEL >= 3
  if constexpr (pairs) return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
#endif
  return fmadd(a, b, sum);
}

#if MTP_ISA_LEVEL >= 2

// Which elements of sixteen words exist, if `left` do.
inline __mmask32 first_elements(int64_t left) { return left >= 32 ? ~0u : (1u << left) - 1; }

// Sixteen words of a row; elements outside the mask are zero.
inline __m512i load_words(const float* row, __mmask32 mask) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>(mask), row);
}
template <typename T>
__m512i load_words(const T* row, __mmask32 mask) {
  if constexpr (!std::is_same_v<T, F8E4M3>) return _mm512_maskz_loadu_epi16(mask, row);
  // As bf16: the exponent's bias moves from 7 to 127; the eight subnormals are looked up.
  const __m512i b = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(mask, row));
  const __m512i magnitude = _mm512_and_si512(b, _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(b, _mm512_set1_epi16(0x80)), 8);
  const __m512i subnormal = _mm512_castsi128_si512(
      _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  __m512i x = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  x = _mm512_mask_permutexvar_epi16(x, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)),
                                    magnitude, subnormal);
  x = _mm512_mask_mov_epi16(x, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)),
                            _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(x, sign);
}

// A pair of bf16 or f16 to two f32.
template <typename T>
F32x16 widen_half(__m512i pair, bool odd) {
  if constexpr (std::is_same_v<T, F16>) {
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(odd ? _mm512_srli_epi32(pair, 16) : pair))};
  }
  return {_mm512_castsi512_ps(odd ? _mm512_and_si512(pair, _mm512_set1_epi32(0xffff0000))
                                  : _mm512_slli_epi32(pair, 16))};
}

#endif

template <typename T>
void widen8(const T* in, float* out) {
#if MTP_ISA_LEVEL >= 1
  _mm256_storeu_ps(out, load8(in));
#else
  for (int i = 0; i < 8; ++i) out[i] = to_float(in[i]);
#endif
}

#if MTP_ISA_LEVEL == 1

inline __m256 first_halves(__m256 words) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(words), 16));
}
inline __m256 second_halves(__m256 words) {
  return _mm256_and_ps(words,
                       _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Eight words of a row, or four and zeros; or f32 widened from what the row holds.
template <bool halves, typename T>
__m256 load_words(const T* row, [[maybe_unused]] int64_t left) {
  if constexpr (!halves) return load8(row);
  const float* words = reinterpret_cast<const float*>(row);
  return left >= 16 ? _mm256_loadu_ps(words) : _mm256_zextps128_ps256(_mm_loadu_ps(words));
}

#endif

// A word of each of sixteen keys; where it has halves, half h.
template <bool halves, int h>
F32x16 key_word(const float* keys) {
#if MTP_ISA_LEVEL == 1
  if constexpr (halves) {
    const __m256 lo = _mm256_loadu_ps(keys), hi = _mm256_loadu_ps(keys + 8);
    if constexpr (h == 0) return {first_halves(lo), first_halves(hi)};
    return {second_halves(lo), second_halves(hi)};
  }
#endif
  return load(keys);
}

// Sixteen keys, from rows to out[word * kLanes + key]. Whole chunks of sixteen words are written.
template <bool pairs, typename T>
[[gnu::noinline]] void transpose_keys(const T* const* rows, int64_t dim, float* out) {
#if MTP_ISA_LEVEL >= 2
  constexpr int kChunk = std::is_same_v<T, float> ? 16 : 32;
  for (int64_t d = 0; d < dim; d += kChunk) {
    __m512i r[16];
    const __mmask32 mask = first_elements(dim - d);
    for (int i = 0; i < 16; ++i) r[i] = load_words(rows[i] + d, mask);
    transpose16(r);
    for (int i = 0; i < 16; ++i) {
      if constexpr (pairs || std::is_same_v<T, float>) {
        store(out, {_mm512_castsi512_ps(r[i])});
        out += kLanes;
      } else {
        store(out, widen_half<T>(r[i], false));
        store(out + kLanes, widen_half<T>(r[i], true));
        out += 2 * kLanes;
      }
    }
  }
#elif MTP_ISA_LEVEL == 1
  constexpr bool halves = kHalves<pairs, T>;
  constexpr int kDims = kWordDims<pairs, T>;
  for (int first = 0; first < kLanes; first += 8) {
    const T* const* row = rows + first;
    float* to = out + first;
    for (int64_t d = 0; d < dim; d += 8 * kDims, to += 8 * kLanes) {
      // Pairs of keys four apart share a register: the last exchange of halves is a store.
      const auto half = [&](int i) {
        __m256 x[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) x[j] = load_words<halves>(row[i + j] + d, dim - d);
        const __m256 p0 = _mm256_unpacklo_ps(x[0], x[1]), p1 = _mm256_unpackhi_ps(x[0], x[1]);
        const __m256 p2 = _mm256_unpacklo_ps(x[2], x[3]), p3 = _mm256_unpackhi_ps(x[2], x[3]);
        const __m256 q[4] = {_mm256_shuffle_ps(p0, p2, 0x44), _mm256_shuffle_ps(p0, p2, 0xee),
                             _mm256_shuffle_ps(p1, p3, 0x44), _mm256_shuffle_ps(p1, p3, 0xee)};
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          _mm_storeu_ps(to + j * kLanes + i, _mm256_castps256_ps128(q[j]));
          _mm_storeu_ps(to + (j + 4) * kLanes + i, _mm256_extractf128_ps(q[j], 1));
        }
      };
      half(0);
      half(4);
    }
  }
#else
  for (int64_t d = 0; d < dim; ++d) {
    for (int i = 0; i < kLanes; ++i) out[d * kLanes + i] = to_float(rows[i][d]);
  }
#endif
}

// A row to f32 or, for pairs, to bf16; elements up to `padded` are zero.
template <typename In>
void widen_row(const In* in, int64_t dim, int64_t padded, float* out) {
  for (int64_t d = 0; d < dim; d += 8) widen8(in + d, out + d);
  std::fill(out + dim, out + padded, 0.0f);
}
#if MTP_ISA_LEVEL == 1
inline void widen_row(const BF16* in, int64_t dim, int64_t padded, BF16* out) {
  std::memcpy(out, in, dim * sizeof(BF16));
  std::fill(out + dim, out + padded, BF16{});
}
#elif MTP_ISA_LEVEL >= 3
template <typename In>
void widen_row(const In* in, int64_t dim, int64_t padded, BF16* out) {
  for (int64_t d = 0; d < padded; d += 2 * kLanes) {
    _mm512_storeu_si512(out + d, load_words(in + d, first_elements(dim - d)));
  }
}
#endif

// ---- the two products ------------------------------------------------------------------------

// Loops over registers carry an unroll pragma: unrolled any later, GCC keeps their arrays in memory
// and stores every sum at every step.

// Asks for a line into the second-level cache, which has more requests under way than the first.
[[gnu::always_inline]] inline void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// The K and V rows of a tile of one head: the zero row where there is no slot.
template <typename C>
struct Rows {
  const C* row[2 * kTile];
  KeyBits valid;  // those that exist

  const C** keys() { return row; }
  const C** values() { return row + kTile; }
};

// Later rows, asked for in small portions while others are multiplied: a burst would stall.
constexpr int kPiece = 8;  // steps of a product between two portions
template <typename C>
class Ahead {
 public:
  // Rows [first, last) of so many tiles, so many elements of each from `offset` on, in so many
  // portions.
  Ahead(const Rows<C>* tiles, int count, int first, int last, int64_t offset, int64_t elements,
        int64_t portions)
      : tiles_(tiles),
        count_(count),
        row_(first),
        end_(last),
        offset_(offset),
        bytes_(elements * sizeof(C)),
        portions_(portions),
        parts_((last - first) * ceil_div(bytes_, kPart)) {}
  // Asks for what is left.
  ~Ahead() {
    while (row_ != end_) ask();
  }
  Ahead(const Ahead&) = delete;

  [[gnu::always_inline]] void portion() {
    for (due_ += parts_; due_ >= portions_ && row_ != end_; due_ -= portions_) ask();
  }

 private:
  static constexpr int64_t kPart = 512;

  // A part of the same row of every tile: with AMX, four streams side by side come 5 to 25% faster
  // than one after the other.
  void ask() {
    const int64_t from = done_, to = std::min(from + kPart, bytes_);
    for (int t = 0; t < count_; ++t) {
      const char* row = reinterpret_cast<const char*>(tiles_[t].row[row_] + offset_);
      for (int64_t i = from; i < to; i += 64) prefetch(row + i);
    }
    done_ += kPart;
    if (done_ < bytes_) return;
    done_ = 0;
    ++row_;
  }

  const Rows<C>* tiles_;
  int count_, row_, end_;
  int64_t offset_, bytes_, portions_, parts_, due_ = 0, done_ = 0;
};

// scores[r][key] = q[r] . key, over ascending dims. q's rows have no halves.
template <bool pairs, int R, int W, typename T>
[[gnu::noinline]] void score_block(const float* q, const float* keys, int64_t words, int64_t panel,
                                   Ahead<T>& ahead, float* scores) {
  constexpr bool halves = kHalves<pairs, T>;
  constexpr int kSteps = halves ? 2 : 1;  // per word
  F32x16 sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) sum[r][w] = zero();
  }
  const auto step = [&]<int h>(int64_t i) __attribute__((always_inline)) {
    F32x16 key[W];
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) key[w] = key_word<halves, h>(keys + w * panel + i * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x16 x = broadcast(q[(r * words + i) * kSteps + h]);
#pragma GCC unroll 8
      for (int w = 0; w < W; ++w) sum[r][w] = dot<pairs>(x, key[w], sum[r][w]);
    }
  };
  for (int64_t from = 0; from < words; from += kPiece) {
    ahead.portion();
    const int64_t to = std::min<int64_t>(from + kPiece, words);
    for (int64_t i = from; i < to; ++i) {
      step.template operator()<0>(i);
      if constexpr (halves) step.template operator()<1>(i);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) store(scores + r * kTile + w * kLanes, sum[r][w]);
  }
}

template <bool pairs, int R, typename T>
void score_rows(const float* q, const float* keys, int64_t words, int64_t panel, int panels,
                Ahead<T>& ahead, float* scores) {
  constexpr int W = std::min(wide(R), kPanels);
  int i = 0;
  for (; i + W <= panels; i += W) {
    score_block<pairs, R, W>(q, keys + i * panel, words, panel, ahead, scores + i * kLanes);
  }
  for (; i < panels; ++i) {
    score_block<pairs, R, 1>(q, keys + i * panel, words, panel, ahead, scores + i * kLanes);
  }
}

// Sixteen dims of a key's value or, for pairs, of two keys': then a pair of registers holds dims
// 0-3, 8-11, 16-19, 24-27 and the others of 32. Of halves one register of sixteen dims holds the
// even ones, then the odd.
template <bool pairs, int W, typename T>
struct ValueWords {
  ValueWords(const T* const* rows, int64_t d, [[maybe_unused]] int64_t dim) : rows_(rows), d_(d) {
#if MTP_ISA_LEVEL >= 3
    for (int w = 0; pairs && w < W; w += 2) mask_[w / 2] = first_elements(dim - d - w * kLanes);
#endif
  }

  void load_step(int step, F32x16 value[W]) const {
#if MTP_ISA_LEVEL >= 3
    if constexpr (pairs) {
      const T *first = rows_[2 * step] + d_, *second = rows_[2 * step + 1] + d_;
#pragma GCC unroll 8
      for (int w = 0; w < W; w += 2) {
        const __m512i a = load_words(first + w * kLanes, mask_[w / 2]);
        const __m512i b = load_words(second + w * kLanes, mask_[w / 2]);
        value[w] = {_mm512_castsi512_ps(_mm512_unpacklo_epi16(a, b))};
        value[w + 1] = {_mm512_castsi512_ps(_mm512_unpackhi_epi16(a, b))};
      }
      return;
    }
#endif
    const T* row = rows_[step] + d_;
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
#if MTP_ISA_LEVEL == 1
      if constexpr (kHalves<pairs, T>) {
        const float* words = reinterpret_cast<const float*>(row + w * kLanes);
        value[w] = {first_halves(_mm256_loadu_ps(words)), second_halves(_mm256_loadu_ps(words))};
        continue;
      }
#endif
      value[w] = load(row + w * kLanes);
    }
  }

  const T* const* rows_;
  int64_t d_;
#if MTP_ISA_LEVEL >= 3
  __mmask32 mask_[(W + 1) / 2];
#endif
};

// out[r] = out[r] * keep[r] + sum over ascending keys of p[r][key] * value[key], from dim d.
template <bool pairs, int R, int W, typename T, typename C>
void value_block(const float* p, const float* keep, const T* const* rows, Ahead<C>& ahead,
                 int steps, int64_t d, int64_t dim, int64_t stride, float* out) {
  const ValueWords<pairs, W, T> values(rows, d, dim);
  out += d;
  F32x16 sum[R][W];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) {
      sum[r][w] = load(out + r * stride + w * kLanes) * broadcast(keep[r]);
    }
  }
  for (int from = 0; from < steps; from += kPiece) {
    ahead.portion();
    for (int step = from; step < std::min(from + kPiece, steps); ++step) {
      F32x16 value[W];
      values.load_step(step, value);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const F32x16 x = broadcast(p[r * kTile + step]);
#pragma GCC unroll 8
        for (int w = 0; w < W; ++w) sum[r][w] = dot<pairs>(x, value[w], sum[r][w]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int w = 0; w < W; ++w) store(out + r * stride + w * kLanes, sum[r][w]);
  }
}

template <bool pairs, int R, typename T, typename C>
void value_rows(const float* p, const float* keep, const T* const* rows, Ahead<C>& ahead, int steps,
                int64_t dim, int64_t stride, float* out) {
  constexpr int W = wide(R), kLeast = pairs ? 2 : 1;
  int64_t d = 0;
  for (; d + W * kLanes <= stride; d += W * kLanes) {
    value_block<pairs, R, W>(p, keep, rows, ahead, steps, d, dim, stride, out);
  }
  for (; d < stride; d += kLeast * kLanes) {
    value_block<pairs, R, kLeast>(p, keep, rows, ahead, steps, d, dim, stride, out);
  }
}

// Calls body(first row, constant row count) on near-equal blocks of at most kBlockRows.
template <typename Body>
void for_row_blocks(int rows, const Body& body) {
  const int blocks = ceil_div(rows, kBlockRows);
  for (int i = 0, first = 0; i < blocks; ++i) {
    const int count = rows * (i + 1) / blocks - first;
    switch (count) {
      case 1:
        body(first, std::integral_constant<int, 1>{});
        break;
      case 2:
        body(first, std::integral_constant<int, 2>{});
        break;
      case 3:
        body(first, std::integral_constant<int, 3>{});
        break;
      case 4:
        body(first, std::integral_constant<int, 4>{});
        break;
      case 5:
        body(first, std::integral_constant<int, 5>{});
        break;
      default:
        body(first, std::integral_constant<int, 6>{});
    }
    first += count;
  }
}

// 2^x for x <= 0 or NaN, which is all that a softmax asks for; 0 below 2^-126. To 1.6e-7.
[[gnu::always_inline]] inline F32x16 exp2_nonpositive(F32x16 x) {
#if MTP_ISA_LEVEL >= 2
  const F32x16 r = {_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)};
#else
  const F32x16 n = floor(max(x, broadcast(-126.0f))), r = x - n;
#endif
  F32x16 y = broadcast(1.86895637e-3f);  // minimax on [0, 1) with 2^0 = 1
  y = fmadd(y, r, broadcast(9.01488494e-3f));
  y = fmadd(y, r, broadcast(5.57993017e-2f));
  y = fmadd(y, r, broadcast(0.240165651f));
  y = fmadd(y, r, broadcast(0.693151057f));
  y = fmadd(y, r, broadcast(1.0f));
#if MTP_ISA_LEVEL >= 2
  const __mmask16 normal = _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return {_mm512_maskz_scalef_ps(normal, y.v, x.v)};  // by 2^floor(x)
#else
  return select(x < broadcast(-126.0f), zero(), y * pow2i(n));
#endif
}

float exp2_of(float x) {  // for x <= 0
  float lane[kLanes];
  store(lane, exp2_nonpositive(broadcast(x)));
  return lane[0];
}

// ---- one work item ---------------------------------------------------------------------------

template <typename Q, typename C>
struct alignas(64) Scratch {
  using Wide = std::conditional_t<kWordDims<kPairs<Q, C>, C> == 2, BF16, float>;
  // With AMX the rows of a head are filled up to sixteen and its dims to 32.
  static constexpr int kPadded = kInTiles<Q, C> ? 2 * kItemRows : kItemRows;
  static constexpr int kTiles = kSpan<Q, C>;
  float q[kRows * kMaxDim];         // words: [rows][D], or as query_tiles() says
  float keys[kTile * kMaxDim];      // words: [panel][D][16 keys]
  Wide values[kTile * kMaxDim];     // [key][stride], where rows are not read from their page
  float p[kRows * kTiles * kTile];  // scores, then words of probabilities
  float out[kRows * kMaxDim];       // [rows][stride], of the split at hand
  float sum[kItemRows * kLanes];    // of p, of the split at hand: per lane, or laid out as max
  float max[kItemRows * kLanes];    // by head and row: [head][rows rounded up to 16]
  float keep[kRows];
  float total_out[kRows * kMaxDim];
  float total_max[kPadded], total_sum[kPadded];
  KeyBits seen[kTiles][kRows];          // by row: bit j is key j of the tile
  C new_key[kTiles * kTile * kMaxDim];  // new rows as stored, where that is not the input's dtype
  C new_value[kTiles * kTile * kMaxDim];
  unsigned char zeros[kMaxDim * sizeof(float)];  // in the place of rows that no query sees
};

template <typename Q, typename C>
class Item {
  using Wide = typename Scratch<Q, C>::Wide;
  static constexpr bool pairs = kPairs<Q, C>, tiles = kInTiles<Q, C>;
  static constexpr bool halves = kHalves<pairs, C>;
  static constexpr int kTiles = kSpan<Q, C>, kStep = kTiles * kTile;

 public:
  // KV heads [head, head_end) of request b, whose tokens are `tokens`.
  Item(const VerifyAttentionParams& p, Scratch<Q, C>& scratch, int64_t b, RowRange tokens,
       int64_t head, int64_t head_end, int64_t row_tile)
      : p_(p),
        a_(p.append),
        s_(scratch),
        b_(b),
        first_token_(tokens.begin),
        head_(head),
        heads_(static_cast<int>(head_end - head)) {
    group_ = p.q_heads / a_.kv_heads;
    count_ = std::min(tokens.end - tokens.begin, p.max_q_len);
    first_row_ = row_tile * kRows;
    rows_ = static_cast<int>(std::min<int64_t>(kRows, count_ * group_ - first_row_));
    max_stride_ = static_cast<int>(round_up(std::max(rows_, 0), kLanes));
    out_rows_ = tiles ? max_stride_ : rows_;
    dim_ = a_.head_dim;
    words_ = words_of(dim_);
    stride_ = round_up(dim_, pairs ? 2 * kLanes : kLanes);
    length_ = std::max<int64_t>(a_.cache_lens[b], 0);
    if (rows_ <= 0) return;

    // The keys that any row here sees lie in [begin_, end_).
    const int64_t last_token = (first_row_ + rows_ - 1) / group_;
    end_ = std::min(length_ + (p.tree_mask ? count_ : last_token + 1), a_.table.capacity());
    if (p.window >= 1) {
      begin_ = end_;
      for (int64_t i = first_row_ / group_; i <= last_token; ++i) {
        begin_ = std::min(begin_, position(i) - p.window + 1);
      }
      begin_ = std::clamp<int64_t>(begin_, 0, std::min(length_, end_));
      if (!p.tree_mask) begin_ = std::max(begin_, position(first_row_ / group_) - p.window + 1);
    }
    // Those that all rows see include [all_begin_, all_end_).
    all_end_ = std::min(p.tree_mask ? length_ : length_ + first_row_ / group_ + 1, end_);
    if (p.window >= 1) {
      for (int64_t i = first_row_ / group_; i <= last_token; ++i) {
        all_begin_ = std::max(all_begin_, position(i) - p.window + 1);
      }
    }
  }

  bool empty() const { return rows_ <= 0; }
  int64_t first_split() const { return std::min(begin_, std::max<int64_t>(end_ - 1, 0)) / kSplit; }
  int64_t last_split() const { return std::max(first_split() + 1, ceil_div(end_, kSplit)); }

  void load_queries() {
    const Q* q = static_cast<const Q*>(p_.q);
    if constexpr (tiles) std::fill_n(s_.q, heads_ * max_stride_ * stride_ / 2, 0.0f);
    for_each_row([&](int row, int h, int r) {
      const Q* in = q + token(r) * p_.q_token_stride + q_head(h, r) * p_.q_head_stride;
      float* words = s_.q + row * words_;
      if constexpr (tiles) {
        words = query_tiles(h, r / kLanes) + r % kLanes;
        for (int64_t i = 0; i < words_; ++i) std::memcpy(words + i * kLanes, in + 2 * i, 4);
      } else if constexpr (pairs) {
        std::memcpy(words, in, dim_ * sizeof(Q));
      } else {
        widen_row(in, dim_, dim_, words);
      }
      s_.total_max[row] = -kInfinity;
    });
    std::memset(s_.zeros, 0, sizeof(s_.zeros));
  }

  // Leaves the split's maxima, sums per lane and unnormalised outputs in the scratch. The item
  // goes on to position `stop`.
  void attend_split(int64_t split, int64_t stop) {
    [[maybe_unused]] const std::conditional_t<tiles, Tiles, int> registers{};
    std::fill_n(s_.out, heads_ * out_rows_ * stride_, 0.0f);
    std::fill_n(s_.sum, tiles ? heads_ * max_stride_ : heads_ * rows_ * kLanes, 0.0f);
    std::fill_n(s_.max, heads_ * max_stride_, -kInfinity);
    const int64_t end = std::min(end_, (split + 1) * kSplit);
    for (int64_t start = first_step(split); start < end; start += kStep) attend_step(start, stop);
  }

  void attend_partial(int64_t split, int64_t splits) {
    find_first_rows(split);
    load_queries();
    attend_split(split, std::min(end_, (split + 1) * kSplit));
    for_each_row([&](int row, int h, int r) {
      float* to = partial(h, r, split, splits);
      std::memcpy(to, s_.out + row * stride_, stride_ * sizeof(float));
      to[stride_] = s_.max[h * max_stride_ + r];
      to[stride_ + 1] = row_sum(h, r);
    });
  }

  void merge_partials(int64_t splits) {
    std::fill_n(s_.total_max, heads_ * out_rows_, -kInfinity);
    for (int64_t split = first_split(); split < last_split(); ++split) {
      for_each_row([&](int row, int h, int r) {
        const float* from = partial(h, r, split, splits);
        merge(row, from[stride_], from[stride_ + 1], from);
      });
    }
    store_total();
  }

  void attend_all() {
    find_first_rows(first_split());
    load_queries();
    for (int64_t split = first_split(); split < last_split(); ++split) {
      attend_split(split, end_);
      for_each_row([&](int row, int h, int r) {
        merge(row, s_.max[h * max_stride_ + r], row_sum(h, r), s_.out + row * stride_);
      });
    }
    store_total();
  }

  // This item's part of the append: all new tokens of its heads.
  void append() {
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t position = length_ + i;
      const int64_t page = a_.table.page(b_, position / a_.table.page_size);
      if (page < 0) continue;
      const int64_t slot = position % a_.table.page_size;
      for (int h = 0; h < heads_; ++h) {
        encode_row(new_row(a_.k, a_.k_token_stride, a_.k_head_stride, i, h),
                   static_cast<C*>(a_.k_cache.data) + a_.k_cache.offset(page, slot, head_ + h),
                   dim_, k_scale(h));
        encode_row(new_row(a_.v, a_.v_token_stride, a_.v_head_stride, i, h),
                   static_cast<C*>(a_.v_cache.data) + a_.v_cache.offset(page, slot, head_ + h),
                   dim_, v_scale(h));
      }
    }
  }

 private:
  // Calls body(index in the scratch, head, row of the head).
  template <typename Body>
  void for_each_row(const Body& body) const {
    for (int h = 0; h < heads_; ++h) {
      for (int r = 0; r < rows_; ++r) body(h * out_rows_ + r, h, r);
    }
  }
  float row_sum(int h, int r) const {
    if constexpr (tiles) return s_.sum[h * max_stride_ + r];
    return reduce_add(load(s_.sum + (h * rows_ + r) * kLanes));
  }

  static int64_t words_of(int64_t n) { return pairs ? n / 2 : n; }
  int64_t first_step(int64_t split) const {
    return std::max(begin_, split * kSplit) / kStep * kStep;
  }
  int64_t token(int r) const { return first_token_ + (first_row_ + r) / group_; }
  int64_t q_head(int h, int r) const { return (head_ + h) * group_ + (first_row_ + r) % group_; }
  float k_scale(int h) const {
    return a_.k_scale ? a_.k_scale[(head_ + h) * a_.k_scale_stride] : 1.0f;
  }
  float v_scale(int h) const {
    return a_.v_scale ? a_.v_scale[(head_ + h) * a_.v_scale_stride] : 1.0f;
  }

  const Q* new_row(const void* rows, int64_t token_stride, int64_t head_stride, int64_t i,
                   int h) const {
    return static_cast<const Q*>(rows) + (first_token_ + i) * token_stride +
           (head_ + h) * head_stride;
  }

  // Partial results: `stride_` outputs, maximum, sum, for each row and split.
  float* partial(int h, int r, int64_t split, int64_t splits) const {
    return p_.workspace + ((token(r) * p_.q_heads + q_head(h, r)) * splits + split) * (stride_ + 2);
  }

  void merge(int row, float max, float sum, const float* out) {
    float* total = s_.total_out + row * stride_;
    if (s_.total_max[row] == -kInfinity) {  // nothing yet
      std::memcpy(total, out, stride_ * sizeof(float));
      s_.total_max[row] = max;
      s_.total_sum[row] = sum;
      return;
    }
    const float top = std::max(s_.total_max[row], max);
    const float keep = exp2_of(s_.total_max[row] - top), add = exp2_of(max - top);
    for (int64_t d = 0; d < stride_; d += kLanes) {
      store(total + d, fmadd(load(out + d), broadcast(add), load(total + d) * broadcast(keep)));
    }
    s_.total_sum[row] = s_.total_sum[row] * keep + sum * add;
    s_.total_max[row] = top;
  }

  void store_total() {
    Q* out = static_cast<Q*>(p_.out);
    for_each_row([&](int row, int h, int r) {
      float max = s_.total_max[row], sum = s_.total_sum[row], keep = 1.0f;
      if (p_.sinks) {
        const float sink = p_.sinks[q_head(h, r)] * kLog2E;
        const float top = std::max(max, sink);
        const float base = top == -kInfinity ? 0.0f : top;
        keep = exp2_of(max - base);
        sum = sum * keep + exp2_of(sink - base);
        max = top;
      }
      const int64_t at = token(r) * p_.q_heads + q_head(h, r);
      p_.lse[at] = sum == 0.0f ? -kInfinity : max * kLn2 + std::log(sum);
      const F32x16 factor = broadcast(sum == 0.0f ? 0.0f : keep / sum * v_scale(h));
      float* total = s_.total_out + row * stride_;
      if constexpr (pairs || halves) restore_order(total);
      for (int64_t d = 0; d < dim_; d += kLanes) {
        store_partial(out + at * dim_ + d, load(total + d) * factor, dim_ - d);
      }
    });
  }

  // The dims of an output in the order of memory; see ValueWords.
  void restore_order([[maybe_unused]] float* row) const {
#if MTP_ISA_LEVEL >= 3
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int64_t d = 0; d < stride_; d += 2 * kLanes) {
      const __m512 a = load(row + d).v, b = load(row + d + kLanes).v;
      store(row + d, {_mm512_permutex2var_ps(a, low, b)});
      store(row + d + kLanes, {_mm512_permutex2var_ps(a, high, b)});
    }
#elif MTP_ISA_LEVEL == 1
    for (int64_t d = 0; d < stride_; d += kLanes) {
      const F32x16 x = load(row + d);
      const __m256 a = _mm256_unpacklo_ps(x.lo, x.hi), b = _mm256_unpackhi_ps(x.lo, x.hi);
      store(row + d, {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)});
    }
#endif
  }

  // Under a tree mask: the new tokens that token i names, by index.
  uint64_t tree_bits(int64_t i) const {
    const uint64_t all = count_ >= 64 ? ~uint64_t{0} : (uint64_t{1} << count_) - 1;
    return static_cast<uint64_t>(p_.tree_mask[first_token_ + i]) & all;
  }

  int64_t position(int64_t i) const {
    return length_ + (p_.tree_mask ? __builtin_popcountll(tree_bits(i)) - 1 : i);
  }

  // The keys of a tile that some row sees, and those that all rows see.
  struct Seen {
    KeyBits any, all;
  };

  // Finds the rows of the tile at `start` and head h.
  void find_rows(int64_t start, int h, Rows<C>& rows) {
    const C **keys = rows.keys(), **values = rows.values();
    const int64_t page_size = a_.table.page_size;
    const int64_t end = std::min<int64_t>(kTile, end_ - start);
    rows.valid = 0;
    int64_t entry = start / page_size, slot = start % page_size;
    for (int64_t j = 0; j < end; ++entry, slot = 0) {  // page by page
      const int64_t stop = std::min(end, j + page_size - slot);
      const int64_t page = a_.table.page(b_, entry);
      if (page < 0) {
        for (; j < stop; ++j) keys[j] = values[j] = zero_row<C>();
        continue;
      }
      rows.valid |= bit_range(j, stop);
      const C* key =
          static_cast<const C*>(a_.k_cache.data) + a_.k_cache.offset(page, slot, head_ + h);
      const C* value =
          static_cast<const C*>(a_.v_cache.data) + a_.v_cache.offset(page, slot, head_ + h);
      for (const int64_t cached = std::min(stop, length_ - start); j < cached; ++j) {
        keys[j] = key;
        values[j] = value;
        key += a_.k_cache.slot_stride;
        value += a_.v_cache.slot_stride;
      }
      for (; j < stop; ++j) {
        if constexpr (std::is_same_v<Q, C>) {
          const int64_t i = start + j - length_;
          keys[j] = new_row(a_.k, a_.k_token_stride, a_.k_head_stride, i, h);
          values[j] = new_row(a_.v, a_.v_token_stride, a_.v_head_stride, i, h);
        } else {
          keys[j] = s_.new_key + (start + j) % kStep * dim_;
          values[j] = s_.new_value + (start + j) % kStep * dim_;
        }
      }
    }
    for (int64_t j = std::max<int64_t>(end, 0); j < kTile; ++j) {
      keys[j] = values[j] = zero_row<C>();
    }
  }

  // From the rows of the tile at `start` and the head before, and what was seen of them, those of
  // head h.
  void next_head(int64_t start, int h, Seen seen, Rows<C>& rows) {
    if ((rows.valid & seen.any) != ~KeyBits{0} || start + kTile > length_) {
      return find_rows(start, h, rows);
    }
    for (int j = 0; j < kTile; ++j) {
      rows.keys()[j] += a_.k_cache.head_stride;
      rows.values()[j] += a_.v_cache.head_stride;
    }
  }

  // The tiles of a step that any row here sees: `count` from `first` on.
  struct Step {
    int64_t first;
    int count;
  };
  Step step_at(int64_t start) const {
    const int64_t first = std::max(start, begin_ / kTile * kTile);
    return {first,
            static_cast<int>(ceil_div(std::min(start + kStep, end_) - first, int64_t{kTile}))};
  }

  void find_coming(int64_t start) {
    const Step step = step_at(start);
    for (int t = 0; t < step.count; ++t) find_rows(step.first + t * kTile, 0, coming_[t]);
    coming_count_ = step.count;
  }
  void find_first_rows(int64_t split) {
    find_coming(first_step(split));
    for (int h = 0; h < heads_; ++h) ahead_of(h, 1);  // all at once, as it ends
  }

  // What to ask for while head h is attended to: its share of the coming tiles. In the order of
  // memory: where the heads of a slot are neighbours, some slots of all heads, which on Zen 3 come
  // a quarter to a third faster than all slots of one head.
  Ahead<C> ahead_of(int h, int64_t portions) const {
    const int all = coming_count_ > 0 ? 2 * kTile : 0;
    if (a_.k_cache.head_stride != dim_) {
      return {coming_, coming_count_, 0, all, h * a_.k_cache.head_stride, dim_, portions};
    }
    const int first = all * h / heads_, last = all * (h + 1) / heads_;
    return {coming_, coming_count_, first, last, 0, heads_ * dim_, portions};
  }

  // How many times both products ask, for one head.
  int64_t portions(int panels, int end) const {
    const int blocks = ceil_div(rows_, kBlockRows), at_once = wide(ceil_div(rows_, blocks));
    const int64_t words = dim_ / kWordDims<pairs, C>;
    const int64_t in_scores =
        ceil_div(panels, std::min(at_once, kPanels)) * ceil_div<int64_t>(words, kPiece);
    const int64_t in_values = ceil_div<int64_t>(stride_, at_once * kLanes) *
                              ceil_div(ceil_div(end, pairs ? 2 : 1), kPiece);
    return blocks * (in_scores + in_values);
  }

  // New rows of an e4m3 cache are seen as stored: quantised here, into the scratch.
  void encode_new_rows(int64_t start, int h) {
    if constexpr (!std::is_same_v<Q, C>) {
      for (int64_t pos = std::max(start, length_); pos < std::min(start + kTile, end_); ++pos) {
        encode_row(new_row(a_.k, a_.k_token_stride, a_.k_head_stride, pos - length_, h),
                   s_.new_key + pos % kStep * dim_, dim_, k_scale(h));
        encode_row(new_row(a_.v, a_.v_token_stride, a_.v_head_stride, pos - length_, h),
                   s_.new_value + pos % kStep * dim_, dim_, v_scale(h));
      }
    }
  }

  // Bits [from, to) of a tile, for positions that may lie outside it.
  static KeyBits bit_range(int64_t from, int64_t to) {
    const auto below = [](int64_t n) -> KeyBits {
      return n <= 0 ? 0 : n >= kTile ? ~KeyBits{0} : (KeyBits{1} << n) - 1;
    };
    return below(to) & ~below(from);
  }

  // Fills bits[row], unless all rows see the whole tile.
  Seen find_seen(int64_t start, KeyBits valid, KeyBits* row_bits) {
    if (valid == ~KeyBits{0} && start >= all_begin_ && start + kTile <= all_end_) {
      return {valid, valid};
    }
    Seen seen{0, ~KeyBits{0}};
    int64_t last = -1;
    KeyBits bits = 0;
    for (int r = 0; r < rows_; ++r) {
      const int64_t i = (first_row_ + r) / group_;
      if (i != last) {
        last = i;
        const int64_t window_begin = p_.window >= 1 ? position(i) - p_.window + 1 : 0;
        const int64_t cached_end = p_.tree_mask ? length_ : length_ + i + 1;
        bits = bit_range(window_begin - start, cached_end - start);
        if (p_.tree_mask && start + kTile > length_) bits |= tree_tile(i, start, window_begin);
        bits &= valid;
        seen.any |= bits;
        seen.all &= bits;
      }
      row_bits[r] = bits;
    }
    return seen;
  }

  KeyBits tree_tile(int64_t i, int64_t start, int64_t window_begin) const {
    uint64_t bits = tree_bits(i);
    if (p_.window >= 1) {
      for (int64_t j = 0; j < count_; ++j) {
        if (position(j) < window_begin) bits &= ~(uint64_t{1} << j);
      }
    }
    const int64_t shift = length_ - start;
    if (shift >= 0) return static_cast<KeyBits>(bits << shift);
    return shift > -64 ? static_cast<KeyBits>(bits >> -shift) : 0;
  }

  void attend_step(int64_t start, int64_t stop) {
    const Step step = step_at(start);
    Seen seen[kTiles];
    for (int t = 0; t < step.count; ++t) {
      rows_of_[t] = coming_[t];
      seen[t] = find_seen(step.first + t * kTile, rows_of_[t].valid, s_.seen[t]);
    }
    coming_count_ = 0;
    if (start + kStep < stop) find_coming(start + kStep);
    for (int h = 0; h < heads_; ++h) {
      for (int t = 0; t < step.count; ++t) {
        const int64_t tile = step.first + t * kTile;
        if (h > 0) next_head(tile, h, seen[t], rows_of_[t]);
        if (tile + kTile > length_) encode_new_rows(tile, h);
      }
      if constexpr (tiles) {
        this->attend_head_tiles(step, h, seen);
      } else {
        attend_head(h, seen[0], static_cast<int>(std::min<int64_t>(kTile, end_ - step.first)));
      }
    }
  }

  void attend_head(int h, Seen seen, int end) {
    Rows<C>& rows = rows_of_[0];
    constexpr int kDims = kWordDims<pairs, C>;
    const int64_t panel = round_up(dim_, kLanes * kDims) / kDims * kLanes;
    const int panels = ceil_div(end, kLanes);
    Ahead<C> ahead = ahead_of(h, portions(panels, end));
    for (int i = 0; i < panels; ++i) {
      transpose_keys<pairs>(rows.keys() + i * kLanes, dim_, s_.keys + i * panel);
    }
    for_row_blocks(rows_, [&](int r, auto count) {
      score_rows<pairs, count>(s_.q + (h * rows_ + r) * words_, s_.keys, dim_ / kDims, panel,
                               panels, ahead, s_.p + r * kTile);
    });
    update_softmax(h, ceil_div(panels, 2) * 2, seen.all == ~KeyBits{0});

    clear_unseen(seen, rows);
    // One block of rows reads each value once, so widening in passing is cheaper.
    const bool in_place = std::is_same_v<C, Wide> || (!pairs && rows_ <= kBlockRows);
    if (in_place && (pairs || stride_ == dim_)) {
      return add_values<C>(h, rows.values(), seen, end, ahead);
    }
    const Wide* wide_rows[kTile];
    for (int j = 0; j < kTile; ++j) {
      wide_rows[j] = s_.values + j * stride_;
      if (j < round_up(end, 2)) widen_row(rows.values()[j], dim_, stride_, s_.values + j * stride_);
    }
    add_values<Wide>(h, wide_rows, seen, end, ahead);
  }

  void clear_unseen(Seen seen, Rows<C>& rows) const {
    for (KeyBits unseen = ~seen.any; unseen != 0; unseen &= unseen - 1) {
      rows.values()[__builtin_ctzll(unseen)] = zero_row<C>();
    }
  }

  // 0 * inf of a key that a row does not see must stay out of its sum: whether there is none.
  template <typename T>
  bool sees_finite(const T* const* values, Seen seen) const {
    bool finite = true;
    for (KeyBits mixed = seen.any & ~seen.all; mixed != 0; mixed &= mixed - 1) {
      finite &= all_finite(values[__builtin_ctzll(mixed)]);
    }
    return finite;
  }
  // If there is: the values that a row sees.
  template <typename T>
  void own_rows(KeyBits seen, const T* const* values, const T* own[kTile]) const {
    for (int j = 0; j < kTile; ++j) own[j] = seen >> j & 1 ? values[j] : zero_row<T>();
  }

  template <typename T>
  void add_values(int h, const T* const* rows, Seen seen, int end, Ahead<C>& ahead) {
    const int steps = pairs ? ceil_div(end, 2) : end;
    float* out = s_.out + h * rows_ * stride_;
    const float* keep = s_.keep;
    if (sees_finite(rows, seen)) {
      for_row_blocks(rows_, [&](int r, auto count) {
        value_rows<pairs, count>(s_.p + r * kTile, keep + r, rows, ahead, steps, dim_, stride_,
                                 out + r * stride_);
      });
      return;
    }
    for (int r = 0; r < rows_; ++r) {
      const T* own[kTile];
      own_rows(s_.seen[0][r], rows, own);
      value_rows<pairs, 1, T>(s_.p + r * kTile, keep + r, own, ahead, steps, dim_, stride_,
                              out + r * stride_);
    }
  }

  template <typename T>
  bool all_finite(const T* row) const {
    F32x16 bad = zero();
    for (int64_t d = 0; d < dim_; d += kLanes) {
      bad = bad + load_partial(row + d, dim_ - d) * zero();
    }
    return reduce_add(bad) == 0.0f;
  }

  template <typename T>
  const T* zero_row() const {
    return reinterpret_cast<const T*>(s_.zeros);
  }

  // Scores to probabilities relative to the row's new maximum; `keep` rescales what came before.
  // Both count in powers of two.
  void update_softmax(int h, int panels, bool whole) {
    const F32x16 scale = broadcast(p_.scale * k_scale(h) * (p_.softcap > 0.0f ? 1.0f : kLog2E));
    float *max = s_.max + h * max_stride_, *sum = s_.sum + h * rows_ * kLanes;
    float top[kRows], base[kRows];
    std::copy_n(max, max_stride_, top);
    for (int r = 0; r < rows_; ++r) {
      float* row = s_.p + r * kTile;
      F32x16 best = broadcast(-kInfinity);
      for (int w = 0; w < panels; ++w) {
        F32x16 x = load(row + w * kLanes) * scale;
        if (p_.softcap > 0.0f) {
          x = broadcast(p_.softcap * kLog2E) * tanh(x / broadcast(p_.softcap));
        }
        if (!whole) {
          x = select(mask_from_bits(s_.seen[0][r] >> (w * kLanes) & 0xffff), x,
                     broadcast(-kInfinity));
        }
        store(row + w * kLanes, x);
        best = cpu::max(best, x);
      }
      // Few tiles after a row's first ones do, and reducing lanes is slow. A NaN does.
      const bool raises = to_bits(best <= broadcast(top[r])) != 0xffff;
      if (raises) top[r] = reduce_max(best);
    }
    for (int r = 0; r < rows_; r += kLanes) {
      const F32x16 old = load(max + r), now = cpu::max(old, load(top + r));
      const F32x16 finite = select(now == broadcast(-kInfinity), zero(), now);
      store(max + r, now);
      store(base + r, finite);
      store(s_.keep + r, exp2_nonpositive(old - finite));
    }
    for (int r = 0; r < rows_; ++r) {
      float* row = s_.p + r * kTile;
      F32x16 total = load(sum + r * kLanes) * broadcast(s_.keep[r]);
      for (int w = 0; w < panels; w += 2) {
        const F32x16 x = exp2_nonpositive(load(row + w * kLanes) - broadcast(base[r]));
        const F32x16 y = exp2_nonpositive(load(row + (w + 1) * kLanes) - broadcast(base[r]));
        total = total + x + y;
        store_probabilities(x, y, row + words_of(w * kLanes));
      }
      store(sum + r * kLanes, total);
    }
  }

  static void store_probabilities(F32x16 x, F32x16 y, float* out) {
#if MTP_ISA_LEVEL >= 3
    if constexpr (pairs) return store(out, {(__m512)_mm512_cvtne2ps_pbh(y.v, x.v)});
#endif
    store(out, x);
    store(out + kLanes, y);
  }

  // ---- with AMX ----

  // Sixteen query rows of head h, as pairs: [stride_ / 32][16 pairs][16 rows].
  float* query_tiles(int h, int group) {
    return s_.q + (h * max_stride_ / kLanes + group) * (stride_ / 2 * kLanes);
  }

#if MTP_ISA_LEVEL >= 4
  static constexpr int kTileWords = kLanes * kLanes;

  void attend_head_tiles(Step step, int h, const Seen* seen) {
    const int groups = max_stride_ / kLanes, chunks = static_cast<int>(stride_ / (2 * kLanes));
    const bool in_place =
        std::is_same_v<C, BF16> && dim_ == stride_ && a_.table.page_size % kLanes == 0;
    Ahead<C> ahead = ahead_of(
        h, step.count * (kLanes / 2 * groups + (kPanels + kPacks) * chunks * ceil_div(groups, 2)));
    bool whole = true;
    for (int t = 0; t < step.count; ++t) {
      const bool cached = step.first + (t + 1) * kTile <= length_;
      score_tile(h, t, groups, in_place && cached && rows_of_[t].valid == ~KeyBits{0}, ahead);
      whole &= seen[t].all == ~KeyBits{0};
    }
    for (int g = 0; g < groups; ++g) {
      if (whole && !(p_.softcap > 0.0f)) {
        update_softmax_tiles<true>(h, g, step.count, seen, ahead);
      } else {
        update_softmax_tiles<false>(h, g, step.count, seen, ahead);
      }
    }
    const C* const* values[kTiles];
    bool finite = true;
    for (int t = 0; t < step.count; ++t) {
      clear_unseen(seen[t], rows_of_[t]);
      values[t] = rows_of_[t].values();
      finite &= sees_finite(values[t], seen[t]);
    }
    float* out = s_.out + h * out_rows_ * stride_;
    if (finite) {
      int g = 0;
      for (; g + 2 <= groups; g += 2, out += 2 * kLanes * stride_) {
        add_value_tiles<2>(g, step.count, values, out, ahead);
      }
      if (g < groups) add_value_tiles<1>(g, step.count, values, out, ahead);
      return;
    }
    for (int r = 0; r < rows_; ++r) {
      const C* own[kTiles][kTile];
      for (int t = 0; t < step.count; ++t) {
        const bool all = seen[t].all == ~KeyBits{0};
        own_rows(all ? ~KeyBits{0} : s_.seen[t][r], rows_of_[t].values(), own[t]);
        values[t] = own[t];
      }
      alignas(64) float sums[kLanes * kMaxDim];  // of its group
      const int first = r / kLanes * kLanes;
      std::memcpy(sums, out + first * stride_, kLanes * stride_ * sizeof(float));
      add_value_tiles<1>(r / kLanes, step.count, values, sums, ahead);
      std::memcpy(out + r * stride_, sums + (r - first) * stride_, stride_ * sizeof(float));
    }
  }

  // Of a group of rows: scores [32 keys][16 rows], then bf16 probabilities [16 rows][32 keys].
  float* tile_of(int g, int t) { return s_.p + (g * kTiles + t) * kPanels * kTileWords; }

  // `even`: sixteen keys of the cache lie in one page.
  void score_tile(int h, int t, int groups, bool even, Ahead<C>& ahead) {
    const C* const* keys = rows_of_[t].keys();
    Panels panels{{}, a_.k_cache.slot_stride * static_cast<int64_t>(sizeof(C)), 64};
    if (!even) panels.key_stride = 64, panels.step = kTileWords * sizeof(float);
    float* staged = s_.keys;
    for (int i = 0; i < kPanels; ++i, keys += kLanes) {
      panels.first[i] =
          even ? reinterpret_cast<const char*>(keys[0]) : reinterpret_cast<const char*>(staged);
      for (int64_t d = 0; !even && d < stride_; d += 2 * kLanes) {
        const __mmask32 mask = first_elements(dim_ - d);
        for (int j = 0; j < kLanes; ++j, staged += kLanes) {
          _mm512_store_si512(staged, load_words(keys[j] + d, mask));
        }
      }
    }
    int g = 0;
    for (; g + 2 <= groups; g += 2) score_groups<2>(h, g, t, panels, ahead);
    if (g < groups) score_groups<1>(h, g, t, panels, ahead);
  }

  struct Panels {  // sixteen keys each
    const char* first[kPanels];
    int64_t key_stride, step;  // bytes, from key to key and from 32 dims to the next
  };

  template <int G>
  void score_groups(int h, int g, int t, const Panels& panels, Ahead<C>& ahead) {
    const int64_t steps = stride_ / (2 * kLanes), group = steps * kTileWords;
    const float* q = query_tiles(h, g);
    repeat<kPanels * G>([]<int i>() { tile_zero<i>(); });
    for (int64_t step = 0; step < steps; ++step, q += kTileWords) {
      repeat<G>([&]<int i>() { tile_load<4 + i>(q + i * group, 64); });
      repeat<kPanels>([&]<int panel>() {
        ahead.portion();
        tile_load<6 + panel>(panels.first[panel] + step * panels.step, panels.key_stride);
        repeat<G>([&]<int i>() { tile_dot<i * kPanels + panel, 6 + panel, 4 + i>(); });
      });
    }
    repeat<kPanels * G>([&]<int i>() {
      tile_store<i>(tile_of(g + i / kPanels, t) + i % kPanels * kTileWords, 64);
    });
  }

  // As update_softmax, with a query row per lane, for all tiles of a step; scales what came before.
  template <bool plain>
  void update_softmax_tiles(int h, int g, int count, const Seen* seen, Ahead<C>& ahead) {
    const F32x16 scale = broadcast(p_.scale * k_scale(h) * (p_.softcap > 0.0f ? 1.0f : kLog2E));
    const int first = g * kLanes, rows = std::min(rows_ - first, kLanes);
    float *max = s_.max + h * max_stride_ + first, *sum = s_.sum + h * max_stride_ + first;
    constexpr int kChains = 4;
    F32x16 best[kChains];
    for (F32x16& x : best) x = broadcast(-kInfinity);
    for (int t = 0; t < count; ++t) {
      float* p = tile_of(g, t);
      __m512i bits = _mm512_set1_epi32(-1);
      if (seen[t].all != ~KeyBits{0}) {
        bits = _mm512_maskz_loadu_epi32(first_lanes(rows).v, s_.seen[t] + first);
      }
      for (int j = 0; j < kTile; j += kChains) {
#pragma GCC unroll 4
        for (int i = 0; i < kChains; ++i, p += kLanes) {
          F32x16 x = load(p) * scale;
          if constexpr (!plain) {
            if (p_.softcap > 0.0f) {
              x = broadcast(p_.softcap * kLog2E) * tanh(x / broadcast(p_.softcap));
            }
            const __m512i key = _mm512_set1_epi32(static_cast<int>(KeyBits{1} << (j + i)));
            x = select({_mm512_test_epi32_mask(bits, key)}, x, broadcast(-kInfinity));
          }
          store(p, x);
          best[i] = cpu::max(best[i], x);
        }
      }
    }
    const F32x16 old = load(max),
                 top = cpu::max(cpu::max(best[0], best[1]), cpu::max(best[2], best[3]));
    const F32x16 now = cpu::max(old, top);
    const F32x16 base = select(now == broadcast(-kInfinity), zero(), now);
    const F32x16 keep = exp2_nonpositive(old - base);
    store(max, now);
    F32x16 total = load(sum) * keep;
    for (int t = 0; t < count; ++t) {
      float* p = tile_of(g, t);
      __m512i words[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        if (j % 2 == 0) ahead.portion();
        const F32x16 x = exp2_nonpositive(load(p + 2 * j * kLanes) - base);
        const F32x16 y = exp2_nonpositive(load(p + (2 * j + 1) * kLanes) - base);
        total = total + (x + y);
        words[j] = interleave((__m512i)_mm512_cvtne2ps_pbh(y.v, x.v));
      }
      transpose16(words);
      for (int r = 0; r < kLanes; ++r) _mm512_store_si512(p + r * kLanes, words[r]);
    }
    store(sum, total);

    const uint32_t same = to_bits(keep == broadcast(1.0f)), used = to_bits(first_lanes(rows));
    if ((used & ~same) == 0) return;
    float factor[kLanes];
    store(factor, keep);
    float* out = s_.out + (h * out_rows_ + first) * stride_;
    for (int r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < stride_; d += kLanes, out += kLanes) {
        store(out, load(out) * broadcast(factor[r]));
      }
    }
  }

  // The sixteen-bit elements of the two halves in turn.
  static __m512i interleave(__m512i halves) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(low, 16), low);
    return _mm512_permutexvar_epi16(_mm512_add_epi32(both, _mm512_set1_epi32(16 << 16)), halves);
  }

  // Adds p . values to the outputs of G groups of rows.
  template <int G>
  void add_value_tiles(int g, int count, const C* const* const* values, float* out,
                       Ahead<C>& ahead) {
    int64_t d = 0;
    if constexpr (G == 1) {
      for (; d + 4 * kLanes <= stride_; d += 4 * kLanes) {
        add_value_block<1, 4>(g, count, values, d, out + d, ahead);
      }
    }
    for (; d < stride_; d += 2 * kLanes) {
      add_value_block<G, 2>(g, count, values, d, out + d, ahead);
    }
  }

  // Of sixteen dims D times. The next tile's values are packed before this one's are multiplied:
  // what was just stored is slow to load as a tile.
  template <int G, int D>
  void add_value_block(int g, int count, const C* const* const* values, int64_t d, float* out,
                       Ahead<C>& ahead) {
    const int64_t row_bytes = stride_ * sizeof(float);
    const auto at = [&](int i) { return out + i / D * kLanes * stride_ + i % D * kLanes; };
    const auto packed = [&](int t) { return s_.values + t % 2 * D * 2 * kTileWords; };
    repeat<G * D>([&]<int i>() { tile_load<i>(at(i), row_bytes); });
    pack_values<D>(values[0], d, packed(0), ahead);
    for (int t = 0; t < count; ++t) {
      if (t + 1 < count) pack_values<D>(values[t + 1], d, packed(t + 1), ahead);
      repeat<G>([&]<int i>() { tile_load<4 + i>(tile_of(g + i, t), 64); });
      repeat<D>([&]<int j>() {
        tile_load<6 + j % 2>(packed(t) + j * 2 * kTileWords, 64);
        repeat<G>([&]<int i>() { tile_dot<i * D + j, 4 + i, 6 + j % 2>(); });
      });
    }
    repeat<G * D>([&]<int i>() { tile_store<i>(at(i), row_bytes); });
  }

  // Pairs of keys' values from dim d on, in the order of ValueWords: [D][16 pairs][16].
  static constexpr int kPacks = 4;  // portions per 32 dims
  template <int D>
  void pack_values(const C* const* values, int64_t d, BF16* tile, Ahead<C>& ahead) {
    for (int i = 0; i < D; i += 2, d += 2 * kLanes, tile += 2 * kTileWords) {
      const __mmask32 mask = first_elements(dim_ - d);
      for (int j = 0; j < kLanes; ++j, tile += 2 * kLanes) {
        if (j % (kLanes / kPacks) == 0) ahead.portion();
        const __m512i a = load_words(values[2 * j] + d, mask);
        const __m512i b = load_words(values[2 * j + 1] + d, mask);
        _mm512_store_si512(tile, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(tile + 2 * kTileWords, _mm512_unpackhi_epi16(a, b));
      }
    }
  }
#endif

  const VerifyAttentionParams& p_;
  const KvAppendParams& a_;
  Scratch<Q, C>& s_;
  int64_t b_, first_token_, head_, group_, count_, first_row_, dim_, words_, stride_, length_;
  int64_t begin_ = 0, end_ = 0, all_begin_ = 0, all_end_ = 0;
  int heads_, rows_, max_stride_, out_rows_ = 0;
  Rows<C> rows_of_[kTiles];  // of the head at hand
  Rows<C> coming_[kTiles];   // of the next step's first head
  int coming_count_ = 0;
};

// Rows that belong to no request, or lie behind max_q_len, or before the first request.
template <typename Q>
void clear_padding(const VerifyAttentionParams& p) {
  const KvAppendParams& a = p.append;
  const auto clear = [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    const int64_t row = p.q_heads * a.head_dim;
    std::fill(static_cast<Q*>(p.out) + begin * row, static_cast<Q*>(p.out) + end * row, Q{});
    std::fill(p.lse + begin * p.q_heads, p.lse + end * p.q_heads, -kInfinity);
  };
  int64_t covered = 0;
  for_each_request(a.cu_q_lens, a.batch, a.tokens, [&](int64_t, RowRange rows) {
    clear(covered, rows.begin);
    clear(std::min(rows.begin + p.max_q_len, rows.end), rows.end);
    covered = rows.end;
  });
  clear(covered, a.tokens);
}

template <typename Body>
void for_items(int64_t n, bool parallel, const Body& body) {
  if (parallel) {
    parallel_for_dynamic(n, [&](int64_t i, int) { body(i); });
  } else {
    for (int64_t i = 0; i < n; ++i) body(i);
  }
}

template <typename Q, typename C>
void attend(const VerifyAttentionParams& p) {
  const KvAppendParams& a = p.append;
  const Plan plan = make_plan(p);
  clear_padding<Q>(p);

  const int64_t splits = plan.partials ? plan.splits : 1;
  const int64_t head_tiles = ceil_div(a.kv_heads, plan.heads), tiles = a.batch * plan.row_tiles;
  const auto with_item = [&](int64_t i, const auto& body) {
    const int64_t head = i % head_tiles * plan.heads, tile = i / head_tiles;
    const int64_t b = tile / plan.row_tiles, row_tile = tile % plan.row_tiles;
    Scratch<Q, C> scratch;
    Item<Q, C> item(p, scratch, b, rows_of_request(a.cu_q_lens, b, a.tokens), head,
                    std::min(head + plan.heads, a.kv_heads), row_tile);
    if (!item.empty()) body(item, row_tile);
  };
  for_items(tiles * splits * head_tiles, plan.parallel, [&](int64_t i) {
    const int64_t head_tile = i % head_tiles, split = i / head_tiles % splits;
    const int64_t tile = i / head_tiles / splits;
    with_item(tile * head_tiles + head_tile, [&](Item<Q, C>& item, int64_t row_tile) {
      if (row_tile == 0 && split == 0) item.append();
      if (!plan.partials) {
        item.attend_all();
      } else if (split >= item.first_split() && split < item.last_split()) {
        item.attend_partial(split, splits);
      }
    });
  });
  if (!plan.partials) return;
  for_items(tiles * head_tiles, tiles * head_tiles > 64, [&](int64_t i) {
    with_item(i, [&](Item<Q, C>& item, int64_t) { item.merge_partials(splits); });
  });
}

}  // namespace

void launch_verify_attention(const VerifyAttentionParams& p) {
  with_float_type(p.append.dtype, [&](auto type) {
    using Q = decltype(type);
    if (p.append.cache_dtype == DType::kF8E4M3) return attend<Q, F8E4M3>(p);
    attend<Q, Q>(p);
  });
}

}  // namespace mtp::cpu::MTP_ISA

MTP_CPU_DISPATCH(launch_verify_attention, mtp::VerifyAttentionParams)

#if MTP_ISA_LEVEL == 0
namespace mtp::cpu {

int64_t verify_attention_workspace(const VerifyAttentionParams& p) {
  const auto plan = MTP_ISA::make_plan(p);
  if (!plan.partials) return 0;
  const int64_t row_floats = MTP_ISA::round_up(p.append.head_dim, 2 * kLanes) + 2;
  return p.append.tokens * p.q_heads * plan.splits * row_floats * sizeof(float);
}

}  // namespace mtp::cpu
#endif
