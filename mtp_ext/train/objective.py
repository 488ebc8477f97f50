"""The training loss of a batch: every depth of the head, and the next token of a joint trunk.

Soft labels (distillation): the loss of a row is the divergence from the trunk's own next-token
distribution, its likeliest few entries, over the draft vocabulary; `soft_mtp_loss`. It estimates
how many drafts rejection sampling would accept as well. Hard labels: the cross entropy to the
text's token; `linear_mtp_loss`. Drafts deeper than depth 1 are unrolled as decoding makes them, on
the head's own hidden states (`MTPBlock.deeper`).

Losses go backward into their hidden states one after the other, so one loss's logits and weight
gradient are alive at a time; then one backward runs through the head and the trunk (Gloeckle et
al. 2024, "Better & faster large language models via multi-token prediction", section 2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext import ops
from mtp_ext.nn import MTPBlock
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.data import Batch
from mtp_ext.train.distributed import active, world_size
from mtp_ext.train.trunk import FrozenTrunk, JointTrunk


@dataclass
class Drafts:
    """One depth's rows: row n starts at slots[n] of the batch's rectangle."""

    normed: Tensor  # [N, H], what the LM head multiplies
    slots: Tensor  # int64 [N]
    teacher: Tensor  # int64 [N]: the packed row at which the trunk decides the same token
    valid: Tensor  # bool [N]: whether that token is an answer's


@dataclass
class Report:
    """What a step measured, per depth; detached."""

    loss: Tensor  # f32 [depths]
    accepted: Tensor  # f32 [depths]: estimated acceptance (soft), or argmax accuracy (hard)
    next_token: Tensor | None  # f32 []: a joint trunk's own loss


class Objective(nn.Module):
    """Head and trunk in one module, so that DistributedDataParallel sees one forward per step.

    token_map int [Vd]: the ids that are drafted; the others count as probability 0 (soft) or are
    left out (hard).
    """

    def __init__(
        self,
        block: MTPBlock,
        trunk: FrozenTrunk | JointTrunk,
        token_map: Tensor,
        config: TrainConfig | None = None,
    ):
        super().__init__()
        self.block, self.trunk = block, trunk
        self.config = config = config or TrainConfig(
            joint=trunk.joint, labels="hard" if trunk.joint else "soft"
        )
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        if config.bf16:  # the residual stream stays f32, as in decoding
            block.eh_proj.register_forward_hook(lambda module, inputs, output: output.float())
        inverse = torch.full((len(trunk.lm_head),), -1)
        inverse[token_map.long()] = torch.arange(len(token_map))
        self.register_buffer("token_map", token_map.long(), persistent=False)
        self.register_buffer("inverse", inverse, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.token_map.device

    def forward(self, batch: Batch, rows: Tensor, weights: Tensor) -> tuple[Tensor, Report]:
        """The loss, differentiable once, and what it is made of.

        rows int64 [R]: where drafts deeper than depth 1 start, in every document.
        weights: f32 [depths], on the device.
        """
        with torch.autocast(batch.tokens.device.type, self.dtype, enabled=self.config.bf16):
            hidden = self.trunk.hidden(batch)
            drafts = self.unroll(batch, hidden, len(weights), rows)
        valid = [self.counted(batch, d) for d in drafts]
        if self.trunk.joint:
            valid.append(batch.answer & (batch.positions > 0))
        share = shares(torch.stack([v.sum() for v in valid]))

        losses, results, trunk_loss = DetachedLosses(), [], None
        head = HeadWeight(self.head_weight(), self.dtype)
        for d, v, weight in zip(drafts, valid, (weights * share[: len(weights)]).split(1)):
            loss = self.depth_loss(batch, d, v)
            results.append(losses.add(loss, d.normed.to(self.dtype), head, weight))
        if self.trunk.joint:
            normed = self.trunk_normed(hidden).to(self.dtype)
            full = HeadWeight(self.trunk.lm_head, self.dtype)
            [trunk_loss], *_ = losses.add(self.next_token_loss(batch), normed, full, share[-1:])
        loss, counts, extras = (torch.cat(values) for values in zip(*results))
        accepted = extras if self.config.labels == "soft" else extras / counts.clamp(min=1)
        return losses.total(), Report(loss, accepted, trunk_loss)

    def unroll(
        self, batch: Batch, hidden: Tensor, depths: int, rows: Tensor | None = None
    ) -> list[Drafts]:
        """One `Drafts` per depth: row i of depth d predicts token i + d + 1 of its document.

        Depth 1 has the packed rows, deeper ones the same `rows` of every document (None: all that
        can be valid).
        """
        b, s = batch.shape
        if rows is None:
            rows = torch.arange(max(s - 3, 1), device=batch.tokens.device)
        y, trunk_kv = self.depth1(batch, hidden)
        drafts = [self._drafts(batch, y, batch.slots, 1)]
        if depths == 1:
            return drafts
        starts = (torch.arange(b, device=rows.device)[:, None] * s + rows).flatten()
        embedded = batch.pad(self.trunk.embedding[batch.tokens])
        y, drafted = batch.pad(y)[:, rows], []
        for depth in range(2, depths + 1):
            token = (rows + depth).clamp(max=s - 1)  # past the end only in rows that are not valid
            state = self.block.recur(y, self.trunk.norm)
            y, kv = self.block.deeper(embedded[:, token], state, rows, trunk_kv, drafted)
            drafted.append(kv)
            drafts.append(self._drafts(batch, y.flatten(0, 1), starts, depth))
        return drafts

    def depth1(self, batch: Batch, hidden: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`MTPBlock.depth1` of packed documents: y [T, H], keys and values [B, S, Hkv, D].

        The last row of a document takes a token that is not its own. Nothing reads that row.
        """
        block = self.block
        if self.trunk.joint and block.spec.h_source == "post_norm":
            hidden = self.trunk_normed(hidden)
        embedded = self.trunk.embedding[batch.tokens.roll(-1)]
        x = block.project(embedded, hidden, batch.positions)
        q, k, v, gate = block.heads(x, batch.positions)
        q, k, v = (batch.pad(t.to(v.dtype)) for t in (q, k, v))
        attended = F.scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),
            is_causal=True,
            scale=block.self_attn.scale,
            enable_gqa=True,
        )
        return block.finish(x, batch.unpad(attended.transpose(1, 2)), gate), (k, v)

    def _drafts(self, batch: Batch, y: Tensor, slots: Tensor, depth: int) -> Drafts:
        return Drafts(self.block.normed(y, self.trunk.norm), slots, *batch.targets(slots, depth))

    def trunk_normed(self, hidden: Tensor) -> Tensor:
        """The trunk's final norm."""
        return F.rms_norm(hidden, hidden.shape[-1:], self.trunk.norm, self.block.spec.eps)

    def head_weight(self) -> Tensor:
        """The rows of the LM head that are drafted from, [Vd, H]."""
        return self.trunk.lm_head[self.token_map]

    def counted(self, batch: Batch, drafts: Drafts) -> Tensor:
        """bool [N]: the rows in the mean of their depth's loss."""
        if self.config.labels == "soft":
            return drafts.valid
        return drafts.valid & (self.inverse[batch.tokens[drafts.teacher + 1]] >= 0)

    def depth_loss(self, batch: Batch, drafts: Drafts, valid: Tensor) -> Callable[..., Any]:
        """The operator with its targets laid beside the rows."""
        if self.config.labels == "soft":
            return partial(
                ops.soft_mtp_loss,
                teacher_ids=self.inverse[batch.top_ids[drafts.teacher]],
                teacher_logprobs=batch.top_logits[drafts.teacher],
                loss_mask=valid,
                first_shift=1,  # row n is compared with row n
            )
        labels = self.inverse[batch.tokens[drafts.teacher + 1]].where(valid, -100)
        # Row n is compared with label n + 1, so both get one more.
        labels = F.pad(labels, (1, 0), value=-100)
        return lambda hidden, weight, **options: ops.linear_mtp_loss(
            F.pad(hidden, (0, 0, 0, 1)), weight, labels, first_shift=1, **options
        )

    def next_token_loss(self, batch: Batch) -> Callable[..., Any]:
        """A joint trunk's own."""
        return partial(
            ops.linear_mtp_loss,
            labels=batch.tokens,
            cu_seqlens=batch.cu_seqlens,
            loss_mask=batch.answer,
            first_shift=1,
        )

    @torch.no_grad()
    def hits(self, batch: Batch, depths: int) -> tuple[Tensor, Tensor]:
        """Whether each depth's draft is the text's token, [depths, B, S], and which rows count.

        On the trunk's greedy text a hit is exactly an accepted draft, given that the shallower
        were.
        """
        b, s = batch.shape
        hits = torch.zeros((depths, b * s), dtype=torch.bool, device=batch.tokens.device)
        weight = self.head_weight()
        for n, drafts in enumerate(self.unroll(batch, self.trunk.hidden(batch), depths)):
            rows = drafts.valid.nonzero()[:, 0]
            _, ids, _ = ops.head_topk(drafts.normed[rows], weight, 1, token_map=self.token_map)
            hits[n, drafts.slots[rows]] = ids[:, 0] == batch.tokens[drafts.teacher[rows] + 1]
        slots = torch.arange(b * s, device=hits.device)
        _, valid = batch.targets(slots, 1)
        return hits.unflatten(1, (b, s)), valid.view(b, s)


