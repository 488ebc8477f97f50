import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projections import (
    COUNTED,
    FLOATS,
    STREAMED_ROWS,
    WEIGHTS,
    assert_as_good_as,
    assert_near_floor,
    assert_streams_once,
    eager_weight,
    error,
    make_weight,
    normal,
    padded,
    threads,
    total_bytes,
)

from mtp_ext import ops
from mtp_ext.reference.skinny_linear import skinny_linear

# On the simulator every size counts; K is a multiple of 8 there.
SHAPES = {
    "cpu": [
        (1, 1, 1),
        (1, 48, 16),
        (3, 5, 7),
        (4, 97, 33),
        (5, 50, 64),
        (9, 150, 130),
        (70, 61, 40),
        (2, 1700, 72),
    ],
    "ptxsim": [(1, 64, 64), (3, 50, 1160), (9, 130, 72), (20, 17, 8), (64, 30, 40), (65, 40, 48)],
}
SHAPES["cuda"] = SHAPES["ptxsim"] + [(64, 1000, 2048), (8, 4096, 4096)]


def shapes(backend):
    return SHAPES[backend.name]


def check(backend, x, w, scale, bias=None):
    device = backend.device
    bias_there = None if bias is None else bias.to(device)
    scale_there = None if scale is None else scale.to(device)
    got = backend.ops.skinny_linear(
        x.to(device), w.to(device), bias=bias_there, weight_scale=scale_there
    ).cpu()
    assert got.shape == (x.shape[0], w.shape[0]) and got.dtype == x.dtype
    exact = skinny_linear(
        x.double(),
        w.double() if scale is None else w.double() * scale.double()[:, None],
        bias=bias,
    )
    eager = torch.nn.functional.linear(x, eager_weight(w, scale, x.dtype), bias)
    assert_as_good_as(got, eager, exact)


@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(backend, dtype, weight_dtype):
    for m, n, k in shapes(backend):
        w, scale = make_weight(n, k, weight_dtype)
        x = normal(m, k).to(dtype)
        bias = normal(n, seed=3).to(dtype) if m % 2 else None
        check(backend, x, w, scale, bias)


