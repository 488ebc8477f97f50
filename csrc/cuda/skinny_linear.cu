// skinny_linear: out = x @ weight^T * weight_scale + bias.
//
// Bytes that must move: the weights, once for up to 64 rows; everything else is small. One launch:
// tiles of 128 weight rows go through weight_stream_kernel; a finished tile lies in shared memory
// as [row][weight row] and leaves in rows of 128 consecutive outputs. With few tiles k is split
// over the grid, so that a small layer fills the GPU too: parts go to the workspace (L2) in f32,
// and the last CTA to arrive at a tile adds them in order, so bits never depend on timing. More
// rows run in blocks of 64, since a row's bits must not depend on their number; only eh_proj takes
// the tiled product (large_m.cuh) there.
//
// Registers and shared memory: weight_stream.cuh and gemm.cuh.
#include "mtp/skinny_linear.h"

#include "cuda/common/split_sum.cuh"
#include "cuda/common/stream_linear.cuh"

namespace mtp::cuda {
namespace {

struct LinearEpilogue {
  struct Params {
    void* out;                    // [m, n]
    const void* bias;             // [n] or null
    const float* scale;           // [n] or null
    float* parts;                 // [segments * splits, m, n], or null without parts
    float* squares;               // [tiles, segments * splits, m]
    unsigned long long* tickets;  // [tiles]
    unsigned long long ticket_base;
    int64_t n, length;
    int m, segments, splits;  // splits of one segment
    bool normed[2];
    DType dtype;
    float eps;
  };

  static constexpr int kBytes = 16, kBytesPerRow = 2 * sizeof(float);  // of shared memory

  const Params& e;
  int* const last;
  float* const factors;  // [segments, rows]

  __device__ LinearEpilogue(const Params& params, float* smem, int, int, int)
      : e(params), last(reinterpret_cast<int*>(smem)), factors(smem + kBytes / sizeof(float)) {}

  __device__ __forceinline__ void store(int64_t m, int64_t row, float y) const {
    if (e.scale) y *= e.scale[row];
    if (e.bias) y += load_as(e.dtype, e.bias, row);
    store_as(e.dtype, e.out, m * e.n + row, y);
  }

  // body(row of the tile, column of the tile, weight row) for this thread's share of the tile.
  template <typename Body>
  __device__ __forceinline__ void each(const FinishedTile& t, const Body& body) const {
    for (int i = threadIdx.x; i < t.rows * kStreamTile; i += kStreamThreads) {
      const int column = i % kStreamTile;
      const int64_t row = static_cast<int64_t>(t.tile) * kStreamTile + column;
      if (row < e.n) body(i / kStreamTile, column, row);
    }
  }

  __device__ __forceinline__ void take(const FinishedTile& t) {
    if (!e.parts) {
      each(t, [&](int m, int column, int64_t row) {
        store(t.first_row + m, row, t.sums[m * t.pitch + column]);
      });
      return;
    }
    const int parts = e.segments * e.splits;
    each(t, [&](int m, int column, int64_t row) {
      e.parts[(static_cast<int64_t>(t.split) * e.m + t.first_row + m) * e.n + row] =
          t.sums[m * t.pitch + column];
    });
    float* const squares = e.squares + static_cast<int64_t>(t.ticket) * parts * e.m;
    if (t.squares) {
      for (int m = threadIdx.x; m < t.rows; m += kStreamThreads) {
        squares[t.split * e.m + m] = t.squares[m];
      }
    }
    if (!last_to_arrive(e.tickets + t.ticket, e.ticket_base, parts, last)) return;

    const bool normed = e.normed[0] || e.normed[1];
    if (normed) {
      for (int i = threadIdx.x; i < e.segments * t.rows; i += kStreamThreads) {
        const int segment = i / t.rows, m = i % t.rows;
        float sum = 0.0f;
        if (segment == 0 ? e.normed[0] : e.normed[1]) {
          for (int s = 0; s < e.splits; ++s) {
            sum += __ldcg(squares + (segment * e.splits + s) * e.m + m);
          }
          factors[i] = rms_factor(sum, e.length, e.eps);
        } else {
          factors[i] = 1.0f;
        }
      }
      __syncthreads();
    }
    each(t, [&](int m, int, int64_t row) {
      const float* part = e.parts + static_cast<int64_t>(t.first_row + m) * e.n + row;
      float y = 0.0f;
      for (int segment = 0; segment < e.segments; ++segment) {
        float sum = 0.0f;
        for (int s = 0; s < e.splits; ++s, part += e.m * e.n) sum += __ldcg(part);
        y += normed ? sum * factors[segment * t.rows + m] : sum;
      }
      store(t.first_row + m, row, y);
    });
    if (normed) __syncthreads();  // the factors are free again
  }

