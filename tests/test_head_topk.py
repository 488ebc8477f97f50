import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projections import (
    COUNTED,
    FLOATS,
    STREAMED_ROWS,
    WEIGHTS,
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
from mtp_ext.reference.head_topk import head_logits, head_topk, topk_lowest_id


def make_case(m, h, v, dtype, weight_dtype=None, seed=0, **keywords):
    weight, scale = make_weight(v, h, weight_dtype or dtype)
    hidden = (normal(m, h, seed=2 + seed) * 2).to(dtype)
    return [hidden, weight], dict(weight_scale=scale) | keywords


def on(device, keywords):
    return {n: t.to(device) if isinstance(t, torch.Tensor) else t for n, t in keywords.items()}


def run(backend, arguments, k, keywords):
    hidden, weight = (t.to(backend.device) for t in arguments)
    got = backend.ops.head_topk(hidden, weight, k, **on(backend.device, keywords))
    return tuple(t.cpu() for t in got)


def exact_logits(arguments, keywords):
    only = {n: t for n, t in keywords.items() if n not in ("token_map", "vocab_offset")}
    return head_logits(arguments[0].double(), arguments[1], **only)


def eager_logits(arguments, keywords):
    """As a user would write it in hidden's dtype, with the logits in f32."""
    hidden, weight = arguments
    if keywords.get("norm_weight") is not None:
        x = hidden.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + keywords.get("eps", 1e-6))
        w = keywords["norm_weight"].float() + keywords.get("gemma_norm", False)
        hidden = (x * w).to(hidden.dtype)
    w = eager_weight(weight, keywords.get("weight_scale"), hidden.dtype)
    logits = torch.nn.functional.linear(hidden, w, keywords.get("bias")).float()
    cap = keywords.get("softcap", 0.0)
    return cap * torch.tanh(logits / cap) if cap else logits


def check(backend, arguments, k, keywords):
    """Values against float64; ids are those of the values; nothing better was left out."""
    logits, ids, lse = run(backend, arguments, k, keywords)
    m, v = arguments[0].shape[0], arguments[1].shape[0]
    assert logits.shape == ids.shape == (m, k) and lse.shape == (m,)
    assert logits.dtype == lse.dtype == torch.float32 and ids.dtype == torch.int64
    exact = exact_logits(arguments, keywords)
    top = exact.abs().max().item()
    allowed = 2 * error(eager_logits(arguments, keywords), exact) + 1e-6 * max(1.0, top)
    rows = ids - keywords.get("vocab_offset", 0)
    if keywords.get("token_map") is not None:
        back = {int(t): i for i, t in enumerate(keywords["token_map"])}
        rows = torch.tensor([[back[int(i)] for i in row] for row in ids])
    assert ((rows >= 0) & (rows < v)).all()
    assert all(len(set(row.tolist())) == k for row in rows)
    assert error(logits, exact.gather(1, rows)) <= allowed
    assert (logits[:, :-1] >= logits[:, 1:]).all()
    ties = logits[:, :-1] == logits[:, 1:]
    assert (rows[:, :-1] < rows[:, 1:])[ties].all()
    left_out = exact.scatter(1, rows, -math.inf).amax(1)
    assert (left_out <= logits[:, -1].double() + allowed).all()
    eager_lse = torch.logsumexp(eager_logits(arguments, keywords), 1)
    exact_lse = torch.logsumexp(exact, 1)
    assert error(lse, exact_lse) <= 2 * error(eager_lse, exact_lse) + 2e-6 * max(1.0, top)


SHAPES = {
    "cpu": [(1, 16, 5, 1), (3, 33, 97, 4), (5, 64, 1001, 64), (9, 130, 500, 8), (66, 24, 61, 61)],
    "ptxsim": [(1, 64, 5, 1), (3, 72, 140, 64), (20, 16, 70, 8), (64, 24, 61, 3), (65, 40, 140, 5)],
}
SHAPES["cuda"] = SHAPES["ptxsim"] + [(16, 2048, 50000, 8)]


