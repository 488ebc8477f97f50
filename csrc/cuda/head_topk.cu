// head_topk: LM head, top-k and log-sum-exp in one pass over the weights.
//
// Bytes that must move: the weights, once for up to 64 rows. Persistent CTAs take tiles of 128
// vocabulary rows from weight_stream_kernel and keep the hiddens in shared memory throughout where
// they fit. A finished tile of logits lies in shared memory just long enough for one warp per
// activation row to take its maximum, its sum of exponentials and the few logits that beat the
// k-th best so far; it never reaches global memory. A norm's factor multiplies the finished sums.
// The k best are kept sorted in shared memory as 64-bit words (ordered bits of the logit, then the
// complement of the row), whose integer order is the operator's order, ties and NaN included. A
// tile whose maximum does not make the list is done with; k = 1 looks for the row of the maximum
// instead of building words for all.
//
// More than 64 rows: tiles of the tiled product (large_m.cuh), up to 1024 rows per pass, end in the
// same statistics. CTAs that share 128 rows take the column tiles in turn; their lists live in the
// workspace, so that shared memory does not bound k.
//
// A second kernel merges: the lists of all CTAs (a total order, so any split gives the same), and
// (maximum, sum) of every tile in order, so that lse depends neither on M nor on the grid.
//
// Registers and shared memory: weight_stream.cuh and gemm.cuh, plus k words per row up to 64 rows.
#include "mtp/head_topk.h"

#include "cuda/common/large_m.cuh"

