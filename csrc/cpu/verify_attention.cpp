// Every K and V byte is read once per request and KV head, in its own dtype and straight from its
// page: the q_len x group query rows that share it are packed and meet it while it is in L1.
//
// Keys come in tiles of 32 positions. A tile's keys are widened and transposed once ([D][16 keys]),
// its values widened once; then both products are small matrix products of register blocks
// (rows x keys, rows x dims) against them, and the softmax is online per tile. Tiles and splits of
// 1024 keys start at absolute multiples, a split's sums start from zero, and splits are merged in
// ascending order whether one thread walks them all or many take one each. Within a row every sum
// runs over ascending d or ascending keys. So a row's bits depend on its query, keys and position,
// never on the rows that share its tile, on the threads or on the pages.
#include "mtp/verify_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/common/isa.h"
#include "cpu/common/kv_rows.h"
#include "cpu/common/parallel.h"

namespace mtp::cpu::MTP_ISA {
namespace {

constexpr int kTile = 32;         // keys per softmax step
constexpr int64_t kSplit = 1024;  // keys per partial result
constexpr int kRows = 64;         // packed query rows per work item
constexpr int kMaxDim = 256;
constexpr int kPanels = kTile / kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Register blocks: with 16 ymm registers, six rows by one 16-lane vector or three by two; with 32
// zmm registers, six rows by two.
constexpr int kBlockRows = 6;
constexpr int wide(int rows) { return MTP_ISA_LEVEL >= 2 || rows <= 3 ? 2 : 1; }

int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

// ---- how the work is cut ---------------------------------------------------------------------

struct Plan {
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
  plan.row_tiles = ceil_div<int64_t>(longest * group, kRows);
  plan.splits = std::max<int64_t>(1, ceil_div(keys, kSplit));
  constexpr int64_t kWorthThreads = 1 << 18;
  plan.parallel = work >= kWorthThreads && max_threads() > 1;
  const int64_t items = a.batch * a.kv_heads * plan.row_tiles;
  plan.partials = plan.parallel && plan.splits > 1 && items < 4 * max_threads();
  return plan;
}

// ---- tiles -----------------------------------------------------------------------------------

#if MTP_ISA_LEVEL >= 1
inline __m256 widen(const float* in) { return _mm256_loadu_ps(in); }
inline __m256 widen(const BF16* in) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline __m256 widen(const F16* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}
inline __m256 widen(const F8E4M3* in) {
  const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)));
  const __m256i magnitude = _mm256_and_si256(b, _mm256_set1_epi32(0x7f));
  const __m256i sign = _mm256_slli_epi32(_mm256_andnot_si256(_mm256_set1_epi32(0x7f), b), 24);
  // 2^120 moves the exponent bias from 7 to 127.
  const __m256 f = _mm256_mul_ps(_mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20)),
                                 _mm256_castsi256_ps(_mm256_set1_epi32(0x7b800000)));
  const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f)),
                                       _mm256_set1_epi32(0x7fc00000));
  return _mm256_or_ps(f, _mm256_castsi256_ps(_mm256_or_si256(sign, nan)));
}
#endif

template <typename T>
void widen8(const T* in, float* out) {
#if MTP_ISA_LEVEL >= 1
  _mm256_storeu_ps(out, widen(in));
#else
  for (int i = 0; i < 8; ++i) out[i] = to_float(in[i]);
#endif
}