@pytest.mark.parametrize("weight_dtype", WEIGHTS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(backend, dtype, weight_dtype):
    for m, h, v, k in SHAPES[backend.name]:
        arguments, keywords = make_case(m, h, v, dtype, weight_dtype)
        check(backend, arguments, k, keywords)


@pytest.mark.parametrize("k", [1, 8])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_everything_at_once(backend, dtype, k):
    h, v = 40, 203
    arguments, keywords = make_case(
        5,
        h,
        v,
        dtype,
        norm_weight=normal(h, seed=4, scale=0.1).to(dtype),
        bias=normal(v, seed=5).to(dtype),
        token_map=torch.randperm(10 * v, generator=torch.Generator().manual_seed(1))[:v],
        gemma_norm=True,
        softcap=3.0,
        eps=0.01,
    )
    check(backend, arguments, k, keywords)
    as_int = keywords | dict(token_map=keywords["token_map"].to(torch.int32), vocab_offset=99)
    for a, b in zip(run(backend, arguments, k, keywords), run(backend, arguments, k, as_int)):
        assert torch.equal(a, b)


def test_vocab_offset(backend):
    arguments, keywords = make_case(3, 24, 50, torch.bfloat16)
    _, ids, _ = run(backend, arguments, 4, keywords)
    _, moved, _ = run(backend, arguments, 4, keywords | dict(vocab_offset=2**33))
    assert torch.equal(moved, ids + 2**33)


@pytest.mark.parametrize("k", [1, 3, 64])
def test_ties_take_the_lowest_row(backend, k):
    """Integer products are exact, so equal logits are equal, +0 and -0 included."""
    generator = torch.Generator().manual_seed(k)
    weight = torch.randint(-1, 2, (300, 8), generator=generator).to(torch.bfloat16)
    hidden = torch.randint(-1, 2, (6, 8), generator=generator).to(torch.bfloat16)
    hidden[2] = 0
    hidden[3] = -hidden[2]
    logits, ids, _ = run(backend, [hidden, weight], k, {})
    expected, rows, _ = head_topk(hidden, weight, k)
    assert torch.equal(logits, expected) and torch.equal(ids, rows)


def with_bias(logits: torch.Tensor) -> tuple[list[torch.Tensor], dict]:
    """A case whose logits are exactly these for row 0: weights of zero, everything in the bias."""
    v = logits.shape[0]
    return [torch.zeros(2, 8), torch.zeros(v, 8)], dict(bias=logits)


@pytest.mark.parametrize("k", [1, 5])
def test_nan_is_below_everything(backend, k):
    logits = torch.arange(200, dtype=torch.float32) % 37
    logits[[3, 36, 110]] = math.nan
    logits[5] = -math.inf
    values, ids, lse = run(backend, *pack(with_bias(logits), k))
    expected, rows = topk_lowest_id(logits[None], k)
    assert torch.equal(values[0], expected[0]) and torch.equal(ids[0], rows[0])
    assert lse.isnan().all()


def pack(case, k):
    return case[0], k, case[1]


@pytest.mark.parametrize("present", [0, 1, 3])
def test_fewer_numbers_than_k(backend, present):
    """Filled up with the lowest rows that are NaN; ids stay in range."""
    logits = torch.full((70,), math.nan)
    logits[[60, 20, 40][:present]] = -math.inf
    values, ids, lse = run(backend, *pack(with_bias(logits), 6))
    _, rows = topk_lowest_id(logits[None], 6)
    assert torch.equal(ids[0], rows[0])
    assert values[:, present:].isnan().all() and lse.isnan().all()


def test_infinities(backend):
    logits = torch.full((70,), -math.inf)
    _, ids, lse = run(backend, *pack(with_bias(logits), 3))
    assert ids.tolist() == [[0, 1, 2]] * 2 and (lse == -math.inf).all()
    logits[50] = -1000.0
    _, ids, lse = run(backend, *pack(with_bias(logits), 3))
    assert ids.tolist() == [[50, 0, 1]] * 2 and (lse == -1000).all()
    logits[60] = math.inf
    values, ids, lse = run(backend, *pack(with_bias(logits), 2))
    assert ids.tolist() == [[60, 50]] * 2 and (lse == math.inf).all()
    assert values.tolist() == [[math.inf, -1000.0]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8], ids=str)
