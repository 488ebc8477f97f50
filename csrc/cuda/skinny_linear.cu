// skinny_linear: out = x @ weight^T * weight_scale + bias.
//
// Bytes that must move: the weights, once for up to 64 rows; everything else is small. Tiles of 128
// weight rows go through weight_stream_kernel; a finished tile lies in shared memory as
// [row][weight row] and leaves in rows of 128 consecutive outputs. With few tiles k is split over
// the grid, parts are stored in f32 and add_splits_kernel adds them in order, so that a small layer
// fills the GPU too and its bits never depend on timing.
#include "mtp/skinny_linear.h"

#include "cuda/common/stream_linear.cuh"

namespace mtp::cuda {
namespace {

struct LinearEpilogue {
  struct Params {
    void* out;           // [m, n]
    const void* bias;    // [n] or null
    const float* scale;  // [n] or null
    float* parts;        // [splits, m, n], or null without splits
    int64_t n;
    int m, splits;
    DType dtype;
  };

  const Params& e;

  __device__ LinearEpilogue(const Params& params, const StreamParams&, float*) : e(params) {}

  static __device__ __forceinline__ void store(const Params& e, int m, int64_t row, float y) {
    if (e.scale) y *= e.scale[row];
    if (e.bias) y += load_as(e.dtype, e.bias, row);
    store_as(e.dtype, e.out, m * e.n + row, y);
  }

  __device__ __forceinline__ void take(int tile, const float* logits) {
    for (int i = threadIdx.x; i < e.m * kStreamTile; i += kStreamThreads) {
      const int m = i / kStreamTile, column = i % kStreamTile;
      const int64_t row = static_cast<int64_t>(tile) * kStreamTile + column;
      if (row >= e.n) continue;
      const float y = logits[m * kTilePitch + column];
      if (e.parts) {
        e.parts[(static_cast<int64_t>(blockIdx.y) * e.m + m) * e.n + row] = y;
      } else {
        store(e, m, row, y);
      }
    }
  }

  __device__ __forceinline__ void finish() {}
};

__global__ void __launch_bounds__(kStreamThreads)
    add_splits_kernel(const LinearEpilogue::Params e) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kStreamThreads + threadIdx.x;
  if (row >= e.n) return;
  const int m = blockIdx.y;
  float sum = 0.0f;
  for (int s = 0; s < e.splits; ++s) {
    sum += e.parts[(static_cast<int64_t>(s) * e.m + m) * e.n + row];
  }
  LinearEpilogue::store(e, m, row, sum);
}

}  // namespace

int64_t linear_workspace(const StreamPlan& plan, int64_t rows) {
  rows = std::min<int64_t>(rows, kMaxStreamRows);
  const int64_t parts = plan.splits > 1 ? plan.splits * rows * plan.n * 4 : 0;
  return plan.packed_bytes(rows) + parts;
}

void launch_linear(const LinearParams& p, const char* op, cudaStream_t stream) {
  const int most = rows_per_pass(p.plan, 0, op);
  for (int64_t first = 0; first < p.rows; first += most) {
    PackParams pack = p.pack;
    pack.rows = static_cast<int>(std::min<int64_t>(most, p.rows - first));
    for (Segment& s : pack.segments) {
      if (s.ids) {
        s.ids = static_cast<const char*>(s.ids) + first * dtype_bytes(s.id_dtype);
        if (s.positions) {
          s.positions =
              static_cast<const char*>(s.positions) + first * dtype_bytes(s.position_dtype);
        }
      } else {
        s.data = static_cast<const char*>(s.data) + first * s.stride * dtype_bytes(s.dtype);
      }
    }
    LinearEpilogue::Params e;
    e.out = static_cast<char*>(p.out) + first * p.plan.n * dtype_bytes(p.dtype);
    e.bias = p.bias;
    e.scale = p.weight_scale;
    e.parts = p.plan.splits > 1 ? reinterpret_cast<float*>(static_cast<char*>(p.workspace) +
                                                           p.plan.packed_bytes(pack.rows))
                                : nullptr;
    e.n = p.plan.n;
    e.m = pack.rows;
    e.splits = p.plan.splits;
    e.dtype = p.dtype;
    stream_weights<LinearEpilogue>(p.plan, pack, p.workspace, p.weight, p.weight_stride, e, 0,
                                   p.plan.tiles(), stream, op);
    if (e.parts) {
      const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(e.n, kStreamThreads)), e.m);
      add_splits_kernel<<<grid, kStreamThreads, 0, stream>>>(e);
      check_launch(op);
    }
  }
}

namespace {

StreamPlan plan_of(const SkinnyLinearParams& p) {
  return make_plan(p.n, p.k, p.weight_dtype, p.dtype, true);
}

}  // namespace

int64_t skinny_linear_workspace(const SkinnyLinearParams& p) {
  return linear_workspace(plan_of(p), p.m);
}

void launch_skinny_linear(const SkinnyLinearParams& p, void* stream) {
  LinearParams linear = {};
  Segment& x = linear.pack.segments[0];
  x.data = p.x;
  x.stride = p.x_stride;
  x.length = p.k;
  x.dtype = p.dtype;
  linear.pack.segment_count = 1;
  linear.plan = plan_of(p);
  linear.weight = p.weight;
  linear.bias = p.bias;
  linear.weight_scale = p.weight_scale;
  linear.out = p.out;
  linear.workspace = p.workspace;
  linear.rows = p.m;
  linear.weight_stride = p.weight_stride;
  linear.dtype = p.dtype;
  launch_linear(linear, "skinny_linear", static_cast<cudaStream_t>(stream));
}

}  // namespace mtp::cuda
