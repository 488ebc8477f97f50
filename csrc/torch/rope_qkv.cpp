#include "mtp/rope_qkv.h"

#include "common.h"

namespace mtp::binding {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> rope_qkv(const at::Tensor& qkv,
                                                        const at::Tensor& positions,
                                                        const at::Tensor& cos_sin,
                                                        int64_t num_heads, int64_t num_kv_heads) {
  constexpr const char* kOp = "rope_qkv";
  const Checker check(kOp, qkv, "qkv");
  check.require(num_heads >= 1, "num_heads must be >= 1, got ", num_heads);
  check.require(num_kv_heads >= 1, "num_kv_heads must be >= 1, got ", num_kv_heads);
  check.tensor("cos_sin", cos_sin, {{"P"}, {"D"}}, {at::kFloat});
  const int64_t head_dim = cos_sin.size(1);
  check.require(head_dim % 2 == 0, "cos_sin's D must be even, got ", head_dim);
  const int64_t width = (num_heads + 2 * num_kv_heads) * head_dim;
  check.tensor("qkv", qkv, {{"T"}, {"(num_heads + 2 num_kv_heads) D", width}},
               {at::kFloat, at::kHalf, at::kBFloat16});
  const int64_t rows = qkv.size(0);
  check.tensor("positions", positions, {{"T", rows}}, {at::kLong});

  at::Tensor q = at::empty({rows, num_heads, head_dim}, qkv.options());
  at::Tensor k = at::empty({rows, num_kv_heads, head_dim}, qkv.options());
  at::Tensor v = at::empty({rows, num_kv_heads, head_dim}, qkv.options());
  if (qkv.numel() == 0) return {q, k, v};
  RopeQkvParams p;
  p.qkv = data_ptr<const void>(qkv, "qkv");
  p.positions = data_ptr<const int64_t>(positions, "positions");
  p.cos_sin = data_ptr<const float>(cos_sin, "cos_sin");
  p.q = data_ptr<void>(q, "q");
  p.k = data_ptr<void>(k, "k");
  p.v = data_ptr<void>(v, "v");
  p.dtype = to_dtype(qkv.scalar_type());
  p.rows = rows;
  p.num_positions = cos_sin.size(0);
  p.num_heads = num_heads;
  p.num_kv_heads = num_kv_heads;
  p.head_dim = head_dim;
  run_on(kOp, qkv, p, &cpu::launch_rope_qkv, MTP_CUDA_LAUNCHER(launch_rope_qkv));
  return {q, k, v};
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(rope_qkv, mtp::binding::rope_qkv)
