// verify_attention: the new tokens of a step against the paged cache and themselves.
//
// What must move is K and V, once. The q_len x group query rows that share a KV head are packed
// into row tiles of 16, 32 or 64, so verifying q tokens reads what decoding one does. A CTA owns
// (request, KV head, row tile, split of 1024 keys): long contexts fill the GPU at batch 1.
//
// Keys and values come in tiles of 64 positions (32 for D > 128) through a ring of 3-4 stages of
// 16-byte cp.async, so the resident CTAs keep 64 KiB or more in flight per SM; the page-table
// entry of a tile is fetched one tile before its rows are asked for. Shared memory is swizzled: no
// bank conflicts in copies, ldmatrix or conversion. All four warps copy; a warp computes 16 packed
// rows over *all* keys of a tile, with S, P and O in registers, and touches no other warp's rows.
// A row's arithmetic is therefore the same in every row tile: tiles and splits start at absolute
// multiples, hidden keys weigh exactly 0, and splits are combined in ascending order by a second
// kernel (a row with a single split takes the same steps with weight 1).
//
// Positions at or past cache_len are read from k and v, never from the cache, so the one CTA that
// appends a head's rows races with nobody. An e4m3 cache is widened into a 16-bit tile in shared
// memory, new rows being quantised on the way.
//
// Without spills, as the compiler reports; D is padded to a width of 64, 128 or 256:
//
//   width   registers sm_80/sm_90a   shared KiB per CTA at 16, 32, 64 packed rows   with e4m3
//      64          155 / 156                  71  73  77                            55  57  61
//     128          204 / 212                 104 108 116                            88  92 100
//     256          255 / 255                 139 147 163                           107 115 131
#include <cmath>

#include "cuda/common/async_copy.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/math.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/paged_cache.cuh"
#include "mtp/verify_attention.h"

namespace mtp::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kWarpRows = 16;
constexpr int kMaxRows = kWarps * kWarpRows;  // packed rows per CTA
constexpr int kSplit = 1024;                  // keys per partial result
constexpr int kPartialExtra = 4;              // maximum, sum, padding to 16 bytes
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// T: queries, new rows and tensor-core operands; C: the cache; kDim: D rounded up to 64, 128 or
// 256, in shared memory only: what lies past D is zero-filled, not read.
template <typename T_, typename C_, int kDim_>
struct Traits {
  using T = T_;
  using C = C_;
  static constexpr int kDim = kDim_;
  static constexpr bool kWiden = !std::is_same_v<T, C>;
  static constexpr int kTile = kDim > 128 ? 32 : 64;  // keys
  static constexpr int kStages = kDim == 64 || kDim > 128 ? 4 : 3;
  static constexpr int kRing = kStages + 1;
  static constexpr int kChunks = kDim / 8;  // 16-byte chunks of a row of T
  static constexpr int kCacheChunks = kDim * sizeof(C) / 16;
  static constexpr int kStageBytes = kTile * kDim * sizeof(C);  // of K or V

  static constexpr int kRowsBytes = kRing * kTile * 2 * sizeof(void*);
  static constexpr int kWideBytes = kWiden ? 2 * kTile * kDim * static_cast<int>(sizeof(T)) : 0;
  static constexpr int shared_bytes(int rows) {
    return rows * kDim * static_cast<int>(sizeof(T)) + kStages * 2 * kStageBytes + kWideBytes +
           kRowsBytes + 64;
  }

  // Byte offset of a chunk: 8 rows at one chunk column lie in 8 different 16-byte bank groups.
  static __device__ __forceinline__ int swizzle(int row, int chunk) {
    return (row * kChunks + (chunk ^ (row & 7))) * 16;
  }
};

// To a few 2^-24 of the result's range, which is all that a softmax of scores needs.
__device__ __forceinline__ float tanh_of(float x) {
  return 1.0f - __fdividef(2.0f, exp2_approx(x * (2.0f * kLog2e)) + 1.0f);
}

// ---- which rows and keys a CTA works on --------------------------------------------------------

struct Block {
  int64_t first_token;         // row of the request's first token
  int count;                   // the request's new tokens
  int group;                   // query heads per KV head
  int first_row, rows;         // packed rows of this CTA
  int64_t length;              // cached tokens
  int64_t key_begin, key_end;  // every key that some row sees lies in here
  int64_t whole_begin;         // cached keys from here on are seen by all rows
  int first_split, splits;

  __device__ __forceinline__ int token(int row) const { return (first_row + row) / group; }
};

__device__ __forceinline__ uint64_t low_bits(int64_t n) {
  return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
}

// Under a tree mask: the new tokens that token i names, by index.
__device__ __forceinline__ uint64_t tree_bits(const VerifyAttentionParams& p, const Block& block,
                                              int i) {
  return static_cast<uint64_t>(p.tree_mask[block.first_token + i]) & low_bits(block.count);
}

