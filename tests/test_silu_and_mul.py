import pytest
import torch
import torch.nn.functional as F

from mtp_ext import ops
from mtp_ext.reference.silu_and_mul import silu_and_mul

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(rows, width, dtype, device="cpu"):
    g = torch.Generator().manual_seed(rows * 1000 + width)
    return (torch.randn(rows, 2 * width, generator=g) * 4).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 16, 31, 1536])
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
def test_matches_the_reference(backend, rows, width, dtype):
    gate_up = inputs(rows, width, dtype, backend.device)
    out = backend.ops.silu_and_mul(gate_up)
    assert out.shape == (rows, width) and out.dtype == dtype
    truth = silu_and_mul(gate_up.double())
    gate, up = gate_up.chunk(2, -1)
    eager = F.silu(gate) * up
    if rows:
        error = (out.double() - truth).abs().max()
        assert error <= 2 * (eager.double() - truth).abs().max() + 1e-6


def test_extreme_values(backend):
    gate = torch.tensor([0.0, -1e4, 1e4, float("-inf"), float("inf"), float("nan"), -89.0, 60.0])
    gate_up = torch.cat([gate, torch.ones(8)])[None].to(backend.device)
    expected = torch.tensor([0.0, 0.0, 1e4, float("nan"), float("inf"), float("nan"), 0.0, 60.0])
    out = backend.ops.silu_and_mul(gate_up)[0].cpu()
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(backend, dtype):
    gate_up = inputs(70, 517, dtype, backend.device)
    whole = backend.ops.silu_and_mul(gate_up)
    for row in (0, 35, 69):
        assert torch.equal(backend.ops.silu_and_mul(gate_up[row : row + 1])[0], whole[row])


def test_refuses_wrong_arguments_by_name(backend):
    for gate_up, message in (
        (torch.zeros(2, 5), "gate_up's last dimension must be even, got 5"),
        (torch.zeros(2, 6, dtype=torch.int32), "gate_up must have dtype"),
        (torch.zeros(6), "gate_up must have shape"),
        (torch.zeros(6, 2).t(), "gate_up must be contiguous"),
    ):
        with pytest.raises(RuntimeError, match=f"silu_and_mul: {message}"):
            backend.ops.silu_and_mul(gate_up.to(backend.device))


def test_opcheck_and_compile():
    gate_up = inputs(3, 20, torch.float16)
    torch.library.opcheck(torch.ops.mtp.silu_and_mul, (gate_up,))
    compiled = torch.compile(ops.silu_and_mul, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gate_up), ops.silu_and_mul(gate_up))
