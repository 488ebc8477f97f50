import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from projections import (
    FLOATS,
    STREAMED_ROWS,
    assert_as_good_as,
    assert_near_floor,
    assert_streams_once,
    make_weight,
    normal,
    padded,
    threads,
    total_bytes,
)

from mtp_ext import ops
from mtp_ext.reference.eh_proj import eh_proj


def make_case(t, h, v, n, dtype, seed=0, **keep):
    """Arguments and keywords; ids and positions include those that zero the embedding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, v, (t,), generator=generator)
    positions = torch.randint(1, 100, (t,), generator=generator)
    if t > 2:
        ids[1], positions[2] = v, 0
    if t > 4:
        ids[4] = -1
    weight, _ = make_weight(n, 2 * h, dtype)
    arguments = [ids, normal(t, h, seed=2).to(dtype) * 3, normal(v, h, seed=3).to(dtype), weight]
    keywords = dict(
        enorm_weight=(1 + normal(h, seed=4, scale=0.1)).to(dtype),
        hnorm_weight=(1 + normal(h, seed=5, scale=0.1)).to(dtype),
        bias=normal(n, seed=6).to(dtype),
        positions=positions,
    )
    return arguments, keywords | keep


def on(device, arguments, keywords):
    move = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t  # noqa: E731
    return [move(t) for t in arguments], {name: move(t) for name, t in keywords.items()}


def run(backend, arguments, keywords):
    arguments, keywords = on(backend.device, arguments, keywords)
    return backend.ops.eh_proj(*arguments, **keywords).cpu()


def eager(ids, hidden, embedding, weight, *, enorm_weight, hnorm_weight, bias, positions, **rest):
    eps, gemma = rest.get("eps", 1e-6), rest.get("gemma_norm", False)

    def norm(x, w):
        if w is None:
            return x
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        return (y * (w.float() + gemma)).to(x.dtype)

    known = (ids >= 0) & (ids < embedding.shape[0])
    if positions is not None:
        known &= positions != 0
    e = embedding[ids.clamp(0, embedding.shape[0] - 1)] * known[:, None]
    both = [norm(e, enorm_weight), norm(hidden, hnorm_weight)]
    x = torch.cat(both[::-1] if rest.get("hidden_first") else both, -1)
    return torch.nn.functional.linear(x, weight, bias)


def exact(arguments, keywords):
    ids, *rest = arguments
    return eh_proj(
        ids,
        *[t.double() for t in rest],
        **{
            name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
            for name, t in keywords.items()
        },
    )


def check(backend, arguments, keywords):
    got = run(backend, arguments, keywords)
    assert got.dtype == arguments[1].dtype
    assert_as_good_as(got, eager(*arguments, **keywords), exact(arguments, keywords))


SHAPES = {
    "cpu": [(1, 8, 3, 5), (5, 13, 11, 50), (9, 40, 30, 97), (66, 24, 10, 61)],
    "ptxsim": [(1, 8, 3, 5), (5, 40, 11, 50), (9, 584, 30, 130), (64, 24, 9, 30), (65, 16, 10, 20)],
}
SHAPES["cuda"] = SHAPES["ptxsim"] + [(16, 2048, 1000, 2048)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(backend, dtype):
    for shape in SHAPES[backend.name]:
        check(backend, *make_case(*shape, dtype))


@pytest.mark.parametrize(
    "keep",
    [
        dict(enorm_weight=None),
        dict(hnorm_weight=None),
        dict(enorm_weight=None, hnorm_weight=None, bias=None, positions=None),
        dict(gemma_norm=True),
        dict(hidden_first=True),
        dict(hidden_first=True, gemma_norm=True, eps=0.1),
    ],
    ids=lambda keep: "-".join(keep),
)
@pytest.mark.parametrize("t", [5, 70])
def test_variants(backend, keep, t):
    check(backend, *make_case(t, 40, 11, 50, torch.bfloat16, **keep))


@pytest.mark.parametrize("t", [5, 70])
def test_embedding_of_another_dtype(backend, t):
    arguments, keywords = make_case(t, 40, 11, 50, torch.bfloat16)
    arguments[2] = normal(11, 40, seed=3).to(torch.float16)
    got = run(backend, arguments, keywords)
    rounded = [t.to(torch.bfloat16) if t.is_floating_point() else t for t in arguments]
    assert_as_good_as(got, eager(*rounded, **keywords), exact(arguments, keywords))


def test_index_dtypes_agree(backend):
    arguments, keywords = make_case(6, 16, 11, 20, torch.float32)
    expected = run(backend, arguments, keywords)
    arguments[0] = arguments[0].to(torch.int32)
    keywords["positions"] = keywords["positions"].to(torch.int32)
    assert torch.equal(run(backend, arguments, keywords), expected)


def test_huge_ids_are_harmless(backend):
    arguments, keywords = make_case(6, 16, 11, 20, torch.float32)
    arguments[0] = torch.tensor([2**62, -(2**62), 2**32, -1, 11, 3])
    got = run(backend, arguments, keywords)
    keywords["positions"] = torch.tensor([0, 0, 0, 0, 0, 1])
    arguments[0] = torch.full((6,), 3)
    assert torch.equal(got, run(backend, arguments, keywords))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_are_independent(backend, dtype):
    """Up to 64 rows a row's bits are the same for every T; beyond, T decides the parts of k."""
    arguments, keywords = make_case(140, 24, 30, 60, dtype)

    def part(rows):
        ids, hidden, *rest = arguments
        some = keywords | dict(positions=keywords["positions"][rows].contiguous())
        picked = [ids[rows].contiguous(), hidden[rows].contiguous(), *rest]
        return run(backend, picked, some)

    for most, counts in [
        (64, range(1, 64) if backend.name != "ptxsim" else [1, 9, 33]),
        (140, [139]),
    ]:
        full = part(slice(0, most))
        for m in counts:
            assert torch.equal(part(slice(0, m)), full[:m])
        order = torch.randperm(most, generator=torch.Generator().manual_seed(0))
        assert torch.equal(part(order), full[order])


