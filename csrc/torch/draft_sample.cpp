#include "mtp/draft_sample.h"

#include "common.h"

namespace mtp::binding {
namespace {

std::tuple<at::Tensor, at::Tensor> draft_sample(const at::Tensor& topk_logits,
                                                const at::Tensor& topk_ids, const at::Tensor& seeds,
                                                const at::Tensor& positions, int64_t row,
                                                const std::optional<at::Tensor>& temperature) {
  constexpr const char* kOp = "draft_sample";
  const Checker check(kOp, topk_logits, "topk_logits");
  check.tensor("topk_logits", topk_logits, {{"B"}, {"k"}}, {at::kFloat});
  const int64_t batch = topk_logits.size(0), k = topk_logits.size(1);
  check.require(k >= 1 && k <= kMaxDraftTopK, "topk_logits must have 1 to ", kMaxDraftTopK,
                " columns, got ", k);
  check.tensor("topk_ids", topk_ids, {{"B", batch}, {"k", k}}, {at::kInt, at::kLong});
  check.tensor("seeds", seeds, {{"B", batch}}, {at::kLong});
  check.tensor("positions", positions, {{"B", batch}}, {at::kLong});
  check.require(row >= 0 && row < 65536, "row must be in [0, 65536), got ", row);
  check.tensor("temperature", temperature, {{"B", batch}}, {at::kFloat});

  at::Tensor token_ids = at::empty({batch}, seeds.options());
  at::Tensor probs = at::empty({batch, k}, topk_logits.options());
  if (batch == 0) return {token_ids, probs};
  DraftSampleParams p;
  p.topk_logits = data_ptr<const float>(topk_logits, "topk_logits");
  p.topk_ids = data_ptr<const void>(topk_ids, "topk_ids");
  p.seeds = data_ptr<const int64_t>(seeds, "seeds");
  p.positions = data_ptr<const int64_t>(positions, "positions");
  p.temperature = data_ptr<const float>(temperature, "temperature");
  p.token_ids = data_ptr<int64_t>(token_ids, "token_ids");
  p.probs = data_ptr<float>(probs, "probs");
  p.batch = batch;
  p.k = k;
  p.row = static_cast<uint32_t>(row);
  p.ids_type = to_dtype(topk_ids.scalar_type());
  run_on(kOp, topk_logits, p, &cpu::launch_draft_sample, MTP_CUDA_LAUNCHER(launch_draft_sample));
  return {token_ids, probs};
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(draft_sample, mtp::binding::draft_sample)