__device__ __forceinline__ int64_t position_of(const VerifyAttentionParams& p, const Block& block,
                                               int i) {
  return block.length + (p.tree_mask ? __popcll(tree_bits(p, block, i)) - 1 : i);
}

// Called by whole warps.
__device__ Block find_block(const VerifyAttentionParams& p, int64_t b, int row_tile,
                            int tile_rows) {
  const KvAppendParams& a = p.append;
  Block block;
  block.first_token = row_offset(a.cu_q_lens, b, a.tokens);
  const int64_t next = max(block.first_token, min(int64_t{a.cu_q_lens[b + 1]}, a.tokens));
  block.count = static_cast<int>(min(next - block.first_token, p.max_q_len));
  block.group = static_cast<int>(p.q_heads / a.kv_heads);
  block.first_row = row_tile * tile_rows;
  block.rows = max(0, min(tile_rows, block.count * block.group - block.first_row));
  block.length = max(a.cache_lens[b], 0);
  block.key_begin = 0;
  block.key_end = 0;
  block.whole_begin = 0;
  if (block.rows > 0) {
    const int first = block.token(0), last = block.token(block.rows - 1);
    block.key_end = min(block.length + (p.tree_mask ? block.count : last + 1), a.table.capacity());
    if (p.window >= 1) {
      int64_t low = block.length + first, high = block.length + last;
      if (p.tree_mask) {
        low = block.length + block.count;
        high = 0;
        for (int i = first + threadIdx.x % kWarp; i <= last; i += kWarp) {
          const int64_t position = position_of(p, block, i);
          low = min(low, position);
          high = max(high, position);
        }
        low = warp_reduce(low, [](int64_t x, int64_t y) { return min(x, y); });
        high = warp_reduce(high, [](int64_t x, int64_t y) { return max(x, y); });
      }
      block.key_begin = max(low - p.window + 1, int64_t{0});
      // Slots of a tree's tokens are not in the order of their positions.
      if (p.tree_mask) block.key_begin = min(block.key_begin, block.length);
      block.key_begin = min(block.key_begin, max(block.key_end - 1, int64_t{0}));
      block.whole_begin = high - p.window + 1;
    }
  }
  block.first_split = static_cast<int>(block.key_begin / kSplit);
  block.splits =
      max(1, static_cast<int>(ceil_div<int64_t>(block.key_end, kSplit)) - block.first_split);
  return block;
}

// ---- results -----------------------------------------------------------------------------------

// What turns a row's sums into its result; the maximum is in log2 units.
struct Finish {
  float factor;
  float lse;
};

__device__ __forceinline__ Finish finish_row(const VerifyAttentionParams& p, int64_t q_head,
                                             int64_t kv_head, float top, float sum) {
  float keep = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks[q_head] * kLog2e;
    const float with_sink = fmaxf(top, sink);
    const float base = with_sink == -INFINITY ? 0.0f : with_sink;
    keep = exp2_approx(top - base);
    sum = sum * keep + exp2_approx(sink - base);
    top = with_sink;
  }
  const float v_scale = head_scale(p.append.v_scale, p.append.v_scale_stride, kv_head);
  if (sum == 0.0f) return {0.0f, -INFINITY};
  return {keep / sum * v_scale, (top + log2f(sum)) * kLn2};
}

__device__ __forceinline__ float* partial_row(const VerifyAttentionParams& p, int64_t t,
                                              int64_t q_head, int64_t split, int64_t max_splits) {
  return p.workspace +
         ((t * p.q_heads + q_head) * max_splits + split) * (p.append.head_dim + kPartialExtra);
}

template <typename T>
__device__ __forceinline__ void clear_row(const VerifyAttentionParams& p, int64_t t,
                                          int64_t kv_head) {
  const int64_t group = p.q_heads / p.append.kv_heads, dim = p.append.head_dim;
  T* out = static_cast<T*>(p.out) + (t * p.q_heads + kv_head * group) * dim;
  for (int64_t i = threadIdx.x * 8; i < group * dim; i += kThreads * 8) {
    *reinterpret_cast<uint4*>(out + i) = make_uint4(0, 0, 0, 0);
  }
  for (int64_t i = threadIdx.x; i < group; i += kThreads) {
    p.lse[t * p.q_heads + kv_head * group + i] = -INFINITY;
  }
}

