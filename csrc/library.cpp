// Every operator schema, on one screen. Implementations are registered beside their tensor
// checks in csrc/torch/<op>.cpp; fake kernels live in mtp_ext/fake.py.
#include <torch/library.h>

#include "torch/registration.h"

MTP_LIBRARY(m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  const auto def = [&](const char* schema) { m.def(schema, tags); };

  // Random numbers.
  def("philox_uniform(Tensor seeds, Tensor positions, int row, int stream, int n) -> Tensor");

  // Drafting.
  def("eh_proj(Tensor token_ids, Tensor hidden, Tensor embedding, Tensor weight, *, "
      "Tensor? enorm_weight=None, Tensor? hnorm_weight=None, Tensor? bias=None, "
      "Tensor? positions=None, float eps=1e-6, bool gemma_norm=False, "
      "bool hidden_first=False) -> Tensor");
  def("head_topk(Tensor hidden, Tensor weight, int k, *, Tensor? norm_weight=None, "
      "Tensor? bias=None, Tensor? weight_scale=None, Tensor? token_map=None, float eps=1e-6, "
      "bool gemma_norm=False, float softcap=0.0, int vocab_offset=0) "
      "-> (Tensor logits, Tensor ids, Tensor lse)");
  def("draft_sample(Tensor topk_logits, Tensor topk_ids, Tensor seeds, Tensor positions, "
      "int row, *, Tensor? temperature=None) -> (Tensor token_ids, Tensor probs)");
  def("skinny_linear(Tensor x, Tensor weight, *, Tensor? bias=None, Tensor? weight_scale=None) "
      "-> Tensor");

  // Verification attention, KV appended in place.
  def("kv_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor block_table, Tensor cache_lens, Tensor cu_q_lens, *, Tensor? k_scale=None, "
      "Tensor? v_scale=None, str layout=\"NHD\") -> ()");
  def("verify_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor block_table, Tensor cache_lens, Tensor cu_q_lens, int max_q_len, *, "
      "Tensor? tree_mask=None, float? scale=None, int window=-1, float softcap=0.0, "
      "Tensor? sinks=None, Tensor? k_scale=None, Tensor? v_scale=None, str layout=\"NHD\") "
      "-> (Tensor out, Tensor lse)");
  def("kv_compact(Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor block_table, "
      "Tensor cache_lens, Tensor accept_index, Tensor accept_lens, *, str layout=\"NHD\") -> ()");

  // Rejection sampling.
  def("rejection_sample(Tensor target_logits, Tensor draft_token_ids, Tensor cu_draft_lens, "
      "Tensor seeds, Tensor positions, int max_draft_len, *, Tensor? draft_probs=None, "
      "Tensor? draft_ids=None, Tensor? temperature=None, Tensor? top_k=None, "
      "Tensor? top_p=None, Tensor? min_p=None, Tensor? token_bitmask=None, "
      "str method=\"token\") -> (Tensor token_ids, Tensor num_accepted, Tensor status)");

  // Training. An operator with an underscore is its public one with the gradients of `loss` to
  // hidden, weight and bias, in f32; its autograd calls it.
  def("linear_mtp_loss(Tensor hidden, Tensor weight, Tensor labels, *, Tensor? cu_seqlens=None, "
      "Tensor? loss_mask=None, Tensor? depth_weights=None, Tensor? bias=None, "
      "Tensor? weight_grad_accum=None, int first_shift=2, int ignore_index=-100, "
      "float label_smoothing=0.0, float z_loss=0.0, float softcap=0.0) "
      "-> (Tensor loss, Tensor depth_loss, Tensor num_tokens, Tensor num_correct)");
  def("_linear_mtp_loss(Tensor hidden, Tensor weight, Tensor labels, Tensor? cu_seqlens, "
      "Tensor? loss_mask, Tensor? depth_weights, Tensor? bias, int first_shift, "
      "int ignore_index, float label_smoothing, float z_loss, float softcap, bool grad_hidden, "
      "bool grad_weight, bool grad_bias) -> (Tensor loss, Tensor depth_loss, Tensor num_tokens, "
      "Tensor num_correct, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)");

  def("soft_mtp_loss(Tensor hidden, Tensor weight, *, Tensor? teacher_hidden=None, "
      "Tensor? teacher_ids=None, Tensor? teacher_logprobs=None, Tensor? cu_seqlens=None, "
      "Tensor? loss_mask=None, Tensor? depth_weights=None, Tensor? bias=None, "
      "Tensor? weight_grad_accum=None, int first_shift=2, float kl_weight=1.0, "
      "float tv_weight=0.0, float softcap=0.0) "
      "-> (Tensor loss, Tensor depth_loss, Tensor num_tokens, Tensor acceptance)");
  def("_soft_mtp_loss(Tensor hidden, Tensor weight, Tensor? teacher_hidden, Tensor? teacher_ids, "
      "Tensor? teacher_logprobs, Tensor? cu_seqlens, Tensor? loss_mask, Tensor? depth_weights, "
      "Tensor? bias, int first_shift, float kl_weight, float tv_weight, float softcap, "
      "bool grad_hidden, bool grad_weight, bool grad_bias) -> (Tensor loss, Tensor depth_loss, "
      "Tensor num_tokens, Tensor acceptance, Tensor grad_hidden, Tensor grad_weight, "
      "Tensor grad_bias)");

  // What a trunk needs between its projections and attention, row by row.
  def("add_rms_norm(Tensor(a!) residual, Tensor weight, *, Tensor? x=None, float eps=1e-6, "
      "bool gemma_norm=False) -> Tensor");
  def("rope_qkv(Tensor qkv, Tensor positions, Tensor cos_sin, int num_heads, int num_kv_heads) "
      "-> (Tensor q, Tensor k, Tensor v)");
  def("silu_and_mul(Tensor gate_up) -> Tensor");
}