  __device__ __forceinline__ void finish() {}
};

// Where a pass keeps what in the workspace.
struct Workspace {
  int64_t prepared, parts, squares, tickets, end;
};

Workspace lay_out(const LinearParams& p, int64_t rows, int parts, int64_t row_tiles,
                  int64_t prepared) {
  const int64_t tiles = p.plan.tiles() * row_tiles;
  Workspace w;
  w.prepared = 0;
  w.parts = align_256(prepared);
  w.squares = w.parts + (parts > 1 ? align_256(parts * rows * p.plan.n * 4) : 0);
  w.tickets = w.squares + (parts > 1 && row_tiles == 1 ? align_256(tiles * parts * rows * 4) : 0);
  w.end = w.tickets + (parts > 1 ? tiles * 8 : 0);
  return w;
}

LinearEpilogue::Params make_epilogue(const LinearParams& p, int64_t first, int64_t rows,
                                     int segments, int splits, const Workspace& w) {
  char* const base = static_cast<char*>(p.workspace);
  LinearEpilogue::Params e = {};
  e.out = static_cast<char*>(p.out) + first * p.plan.n * dtype_bytes(p.dtype);
  e.bias = p.bias;
  e.scale = p.weight_scale;
  if (segments * splits > 1) {
    e.parts = reinterpret_cast<float*>(base + w.parts);
    e.squares = reinterpret_cast<float*>(base + w.squares);
    e.tickets = reinterpret_cast<unsigned long long*>(base + w.tickets);
    e.ticket_base = draw_ticket_base();
  }
  e.n = p.plan.n;
  e.length = p.plan.length;
  e.m = static_cast<int>(rows);
  e.segments = segments;
  e.splits = splits;
  e.dtype = p.dtype;
  e.eps = p.eps;
  return e;
}

LargeProblem large_problem(const LinearParams& p) {
  LargeProblem large = {};
  large.segments[0] = p.segments[0];
  large.segments[1] = p.segments[1];
  large.segment_count = p.plan.segments;
  large.weight = p.weight;
  large.prepared = p.workspace;
  large.rows = p.rows;
  large.n = p.plan.n;
  large.k = p.plan.segments * p.plan.length;
  large.weight_stride = p.weight_stride;
  large.weight_dtype = p.plan.weight_dtype;
  large.dtype = large_dtype(p.x_dtype, p.plan.weight_dtype);
  large.eps = p.eps;
  large.norm_offset = p.norm_offset;
  return large;
}

// Parts of k of the tiled product, where its tiles alone would not fill the GPU.
int64_t large_k_per_split(const LargeProblem& p) {
  constexpr int kWanted = 264, kLeast = 512;
  const int64_t tiles = static_cast<int64_t>(p.row_tiles()) * p.tiles();
  const int64_t wanted =
      std::clamp<int64_t>(kWanted / tiles, 1, std::max<int64_t>(1, p.k / kLeast));
  return std::max<int64_t>(1, ceil_div(ceil_div(p.k, wanted), int64_t{32})) * 32;
}

bool takes_tiled(const LinearParams& p) { return p.tiled && p.rows > kMaxStreamRows; }

}  // namespace

int64_t linear_workspace(const LinearParams& p) {
  if (!takes_tiled(p)) {
    const int64_t rows = std::min<int64_t>(p.rows, kMaxStreamRows);
    return lay_out(p, rows, p.plan.parts(), 1, 0).end;
  }
  const LargeProblem large = large_problem(p);
  const int splits =
      static_cast<int>(std::max<int64_t>(1, ceil_div(large.k, large_k_per_split(large))));
  return lay_out(p, p.rows, splits, large.row_tiles(), large.prepared_bytes()).end;
}

void launch_linear(const LinearParams& p, const char* op, cudaStream_t stream) {
  if (takes_tiled(p)) {
    const LargeProblem large = large_problem(p);
    const int64_t k_per_split = large_k_per_split(large);
    const int splits = static_cast<int>(std::max<int64_t>(1, ceil_div(large.k, k_per_split)));
    const Workspace w = lay_out(p, p.rows, splits, large.row_tiles(), large.prepared_bytes());
    launch_large<LinearEpilogue, false>(large, make_epilogue(p, 0, p.rows, 1, splits, w),
                                        std::min(large.tiles(), 65535), splits, k_per_split,
                                        LinearEpilogue::kBytes, stream, op);
    return;
  }
  for (int64_t first = 0; first < p.rows;) {
    const StreamShape shape = make_shape(p.plan, p.rows - first, LinearEpilogue::kBytes,
                                         LinearEpilogue::kBytesPerRow, op);
    const int64_t rows = std::min<int64_t>(shape.rows(), p.rows - first);
    const Workspace w = lay_out(p, rows, p.plan.parts(), 1, 0);
    LinearEpilogue::Params e = make_epilogue(p, first, rows, p.plan.segments, p.plan.splits, w);
    StreamParams stream_params = {};
    for (int i = 0; i < p.plan.segments; ++i) {
      stream_params.segments[i] = p.segments[i].from_row(first);
      e.normed[i] = p.segments[i].norm_weight != nullptr;
    }
    stream_params.weight = p.weight;
    stream_params.weight_stride = p.weight_stride;
    stream_params.norm_offset = p.norm_offset;
    stream_params.m = static_cast<int>(rows);
    stream_weights<LinearEpilogue>(p.plan, shape, stream_params, e, stream_ctas(p.plan, shape, op),
                                   stream, op);
    first += rows;
  }
}

namespace {

LinearParams linear_of(const SkinnyLinearParams& p) {
  LinearParams linear = {};
  linear.segments[0] = make_segment(p.x, p.x_stride, p.k, p.dtype, nullptr, p.dtype);
  linear.plan = make_plan(p.n, p.k, 1, p.weight_dtype, p.dtype, false, true);
  linear.weight = p.weight;
  linear.bias = p.bias;
  linear.weight_scale = p.weight_scale;
  linear.out = p.out;
  linear.workspace = p.workspace;
  linear.rows = p.m;
  linear.weight_stride = p.weight_stride;
  linear.dtype = linear.x_dtype = p.dtype;
  return linear;
}

}  // namespace

int64_t skinny_linear_workspace(const SkinnyLinearParams& p) {
  return linear_workspace(linear_of(p));
}

void launch_skinny_linear(const SkinnyLinearParams& p, void* stream) {
  launch_linear(linear_of(p), "skinny_linear", static_cast<cudaStream_t>(stream));
}

}  // namespace mtp::cuda
