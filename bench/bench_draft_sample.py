"""A draw from the k kept logits per request: so small that a call costs its overhead."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import Case


def eager(logits: Tensor, ids: Tensor, seeds: Tensor, positions: Tensor, temperature: Tensor):
    """The exponential race with torch's own generator: it draws other numbers."""
    probs = torch.softmax(logits / temperature[:, None], dim=-1)
    place = (probs / torch.empty_like(probs).exponential_()).argmax(-1, keepdim=True)
    return ids.gather(-1, place).squeeze(-1), probs


def case(device: str, batch: int, k: int) -> Case:
    def make() -> tuple:
        logits = torch.randn(batch, k, device=device).sort(-1, descending=True).values
        ids = torch.stack([torch.randperm(50000, device=device)[:k] for _ in range(batch)])
        seeds = torch.randint(0, 2**62, (batch,), device=device)
        positions = torch.randint(0, 2**30, (batch,), device=device)
        return logits, ids, seeds, positions, torch.full((batch,), 0.7, device=device)

    return Case(
        shape=f"B={batch} k={k}",
        dtype="f32",
        make=make,
        ours=lambda ops, logits, ids, seeds, positions, temperature: ops.draft_sample(
            logits, ids, seeds, positions, 0, temperature=temperature
        ),
        read=batch * (k * (4 + 8) + 8 + 8 + 4),
        written=batch * (k * 4 + 8),
        peers={"eager": eager},
        check=lambda ours, peer: torch.testing.assert_close(ours[1], peer[1]),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    for shape in [(3, 8)] if small else [(1, 16), (16, 16), (64, 64)]:
        yield case(device, *shape)
