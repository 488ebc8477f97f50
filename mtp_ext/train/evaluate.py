"""Acceptance of a head's drafts on texts that its trunk wrote greedily."""

from dataclasses import dataclass

import torch

from mtp_ext.train.data import Documents
from mtp_ext.train.objective import Objective


@dataclass
class Acceptance:
    """Counts per depth d = 1..depths, and per draft length k = 1..depths."""

    reached: list[int]  # rows whose drafts before d were accepted
    accepted: list[int]  # of those, draft d too
    tokens: list[int]  # emitted when decoding with k drafts
    steps: list[int]  # verification steps that took
    rows: int

    @property
    def conditional(self) -> list[float]:
        """Acceptance of draft d, given that the ones before it were accepted."""
        return [a / max(r, 1) for a, r in zip(self.accepted, self.reached)]

    @property
    def tokens_per_step(self) -> list[float]:
        return [t / max(s, 1) for t, s in zip(self.tokens, self.steps)]

    def __add__(self, other: "Acceptance") -> "Acceptance":
        def summed(name: str) -> list[int]:
            return [a + b for a, b in zip(getattr(self, name), getattr(other, name))]

        names = ("reached", "accepted", "tokens", "steps")
        return Acceptance(*map(summed, names), self.rows + other.rows)

    def __str__(self) -> str:
        accepted = " ".join(f"{a:.3f}" for a in self.conditional)
        tokens = " ".join(f"{t:.2f}" for t in self.tokens_per_step)
        return f"acceptance {accepted}, tokens/step {tokens} (k=1..{len(self.conditional)})"


def evaluate(objective: Objective, documents: Documents, depths: int = 3) -> Acceptance:
    """Acceptance on greedy documents, exactly as a greedy decoding loop would meet it."""
    total = Acceptance([0] * depths, [0] * depths, [0] * depths, [0] * depths, 0)
    for start in range(0, len(documents), 8):
        indices = list(range(start, min(start + 8, len(documents))))
        hits, valid = objective.hits(documents.batch(indices).to(objective.device), depths)
        run = torch.cat([torch.ones_like(hits[:1]), hits]).long().cumprod(0)
        total.rows += int(valid.sum())
        for d in range(depths):
            total.reached[d] += int((run[d].bool() & valid).sum())
            total.accepted[d] += int((run[d + 1].bool() & valid).sum())
            emitted = run[: d + 2].sum(0)  # accepted drafts + 1
            for row, ok in zip(emitted.tolist(), valid.tolist()):
                i = ok.index(True) if True in ok else len(ok)
                while i < len(ok) and ok[i]:
                    total.steps[d] += 1
                    total.tokens[d] += row[i]
                    i += row[i]
    return total