@pytest.mark.parametrize("t,dtype", [(130, torch.float32), (200, torch.bfloat16)])
def test_many_rows(backend, dtype, t):
    """Several row tiles; k in parts; NaN behind every row."""
    arguments, keywords = make_case(t, 520, 30, 50, dtype)
    check(backend, arguments, keywords)
    expected = run(backend, arguments, keywords)
    ids, hidden, embedding, weight = on(backend.device, arguments, {})[0]
    for extra in (8, 3):  # the second leaves rows that are not aligned to 16 bytes
        rows = [padded(x, extra) for x in (hidden, embedding)]
        got = backend.ops.eh_proj(ids, *rows, padded(weight), **on(backend.device, [], keywords)[1])
        assert torch.equal(got.cpu(), expected)


def test_f16_beyond_its_range_before_the_norm(backend):
    """A normalised row is of unit size, whatever the row and the norm's weight were."""
    arguments, keywords = make_case(3, 40, 11, 50, torch.float16, positions=None)
    arguments[0] = torch.tensor([1, 2, 3])
    arguments[1] = (normal(3, 40, seed=2) * 1e4).to(torch.float16)
    arguments[2] = (normal(11, 40, seed=3) * 1e-6).to(torch.float16)
    keywords["hnorm_weight"] = torch.full((40,), 20.0).to(torch.float16)
    keywords["enorm_weight"] = torch.full((40,), 0.37).to(torch.float16)
    keywords["eps"] = 1e-14
    check(backend, arguments, keywords)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory_traffic(backend, simulator, dtype):
    """One launch; of the embedding only rows in use are loaded."""
    arguments, keywords = make_case(5, 64, 100, 256, dtype)
    with simulator.record() as launches:
        run(backend, arguments, keywords)
    (stream,) = launches
    assert_streams_once(launches, arguments[3])
    # The other ids are unknown or zeroed.
    assert stream.unique_bytes("embedding") == 2 * 64 * dtype.itemsize


