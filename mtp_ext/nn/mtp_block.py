"""A DeepSeek-style multi-token-prediction head: one decoder layer that drafts for a trunk.

At depth 1, row i takes the token t[i+1] and the trunk's hidden state h[i] and predicts t[i+2]:

    x = eh_proj(concat(enorm(E[t[i+1]]), hnorm(h[i])))     E and the LM head are the trunk's
    y = decoder_layer(x)                                   attends to rows 0..i of this head
    logits = lm_head(norm(y))

Deeper drafts recur: row i+1 takes the drafted t[i+2] and, in place of h[i+1], the head's own y.
Families differ in concatenation order, norms and in which hidden states they pass on;
`MTPSpec` says all of it explicitly.

`MTPBlock` is the trainable module, in plain PyTorch over [batch, sequence]. `MTPHead` is the same
function for decoding, built on `mtp_ext.ops` with a paged KV cache of its own:

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

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext import ops


@dataclass(frozen=True)
class MTPSpec:
    """Everything that decides what an MTP head computes, besides its weights."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10000.0
    max_positions: int = 8192
    eps: float = 1e-5
    concat: Literal["eh", "he"] = "eh"  # [e; h] as DeepSeek, [h; e] as MiMo
    embed_norm: bool = True
    hidden_norm: bool = True
    gemma_norm: bool = False  # scale by 1 + w instead of w, in every norm
    h_source: Literal["pre_norm", "post_norm"] = "pre_norm"  # h[i]: around the trunk's final norm
    recur_source: Literal["pre_norm", "post_norm"] = "pre_norm"  # y: around the head's final norm
    own_norm: bool = True  # a final norm of its own, else the trunk's
    zero_position0: bool = False  # zero embedding in the row at position 0, as DeepSeek in vLLM

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, gemma: bool):
        super().__init__()
        self.eps, self.gemma = eps, gemma
        self.weight = nn.Parameter(torch.zeros(size) if gemma else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.gemma)


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], 1 + weight if gemma else weight, eps)


def rope_table(spec: MTPSpec, device: torch.device | str = "cpu") -> Tensor:
    """f32 [max_positions, D]: the cosines of a position, then its sines."""
    half = spec.head_dim // 2
    frequency = spec.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(spec.max_positions, dtype=torch.float32), frequency)
    return torch.cat([angle.cos(), angle.sin()], -1).to(device)


