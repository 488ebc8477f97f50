"""The parts of a decoder layer, trainable and in plain PyTorch, as `MTPSpec` describes them.

Parameters carry Hugging Face's names. An attention module does what comes before and after the
product of queries and keys; that product is the layer's, so that training can unroll a head
exactly as decoding does:

    q, k, v, gate = attention.heads(x, positions, table)    q [..., Hq, D], k [..., Hkv, D]
    y = attention.merge(attended, gate)                     attended [..., Hq, Dv], y [..., H]
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn.specs import MoESpec, MTPSpec


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float, gemma: bool = False):
        super().__init__()
        self.eps, self.gemma = eps, gemma
        self.weight = nn.Parameter(torch.zeros(size) if gemma else torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.gemma)


def rms_norm(x: Tensor, weight: Tensor, eps: float, gemma: bool) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], 1 + weight if gemma else weight, eps)


def rotary_size(spec: MTPSpec) -> tuple[int, int]:
    """How many elements are rotated, and of how many."""
    if spec.latent is not None:
        return spec.latent.rope_dim, spec.latent.rope_dim
    return spec.head_dim if spec.rotary_dim is None else spec.rotary_dim, spec.head_dim


def rope_order(spec: MTPSpec) -> Tensor | None:
    """The order of a head's elements in which i turns together with i + D/2; None: as they are.

    Elements that are not rotated form pairs too, of angle 0. The same order in q and k leaves
    their product as it was.
    """
    rotated, size = rotary_size(spec)
    if rotated == size and not spec.rope_interleaved:
        return None
    elements = torch.arange(size)
    pairs = elements[:rotated].view(-1, 2).T if spec.rope_interleaved else elements[:rotated]
    first, second = pairs.reshape(2, -1)
    third, fourth = elements[rotated:].view(2, -1)
    return torch.cat([first, third, second, fourth])


def yarn_frequencies(frequency: Tensor, theta: float, scaling: dict) -> Tensor:
    """YaRN (Peng et al. 2023): slows down waves that turn less than beta_fast times in training.

    Those below beta_slow turns are slowed by `factor`, with a ramp between.
    """
    half, old = len(frequency), scaling["original_max_position_embeddings"]

    def index_of(turns: float) -> float:
        return half * math.log(old / (turns * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(index_of(scaling.get("beta_fast") or 32)), 0)
    high = min(math.ceil(index_of(scaling.get("beta_slow") or 1)), 2 * half - 1)
    slowed = ((torch.arange(half) - low) / max(high - low, 0.001)).clamp(0, 1)
    return frequency * (1 - slowed + slowed / scaling["factor"])


def yarn_magnitude(scaling: dict, m: float) -> float:
    return 0.1 * m * math.log(scaling["factor"]) + 1


def rope_table(spec: MTPSpec) -> Tensor:
    """f32 [max_positions, D] in `rope_order`: the cosines of a position, then its sines."""
    rotated, size = rotary_size(spec)
    half = rotated // 2
    frequency = spec.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
    magnitude = 1.0
    if (scaling := spec.rope_scaling) is not None:
        frequency = yarn_frequencies(frequency, spec.rope_theta, scaling)
        if scaling.get("mscale") and scaling.get("mscale_all_dim"):
            magnitude = yarn_magnitude(scaling, scaling["mscale"])
            magnitude /= yarn_magnitude(scaling, scaling["mscale_all_dim"])
        else:
            magnitude = yarn_magnitude(scaling, 1.0)
    angle = torch.outer(torch.arange(spec.max_positions, dtype=torch.float32), frequency)
    still = torch.zeros(spec.max_positions, (size - rotated) // 2)
    cos = torch.cat([angle.cos() * magnitude, still + 1], -1)
    return torch.cat([cos, angle.sin() * magnitude, still], -1)


def rotate(x: Tensor, positions: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding, halves layout: x [..., heads, D], positions [...]."""
    cos, sin = table[positions][..., None, :].chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Attention(nn.Module):
    """Grouped-query attention with the options of `MTPSpec`."""

    def __init__(self, spec: MTPSpec):
        super().__init__()
        h, d = spec.hidden_size, spec.head_dim
        self.head_dim, self.output_gate, self.scale = d, spec.output_gate, d**-0.5
        queries = spec.num_heads * d * (2 if spec.output_gate else 1)
        self.q_proj = nn.Linear(h, queries, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(h, spec.num_kv_heads * d, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(h, spec.num_kv_heads * d, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(spec.num_heads * d, h, bias=False)
        self.q_norm = RMSNorm(d, spec.eps, spec.gemma_norm) if spec.qk_norm else None
        self.k_norm = RMSNorm(d, spec.eps, spec.gemma_norm) if spec.qk_norm else None
        self.register_buffer("order", rope_order(spec), persistent=False)

    def heads(
        self, x: Tensor, positions: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        d, gate = self.head_dim, None
        q, k, v = (p(x) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.output_gate:  # per head: its query, then its gate
            q, gate = q.unflatten(-1, (-1, 2 * d)).chunk(2, -1)
        else:
            q = q.unflatten(-1, (-1, d))
        k, v = k.unflatten(-1, (-1, d)), v.unflatten(-1, (-1, d))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.order is not None:
            q, k = q[..., self.order], k[..., self.order]
        return rotate(q, positions, table), rotate(k, positions, table), v, gate

    def merge(self, attended: Tensor, gate: Tensor | None) -> Tensor:
        if gate is not None:
            attended = attended * gate.sigmoid()
        return self.o_proj(attended.flatten(-2))


class LatentAttention(nn.Module):
    """Multi-head latent attention, expanded to one key and value per query head."""

    def __init__(self, spec: MTPSpec):
        super().__init__()
        self.latent = latent = spec.latent
        h, n = spec.hidden_size, spec.num_heads
        d = latent.nope_dim + latent.rope_dim
        self.num_heads = n
        self.scale = d**-0.5
        if spec.rope_scaling is not None:
            m = spec.rope_scaling.get("mscale_all_dim") or 0.0
            self.scale *= yarn_magnitude(spec.rope_scaling, m) ** 2
        if latent.q_lora_rank is None:
            self.q_proj = nn.Linear(h, n * d, bias=False)
        else:
            self.q_a_proj = nn.Linear(h, latent.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(latent.q_lora_rank, spec.eps)
            self.q_b_proj = nn.Linear(latent.q_lora_rank, n * d, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(h, latent.kv_lora_rank + latent.rope_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(latent.kv_lora_rank, spec.eps)
        self.kv_b_proj = nn.Linear(
            latent.kv_lora_rank, n * (latent.nope_dim + latent.v_dim), bias=False
        )
        self.o_proj = nn.Linear(n * latent.v_dim, h, bias=False)
        self.register_buffer("order", rope_order(spec), persistent=False)

    def heads(
        self, x: Tensor, positions: Tensor, table: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        latent, n = self.latent, self.num_heads
        if latent.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q, q_rope = q.unflatten(-1, (n, -1)).split([latent.nope_dim, latent.rope_dim], -1)
        compressed, k_rope = self.kv_a_proj_with_mqa(x).split(
            [latent.kv_lora_rank, latent.rope_dim], -1
        )
        kv = self.kv_b_proj(self.kv_a_layernorm(compressed)).unflatten(-1, (n, -1))
        k, v = kv.split([latent.nope_dim, latent.v_dim], -1)
        k_rope = k_rope[..., None, :]
        if self.order is not None:
            q_rope, k_rope = q_rope[..., self.order], k_rope[..., self.order]
        q_rope, k_rope = (rotate(t, positions, table) for t in (q_rope, k_rope))
        k_rope = k_rope.expand(*k.shape[:-1], -1)
        return torch.cat([q, q_rope], -1), torch.cat([k, k_rope], -1), v, None

    def merge(self, attended: Tensor, gate: None) -> Tensor:
        return self.o_proj(attended.flatten(-2))


class MLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Scores the experts and chooses each token's."""

    def __init__(self, hidden_size: int, spec: MoESpec):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        if spec.scoring == "sigmoid":
            self.register_buffer("e_score_correction_bias", torch.zeros(spec.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`choose` for rows x [T, H]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        weights, ids = self.choose(F.linear(x.to(wide), self.weight.to(wide)))
        return weights.to(x.dtype), ids

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """From logits [T, experts], f32 or f64: weights and int64 ids, [T, top_k] each."""
        spec = self.spec
        if spec.scoring == "sigmoid":
            scores = logits.sigmoid()
            choice = scores + self.e_score_correction_bias.to(logits)
        else:
            scores = choice = logits.softmax(-1)
        if spec.top_groups < spec.num_groups:
            groups = choice.unflatten(-1, (spec.num_groups, -1))
            best = groups.topk(2, -1).values.sum(-1).topk(spec.top_groups, -1).indices
            barred = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
            choice = groups.masked_fill(barred[..., None], float("-inf")).flatten(-2)
        ids = choice.topk(spec.top_k, -1).indices
        weights = scores.gather(-1, ids)
        if spec.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * spec.scale, ids


def mix_experts(
    x: Tensor, weights: Tensor, ids: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
) -> Tensor:
    """Sums each row's experts in the order of their ids; x [T, H], weights and ids [T, top_k]."""
    out = torch.zeros_like(x)
    for expert in ids.unique().tolist():
        row, slot = (ids == expert).nonzero(as_tuple=True)
        out = out.index_add(0, row, experts[expert](x[row]) * weights[row, slot, None])
    return out


class MoE(nn.Module):
    """`MoESpec`, one expert after the other: for training and as a reference, not for speed.

    Which experts have work is read on the host. There is no load-balancing loss, and the correction
    bias is not updated in training.
    """

    def __init__(self, hidden_size: int, spec: MoESpec):
        super().__init__()
        self.gate = Router(hidden_size, spec)
        self.experts = nn.ModuleList(
            MLP(hidden_size, spec.intermediate_size) for _ in range(spec.num_experts)
        )
        self.shared_experts = MLP(hidden_size, spec.shared_size) if spec.shared_size else None
        self.shared_expert_gate = (
            nn.Linear(hidden_size, 1, bias=False) if spec.shared_gate else None
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = mix_experts(rows, *self.gate(rows), self.experts)
        if self.shared_experts is not None:
            shared = self.shared_experts(rows)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(rows).sigmoid()
            out = out + shared
        return out.view(x.shape)


class DecoderLayer(nn.Module):
    """A pre-norm transformer layer: attention, then MLP or experts, each behind an RMSNorm."""

    def __init__(self, spec: MTPSpec):
        super().__init__()
        self.spec = spec
        h = spec.hidden_size
        self.input_layernorm = RMSNorm(h, spec.eps, spec.gemma_norm)
        self.self_attn = Attention(spec) if spec.latent is None else LatentAttention(spec)
        self.post_attention_layernorm = RMSNorm(h, spec.eps, spec.gemma_norm)
        self.mlp = MLP(h, spec.intermediate_size) if spec.moe is None else MoE(h, spec.moe)
        self.register_buffer("rope", rope_table(spec), persistent=False)

    def layer(
        self, x: Tensor, positions: Tensor, documents: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, S, H], causal -> its rows [B, S, H] and their keys and values [B, S, Hkv, D].

        positions int64 [B, S]; documents int [B, S]: a row sees only rows of its own number.
        """
        q, k, v, gate = self.heads(x, positions)
        mask = None
        if documents is not None:
            row = torch.arange(x.shape[1], device=x.device)
            mask = (documents[:, :, None] == documents[:, None]) & (row[:, None] >= row)
            mask = mask[:, None]
        attended = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.self_attn.scale,
            enable_gqa=True,
        )
        return self.finish(x, attended.transpose(1, 2), gate), (k, v)

    def heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and gate of rows x."""
        return self.self_attn.heads(self.input_layernorm(x), positions, self.rope)

    def finish(self, x: Tensor, attended: Tensor, gate: Tensor | None) -> Tensor:
        """The rows, given what their queries attended to, [..., Hq, Dv]."""
        x = x + self.self_attn.merge(attended, gate)
        return x + self.mlp(self.post_attention_layernorm(x))