namespace mtp::cuda {
namespace {

constexpr int kMaxLists = 512;  // CTAs; two lists per thread of the merge

// Ordered as the float is, +0 like -0, NaN below all; zero is reserved for NaN.
__device__ __forceinline__ uint32_t order_key(float x) {
  if (x != x) return 0;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_order_key(uint32_t key) {
  if (key == 0) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
// Zero is below every candidate.
__device__ __forceinline__ uint64_t candidate(float x, int64_t row) {
  return static_cast<uint64_t>(order_key(x)) << 32 | (0xffffffffu - static_cast<uint32_t>(row));
}
__device__ __forceinline__ uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
__device__ __forceinline__ float exp_base(float max) { return fabsf(max) < INFINITY ? max : 0.0f; }

template <bool kLarge>
struct HeadEpilogue {
  struct Params {
    const void* bias;    // [n] or null
    const float* scale;  // [n] or null
    uint64_t* lists;     // [CTAs, m, k]
    float2* sums;        // [tiles, m]: maximum, sum of exponentials
    int64_t n, length;
    DType dtype;
    int m, k;
    float softcap, eps;
  };

  const Params& e;
  uint64_t* const list_out;  // [rows, k]
  uint64_t* const best;      // likewise; in shared memory up to 64 rows, else list_out
  const int rows, warp, lane;

  __device__ HeadEpilogue(const Params& params, float* smem, int list, int first_row, int rows)
      : e(params),
        list_out(e.lists + (static_cast<int64_t>(list) * e.m + first_row) * e.k),
        best(kLarge ? list_out : reinterpret_cast<uint64_t*>(smem)),
        rows(rows),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp) {
    // Row m is warp m % 8's alone.
    for (int m = warp; m < rows; m += kStreamThreads / kWarp) {
      for (int i = lane; i < e.k; i += kWarp) best[m * e.k + i] = 0;
    }
    __syncwarp();
  }

  __device__ __forceinline__ float finish_logit(float x, int64_t row) const {
    if (e.scale) x *= e.scale[row];
    if (e.bias) x += load_as(e.dtype, e.bias, row);
    return e.softcap > 0.0f ? e.softcap * tanhf(x / e.softcap) : x;
  }

  // The list of one row, two words a lane, with `c` put in its place.
  __device__ __forceinline__ void insert(uint64_t* list, uint64_t c) const {
    const uint64_t low = lane < e.k ? list[lane] : 0;
    const uint64_t high = lane + kWarp < e.k ? list[lane + kWarp] : 0;
    const int place =
        __popc(__ballot_sync(kAllLanes, low > c)) + __popc(__ballot_sync(kAllLanes, high > c));
    const uint64_t low_before = __shfl_up_sync(kAllLanes, low, 1);
    const uint64_t last_low = __shfl_sync(kAllLanes, low, kWarp - 1);
    uint64_t high_before = __shfl_up_sync(kAllLanes, high, 1);
    if (lane == 0) high_before = last_low;
    const int i = lane, j = lane + kWarp;
    __syncwarp();
    if (i < e.k) list[i] = i < place ? low : i == place ? c : low_before;
    if (j < e.k) list[j] = j < place ? high : j == place ? c : high_before;
    __syncwarp();
  }

  __device__ __forceinline__ void take(const FinishedTile& t) {
    constexpr int kPerLane = kStreamTile / kWarp;
    const int64_t first = static_cast<int64_t>(t.tile) * kStreamTile;
    for (int m = warp; m < rows; m += kStreamThreads / kWarp) {
      const float factor = t.squares ? rms_factor(t.squares[m], e.length, e.eps) : 1.0f;
      float x[kPerLane];
      float highest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int column = lane + j * kWarp;
        x[j] = -INFINITY;
        if (first + column < e.n) {
          x[j] = finish_logit(t.sums[m * t.pitch + column] * factor, first + column);
        }
        highest = fmaxf(highest, x[j]);
      }
      highest = warp_reduce(highest, [](float a, float b) { return fmaxf(a, b); });
      const float base = exp_base(highest);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum += expf(x[j] - base);
      sum = warp_sum(sum);
      if (lane == 0) {
        e.sums[static_cast<int64_t>(t.tile) * e.m + t.first_row + m] = make_float2(highest, sum);
      }

      // No logit of this tile can beat its maximum at its first row.
      uint64_t* const list = best + m * e.k;
      if (candidate(highest, first) <= list[e.k - 1]) continue;
      if (e.k == 1) {
        take_best(list, x, highest, first);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int64_t row = first + lane + j * kWarp;
        const uint64_t mine = row < e.n ? candidate(x[j], row) : 0;
        unsigned waiting = __ballot_sync(kAllLanes, mine > list[e.k - 1]);
        while (waiting) {
          const uint64_t c = __shfl_sync(kAllLanes, mine, __ffs(waiting) - 1);
          waiting &= waiting - 1;
          if (c > list[e.k - 1]) insert(list, c);
        }
      }
    }
  }

  // k = 1: the lowest row that has the maximum, found without lists of candidates.
  template <int kPerLane>
  __device__ __forceinline__ void take_best(uint64_t* list, const float (&x)[kPerLane],
                                            float highest, int64_t first) const {
    constexpr unsigned kNone = kStreamTile;
    unsigned column = kNone;
#pragma unroll
    for (int j = kPerLane - 1; j >= 0; --j) {
      if (x[j] == highest && first + lane + j * kWarp < e.n) column = lane + j * kWarp;
    }
    column = __reduce_min_sync(kAllLanes, column);
    // Nothing equals the maximum where all are NaN.
    const uint64_t top =
        column == kNone ? candidate(NAN, first) : candidate(highest, first + column);
    if (lane == 0) list[0] = larger(list[0], top);
    __syncwarp();
  }

  __device__ __forceinline__ void finish() {
    if constexpr (!kLarge) {
      for (int m = warp; m < rows; m += kStreamThreads / kWarp) {
        for (int i = lane; i < e.k; i += kWarp) list_out[m * e.k + i] = best[m * e.k + i];
      }
    }
  }
};

struct MergeParams {
  const uint64_t* lists;  // [list_count, m, k]
  const float2* sums;     // [tiles, m]
  const void* token_map;  // [V] or null
  float* logits;          // [m, k]
  int64_t* ids;           // [m, k]
  float* lse;             // [m]
  int64_t vocab_offset;
  int list_count, tiles, m, k;
  DType map_dtype;
};

// One CTA per row. Each list is sorted: k rounds take the best head and advance it.
__global__ void __launch_bounds__(kStreamThreads) merge_heads_kernel(const MergeParams p) {
  constexpr int kWarps = kStreamThreads / kWarp;
  __shared__ float scratch[2][kWarps];
  __shared__ uint64_t tops[2][kWarps];
  const int m = blockIdx.x, thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;

  float highest = -INFINITY;
  for (int t = thread; t < p.tiles; t += kStreamThreads) {
    highest = fmaxf(highest, p.sums[static_cast<int64_t>(t) * p.m + m].x);
  }
  highest = warp_reduce(highest, [](float a, float b) { return fmaxf(a, b); });
  if (lane == 0) scratch[0][warp] = highest;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) highest = fmaxf(highest, scratch[0][w]);
  const float base = exp_base(highest);
  float sum = 0.0f;
  for (int t = thread; t < p.tiles; t += kStreamThreads) {
    const float2 part = p.sums[static_cast<int64_t>(t) * p.m + m];
    if (part.y != 0.0f) sum += part.y * expf(exp_base(part.x) - base);
  }
  sum = block_sum<kStreamThreads>(sum, scratch[1]);
  if (thread == 0) p.lse[m] = base + logf(sum);