// Eight keys, from rows to out[d * kLanes + key]. Its own function, for the registers' sake.
template <typename T>
[[gnu::noinline]] void transpose_rows(const T* const* rows, int64_t dim, float* out) {
#if MTP_ISA_LEVEL >= 1
  const T *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  const T *r4 = rows[4], *r5 = rows[5], *r6 = rows[6], *r7 = rows[7];
  for (int64_t d = 0; d < dim; d += 8, out += 8 * kLanes) {
    // Pairs of keys four apart share a register: the last exchange of halves is a store.
    const auto half = [&](const T* a, const T* b, const T* c, const T* e, float* to) {
      const __m256 x0 = widen(a + d), x1 = widen(b + d), x2 = widen(c + d), x3 = widen(e + d);
      const __m256 p0 = _mm256_unpacklo_ps(x0, x1), p1 = _mm256_unpackhi_ps(x0, x1);
      const __m256 p2 = _mm256_unpacklo_ps(x2, x3), p3 = _mm256_unpackhi_ps(x2, x3);
      const __m256 q0 = _mm256_shuffle_ps(p0, p2, 0x44), q1 = _mm256_shuffle_ps(p0, p2, 0xee);
      const __m256 q2 = _mm256_shuffle_ps(p1, p3, 0x44), q3 = _mm256_shuffle_ps(p1, p3, 0xee);
      _mm_storeu_ps(to, _mm256_castps256_ps128(q0));
      _mm_storeu_ps(to + kLanes, _mm256_castps256_ps128(q1));
      _mm_storeu_ps(to + 2 * kLanes, _mm256_castps256_ps128(q2));
      _mm_storeu_ps(to + 3 * kLanes, _mm256_castps256_ps128(q3));
      _mm_storeu_ps(to + 4 * kLanes, _mm256_extractf128_ps(q0, 1));
      _mm_storeu_ps(to + 5 * kLanes, _mm256_extractf128_ps(q1, 1));
      _mm_storeu_ps(to + 6 * kLanes, _mm256_extractf128_ps(q2, 1));
      _mm_storeu_ps(to + 7 * kLanes, _mm256_extractf128_ps(q3, 1));
    };
    half(r0, r1, r2, r3, out);
    half(r4, r5, r6, r7, out + 4);
  }
#else
  for (int64_t d = 0; d < dim; ++d) {
    for (int i = 0; i < 8; ++i) out[d * kLanes + i] = to_float(rows[i][d]);
  }
#endif
}

template <typename T>
[[gnu::noinline]] void widen_row(const T* in, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += 8) widen8(in + d, out + d);
}

// scores[r][key] = q[r] . key, over ascending d.
template <int R, int W>
void score_block(const float* q, const float* keys, int64_t dim, float* scores) {
  F32x16 sum[R][W];
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) sum[r][w] = zero();
  }
  for (int64_t d = 0; d < dim; ++d) {
    F32x16 key[W];
    for (int w = 0; w < W; ++w) key[w] = load(keys + (w * dim + d) * kLanes);
    for (int r = 0; r < R; ++r) {
      const F32x16 x = broadcast(q[r * dim + d]);
      for (int w = 0; w < W; ++w) sum[r][w] = fmadd(x, key[w], sum[r][w]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) store(scores + r * kTile + w * kLanes, sum[r][w]);
  }
}

template <int R>
void score_rows(const float* q, const float* keys, int64_t dim, float* scores) {
  constexpr int W = wide(R);
  for (int panel = 0; panel < kPanels; panel += W) {
    score_block<R, W>(q, keys + panel * dim * kLanes, dim, scores + panel * kLanes);
  }
}

// The widened values of a tile, and the rows they come from: two sources for value_block.
struct WideValues {
  const float* values;
  int64_t stride;
  F32x16 operator()(int key, int64_t d) const { return load(values + key * stride + d); }
};
template <typename T>
struct ValueRows {
  const T* const* rows;
  F32x16 operator()(int key, int64_t d) const { return load(rows[key] + d); }
};

// out[r] = out[r] * keep[r] + sum over ascending keys of p[r][key] * value[key], from dim d.
template <int R, int W, typename Values>
void value_block(const float* p, const float* keep, const Values& values, int64_t d, int64_t stride,
                 float* out) {
  out += d;
  F32x16 sum[R][W];
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) {
      sum[r][w] = load(out + r * stride + w * kLanes) * broadcast(keep[r]);
    }
  }
  for (int key = 0; key < kTile; ++key) {
    F32x16 value[W];
    for (int w = 0; w < W; ++w) value[w] = values(key, d + w * kLanes);
    for (int r = 0; r < R; ++r) {
      const F32x16 x = broadcast(p[r * kTile + key]);
      for (int w = 0; w < W; ++w) sum[r][w] = fmadd(x, value[w], sum[r][w]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int w = 0; w < W; ++w) store(out + r * stride + w * kLanes, sum[r][w]);
  }
}

