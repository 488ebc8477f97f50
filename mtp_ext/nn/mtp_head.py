"""An MTP head for decoding, built on `mtp_ext.ops` with a paged KV cache of its own.

    head = load_head(trunk=trunk)                      # shipped weights; or load_head(path, ...)
    k_cache, v_cache = head.new_cache(num_pages, page_size)
    y = head.extend(token_ids, hidden, positions, k_cache, v_cache, block_table, cache_lens,
                    cu_q_lens, max_q_len)              # [T, H]
    logits, ids, lse = head.propose(y[last_rows], k)   # [M, k], ids of the trunk's vocabulary
    hidden = head.recur(y)                             # what the next depth's `extend` takes

Row i sits at position i of the head's cache, so the head's cache length equals the trunk's: after
the trunk has processed n tokens and one more is known, rows 0..n-1 of the head are computable. A
verification step rolls both caches back by length; the rows that drafting wrote are then extended
again with the trunk's hidden states of the accepted tokens.
"""

import copy

import torch
from torch import Tensor

from mtp_ext import ops
from mtp_ext.nn.layers import MLP, DecoderLayer, rope_order, rope_table
from mtp_ext.nn.mtp_block import MTPBlock


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and f32 [N]: the row's largest magnitude becomes 127."""
    scale = weight.float().abs().amax(1).clamp(min=1e-30) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


class Matrix:
    """The weight of a projection [N, K], in `dtype` or in int8 with a scale per row."""

    def __init__(self, weight: Tensor, bias: Tensor | None, like: Tensor, int8: bool):
        self.bias = None if bias is None else bias.detach().to(like.device, like.dtype)
        self.scale = None
        if int8:
            self.weight, self.scale = quantize_rows(weight.detach().to(like.device))
        else:
            self.weight = weight.detach().to(like.device, like.dtype).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        return ops.skinny_linear(x, self.weight, bias=self.bias, weight_scale=self.scale)


