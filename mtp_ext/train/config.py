"""How a head is trained: the settings, kept in every checkpoint and in the head's file."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainConfig:
    """Depth d + 1 joins at `depth_starts[d]` of the steps and weighs `depth_weights[d]`.

    The weights of the depths that take part are divided by their sum. Joint training adds the
    trunk's next-token loss with weight 1 and scales the head's by `mtp_weight`, which goes linearly
    from its first value to its second (DeepSeek-V3 lowers it from 0.3 to 0.1).
    """

    epochs: float = 2.0
    depth_starts: tuple[float, ...] = (0.0, 0.6, 0.6)
    depth_weights: tuple[float, ...] = (1.0, 0.7, 0.5)
    unrolled_rows: float = 0.25  # the part of the rows whose drafts go deeper than depth 1
    labels: Literal["soft", "hard"] = "soft"  # the trunk's distribution, or the text's own token
    joint: bool = False  # the trunk is trained too; labels are hard
    mtp_weight: tuple[float, float] = (0.3, 0.1)
    bf16: bool = False  # the forward; parameters, gradients and optimisers stay f32
    batch_size: int = 8  # documents, per process
    lr: float = 1e-3  # of the head's matrices
    vector_lr: float = 0.3  # times lr, for the head's norms
    trunk_lr: float = 0.02  # times lr, for the trunk
    final_lr: float = 0.05  # times each, at the end of a linear decay
    warmup: int = 5  # steps
    weight_decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        starts, weights = self.depth_starts, self.depth_weights
        if not starts or starts[0] != 0 or list(starts) != sorted(starts) or starts[-1] >= 1:
            raise ValueError(f"depth_starts must ascend from 0 and stay below 1, are {starts}")
        if len(weights) != len(starts) or min(weights) <= 0:
            raise ValueError(f"depth_weights must be {len(starts)} positive numbers, are {weights}")
        if self.joint and self.labels != "hard":
            raise ValueError("joint training takes hard labels: the trunk's distribution changes")

    @property
    def depths(self) -> int:
        return len(self.depth_starts)

    def depths_at(self, done: float) -> int:
        """How many depths are trained when `done` of the steps, in [0, 1], are over."""
        return sum(done >= start for start in self.depth_starts)

    def weights_at(self, done: float) -> list[float]:
        """Of those depths."""
        active = self.depth_weights[: self.depths_at(done)]
        first, last = self.mtp_weight if self.joint else (1.0, 1.0)
        scale = (first + (last - first) * done) / sum(active)
        return [scale * weight for weight in active]

    def lr_at(self, step: int, total: int) -> float:
        left = 1 - step / max(total, 1)
        warm = min(1, (step + 1) / self.warmup)
        return self.lr * warm * (self.final_lr + (1 - self.final_lr) * left)
