// head_topk: LM head, top-k and log-sum-exp in one pass over the weights.
//
// Bytes that must move: the weights, once for up to 64 rows. Persistent CTAs take tiles of 128
// vocabulary rows from weight_stream_kernel. A finished tile of logits lies in shared memory just
// long enough for one warp per activation row to take its maximum, its sum of exponentials and the
// few logits that beat the k-th best so far; it never reaches global memory. The k best are kept
// sorted in shared memory as 64-bit words (ordered bits of the logit, then the complement of the
// row), whose integer order is the operator's order, ties and NaN included. k = 1 keeps one word
// and reduces.
//
// A second kernel merges: the lists of all CTAs (a total order, so any split gives the same), and
// (maximum, sum) of every tile in order, so that lse depends neither on M nor on the grid.
#include "mtp/head_topk.h"

#include "cuda/common/weight_stream.cuh"

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

struct HeadEpilogue {
  struct Params {
    const void* bias;    // [n] or null
    const float* scale;  // [n] or null
    uint64_t* lists;     // [CTAs, m, k]
    float2* sums;        // [tiles, m]: maximum, sum of exponentials
    DType dtype;
    int m, k;
    float softcap;
  };

  const Params& e;
  const int64_t n;
  uint64_t* best;  // [m, k] in shared memory; row m is warp m % 8's
  const int warp, lane;

  __device__ HeadEpilogue(const Params& params, const StreamParams& p, float* smem)
      : e(params),
        n(p.n),
        best(reinterpret_cast<uint64_t*>(smem)),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp) {
    for (int m = warp; m < e.m; m += kStreamThreads / kWarp) {
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

  __device__ __forceinline__ void take(int tile, const float* logits) {
    constexpr int kPerLane = kStreamTile / kWarp;
    const int64_t first = static_cast<int64_t>(tile) * kStreamTile;
    for (int m = warp; m < e.m; m += kStreamThreads / kWarp) {
      float x[kPerLane];
      float highest = -INFINITY;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int column = lane + j * kWarp;
        x[j] = -INFINITY;
        if (first + column < n)
          x[j] = finish_logit(logits[m * kTilePitch + column], first + column);
        highest = fmaxf(highest, x[j]);
      }
      highest = warp_reduce(highest, [](float a, float b) { return fmaxf(a, b); });
      const float base = exp_base(highest);
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum += expf(x[j] - base);
      sum = warp_sum(sum);
      if (lane == 0) e.sums[static_cast<int64_t>(tile) * e.m + m] = make_float2(highest, sum);

      uint64_t* const list = best + m * e.k;
      if (e.k == 1) {
        uint64_t top = 0;
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          const int64_t row = first + lane + j * kWarp;
          if (row < n) top = larger(top, candidate(x[j], row));
        }
        top = warp_reduce(top, larger);
        if (lane == 0) list[0] = larger(list[0], top);
        __syncwarp();
        continue;
      }
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const int64_t row = first + lane + j * kWarp;
        const uint64_t mine = row < n ? candidate(x[j], row) : 0;
        unsigned waiting = __ballot_sync(kAllLanes, mine > list[e.k - 1]);
        while (waiting) {
          const uint64_t c = __shfl_sync(kAllLanes, mine, __ffs(waiting) - 1);
          waiting &= waiting - 1;
          if (c > list[e.k - 1]) insert(list, c);
        }
      }
    }
  }

  __device__ __forceinline__ void finish() {
    for (int m = warp; m < e.m; m += kStreamThreads / kWarp) {
      for (int i = lane; i < e.k; i += kWarp) {
        e.lists[(static_cast<int64_t>(blockIdx.x) * e.m + m) * e.k + i] = best[m * e.k + i];
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
  return make_plan(p.v, p.h, p.weight_dtype, p.dtype, false);
}

// Lists of the k best per CTA and row.
int64_t list_bytes(const HeadTopkParams& p, int64_t rows) {
  return StreamPlan::align(kMaxLists * rows * p.k * 8);
}

}  // namespace

int64_t head_topk_workspace(const HeadTopkParams& p) {
  const StreamPlan plan = plan_of(p);
  const int64_t rows = std::min<int64_t>(p.m, kMaxStreamRows);
  return plan.packed_bytes(rows) + list_bytes(p, rows) + plan.tiles() * rows * 8;
}

void launch_head_topk(const HeadTopkParams& p, void* stream) {
  constexpr const char* kOp = "head_topk";
  const StreamPlan plan = plan_of(p);
  const int64_t list_bytes_per_row = p.k * 8;
  const int most = rows_per_pass(plan, list_bytes_per_row, kOp);
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, kOp);
  const int ctas = std::min({plan.tiles(), 2 * processors, kMaxLists});
  for (int64_t first = 0; first < p.m; first += most) {
    PackParams pack = {};
    pack.rows = static_cast<int>(std::min<int64_t>(most, p.m - first));
    pack.segment_count = 1;
    pack.eps = p.eps;
    pack.norm_offset = p.gemma_norm ? 1.0f : 0.0f;
    Segment& x = pack.segments[0];
    x.data = static_cast<const char*>(p.hidden) + first * p.hidden_stride * dtype_bytes(p.dtype);
    x.norm_weight = p.norm_weight;
    x.stride = p.hidden_stride;
    x.length = p.h;
    x.dtype = p.dtype;
    x.norm_dtype = p.dtype;

    char* const workspace = static_cast<char*>(p.workspace);
    HeadEpilogue::Params e;
    e.bias = p.bias;
    e.scale = p.weight_scale;
    e.lists = reinterpret_cast<uint64_t*>(workspace + plan.packed_bytes(pack.rows));
    e.sums = reinterpret_cast<float2*>(reinterpret_cast<char*>(e.lists) + list_bytes(p, pack.rows));
    e.dtype = p.dtype;
    e.m = pack.rows;
    e.k = p.k;
    e.softcap = p.softcap;
    stream_weights<HeadEpilogue>(plan, pack, workspace, p.weight, p.weight_stride, e,
                                 list_bytes_per_row, ctas, static_cast<cudaStream_t>(stream), kOp);

    MergeParams merge;
    merge.lists = e.lists;
    merge.sums = e.sums;
    merge.token_map = p.token_map;
    merge.logits = p.logits + first * p.k;
    merge.ids = p.ids + first * p.k;
    merge.lse = p.lse + first;
    merge.vocab_offset = p.vocab_offset;
    merge.list_count = ctas;
    merge.tiles = plan.tiles();
    merge.m = pack.rows;
    merge.k = p.k;
    merge.map_dtype = p.map_dtype;
    merge_heads_kernel<<<pack.rows, kStreamThreads, 0, static_cast<cudaStream_t>(stream)>>>(merge);
    check_launch(kOp);
  }
}

}  // namespace mtp::cuda