def rotate(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding, halves layout: x [..., heads, D], positions [...]."""
    cos, sin = table[positions][..., None, :].chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    def __init__(self, spec: MTPSpec):
        super().__init__()
        h, d = spec.hidden_size, spec.head_dim
        self.q_proj = nn.Linear(h, spec.num_heads * d, bias=False)
        self.k_proj = nn.Linear(h, spec.num_kv_heads * d, bias=False)
        self.v_proj = nn.Linear(h, spec.num_kv_heads * d, bias=False)
        self.o_proj = nn.Linear(spec.num_heads * d, h, bias=False)


class MLP(nn.Module):
    def __init__(self, spec: MTPSpec):
        super().__init__()
        h, f = spec.hidden_size, spec.intermediate_size
        self.gate_proj = nn.Linear(h, f, bias=False)
        self.up_proj = nn.Linear(h, f, bias=False)
        self.down_proj = nn.Linear(f, h, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SharedHead(nn.Module):
    def __init__(self, spec: MTPSpec):
        super().__init__()
        self.norm = RMSNorm(spec.hidden_size, spec.eps, spec.gemma_norm)


class MTPBlock(nn.Module):
    """The head's own parameters, under DeepSeek's names, and its forward for training.

    The embedding and the LM head are the trunk's and are passed in or applied outside. Call
    `depth1` for the rows that read the trunk, then `deeper` once per further depth.
    """

    def __init__(self, spec: MTPSpec):
        super().__init__()
        self.spec = spec
        h = spec.hidden_size

        def norm() -> RMSNorm:
            return RMSNorm(h, spec.eps, spec.gemma_norm)

        self.enorm = norm() if spec.embed_norm else None
        self.hnorm = norm() if spec.hidden_norm else None
        self.eh_proj = nn.Linear(2 * h, h, bias=False)
        self.input_layernorm = norm()
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = norm()
        self.mlp = MLP(spec)
        self.shared_head = SharedHead(spec) if spec.own_norm else None
        self.register_buffer("rope", rope_table(spec), persistent=False)

    def project(self, embedded: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """The head's prologue in autograd, as `ops.eh_proj` computes it."""
        if self.spec.zero_position0:
            embedded = embedded.masked_fill((positions == 0)[..., None], 0)
        e = self.enorm(embedded) if self.enorm else embedded
        h = self.hnorm(hidden) if self.hnorm else hidden
        return self.eh_proj(torch.cat([h, e] if self.spec.concat == "he" else [e, h], -1))

    def depth1(
        self, embedded: Tensor, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Rows [B, S] with the trunk's hidden states, causal: returns y [B, S, H] and their (k, v).

        embedded: E[t[i+1]], [B, S, H]; hidden: h[i], [B, S, H]; positions [B, S]. Padding goes to
        the end of a sequence, where causality keeps it from the rest.
        """
        x = self.project(embedded, hidden, positions)
        q, k, v = self._qkv(x, positions)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
        )
        return self._finish(x, out.transpose(1, 2)), (k, v)

    def deeper(
        self,
        embedded: Tensor,
        hidden: Tensor,
        rows: Tensor,
        trunk_kv: tuple[Tensor, Tensor],
        drafted_kv: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """One recurrent depth for the drafts that start at `rows` [R], the same of each sequence.

        hidden [B, R, H] is the previous depth's `recur`, embedded [B, R, H] the next token after
        it. A draft that starts at row i sees the trunk-fed rows 0..i, what it wrote at its
        earlier depths (`drafted_kv`, one pair each) and itself, exactly as in decoding.
        """
        positions = (rows + len(drafted_kv) + 1).expand(embedded.shape[:2])
        x = self.project(embedded, hidden, positions)
        q, k, v = self._qkv(x, positions)
        group = self.spec.num_heads // self.spec.num_kv_heads
        q = q.unflatten(2, (self.spec.num_kv_heads, group)).transpose(1, 2)  # [B, Hkv, R, G, D]
        q = q * self.spec.head_dim**-0.5
        keys, values = (t.transpose(1, 2) for t in trunk_kv)  # [B, Hkv, S, D]
        scores = q.flatten(2, 3) @ keys.transpose(-1, -2)  # [B, Hkv, R G, S]
        hidden_keys = torch.arange(keys.shape[2], device=q.device) > rows[:, None]
        scores = scores.unflatten(2, (-1, group)).masked_fill(hidden_keys[:, None], float("-inf"))
        drafted = [(k, v), *drafted_kv]
        own = [(q * key.transpose(1, 2)[:, :, :, None]).sum(-1, keepdim=True) for key, _ in drafted]
        weights = torch.softmax(torch.cat([scores, *own], -1), -1)
        trunk_weights, own_weights = weights.split([keys.shape[2], len(own)], -1)
        out = (trunk_weights.flatten(2, 3) @ values).unflatten(2, (-1, group))
        for n, (_, value) in enumerate(drafted):
            out = out + own_weights[..., n, None] * value.transpose(1, 2)[:, :, :, None]
        return self._finish(x, out.transpose(1, 2).flatten(2, 3)), (k, v)

    def normed(self, y: Tensor, trunk_norm: Tensor | None = None) -> Tensor:
        """What the LM head multiplies."""
        if self.shared_head is not None:
            return self.shared_head.norm(y)
        return rms_norm(y, trunk_norm, self.spec.eps, self.spec.gemma_norm)

    def recur(self, y: Tensor, trunk_norm: Tensor | None = None) -> Tensor:
        """What the next depth takes in place of the trunk's hidden state."""
        return self.normed(y, trunk_norm) if self.spec.recur_source == "post_norm" else y

    def _qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n, d = self.input_layernorm(x), self.spec.head_dim
        q = self.self_attn.q_proj(n).unflatten(-1, (-1, d))
        k = self.self_attn.k_proj(n).unflatten(-1, (-1, d))
        v = self.self_attn.v_proj(n).unflatten(-1, (-1, d))
        return rotate(q, positions, self.rope), rotate(k, positions, self.rope), v

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.self_attn.o_proj(attended.flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and f32 [N]: the row's largest magnitude becomes 127."""
    scale = weight.float().abs().amax(1).clamp(min=1e-30) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def _linear(x: Tensor, matrix: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, scale = matrix
    return ops.skinny_linear(x, weight, weight_scale=scale)


class MTPHead:
    """An `MTPBlock` for decoding, over the custom operators.

    embedding [V, H] and lm_head [V, H] are the trunk's. With a token_map [Vd] of distinct ids only
    those rows of the LM head are drafted from. Weights and the projections' inputs have
    embedding's dtype; the residual stream is f32. With `int8` the LM head and the decoder layer's
    projections are kept in int8 with a scale per row: a draft need not be exact, and reading
    weights is what it costs. A row's result does not depend on the other rows of the call.
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
        if not block.spec.own_norm and trunk_norm is None:
            raise ValueError("a head without its own final norm needs trunk_norm")
        self.spec = spec = block.spec
        self.dtype, self.device = embedding.dtype, embedding.device
        self.embedding = embedding
        self.token_map = None if token_map is None else token_map.to(self.device)
        self.metadata = dict(metadata or {})

        def weight(w: Tensor) -> Tensor:
            return w.detach().to(self.device, self.dtype).contiguous()

        def matrix(w: Tensor) -> tuple[Tensor, Tensor | None]:
            return quantize_rows(w.detach().to(self.device)) if int8 else (weight(w), None)

        drafted = lm_head if token_map is None else lm_head[self.token_map.long()]
        self.lm_head, self.lm_head_scale = matrix(drafted)

        attn, mlp = block.self_attn, block.mlp
        self.enorm = weight(block.enorm.weight) if block.enorm else None
        self.hnorm = weight(block.hnorm.weight) if block.hnorm else None
        self.eh_proj = weight(block.eh_proj.weight)
        self.input_norm = weight(block.input_layernorm.weight)
        self.qkv = matrix(torch.cat([p.weight for p in (attn.q_proj, attn.k_proj, attn.v_proj)]))
        self.o_proj = matrix(attn.o_proj.weight)
        self.post_norm = weight(block.post_attention_layernorm.weight)
        self.gate_up = matrix(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        self.down = matrix(mlp.down_proj.weight)
        self.norm = weight(block.shared_head.norm.weight if spec.own_norm else trunk_norm)
        self.rope = rope_table(spec, self.device)

    def new_cache(self, num_pages: int, page_size: int) -> tuple[Tensor, Tensor]:
        """Zeroed k_cache and v_cache, [pages, page_size, Hkv, D] each."""
        shape = (num_pages, page_size, self.spec.num_kv_heads, self.spec.head_dim)
        k_cache = torch.zeros(shape, dtype=self.dtype, device=self.device)
        return k_cache, torch.zeros_like(k_cache)

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
        residual = projected.float()
        y = ops.add_rms_norm(residual, self.input_norm, eps=spec.eps, gemma_norm=spec.gemma_norm)
        q, k, v = ops.rope_qkv(
            _linear(y, self.qkv), positions, self.rope, spec.num_heads, spec.num_kv_heads
        )
        y, _ = ops.verify_attention(
            q, k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, max_q_len
        )
        y = ops.add_rms_norm(
            residual,
            self.post_norm,
            x=_linear(y.flatten(1), self.o_proj),
            eps=spec.eps,
            gemma_norm=spec.gemma_norm,
        )
        y = ops.silu_and_mul(_linear(y, self.gate_up))
        return residual.add_(_linear(y, self.down))

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

    def recur(self, y: Tensor) -> Tensor:
        """What the next depth's `extend` takes as hidden."""
        if self.spec.recur_source == "pre_norm":
            return y
        return ops.add_rms_norm(y, self.norm, eps=self.spec.eps, gemma_norm=self.spec.gemma_norm)
