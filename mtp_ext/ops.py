"""The public operators: typed wrappers of `torch.ops.mtp.*`.

Every function works on CPU and CUDA tensors, allocates its results, never synchronises with the
host and never reads device data on the host. A tensor of the wrong shape, dtype, device or stride
raises `RuntimeError` naming the argument, the expected and the actual value. `mtp_ext.reference`
holds the specification of each in plain PyTorch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.mtp


def direct(name: str) -> Callable[..., Any]:
    """The operator of that name, for loops that make hundreds of small calls a step.

    Takes what `torch.ops.mtp.<name>` takes and returns what it returns, without a Python frame in
    between and with only the arguments that are given: on a CPU 0.4 to 0.8 us less of the 3 to 6
    that a small call costs. torch.compile cannot trace it.
    """
    return getattr(_ops, name).default._op


# ---- random numbers ------------------------------------------------------------------------------


def philox_uniform(seeds: Tensor, positions: Tensor, row: int, stream: int, n: int) -> Tensor:
    """The uniforms that the sampling operators use, strictly inside (0, 1).

    Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
    SC 2011) with key = seed and counter = (id / 4, stream << 16 | row, position): a value depends
    on its own seed, position, row, stream and id only, never on the batch.

    Args:
        seeds: int64 [B], one per request.
        positions: int64 [B], absolute position of the first token this step can emit.
        row: index of the token within the step, 0 <= row < 65536.
        stream: 0 draft, 1 accept, 2 final token; 0 <= stream < 65536.
        n: number of ids.

    Returns:
        f32 [B, n]: the uniforms of ids 0..n-1, multiples of 2^-23 plus 2^-24.
    """
    return _ops.philox_uniform(seeds, positions, row, stream, n)


# ---- between projections and attention -----------------------------------------------------------


def add_rms_norm(
    residual: Tensor,
    weight: Tensor,
    *,
    x: Tensor | None = None,
    eps: float = 1e-6,
    gemma_norm: bool = False,
) -> Tensor:
    """Adds a layer's output to the residual stream and normalises the sum for the next layer.

    A row's result does not depend on the other rows.

    Args:
        residual: f32 [T, H], updated in place: residual += x.
        weight: [H], f32, f16 or bf16; its dtype is the result's.
        x: [T, H] in weight's dtype; None adds nothing.
        eps: added to the mean square.
        gemma_norm: scale by 1 + weight.

    Returns:
        [T, H] in weight's dtype: residual / sqrt(mean(residual^2) + eps) * weight.
    """
    return _ops.add_rms_norm(residual, weight, x=x, eps=eps, gemma_norm=gemma_norm)


def rope_qkv(
    qkv: Tensor, positions: Tensor, cos_sin: Tensor, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the rows of a fused projection into q, k and v, and rotates q and k.

    Rotary embedding (Su et al. 2021, "RoFormer") in the halves layout: element i of a head turns
    together with element i + D/2. A row's result does not depend on the other rows.

    Args:
        qkv: [T, (Hq + 2 Hkv) D], f32, f16 or bf16: all heads of q, then of k, then of v.
        positions: int64 [T]; rows at a position outside the table are not rotated.
        cos_sin: f32 [P, D]: per position the cosines of its D/2 angles, then the sines.
        num_heads: Hq.
        num_kv_heads: Hkv.

    Returns:
        q [T, Hq, D], k [T, Hkv, D] and v [T, Hkv, D] in qkv's dtype.
    """
    return _ops.rope_qkv(qkv, positions, cos_sin, num_heads, num_kv_heads)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's activation (Shazeer 2020, "GLU variants improve transformer").

    Args:
        gate_up: [T, 2 F], f32, f16 or bf16: gate, then up.

    Returns:
        silu(gate) * up, [T, F] in gate_up's dtype.
    """
    return _ops.silu_and_mul(gate_up)


# ---- verification attention ----------------------------------------------------------------------


def kv_append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_lens: Tensor,
    cu_q_lens: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    layout: str = "NHD",
) -> None:
    """Writes new keys and values into the paged cache, in place.

    Token i of request b goes to position cache_lens[b] + i. A position past the block table's
    capacity, or whose page id is no page of the cache, is not written; nor are rows at or past
    cu_q_lens[B], so T may be padded.

    Args:
        k, v: f32, f16 or bf16 [T, Hkv, D]; D a multiple of 8 up to 256, dense in D.
        k_cache, v_cache: [P, page, Hkv, D], or [P, Hkv, page, D] with layout "HND", any page size;
            k's dtype, or float8_e4m3fn, which stores k / k_scale and v / v_scale rounded to
            nearest even and saturating at 448.
        block_table: int32 [B, max_pages], the pages of each request.
        cache_lens: int32 [B], tokens cached before this call.
        cu_q_lens: int32 [B+1], offsets of each request's rows in k and v.
        k_scale, v_scale: f32 [1] or [Hkv], with a float8_e4m3fn cache only; None is 1.
        layout: "NHD" or "HND".
    """
    _ops.kv_append(
        k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, k_scale=k_scale,
        v_scale=v_scale, layout=layout,
    )  # fmt: skip


def verify_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cache_lens: Tensor,
    cu_q_lens: Tensor,
    max_q_len: int,
    *,
    tree_mask: Tensor | None = None,
    scale: float | None = None,
    window: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    layout: str = "NHD",
) -> tuple[Tensor, Tensor]:
    """Attention of a step's new tokens over the paged cache and themselves; appends them as well.

    Query i of request b sees the cached positions 0..cache_lens[b]-1 and the new tokens 0..i or,
    under a tree mask, those whose bits are set. The new tokens are written to the cache as
    `kv_append` does and attended to as they are stored. A row's result depends on its own query,
    keys and position only: computed with one new token or several, alone or in any batch, from
    pages of any size in either layout, its bits are the same on one device.

    Keys whose position lies past the table's capacity or whose page id is no page of the cache are
    hidden. Rows at or past cu_q_lens[B], and a request's rows behind max_q_len, are padding: not
    read, not appended, out 0 and lse -inf.

    Args:
        q: f32, f16 or bf16 [T, Hq, D]; f16 or bf16 on CUDA. Hq is a multiple of Hkv.
        k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, k_scale, v_scale, layout: as
            for `kv_append`, k and v in q's dtype.
        max_q_len: an upper bound of the new tokens per request.
        tree_mask: int64 [T]; bit j of a row's mask: it sees the request's new token j. Needs
            max_q_len <= 64. A new token's position is then cache_len + its number of bits - 1.
        scale: factor of q . k; None is 1 / sqrt(D).
        window: a row sees keys at positions > its own - window; -1 for no window.
        softcap: scores become softcap * tanh(score / softcap); 0 for none.
        sinks: f32 [Hq], one more logit per head that takes probability and gives no value
            (attention sinks as in gpt-oss).

    Returns:
        out: [T, Hq, D] in q's dtype.
        lse: f32 [T, Hq], natural log of the sum of exponentials, sink included.
    """
    return _ops.verify_attention(
        q, k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, max_q_len,
        tree_mask=tree_mask, scale=scale, window=window, softcap=softcap, sinks=sinks,
        k_scale=k_scale, v_scale=v_scale, layout=layout,
    )  # fmt: skip


def kv_compact(
    k_caches: list[Tensor],
    v_caches: list[Tensor],
    block_table: Tensor,
    cache_lens: Tensor,
    accept_index: Tensor,
    accept_lens: Tensor,
    *,
    layout: str = "NHD",
) -> None:
    """Moves the cache slots of accepted tree tokens down, for all layers, in place.

    Slot cache_lens[b] + accept_index[b, j] moves to cache_lens[b] + j for j < accept_lens[b].
    A request's indices are strictly increasing; one that does not increase, lies below its j or
    has no slot is skipped. Source slots stay as they are. (After a chain nothing has to move:
    advance cache_lens by the accepted count.)

    Args:
        k_caches, v_caches: one tensor per layer, all of one shape, dtype and (among the keys, and
            among the values) strides; [P, page, Hkv, D] or [P, Hkv, page, D] with layout "HND".
        block_table: int32 [B, max_pages].
        cache_lens: int32 [B], tokens cached before the step that drafted the tree.
        accept_index: int32 or int64 [B, max_accept].
        accept_lens: int32 [B].
        layout: "NHD" or "HND".
    """
    _ops.kv_compact(
        k_caches, v_caches, block_table, cache_lens, accept_index, accept_lens, layout=layout
    )


# ---- sampling ------------------------------------------------------------------------------------


def draft_sample(
    topk_logits: Tensor,
    topk_ids: Tensor,
    seeds: Tensor,
    positions: Tensor,
    row: int,
    *,
    temperature: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws one draft token per request from the softmax over its k kept logits.

    The pair (topk_ids, probs) is the sparse q that `rejection_sample` takes: k numbers per draft
    instead of a row of the vocabulary's width.

    Args:
        topk_logits: f32 [B, k], 1 <= k <= 64, in any order (`head_topk` returns them).
        topk_ids: int32 or int64 [B, k], their token ids.
        seeds: int64 [B], one per request.
        positions: int64 [B], absolute position of the first token this step can emit.
        row: index of the draft within the step, 0 <= row < 65536.
        temperature: f32 [B]; None or 0 is greedy: the largest logit, the lowest id on ties.

    A row with NaN or +inf, or with nothing finite, and a temperature that is negative, NaN or
    infinite are treated as greedy over the finite logits.

    Returns:
        token_ids int64 [B], and probs f32 [B, k], the distribution that was drawn from.
    """
    return _ops.draft_sample(topk_logits, topk_ids, seeds, positions, row, temperature=temperature)