def test_rows_are_independent(backend, dtype, weight_dtype):
    """Up to 64 rows a row's bits are the same for every M; beyond, they are for every larger M."""
    h, v = (56, 900) if backend.name != "ptxsim" else (24, 130)
    norm = (1 + normal(h, scale=0.1)).to(dtype)
    (hidden, weight), keywords = make_case(140, h, v, dtype, weight_dtype, norm_weight=norm)
    for most, counts in [
        (64, range(1, 64) if backend.name != "ptxsim" else [1, 9, 33]),
        (140, [65, 130]),
    ]:
        full = run(backend, [hidden[:most], weight], 5, keywords)
        for m in counts:
            for a, b in zip(run(backend, [hidden[:m], weight], 5, keywords), full):
                assert torch.equal(a, b[:m])
        order = torch.randperm(most, generator=torch.Generator().manual_seed(0))
        for a, b in zip(run(backend, [hidden[order], weight], 5, keywords), full):
            assert torch.equal(a, b[order])


@pytest.mark.parametrize("m,dtype", [(130, torch.float32), (200, torch.bfloat16)])
def test_many_rows(backend, dtype, m):
    """Several row tiles, with NaN behind every row and a row that is NaN."""
    h, v = 40, 203
    norm = (1 + normal(h, seed=4, scale=0.1)).to(dtype)
    arguments, keywords = make_case(m, h, v, dtype, norm_weight=norm, softcap=5.0)
    check(backend, arguments, 5, keywords)
    expected = run(backend, arguments, 5, keywords)
    hidden, weight = (padded(t.to(backend.device)) for t in arguments)
    hidden[7, 3] = math.nan
    got = backend.ops.head_topk(hidden, weight, 5, **on(backend.device, keywords))
    others = [i for i in range(m) if i != 7]
    for a, b in zip(got, expected):
        assert torch.equal(a.cpu()[others], b[others])
    assert got[2][7].isnan() and ((got[1][7] >= 0) & (got[1][7] < v)).all()


@pytest.mark.parametrize("m,dtype,weight_dtype", COUNTED)
def test_memory_traffic(backend, simulator, m, dtype, weight_dtype):
    w, scale = make_weight(256, 256, weight_dtype)
    norm = torch.ones(256).to(dtype)
    x = normal(m, 256).to(dtype)
    with simulator.record() as launches:
        backend.ops.head_topk(x, w, 4, weight_scale=scale, norm_weight=norm)
    assert_streams_once(launches, w)
    assert len(launches) == 2  # the stream and the merge


def test_total_traffic(backend, simulator):
    """A persistent CTA reads the hiddens once for all of its tiles."""
    m, h, v = 4, 64, 128 * 530
    w, _ = make_weight(v, h, torch.bfloat16)
    x = normal(m, h).to(torch.bfloat16)
    with simulator.record() as launches:
        backend.ops.head_topk(x, w, 1)
    stream = launches[0]
    assert stream.grid[0] < 530
    assert stream.loaded_bytes("hidden") == stream.grid[0] * x.nbytes
    floor = w.nbytes + x.nbytes + m * (8 + 4 + 4)
    assert total_bytes(launches) <= 1.03 * floor


@pytest.mark.parametrize("m", STREAMED_ROWS)
def test_traffic_near_floor(backend, simulator, m):
    """What every CTA leaves for the merge included: its best k, and a sum of every tile."""
    v, h = 49152, 256
    w, x = torch.zeros(v, h, dtype=torch.bfloat16), torch.ones(m, h, dtype=torch.bfloat16)
    with simulator.record() as launches:
        results = backend.ops.head_topk(x, w, 1)
    assert_near_floor(launches, w, x, *results)


def test_argmax_is_leaner_than_top_2(backend, simulator):
    w, _ = make_weight(1280, 64, torch.bfloat16)
    x = normal(16, 64).to(torch.bfloat16)
    instructions = []
    for k in (1, 2):
        with simulator.record() as launches:
            backend.ops.head_topk(x, w, k)
        instructions.append(launches[0].warp_instructions)
    assert instructions[0] < 0.95 * instructions[1]


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.int8, torch.float32], ids=str)
def test_large_m_reads_weights_once_per_128_rows(backend, simulator, weight_dtype):
    m, h, v = 130, 64, 256
    w, scale = make_weight(v, h, weight_dtype)
    x, norm = normal(m, h).to(torch.bfloat16), torch.ones(h).to(torch.bfloat16)
    with simulator.record() as launches:
        backend.ops.head_topk(x, w, 4, weight_scale=scale, norm_weight=norm)
    (product,) = [launch for launch in launches if launch.loaded_bytes("weight")]
    if weight_dtype != torch.float32:  # rows are normalised in the product
        assert launches[0].stored_bytes("workspace") == m * 4
        assert product.loaded_bytes("hidden") == v // 128 * x.nbytes
    assert product.loaded_bytes("weight") == 2 * product.unique_bytes("weight") == 2 * w.nbytes
    assert product.sector_efficiency("weight") == 1.0
    # Nothing in the main loop waits for a bank. (nvcc cuts one of the stores of the finished tile.)
    reads = [n for n in product.lines.values() if not n.text.startswith("st.")]
    assert sum(n.wavefronts - n.ideal_wavefronts for n in reads) == 0
    assert not any(launch.stored_bytes("logits") > m * 4 * 4 for launch in launches)