  int position[2] = {0, 0};
  const auto head = [&](int i) -> uint64_t {
    const int list = thread + i * kStreamThreads;
    if (list >= p.list_count || position[i] >= p.k) return 0;
    return p.lists[(static_cast<int64_t>(list) * p.m + m) * p.k + position[i]];
  };
  uint64_t heads[2] = {head(0), head(1)};
  for (int round = 0; round < p.k; ++round) {
    uint64_t top = warp_reduce(larger(heads[0], heads[1]), larger);
    if (lane == 0) tops[round & 1][warp] = top;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) top = larger(top, tops[round & 1][w]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (heads[i] == top) {
        ++position[i];
        heads[i] = head(i);
      }
    }
    if (thread == 0) {
      const int64_t row = 0xffffffffu - static_cast<uint32_t>(top);
      const int64_t out = static_cast<int64_t>(m) * p.k + round;
      p.logits[out] = from_order_key(static_cast<uint32_t>(top >> 32));
      p.ids[out] = p.token_map ? load_index(p.map_dtype, p.token_map, row) : row + p.vocab_offset;
    }
  }
}

StreamPlan plan_of(const HeadTopkParams& p) {
  return make_plan(p.v, p.h, 1, p.weight_dtype, p.dtype, p.norm_weight != nullptr, false);
}

Segment segment_of(const HeadTopkParams& p) {
  return make_segment(p.hidden, p.hidden_stride, p.h, p.dtype, p.norm_weight, p.dtype);
}

// Rows of one pass: few enough of them that sums and lists stay small, in even parts.
int64_t pass_rows(const HeadTopkParams& p) {
  if (p.m <= kMaxStreamRows) return p.m;
  constexpr int64_t kMost = 1024;
  const int64_t passes = ceil_div(p.m, kMost);
  return std::min(p.m, ceil_div<int64_t>(ceil_div(p.m, passes), kStreamTile) * kStreamTile);
}

LargeProblem large_problem(const HeadTopkParams& p, int64_t rows) {
  LargeProblem large = {};
  large.segments[0] = segment_of(p);
  large.segment_count = 1;
  large.weight = p.weight;
  large.prepared = p.workspace;
  large.rows = rows;
  large.n = p.v;
  large.k = p.h;
  large.weight_stride = p.weight_stride;
  large.weight_dtype = p.weight_dtype;
  large.dtype = large_dtype(p.dtype, p.weight_dtype);
  large.eps = p.eps;
  large.norm_offset = p.gemma_norm ? 1.0f : 0.0f;
  return large;
}