def rejection_sample(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    cu_draft_lens: Tensor,
    seeds: Tensor,
    positions: Tensor,
    max_draft_len: int,
    *,
    draft_probs: Tensor | None = None,
    draft_ids: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    token_bitmask: Tensor | None = None,
    method: str = "token",
) -> tuple[Tensor, Tensor, Tensor]:
    """Verifies draft tokens against raw target logits and emits one token more per request.

    The emitted tokens follow the filtered target distribution exactly, whatever the drafts. A
    result depends on the request's own seed, position and rows only, never on the batch.

    Args:
        target_logits: f32, f16 or bf16 [N+B, V], last dimension contiguous. Request b owns rows
            cu_draft_lens[b] + b .. cu_draft_lens[b+1] + b: one per draft and one more.
        draft_token_ids: int32 or int64 [N].
        cu_draft_lens: int32 [B+1], prefix sums of the requests' numbers of drafts.
        seeds: int64 [B].
        positions: int64 [B], absolute position of the first token this step can emit.
        max_draft_len: upper bound of drafts per request; further drafts are ignored.
        draft_probs: f32 [N, V], or [N, m] with draft_ids, the distribution q that each draft was
            drawn from; None: q is one-hot on the draft.
        draft_ids: int32 or int64 [N, m], m <= 64, the distinct ids of a sparse q; an id outside
            the vocabulary is ignored.
        temperature: f32 [B]; None or 0 is greedy: a draft is accepted iff it is the argmax.
        top_k: int32 [B]; <= 0 or >= V is off. Exactly k are kept, ties by lowest id.
        top_p: f32 [B] in [0, 1]; 1 is off. The smallest prefix by descending probability, ties by
            lowest id, that reaches top_p of what the filters before it left; never empty.
        min_p: f32 [B] in [0, 1]; 0 is off. Keeps p >= min_p * max p.
        token_bitmask: int32 [N+B, ceil(V/32)], bit 1 = allowed.
        method: "token" (Leviathan et al. 2023, Chen et al. 2023) or "block" (block verification,
            Sun et al. 2024), which accepts at least as many on average.

    Filters apply in the order bitmask, temperature, min_p, top_k, top_p.

    Returns:
        token_ids int32 [B, max_draft_len + 1]: the accepted drafts, one more token, then -1;
        num_accepted int32 [B]; status int32 [B]. Bad data never raises; it sets bits of status:
        1 a target row holds NaN or +inf, or nothing finite and allowed (the row counts as one-hot
        on its best finite allowed entry, else on id 0); 2 a draft probability is NaN, negative or
        infinite (the draft is rejected); 4 a draft id is outside the vocabulary (the drafts end
        there); 8 a parameter is out of range (the temperature counts as 0, a filter as off).
    """
    return _ops.rejection_sample(
        target_logits,
        draft_token_ids,
        cu_draft_lens,
        seeds,
        positions,
        max_draft_len,
        draft_probs=draft_probs,
        draft_ids=draft_ids,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        token_bitmask=token_bitmask,
        method=method,
    )


