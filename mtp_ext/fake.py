"""Fake kernels: output shapes and dtypes for `torch.compile` and `FakeTensorMode`.

They check what the real ones check of shapes and dtypes, so that a wrong call fails while it is
traced. Sizes may be symbolic: comparisons go through `torch._check`.
"""

import torch
from torch import Tensor


def _check_shape(op: str, name: str, t: Tensor | None, *dims: int | torch.SymInt | None) -> None:
    """Every dimension that is not None must match."""
    if t is None:
        return
    message = f"{op}: {name} must have shape {list(dims)}, got {list(t.shape)}"
    torch._check(t.dim() == len(dims), lambda: message)
    for size, expected in zip(t.shape, dims):
        if expected is not None:
            torch._check(size == expected, lambda: message)


def _check_dtype(op: str, name: str, t: Tensor | None, *allowed: torch.dtype) -> None:
    if t is None:
        return
    torch._check(
        t.dtype in allowed,
        lambda: f"{op}: {name} must have dtype {' or '.join(map(str, allowed))}, got {t.dtype}",
    )


# ---- random numbers ------------------------------------------------------------------------------


@torch.library.register_fake("mtp::philox_uniform")
def _philox_uniform(seeds, positions, row, stream, n):
    op = "philox_uniform"
    _check_dtype(op, "seeds", seeds, torch.int64)
    _check_shape(op, "seeds", seeds, None)
    _check_dtype(op, "positions", positions, torch.int64)
    _check_shape(op, "positions", positions, seeds.shape[0])
    return seeds.new_empty((seeds.shape[0], n), dtype=torch.float32)


# ---- between projections and attention -----------------------------------------------------------


_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.register_fake("mtp::add_rms_norm")
def _add_rms_norm(residual, weight, *, x=None, eps=1e-6, gemma_norm=False):
    op = "add_rms_norm"
    _check_dtype(op, "residual", residual, torch.float32)
    _check_shape(op, "residual", residual, None, None)
    _check_dtype(op, "weight", weight, *_FLOATS)
    _check_shape(op, "weight", weight, residual.shape[1])
    _check_dtype(op, "x", x, weight.dtype)
    _check_shape(op, "x", x, *residual.shape)
    return weight.new_empty(residual.shape)


@torch.library.register_fake("mtp::rope_qkv")
def _rope_qkv(qkv, positions, cos_sin, num_heads, num_kv_heads):
    op = "rope_qkv"
    _check_dtype(op, "cos_sin", cos_sin, torch.float32)
    _check_shape(op, "cos_sin", cos_sin, None, None)
    rows, head_dim = qkv.shape[0], cos_sin.shape[1]
    _check_dtype(op, "qkv", qkv, *_FLOATS)
    _check_shape(op, "qkv", qkv, None, (num_heads + 2 * num_kv_heads) * head_dim)
    _check_dtype(op, "positions", positions, torch.int64)
    _check_shape(op, "positions", positions, rows)
    q = qkv.new_empty((rows, num_heads, head_dim))
    k = qkv.new_empty((rows, num_kv_heads, head_dim))
    return q, k, torch.empty_like(k)


