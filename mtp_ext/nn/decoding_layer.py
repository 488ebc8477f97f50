"""`DecoderLayer` over the custom operators: the parts of `layers.py` for rows of a paged cache.

Weights have the dtype and device of a `like` tensor; the residual stream is f32. A row's result
does not depend on the other rows of the call.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.nn.layers import (
    MLP,
    Attention,
    DecoderLayer,
    LatentAttention,
    MoE,
    mix_experts,
    rope_order,
    rope_table,
)
from mtp_ext.ops import direct

# A draft makes a few small calls and little else.
skinny_linear, add_rms_norm = direct("skinny_linear"), direct("add_rms_norm")
rope_qkv, silu_and_mul = direct("rope_qkv"), direct("silu_and_mul")
verify_attention = direct("verify_attention")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and f32 [N]: the row's largest magnitude becomes 127."""
    scale = weight.float().abs().amax(1).clamp(min=1e-30) / 127
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


class Matrix:
    """The weight of a projection [N, K], in `like`'s dtype or in int8 with a scale per row."""

    def __init__(
        self, weight: Tensor, like: Tensor, int8: bool = False, bias: Tensor | None = None
    ):
        self.bias = None if bias is None else vector(bias, like)
        self.scale = None
        if int8:
            self.weight, self.scale = quantize_rows(weight.detach().to(like.device))
        else:
            self.weight = vector(weight, like)

    def __call__(self, x: Tensor) -> Tensor:
        return skinny_linear(x, self.weight, bias=self.bias, weight_scale=self.scale)


def vector(weight: Tensor, like: Tensor) -> Tensor:
    return weight.detach().to(like.device, like.dtype).contiguous()


class DecodingAttention:
    """`Attention`. The rows of q and k are put in the order that rope_qkv expects."""

    def __init__(self, layer: DecoderLayer, like: Tensor, int8: bool):
        attn: Attention = layer.self_attn
        self.spec = spec = layer.spec
        self.d, self.scale = spec.head_dim, attn.scale
        self.cache_shape = (spec.num_kv_heads, spec.head_dim)
        order = rope_order(spec)

        def ordered(weight: Tensor) -> Tensor:
            return weight if order is None else weight[:, order.to(weight.device)]

        def fused(name: str) -> tuple[Tensor | None, Tensor | None]:
            """The weights or biases of q, k and v in one piece, and those of the gate."""
            q, k, v = (getattr(p, name) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
            if q is None:
                return None, None
            q, *gate = q.unflatten(0, (-1, 2 if spec.output_gate else 1, self.d)).unbind(1)
            k = k.unflatten(0, (-1, self.d))
            qkv = torch.cat([ordered(q).flatten(0, 1), ordered(k).flatten(0, 1), v])
            return qkv, gate[0].flatten(0, 1) if gate else None

        (qkv, gate), (qkv_bias, gate_bias) = fused("weight"), fused("bias")
        self.qkv = Matrix(qkv, like, int8, qkv_bias)
        self.gate = None if gate is None else Matrix(gate, like, int8, gate_bias)
        self.norms = None
        if spec.qk_norm:
            norms = torch.stack([attn.q_norm.weight, attn.k_norm.weight])
            self.norms = vector(ordered(norms), like)
        self.o_proj = Matrix(attn.o_proj.weight, like, int8)
        self.rope = rope_table(spec).to(like.device)

    def heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        spec, qkv = self.spec, self.qkv(x)
        counts = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        if self.norms is not None:
            q, k, v = qkv.unflatten(1, (-1, self.d)).split(counts, 1)
            q, k = (
                rms_norm(t.flatten(0, 1), w, spec.eps, spec.gemma_norm).view_as(t)
                for t, w in zip((q, k), self.norms)
            )
            qkv = torch.cat([q, k, v], 1).flatten(1)
        q, k, v = rope_qkv(qkv, positions, self.rope, spec.num_heads, spec.num_kv_heads)
        return q, k, v, None if self.gate is None else self.gate(x)

    def merge(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        attended = attended.flatten(1)
        return self.o_proj(attended if gate is None else attended * gate.sigmoid())


class DecodingLatentAttention:
    """`LatentAttention`, with a key and a value per query head in the cache, not the latent.

    Values are padded with zeros to the keys' size.
    """

    def __init__(self, layer: DecoderLayer, like: Tensor, int8: bool):
        attn: LatentAttention = layer.self_attn
        self.spec, self.scale = layer.spec, attn.scale
        self.latent = latent = layer.spec.latent
        self.cache_shape = (layer.spec.num_heads, latent.nope_dim + latent.rope_dim)
        n, order = layer.spec.num_heads, rope_order(layer.spec)

        def ordered(weight: Tensor, heads: int) -> Tensor:
            """The rotated rows, the last of every head, in the order that rope_qkv expects."""
            if order is None:
                return weight
            weight = weight.unflatten(0, (heads, -1))
            still, turned = weight.tensor_split([-latent.rope_dim], 1)
            return torch.cat([still, turned[:, order.to(weight.device)]], 1).flatten(0, 1)

        if latent.q_lora_rank is None:
            self.q = Matrix(ordered(attn.q_proj.weight, n), like, int8)
        else:
            self.q_a = Matrix(attn.q_a_proj.weight, like, int8)
            self.q_norm = vector(attn.q_a_layernorm.weight, like)
            self.q = Matrix(ordered(attn.q_b_proj.weight, n), like, int8)
        self.kv_a = Matrix(ordered(attn.kv_a_proj_with_mqa.weight, 1), like, int8)
        self.kv_norm = vector(attn.kv_a_layernorm.weight, like)
        self.kv_b = Matrix(attn.kv_b_proj.weight, like, int8)
        self.o_proj = Matrix(attn.o_proj.weight, like, int8)
        self.rope = rope_table(layer.spec).to(like.device)

    def heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        latent, eps, n = self.latent, self.spec.eps, self.spec.num_heads
        q = self.q(x if latent.q_lora_rank is None else rms_norm(self.q_a(x), self.q_norm, eps))
        q, q_rope = q.unflatten(1, (n, -1)).split([latent.nope_dim, latent.rope_dim], -1)
        compressed, k_rope = self.kv_a(x).split([latent.kv_lora_rank, latent.rope_dim], 1)
        kv = self.kv_b(rms_norm(compressed, self.kv_norm, eps)).unflatten(1, (n, -1))
        k, v = kv.split([latent.nope_dim, latent.v_dim], -1)
        # One key for all heads; the third piece stands where rope_qkv has values.
        turning = torch.cat([q_rope.flatten(1), k_rope, k_rope], 1)
        q_rope, k_rope, _ = rope_qkv(turning, positions, self.rope, n, 1)
        v = F.pad(v, (0, self.cache_shape[1] - latent.v_dim))
        return torch.cat([q, q_rope], -1), torch.cat([k, k_rope.expand(-1, n, -1)], -1), v, None

    def merge(self, attended: Tensor, gate: None) -> Tensor:
        return self.o_proj(attended[..., : self.latent.v_dim].flatten(1))


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool = False) -> Tensor:
    """Of rows that are no residual stream."""
    return add_rms_norm(x.float().contiguous(), weight, eps=eps, gemma_norm=gemma)


class DecodingMLP:
    def __init__(self, mlp: MLP, like: Tensor, int8: bool):
        self.gate_up = Matrix(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), like, int8)
        self.down = Matrix(mlp.down_proj.weight, like, int8)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_and_mul(self.gate_up(x)))