// Rows that are nobody's: behind max_q_len, before the first request, past the last one.
template <typename T>
__device__ void clear_padding(const VerifyAttentionParams& p, int64_t b, int64_t kv_head) {
  const KvAppendParams& a = p.append;
  const int64_t batch = a.batch > 0 ? a.batch : 1;
  int64_t past = 0;
  if (a.batch > 0) {
    const int64_t begin = row_offset(a.cu_q_lens, b, a.tokens);
    const int64_t end = row_offset(a.cu_q_lens, b + 1, a.tokens);
    for (int64_t t = begin + p.max_q_len; t < end; ++t) clear_row<T>(p, t, kv_head);
    if (b == 0) {
      for (int64_t t = 0; t < begin; ++t) clear_row<T>(p, t, kv_head);
    }
    past = row_offset(a.cu_q_lens, a.batch, a.tokens);
  }
  for (int64_t t = past + b; t < a.tokens; t += batch) clear_row<T>(p, t, kv_head);
}

// ---- the kernel --------------------------------------------------------------------------------

template <typename Tr>
struct Shared {
  char* q;            // [rows][kDim] of T, swizzled
  char* stages;       // [kStages][K, V][kTile][kDim] of C, swizzled where C is T
  char* wide;         // [K, V][kTile][kDim] of T, swizzled: only where C is not T
  const char** rows;  // [kRing][K, V][kTile]: where each key's row lies, or null
  uint32_t* valid;    // [kRing][2]: which keys of a tile have a slot

  __device__ __forceinline__ Shared(char* base, int tile_rows) {
    q = base;
    stages = q + tile_rows * Tr::kDim * sizeof(typename Tr::T);
    wide = stages + Tr::kStages * 2 * Tr::kStageBytes;
    rows = reinterpret_cast<const char**>(wide + Tr::kWideBytes);
    valid = reinterpret_cast<uint32_t*>(rows + Tr::kRing * 2 * Tr::kTile);
  }
  __device__ __forceinline__ char* stage(int64_t tile, int which) const {
    return stages + (static_cast<int>(static_cast<uint32_t>(tile) % Tr::kStages) * 2 + which) *
                        Tr::kStageBytes;
  }
  __device__ __forceinline__ const char** row(int64_t tile, int which) const {
    return rows +
           (static_cast<int>(static_cast<uint32_t>(tile) % Tr::kRing) * 2 + which) * Tr::kTile;
  }
  __device__ __forceinline__ uint32_t* valid_bits(int64_t tile) const {
    return valid + static_cast<int>(static_cast<uint32_t>(tile) % Tr::kRing) * 2;
  }
};

// The page of key `j` of a tile, asked for before it is needed.
template <typename Tr>
__device__ __forceinline__ int64_t fetch_page(const VerifyAttentionParams& p, const Block& block,
                                              int64_t b, int64_t tile, int j) {
  const int64_t position = tile * Tr::kTile + j;
  if (position >= block.key_end) return -1;
  return p.append.table.page(
      b, static_cast<uint32_t>(position) / static_cast<uint32_t>(p.append.table.page_size));
}

// Writes where key j's rows lie. Called by whole warps, j = thread.
template <typename Tr>
__device__ __forceinline__ void store_rows(const VerifyAttentionParams& p, const Block& block,
                                           const Shared<Tr>& shared, int64_t head, int64_t tile,
                                           int64_t page, int j) {
  using T = typename Tr::T;
  using C = typename Tr::C;
  const KvAppendParams& a = p.append;
  const int64_t position = tile * Tr::kTile + j;
  const char *key = nullptr, *value = nullptr;
  if (page >= 0) {
    if (position < block.length) {
      const int64_t slot =
          static_cast<uint32_t>(position) % static_cast<uint32_t>(a.table.page_size);
      key = reinterpret_cast<const char*>(static_cast<const C*>(a.k_cache.data) +
                                          a.k_cache.offset(page, slot, head));
      value = reinterpret_cast<const char*>(static_cast<const C*>(a.v_cache.data) +
                                            a.v_cache.offset(page, slot, head));
    } else if (!Tr::kWiden) {
      const int64_t t = block.first_token + (position - block.length);
      key = reinterpret_cast<const char*>(static_cast<const T*>(a.k) + t * a.k_token_stride +
                                          head * a.k_head_stride);
      value = reinterpret_cast<const char*>(static_cast<const T*>(a.v) + t * a.v_token_stride +
                                            head * a.v_head_stride);
    }
  }
  shared.row(tile, 0)[j] = key;
  shared.row(tile, 1)[j] = value;
  const uint32_t bits = __ballot_sync(kAllLanes, page >= 0);
  if (j % kWarp == 0) shared.valid_bits(tile)[j / kWarp] = bits;
}