# ---- projections ---------------------------------------------------------------------------------


def skinny_linear(
    x: Tensor, weight: Tensor, *, bias: Tensor | None = None, weight_scale: Tensor | None = None
) -> Tensor:
    """x @ weight.T * weight_scale + bias, made for the few rows of a decoding step.

    Every weight byte is read once for up to 64 rows of x; more rows run in blocks of 64. Products
    are accumulated in f32, scale and bias applied to the sum, which is rounded once. (CPUs with AMX
    multiply int8 by bf16 in integers, exactly but for what is below 2^-23 of the largest element
    of x's row; a row that is not finite becomes NaN.) A row's result does not depend on M or on the
    other rows, at any M: a forward over k + 1 tokens gives the bits of k + 1 forwards over one.

    Args:
        x: f32, f16 or bf16 [M, K]; rows may be strided.
        weight: [N, K] in f32, f16 or bf16 (need not be x's dtype), or int8 or float8_e4m3fn with
            weight_scale; rows may be strided.
        bias: x's dtype [N].
        weight_scale: f32 [N], one factor per weight row. Needed with int8 and float8_e4m3fn,
            refused otherwise.

    Returns:
        x's dtype [M, N].

    On CUDA, K must be a multiple of 8 and rows must be aligned to 16 bytes.
    """
    return _ops.skinny_linear(x, weight, bias=bias, weight_scale=weight_scale)