class DecodingLayer:
    """A `DecoderLayer` over the custom operators, with grouped-query attention.

    Weights have `like`'s dtype and device; the residual stream is f32. A row's result does not
    depend on the other rows of the call, except through experts (`MoESpec`): those run in plain
    PyTorch, whose products may round differently with their number of rows, and synchronise with
    the host.
    """

    def __init__(self, layer: DecoderLayer, like: Tensor, int8: bool):
        self.spec = spec = layer.spec
        if spec.latent is not None:
            raise ValueError(
                "decoding needs grouped-query attention; this layer has latent attention "
                "(spec.latent), which is for training and loading only"
            )
        attn, mlp, d = layer.self_attn, layer.mlp, spec.head_dim

        def vector(w: Tensor) -> Tensor:
            return w.detach().to(like.device, like.dtype).contiguous()

        # rope_qkv turns i with i + D/2, so the rows of q and k are put in that order.
        order = rope_order(spec)

        def rows(weight: Tensor, parts: int = 1) -> Tensor:
            heads = weight.unflatten(0, (-1, parts, d))
            return heads if order is None else heads[:, :, order.to(weight.device)]

        def fused(name: str) -> tuple[Tensor, Tensor | None]:
            q, k, v = (getattr(p, name) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            if q is None:
                return None, None
            gate = None
            if spec.output_gate:
                gate = q.unflatten(0, (-1, 2, d))[:, 1].flatten(0, 1)
                q = rows(q, 2)[:, 0]
            else:
                q = rows(q)[:, 0]
            return torch.cat([q.flatten(0, 1), rows(k)[:, 0].flatten(0, 1), v]), gate

        (qkv, gate), (qkv_bias, gate_bias) = fused("weight"), fused("bias")
        self.input_norm = vector(layer.input_layernorm.weight)
        self.qkv = Matrix(qkv, qkv_bias, like, int8)
        self.gate = None if gate is None else Matrix(gate, gate_bias, like, int8)
        self.qk_norms = None
        if spec.qk_norm:
            norms = (attn.q_norm.weight, attn.k_norm.weight)
            self.qk_norms = [vector(w if order is None else w[order.to(w.device)]) for w in norms]
        self.o_proj = Matrix(attn.o_proj.weight, None, like, int8)
        self.post_norm = vector(layer.post_attention_layernorm.weight)
        if isinstance(mlp, MLP):
            self.experts = None
            both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
            self.gate_up = Matrix(both, None, like, int8)
            self.down = Matrix(mlp.down_proj.weight, None, like, int8)
        else:
            self.experts = copy.deepcopy(mlp).to(like.device, like.dtype).requires_grad_(False)
        self.rope = rope_table(spec).to(like.device)

    def __call__(
        self,
        residual: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        cache_lens: Tensor,
        cu_q_lens: Tensor,
        max_q_len: int,
    ) -> Tensor:
        """residual f32 [T, H] is updated in place and returned; the cache is appended to."""
        spec = self.spec
        norm = {"eps": spec.eps, "gemma_norm": spec.gemma_norm}
        x = ops.add_rms_norm(residual, self.input_norm, **norm)
        qkv = self.qkv(x)
        if self.qk_norms is not None:
            qkv = self._normed_heads(qkv, norm)
        q, k, v = ops.rope_qkv(qkv, positions, self.rope, spec.num_heads, spec.num_kv_heads)
        attended, _ = ops.verify_attention(
            q, k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, max_q_len
        )
        attended = attended.flatten(1)
        if self.gate is not None:
            attended = attended * self.gate(x).sigmoid()
        x = ops.add_rms_norm(residual, self.post_norm, x=self.o_proj(attended), **norm)
        if self.experts is not None:
            return residual.add_(self.experts(x))
        return residual.add_(self.down(ops.silu_and_mul(self.gate_up(x))))

    def _normed_heads(self, qkv: Tensor, norm: dict) -> Tensor:
        spec = self.spec
        heads = qkv.unflatten(1, (-1, spec.head_dim)).split(
            [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], 1
        )
        normed = [
            ops.add_rms_norm(h.float().flatten(0, 1), w, **norm).view_as(h)
            for h, w in zip(heads, self.qk_norms)
        ]
        return torch.cat([*normed, heads[2]], 1).flatten(1)


class MTPHead:
    """An `MTPBlock` for decoding, over the custom operators.

    embedding [V, H] and lm_head [V, H] are the trunk's. With a token_map [Vd] of distinct ids only
    those rows of the LM head are drafted from. Weights and the projections' inputs have
    embedding's dtype; the residual stream is f32. With `int8` the LM head and the decoder layer's
    projections are kept in int8 with a scale per row: a draft need not be exact, and reading
    weights is what it costs. A row's result does not depend on the other rows of the call
    (`DecodingLayer` names the exception).

    Raises ValueError for a block with latent attention, and for one that borrows the trunk's final
    norm where trunk_norm [H] is not given.
    """

    def __init__(
        self,
        block: MTPBlock,
        embedding: Tensor,
        lm_head: Tensor,
        *,
        trunk_norm: Tensor | None = None,
        token_map: Tensor | None = None,
        metadata: dict[str, str] | None = None,
        int8: bool = False,
    ):
        self.spec = spec = block.spec
        if spec.final_norm == "trunk" and trunk_norm is None:
            raise ValueError("a head without its own final norm needs trunk_norm")
        self.dtype, self.device = embedding.dtype, embedding.device
        self.embedding = embedding
        self.token_map = None if token_map is None else token_map.to(self.device)
        self.metadata = dict(metadata or {})

        def vector(w: Tensor) -> Tensor:
            return w.detach().to(self.device, self.dtype).contiguous()

        drafted = lm_head if token_map is None else lm_head[self.token_map.long()]
        head = Matrix(drafted, None, embedding, int8)
        self.lm_head, self.lm_head_scale = head.weight, head.scale
        self.enorm = vector(block.enorm.weight) if block.enorm else None
        self.hnorm = vector(block.hnorm.weight) if block.hnorm else None
        self.eh_proj = vector(block.eh_proj.weight)
        self.layer = DecodingLayer(block, embedding, int8)
        self.norm = None
        if spec.final_norm != "none":
            own = spec.final_norm == "own"
            self.norm = vector(block.shared_head.norm.weight if own else trunk_norm)

    def new_cache(self, num_pages: int, page_size: int) -> tuple[Tensor, Tensor]:
        """Zeroed k_cache and v_cache, [pages, page_size, Hkv, D] each."""
        shape = (num_pages, page_size, self.spec.num_kv_heads, self.spec.head_dim)
        k_cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return k_cache, torch.zeros_like(k_cache)

    @torch.no_grad()
    def extend(
        self,
        token_ids: Tensor,
        hidden: Tensor,
        positions: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        cache_lens: Tensor,
        cu_q_lens: Tensor,
        max_q_len: int,
    ) -> Tensor:
        """Computes rows of the head and appends their keys and values to its cache.

        Args:
            token_ids: [T], int32 or int64: the token *after* each row's position.
            hidden: [T, H]: the trunk's hidden state at each row's position (`spec.h_source`), or
                `recur` of the previous depth.
            positions: int64 [T], cache_lens[b] + offset for row `offset` of request b.
            k_cache, v_cache, block_table, cache_lens, cu_q_lens, max_q_len: as in
                `ops.verify_attention`.

        Returns:
            y f32 [T, H], for `propose` and `recur`.
        """
        spec = self.spec
        projected = ops.eh_proj(
            token_ids,
            hidden.to(self.dtype),
            self.embedding,
            self.eh_proj,
            enorm_weight=self.enorm,
            hnorm_weight=self.hnorm,
            positions=positions if spec.zero_position0 else None,
            eps=spec.eps,
            gemma_norm=spec.gemma_norm,
            hidden_first=spec.concat == "he",
        )
        return self.layer(
            projected.float(),
            positions,
            k_cache,
            v_cache,
            block_table,
            cache_lens,
            cu_q_lens,
            max_q_len,
        )

    @torch.no_grad()
    def propose(self, y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest next tokens of each row of y [M, H]: `ops.head_topk`'s results."""
        return ops.head_topk(
            y.to(self.dtype),
            self.lm_head,
            k,
            norm_weight=self.norm,
            weight_scale=self.lm_head_scale,
            token_map=self.token_map,
            eps=self.spec.eps,
            gemma_norm=self.spec.gemma_norm,
        )

    @torch.no_grad()
    def recur(self, y: Tensor) -> Tensor:
        """What the next depth's `extend` takes as hidden."""
        if self.spec.recur_source == "pre_norm" or self.norm is None:
            return y
        return ops.add_rms_norm(y, self.norm, eps=self.spec.eps, gemma_norm=self.spec.gemma_norm)