def test_strided_rows_and_poison(backend):
    (hidden, weight), keywords = make_case(5, 40, 97, torch.bfloat16)
    expected = run(backend, [hidden, weight], 4, keywords)
    device = backend.device
    got = backend.ops.head_topk(padded(hidden.to(device)), padded(weight.to(device)), 4)
    for a, b in zip(got, expected):
        assert torch.equal(a.cpu(), b)


def test_empty(backend):
    arguments, keywords = make_case(0, 16, 20, torch.float32)
    logits, ids, lse = run(backend, arguments, 3, keywords)
    assert logits.shape == ids.shape == (0, 3) and lse.shape == (0,)


def test_threads_do_not_matter():
    arguments, keywords = make_case(7, 24, 3000, torch.bfloat16)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(ops.head_topk(*arguments, 6, **keywords))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(k=0), r"k must be in \[1, 64\]"),
        (dict(k=65), r"k must be in \[1, 64\]"),
        (dict(k=21), "at most V=20, got 21"),
        (dict(hidden=torch.zeros(3)), r"hidden must have shape \[M, H\]"),
        (dict(weight=torch.zeros(20, 7)), r"weight must have shape \[V, H=8\]"),
        (dict(weight=torch.zeros(20, 8, dtype=torch.int8)), "weight_scale must be given"),
        (dict(weight_scale=torch.ones(20)), "weight_scale must be None unless"),
        (dict(norm_weight=torch.zeros(9)), r"norm_weight must have shape \[H=8\]"),
        (dict(bias=torch.zeros(20).bfloat16()), "bias must have dtype Float"),
        (dict(token_map=torch.zeros(19, dtype=torch.int64)), r"token_map must have shape \[V=20\]"),
        (dict(token_map=torch.zeros(20)), "token_map must have dtype Int or Long"),
        (dict(softcap=-1.0), "softcap must be 0"),
    ],
)
def test_bad_metadata_is_named(change, message):
    good = dict(hidden=torch.zeros(3, 8), weight=torch.zeros(20, 8), k=2)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mtp.head_topk.default(**(good | change))


def test_opcheck_and_compile():
    arguments, keywords = make_case(3, 16, 40, torch.bfloat16, torch.int8)
    keywords["bias"] = normal(40).to(torch.bfloat16)
    torch.library.opcheck(torch.ops.mtp.head_topk, (*arguments, 4), keywords)
    compiled = torch.compile(ops.head_topk, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        arguments = [normal(rows, 16).to(torch.bfloat16), arguments[1]]
        for a, b in zip(
            compiled(*arguments, 4, **keywords), ops.head_topk(*arguments, 4, **keywords)
        ):
            assert torch.equal(a, b)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 70),
    h=st.integers(1, 60),
    v=st.integers(1, 900),
    k=st.integers(1, 64),
    dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(WEIGHTS),
)
def test_fuzz(m, h, v, k, dtype, weight_dtype):
    k = min(k, v)
    (hidden, weight), keywords = make_case(m, h, v, dtype, weight_dtype)
    logits, ids, lse = ops.head_topk(hidden, weight, k, **keywords)
    exact = exact_logits([hidden, weight], keywords)
    tolerance = 2e-6 * max(1.0, exact.abs().max().item())
    assert (logits - exact.gather(1, ids)).abs().max() <= tolerance
    assert (logits - exact.topk(k).values).abs().max() <= tolerance
    assert (lse - exact.logsumexp(1)).abs().max() <= 3 * tolerance
