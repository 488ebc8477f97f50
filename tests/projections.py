"""Inputs and tolerances shared by the tests of skinny_linear, head_topk and eh_proj."""

import contextlib

import torch

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
WEIGHTS = [*FLOATS, torch.int8, torch.float8_e4m3fn]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1009 + sum(shape))
    return torch.randn(shape, generator=generator) * scale


def make_weight(
    n: int, k: int, dtype: torch.dtype, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight with products of unit size, and its scale if the dtype needs one."""
    w = normal(n, k, seed=seed)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return (w * k**-0.5).to(dtype), None
    scale = (w.abs().amax(1) / (127 if dtype == torch.int8 else 448)).clamp(min=1e-6)
    scaled = w / scale[:, None]
    q = scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype)
    return q, scale * k**-0.5


def eager_weight(w: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight that eager code in x's dtype would multiply with."""
    return (w.float() if scale is None else w.float() * scale[:, None]).to(dtype)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return (got.double() - exact).abs().max().item() if got.numel() else 0.0


def assert_as_good_as(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    """err(kernel) <= 2 err(eager) + tiny, both against float64."""
    top = exact.abs().max().item() if exact.numel() else 0.0
    allowed = 2 * error(eager, exact) + 1e-6 * max(1.0, top)
    assert error(got, exact) <= allowed, f"error {error(got, exact)} > {allowed}"


# Rows and dtypes whose traffic is counted on the simulator; 256 weight rows of 256.
COUNTED = [
    (1, torch.bfloat16, torch.bfloat16),
    (9, torch.bfloat16, torch.int8),
    (40, torch.float16, torch.float16),
    (3, torch.float32, torch.float8_e4m3fn),
    (64, torch.float32, torch.int8),
    (3, torch.float32, torch.float32),
]


def total_bytes(launches: list) -> int:
    """Everything that all launches loaded, stored and updated, repeats included."""
    return sum(
        b.loaded_bytes + b.stored_bytes + b.atomic_bytes
        for launch in launches
        for b in launch.buffers.values()
    )


# Rows per call for which the traffic of a large layer is counted.
STREAMED_ROWS = [1, 4, 16, 64]


def assert_near_floor(
    launches: list, weight: torch.Tensor, *others: torch.Tensor, workspace: bool = True
) -> None:
    """Weight bytes are loaded once, and everything together is within 3% of the floor: each byte
    of the tensors once. What CTAs read again counts once, as it comes from L2; what they leave for
    each other in the workspace counts as a store and a load, unless told otherwise."""
    buffers = [item for launch in launches for item in launch.buffers.items()]
    assert sum(b.loaded_bytes for name, b in buffers if name == "weight") == weight.nbytes
    moved = sum(
        b.unique_loaded_bytes + b.stored_bytes + b.atomic_bytes
        for name, b in buffers
        if workspace or name != "workspace"
    )
    assert moved <= 1.03 * sum(t.nbytes for t in (weight, *others))


def assert_streams_once(launches: list, weight: torch.Tensor) -> None:
    """The first launch loads every weight byte once, in whole sectors, and no other loads any;
    shared memory has no bank conflicts."""
    stream, *others = launches
    assert stream.loaded_bytes("weight") == stream.unique_bytes("weight") == weight.nbytes
    assert stream.sector_efficiency("weight") == 1.0
    assert not any(launch.loaded_bytes("weight") for launch in others)
    assert sum(launch.bank_conflicts for launch in launches) == 0


@contextlib.contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def padded(t: torch.Tensor, extra: int = 8, fill: float = float("nan")) -> torch.Tensor:
    """The same rows with `extra` elements of `fill` behind each, and a row of them at the end."""
    wide = torch.full((t.shape[0] + 1, t.shape[1] + extra), fill).to(t.dtype)
    wide[:-1, : t.shape[1]] = t
    return wide[:-1, : t.shape[1]]
