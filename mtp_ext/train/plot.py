"""The course of a training in one picture: loss and acceptance of every depth over the steps."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.train.trainer import Trainer


def plot(trainer: Trainer, path: Path) -> str:
    """Writes the picture and says so, or says what it needs."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no plot at {path}: that needs matplotlib\n    pip install matplotlib"

    soft = trainer.config.labels == "soft"
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, accepted = figure.subplots(1, 2)
    loss.set(xlabel="step", ylabel="KL to the trunk's top tokens" if soft else "cross entropy")
    accepted.set(xlabel="step", ylabel="acceptance" if soft else "accuracy", ylim=(0, 1))
    for depth in range(trainer.config.depths):
        for axes, values in zip((loss, accepted), trainer.history[:, :, depth].T):
            steps = (~values.isnan()).nonzero()[:, 0]
            curve = smoothed(values[steps])
            axes.plot(steps.tolist(), curve.tolist(), color=f"C{depth}", label=f"depth {depth + 1}")
        points = [(step, held_out[depth]) for step, held_out in trainer.held_out]
        if points:
            accepted.plot(*zip(*points), "o--", color=f"C{depth}", ms=3, lw=0.5)
    loss.legend()
    accepted.set_title("lines: in training; dots: held out, given the depths before", fontsize=8)
    figure.savefig(path, dpi=150)
    return f"wrote {path}"


def smoothed(values: Tensor, steps: int = 20) -> Tensor:
    """The mean of the `steps` values up to each."""
    total = F.pad(values.cumsum(0, dtype=torch.float64), (1, 0))
    end = torch.arange(1, len(total))
    begin = (end - steps).clamp(min=0)
    return (total[end] - total[begin]) / (end - begin)