// CTAs of the tiled product that share a row tile: together about two per processor.
int large_stripes(const LargeProblem& p) {
  constexpr int kWanted = 264;
  return std::min(p.tiles(), std::max(1, kWanted / p.row_tiles()));
}

// Where a pass keeps what in the workspace.
struct Workspace {
  int64_t lists, sums, end;
};

Workspace lay_out(const HeadTopkParams& p, int64_t rows) {
  Workspace w = {};
  int64_t lists = kMaxLists;
  if (p.m > kMaxStreamRows) {
    const LargeProblem large = large_problem(p, rows);
    w.lists = large.prepared_bytes();
    lists = large_stripes(large);
  }
  w.sums = w.lists + align_256(lists * rows * p.k * 8);
  w.end = w.sums + ceil_div<int64_t>(p.v, kStreamTile) * rows * 8;
  return w;
}

}  // namespace

int64_t head_topk_workspace(const HeadTopkParams& p) { return lay_out(p, pass_rows(p)).end; }

void launch_head_topk(const HeadTopkParams& p, void* stream) {
  constexpr const char* kOp = "head_topk";
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const StreamPlan plan = plan_of(p);
  const Segment hidden = segment_of(p);
  char* const workspace = static_cast<char*>(p.workspace);
  for (int64_t first = 0; first < p.m;) {
    int64_t rows = std::min(pass_rows(p), p.m - first);
    int list_count;
    const auto make_epilogue = [&](auto params) {
      const Workspace w = lay_out(p, rows);
      params.bias = p.bias;
      params.scale = p.weight_scale;
      params.lists = reinterpret_cast<uint64_t*>(workspace + w.lists);
      params.sums = reinterpret_cast<float2*>(workspace + w.sums);
      params.n = p.v;
      params.length = p.h;
      params.dtype = p.dtype;
      params.m = static_cast<int>(rows);
      params.k = p.k;
      params.softcap = p.softcap;
      params.eps = p.eps;
      return params;
    };
    if (p.m > kMaxStreamRows) {
      LargeProblem large = large_problem(p, rows);
      large.segments[0] = hidden.from_row(first);
      list_count = large_stripes(large);
      launch_large<HeadEpilogue<true>, true>(large, make_epilogue(HeadEpilogue<true>::Params{}),
                                             list_count, 1, ceil_div<int64_t>(p.h, 32) * 32, 0,
                                             cuda_stream, kOp);
    } else {
      const StreamShape shape = make_shape(plan, rows, 0, p.k * 8, kOp);
      rows = std::min<int64_t>(rows, shape.rows());
      list_count = std::min(stream_ctas(plan, shape, kOp), kMaxLists);
      StreamParams s = {};
      s.segments[0] = hidden.from_row(first);
      s.weight = p.weight;
      s.weight_stride = p.weight_stride;
      s.norm_offset = p.gemma_norm ? 1.0f : 0.0f;
      s.m = static_cast<int>(rows);
      stream_weights<HeadEpilogue<false>>(plan, shape, s,
                                          make_epilogue(HeadEpilogue<false>::Params{}), list_count,
                                          cuda_stream, kOp);
    }

    const Workspace w = lay_out(p, rows);
    MergeParams merge;
    merge.lists = reinterpret_cast<const uint64_t*>(workspace + w.lists);
    merge.sums = reinterpret_cast<const float2*>(workspace + w.sums);
    merge.token_map = p.token_map;
    merge.logits = p.logits + first * p.k;
    merge.ids = p.ids + first * p.k;
    merge.lse = p.lse + first;
    merge.vocab_offset = p.vocab_offset;
    merge.list_count = list_count;
    merge.tiles = plan.tiles();
    merge.m = static_cast<int>(rows);
    merge.k = p.k;
    merge.map_dtype = p.map_dtype;
    merge_heads_kernel<<<static_cast<unsigned>(rows), kStreamThreads, 0, cuda_stream>>>(merge);
    check_launch(kOp);
    first += rows;
  }
}

}  // namespace mtp::cuda