@torch.library.register_fake("mtp::silu_and_mul")
def _silu_and_mul(gate_up):
    op = "silu_and_mul"
    _check_dtype(op, "gate_up", gate_up, *_FLOATS)
    _check_shape(op, "gate_up", gate_up, None, None)
    torch._check(gate_up.shape[1] % 2 == 0, lambda: f"{op}: gate_up's last dimension must be even")
    return gate_up.new_empty((gate_up.shape[0], gate_up.shape[1] // 2))


# ---- verification attention ----------------------------------------------------------------------


def _check_append(
    op, k, v, k_cache, v_cache, table, cache_lens, cu_q_lens, k_scale, v_scale, layout
):
    torch._check(
        layout in ("NHD", "HND"), lambda: f'{op}: layout must be "NHD" or "HND", got "{layout}"'
    )
    _check_dtype(op, "k", k, *_FLOATS)
    _check_shape(op, "k", k, None, None, None)
    _check_dtype(op, "v", v, k.dtype)
    _check_shape(op, "v", v, *k.shape)
    _, kv_heads, dim = k.shape
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check_dtype(op, name, cache, k.dtype, torch.float8_e4m3fn)
        heads = (kv_heads, None) if layout == "HND" else (None, kv_heads)
        _check_shape(op, name, cache, None, *heads, dim)
    _check_dtype(op, "v_cache", v_cache, k_cache.dtype)
    _check_shape(op, "v_cache", v_cache, *k_cache.shape)
    _check_dtype(op, "block_table", table, torch.int32)
    _check_shape(op, "block_table", table, None, None)
    _check_dtype(op, "cache_lens", cache_lens, torch.int32)
    _check_shape(op, "cache_lens", cache_lens, table.shape[0])
    _check_dtype(op, "cu_q_lens", cu_q_lens, torch.int32)
    _check_shape(op, "cu_q_lens", cu_q_lens, table.shape[0] + 1)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        torch._check(
            scale is None or k_cache.dtype == torch.float8_e4m3fn,
            lambda name=name: f"{op}: {name} needs a cache of dtype Float8_e4m3fn",
        )
        _check_dtype(op, name, scale, torch.float32)
        _check_shape(op, name, scale, None)


@torch.library.register_fake("mtp::kv_append")
def _kv_append(
    k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, *, k_scale=None, v_scale=None,
    layout="NHD",
):  # fmt: skip
    _check_append(
        "kv_append", k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, k_scale, v_scale,
        layout,
    )  # fmt: skip


@torch.library.register_fake("mtp::verify_attention")
def _verify_attention(
    q, k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, max_q_len, *, tree_mask=None,
    scale=None, window=-1, softcap=0.0, sinks=None, k_scale=None, v_scale=None, layout="NHD",
):  # fmt: skip
    op = "verify_attention"
    _check_append(
        op, k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, k_scale, v_scale, layout
    )
    _check_dtype(op, "q", q, k.dtype)
    _check_shape(op, "q", q, k.shape[0], None, k.shape[2])
    _check_dtype(op, "tree_mask", tree_mask, torch.int64)
    _check_shape(op, "tree_mask", tree_mask, q.shape[0])
    _check_dtype(op, "sinks", sinks, torch.float32)
    _check_shape(op, "sinks", sinks, q.shape[1])
    out = q.new_empty(q.shape)
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.register_fake("mtp::kv_compact")
def _kv_compact(
    k_caches, v_caches, block_table, cache_lens, accept_index, accept_lens, *, layout="NHD"
):
    op = "kv_compact"
    torch._check(
        len(k_caches) == len(v_caches),
        lambda: f"{op}: v_caches must have as many layers as k_caches, {len(k_caches)}",
    )
    for cache in (*k_caches, *v_caches):
        _check_shape(op, "caches", cache, *k_caches[0].shape)
        _check_dtype(op, "caches", cache, k_caches[0].dtype)
    _check_dtype(op, "block_table", block_table, torch.int32)
    _check_shape(op, "block_table", block_table, None, None)
    batch = block_table.shape[0]
    _check_dtype(op, "cache_lens", cache_lens, torch.int32)
    _check_shape(op, "cache_lens", cache_lens, batch)
    _check_dtype(op, "accept_index", accept_index, torch.int32, torch.int64)
    _check_shape(op, "accept_index", accept_index, batch, None)
    _check_dtype(op, "accept_lens", accept_lens, torch.int32)
    _check_shape(op, "accept_lens", accept_lens, batch)


# ---- sampling ------------------------------------------------------------------------------------


@torch.library.register_fake("mtp::draft_sample")
def _draft_sample(topk_logits, topk_ids, seeds, positions, row, *, temperature=None):
    op = "draft_sample"
    _check_dtype(op, "topk_logits", topk_logits, torch.float32)
    _check_shape(op, "topk_logits", topk_logits, None, None)
    batch, k = topk_logits.shape
    _check_dtype(op, "topk_ids", topk_ids, torch.int32, torch.int64)
    _check_shape(op, "topk_ids", topk_ids, batch, k)
    for name, t in (("seeds", seeds), ("positions", positions)):
        _check_dtype(op, name, t, torch.int64)
        _check_shape(op, name, t, batch)
    _check_dtype(op, "temperature", temperature, torch.float32)
    _check_shape(op, "temperature", temperature, batch)
    return seeds.new_empty((batch,)), topk_logits.new_empty((batch, k))


@torch.library.register_fake("mtp::rejection_sample")
def _rejection_sample(
    target_logits,
    draft_token_ids,
    cu_draft_lens,
    seeds,
    positions,
    max_draft_len,
    *,
    draft_probs=None,
    draft_ids=None,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    token_bitmask=None,
    method="token",
):
    op = "rejection_sample"
    _check_dtype(op, "target_logits", target_logits, torch.float32, torch.float16, torch.bfloat16)
    _check_dtype(op, "draft_token_ids", draft_token_ids, torch.int32, torch.int64)
    _check_shape(op, "draft_token_ids", draft_token_ids, None)
    _check_dtype(op, "seeds", seeds, torch.int64)
    _check_shape(op, "seeds", seeds, None)
    batch, drafts = seeds.shape[0], draft_token_ids.shape[0]
    _check_shape(op, "target_logits", target_logits, drafts + batch, None)
    vocab = target_logits.shape[1]
    _check_dtype(op, "cu_draft_lens", cu_draft_lens, torch.int32)
    _check_shape(op, "cu_draft_lens", cu_draft_lens, batch + 1)
    _check_dtype(op, "positions", positions, torch.int64)
    _check_shape(op, "positions", positions, batch)
    torch._check(
        draft_ids is None or draft_probs is not None,
        lambda: f"{op}: draft_ids needs draft_probs of the same shape",
    )
    _check_dtype(op, "draft_probs", draft_probs, torch.float32)
    _check_dtype(op, "draft_ids", draft_ids, torch.int32, torch.int64)
    _check_shape(op, "draft_ids", draft_ids, drafts, None)
    width = vocab if draft_ids is None else draft_ids.shape[1]
    _check_shape(op, "draft_probs", draft_probs, drafts, width)
    for name, t, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
    ):
        _check_dtype(op, name, t, dtype)
        _check_shape(op, name, t, batch)
    _check_dtype(op, "token_bitmask", token_bitmask, torch.int32)
    _check_shape(op, "token_bitmask", token_bitmask, drafts + batch, (vocab + 31) // 32)
    torch._check(
        method in ("token", "block"),
        lambda: f'{op}: method must be "token" or "block", got "{method}"',
    )
    return (
        seeds.new_empty((batch, max_draft_len + 1), dtype=torch.int32),
        seeds.new_empty((batch,), dtype=torch.int32),
        seeds.new_empty((batch,), dtype=torch.int32),
    )


# ---- projections ---------------------------------------------------------------------------------

_QUANTISED = (torch.int8, torch.float8_e4m3fn)


def _check_weight(op: str, weight: Tensor, k: int | torch.SymInt, scale: Tensor | None) -> None:
    _check_dtype(op, "weight", weight, *_FLOATS, *_QUANTISED)
    _check_shape(op, "weight", weight, None, k)
    torch._check(
        (weight.dtype in _QUANTISED) == (scale is not None),
        lambda: f"{op}: weight_scale goes with an int8 or float8_e4m3fn weight, got {weight.dtype}",
    )
    _check_dtype(op, "weight_scale", scale, torch.float32)
    _check_shape(op, "weight_scale", scale, weight.shape[0])


@torch.library.register_fake("mtp::skinny_linear")
def _skinny_linear(x, weight, *, bias=None, weight_scale=None):
    op = "skinny_linear"
    _check_dtype(op, "x", x, *_FLOATS)
    _check_shape(op, "x", x, None, None)
    _check_weight(op, weight, x.shape[1], weight_scale)
    _check_dtype(op, "bias", bias, x.dtype)
    _check_shape(op, "bias", bias, weight.shape[0])
    return x.new_empty((x.shape[0], weight.shape[0]))


@torch.library.register_fake("mtp::eh_proj")
def _eh_proj(
    token_ids,
    hidden,
    embedding,
    weight,
    *,
    enorm_weight=None,
    hnorm_weight=None,
    bias=None,
    positions=None,
    eps=1e-6,
    gemma_norm=False,
    hidden_first=False,
):
    op = "eh_proj"
    _check_dtype(op, "hidden", hidden, *_FLOATS)
    _check_shape(op, "hidden", hidden, None, None)
    rows, size = hidden.shape
    _check_dtype(op, "token_ids", token_ids, torch.int32, torch.int64)
    _check_shape(op, "token_ids", token_ids, rows)
    _check_dtype(op, "embedding", embedding, *_FLOATS)
    _check_shape(op, "embedding", embedding, None, size)
    _check_dtype(op, "weight", weight, *_FLOATS)
    _check_shape(op, "weight", weight, None, 2 * size)
    for name, norm in (("enorm_weight", enorm_weight), ("hnorm_weight", hnorm_weight)):
        _check_dtype(op, name, norm, hidden.dtype)
        _check_shape(op, name, norm, size)
    _check_dtype(op, "bias", bias, hidden.dtype)
    _check_shape(op, "bias", bias, weight.shape[0])
    _check_dtype(op, "positions", positions, torch.int32, torch.int64)
    _check_shape(op, "positions", positions, rows)
    return hidden.new_empty((rows, weight.shape[0]))


@torch.library.register_fake("mtp::head_topk")
def _head_topk(
    hidden,
    weight,
    k,
    *,
    norm_weight=None,
    bias=None,
    weight_scale=None,
    token_map=None,
    eps=1e-6,
    gemma_norm=False,
    softcap=0.0,
    vocab_offset=0,
):
    op = "head_topk"
    _check_dtype(op, "hidden", hidden, *_FLOATS)
    _check_shape(op, "hidden", hidden, None, None)
    rows, size = hidden.shape
    _check_weight(op, weight, size, weight_scale)
    vocab = weight.shape[0]
    torch._check(1 <= k <= 64, lambda: f"{op}: k must be in [1, 64], got {k}")
    torch._check(k <= vocab, lambda: f"{op}: k must be at most V={vocab}, got {k}")
    _check_dtype(op, "norm_weight", norm_weight, hidden.dtype)
    _check_shape(op, "norm_weight", norm_weight, size)
    _check_dtype(op, "bias", bias, hidden.dtype)
    _check_shape(op, "bias", bias, vocab)
    _check_dtype(op, "token_map", token_map, torch.int32, torch.int64)
    _check_shape(op, "token_map", token_map, vocab)
    torch._check(softcap >= 0, lambda: f"{op}: softcap must be 0 or positive, got {softcap}")
    logits = hidden.new_empty((rows, k), dtype=torch.float32)
    ids = hidden.new_empty((rows, k), dtype=torch.int64)
    return logits, ids, hidden.new_empty((rows,), dtype=torch.float32)


# ---- training ------------------------------------------------------------------------------------


def _check_mtp_loss(
    op, hidden, weight, cu_seqlens, loss_mask, depth_weights, bias, first_shift, softcap
):
    _check_dtype(op, "hidden", hidden, *_FLOATS)
    _check_shape(op, "hidden", hidden, None, None, None)
    depths, rows, size = hidden.shape
    _check_dtype(op, "weight", weight, hidden.dtype)
    _check_shape(op, "weight", weight, None, size)
    _check_dtype(op, "cu_seqlens", cu_seqlens, torch.int32)
    _check_shape(op, "cu_seqlens", cu_seqlens, None)
    _check_dtype(op, "loss_mask", loss_mask, torch.bool)
    _check_shape(op, "loss_mask", loss_mask, rows)
    _check_dtype(op, "depth_weights", depth_weights, torch.float32)
    _check_shape(op, "depth_weights", depth_weights, depths)
    _check_dtype(op, "bias", bias, hidden.dtype)
    _check_shape(op, "bias", bias, weight.shape[0])
    torch._check(
        first_shift >= 1, lambda: f"{op}: first_shift must be at least 1, got {first_shift}"
    )
    torch._check(softcap >= 0, lambda: f"{op}: softcap must be 0 or positive, got {softcap}")


def _mtp_loss_results(hidden, extra):
    """loss, depth_loss, num_tokens and what the operator counts besides."""
    depths = (hidden.shape[0],)
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(depths, dtype=torch.float32),
        hidden.new_empty(depths, dtype=torch.int64),
        hidden.new_empty(depths, dtype=extra),
    )


def _mtp_loss_gradients(hidden, weight, grad_hidden, grad_weight, grad_bias):
    def gradient(wanted, shape):
        return hidden.new_empty(shape if wanted else (0,), dtype=torch.float32)

    return (
        gradient(grad_hidden, hidden.shape),
        gradient(grad_weight, weight.shape),
        gradient(grad_bias, weight.shape[:1]),
    )


@torch.library.register_fake("mtp::linear_mtp_loss")
def _linear_mtp_loss(
    hidden, weight, labels, *, cu_seqlens=None, loss_mask=None, depth_weights=None, bias=None,
    weight_grad_accum=None, first_shift=2, ignore_index=-100, label_smoothing=0.0, z_loss=0.0,
    softcap=0.0,
):  # fmt: skip
    op = "linear_mtp_loss"
    _check_mtp_loss(
        op, hidden, weight, cu_seqlens, loss_mask, depth_weights, bias, first_shift, softcap
    )
    _check_dtype(op, "labels", labels, torch.int64)
    _check_shape(op, "labels", labels, hidden.shape[1])
    torch._check(
        0 <= label_smoothing <= 1,
        lambda: f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}",
    )
    return _mtp_loss_results(hidden, torch.int64)


