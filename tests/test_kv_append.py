import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import FP8, bits, make_case, poison

from mtp_ext import ops
from mtp_ext.reference.kv_append import kv_append

CASES = {
    "plain": {},
    "hnd": dict(layout="HND"),
    "f32": dict(dtype=torch.float32),
    "f16-page1": dict(dtype=torch.float16, page=1),
    "page3": dict(page=3, dim=80),
    "page64-dim8": dict(page=64, dim=8),
    "dim256": dict(dim=256, heads=(3, 3), layout="HND"),
    "ragged": dict(lens=(0, 100, 7, 0, 63), q_lens=(7, 1, 0, 5, 2)),
    "padded": dict(padding=5),
    "fp8": dict(cache_dtype=FP8),
    "fp8-scale": dict(cache_dtype=FP8, k_scale=torch.tensor([0.25]), v_scale=torch.tensor([3.0])),
    "fp8-scales": dict(
        cache_dtype=FP8, layout="HND", dtype=torch.float16,
        k_scale=torch.tensor([0.02, 1.7]), v_scale=torch.tensor([0.3, 0.001]),
    ),
    "fp8-f32": dict(cache_dtype=FP8, dtype=torch.float32, k_scale=torch.tensor([0.37])),
}  # fmt: skip


def check(backend, case):
    expected, given_ = case.on("cpu"), case.on(backend.device)
    kv_append(*expected.append_args, **expected.append_options)
    backend.ops.kv_append(*given_.append_args, **given_.append_options)
    assert torch.equal(bits(given_.k_cache.cpu()), bits(expected.k_cache))
    assert torch.equal(bits(given_.v_cache.cpu()), bits(expected.v_cache))


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(backend, name):
    case = make_case(**CASES[name])
    check(backend, case)
    check(backend, poison(case))


