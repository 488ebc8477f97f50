import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import FP8, bits

from mtp_ext import ops
from mtp_ext.reference.kv_compact import kv_compact


def make(lens, index, counts, layers=2, heads=2, dim=64, page=16, layout="NHD",
         dtype=torch.bfloat16, index_dtype=torch.int32):  # fmt: skip
    g = torch.Generator().manual_seed(len(lens) + page)
    batch = len(lens)
    columns = 2 + max(lens, default=0) // page + 64 // page
    pages = batch * columns + 1
    shape = (pages, page, heads, dim) if layout == "NHD" else (pages, heads, page, dim)
    caches = [[torch.randn(shape, generator=g).to(dtype) for _ in range(layers)] for _ in "kv"]
    table = torch.randperm(pages, generator=g)[: batch * columns].view(batch, columns).int()
    return [
        *caches, table, torch.tensor(lens, dtype=torch.int32),
        torch.tensor(index, dtype=index_dtype).view(batch, -1),
        torch.tensor(counts, dtype=torch.int32),
    ], dict(layout=layout)  # fmt: skip


def copy(args, device):
    caches = [[c.to(device, copy=True) for c in layers] for layers in args[:2]]
    return caches + [t.to(device, copy=True) for t in args[2:]]


def check(backend, args, options):
    expected, given_ = copy(args, "cpu"), copy(args, backend.device)
    kv_compact(*expected, **options)
    backend.ops.kv_compact(*given_, **options)
    for a, b in zip(expected[0] + expected[1], given_[0] + given_[1]):
        assert torch.equal(bits(a), bits(b.cpu()))


INDEX = [[0, 2, 5, 9], [1, 2, 3, 63], [3, 4, 0, 0], [0, 1, 2, 3]]
CASES = {
    "plain": {},
    "int64": dict(index_dtype=torch.int64),
    "hnd": dict(layout="HND"),
    "page1": dict(page=1),
    "page3-dim80": dict(page=3, dim=80, heads=3),
    "fp8": dict(dtype=FP8),
    "f32-page64": dict(dtype=torch.float32, page=64),
    "dim8-one-layer": dict(dim=8, layers=1),
    "many-layers": dict(layers=61, dim=8, heads=1),
}


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(backend, name):
    check(backend, *make((10, 0, 31, 7), INDEX, (4, 4, 2, 4), **CASES[name]))


def test_more_layers_than_one_launch_takes(backend):
    if backend.name == "ptxsim":
        pytest.skip("covered by many-layers; hundreds of layers take the simulator minutes")
    check(backend, *make((10, 3), INDEX[:2], (4, 4), layers=200, dim=8, heads=1))


def test_moves_what_was_accepted(backend):
    args, _ = make((4,), [[1, 3, 4]], (3,), layers=1, page=2)
    cache, table = args[0][0], args[2][0].long()
    before = cache[table].flatten(0, 1).clone()
    device_args = copy(args, backend.device)
    backend.ops.kv_compact(*device_args)
    after = device_args[0][0].cpu()[table].flatten(0, 1)
    assert torch.equal(after[4:7], before[[5, 7, 8]])
    kept = [i for i in range(len(after)) if i not in (4, 5, 6)]
    assert torch.equal(after[kept], before[kept])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_bad_indices_are_skipped(backend, index_dtype):
    index = [[-1, 0, 3, 5], [2, 2, 1, 7], [-(2**31), 2**31 - 1, 4, 6], [1, 40, 41, 10**6]]
    args, options = make((10, 0, 31, 7), index, (4, 4, 4, 4), index_dtype=index_dtype)
    check(backend, args, options)
    if index_dtype == torch.int64:
        args[4][0, 1], args[4][1, 1] = 2**63 - 1, -(2**63)
        check(backend, args, options)


def test_faults_move_nothing(backend):
    args, options = make((10, 0, 0, 7), INDEX, (4, 4, 99, -3))
    args[3][1:3] = torch.tensor([2**31 - 1, -5])
    args[2][0, 0] = -1  # the slots that the first request would fill
    args[2][2, 0] = 10**9
    check(backend, args, options)


def test_empty_calls(backend):
    args, options = make((4,), [[1, 2]], (2,))
    check(backend, [[], [], *args[2:]], options)
    check(backend, [*args[:4], args[4][:, :0].contiguous(), args[5]], options)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_fuzz(data):
    batch = data.draw(st.integers(1, 3))
    count = data.draw(st.integers(1, 6))
    values = st.integers(-2, 20)
    index = data.draw(
        st.lists(st.lists(values, min_size=count, max_size=count), min_size=batch, max_size=batch)
    )
    counts = data.draw(st.lists(st.integers(-1, count + 1), min_size=batch, max_size=batch))
    lens = data.draw(st.lists(st.integers(0, 30), min_size=batch, max_size=batch))
    layout = data.draw(st.sampled_from(["NHD", "HND"]))
    args, options = make(
        lens, index, counts, page=data.draw(st.integers(1, 9)), dim=8, layout=layout
    )
    expected, given_ = copy(args, "cpu"), copy(args, "cpu")
    kv_compact(*expected, **options)
    ops.kv_compact(*given_, **options)
    for a, b in zip(expected[0] + expected[1], given_[0] + given_[1]):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize(
    "position,change,message",
    [
        (1, lambda v: v[:1], "v_caches must have as many layers as k_caches, 2, got 1"),
        (0, lambda k: [k[0], k[1][:2]], r"k_caches\[1\] must have the shape and dtype of"),
        (1, lambda v: [v[0], v[1].half()], r"v_caches\[1\] must have the shape and dtype of"),
        (1, lambda v: [v[0], v[1].transpose(1, 2).contiguous().transpose(1, 2)], "the strides of"),
        (2, lambda t: t.long(), "block_table must have dtype Int"),
        (3, lambda t: t[:1], r"cache_lens must have shape \[B=2\]"),
        (4, lambda t: t.float(), "accept_index must have dtype Int or Long"),
        (5, lambda t: t.long(), "accept_lens must have dtype Int"),
    ],
)
def test_bad_metadata_is_named(position, change, message):
    args, options = make((3, 4), [[0, 2], [1, 2]], (2, 2))
    args[position] = change(args[position])
    with pytest.raises(RuntimeError, match=message):
        ops.kv_compact(*args, **options)


def test_opcheck_and_compile():
    args, _ = make((3, 4), [[0, 2], [1, 2]], (2, 2))
    torch.library.opcheck(torch.ops.mtp.kv_compact, tuple(args))
    compiled = torch.compile(ops.kv_compact, fullgraph=True, backend="aot_eager")
    eager, traced = copy(args, "cpu"), copy(args, "cpu")
    ops.kv_compact(*eager)
    compiled(*traced)
    for a, b in zip(eager[0] + eager[1], traced[0] + traced[1]):
        assert torch.equal(a, b)
