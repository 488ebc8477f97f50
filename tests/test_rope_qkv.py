import pytest
import torch

from mtp_ext import ops
from mtp_ext.reference.rope_qkv import rope_qkv

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(rows, heads, kv_heads, head_dim, dtype, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, generator=g).to(dtype)
    angle = torch.rand(40, head_dim // 2, generator=g) * 6.28
    table = torch.cat([angle.cos(), angle.sin()], -1)
    positions = torch.randint(0, 40, (rows,), generator=g)
    return [t.to(device) for t in (qkv, positions, table)] + [heads, kv_heads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 1, 34), (9, 3, 64), (2, 2, 96)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 90])
def test_matches_the_reference(backend, rows, shape, dtype):
    arguments = inputs(rows, *shape, dtype, backend.device)
    if rows > 2:
        arguments[1][0], arguments[1][1] = -1, 40  # outside the table: not rotated
    q, k, v = backend.ops.rope_qkv(*arguments)
    expected = rope_qkv(*arguments)
    assert torch.equal(v, expected[2])
    for out, want in ((q, expected[0]), (k, expected[1])):
        assert out.shape == want.shape and out.dtype == dtype
        # One rounding of a sum of two products.
        torch.testing.assert_close(out, want, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(backend, dtype):
    qkv, positions, *rest = inputs(90, 9, 3, 64, dtype, backend.device)
    whole = backend.ops.rope_qkv(qkv, positions, *rest)
    for row in (0, 44, 89):
        one = backend.ops.rope_qkv(qkv[row : row + 1], positions[row : row + 1], *rest)
        assert all(torch.equal(a[0], b[row]) for a, b in zip(one, whole))


def test_refuses_wrong_arguments_by_name(backend):
    qkv, positions, table, heads, kv_heads = inputs(4, 2, 1, 16, torch.float32, backend.device)
    op = backend.ops.rope_qkv
    for arguments, message in (
        ((qkv[:, :48], positions, table, heads, kv_heads), "qkv must have shape"),
        ((qkv, positions.int(), table, heads, kv_heads), "positions must have dtype"),
        ((qkv, positions[:3], table, heads, kv_heads), "positions must have shape"),
        ((qkv, positions, table.double(), heads, kv_heads), "cos_sin must have dtype"),
        ((qkv, positions, table, 0, kv_heads), "num_heads must be >= 1, got 0"),
    ):
        with pytest.raises(RuntimeError, match=f"rope_qkv: {message}"):
            op(*arguments)


def test_opcheck_and_compile():
    arguments = inputs(5, 3, 1, 16, torch.bfloat16)
    torch.library.opcheck(torch.ops.mtp.rope_qkv, tuple(arguments))
    compiled = torch.compile(ops.rope_qkv, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(*arguments), ops.rope_qkv(*arguments)):
        assert torch.equal(a, b)