template <typename Tr>
__device__ __forceinline__ void copy_tile(const VerifyAttentionParams& p, const Shared<Tr>& shared,
                                          int64_t tile, uint64_t policy) {
  constexpr int kChunks = Tr::kCacheChunks, kStep = kThreads / kChunks;
  const int first_row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const bool real = chunk < p.append.head_dim * sizeof(typename Tr::C) / 16;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const uint32_t to = shared_address(shared.stage(tile, which));
    const char* const* rows = shared.row(tile, which);
#pragma unroll
    for (int i = 0; i < Tr::kTile; i += kStep) {
      const int row = first_row + i;
      const char* from = rows[row];
      const int at = Tr::kWiden ? (row * kChunks + chunk) * 16 : Tr::swizzle(row, chunk);
      copy16(to + at, from + chunk * 16, real && from != nullptr, policy);
    }
  }
}

// e4m3 keys and values to 16-bit tiles. New rows come from k and v, through e4m3.
template <typename Tr>
__device__ __forceinline__ void widen_tile(const VerifyAttentionParams& p, const Block& block,
                                           const Shared<Tr>& shared, int64_t head, int64_t tile) {
  using T = typename Tr::T;
  using C = typename Tr::C;
  const KvAppendParams& a = p.append;
  const uint32_t* valid = shared.valid_bits(tile);
  const int64_t start = tile * Tr::kTile;
  const int chunk = threadIdx.x % Tr::kChunks;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const char* from = shared.stage(tile, which);
    char* to = shared.wide + which * (Tr::kTile * Tr::kDim * sizeof(T));
#pragma unroll 2
    for (int row = threadIdx.x / Tr::kChunks; row < Tr::kTile; row += kThreads / Tr::kChunks) {
      alignas(8) C stored[8];
      *reinterpret_cast<uint2*>(stored) =
          *reinterpret_cast<const uint2*>(from + (row * Tr::kChunks + chunk) * 8);
      if (start + row >= block.length && (valid[row / 32] >> (row % 32) & 1) &&
          chunk * 8 < a.head_dim) {
        const int64_t t = block.first_token + (start + row - block.length);
        const T* source =
            which == 0 ? static_cast<const T*>(a.k) + t * a.k_token_stride + head * a.k_head_stride
                       : static_cast<const T*>(a.v) + t * a.v_token_stride + head * a.v_head_stride;
        store_encoded8(stored, source + chunk * 8,
                       which == 0 ? head_scale(a.k_scale, a.k_scale_stride, head)
                                  : head_scale(a.v_scale, a.v_scale_stride, head));
      }
      uint4 packed;
      packed.x = pack2<T>(to_float(stored[0]), to_float(stored[1]));
      packed.y = pack2<T>(to_float(stored[2]), to_float(stored[3]));
      packed.z = pack2<T>(to_float(stored[4]), to_float(stored[5]));
      packed.w = pack2<T>(to_float(stored[6]), to_float(stored[7]));
      *reinterpret_cast<uint4*>(to + Tr::swizzle(row, chunk)) = packed;
    }
  }
}

// One packed row as its thread keeps it.
struct Row {
  bool used;
  int64_t position;
  uint64_t tree;  // visible new tokens, the window applied
  float top;      // running maximum, log2 units
  float sum;      // this thread's share
};

__device__ __forceinline__ Row start_row(const VerifyAttentionParams& p, const Block& block,
                                         int row) {
  Row r;
  r.used = row < block.rows;
  r.position = 0;
  r.tree = 0;
  r.top = -INFINITY;
  r.sum = 0.0f;
  if (!r.used) return r;
  const int i = block.token(row);
  r.position = position_of(p, block, i);
  if (p.tree_mask) {
    r.tree = tree_bits(p, block, i);
    if (p.window >= 1) {
      for (int j = 0; j < block.count; ++j) {
        if (position_of(p, block, j) <= r.position - p.window) r.tree &= ~(uint64_t{1} << j);
      }
    }
  }
  return r;
}

// The keys of a tile that a row sees, of those that have a slot.
__device__ __forceinline__ uint64_t seen_bits(const VerifyAttentionParams& p, const Block& block,
                                              const Row& row, int64_t start, uint64_t valid) {
  if (!row.used) return 0;
  const int64_t cached_end = p.tree_mask ? block.length : row.position + 1;
  uint64_t bits = low_bits(cached_end - start);
  if (p.window >= 1) bits &= ~low_bits(row.position - p.window + 1 - start);
  if (p.tree_mask) {
    const int64_t shift = block.length - start;
    if (shift >= 0) {
      bits |= shift < 64 ? row.tree << shift : 0;
    } else {
      bits |= shift > -64 ? row.tree >> -shift : 0;
    }
  }
  return bits & valid;
}

