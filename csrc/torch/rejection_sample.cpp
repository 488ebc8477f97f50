#include "mtp/rejection_sample.h"

#include <limits>

#include "common.h"

namespace mtp::binding {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> rejection_sample(
    const at::Tensor& target_logits, const at::Tensor& draft_token_ids,
    const at::Tensor& cu_draft_lens, const at::Tensor& seeds, const at::Tensor& positions,
    int64_t max_draft_len, const std::optional<at::Tensor>& draft_probs,
    const std::optional<at::Tensor>& draft_ids, const std::optional<at::Tensor>& temperature,
    const std::optional<at::Tensor>& top_k, const std::optional<at::Tensor>& top_p,
    const std::optional<at::Tensor>& min_p, const std::optional<at::Tensor>& token_bitmask,
    c10::string_view method) {
  constexpr const char* kOp = "rejection_sample";
  const Checker check(kOp, target_logits, "target_logits");
  check.dtype("target_logits", target_logits, {at::kFloat, at::kHalf, at::kBFloat16});
  check.tensor("seeds", seeds, {{"B"}}, {at::kLong});
  check.tensor("draft_token_ids", draft_token_ids, {{"N"}}, {at::kInt, at::kLong});
  const int64_t batch = seeds.size(0), drafts = draft_token_ids.size(0);
  check.shape("target_logits", target_logits, {{"N+B", drafts + batch}, {"V"}});
  check.rows_contiguous("target_logits", target_logits);
  const int64_t vocab = target_logits.size(1);
  check.require(vocab >= 1 && vocab <= std::numeric_limits<int32_t>::max(),
                "target_logits must have 1 to 2^31 - 1 columns, got ", vocab);
  check.tensor("cu_draft_lens", cu_draft_lens, {{"B+1", batch + 1}}, {at::kInt});
  check.tensor("positions", positions, {{"B", batch}}, {at::kLong});
  check.require(max_draft_len >= 0 && max_draft_len < 65536,
                "max_draft_len must be in [0, 65536), got ", max_draft_len);
  check.require(method == "token" || method == "block",
                "method must be \"token\" or \"block\", got \"", method, "\"");
  int64_t sparse = 0;
  if (draft_ids.has_value()) {
    check.require(draft_probs.has_value(), "draft_ids needs draft_probs of the same shape");
    check.device("draft_ids", *draft_ids);
    check.dtype("draft_ids", *draft_ids, {at::kInt, at::kLong});
    check.shape("draft_ids", *draft_ids, {{"N", drafts}, {"m"}});
    check.rows_contiguous("draft_ids", *draft_ids);
    sparse = draft_ids->size(1);
    check.require(drafts == 0 || (sparse >= 1 && sparse <= kMaxSparse), "draft_ids must have 1 to ",
                  kMaxSparse, " columns, got ", sparse);
  }
  if (draft_probs.has_value()) {
    check.device("draft_probs", *draft_probs);
    check.dtype("draft_probs", *draft_probs, {at::kFloat});
    const bool is_sparse = draft_ids.has_value();
    check.shape("draft_probs", *draft_probs,
                {{"N", drafts}, {is_sparse ? "m" : "V", is_sparse ? sparse : vocab}});
    check.rows_contiguous("draft_probs", *draft_probs);
  }
  check.tensor("temperature", temperature, {{"B", batch}}, {at::kFloat});
  check.tensor("top_k", top_k, {{"B", batch}}, {at::kInt});
  check.tensor("top_p", top_p, {{"B", batch}}, {at::kFloat});
  check.tensor("min_p", min_p, {{"B", batch}}, {at::kFloat});
  if (token_bitmask.has_value()) {
    check.device("token_bitmask", *token_bitmask);
    check.dtype("token_bitmask", *token_bitmask, {at::kInt});
    check.shape("token_bitmask", *token_bitmask,
                {{"N+B", drafts + batch}, {"ceil(V/32)", ceil_div<int64_t>(vocab, 32)}});
    check.rows_contiguous("token_bitmask", *token_bitmask);
  }

  const auto options = seeds.options().dtype(at::kInt);
  at::Tensor token_ids = at::empty({batch, max_draft_len + 1}, options);
  at::Tensor num_accepted = at::empty({batch}, options);
  at::Tensor status = at::empty({batch}, options);
  if (batch == 0) return {token_ids, num_accepted, status};

  RejectionSampleParams p{};
  p.target_logits = data_ptr<const void>(target_logits, "target_logits");
  p.draft_token_ids = data_ptr<const void>(draft_token_ids, "draft_token_ids");
  p.cu_draft_lens = data_ptr<const int32_t>(cu_draft_lens, "cu_draft_lens");
  p.seeds = data_ptr<const int64_t>(seeds, "seeds");
  p.positions = data_ptr<const int64_t>(positions, "positions");
  p.temperature = data_ptr<const float>(temperature, "temperature");
  p.top_k = data_ptr<const int32_t>(top_k, "top_k");
  p.top_p = data_ptr<const float>(top_p, "top_p");
  p.min_p = data_ptr<const float>(min_p, "min_p");
  p.token_ids = data_ptr<int32_t>(token_ids, "token_ids");
  p.num_accepted = data_ptr<int32_t>(num_accepted, "num_accepted");
  p.status = data_ptr<int32_t>(status, "status");
  p.target_stride = target_logits.stride(0);
  p.batch = batch;
  p.num_drafts = drafts;
  p.vocab = vocab;
  p.sparse = sparse;
  p.max_draft_len = max_draft_len;
  p.logits_type = to_dtype(target_logits.scalar_type());
  p.draft_token_type = to_dtype(draft_token_ids.scalar_type());
  p.block = method == "block";
  if (draft_probs.has_value()) {
    p.draft_probs = data_ptr<const float>(draft_probs, "draft_probs");
    p.probs_stride = draft_probs->stride(0);
  }
  if (draft_ids.has_value()) {
    p.draft_ids = data_ptr<const void>(draft_ids, "draft_ids");
    p.ids_stride = draft_ids->stride(0);
    p.draft_ids_type = to_dtype(draft_ids->scalar_type());
  }
  if (token_bitmask.has_value()) {
    p.token_bitmask = data_ptr<const uint32_t>(token_bitmask, "token_bitmask");
    p.mask_stride = token_bitmask->stride(0);
  }
  const at::Tensor workspace =
      allocate_workspace(target_logits, p, &cpu::rejection_sample_workspace,
                         MTP_CUDA_LAUNCHER(rejection_sample_workspace));
  run_on(kOp, target_logits, p, &cpu::launch_rejection_sample,
         MTP_CUDA_LAUNCHER(launch_rejection_sample));
  return {token_ids, num_accepted, status};
}

}  // namespace
}  // namespace mtp::binding

MTP_REGISTER(rejection_sample, mtp::binding::rejection_sample)