def test_total_traffic(backend, simulator):
    """One row: what is read again for every 128 weight rows, and parts of k, are within 3%."""
    h, n = 1024, 7168  # DeepSeek-V3 has this n and seven times this h
    arguments, keywords = make_case(1, h, 10, n, torch.bfloat16)
    with simulator.record() as launches:
        run(backend, arguments, keywords)
    floor = arguments[3].nbytes + 2 * 2 * h * 2 + 2 * n * 2  # weights, rows, norms, bias, result
    assert total_bytes(launches) <= 1.03 * floor


@pytest.mark.parametrize("m", STREAMED_ROWS)
def test_traffic_near_floor(backend, simulator, m):
    """The halves of the weight, for embeddings and for hidden states, leave their sums in f32: two
    parts of k, which 2 * h columns outweigh up to h / 134 rows. Beyond, they count apart."""
    h, n = 2304 if m == 16 else 576, 128 * 67
    ids = torch.arange(m)
    embedding, hidden = (torch.ones(m, h, dtype=torch.bfloat16) for _ in range(2))
    weight = torch.zeros(n, 2 * h, dtype=torch.bfloat16)
    norms = [torch.ones(h, dtype=torch.bfloat16) for _ in range(2)]
    with simulator.record() as launches:
        out = backend.ops.eh_proj(
            ids, hidden, embedding, weight, enorm_weight=norms[0], hnorm_weight=norms[1]
        )
    inputs = (ids, hidden, embedding, *norms)
    (stream,) = launches
    parts = 2 * m * n * 4
    assert parts <= stream.stored_bytes("workspace") <= 1.01 * parts
    assert_near_floor(launches, weight, *inputs, out, workspace=m <= 16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_many_rows_are_normalised_in_the_product(backend, simulator, dtype):
    """Before the product only the norms' factors are made; rows go from where they lie straight to
    shared memory, once per 128 weight rows, and are changed there without bank conflicts."""
    t, h, v, n = 130, 72, 100, 256
    arguments, keywords = make_case(t, h, v, n, dtype)
    with simulator.record() as launches:
        run(backend, arguments, keywords)
    factors, product = launches
    assert factors.stored_bytes("workspace") == 2 * t * 4
    assert sum(b.stored_bytes for b in product.buffers.values()) == t * n * dtype.itemsize
    used = (arguments[0] >= 0) & (arguments[0] < v) & (keywords["positions"] != 0)
    assert product.loaded_bytes("embedding") == 2 * used.sum() * h * dtype.itemsize
    assert product.loaded_bytes("hidden") == 2 * t * h * dtype.itemsize
    assert product.loaded_bytes("weight") == 2 * arguments[3].nbytes
    # (nvcc cuts one of the stores of the finished tile.)
    loop = [n for n in product.lines.values() if not n.text.startswith("st.shared.f32")]
    assert sum(n.wavefronts - n.ideal_wavefronts for n in loop) == 0

    # Of rows without a norm there is no factor to make.
    with simulator.record() as launches:
        run(backend, arguments, keywords | {"hnorm_weight": None})
    factors, _ = launches
    assert factors.stored_bytes("workspace") == t * 4
    assert "hidden" not in factors.buffers or factors.loaded_bytes("hidden") == 0
    assert factors.loaded_bytes("embedding") > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_parts_are_added_in_order(backend, simulator, seed):
    arguments, keywords = make_case(5, 264, 11, 20, torch.bfloat16)
    expected = run(backend, arguments, keywords)
    with simulator.record(seed=seed) as launches:
        assert torch.equal(run(backend, arguments, keywords), expected)
    assert launches[0].grid[1] >= 2


def test_unaligned_width_is_refused(backend, simulator):
    arguments, keywords = make_case(2, 12, 5, 6, torch.bfloat16)
    with pytest.raises(RuntimeError, match="H must be a multiple of 8 on cuda, got 12"):
        run(backend, arguments, keywords)


def test_strided_rows_and_poison(backend):
    arguments, keywords = make_case(5, 40, 11, 50, torch.bfloat16)
    expected = run(backend, arguments, keywords)
    ids, *rest = arguments
    # The storage of a padded tensor travels with it only where nothing is copied.
    arguments = [ids.to(backend.device), *[padded(t.to(backend.device)) for t in rest]]
    got = backend.ops.eh_proj(*arguments, **on(backend.device, [], keywords)[1])
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("t,n", [(0, 5), (3, 0)])
def test_empty(backend, t, n):
    got = run(backend, *make_case(t, 8, 4, n, torch.float32))
    assert got.shape == (t, n)


def test_empty_embedding(backend):
    arguments, keywords = make_case(3, 8, 4, 5, torch.float32)
    zeroed = run(backend, arguments, keywords | dict(positions=torch.zeros(3, dtype=torch.int64)))
    arguments[2] = arguments[2][:0]
    assert torch.equal(run(backend, arguments, keywords), zeroed)


def test_threads_do_not_matter():
    arguments, keywords = make_case(7, 24, 30, 2000, torch.bfloat16)
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(ops.eh_proj(*arguments, **keywords))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(token_ids=torch.zeros(4, dtype=torch.int64)), r"token_ids must have shape \[T=3\]"),
        (dict(token_ids=torch.zeros(3)), "token_ids must have dtype Int or Long"),
        (dict(hidden=torch.zeros(3)), r"hidden must have shape \[T, H\]"),
        (dict(hidden=torch.zeros(8, 3).T), "hidden must be contiguous in its last dimension"),
        (dict(embedding=torch.zeros(4, 7)), r"embedding must have shape \[V, H=8\]"),
        (dict(weight=torch.zeros(5, 8)), r"weight must have shape \[Ho, 2H=16\]"),
        (dict(weight=torch.zeros(5, 16, dtype=torch.int8)), "weight must have dtype"),
        (dict(enorm_weight=torch.zeros(9)), r"enorm_weight must have shape \[H=8\]"),
        (dict(hnorm_weight=torch.zeros(8).bfloat16()), "hnorm_weight must have dtype Float"),
        (dict(bias=torch.zeros(4)), r"bias must have shape \[Ho=5\]"),
        (dict(positions=torch.zeros(3)), "positions must have dtype Int or Long"),
        (dict(positions=torch.zeros(4, dtype=torch.int64)), r"positions must have shape \[T=3\]"),
    ],
)
def test_bad_metadata_is_named(change, message):
    good = dict(
        token_ids=torch.zeros(3, dtype=torch.int64),
        hidden=torch.zeros(3, 8),
        embedding=torch.zeros(4, 8),
        weight=torch.zeros(5, 16),
    )
    with pytest.raises(RuntimeError, match=message):
        torch.ops.mtp.eh_proj.default(**(good | change))


def test_opcheck_and_compile():
    arguments, keywords = make_case(5, 16, 11, 20, torch.bfloat16)
    torch.library.opcheck(torch.ops.mtp.eh_proj, tuple(arguments), keywords)
    compiled = torch.compile(ops.eh_proj, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 7):
        arguments, keywords = make_case(rows, 16, 11, 20, torch.bfloat16)
        assert torch.equal(compiled(*arguments, **keywords), ops.eh_proj(*arguments, **keywords))


@settings(max_examples=30, deadline=None)
@given(
    t=st.integers(0, 70),
    h=st.integers(1, 50),
    n=st.integers(1, 60),
    dtype=st.sampled_from(FLOATS),
    flags=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 9),
)
def test_fuzz(t, h, n, dtype, flags, seed):
    arguments, keywords = make_case(t, h, 9, n, dtype, seed)
    keywords |= dict(gemma_norm=flags[0], hidden_first=flags[1])
    if flags[2]:
        keywords["enorm_weight"] = None
    got = ops.eh_proj(*arguments, **keywords)
    expected = exact(arguments, keywords)
    eps = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    if t:
        assert (got.double() - expected).abs().max() <= eps * max(1.0, expected.abs().max())