// Two 16-bit elements with inf and NaN replaced by zero, or those alone as floats.
template <typename T>
struct Exponent;
template <>
struct Exponent<__nv_bfloat16> {
  static constexpr uint32_t kMask = 0x7f80;
};
template <>
struct Exponent<__half> {
  static constexpr uint32_t kMask = 0x7c00;
};
template <typename T>
__device__ __forceinline__ bool finite_bits(uint32_t bits) {
  return (bits & Exponent<T>::kMask) != Exponent<T>::kMask;
}
template <typename T>
__device__ __forceinline__ float float_of_bits(uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  return to_float(*reinterpret_cast<const T*>(&half));
}

template <typename Tr>
__device__ __forceinline__ bool has_bad_value(const char* values) {
  using T = typename Tr::T;
  bool bad = false;
#pragma unroll 4
  for (int e = threadIdx.x; e < Tr::kTile * Tr::kChunks; e += kThreads) {
    const uint4 x = *reinterpret_cast<const uint4*>(values + e * 16);
    const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bad |= !finite_bits<T>(words[i]) || !finite_bits<T>(words[i] >> 16);
    }
  }
  return bad;
}

template <typename Tr>
__device__ __forceinline__ void zero_bad_values(char* values) {
  using T = typename Tr::T;
  for (int e = threadIdx.x; e < Tr::kTile * Tr::kChunks * 4; e += kThreads) {
    uint32_t* word = reinterpret_cast<uint32_t*>(values) + e;
    uint32_t x = *word;
    if (!finite_bits<T>(x)) x &= 0xffff0000u;
    if (!finite_bits<T>(x >> 16)) x &= 0x0000ffffu;
    *word = x;
  }
}

// Adds inf and NaN values to the rows that see their keys, and to no other.
template <typename Tr>
__device__ __forceinline__ void add_bad_values(const char* values, uint64_t upper, uint64_t lower,
                                               float (&out)[Tr::kChunks][4]) {
  using T = typename Tr::T;
  const int pair = threadIdx.x % 4;
#pragma unroll 1
  for (int key = 0; key < Tr::kTile; ++key) {
    const bool in_upper = upper >> key & 1, in_lower = lower >> key & 1;
#pragma unroll
    for (int n = 0; n < Tr::kChunks; ++n) {
      const uint32_t word =
          *reinterpret_cast<const uint32_t*>(values + Tr::swizzle(key, n) + pair * 4);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t bits = word >> (16 * e);
        if (finite_bits<T>(bits)) continue;
        if (in_upper) out[n][e] += float_of_bits<T>(bits);
        if (in_lower) out[n][2 + e] += float_of_bits<T>(bits);
      }
    }
  }
}

template <typename Tr>
__global__ void __launch_bounds__(kThreads, 2)
    attention_kernel(const __grid_constant__ VerifyAttentionParams p, int row_tiles, int tile_rows,
                     int64_t max_splits) {
  using T = typename Tr::T;
  using C = typename Tr::C;
  constexpr int kDim = Tr::kDim, kTile = Tr::kTile, kStages = Tr::kStages;
  constexpr int kChunks = Tr::kChunks;
  extern __shared__ __align__(128) char shared_memory[];
  const Shared<Tr> shared(shared_memory, tile_rows);
  const KvAppendParams& a = p.append;
  const int64_t b = blockIdx.z, head = blockIdx.y / row_tiles;
  const int row_tile = static_cast<int>(blockIdx.y % row_tiles);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;

  const bool first_cta = blockIdx.x == 0 && row_tile == 0;
  if (first_cta) clear_padding<T>(p, b, head);
  if (a.batch == 0) return;
  const Block block = find_block(p, b, row_tile, tile_rows);
  if (first_cta) {
    const int chunks = static_cast<int>(a.head_dim / 8);
    for (int e = threadIdx.x; e < block.count * chunks; e += kThreads) {
      append8<T, C>(a, b, block.first_token + e / chunks, block.length + e / chunks, head,
                    e % chunks * 8);
    }
  }
  const int64_t split = blockIdx.x;
  if (block.rows == 0 || split < block.first_split || split >= block.first_split + block.splits) {
    return;
  }

  // Tiles of this split: absolute numbers, so that they mean the same in every launch.
  const int64_t first = max(block.key_begin, split * kSplit) / kTile;
  const int64_t end = ceil_div<int64_t>(min(block.key_end, (split + 1) * kSplit), kTile);
  const uint64_t policy = evict_first_policy();

  // Prologue: where the first tiles lie, then Q and all stages but one are under way.
  for (int e = threadIdx.x; e < kStages * kTile; e += kThreads) {
    const int64_t tile = first + e / kTile;
    store_rows<Tr>(p, block, shared, head, tile, fetch_page<Tr>(p, block, b, tile, e % kTile),
                   e % kTile);
  }
  int64_t next_page = -1;
  if (threadIdx.x < kTile) {
    next_page = fetch_page<Tr>(p, block, b, first + kStages, threadIdx.x);
  }
  const int real_chunks = static_cast<int>(a.head_dim / 8);
  for (int e = threadIdx.x; e < tile_rows * kChunks; e += kThreads) {
    const int row = e / kChunks, chunk = e % kChunks;
    const int packed = block.first_row + row;
    const bool valid = row < block.rows && chunk < real_chunks;
    const T* from = static_cast<const T*>(p.q);
    if (valid) {
      from += (block.first_token + packed / block.group) * p.q_token_stride +
              (head * block.group + packed % block.group) * p.q_head_stride + chunk * 8;
    }
    copy16(shared_address(shared.q + Tr::swizzle(row, chunk)), from, valid);
  }
  __syncthreads();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (first + s < end) copy_tile(p, shared, first + s, policy);
    commit_copies();
  }

  const bool active = warp * kWarpRows < block.rows;
  const int upper_row = warp * kWarpRows + lane / 4;
  Row upper = start_row(p, block, upper_row), lower = start_row(p, block, upper_row + 8);
  float out[kChunks][4];