def eh_proj(
    token_ids: Tensor,
    hidden: Tensor,
    embedding: Tensor,
    weight: Tensor,
    *,
    enorm_weight: Tensor | None = None,
    hnorm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    positions: Tensor | None = None,
    eps: float = 1e-6,
    gemma_norm: bool = False,
    hidden_first: bool = False,
) -> Tensor:
    """The entrance of an MTP head: gather, two RMSNorms, concatenation and projection.

    concat(norm_e(embedding[token_ids]), norm_h(hidden)) @ weight.T + bias, as DeepSeek-V3 (arXiv
    2412.19437, section 2.2) and its relatives use it. Weights are read once for up to 64 rows, and
    there a row's result does not depend on T or on the other rows. More rows go through a tiled
    product on CUDA: a row's result still does not depend on the other rows, but T may change its
    last bits.

    Args:
        token_ids: int32 or int64 [T]. An id outside [0, V) takes a zero embedding.
        hidden: f32, f16 or bf16 [T, H]; rows may be strided.
        embedding: f32, f16 or bf16 [V, H]; rows may be strided.
        weight: f32, f16 or bf16 [Ho, 2H]; rows may be strided.
        enorm_weight, hnorm_weight: hidden's dtype [H]; None skips that norm.
        bias: hidden's dtype [Ho].
        positions: int32 or int64 [T]; rows at position 0 take a zero embedding.
        eps: added to the mean square.
        gemma_norm: norms scale by 1 + weight.
        hidden_first: the order of the concatenation is [hidden, embedding] (MiMo).

    Returns:
        hidden's dtype [T, Ho].

    On CUDA, H must be a multiple of 8 and weight's rows must be aligned to 16 bytes.
    """
    return _ops.eh_proj(
        token_ids,
        hidden,
        embedding,
        weight,
        enorm_weight=enorm_weight,
        hnorm_weight=hnorm_weight,
        bias=bias,
        positions=positions,
        eps=eps,
        gemma_norm=gemma_norm,
        hidden_first=hidden_first,
    )


