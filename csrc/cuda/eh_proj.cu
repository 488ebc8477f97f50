// eh_proj: concat(norm_e(embedding[ids]), norm_h(hidden)) @ weight^T + bias.
//
// Bytes that must move: the weights, once for up to 64 rows; the rows themselves are a few KB each.
// One launch: skinny_linear with two segments of k. The rows are gathered from the embedding and
// from hidden as their chunks are needed, times the norm's weight. A norm's factor is only known
// once a whole row has been seen, and since k is split at least between the two halves, no CTA
// sees it: each adds up the squares of its part, and the last CTA to arrive at a tile turns them
// into the factors of the two halves. Nothing is read twice for it and no CTA waits.
//
// More than 64 rows: the tiled product (large_m.cuh), which gathers and normalises as it copies.
#include "mtp/eh_proj.h"

#include "cuda/common/stream_linear.cuh"

namespace mtp::cuda {
namespace {

// The finer of two activation dtypes.
DType finer(DType a, DType b) { return a == b ? a : DType::kF32; }

LinearParams linear_of(const EhProjParams& p) {
  Segment e = make_segment(p.embedding, p.embedding_stride, p.h, p.embedding_dtype, p.enorm_weight,
                           p.dtype);
  e.ids = p.token_ids;
  e.positions = p.positions;
  e.limit = p.v;
  e.id_dtype = p.id_dtype;
  e.position_dtype = p.position_dtype;
  const Segment h = make_segment(p.hidden, p.hidden_stride, p.h, p.dtype, p.hnorm_weight, p.dtype);

  LinearParams linear = {};
  linear.segments[0] = p.hidden_first ? h : e;
  linear.segments[1] = p.hidden_first ? e : h;
  linear.dtype = p.dtype;
  linear.x_dtype = finer(p.dtype, p.embedding_dtype);
  linear.plan = make_plan(p.n, p.h, 2, p.weight_dtype, linear.x_dtype,
                          p.enorm_weight || p.hnorm_weight, true);
  linear.weight = p.weight;
  linear.bias = p.bias;
  linear.out = p.out;
  linear.workspace = p.workspace;
  linear.rows = p.t;
  linear.weight_stride = p.weight_stride;
  linear.eps = p.eps;
  linear.norm_offset = p.gemma_norm ? 1.0f : 0.0f;
  linear.tiled = true;
  return linear;
}

}  // namespace

int64_t eh_proj_workspace(const EhProjParams& p) { return linear_workspace(linear_of(p)); }

void launch_eh_proj(const EhProjParams& p, void* stream) {
  launch_linear(linear_of(p), "eh_proj", static_cast<cudaStream_t>(stream));
}

}  // namespace mtp::cuda