#pragma unroll
  for (int n = 0; n < kChunks; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
  }
  const float scale = p.scale * head_scale(a.k_scale, a.k_scale_stride, head);
  const uint32_t q_address = shared_address(shared.q);

  for (int64_t tile = first; tile < end; ++tile) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (tile + kStages - 1 < end) copy_tile(p, shared, tile + kStages - 1, policy);
    commit_copies();
    if (threadIdx.x < kTile) {
      store_rows<Tr>(p, block, shared, head, tile + kStages, next_page, threadIdx.x);
      next_page = fetch_page<Tr>(p, block, b, tile + kStages + 1, threadIdx.x);
    }
    char* keys = shared.stage(tile, 0);
    char* values = shared.stage(tile, 1);
    if constexpr (Tr::kWiden) {
      widen_tile(p, block, shared, head, tile);
      keys = shared.wide;
      values = shared.wide + kTile * kDim * sizeof(T);
      __syncthreads();
    }

    const int64_t start = tile * kTile;
    const uint32_t* words = shared.valid_bits(tile);
    const uint64_t all = low_bits(kTile);
    const uint64_t valid =
        (words[0] | (kTile > 32 ? static_cast<uint64_t>(words[1]) << 32 : 0)) & all;
    const bool whole = valid == all && start + kTile <= block.length && start >= block.whole_begin;
    bool bad_values = false;
    uint64_t upper_seen = all, lower_seen = all;
    if (!whole) {
      bad_values = __syncthreads_or(has_bad_value<Tr>(values));
      upper_seen = seen_bits(p, block, upper, start, valid);
      lower_seen = seen_bits(p, block, lower, start, valid);
    }

    // S = Q K^T.
    float s[kTile / 8][4];
    float upper_keep = 1.0f, lower_keep = 1.0f;
    if (active) {
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
      }
      const uint32_t k_address = shared_address(keys);
#pragma unroll
      for (int d = 0; d < kChunks; d += 2) {
        uint32_t q[4];
        load_matrices(q, q_address + Tr::swizzle(warp * kWarpRows + lane % 16, d + lane / 16));
#pragma unroll
        for (int n = 0; n < kTile / 8; n += 2) {
          uint32_t k[4];
          load_matrices(
              k, k_address + Tr::swizzle(n * 8 + lane / 16 * 8 + lane % 8, d + lane / 8 % 2));
          mma<T>(s[n], q, k[0], k[1]);
          mma<T>(s[n + 1], q, k[2], k[3]);
        }
      }

      // Softmax: P replaces S; `keep` rescales what came before.
      if (p.softcap > 0.0f) {
        const float cap = p.softcap * kLog2e, to_cap = scale / p.softcap;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[n][i] = cap * tanh_of(s[n][i] * to_cap);
          }
        }
      } else {
        const float factor = scale * kLog2e;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] *= factor;
        }
      }
      if (!whole) {
        const uint64_t up = upper_seen >> (lane % 4 * 2), low = lower_seen >> (lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (!(up >> (n * 8 + i) & 1)) s[n][i] = -INFINITY;
            if (!(low >> (n * 8 + i) & 1)) s[n][2 + i] = -INFINITY;
          }
        }
      }
      float upper_top = upper.top, lower_top = lower.top;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        upper_top = fmaxf(upper_top, fmaxf(s[n][0], s[n][1]));
        lower_top = fmaxf(lower_top, fmaxf(s[n][2], s[n][3]));
      }