def head_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    norm_weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_scale: Tensor | None = None,
    token_map: Tensor | None = None,
    eps: float = 1e-6,
    gemma_norm: bool = False,
    softcap: float = 0.0,
    vocab_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """LM head with top-k and log-sum-exp in one pass; full logits are never stored.

    A logit is cap * tanh(x / cap) of x = norm(hidden) . weight[v] * weight_scale[v] + bias[v].
    Weights are read once for up to 64 rows, and there a row's result does not depend on M or on the
    other rows. More rows go through a tiled product on CUDA: the same holds among all M > 64, whose
    last bits may differ from those of fewer rows. Heads that share an unembedding stack their
    hiddens in M.

    Args:
        hidden: f32, f16 or bf16 [M, H]; rows may be strided.
        weight: [V, H] in f32, f16 or bf16, or int8 or float8_e4m3fn with weight_scale; rows may be
            strided.
        k: 1 <= k <= min(64, V).
        norm_weight: hidden's dtype [H]; RMSNorm before the projection.
        bias: hidden's dtype [V].
        weight_scale: f32 [V]. Needed with int8 and float8_e4m3fn, refused otherwise.
        token_map: int32 or int64 [V]: the id that each weight row stands for.
        eps: added to the mean square.
        gemma_norm: the norm scales by 1 + norm_weight.
        softcap: 0 is off.
        vocab_offset: added to the ids where there is no token_map.

    Returns:
        logits f32 [M, k], descending, ties lowest weight row first. NaN counts as less than -inf.
        ids int64 [M, k].
        lse f32 [M], over all V; NaN if any logit is.

    On CUDA, H must be a multiple of 8 and weight's rows must be aligned to 16 bytes.
    """
    return _ops.head_topk(
        hidden,
        weight,
        k,
        norm_weight=norm_weight,
        bias=bias,
        weight_scale=weight_scale,
        token_map=token_map,
        eps=eps,
        gemma_norm=gemma_norm,
        softcap=softcap,
        vocab_offset=vocab_offset,
    )


# ---- training ------------------------------------------------------------------------------------


