"""A Llama whose attention is `verify_attention` on a paged cache.

T is the number of rows: the new tokens of all requests, one request after the other. The residual
stream is f32 whatever the weights are, because its outliers do not survive bf16. Every operator
here computes a row from that row alone, so a token's hidden state has the same bits whether it is
computed in a prefill chunk, in a single step or as a draft under verification.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext import ops
from mtp_ext.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class LlamaConfig:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Hugging Face's keys; rope_type llama3 or linear
    eos_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class Layer:
    attn_norm: Tensor  # [H]
    qkv: Tensor  # [(Hq + 2 Hkv) D, H]
    o: Tensor  # [H, Hq D]
    mlp_norm: Tensor  # [H]
    gate_up: Tensor  # [2 F, H]
    down: Tensor  # [H, F]


class Cache(Protocol):
    """What the model needs of a paged cache: one k and one v [P, page, Hkv, D] per layer."""

    k: list[Tensor]
    v: list[Tensor]


def rope_frequencies(config: LlamaConfig) -> Tensor:
    """Radians per position, f32 [D/2]."""
    d = config.head_dim
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return frequency
    if kind == "linear":
        return frequency / scaling["factor"]
    if kind == "llama3":
        # Long waves are slowed down by `factor`, short ones kept, with a ramp between.
        old = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = old * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (keep + (1 - keep) / scaling["factor"])
    raise ValueError(f"rope_scaling type {kind!r} is not supported (default, linear, llama3 are)")


def rope_table(config: LlamaConfig, device: torch.device | str = "cpu") -> Tensor:
    """f32 [max_positions, D]: the cosines of a position, then its sines."""
    positions = torch.arange(config.max_positions, dtype=torch.float32)
    angle = torch.outer(positions, rope_frequencies(config))
    return torch.cat([angle.cos(), angle.sin()], -1).to(device)


class Llama:
    """Made by `mtp_ext.models.load_model`, or by `from_tensors` from any source of weights."""

    def __init__(
        self,
        config: LlamaConfig,
        embedding: Tensor,
        layers: list[Layer],
        norm: Tensor,
        lm_head: Tensor,
        tokenizer: Tokenizer | None = None,
    ):
        self.config = config
        self.embedding = embedding  # [V, H]
        self.layers = layers
        self.norm = norm  # [H]
        self.lm_head = lm_head  # [V, H]; the embedding itself where they are tied
        self.tokenizer = tokenizer
        self.rope = rope_table(config, embedding.device)
        # Of forward and logits. F.linear is faster for many rows, which then depend on each other.
        self.linear: Callable[[Tensor, Tensor], Tensor] = ops.direct("skinny_linear")

    @classmethod
    def from_tensors(
        cls,
        config: LlamaConfig,
        tensor: Callable[[str], Tensor | None],
        dtype: torch.dtype,
        tokenizer: Tokenizer | None = None,
    ) -> "Llama":
        """`tensor(name)` returns the weight of that Hugging Face name, None if there is none."""

        def get(*names: str) -> Tensor:
            return torch.cat([tensor(name + ".weight") for name in names]).to(dtype)

        layers = []
        for i in range(config.num_layers):
            at, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
            layers.append(
                Layer(
                    attn_norm=get(f"model.layers.{i}.input_layernorm"),
                    qkv=get(f"{at}.q_proj", f"{at}.k_proj", f"{at}.v_proj"),
                    o=get(f"{at}.o_proj"),
                    mlp_norm=get(f"model.layers.{i}.post_attention_layernorm"),
                    gate_up=get(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                    down=get(f"{mlp}.down_proj"),
                )
            )
        embedding = get("model.embed_tokens")
        untied = tensor("lm_head.weight")
        lm_head = embedding if untied is None else untied.to(dtype)
        return cls(config, embedding, layers, get("model.norm"), lm_head, tokenizer)

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @torch.no_grad()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        cache: Cache,
        block_table: Tensor,
        cache_lens: Tensor,
        cu_q_lens: Tensor,
        max_q_len: int,
    ) -> Tensor:
        """Appends the rows to the cache and returns their hidden states.

        Args:
            token_ids, positions: int64 [T].
            cache: written in place.
            block_table, cache_lens, cu_q_lens, max_q_len: as in `verify_attention`.

        Returns:
            f32 [T, H], the residual stream before the final norm.
        """
        c, linear = self.config, self.linear
        names = ("add_rms_norm", "rope_qkv", "verify_attention", "silu_and_mul")
        norm, rope, attend, gate = map(ops.direct, names)
        residual = self.embedding[token_ids].float()
        x = None
        for layer, k_cache, v_cache in zip(self.layers, cache.k, cache.v):
            y = norm(residual, layer.attn_norm, x=x, eps=c.rms_eps)
            q, k, v = rope(linear(y, layer.qkv), positions, self.rope, c.num_heads, c.num_kv_heads)
            y, _ = attend(q, k, v, k_cache, v_cache, block_table, cache_lens, cu_q_lens, max_q_len)
            x = linear(y.flatten(1), layer.o)
            y = norm(residual, layer.mlp_norm, x=x, eps=c.rms_eps)
            x = linear(gate(linear(y, layer.gate_up)), layer.down)
        return residual if x is None else residual.add_(x)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the LM head sees of hidden f32 [T, H], in the weights' dtype."""
        return ops.add_rms_norm(hidden, self.norm, eps=self.config.rms_eps)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """[T, V] in the weights' dtype, from what `forward` returned."""
        return self.linear(self.final_norm(hidden), self.lm_head)

    def forward_dense(self, token_ids: Tensor) -> Tensor:
        """The same model in plain PyTorch without a cache, for training and as a reference.

        token_ids int64 [B, T] -> f32 [B, T, H], the residual stream before the final norm.
        Gradients flow to weights that require them.
        """
        c, (b, t) = self.config, token_ids.shape
        cos, sin = self.rope[:t].to(token_ids.device).chunk(2, -1)

        def norm(x: Tensor, weight: Tensor) -> Tensor:
            return (F.rms_norm(x, (c.hidden_size,), eps=c.rms_eps) * weight.float()).to(self.dtype)

        def rotate(x: Tensor) -> Tensor:
            lo, hi = x.float().chunk(2, -1)
            return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1).to(x.dtype)

        residual = self.embedding[token_ids].float()
        for layer in self.layers:
            qkv = F.linear(norm(residual, layer.attn_norm), layer.qkv)
            heads = qkv.view(b, t, -1, c.head_dim).transpose(1, 2)
            q, k, v = heads.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
            y = F.scaled_dot_product_attention(
                rotate(q), rotate(k), v, is_causal=True, enable_gqa=True
            )
            residual = residual + F.linear(y.transpose(1, 2).flatten(2), layer.o)
            gate, up = F.linear(norm(residual, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            residual = residual + F.linear(F.silu(gate) * up, layer.down)
        return residual
