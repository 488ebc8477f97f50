// eh_proj: concat(norm_e(embedding[ids]), norm_h(hidden)) @ weight^T + bias.
//
// skinny_linear behind another prologue: pack_rows_kernel gathers, normalises and concatenates
// each row into the workspace (a few KB per row, which stay in L2), and the weights, by far the
// most bytes, stream past it once for up to 64 rows. The prologue is a launch of its own: done
// inside the stream kernel, every CTA would have to read all rows whole to know their norms.
#include "mtp/eh_proj.h"

#include "cuda/common/stream_linear.cuh"

namespace mtp::cuda {
namespace {

// The finer of two activation dtypes.
DType finer(DType a, DType b) { return a == b ? a : DType::kF32; }

StreamPlan plan_of(const EhProjParams& p) {
  return make_plan(p.n, 2 * p.h, p.weight_dtype, finer(p.dtype, p.embedding_dtype), true);
}

}  // namespace

int64_t eh_proj_workspace(const EhProjParams& p) { return linear_workspace(plan_of(p), p.t); }

void launch_eh_proj(const EhProjParams& p, void* stream) {
  Segment e = {};
  e.data = p.embedding;
  e.norm_weight = p.enorm_weight;
  e.ids = p.token_ids;
  e.positions = p.positions;
  e.stride = p.embedding_stride;
  e.length = p.h;
  e.limit = p.v;
  e.dtype = p.embedding_dtype;
  e.norm_dtype = p.dtype;
  e.id_dtype = p.id_dtype;
  e.position_dtype = p.position_dtype;
  Segment h = {};
  h.data = p.hidden;
  h.norm_weight = p.hnorm_weight;
  h.stride = p.hidden_stride;
  h.length = p.h;
  h.dtype = p.dtype;
  h.norm_dtype = p.dtype;

  LinearParams linear = {};
  linear.pack.segments[0] = p.hidden_first ? h : e;
  linear.pack.segments[1] = p.hidden_first ? e : h;
  linear.pack.segment_count = 2;
  linear.pack.eps = p.eps;
  linear.pack.norm_offset = p.gemma_norm ? 1.0f : 0.0f;
  linear.plan = plan_of(p);
  linear.weight = p.weight;
  linear.bias = p.bias;
  linear.out = p.out;
  linear.workspace = p.workspace;
  linear.rows = p.t;
  linear.weight_stride = p.weight_stride;
  linear.dtype = p.dtype;
  launch_linear(linear, "eh_proj", static_cast<cudaStream_t>(stream));
}

}  // namespace mtp::cuda