def shares(counts: Tensor) -> Tensor:
    """What each loss of this process is multiplied with, f32, like counts.

    DistributedDataParallel averages over processes with equal weights; with these factors the
    average is that over all rows of all processes.
    """
    if not active():
        return torch.ones_like(counts, dtype=torch.float32)
    total = counts.clone()
    dist.all_reduce(total)
    return counts * world_size() / total.clamp(min=1).float()


class HeadWeight:
    """An LM head for several losses: in the compute dtype, with one f32 buffer for its gradient."""

    def __init__(self, master: Tensor, dtype: torch.dtype):
        self.master = master
        trained = master.requires_grad and torch.is_grad_enabled()
        self.weight = master.detach().to(dtype).requires_grad_(trained)
        self.grad = torch.zeros_like(master, dtype=torch.float32) if trained else None


class DetachedLosses:
    """A sum of losses, each differentiated as soon as it is computed."""

    def __init__(self) -> None:
        self.value: Tensor | float = 0.0
        self.gradients: list[tuple[Tensor, Tensor]] = []  # (tensor, its gradient)
        self.heads: list[HeadWeight] = []

    def add(
        self, loss: Callable[..., Any], hidden: Tensor, head: HeadWeight, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """loss is an operator of one depth; returns what else it computes, [1] each."""
        leaf = hidden.detach().requires_grad_(hidden.requires_grad)
        value, *others = loss(
            leaf[None], head.weight, depth_weights=weight, weight_grad_accum=head.grad
        )
        self.value = self.value + value.detach()
        if value.requires_grad:
            value.backward()
            self.gradients.append((hidden, leaf.grad))
            if head.grad is not None and head not in self.heads:
                self.heads.append(head)
        return tuple(others)

    def total(self) -> Tensor:
        """The sum; its backward hands on the gradients that are already there."""
        pairs = self.gradients + [(head.master, head.grad) for head in self.heads]
        if not pairs:
            return self.value
        inputs, gradients = zip(*pairs)
        return _Precomputed.apply(self.value, gradients, *inputs)


class _Precomputed(torch.autograd.Function):
    """A number whose gradients are known."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: tuple[Tensor, ...], *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        return None, None, *(grad * g for g in ctx.gradients)
