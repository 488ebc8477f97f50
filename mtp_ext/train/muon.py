"""Muon (Jordan et al. 2024): momentum whose matrix updates are orthogonalised.

Matrices move equally far in all directions of their singular vectors, so features of very
different sizes learn side by side; for a head of one layer that is worth about twice the data.
torch.optim.Muon orthogonalises in bf16 always, which processors without bf16 units emulate, thirty
times slower.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic iteration's coefficients, chosen by Jordan et al. for the slope at zero: singular
# values from about 0.003 up end between 0.7 and 1.2 after five steps.
A, B, C, STEPS = 3.4445, -4.7750, 2.0315, 5


def orthogonalized(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """About U V' of matrix = U S V', by Newton-Schulz iteration in dtype; [rows, columns]."""
    x = matrix.float()
    x = (x / (x.norm() + 1e-7)).to(dtype)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(STEPS):
        gram = wide @ wide.T
        poly = torch.addmm(gram, gram, gram, beta=B, alpha=C)
        wide = torch.addmm(wide, poly, wide, beta=A)
    return wide if x.shape[0] <= x.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the root mean square of an AdamW update.

    Args:
        params: matrices only.
        lr: of the size that AdamW takes (Liu et al. 2025, "Muon is scalable for LLM training").
        momentum: of the moving average of gradients.
        weight_decay: decoupled, times lr.
        dtype: of the orthogonalisation; bf16 where the processor multiplies that faster.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices, got a parameter of shape {list(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["average"] = torch.zeros_like(p)
                average = self.state[p]["average"]
                average.lerp_(p.grad, 1 - momentum)
                update = orthogonalized(p.grad.lerp(average, momentum), self.dtype)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-0.2 * lr * max(p.shape) ** 0.5)
        return loss