def test_special_weights_of_e4m3(backend):
    """Every code, NaN and subnormals among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    w = codes.view(16, 16).contiguous()
    scale = torch.ones(16)
    x = torch.eye(16)
    got = backend.ops.skinny_linear(
        x.to(backend.device), w.to(backend.device), weight_scale=scale.to(backend.device)
    ).cpu()
    clean = w.float().nan_to_num(0.0)
    has_nan = w.float().isnan().any(1)
    assert torch.equal(got[:, ~has_nan], clean.T[:, ~has_nan])
    assert got[:, has_nan].isnan().all()


def test_int8_with_rows_of_any_range(backend):
    """Elements far below their row's largest, rows near both ends of bf16, and rows that are not
    finite."""
    w, scale = make_weight(50, 128, torch.int8)
    w[:, 7] = 0  # nothing hides what the largest element leaves
    x = normal(8, 128)
    x[0, 7], x[1, 7] = 2.0**14, -(2.0**18)
    x[2] *= 2.0 ** torch.linspace(0, -20, 128)
    x[3] *= 1e-34
    x[4] *= 1e34
    x[5] = 0.0
    x[5, 0] = 255 / 128  # the largest there is of its exponent
    x[6, 3], x[7, 9] = float("inf"), float("nan")
    x = x.to(torch.bfloat16)
    got = backend.ops.skinny_linear(
        x.to(backend.device), w.to(backend.device), weight_scale=scale.to(backend.device)
    ).cpu()
    exact = x.double() @ (w.double() * scale.double()[:, None]).T
    for row in (0, 2, 3, 4, 5):
        assert error(got[row], exact[row]) <= 2.0**-8 * exact[row].abs().max()
    # Elements of size 1 beside one of 2^18: integers of 23 bits end at 2^-4.
    assert error(got[1], exact[1]) <= 0.05 * exact[1].abs().max()
    assert not got[6:].isfinite().any()


@pytest.mark.parametrize("k", [2**17 - 1, 2**17 + 1])
def test_int8_sums_as_far_as_integers_reach(k):
    """With AMX, 2^7 times 2^7 in every place but one: just below 2^31, and 2^31."""
    w = torch.full((3, k), -128, dtype=torch.int8)
    x = torch.full((2, k), -(2.0**-7), dtype=torch.bfloat16)
    x[:, 0] = 1.0
    got = ops.skinny_linear(x, w, weight_scale=torch.ones(3))
    exact = (k - 1) - 128.0
    assert (got.double() - exact).abs().max() <= 2.0**-8 * exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_rows_are_independent(backend, dtype, weight_dtype):
    """A row's bits depend neither on how many rows there are nor on where it stands; long rows are
    read in parts, whose length depends on the number of rows."""
    simulated = backend.name == "ptxsim"
    for n, k in [(40, 72)] if simulated else [(131, 200), (53, 2110)]:
        w, scale = make_weight(n, k, weight_dtype)
        x = normal(70, k).to(dtype)
        w, x = w.to(backend.device), x.to(backend.device)
        scale = None if scale is None else scale.to(backend.device)
        full = backend.ops.skinny_linear(x, w, weight_scale=scale)
        for m in [1, 8, 9, 17, 33, 65] if simulated else range(1, 70):
            assert torch.equal(backend.ops.skinny_linear(x[:m], w, weight_scale=scale), full[:m])
        order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
        shuffled = backend.ops.skinny_linear(x[order].contiguous(), w, weight_scale=scale)
        assert torch.equal(shuffled, full[order])


@pytest.mark.parametrize("m,dtype,weight_dtype", COUNTED)
def test_memory_traffic(backend, simulator, m, dtype, weight_dtype):
    w, scale = make_weight(256, 256, weight_dtype)
    x = normal(m, 256).to(dtype)
    with simulator.record() as launches:
        backend.ops.skinny_linear(x, w, weight_scale=scale)
    assert_streams_once(launches, w)
    assert len(launches) == 1


def test_total_traffic(backend, simulator):
    """Two rows: x read again for every 128 weight rows, and parts of k, are within 3%."""
    m, n, k = 2, 4096, 7168
    w, x = torch.zeros(n, k, dtype=torch.bfloat16), torch.ones(m, k, dtype=torch.bfloat16)
    with simulator.record() as launches:
        backend.ops.skinny_linear(x, w)
    (stream,) = launches
    assert stream.grid[1] > 1
    assert stream.loaded_bytes("x") <= n // 128 * x.nbytes
    floor = w.nbytes + x.nbytes + m * n * 2
    assert total_bytes(launches) <= 1.03 * floor


@pytest.mark.parametrize("m", STREAMED_ROWS)
def test_traffic_near_floor(backend, simulator, m):
    """A layer with enough rows to fill the GPU without splitting k."""
    n, k = 128 * 265, 256
    w, x = torch.zeros(n, k, dtype=torch.bfloat16), torch.ones(m, k, dtype=torch.bfloat16)
    with simulator.record() as launches:
        out = backend.ops.skinny_linear(x, w)
    assert_near_floor(launches, w, x, out)


@pytest.mark.parametrize("m", [1, 4])
def test_traffic_near_floor_with_parts_of_k(backend, simulator, m):
    """Eight parts of k, written and read in f32, are within 3% of 7168 columns up to six rows."""
    n, k = 4096, 7168
    w, x = torch.zeros(n, k, dtype=torch.bfloat16), torch.ones(m, k, dtype=torch.bfloat16)
    with simulator.record() as launches:
        out = backend.ops.skinny_linear(x, w)
    assert launches[0].grid[1] == 8
    assert_near_floor(launches, w, x, out)


@pytest.mark.parametrize("seed", [1, 2])
def test_parts_are_added_in_order(backend, simulator, seed):
    """Whichever CTA comes last: the same bits under any schedule, launch after launch."""
    w, _ = make_weight(40, 1024, torch.bfloat16)
    x = normal(3, 1024).to(torch.bfloat16)
    expected = backend.ops.skinny_linear(x, w)
    with simulator.record(seed=seed) as launches:
        assert torch.equal(backend.ops.skinny_linear(x, w), expected)
        assert torch.equal(backend.ops.skinny_linear(x, w), expected)
    assert launches[0].grid[1] > 1


def test_strided_rows_and_poison(backend):
    """What lies between and behind the rows is never used."""
    w, _ = make_weight(50, 72, torch.bfloat16)
    x = normal(5, 72).to(torch.bfloat16)
    expected = backend.ops.skinny_linear(x.to(backend.device), w.to(backend.device))
    got = backend.ops.skinny_linear(padded(x).to(backend.device), padded(w).to(backend.device))
    assert torch.equal(got, expected)


def test_nan_stays_in_its_row(backend):
    w, _ = make_weight(50, 72, torch.bfloat16)
    x = normal(6, 72).to(torch.bfloat16)
    clean = backend.ops.skinny_linear(x.to(backend.device), w.to(backend.device))
    x[2, 5] = float("nan")
    got = backend.ops.skinny_linear(x.to(backend.device), w.to(backend.device))
    assert got[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("m,n,k", [(0, 5, 8), (3, 0, 8), (3, 5, 0)])
def test_empty(backend, m, n, k):
    bias = torch.arange(n, dtype=torch.float32)
    got = backend.ops.skinny_linear(
        torch.zeros(m, k).to(backend.device),
        torch.zeros(n, k).to(backend.device),
        bias=bias.to(backend.device),
    )
    assert torch.equal(got.cpu(), bias.expand(m, n))


def test_threads_do_not_matter():
    w, _ = make_weight(1000, 96, torch.bfloat16)
    x = normal(7, 96).to(torch.bfloat16)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(ops.skinny_linear(x, w))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


GOOD = dict(x=torch.zeros(3, 16), weight=torch.zeros(5, 16))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(x=torch.zeros(3, 16, dtype=torch.int32)), "x must have dtype Float or Half"),
        (dict(x=torch.zeros(16)), r"x must have shape \[M, K\]"),
        (dict(x=torch.zeros(16, 3).T), "x must be contiguous in its last dimension"),
        (dict(weight=torch.zeros(5, 15)), r"weight must have shape \[N, K=16\], got \[5, 15\]"),
        (dict(weight=torch.zeros(16, 5).T), "weight must be contiguous in its last dimension"),
        (dict(weight=torch.zeros(5, 16, dtype=torch.float64)), "weight must have dtype"),
        (dict(weight=torch.zeros(5, 16, dtype=torch.int8)), "weight_scale must be given"),
        (dict(weight_scale=torch.ones(5)), "weight_scale must be None unless"),
        (
            dict(weight=torch.zeros(5, 16, dtype=torch.int8), weight_scale=torch.ones(4)),
            r"weight_scale must have shape \[N=5\]",
        ),
        (dict(bias=torch.zeros(4)), r"bias must have shape \[N=5\]"),
        (dict(bias=torch.zeros(5, dtype=torch.bfloat16)), "bias must have dtype Float"),
    ],
)
def test_bad_metadata_is_named(change, message):
    arguments = GOOD | change
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mtp.skinny_linear.default(**arguments)


def test_opcheck_and_compile():
    w, scale = make_weight(5, 16, torch.int8)
    x, bias = normal(3, 16).to(torch.bfloat16), normal(5).to(torch.bfloat16)
    keywords = dict(bias=bias, weight_scale=scale)
    torch.library.opcheck(torch.ops.mtp.skinny_linear, (x, w), keywords)
    compiled = torch.compile(ops.skinny_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = normal(rows, 16).to(torch.bfloat16)
        assert torch.equal(compiled(x, w, **keywords), ops.skinny_linear(x, w, **keywords))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 70),
    n=st.integers(1, 120),
    k=st.integers(1, 90),
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(WEIGHTS),
    with_bias=st.booleans(),
)
def test_fuzz(m, n, k, dtype, weight_dtype, with_bias):
    w, scale = make_weight(n, k, weight_dtype)
    x = normal(m, k).to(dtype)
    bias = normal(n, seed=3).to(dtype) if with_bias else None
    exact = skinny_linear(x.double(), w, bias=bias, weight_scale=scale)
    got = ops.skinny_linear(x, w, bias=bias, weight_scale=scale)
    eps = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    top = max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    assert (got.double() - exact).abs().max().item() <= 2 * eps * top if got.numel() else True
