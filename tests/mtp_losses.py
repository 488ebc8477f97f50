"""Inputs and comparisons shared by the tests of linear_mtp_loss and soft_mtp_loss."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from projections import error, normal

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
GRADIENTS = ("hidden", "weight", "bias")


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def rows_that_count(
    k: int, t: int, shift: int, counts: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> torch.Tensor:
    """bool [K, T], by brute force over pairs of positions."""
    document = torch.full((t,), -1)
    bounds = [0, t] if cu_seqlens is None else cu_seqlens.tolist()
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        document[begin:end] = n
    valid = torch.zeros(k, t, dtype=torch.bool)
    for d in range(k):
        for row in range(t):
            target = row + d + shift
            if target < t and document[row] >= 0 and document[row] == document[target]:
                valid[d, row] = counts[target]
    return valid


def differentiable(case: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Copies of the case's tensors, in `dtype`, whose gradients the operator computes."""
    leaves = {n: case[n].to(dtype).detach().clone() for n in GRADIENTS if case.get(n) is not None}
    return case | {n: t.requires_grad_() for n, t in leaves.items()}


def evaluate(
    op: Callable[..., Any], case: dict[str, Any], scale: float = 1.0
) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """The results, and the gradients of scale * loss."""
    results = op(**case)
    names = [n for n in GRADIENTS if case.get(n) is not None and case[n].requires_grad]
    gradients = torch.autograd.grad(results[0] * scale, [case[n] for n in names])
    return tuple(r.detach().cpu() for r in results), {n: g.cpu() for n, g in zip(names, gradients)}


def assert_close_to_eager(
    got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, what: str = ""
) -> None:
    """err(operator) <= 2 err(eager) + tiny, both against float64."""
    assert got.dtype == eager.dtype and got.shape == exact.shape, what
    top = exact.abs().max().item() if exact.numel() else 0.0
    allowed = 2 * error(eager, exact) + 2e-6 * top
    assert error(got, exact) <= allowed, f"{what}: {error(got, exact)} > {allowed}"


def check(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    eager: Callable[..., Any],
    case: dict[str, Any],
    device: str,
    scale: float = 1.0,
) -> None:
    """Results and gradients of scale * loss, and the same results where no gradient is asked for.

    Counts are the reference's, in float64; other numbers are as close to it as eager's.
    """
    dtype, moved = case["hidden"].dtype, on(device, case)
    got, gradients = evaluate(op, differentiable(moved, dtype), scale)
    exact, exact_gradients = evaluate(reference, differentiable(case, torch.float64), scale)
    plain, plain_gradients = evaluate(eager, differentiable(case, dtype), scale)
    assert got[0].shape == ()
    for n, (ours, theirs, truth) in enumerate(zip(got, plain, exact)):
        if truth.is_floating_point():
            assert ours.dtype == torch.float32
            assert_close_to_eager(ours, theirs, truth, f"result {n}")
        else:
            assert torch.equal(ours, truth), f"result {n}"
    assert torch.equal(got[2], plain[2]), "num_tokens"
    for name, truth in exact_gradients.items():
        assert gradients[name].dtype == dtype
        assert_close_to_eager(gradients[name], plain_gradients[name], truth, name)
    with torch.no_grad():
        for ours, before in zip(op(**moved), got):
            assert torch.equal(ours.cpu(), before)


def head(k: int, t: int, h: int, v: int, dtype: torch.dtype, bias: bool = False) -> dict[str, Any]:
    return dict(
        hidden=normal(k, t, h, seed=1).to(dtype),
        weight=(normal(v, h, seed=2) * 2 * h**-0.5).to(dtype),
        bias=normal(v, seed=3).to(dtype) if bias else None,
    )


def on(device: str, case: dict[str, Any]) -> dict[str, Any]:
    return {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in case.items()}