#pragma unroll
      for (int offset = 1; offset < 4; offset *= 2) {
        upper_top = fmaxf(upper_top, __shfl_xor_sync(kAllLanes, upper_top, offset));
        lower_top = fmaxf(lower_top, __shfl_xor_sync(kAllLanes, lower_top, offset));
      }
      const float upper_base = upper_top == -INFINITY ? 0.0f : upper_top;
      const float lower_base = lower_top == -INFINITY ? 0.0f : lower_top;
      upper_keep = exp2_approx(upper.top - upper_base);
      lower_keep = exp2_approx(lower.top - lower_base);
      upper.top = upper_top;
      lower.top = lower_top;
      upper.sum *= upper_keep;
      lower.sum *= lower_keep;
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          s[n][i] = exp2_approx(s[n][i] - upper_base);
          upper.sum += s[n][i];
          s[n][2 + i] = exp2_approx(s[n][2 + i] - lower_base);
          lower.sum += s[n][2 + i];
        }
      }
#pragma unroll
      for (int n = 0; n < kChunks; ++n) {
        out[n][0] *= upper_keep;
        out[n][1] *= upper_keep;
        out[n][2] *= lower_keep;
        out[n][3] *= lower_keep;
      }
    }

    // The tensor cores multiply hidden keys' values by 0, which inf and NaN survive: where a tile
    // that some row sees in part holds such values, they are taken out and added by hand.
    if (bad_values) {
      if (active) add_bad_values<Tr>(values, upper_seen, lower_seen, out);
      __syncthreads();
      zero_bad_values<Tr>(values);
      __syncthreads();
    }

    // O += P V.
    if (active) {
      const uint32_t v_address = shared_address(values);
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        const uint32_t weights[4] = {
            pack2<T>(s[2 * k][0], s[2 * k][1]), pack2<T>(s[2 * k][2], s[2 * k][3]),
            pack2<T>(s[2 * k + 1][0], s[2 * k + 1][1]), pack2<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < kChunks; n += 2) {
          uint32_t v[4];
          load_matrices_transposed(v, v_address + Tr::swizzle(k * 16 + lane % 16, n + lane / 16));
          mma<T>(out[n], weights, v[0], v[1]);
          mma<T>(out[n + 1], weights, v[2], v[3]);
        }
      }
    }
  }
  wait_copies<0>();

  if (!active) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Row& row = half ? lower : upper;
    float sum = row.sum;
#pragma unroll
    for (int offset = 1; offset < 4; offset *= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, offset);
    }
    if (!row.used) continue;
    const int packed = block.first_row + upper_row + 8 * half;
    const int64_t t = block.first_token + packed / block.group;
    const int64_t q_head = head * block.group + packed % block.group;
    if (block.splits == 1) {
      const Finish finish = finish_row(p, q_head, head, row.top, sum);
      if (lane % 4 == 0) p.lse[t * p.q_heads + q_head] = finish.lse;
      T* to = static_cast<T*>(p.out) + (t * p.q_heads + q_head) * a.head_dim + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kChunks; ++n) {
        if (n >= real_chunks) break;
        *reinterpret_cast<uint32_t*>(to + n * 8) =
            pack2<T>(out[n][2 * half] * finish.factor, out[n][2 * half + 1] * finish.factor);
      }
    } else {
      float* to = partial_row(p, t, q_head, split, max_splits);
      if (lane % 4 == 0) {
        *reinterpret_cast<float2*>(to + a.head_dim) = make_float2(row.top, sum);
      }
      to += lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < kChunks; ++n) {
        if (n >= real_chunks) break;
        *reinterpret_cast<float2*>(to + n * 8) =
            make_float2(out[n][2 * half], out[n][2 * half + 1]);
      }
    }
  }
}

// Adds up the splits of each packed row; a warp takes one row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const __grid_constant__ VerifyAttentionParams p, int row_tiles, int tile_rows,
                   int64_t max_splits) {
  const KvAppendParams& a = p.append;
  const int row_tile = static_cast<int>(blockIdx.y % row_tiles);
  const int64_t head = blockIdx.y / row_tiles;
  const Block block = find_block(p, blockIdx.z, row_tile, tile_rows);
  const int row = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (row >= block.rows || block.splits == 1) return;
  const int packed = block.first_row + row;
  const int64_t t = block.first_token + packed / block.group;
  const int64_t q_head = head * block.group + packed % block.group;
  const float* partial = partial_row(p, t, q_head, block.first_split, max_splits);
  const int64_t stride = a.head_dim + kPartialExtra;

  float top = -INFINITY;
  for (int s = 0; s < block.splits; ++s) top = fmaxf(top, partial[s * stride + a.head_dim]);
  const float base = top == -INFINITY ? 0.0f : top;
  float sum = 0.0f;
  for (int s = 0; s < block.splits; ++s) {
    const float2 top_sum = *reinterpret_cast<const float2*>(partial + s * stride + a.head_dim);
    sum += top_sum.y * exp2_approx(top_sum.x - base);
  }
  const Finish finish = finish_row(p, q_head, head, top, sum);
  if (lane == 0) p.lse[t * p.q_heads + q_head] = finish.lse;
  T* out = static_cast<T*>(p.out) + (t * p.q_heads + q_head) * a.head_dim;
  for (int d = lane * 4; d < a.head_dim; d += kWarp * 4) {
    float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int s = 0; s < block.splits; ++s) {
      const float weight = exp2_approx(partial[s * stride + a.head_dim] - base);
      const float4 x = *reinterpret_cast<const float4*>(partial + s * stride + d);
      total.x += x.x * weight;
      total.y += x.y * weight;
      total.z += x.z * weight;
      total.w += x.w * weight;
    }
    uint2 packed_out;
    packed_out.x = pack2<T>(total.x * finish.factor, total.y * finish.factor);
    packed_out.y = pack2<T>(total.z * finish.factor, total.w * finish.factor);
    *reinterpret_cast<uint2*>(out + d) = packed_out;
  }
}

