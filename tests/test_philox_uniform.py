import numpy as np
import pytest
import torch

import mtp_ext.ops as ops
from mtp_ext.reference.philox_uniform import philox_uniform, philox_words

# Known answers of Philox4x32-10 (Random123's kat_vectors): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def make_inputs(batch: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    positions = torch.randint(0, 2**40, (batch,), generator=generator)
    return seeds.to(device), positions.to(device)


@pytest.mark.parametrize("counter,key,expected", KNOWN)
def test_reference_has_the_published_answers(counter, key, expected):
    def signed(lo, hi):
        return torch.tensor([lo | hi << 32], dtype=torch.uint64).view(torch.int64)

    words = philox_words(
        signed(*key),
        signed(counter[2], counter[3]),
        counter[1] & 0xFFFF,
        counter[1] >> 16,
        torch.arange(4) + 4 * counter[0],
    )
    assert words.tolist() == [list(expected)]


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("n", [0, 1, 4, 7, 130, 4099])
@pytest.mark.parametrize("row,stream", [(0, 0), (3, 1), (65535, 65535)])
def test_matches_reference(backend, batch, n, row, stream):
    seeds, positions = make_inputs(batch, backend.device)
    got = backend.ops.philox_uniform(seeds, positions, row, stream, n)
    expected = philox_uniform(seeds, positions, row, stream, n)
    assert got.dtype == torch.float32 and got.shape == (batch, n)
    assert torch.equal(got, expected)


def test_is_uniform(backend):
    seeds, positions = make_inputs(8, backend.device)
    u = backend.ops.philox_uniform(seeds, positions, 1, 2, 8192).cpu().numpy().ravel()
    assert u.min() > 0 and u.max() < 1
    counts = np.histogram(u, bins=64, range=(0, 1))[0]
    chi2 = ((counts - u.size / 64) ** 2 / (u.size / 64)).sum()
    assert chi2 < 121.1  # 63 degrees of freedom, false alarm 1e-5


def test_batch_position_does_not_matter(backend):
    seeds, positions = make_inputs(5, backend.device)
    whole = backend.ops.philox_uniform(seeds, positions, 2, 0, 33)
    alone = backend.ops.philox_uniform(seeds[3:4].clone(), positions[3:4].clone(), 2, 0, 33)
    assert torch.equal(whole[3:4], alone)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(seeds=torch.zeros(2, dtype=torch.int32)), "seeds must have dtype Long, got Int"),
        (dict(positions=torch.zeros(3, dtype=torch.int64)), r"positions must have shape \[B=2\]"),
        (dict(row=-1), "row must be in"),
        (dict(row=65536), "row must be in"),
        (dict(stream=65536), "stream must be in"),
        (dict(n=-1), "n must be in"),
        (dict(seeds=torch.zeros(4, dtype=torch.int64)[::2]), "seeds must be contiguous"),
    ],
)
def test_bad_metadata_is_named(change, message):
    arguments = dict(
        seeds=torch.zeros(2, dtype=torch.int64),
        positions=torch.zeros(2, dtype=torch.int64),
        row=0,
        stream=0,
        n=4,
    )
    with pytest.raises(RuntimeError, match=message):
        ops.philox_uniform(**(arguments | change))


def test_opcheck_and_compile():
    seeds, positions = make_inputs(3, "cpu")
    torch.library.opcheck(torch.ops.mtp.philox_uniform, (seeds, positions, 1, 2, 10))
    compiled = torch.compile(ops.philox_uniform, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        compiled(seeds, positions, 1, 2, 10), ops.philox_uniform(seeds, positions, 1, 2, 10)
    )