class DecodingMoE:
    """`MoE`. Which experts have work is read on the host; there is no kernel for all of them."""

    def __init__(self, moe: MoE, like: Tensor, int8: bool):
        # The router stays in f32: rounding changes which experts are chosen.
        self.gate = moe.gate
        self.gate_weight = moe.gate.weight.detach().float().to(like.device)
        self.experts = [DecodingMLP(expert, like, int8) for expert in moe.experts]
        self.shared = self.shared_gate = None
        if moe.shared_experts is not None:
            self.shared = DecodingMLP(moe.shared_experts, like, int8)
        if moe.shared_expert_gate is not None:
            self.shared_gate = Matrix(moe.shared_expert_gate.weight, like)

    def __call__(self, x: Tensor) -> Tensor:
        logits = skinny_linear(x.float(), self.gate_weight)
        weights, ids = self.gate.choose(logits)
        out = mix_experts(x, weights.to(x.dtype), ids, self.experts)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = shared * self.shared_gate(x).sigmoid()
            out = out + shared
        return out


class DecodingLayer:
    """Rows of a `DecoderLayer`, appended to its part of a paged KV cache."""

    def __init__(self, layer: DecoderLayer, like: Tensor, int8: bool):
        spec = layer.spec
        self.norm = {"eps": spec.eps, "gemma_norm": spec.gemma_norm}
        self.input_norm = vector(layer.input_layernorm.weight, like)
        self.post_norm = vector(layer.post_attention_layernorm.weight, like)
        attention = DecodingAttention if spec.latent is None else DecodingLatentAttention
        self.attention = attention(layer, like, int8)
        self.mlp = (DecodingMLP if spec.moe is None else DecodingMoE)(layer.mlp, like, int8)
        self.like = like

    def new_cache(self, num_pages: int, page_size: int) -> tuple[Tensor, Tensor]:
        """Zeroed k_cache and v_cache, [pages, page_size, Hkv, D] each."""
        k_cache = self.like.new_zeros((num_pages, page_size, *self.attention.cache_shape))
        return k_cache, torch.zeros_like(k_cache)

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
        x = add_rms_norm(residual, self.input_norm, **self.norm)
        q, k, v, gate = self.attention.heads(x, positions)
        attended, _ = verify_attention(
            q,
            k,
            v,
            k_cache,
            v_cache,
            block_table,
            cache_lens,
            cu_q_lens,
            max_q_len,
            scale=self.attention.scale,
        )
        y = self.attention.merge(attended, gate)
        x = add_rms_norm(residual, self.post_norm, x=y, **self.norm)
        return residual.add_(self.mlp(x))