// ---- launch ------------------------------------------------------------------------------------

// From shapes only, so that a captured graph serves any lengths.
struct Grid {
  int tile_rows, row_tiles;
  int64_t max_splits;
};

Grid make_grid(const VerifyAttentionParams& p) {
  const int64_t most = p.max_q_len < p.append.tokens ? p.max_q_len : p.append.tokens;
  const int64_t rows = most * (p.q_heads / p.append.kv_heads);
  Grid grid;
  grid.tile_rows = rows <= 16 ? 16 : rows <= 32 ? 32 : kMaxRows;
  grid.row_tiles = static_cast<int>(rows > 0 ? ceil_div<int64_t>(rows, grid.tile_rows) : 1);
  grid.max_splits = ceil_div<int64_t>(p.append.table.capacity(), kSplit);
  if (grid.max_splits < 1) grid.max_splits = 1;
  return grid;
}

template <typename T, typename C, int kDim>
void launch_attention(const VerifyAttentionParams& p, const Grid& grid, const dim3& blocks,
                      cudaStream_t stream) {
  using Tr = Traits<T, C, kDim>;
  constexpr const char* kOp = "verify_attention";
  const auto kernel = attention_kernel<Tr>;
  const int bytes = Tr::shared_bytes(grid.tile_rows);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             Tr::shared_bytes(kMaxRows)),
        kOp);
  kernel<<<blocks, kThreads, bytes, stream>>>(p, grid.row_tiles, grid.tile_rows, grid.max_splits);
  check_launch(kOp);
}

template <typename T, typename C>
void launch_for_dim(const VerifyAttentionParams& p, const Grid& grid, const dim3& blocks,
                    cudaStream_t stream) {
  const int64_t dim = p.append.head_dim;
  if (dim <= 64) return launch_attention<T, C, 64>(p, grid, blocks, stream);
  if (dim <= 128) return launch_attention<T, C, 128>(p, grid, blocks, stream);
  if (dim <= 256) return launch_attention<T, C, 256>(p, grid, blocks, stream);
  throw std::runtime_error("verify_attention: D is at most 256");
}

template <typename T>
void launch(const VerifyAttentionParams& p, cudaStream_t stream) {
  const Grid grid = make_grid(p);
  const auto batch = static_cast<unsigned>(p.append.batch > 0 ? p.append.batch : 1);
  const auto heads = static_cast<unsigned>(p.append.kv_heads * grid.row_tiles);
  const dim3 blocks(static_cast<unsigned>(grid.max_splits), heads, batch);
  if (p.append.cache_dtype == DType::kF8E4M3) {
    launch_for_dim<T, __nv_fp8_e4m3>(p, grid, blocks, stream);
  } else {
    launch_for_dim<T, T>(p, grid, blocks, stream);
  }
  if (grid.max_splits == 1 || p.append.batch == 0) return;
  const dim3 rows(static_cast<unsigned>(grid.tile_rows / kWarps), heads, batch);
  combine_kernel<T>
      <<<rows, kThreads, 0, stream>>>(p, grid.row_tiles, grid.tile_rows, grid.max_splits);
  check_launch("verify_attention");
}

}  // namespace

void launch_verify_attention(const VerifyAttentionParams& p, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  switch (p.append.dtype) {
    case DType::kF16:
      return launch<__half>(p, s);
    case DType::kBF16:
      return launch<__nv_bfloat16>(p, s);
    default:
      throw std::runtime_error("verify_attention: q must be f16 or bf16 on cuda");
  }
}

int64_t verify_attention_workspace(const VerifyAttentionParams& p) {
  const Grid grid = make_grid(p);
  if (grid.max_splits == 1) return 0;
  const int64_t row_floats = p.append.head_dim + kPartialExtra;
  return p.append.tokens * p.q_heads * grid.max_splits * row_floats * sizeof(float);
}

}  // namespace mtp::cuda
