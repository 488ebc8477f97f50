"""Chained multi-token prediction for training: all depths of a batch in one call.

DeepSeek-AI 2024, "DeepSeek-V3 technical report", section 2.2: a depth takes the state of the one
before it at the same row, and the embedding of one token further on; embedding and output
projection are shared by all depths, and with the trunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn.mtp_block import MTPBlock
from mtp_ext.nn.specs import MTPSpec


class MTPPredictionHead(nn.Module):
    """`depth` MTP blocks in a chain over whole sequences, with the logits of every depth.

    With t = target_ids, the raw tokens of the sequence, unshifted, and d = 0..depth-1:

        h^d[i] = block_d(E[t[i + d + 1]], h^{d-1}[i])       h^{-1}[i] = hidden_states[i]
        logits[:, d, i] = lm_head(norm(h^d[i]))             predicts t[i + d + 2]

    so the target of (d, i) is `labels[i + d + first_shift]` of `linear_mtp_loss` at its default
    first_shift = 2. Row i of depth d attends to rows 0..i of depth d, at rotary position
    positions[i] + d. A row is valid if the tokens it takes exist: i + d + 1 < S, in the same
    document. Invalid rows hold zeros, take no part in any valid row, and get no gradient. The last
    valid row of a depth has no target yet; it is the one that drafts.

    This is how DeepSeek trains. Where a single block recurs in decoding, its drafts see the rows
    that the trunk fed instead of their own depth's; `MTPBlock.deeper` trains exactly that.

    Args:
        spec: of every block.
        vocab_size: V.
        depth: number of depths, K >= 1.
        embedding, lm_head: the trunk's [V, H], held as they are and not copied: the gradients of
            parameters reach the trunk. None makes a parameter here; a tensor is held as a buffer
            that is not saved.
        share_block: one block for all depths (as FastMTP and MiMo repeat theirs).

    Raises ValueError for a shape that does not fit, by the argument's name.
    """

    def __init__(
        self,
        spec: MTPSpec,
        vocab_size: int,
        depth: int,
        *,
        embedding: Tensor | None = None,
        lm_head: Tensor | None = None,
        share_block: bool = False,
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, is {depth}")
        self.spec, self.depth = spec, depth
        self.blocks = nn.ModuleList(MTPBlock(spec) for _ in range(1 if share_block else depth))
        shape = (vocab_size, spec.hidden_size)
        for name, weight in (("embedding", embedding), ("lm_head", lm_head)):
            if weight is None:
                weight = nn.Parameter(torch.randn(shape) * spec.hidden_size**-0.5)
            elif weight.shape != shape:
                raise ValueError(f"{name} must be {list(shape)}, is {list(weight.shape)}")
            if isinstance(weight, nn.Parameter):
                self.register_parameter(name, weight)
            else:
                self.register_buffer(name, weight, persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        target_ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        trunk_norm: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, K, S, V] in the blocks' dtype; a loss over a large vocabulary wants `states`.

        Args:
            hidden_states: [B, S, H], the trunk's, as `spec.h_source` says.
            target_ids: int64 [B, S]: token i of the sequence at i. An id outside [0, V) has a zero
                embedding.
            positions: int64 [B, S]; None counts from 0 in every document.
            documents: int [B, S], contiguous runs of equal numbers: documents packed into one
                sequence. Rows attend, and take tokens, only within their own.
            trunk_norm: [H], for `final_norm` "trunk".
        """
        states = self.states(
            hidden_states,
            target_ids,
            positions=positions,
            documents=documents,
            trunk_norm=trunk_norm,
        )
        return states @ self.lm_head.T

    def states(
        self,
        hidden_states: Tensor,
        target_ids: Tensor,
        *,
        positions: Tensor | None = None,
        documents: Tensor | None = None,
        trunk_norm: Tensor | None = None,
    ) -> Tensor:
        """What `forward` multiplies with lm_head, [B, K, S, H]; arguments as there.

        `states.transpose(0, 1).flatten(1, 2)` is the hidden [K, T, H] of `linear_mtp_loss`, with a
        document boundary in its cu_seqlens at each multiple of S besides those of `documents`.
        """
        b, s, h = (*hidden_states.shape, 0, 0)[:3]
        if hidden_states.ndim != 3 or h != self.spec.hidden_size:
            raise ValueError(
                f"hidden_states must be [B, S, {self.spec.hidden_size}], "
                f"is {list(hidden_states.shape)}"
            )
        for name, tensor in (
            ("target_ids", target_ids),
            ("positions", positions),
            ("documents", documents),
        ):
            if tensor is not None and tensor.shape != (b, s):
                raise ValueError(f"{name} must be {[b, s]}, is {list(tensor.shape)}")
        if positions is None:
            positions = _positions(target_ids, documents)
        valid = self.valid_rows(target_ids, documents)
        known = (target_ids >= 0) & (target_ids < len(self.embedding))
        e = F.embedding(target_ids.where(known, 0), self.embedding)
        e = e.masked_fill(~known[..., None], 0)

        state, results = hidden_states, []
        for d in range(self.depth):
            rows = max(s - 1 - d, 0)
            if rows == 0:
                results.append(torch.zeros_like(hidden_states))
                continue
            block = self.blocks[d % len(self.blocks)]
            y, _ = block.depth1(
                e[:, d + 1 :],
                state[:, :rows],
                positions[:, :rows] + d,
                None if documents is None else documents[:, :rows],
            )
            normed = block.normed(y, trunk_norm).masked_fill(~valid[:, d, :rows, None], 0)
            results.append(F.pad(normed, (0, 0, 0, s - rows)))
            state = block.recur(y, trunk_norm)
        return torch.stack(results, 1)

    def valid_rows(self, target_ids: Tensor, documents: Tensor | None = None) -> Tensor:
        """bool [B, K, S]: which rows are computed; target_ids and documents as in `forward`."""
        s = target_ids.shape[1]
        valid = torch.zeros(
            (len(target_ids), self.depth, s), dtype=torch.bool, device=target_ids.device
        )
        for d in range(min(self.depth, s)):
            same = True if documents is None else documents[:, d + 1 :] == documents[:, : s - 1 - d]
            valid[:, d, : s - 1 - d] = same
        return valid


def _positions(target_ids: Tensor, documents: Tensor | None) -> Tensor:
    """Rows counted from the beginning of their document."""
    row = torch.arange(target_ids.shape[1], device=target_ids.device).expand(target_ids.shape)
    if documents is None:
        return row
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return row - row.where(begins, 0).cummax(1).values