@torch.library.register_fake("mtp::_linear_mtp_loss")
def _linear_mtp_loss_with_gradients(
    hidden, weight, labels, cu_seqlens, loss_mask, depth_weights, bias, first_shift, ignore_index,
    label_smoothing, z_loss, softcap, grad_hidden, grad_weight, grad_bias,
):  # fmt: skip
    results = _linear_mtp_loss(
        hidden, weight, labels, cu_seqlens=cu_seqlens, loss_mask=loss_mask,
        depth_weights=depth_weights, bias=bias, first_shift=first_shift,
        label_smoothing=label_smoothing, softcap=softcap,
    )  # fmt: skip
    return results + _mtp_loss_gradients(hidden, weight, grad_hidden, grad_weight, grad_bias)


@torch.library.register_fake("mtp::soft_mtp_loss")
def _soft_mtp_loss(
    hidden, weight, *, teacher_hidden=None, teacher_ids=None, teacher_logprobs=None,
    cu_seqlens=None, loss_mask=None, depth_weights=None, bias=None, weight_grad_accum=None,
    first_shift=2, kl_weight=1.0, tv_weight=0.0, softcap=0.0,
):  # fmt: skip
    op = "soft_mtp_loss"
    _check_mtp_loss(
        op, hidden, weight, cu_seqlens, loss_mask, depth_weights, bias, first_shift, softcap
    )
    torch._check(
        (teacher_ids is None) == (teacher_logprobs is None),
        lambda: f"{op}: teacher_ids and teacher_logprobs go together",
    )
    torch._check(
        (teacher_hidden is None) != (teacher_ids is None),
        lambda: (
            f"{op}: the teacher must be either teacher_hidden, or teacher_ids and teacher_logprobs"
        ),
    )
    _check_dtype(op, "teacher_hidden", teacher_hidden, hidden.dtype)
    _check_shape(op, "teacher_hidden", teacher_hidden, *hidden.shape[1:])
    _check_dtype(op, "teacher_ids", teacher_ids, torch.int32, torch.int64)
    _check_shape(op, "teacher_ids", teacher_ids, hidden.shape[1], None)
    if teacher_ids is not None:
        _check_dtype(op, "teacher_logprobs", teacher_logprobs, torch.float32)
        _check_shape(op, "teacher_logprobs", teacher_logprobs, *teacher_ids.shape)
    return _mtp_loss_results(hidden, torch.float32)


@torch.library.register_fake("mtp::_soft_mtp_loss")
def _soft_mtp_loss_with_gradients(
    hidden, weight, teacher_hidden, teacher_ids, teacher_logprobs, cu_seqlens, loss_mask,
    depth_weights, bias, first_shift, kl_weight, tv_weight, softcap, grad_hidden, grad_weight,
    grad_bias,
):  # fmt: skip
    results = _soft_mtp_loss(
        hidden, weight, teacher_hidden=teacher_hidden, teacher_ids=teacher_ids,
        teacher_logprobs=teacher_logprobs, cu_seqlens=cu_seqlens, loss_mask=loss_mask,
        depth_weights=depth_weights, bias=bias, first_shift=first_shift, softcap=softcap,
    )  # fmt: skip
    return results + _mtp_loss_gradients(hidden, weight, grad_hidden, grad_weight, grad_bias)