def linear_mtp_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None = None,
    depth_weights: Tensor | None = None,
    bias: Tensor | None = None,
    weight_grad_accum: Tensor | None = None,
    first_shift: int = 2,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross entropy of all prediction depths straight from hidden states, with its gradients.

    Row i of depth d predicts labels[i + d + first_shift]. It counts iff that position lies in the
    same document and holds a label that is unmasked and in [0, V); the hiddens of other rows are
    never read (they may be NaN) and get a gradient of exactly 0. A logit is cap * tanh(x / cap) of
    x = hidden . weight[v] + bias[v].

    Where a gradient is wanted it is computed with the logits, in the forward call: nothing is
    computed twice, and no logits outlive a chunk of rows. Extra memory: a chunk's logits, f32, on
    CPU 96 MiB of them but 64 to 512 rows; on CUDA, with their gradient in the dtype of hidden
    beside them, 256 MiB or 128 rows (the environment variable MTP_LOSS_CHUNK_BYTES sets another
    size: less memory, or more speed); and until the backward the gradients in f32, K*T*H, V*H and V
    elements, as far as hidden, weight and bias require them.

    The gradient of the logits is multiplied in hidden's dtype on CUDA; on CPU in f32, but bf16
    where the processor multiplies that: then products are rounded per chunk and added up in f32.

    Args:
        hidden: f32, f16 or bf16 [K, T, H], one slice per depth; the first two strides are free.
        weight: [V, H] in hidden's dtype; rows may be strided.
        labels: int64 [T], the raw token ids, not shifted.
        cu_seqlens: int32 [B + 1], ascending offsets of the documents; None: a single one. Rows
            outside all documents do not count.
        loss_mask: bool [T], by position of the label: False does not count.
        depth_weights: f32 [K]; None: 1 / K each. Read on the device, so a curriculum may change it
            in place under a captured graph. It gets no gradient.
        bias: hidden's dtype [V].
        weight_grad_accum: f32 [V, H]. The backward adds weight's gradient to it, in f32, and weight
            itself gets none: for a weight that is tied to an embedding.
        first_shift: distance from a row to its label at depth 0; at least 1, the ordinary
            next-token loss.
        ignore_index: a label that does not count.
        label_smoothing: as in `torch.nn.functional.cross_entropy`, in [0, 1].
        z_loss: adds z_loss * lse^2 to a row's loss.
        softcap: 0 is off.

    Returns:
        loss f32 []: sum of depth_weights * depth_loss. The only differentiable result.
        depth_loss f32 [K]: mean over the rows that count; 0 if there are none.
        num_tokens int64 [K]: how many count.
        num_correct int64 [K]: how many of those have their label as argmax, ties lowest id.

    On CUDA, H must be a multiple of 8 and weight's rows must be aligned to 16 bytes.
    Chunked losses with gradients in the forward call: Hsu et al., "Liger Kernel", 2024.
    """
    return _ops.linear_mtp_loss(
        hidden,
        weight,
        labels,
        cu_seqlens=cu_seqlens,
        loss_mask=loss_mask,
        depth_weights=depth_weights,
        bias=bias,
        weight_grad_accum=weight_grad_accum,
        first_shift=first_shift,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
    )


def soft_mtp_loss(
    hidden: Tensor,
    weight: Tensor,
    *,
    teacher_hidden: Tensor | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    loss_mask: Tensor | None = None,
    depth_weights: Tensor | None = None,
    bias: Tensor | None = None,
    weight_grad_accum: Tensor | None = None,
    first_shift: int = 2,
    kl_weight: float = 1.0,
    tv_weight: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distils a teacher into all prediction depths straight from hidden states.

    Row j of the teacher is its distribution of the token after position j. Row i of depth d, whose
    softmax over the vocabulary is q, is compared with p = row i + d + first_shift - 1 of the
    teacher, so that it predicts the same token as in `linear_mtp_loss`. It counts iff that row lies
    in the same document and is unmasked. Its loss is

        kl_weight * sum_v p_v (log p_v - log q_v) + tv_weight * (1 - sum_v min(p_v, q_v)).

    Rejection sampling accepts a draft drawn from q with probability sum min(p, q) = 1 - TV(p, q):
    the mean of it is returned, and tv_weight trains for it directly.

    The teacher is either `teacher_hidden`, read through the same head (weight, bias, softcap; no
    gradient flows there), or pairs of ids and log-probabilities. Pairs may cover only part of the
    mass; what they leave out, and pairs whose id is outside [0, V) (say -1, for a token that a
    reduced vocabulary lacks), counts as p = 0 without renormalisation. Then the first term is the
    cross entropy to the pairs up to a constant, and the acceptance is a lower bound.

    Memory and gradients as in `linear_mtp_loss`; with `teacher_hidden` the teacher's logits share a
    chunk's memory.

    Args:
        hidden, weight, cu_seqlens, depth_weights, bias, weight_grad_accum, softcap: as in
            `linear_mtp_loss`.
        teacher_hidden: hidden's dtype [T, H]; rows may be strided.
        teacher_ids: int32 or int64 [T, m], m <= 256, distinct within a row.
        teacher_logprobs: f32 [T, m], natural logarithms; -inf is a probability of 0.
        loss_mask: bool [T], by row of the teacher.
        first_shift: at least 1. With one depth and first_shift=1, row i is compared with row i of
            the teacher.
        kl_weight, tv_weight: of the two terms.

    Returns:
        loss f32 []: sum of depth_weights * depth_loss. The only differentiable result.
        depth_loss f32 [K]: mean over the rows that count; 0 if there are none.
        num_tokens int64 [K]: how many count.
        acceptance f32 [K]: mean of sum min(p, q); 0 if none count.
    """
    return _ops.soft_mtp_loss(
        hidden,
        weight,
        teacher_hidden=teacher_hidden,
        teacher_ids=teacher_ids,
        teacher_logprobs=teacher_logprobs,
        cu_seqlens=cu_seqlens,
        loss_mask=loss_mask,
        depth_weights=depth_weights,
        bias=bias,
        weight_grad_accum=weight_grad_accum,
        first_shift=first_shift,
        kl_weight=kl_weight,
        tv_weight=tv_weight,
        softcap=softcap,
    )
