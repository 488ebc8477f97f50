"""Heads that do not wait for each other: every one reads the trunk's state.

`ParallelHeads` (Gloeckle et al. 2024, "Better & faster large language models via multi-token
prediction"): one decoder layer per head beside the trunk's last, all before one final norm and one
unembedding. `MedusaHeads` (Cai et al. 2024, "Medusa"): residual SiLU layers and an LM head each.
Head k = 0, 1, ... of row i predicts token i + 2 + k; token i + 1 is the trunk's own business.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext import ops
from mtp_ext.nn.decoding_layer import DecodingLayer, Matrix, vector
from mtp_ext.nn.layers import DecoderLayer, rms_norm
from mtp_ext.nn.specs import MTPSpec


class ParallelHeads(nn.Module):
    """K decoder layers side by side on the trunk's penultimate state, for training.

    Args:
        spec: of the layers; its fields about concatenation and recurrence have no meaning here.
        count: number of heads, K.
    """

    def __init__(self, spec: MTPSpec, count: int):
        super().__init__()
        self.spec = spec
        self.extra_heads = nn.ModuleList(DecoderLayer(spec) for _ in range(count))

    def forward(
        self, hidden: Tensor, positions: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """The states of all heads, before the final norm.

        Args:
            hidden: [B, S, H], what the trunk's last layer takes.
            positions: int64 [B, S]; None counts from 0.
            documents: int [B, S]: a row attends only to rows of its own number.

        Returns:
            y [K, B, S, H]. `normed(y, ...).flatten(1, 2)` is `linear_mtp_loss`'s hidden [K, T, H].
        """
        if positions is None:
            row = torch.arange(hidden.shape[1], device=hidden.device)
            positions = row.expand(hidden.shape[:2])
        return torch.stack(
            [head.layer(hidden, positions, documents)[0] for head in self.extra_heads]
        )

    def normed(self, y: Tensor, trunk_norm: Tensor) -> Tensor:
        """What the shared unembedding multiplies; trunk_norm [H] is the trunk's final norm."""
        return rms_norm(y, trunk_norm, self.spec.eps, self.spec.gemma_norm)


class ParallelDrafter:
    """`ParallelHeads` for decoding, over the custom operators, with a paged KV cache per head.

    lm_head [V, H] and trunk_norm [H] are the trunk's; token_map, int8, dtypes and the independence
    of rows are those of `MTPHead`. All heads' rows go through one `head_topk`, so the unembedding
    is read once for all drafts.
    """

    def __init__(
        self,
        heads: ParallelHeads,
        lm_head: Tensor,
        trunk_norm: Tensor,
        *,
        token_map: Tensor | None = None,
        int8: bool = False,
    ):
        self.spec = heads.spec
        self.dtype, self.device = lm_head.dtype, lm_head.device
        self.token_map = None if token_map is None else token_map.to(self.device)
        drafted = lm_head if token_map is None else lm_head[self.token_map.long()]
        self.lm_head = Matrix(drafted, lm_head, int8)
        self.norm = vector(trunk_norm, lm_head)
        self.layers = [DecodingLayer(head, lm_head, int8) for head in heads.extra_heads]

    def new_cache(self, num_pages: int, page_size: int) -> list[tuple[Tensor, Tensor]]:
        """Zeroed k_cache and v_cache of every head, [pages, page_size, Hkv, D] each."""
        return [layer.new_cache(num_pages, page_size) for layer in self.layers]

    @torch.no_grad()
    def extend(
        self,
        hidden: Tensor,
        positions: Tensor,
        caches: list[tuple[Tensor, Tensor]],
        block_table: Tensor,
        cache_lens: Tensor,
        cu_q_lens: Tensor,
        max_q_len: int,
    ) -> Tensor:
        """Computes the rows of every head and appends to their caches.

        Args:
            hidden: [T, H]: what the trunk's last layer takes at each row.
            positions: int64 [T], cache_lens[b] + offset for row `offset` of request b.
            caches: from `new_cache`; block_table, cache_lens, cu_q_lens, max_q_len: as in
                `ops.verify_attention`, the same for every head.

        Returns:
            y f32 [K, T, H], for `propose`.
        """
        y = hidden.float().expand(len(self.layers), *hidden.shape).clone()
        for state, layer, (k_cache, v_cache) in zip(y, self.layers, caches):
            layer(state, positions, k_cache, v_cache, block_table, cache_lens, cu_q_lens, max_q_len)
        return y

    @torch.no_grad()
    def propose(self, y: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest tokens of every head and row of y [K, M, H].

        Returns:
            `ops.head_topk`'s logits f32 [K, M, k], ids int64 [K, M, k] and lse f32 [K, M].
        """
        results = ops.head_topk(
            y.flatten(0, 1).to(self.dtype),
            self.lm_head.weight,
            k,
            norm_weight=self.norm,
            weight_scale=self.lm_head.scale,
            token_map=self.token_map,
            eps=self.spec.eps,
            gemma_norm=self.spec.gemma_norm,
        )
        logits, ids, lse = (r.unflatten(0, y.shape[:2]) for r in results)
        return logits, ids, lse


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b); begins as the identity."""

    def __init__(self, hidden_size: int, bias: bool):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size, bias=bias)
        nn.init.zeros_(self.linear.weight)
        if bias:
            nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaHeads(nn.Module):
    """K heads of residual blocks and an LM head of their own, for training and decoding.

    Parameters have the names of Medusa's files: medusa_head.<head>.<block>.linear.{weight,bias} and
    medusa_head.<head>.<blocks>.weight.

    Args:
        hidden_size, vocab_size: H and V.
        count: number of heads, K.
        num_layers: residual blocks per head.
        bias: of the residual blocks.
        lm_head: [V, H], copied into every head, which then begins as the trunk's own.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        count: int,
        *,
        num_layers: int = 1,
        bias: bool = True,
        lm_head: Tensor | None = None,
    ):
        super().__init__()
        self.medusa_head = nn.ModuleList(
            nn.Sequential(
                *(ResidualBlock(hidden_size, bias) for _ in range(num_layers)),
                nn.Linear(hidden_size, vocab_size, bias=False),
            )
            for _ in range(count)
        )
        if lm_head is not None:
            if lm_head.shape != (vocab_size, hidden_size):
                raise ValueError(
                    f"lm_head must be {[vocab_size, hidden_size]}, is {list(lm_head.shape)}"
                )
            with torch.no_grad():
                for head in self.medusa_head:
                    head[-1].weight.copy_(lm_head)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [K, ..., V] of hidden [..., H], the trunk's state after its final norm."""
        return torch.stack([head(hidden) for head in self.medusa_head])

    @torch.no_grad()
    def propose(self, hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest tokens of every head, over the custom operators.

        Args:
            hidden: [M, H] in the parameters' dtype, after the trunk's final norm.
            k: 1..64.

        Returns:
            `ops.head_topk`'s logits f32 [K, M, k], ids int64 [K, M, k] and lse f32 [K, M]. A row's
            result does not depend on the other rows.
        """
        results = []
        for *blocks, lm_head in self.medusa_head:
            x = hidden
            for block in blocks:
                x = x + F.silu(ops.skinny_linear(x, block.linear.weight, bias=block.linear.bias))
            results.append(ops.head_topk(x, lm_head.weight, k))
        logits, ids, lse = (torch.stack(r) for r in zip(*results))
        return logits, ids, lse
