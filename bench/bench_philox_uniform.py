"""Uniforms of the sampling operators: nothing to read, a draft's noise to write."""

from collections.abc import Iterator

import torch

from bench.harness import Case
from mtp_ext.reference.philox_uniform import philox_uniform


def case(device: str, batch: int, n: int) -> Case:
    def make() -> tuple:
        seeds = torch.randint(0, 2**62, (batch,), device=device)
        return seeds, torch.randint(0, 2**30, (batch,), device=device)

    return Case(
        shape=f"B={batch} n={n}",
        dtype="f32",
        make=make,
        ours=lambda ops, seeds, positions: ops.philox_uniform(seeds, positions, 0, 0, n),
        read=batch * 16,
        written=batch * n * 4,
        peers={
            "eager": lambda seeds, positions: philox_uniform(seeds, positions, 0, 0, n),
            "torch.rand": lambda seeds, positions: torch.rand(batch, n, device=device),
        },
        check=lambda ours, eager: torch.testing.assert_close(ours, eager, rtol=0, atol=0),
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    for shape in [(3, 130)] if small else [(1, 151936), (16, 151936)]:
        yield case(device, *shape)
