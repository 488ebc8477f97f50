"""Training data: texts with the trunk's hidden states and next-token distributions, in shards.

A shard is one torch file of a few hundred documents laid end to end: everything that training a
head needs, so that the trunk runs once per token however many epochs follow.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

TOP = 16  # kept entries of the trunk's distribution at each position


@dataclass
class Shard:
    tokens: Tensor  # int32 [T]
    answer: Tensor  # bool [T]: the trunk's own words, on which heads are trained and measured
    hidden: Tensor  # bf16 [T, H]: the trunk's hidden state, as the head's `h_source` says
    top_ids: Tensor  # int32 [T, TOP]: likeliest next tokens, descending
    top_logits: Tensor  # f16 [T, TOP], minus the log-sum-exp over the vocabulary
    lens: Tensor  # int64 [documents]
    greedy: Tensor  # bool [documents]: argmax text, else sampled
    looped: Tensor  # bool [documents]: ended by repeating itself

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save({f.name: getattr(self, f.name) for f in fields(self)}, partial)
        partial.rename(path)

    @staticmethod
    def load(path: Path) -> "Shard":
        return Shard(**torch.load(path, weights_only=True))

    @staticmethod
    def join(shards: list["Shard"]) -> "Shard":
        return Shard(
            **{f.name: torch.cat([getattr(s, f.name) for s in shards]) for f in fields(Shard)}
        )

    def num_answer_tokens(self) -> int:
        return int(self.answer.sum())


def load_shards(folder: Path) -> Shard:
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        raise FileNotFoundError(f"no *.pt shards in {folder}")
    return Shard.join([Shard.load(path) for path in paths])


@dataclass
class Batch:
    """Documents padded at their ends to one length S."""

    tokens: Tensor  # int64 [B, S]
    answer: Tensor  # bool [B, S], False in padding
    hidden: Tensor  # f32 [B, S, H]
    top_ids: Tensor  # int64 [B, S, TOP]
    top_logits: Tensor  # f32 [B, S, TOP]


class Documents:
    """Random access to the documents of a shard, and batches of them."""

    def __init__(self, shard: Shard):
        self.shard = shard
        ends = shard.lens.cumsum(0)
        self.starts = (ends - shard.lens).tolist()
        self.ends = ends.tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: list[int]) -> Batch:
        spans = [slice(self.starts[i], self.ends[i]) for i in indices]

        def padded(x: Tensor, dtype: torch.dtype) -> Tensor:
            rows = [x[s].to(dtype) for s in spans]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

        s = self.shard
        return Batch(
            tokens=padded(s.tokens, torch.int64),
            answer=padded(s.answer, torch.bool),
            hidden=padded(s.hidden, torch.float32),
            top_ids=padded(s.top_ids, torch.int64),
            top_logits=padded(s.top_logits, torch.float32),
        )

    def epoch(self, batch_size: int, seed: int, epoch: int) -> Iterator[list[int]]:
        """Every document once, shuffled; documents of a batch have similar lengths."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        noise = torch.rand(len(self), generator=generator)
        order = (self.shard.lens + 32 * noise).argsort().tolist()
        batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
        for i in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[i]


def draft_vocabulary(shard: Shard, vocab_size: int, rows: int) -> Tensor:
    """The `rows` ids with the most probability mass in the shard, ascending: a token_map."""
    mass = torch.zeros(vocab_size, dtype=torch.float64)
    probs = shard.top_logits.double().exp() * shard.answer[:, None]
    mass.index_add_(0, shard.top_ids.flatten().long(), probs.flatten())
    return mass.topk(min(rows, vocab_size)).indices.sort().values.to(torch.int32)
