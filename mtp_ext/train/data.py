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

    def select(self, keep: Tensor) -> "Shard":
        """The documents where keep, bool [documents], is set."""
        rows = keep.repeat_interleave(self.lens)
        per_document = ("lens", "greedy", "looped")
        return Shard(
            **{
                f.name: getattr(self, f.name)[keep if f.name in per_document else rows]
                for f in fields(Shard)
            }
        )

    def first(self, count: int | None) -> "Shard":
        """The first `count` documents; None: all."""
        return self.select(torch.arange(len(self.lens)) < (count or len(self.lens)))

    def num_answer_tokens(self) -> int:
        return int(self.answer.sum())


def load_shards(folder: Path) -> Shard:
    paths = sorted(folder.glob("*.pt"))
    if not paths:
        raise FileNotFoundError(f"no *.pt shards in {folder}")
    return Shard.join([Shard.load(path) for path in paths])


@dataclass
class Batch:
    """B documents laid end to end, T rows in all, and their places in a rectangle [B, S].

    Projections and losses work on the T rows; only attention needs the rectangle, in which `pad`
    puts zeros behind each document.
    """

    tokens: Tensor  # int64 [T]
    answer: Tensor  # bool [T]
    hidden: Tensor  # f32 [T, H]
    top_ids: Tensor  # int64 [T, TOP]
    top_logits: Tensor  # f32 [T, TOP]
    cu_seqlens: Tensor  # int32 [B + 1]
    positions: Tensor  # int64 [T], counted from the beginning of each document
    slots: Tensor  # int64 [T]: places in the flattened rectangle
    shape: tuple[int, int]  # B, S

    def pad(self, x: Tensor) -> Tensor:
        """[T, ...] -> [B, S, ...]."""
        b, s = self.shape
        empty = x.new_zeros((b * s, *x.shape[1:]))
        return empty.index_copy(0, self.slots, x).unflatten(0, (b, s))

    def unpad(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [T, ...]."""
        return x.flatten(0, 1)[self.slots]

    def targets(self, slots: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """For rows at these slots of the rectangle: where the trunk decides what they predict.

        Returns (teacher, valid): teacher int64, the packed row `depth` further on; valid, bool:
        whether the token after it is an answer's, in the same document.
        """
        s = self.shape[1]
        inside = slots % s + depth + 1 < s
        predicted = torch.where(inside, slots + depth + 1, 0)
        valid = inside & self.pad(self.answer).flatten()[predicted]
        packed = self.pad(torch.arange(len(self.tokens), device=slots.device)).flatten()
        return torch.where(valid, packed[predicted] - 1, 0), valid

    def to(self, device: torch.device | str) -> "Batch":
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})


class Documents:
    """Random access to the documents of a shard, and batches of them."""

    def __init__(self, shard: Shard):
        self.shard = shard
        ends = shard.lens.cumsum(0)
        self.starts = (ends - shard.lens).tolist()
        self.ends = ends.tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: list[int], length: int = 0) -> Batch:
        """The rectangle is as long as its longest document, but at least `length`."""
        spans = [slice(self.starts[i], self.ends[i]) for i in indices]
        lens = self.shard.lens[indices]
        ends = lens.cumsum(0)
        document = torch.arange(len(indices)).repeat_interleave(lens)
        positions = torch.arange(int(ends[-1])) - (ends - lens)[document]
        shape = (len(indices), max(length, int(lens.max())))

        def packed(x: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.cat([x[span] for span in spans]).to(dtype)

        s = self.shard
        return Batch(
            tokens=packed(s.tokens, torch.int64),
            answer=packed(s.answer, torch.bool),
            hidden=packed(s.hidden, torch.float32),
            top_ids=packed(s.top_ids, torch.int64),
            top_logits=packed(s.top_logits, torch.float32),
            cu_seqlens=torch.nn.functional.pad(ends, (1, 0)).to(torch.int32),
            positions=positions,
            slots=document * shape[1] + positions,
            shape=shape,
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