def test_every_fp8_rounding(backend):
    """All f16 values and the midpoints of e4m3 go where round-to-nearest-even sends them."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    values = values[values.isfinite()]
    values = torch.cat([values, values[: -len(values) % 64]]).view(-1, 1, 64)
    case = make_case((0,), (len(values),), (1, 1), 64, 16, dtype=torch.float16, cache_dtype=FP8)
    case.k, case.v = values, values.flip(0)
    check(backend, case)


def test_faults_write_nothing(backend):
    case = make_case((30, 3, 0, 0), (4, 5, 3, 2), page=4, spare_pages=0)
    case.cache_lens[2:] = torch.tensor([2**31 - 2, -7])
    case = case.change(block_table=case.block_table[:, :9].contiguous())
    case.block_table[0, 8] = case.k_cache.shape[0]  # positions 32, 33 of the first request
    case.block_table[1, 1] = -1  # positions 4..7 of the second
    check(backend, case)


@pytest.mark.parametrize("offsets", [[3, 5, 2, 9], [0, 100, 100, 100], [-4, 2, 1, 8], [0, 0, 0, 0]])
def test_bad_offsets_are_clamped(backend, offsets):
    case = make_case((5, 0, 9), (4, 2, 2))
    check(backend, case.change(cu_q_lens=torch.tensor(offsets, dtype=torch.int32)))


def test_strided_rows(backend):
    case = make_case((9, 4), (3, 2), (4, 2), 64)
    fused = torch.randn(5, 8, 64).bfloat16()
    caches = torch.randn(case.k_cache.shape[0], 2, 16, 2, 64).bfloat16()
    table = torch.cat([case.block_table, case.block_table], 1)[:, : case.block_table.shape[1]]
    expected, given_ = (
        case.change(
            k=fused[:, 4:6], v=fused[:, 6:], k_cache=c[:, 0], v_cache=c[:, 1], block_table=table
        )
        for c in (caches.clone(), caches.clone())
    )
    kv_append(*expected.append_args)
    backend.ops.kv_append(*(t.to(backend.device) for t in given_.append_args))
    if backend.device == "cpu":
        assert torch.equal(given_.k_cache, expected.k_cache)
        assert torch.equal(given_.v_cache, expected.v_cache)


def test_empty_calls(backend):
    check(backend, make_case((), (), padding=3))
    check(backend, make_case((4, 5), (0, 0)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_fuzz(data):
    batch = data.draw(st.integers(0, 4))
    draw_many = lambda low, high: tuple(  # noqa: E731
        data.draw(st.lists(st.integers(low, high), min_size=batch, max_size=batch))
    )
    case = make_case(
        draw_many(0, 70), draw_many(0, 6),
        heads=(3, data.draw(st.sampled_from([1, 3]))), dim=data.draw(st.sampled_from([8, 24, 64])),
        page=data.draw(st.integers(1, 20)), layout=data.draw(st.sampled_from(["NHD", "HND"])),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        cache_dtype=data.draw(st.sampled_from([None, FP8])), padding=data.draw(st.integers(0, 3)),
    )  # fmt: skip
    if case.block_table.numel():
        column = data.draw(st.integers(0, case.block_table.shape[1] - 1))
        case.block_table[0, column] = data.draw(st.integers(-3, case.k_cache.shape[0] + 3))
    expected, given_ = case.on("cpu"), case.on("cpu")
    kv_append(*expected.append_args, **expected.append_options)
    ops.kv_append(*given_.append_args, **given_.append_options)
    # A damaged table may name one page twice: then either row may be the last one written.
    if len(set(case.block_table.flatten().tolist())) == case.block_table.numel():
        assert torch.equal(bits(given_.k_cache), bits(expected.k_cache))
        assert torch.equal(bits(given_.v_cache), bits(expected.v_cache))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: dict(k=c.k.long()), "k must have dtype"),
        (lambda c: dict(v=c.v.float()), "v must have dtype BFloat16, got Float"),
        (lambda c: dict(v=c.v[:1]), r"v must have shape \[T=5, Hkv=2, D=64\], got"),
        (lambda c: dict(k=c.k[..., ::2]), "v must have shape|k must be contiguous in its last"),
        (lambda c: dict(k_cache=c.k_cache.half()), "k_cache must have dtype"),
        (lambda c: dict(v_cache=c.v_cache[:2]), "v_cache must have the shape and dtype of k_cache"),
        (lambda c: dict(v_cache=c.v_cache.to(FP8)), "v_cache must have the shape and dtype of k_c"),
        (lambda c: dict(block_table=c.block_table.long()), "block_table must have dtype Int"),
        (lambda c: dict(cache_lens=c.cache_lens[:2]), r"cache_lens must have shape \[B=3\]"),
        (lambda c: dict(cu_q_lens=c.cu_q_lens[:3]), r"cu_q_lens must have shape \[B\+1=4\]"),
        (lambda c: dict(options=dict(layout="HDN")), 'layout must be "NHD" or "HND", got "HDN"'),
        (lambda c: dict(options=dict(k_scale=torch.ones(1))), "k_scale needs a cache of dtype"),
    ],
)
def test_bad_metadata_is_named(change, message):
    case = make_case()
    case = case.change(**change(case))
    with pytest.raises(RuntimeError, match=message):
        ops.kv_append(*case.append_args, **case.append_options)


def test_head_dim_is_checked():
    case = make_case(dim=12)
    with pytest.raises(RuntimeError, match="D must be a multiple of 8 from 8 to 256, got 12"):
        ops.kv_append(*case.append_args)


@pytest.mark.parametrize("cache_dtype", [None, FP8])
def test_opcheck_and_compile(cache_dtype):
    case = make_case(cache_dtype=cache_dtype)
    if cache_dtype is None:
        torch.library.opcheck(torch.ops.mtp.kv_append, case.append_args)
    compiled = torch.compile(ops.kv_append, fullgraph=True, backend="aot_eager")
    eager, traced = case.on("cpu"), case.on("cpu")
    ops.kv_append(*eager.append_args)
    compiled(*traced.append_args)
    assert torch.equal(bits(eager.k_cache), bits(traced.k_cache))
    assert torch.equal(bits(eager.v_cache), bits(traced.v_cache))
