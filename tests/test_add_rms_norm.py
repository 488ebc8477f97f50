import pytest
import torch

from mtp_ext import ops
from mtp_ext.reference.add_rms_norm import add_rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(rows, hidden, dtype, with_x=True, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    residual = torch.randn(rows, hidden, generator=g) * 5
    weight = (torch.randn(hidden, generator=g) + 1).to(dtype)
    x = torch.randn(rows, hidden, generator=g).to(dtype) if with_x else None
    return [None if t is None else t.to(device) for t in (residual, weight, x)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 15, 16, 33, 576])
@pytest.mark.parametrize("rows", [0, 1, 3, 130])
def test_matches_the_reference(backend, rows, hidden, dtype):
    for with_x, gemma in ((True, False), (False, True)):
        residual, weight, x = inputs(rows, hidden, dtype, with_x, backend.device)
        truth = residual.double() + (0 if x is None else x.double())
        sums = residual.clone()
        out = backend.ops.add_rms_norm(sums, weight, x=x, eps=1e-5, gemma_norm=gemma)
        assert out.dtype == dtype and out.shape == (rows, hidden)
        expected_sums = residual.clone()
        add_rms_norm(expected_sums, weight, x=x, eps=1e-5, gemma_norm=gemma)
        assert torch.equal(sums, expected_sums)
        scale = weight.double() + gemma
        truth = truth * torch.rsqrt(truth.square().mean(-1, keepdim=True) + 1e-5) * scale
        eager = torch.rsqrt(expected_sums.square().mean(-1, keepdim=True) + 1e-5)
        eager = (expected_sums * eager * scale.float()).to(dtype)
        if rows:
            error = (out.double() - truth).abs().max()
            assert error <= 2 * (eager.double() - truth).abs().max() + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(backend, dtype):
    residual, weight, x = inputs(130, 579, dtype, device=backend.device)
    whole, sums = residual.clone(), residual.clone()
    out = backend.ops.add_rms_norm(whole, weight, x=x)
    for row in (0, 1, 77, 129):
        one = sums[row : row + 1].clone()
        single = backend.ops.add_rms_norm(one, weight, x=x[row : row + 1].contiguous())
        assert torch.equal(single[0], out[row]) and torch.equal(one[0], whole[row])


def test_refuses_wrong_arguments_by_name(backend):
    residual, weight, x = inputs(3, 32, torch.bfloat16, device=backend.device)
    op = backend.ops.add_rms_norm
    for arguments, message in (
        ((residual.half(), weight, x), "residual must have dtype"),
        ((residual, weight[:31], x), r"weight must have shape \[H=32\], got \[31\]"),
        ((residual, weight, x.float()), "x must have dtype"),
        ((residual, weight, x[:2]), "x must have shape"),
        ((residual.t(), weight, x), "residual must be contiguous|weight must have shape"),
    ):
        with pytest.raises(RuntimeError, match=f"add_rms_norm: {message}"):
            op(arguments[0], arguments[1], x=arguments[2])


def test_opcheck_and_compile():
    residual, weight, x = inputs(3, 48, torch.bfloat16)
    torch.library.opcheck(torch.ops.mtp.add_rms_norm, (residual, weight), {"x": x, "eps": 1e-5})
    compiled = torch.compile(ops.add_rms_norm, fullgraph=True, backend="aot_eager")
    a, b = residual.clone(), residual.clone()
    assert torch.equal(compiled(a, weight, x=x), ops.add_rms_norm(b, weight, x=x))
    assert torch.equal(a, b)