template <int R, typename Values>
void value_rows(const float* p, const float* keep, const Values& values, int64_t stride,
                float* out) {
  constexpr int W = wide(R);
  int64_t d = 0;
  for (; d + W * kLanes <= stride; d += W * kLanes) {
    value_block<R, W>(p, keep, values, d, stride, out);
  }
  for (; d < stride; d += kLanes) value_block<R, 1>(p, keep, values, d, stride, out);
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

// As exp, for x <= 0 or NaN, which is all that a softmax asks for.
[[gnu::always_inline]] inline F32x16 exp_nonpositive(F32x16 x) {
  const F32x16 n = round_to_int(max(x * broadcast(1.44269504088896341f), broadcast(-126.0f)));
  F32x16 r = fmadd(n, broadcast(-0.693359375f), x);
  r = fmadd(n, broadcast(2.12194440e-4f), r);
  F32x16 y = broadcast(1.9875691500e-4f);
  y = fmadd(y, r, broadcast(1.3981999507e-3f));
  y = fmadd(y, r, broadcast(8.3334519073e-3f));
  y = fmadd(y, r, broadcast(4.1665795894e-2f));
  y = fmadd(y, r, broadcast(1.6666665459e-1f));
  y = fmadd(y, r, broadcast(5.0000001201e-1f));
  y = fmadd(y, r * r, r + broadcast(1.0f)) * pow2i(n);
  return select(x < broadcast(-87.3f), zero(), y);
}

float exp_of(float x) {  // for x <= 0
  float lane[kLanes];
  store(lane, exp_nonpositive(broadcast(x)));
  return lane[0];
}

// ---- one work item ---------------------------------------------------------------------------

template <typename C>
struct alignas(64) Scratch {
  float q[kRows * kMaxDim];       // [rows][D]
  float keys[kTile * kMaxDim];    // [panel][D][16 keys]
  float values[kTile * kMaxDim];  // [key][D16]: D16 is D rounded up to 16
  float p[kRows * kTile];         // scores, then probabilities
  float out[kRows * kMaxDim];     // [rows][D16], of the split at hand
  float sum[kRows * kLanes];      // per-lane sums of p, of the split at hand
  float max[kRows], keep[kRows];
  float total_out[kRows * kMaxDim];
  float total_max[kRows], total_sum[kRows];
  uint32_t seen[kRows];        // by row: bit j is key j of the tile
  C new_key[kTile * kMaxDim];  // new rows as stored, where that is not the input's dtype
  C new_value[kTile * kMaxDim];
  C hidden[kMaxDim];  // zeros, in the place of rows that no query sees
};

template <typename Q, typename C>
class Item {
 public:
  Item(const VerifyAttentionParams& p, Scratch<C>& scratch, int64_t b, RowRange rows, int64_t head,
       int64_t row_tile)
      : p_(p), a_(p.append), s_(scratch), b_(b), head_(head), first_token_(rows.begin) {
    group_ = p.q_heads / a_.kv_heads;
    count_ = std::min(rows.end - rows.begin, p.max_q_len);
    first_row_ = row_tile * kRows;
    rows_ = static_cast<int>(std::min<int64_t>(kRows, count_ * group_ - first_row_));
    dim_ = a_.head_dim;
    stride_ = round_up(dim_, kLanes);
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
  }

  bool empty() const { return rows_ <= 0; }
  int64_t first_split() const { return std::min(begin_, std::max<int64_t>(end_ - 1, 0)) / kSplit; }
  int64_t last_split() const { return std::max(first_split() + 1, ceil_div(end_, kSplit)); }

  void load_queries() {
    const Q* q = static_cast<const Q*>(p_.q);
    for (int r = 0; r < rows_; ++r) {
      const Q* row = q + token(r) * p_.q_token_stride + q_head(r) * p_.q_head_stride;
      widen_row(row, dim_, s_.q + r * dim_);
    }
    std::fill_n(s_.hidden, dim_, C{});
  }

  // Leaves the split's maxima, sums per lane and unnormalised outputs in the scratch.
  void attend_split(int64_t split) {
    std::fill_n(s_.out, rows_ * stride_, 0.0f);
    std::fill_n(s_.sum, rows_ * kLanes, 0.0f);
    std::fill_n(s_.max, rows_, -kInfinity);
    const int64_t end = std::min(end_, (split + 1) * kSplit);
    const int64_t begin = std::max(begin_, split * kSplit) / kTile * kTile;
    uint32_t next_valid = begin < end ? find_rows(begin, 0) : 0;
    for (int64_t start = begin, turn = 0; start < end; start += kTile, turn ^= 1) {
      const uint32_t valid = next_valid;
      if (start + kTile < end) next_valid = find_rows(start + kTile, turn ^ 1);
      attend_tile(start, valid, static_cast<int>(turn), start + kTile < end);
    }
  }

  void start_total() {
    std::fill_n(s_.total_out, rows_ * stride_, 0.0f);
    std::fill_n(s_.total_max, rows_, -kInfinity);
    std::fill_n(s_.total_sum, rows_, 0.0f);
  }

  void merge_split() {
    for (int r = 0; r < rows_; ++r) {
      merge(r, s_.max[r], reduce_add(load(s_.sum + r * kLanes)), s_.out + r * stride_);
    }
  }

  // Partial results: D16 outputs, maximum, sum, for each row and split.
  float* partial(int r, int64_t split, int64_t splits) const {
    return p_.workspace + ((token(r) * p_.q_heads + q_head(r)) * splits + split) * (stride_ + 2);
  }

  void store_partials(int64_t split, int64_t splits) {
    for (int r = 0; r < rows_; ++r) {
      float* to = partial(r, split, splits);
      std::memcpy(to, s_.out + r * stride_, stride_ * sizeof(float));
      to[stride_] = s_.max[r];
      to[stride_ + 1] = reduce_add(load(s_.sum + r * kLanes));
    }
  }

  void merge_partials(int64_t splits) {
    start_total();
    for (int64_t split = first_split(); split < last_split(); ++split) {
      for (int r = 0; r < rows_; ++r) {
        const float* from = partial(r, split, splits);
        merge(r, from[stride_], from[stride_ + 1], from);
      }
    }
  }

  void store_total() {
    const float v_scale = a_.v_scale ? a_.v_scale[head_ * a_.v_scale_stride] : 1.0f;
    Q* out = static_cast<Q*>(p_.out);
    for (int r = 0; r < rows_; ++r) {
      float max = s_.total_max[r], sum = s_.total_sum[r], keep = 1.0f;
      if (p_.sinks) {
        const float sink = p_.sinks[q_head(r)];
        const float top = std::max(max, sink);
        const float base = top == -kInfinity ? 0.0f : top;
        keep = exp_of(max - base);
        sum = sum * keep + exp_of(sink - base);
        max = top;
      }
      const int64_t at = token(r) * p_.q_heads + q_head(r);
      p_.lse[at] = sum == 0.0f ? -kInfinity : max + std::log(sum);
      const F32x16 factor = broadcast(sum == 0.0f ? 0.0f : keep / sum * v_scale);
      for (int64_t d = 0; d < dim_; d += kLanes) {
        store_partial(out + at * dim_ + d, load(s_.total_out + r * stride_ + d) * factor, dim_ - d);
      }
    }
  }

  // This item's part of the append: all new tokens of its head.
  void append() {
    for (int64_t i = 0; i < count_; ++i) {
      const int64_t position = length_ + i;
      const int64_t page = a_.table.page(b_, position / a_.table.page_size);
      if (page < 0) continue;
      const int64_t slot = position % a_.table.page_size;
      encode_row(new_row(a_.k, a_.k_token_stride, a_.k_head_stride, i),
                 static_cast<C*>(a_.k_cache.data) + a_.k_cache.offset(page, slot, head_), dim_,
                 a_.k_scale ? a_.k_scale[head_ * a_.k_scale_stride] : 1.0f);
      encode_row(new_row(a_.v, a_.v_token_stride, a_.v_head_stride, i),
                 static_cast<C*>(a_.v_cache.data) + a_.v_cache.offset(page, slot, head_), dim_,
                 a_.v_scale ? a_.v_scale[head_ * a_.v_scale_stride] : 1.0f);
    }
  }

 private:
  int64_t token(int r) const { return first_token_ + (first_row_ + r) / group_; }
  int64_t q_head(int r) const { return head_ * group_ + (first_row_ + r) % group_; }

  const Q* new_row(const void* rows, int64_t token_stride, int64_t head_stride, int64_t i) const {
    return static_cast<const Q*>(rows) + (first_token_ + i) * token_stride + head_ * head_stride;
  }

  // Under a tree mask: the new tokens that token i names, by index.
  uint64_t tree_bits(int64_t i) const {
    const uint64_t all = count_ >= 64 ? ~uint64_t{0} : (uint64_t{1} << count_) - 1;
    return static_cast<uint64_t>(p_.tree_mask[first_token_ + i]) & all;
  }

  int64_t position(int64_t i) const {
    return length_ + (p_.tree_mask ? __builtin_popcountll(tree_bits(i)) - 1 : i);
  }

  // Finds the K and V rows of the tile at `start` (the zero row where there is no slot); returns
  // a bit for each that exists.
  uint32_t find_rows(int64_t start, int64_t turn) {
    const int64_t page_size = a_.table.page_size;
    const int64_t end = std::min<int64_t>(kTile, end_ - start);
    const C **keys = key_rows_[turn], **values = value_rows_[turn];
    uint32_t valid = 0;
    int64_t entry = start / page_size, slot = start % page_size;
    for (int64_t j = 0; j < end; ++entry, slot = 0) {  // page by page
      const int64_t stop = std::min(end, j + page_size - slot);
      const int64_t page = a_.table.page(b_, entry);
      if (page < 0) {
        for (; j < stop; ++j) keys[j] = values[j] = s_.hidden;
        continue;
      }
      valid |= bit_range(j, stop);
      const C* key = static_cast<const C*>(a_.k_cache.data) + a_.k_cache.offset(page, slot, head_);
      const C* value =
          static_cast<const C*>(a_.v_cache.data) + a_.v_cache.offset(page, slot, head_);
      for (const int64_t cached = std::min(stop, length_ - start); j < cached; ++j) {
        keys[j] = key;
        values[j] = value;
        key += a_.k_cache.slot_stride;
        value += a_.v_cache.slot_stride;
      }
      for (; j < stop; ++j) {
        if constexpr (std::is_same_v<Q, C>) {
          const int64_t i = start + j - length_;
          keys[j] = new_row(a_.k, a_.k_token_stride, a_.k_head_stride, i);
          values[j] = new_row(a_.v, a_.v_token_stride, a_.v_head_stride, i);
        } else {
          keys[j] = s_.new_key + j * dim_;
          values[j] = s_.new_value + j * dim_;
        }
      }
    }
    for (int64_t j = std::max<int64_t>(end, 0); j < kTile; ++j) keys[j] = values[j] = s_.hidden;
    return valid;
  }

  // New rows of an e4m3 cache are seen as stored: quantised here, into the scratch.
  void encode_new_rows(int64_t start) {
    if constexpr (!std::is_same_v<Q, C>) {
      for (int64_t pos = std::max(start, length_); pos < std::min(start + kTile, end_); ++pos) {
        encode_row(new_row(a_.k, a_.k_token_stride, a_.k_head_stride, pos - length_),
                   s_.new_key + (pos - start) * dim_, dim_,
                   a_.k_scale ? a_.k_scale[head_ * a_.k_scale_stride] : 1.0f);
        encode_row(new_row(a_.v, a_.v_token_stride, a_.v_head_stride, pos - length_),
                   s_.new_value + (pos - start) * dim_, dim_,
                   a_.v_scale ? a_.v_scale[head_ * a_.v_scale_stride] : 1.0f);
      }
    }
  }

  // Bits [from, to) of a tile, for positions that may lie outside it.
  static uint32_t bit_range(int64_t from, int64_t to) {
    const auto below = [](int64_t n) { return n <= 0 ? 0u : n >= kTile ? ~0u : (1u << n) - 1; };
    return below(to) & ~below(from);
  }

  // Fills seen[]; returns whether every row sees the whole tile.
  bool find_seen(int64_t start, uint32_t valid) {
    bool whole = true;
    int64_t last = -1;
    uint32_t bits = 0;
    for (int r = 0; r < rows_; ++r) {
      const int64_t i = (first_row_ + r) / group_;
      if (i != last) {
        last = i;
        const int64_t window_begin = p_.window >= 1 ? position(i) - p_.window + 1 : 0;
        const int64_t cached_end = p_.tree_mask ? length_ : length_ + i + 1;
        bits = bit_range(window_begin - start, cached_end - start);
        if (p_.tree_mask && start + kTile > length_) bits |= tree_tile(i, start, window_begin);
        bits &= valid;
      }
      s_.seen[r] = bits;
      whole &= bits == ~0u;
    }
    return whole;
  }

  uint32_t tree_tile(int64_t i, int64_t start, int64_t window_begin) const {
    uint64_t bits = tree_bits(i);
    if (p_.window >= 1) {
      for (int64_t j = 0; j < count_; ++j) {
        if (position(j) < window_begin) bits &= ~(uint64_t{1} << j);
      }
    }
    const int64_t shift = length_ - start;
    if (shift >= 0) return static_cast<uint32_t>(bits << shift);
    return shift > -64 ? static_cast<uint32_t>(bits >> -shift) : 0;
  }

  void attend_tile(int64_t start, uint32_t valid, int turn, bool more) {
    const bool whole = find_seen(start, valid);
    if (start + kTile > length_) encode_new_rows(start);
    const C* const* keys = key_rows_[turn];
    const C* const* values = value_rows_[turn];
    const int64_t row_bytes = dim_ * static_cast<int64_t>(sizeof(C));

    for (int j = 0; j < kTile; j += 8) {
      if (more) {
        for (int i = j; i < j + 8; ++i) prefetch(key_rows_[turn ^ 1][i], row_bytes);
      }
      float* panel = s_.keys + j / kLanes * dim_ * kLanes + j % kLanes;
      transpose_rows(keys + j, dim_, panel);
    }
    for_row_blocks(rows_, [&](int r, auto count) {
      score_rows<count>(s_.q + r * dim_, s_.keys, dim_, s_.p + r * kTile);
    });

    update_softmax(whole);

    if (more) {
      for (int j = 0; j < kTile; ++j) prefetch(value_rows_[turn ^ 1][j], row_bytes);
    }
    const auto add_values = [&](const auto& source) {
      for_row_blocks(rows_, [&](int r, auto count) {
        value_rows<count>(s_.p + r * kTile, s_.keep + r, source, stride_, s_.out + r * stride_);
      });
    };
    // One block of rows reads each value once, so widening in passing is cheaper.
    if (whole && rows_ <= kBlockRows && stride_ == dim_) {
      return add_values(ValueRows<C>{values});
    }
    for (int j = 0; j < kTile; ++j) {
      widen_row(values[j], dim_, s_.values + j * stride_);
      if (stride_ != dim_) std::fill_n(s_.values + j * stride_ + dim_, stride_ - dim_, 0.0f);
    }
    if (!whole && !all_finite(s_.values, kTile * stride_)) return add_seen_values();
    add_values(WideValues{s_.values, stride_});
  }

  static void prefetch([[maybe_unused]] const void* row, [[maybe_unused]] int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
  }

  // Scores to probabilities relative to the row's new maximum; `keep` rescales what came before.
  void update_softmax(bool whole) {
    const float k_scale = a_.k_scale ? a_.k_scale[head_ * a_.k_scale_stride] : 1.0f;
    const F32x16 scale = broadcast(p_.scale * k_scale);
    float top[kRows];
    for (int r = 0; r < rows_; ++r) {
      float* row = s_.p + r * kTile;
      F32x16 best = broadcast(-kInfinity);
      for (int w = 0; w < kPanels; ++w) {
        F32x16 x = load(row + w * kLanes) * scale;
        if (p_.softcap > 0.0f) {
          x = broadcast(p_.softcap) * tanh(x / broadcast(p_.softcap));
        }
        if (!whole) {
          x = select(mask_from_bits(s_.seen[r] >> (w * kLanes) & 0xffff), x, broadcast(-kInfinity));
        }
        store(row + w * kLanes, x);
        best = max(best, x);
      }
      top[r] = reduce_max(best);
    }
    for (int r = 0; r < rows_; r += kLanes) {
      for (int i = r; i < std::min<int>(rows_, r + kLanes); ++i) {
        top[i] = s_.max[i] > top[i] ? s_.max[i] : top[i];
      }
      float old[kLanes], base[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const bool used = r + i < rows_;
        base[i] = used && top[r + i] != -kInfinity ? top[r + i] : 0.0f;
        old[i] = used ? s_.max[r + i] : 0.0f;
      }
      store(s_.keep + r, exp_nonpositive(load(old) - load(base)));
    }
    for (int r = 0; r < rows_; ++r) {
      float* row = s_.p + r * kTile;
      const F32x16 base = broadcast(top[r] == -kInfinity ? 0.0f : top[r]);
      F32x16 sum = load(s_.sum + r * kLanes) * broadcast(s_.keep[r]);
      for (int w = 0; w < kPanels; ++w) {
        const F32x16 x = exp_nonpositive(load(row + w * kLanes) - base);
        store(row + w * kLanes, x);
        sum = sum + x;
      }
      store(s_.sum + r * kLanes, sum);
      s_.max[r] = top[r];
    }
  }

  static bool all_finite(const float* x, int64_t n) {
    F32x16 bad = zero();
    for (int64_t i = 0; i < n; i += kLanes) bad = bad + load(x + i) * zero();
    return reduce_add(bad) == 0.0f;
  }

  // As value_rows in the same order, but 0 * inf of a key that a row does not see stays out of it.
  void add_seen_values() {
    for (int r = 0; r < rows_; ++r) {
      for (int64_t d = 0; d < stride_; d += kLanes) {
        float* out = s_.out + r * stride_ + d;
        F32x16 sum = load(out) * broadcast(s_.keep[r]);
        for (int key = 0; key < kTile; ++key) {
          if (s_.seen[r] >> key & 1) {
            sum = fmadd(broadcast(s_.p[r * kTile + key]), load(s_.values + key * stride_ + d), sum);
          }
        }
        store(out, sum);
      }
    }
  }

  void merge(int r, float max, float sum, const float* out) {
    const float top = std::max(s_.total_max[r], max);
    const float base = top == -kInfinity ? 0.0f : top;
    const float keep = exp_of(s_.total_max[r] - base), add = exp_of(max - base);
    float* total = s_.total_out + r * stride_;
    for (int64_t d = 0; d < stride_; d += kLanes) {
      store(total + d, fmadd(load(out + d), broadcast(add), load(total + d) * broadcast(keep)));
    }
    s_.total_sum[r] = s_.total_sum[r] * keep + sum * add;
    s_.total_max[r] = top;
  }

  const VerifyAttentionParams& p_;
  const KvAppendParams& a_;
  Scratch<C>& s_;
  int64_t b_, head_, first_token_, group_, count_, first_row_, dim_, stride_, length_;
  int64_t begin_ = 0, end_ = 0;
  int rows_;
  const C* key_rows_[2][kTile];
  const C* value_rows_[2][kTile];
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

  // Items of one request and row tile, all heads, are neighbours: with NHD they share DRAM pages.
  const int64_t heads = a.kv_heads, splits = plan.partials ? plan.splits : 1;
  const int64_t tiles = a.batch * plan.row_tiles;
  for_items(tiles * splits * heads, plan.parallel, [&](int64_t i) {
    const int64_t head = i % heads, split = i / heads % splits;
    const int64_t row_tile = i / heads / splits % plan.row_tiles;
    const int64_t b = i / heads / splits / plan.row_tiles;
    Scratch<C> scratch;
    Item<Q, C> item(p, scratch, b, rows_of_request(a.cu_q_lens, b, a.tokens), head, row_tile);
    if (item.empty()) return;
    if (row_tile == 0 && split == 0) item.append();
    if (plan.partials) {
      if (split < item.first_split() || split >= item.last_split()) return;
      item.load_queries();
      item.attend_split(split);
      item.store_partials(split, splits);
      return;
    }
    item.load_queries();
    item.start_total();
    for (int64_t s = item.first_split(); s < item.last_split(); ++s) {
      item.attend_split(s);
      item.merge_split();
    }
    item.store_total();
  });

  if (!plan.partials) return;
  for_items(tiles * heads, tiles * heads > 64, [&](int64_t i) {
    const int64_t head = i % heads, row_tile = i / heads % plan.row_tiles;
    const int64_t b = i / heads / plan.row_tiles;
    Scratch<C> scratch;
    Item<Q, C> item(p, scratch, b, rows_of_request(a.cu_q_lens, b, a.tokens), head, row_tile);
    if (item.empty()) return;
    item.merge_partials(splits);
    item.store_total();
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
  const int64_t row_floats = MTP_ISA::round_up(p.append.head_dim, kLanes) + 2;
  return p.append.tokens * p.q_heads * plan.splits * row_floats;
}

}  // namespace mtp::cpu
#endif
