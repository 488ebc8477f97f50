import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import FP8, Case, bits, make_case, nhd, poison

from mtp_ext import ops
from mtp_ext.reference.kv_append import decode, encode, row_ranges
from mtp_ext.reference.verify_attention import verify_attention_f64


def run(backend, case: Case) -> tuple[torch.Tensor, torch.Tensor, Case]:
    """out, lse and the case with its caches as the operator left them."""
    case = case.on(backend.device)
    out, lse = backend.ops.verify_attention(*case.attention_args, **case.options)
    return out.cpu(), lse.cpu(), case.on("cpu")


def eager(case: Case) -> torch.Tensor:
    """The same in q's dtype, as a user would write it: gather, mask, softmax. Call on a copy."""
    o = {"softcap": 0.0, "window": -1, "layout": "NHD"} | case.options
    dtype, layout = case.q.dtype, o["layout"]
    out = torch.zeros_like(case.q)
    group = case.q.shape[1] // case.k.shape[1]
    scale = o.get("scale") or case.q.shape[2] ** -0.5
    for b, span in enumerate(row_ranges(case.cu_q_lens, case.q.shape[0])):
        span = span[: case.max_q_len]
        n, length = len(span), int(case.cache_lens[b])
        rows = slice(span.start, span.stop)
        slots = case.slots(b, 0, length)

        def keys_of(cache, new, name, rows=rows, slots=slots):
            fresh = encode(new[rows], cache.dtype, o.get(name))
            both = torch.cat([nhd(cache, layout)[slots].float(), fresh.float()])
            return decode(both, o.get(name)).to(dtype).repeat_interleave(group, 1)

        k, v = keys_of(case.k_cache, case.k, "k_scale"), keys_of(case.v_cache, case.v, "v_scale")
        depth, sees = torch.arange(n), torch.ones(n, n, dtype=torch.bool).tril()
        if o.get("tree_mask") is not None:
            sees = (o["tree_mask"][rows][:, None] >> torch.arange(n) & 1).bool()
            depth = sees.sum(1) - 1
        visible = torch.cat([torch.ones(n, length, dtype=torch.bool), sees], 1)
        if o["window"] > 0:
            position = torch.cat([torch.arange(length), length + depth])
            visible &= position > (length + depth)[:, None] - o["window"]
        scores = torch.einsum("qhd,khd->hqk", case.q[rows], k) * scale
        if o["softcap"]:
            scores = o["softcap"] * torch.tanh(scores / o["softcap"])
        scores = scores.masked_fill(~visible, -math.inf)
        if o.get("sinks") is not None:
            sink = o["sinks"].to(dtype)[:, None, None].expand(-1, n, 1)
            p = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            p = scores.softmax(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", p.nan_to_num(0.0), v)
    return out


def check(backend, case: Case, against_eager: bool = True) -> None:
    expected = case.on("cpu")
    out, lse, after = run(backend, case)
    true_out, true_lse = verify_attention_f64(*expected.attention_args, **expected.options)
    assert torch.equal(bits(after.k_cache), bits(expected.k_cache))
    assert torch.equal(bits(after.v_cache), bits(expected.v_cache))
    error = (out.double() - true_out).abs().max().item() if out.numel() else 0.0
    top = true_out.abs().max().item() if out.numel() else 0.0
    if against_eager:
        allowed = 2 * (eager(case.on("cpu")).double() - true_out).abs().max().item()
    else:
        allowed = 2 * torch.finfo(case.q.dtype).eps * top
    assert error <= allowed + 1e-6 * max(1.0, top)
    finite = true_lse.isfinite()
    assert torch.equal(lse[~finite].double(), true_lse[~finite])
    assert ((lse - true_lse)[finite].abs() <= 1e-5 + 2e-6 * true_lse[finite].abs()).all()


def chain_tree(q_lens) -> torch.Tensor:
    return torch.tensor([(2 << i) - 1 for n in q_lens for i in range(n)], dtype=torch.int64)


# Two requests: a chain with two ends, and a root with four leaves.
TREE = torch.tensor([0b1, 0b11, 0b111, 0b1011, 0b1, 0b11, 0b101, 0b1001, 0b10001])
SCALES = dict(k_scale=torch.tensor([0.05, 1.5]), v_scale=torch.tensor([2.0, 0.11]))

CASES = {
    "plain": {},
    "f16": dict(dtype=torch.float16),
    "hnd": dict(layout="HND"),
    "mha-odd": dict(heads=(3, 3), q_lens=(1, 3, 2), page=3),
    "group3": dict(heads=(9, 3), q_lens=(4, 1, 1), page=1),
    "group5": dict(heads=(5, 1), dim=80, lens=(70,), q_lens=(3,)),
    "group7": dict(heads=(14, 2), lens=(65,), q_lens=(2,), dim=128),
    "group16": dict(heads=(16, 1), lens=(65, 3), q_lens=(2, 4)),
    "dim80": dict(dim=80, layout="HND", page=3),
    "dim96": dict(dim=96),
    "dim128": dict(dim=128, page=64),
    "dim192": dict(dim=192, q_lens=(2, 1, 0)),
    "dim256": dict(dim=256, q_lens=(2, 1, 0), layout="HND"),
    "q8": dict(lens=(60, 64), q_lens=(8, 8), heads=(8, 2)),
    "q17": dict(lens=(20,), q_lens=(17,), heads=(4, 1)),
    "q64": dict(lens=(31,), q_lens=(64,), heads=(1, 1)),
    "rows21": dict(lens=(40,), q_lens=(7,), heads=(9, 3)),
    "mha56-dim72": dict(lens=(9,), q_lens=(1,), heads=(56, 56), dim=72),
    "no-context": dict(lens=(0, 0), q_lens=(1, 5)),
    "ragged": dict(lens=(0, 130, 7, 0, 63, 64, 65), q_lens=(7, 1, 0, 5, 2, 1, 4)),
    "padded": dict(padding=5),
    "scale": dict(scale=0.3),
    "negative-scale": dict(scale=-0.2),
    "window1": dict(window=1),
    "window7": dict(window=7, lens=(90, 3, 64), q_lens=(5, 2, 3)),
    "window64": dict(window=64, lens=(200, 3, 64), q_lens=(5, 2, 3), page=3),
    "softcap": dict(softcap=2.0),
    "sinks": dict(sinks=torch.tensor([0.5, -3.0, 4.0, 0.0])),
    "tree": dict(tree_mask=TREE, lens=(37, 62), q_lens=(4, 5)),
    "tree-window": dict(tree_mask=TREE, lens=(37, 62), q_lens=(4, 5), window=3),
    "fp8": dict(cache_dtype=FP8),
    "fp8-scale": dict(cache_dtype=FP8, k_scale=torch.tensor([0.5]), v_scale=torch.tensor([3.0])),
    "fp8-scales": dict(cache_dtype=FP8, dtype=torch.float16, layout="HND", dim=128, **SCALES),
    "fp8-tree": dict(
        cache_dtype=FP8, tree_mask=TREE, lens=(37, 62), q_lens=(4, 5), page=3, **SCALES
    ),
    "everything": dict(
        tree_mask=TREE, lens=(37, 62), q_lens=(4, 5), window=9, softcap=5.0, cache_dtype=FP8,
        sinks=torch.tensor([0.5, -3.0, 4.0, 0.0]), layout="HND", page=3, **SCALES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(backend, name):
    check(backend, make_case(**CASES[name]))


F32_CASES = {
    "plain": {},
    "dim8": dict(dim=8, heads=(3, 1)),
    "dim24-softcap": dict(dim=24, softcap=1.5, page=5),
    "dim72-hnd": dict(dim=72, layout="HND", page=3),
    "dim256": dict(dim=256, heads=(2, 1)),
    "group11": dict(heads=(22, 2), q_lens=(8, 2, 1)),
    "group67": dict(heads=(67, 1), q_lens=(2, 1, 0)),
    "window-softcap-sinks": dict(window=11, softcap=3.0, sinks=torch.tensor([1.0, -1.0, 0.0, 9.0])),
    "fp8": dict(cache_dtype=FP8, dim=40, **SCALES),
    "prefill": dict(lens=(0, 33), q_lens=(150, 70), heads=(3, 1)),
}


@pytest.mark.parametrize("name", F32_CASES)
def test_f32(backend, name):
    if backend.name != "cpu":
        case = make_case(dtype=torch.float32)
        with pytest.raises(RuntimeError, match="q must have dtype Half or BFloat16, got Float"):
            run(backend, case)
        return
    check(backend, make_case(**F32_CASES[name], dtype=torch.float32))


# Steps of several tiles: rows of all groups of sixteen, and keys that only some tiles hide.
LONG_CASES = {
    "rows68": dict(lens=(300,), q_lens=(17,), heads=(4, 1)),
    "rows36-dim96": dict(lens=(250,), q_lens=(9,), heads=(4, 1), dim=96),
    "window": dict(lens=(300, 131), q_lens=(6, 3), heads=(6, 2), window=150),
    "tree": dict(lens=(150, 126), q_lens=(4, 5), tree_mask=TREE),
    "fp8-new-tiles": dict(lens=(120,), q_lens=(40,), heads=(2, 1), cache_dtype=FP8, window=70),
}


@pytest.mark.parametrize("name", LONG_CASES)
def test_long_contexts(backend, name):
    check(backend, make_case(**LONG_CASES[name]))


def test_several_splits(backend):
    lens = (2100, 5) if backend.name != "ptxsim" else (1030, 5)
    case = make_case(lens, (3, 1), heads=(2, 1), page=64)
    check(backend, case)
    check(backend, case.change(options=case.options | dict(window=1015)))


def test_large_scores_saturate(backend):
    """Differences of hundreds between scores: p is 0 or 1, and nothing overflows."""
    case = make_case(scale=20.0, dtype=torch.float16)
    check(backend, case)
    out, lse, _ = run(backend, case)
    assert out.isfinite().all() and lse.isfinite().all()


# ---- the row promise -----------------------------------------------------------------------------


def one_by_one(backend, case: Case, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Request b alone, one new token per call, each call appending for the next."""
    begin, end = case.cu_q_lens[b : b + 2].tolist()
    k_cache, v_cache = case.k_cache.clone(), case.v_cache.clone()
    results = []
    for i, t in enumerate(range(begin, end)):
        step = case.change(
            q=case.q[t : t + 1],
            k=case.k[t : t + 1],
            v=case.v[t : t + 1],
            k_cache=k_cache,
            v_cache=v_cache,
            block_table=case.block_table[b : b + 1],
            cache_lens=case.cache_lens[b : b + 1] + i,
            cu_q_lens=torch.tensor([0, 1], dtype=torch.int32),
            max_q_len=1,
        )
        out, lse, after = run(backend, step)
        k_cache, v_cache = after.k_cache, after.v_cache
        results.append((out, lse))
    return torch.cat([r[0] for r in results]), torch.cat([r[1] for r in results])


ROW_CASES = {
    "bf16": dict(lens=(61, 3), q_lens=(5, 2), heads=(6, 2)),
    "f16-d128": dict(lens=(63, 126), q_lens=(2, 3), heads=(4, 1), dim=128, dtype=torch.float16),
    "wide": dict(lens=(30, 9), q_lens=(9, 1), heads=(8, 1)),
    "fp8": dict(lens=(61, 3), q_lens=(5, 2), cache_dtype=FP8, **SCALES),
    "window": dict(lens=(61, 200), q_lens=(5, 4), window=40),
    "sinks-softcap": dict(
        lens=(61, 3), q_lens=(5, 2), softcap=4.0, sinks=torch.tensor([0.1, 0.2, 0.3, 0.4])
    ),
    "dim80": dict(lens=(61, 3), q_lens=(5, 2), dim=80),
}


@pytest.mark.parametrize("name", ROW_CASES)
def test_rows_are_equal_alone_and_together(backend, name):
    case = make_case(**ROW_CASES[name])
    out, lse, _ = run(backend, case)
    for b in range(len(case.cache_lens)):
        rows = slice(*case.cu_q_lens[b : b + 2].tolist())
        alone_out, alone_lse = one_by_one(backend, case, b)
        assert torch.equal(out[rows], alone_out)
        assert torch.equal(lse[rows], alone_lse)


def test_rows_across_a_split(backend):
    case = make_case((1022,), (4,), heads=(2, 1), page=32)
    out, lse, _ = run(backend, case)
    alone_out, alone_lse = one_by_one(backend, case, 0)
    assert torch.equal(out, alone_out) and torch.equal(lse, alone_lse)


def test_a_chain_shaped_tree_is_a_chain(backend):
    case = make_case((37, 62), (4, 6))
    mask = chain_tree((4, 6)) | (-1 << 6)  # bits past the request's rows are ignored
    mask[:4] |= 0b110000
    tree = case.change(options=case.options | dict(tree_mask=mask))
    out, lse, _ = run(backend, case)
    tree_out, tree_lse, _ = run(backend, tree)
    assert torch.equal(out, tree_out) and torch.equal(lse, tree_lse)


def repage(case: Case, page: int, layout: str) -> Case:
    """The same cached tokens in pages of another size and layout."""
    batch = len(case.cache_lens)
    columns = -(-(int(case.cache_lens.max()) + case.max_q_len) // page)
    pages = batch * columns
    kv_heads, dim = case.k.shape[1:]
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(page)).view(batch, -1)
    moved = case.change(
        k_cache=torch.zeros(pages, page, kv_heads, dim, dtype=case.k_cache.dtype),
        v_cache=torch.zeros(pages, page, kv_heads, dim, dtype=case.k_cache.dtype),
        block_table=table.int(),
        options=case.options | dict(layout="NHD"),
    )
    old_layout = case.options["layout"]
    for b, length in enumerate(case.cache_lens.tolist()):
        to, frm = moved.slots(b, 0, length), case.slots(b, 0, length)
        moved.k_cache[to] = nhd(case.k_cache, old_layout)[frm]
        moved.v_cache[to] = nhd(case.v_cache, old_layout)[frm]
    if layout == "HND":
        moved.k_cache = moved.k_cache.transpose(1, 2).contiguous()
        moved.v_cache = moved.v_cache.transpose(1, 2).contiguous()
        moved.options["layout"] = "HND"
    return moved


@pytest.mark.parametrize("page,layout", [(1, "NHD"), (3, "HND"), (64, "NHD"), (100, "HND")])
def test_pages_and_layouts_do_not_matter(backend, page, layout):
    case = make_case((70, 33), (3, 2))
    out, lse, _ = run(backend, case)
    paged_out, paged_lse, _ = run(backend, repage(case, page, layout))
    assert torch.equal(out, paged_out) and torch.equal(lse, paged_lse)


def test_threads_do_not_matter():
    """With one thread a worker walks all splits, with four each split is an item of its own."""
    case = make_case((5000, 700), (5, 2), heads=(6, 2), page=32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            results.append(ops.verify_attention(*case.on("cpu").attention_args, **case.options))
    finally:
        torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_is_deterministic(backend):
    case = make_case((130, 7), (4, 3), heads=(8, 2))
    first, second = run(backend, case), run(backend, case)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


# ---- what must not be read, and what must not be written -----------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(layout="HND", page=3),
        dict(cache_dtype=FP8),
        dict(window=9, page=4),
        dict(tree_mask=torch.cat([TREE, TREE[:2]]), lens=(37, 62), q_lens=(4, 5), padding=2),
        dict(padding=4, dim=80),
    ],
)
def test_poison_stays_out(backend, options):
    """NaN in slots without a token, in padded rows and, past the pages in use, garbage ids."""
    clean = make_case(**options)
    dirty = poison(clean)
    out, lse, _ = run(backend, clean)
    dirty_out, dirty_lse, after = run(backend, dirty)
    assert torch.equal(out, dirty_out) and torch.equal(lse, dirty_lse)
    expected = dirty.on("cpu")
    verify_attention_f64(*expected.attention_args, **expected.options)
    assert torch.equal(bits(after.k_cache), bits(expected.k_cache))
    assert torch.equal(bits(after.v_cache), bits(expected.v_cache))


def test_pages_before_the_window_are_not_read(backend):
    case = make_case((100,), (3,), page=4, window=10)
    out, lse, _ = run(backend, case)
    unread = (100 - 10 + 1) // 4
    case.block_table[0, :unread] = 2**31 - 1
    again, lse_again, _ = run(backend, case)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


@pytest.mark.parametrize("lens", [(37, 62), (150, 126)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_token_spoils_only_rows_that_see_it(backend, value, lens):
    clean = make_case(lens, (4, 5), tree_mask=TREE)
    bad = clean.on("cpu")
    bad.k[6] = value  # the second request's token 2: seen by itself only
    bad.v[6] = value
    bad.v[2, :, 5] = value  # the first request's token 2, one element: seen by itself only
    out, lse, _ = run(backend, clean)
    bad_out, bad_lse, _ = run(backend, bad)
    others = [0, 1, 3, 4, 5, 7, 8]
    assert torch.equal(bad_out[others], out[others])
    assert torch.equal(bad_lse[others], lse[others])
    assert bad_out[6].isnan().all()
    assert not bad_out[2, :, 5].isfinite().any()
    assert torch.equal(bad_out[2, :, :5], out[2, :, :5])


@pytest.mark.parametrize("batch", [1, 16])  # splits side by side, and one after the other
def test_a_split_of_nan_is_not_an_empty_one(backend, batch):
    """Keys of 1024 positions are NaN, later ones are not: the rows that see them are NaN."""
    if backend.name == "ptxsim" and batch > 1:
        pytest.skip("takes the simulator minutes")
    case = make_case((1030,) * batch, (2,) * batch, heads=(2, 1), page=64)
    pages, offsets = case.slots(0, 0, 1024)
    case.k_cache[pages, offsets] = math.nan
    out, lse, _ = run(backend, case)
    assert out[:2].isnan().all() and lse[:2].isnan().all()
    assert out[2:].isfinite().all() and lse[2:].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_key_outside_the_window_spoils_nothing(backend, value):
    case = make_case((50,), (4,), window=8)
    out, lse, _ = run(backend, case)
    page, slot = (x[0] for x in case.slots(0, 44, 45))  # visible to rows 0 and 1
    case.k_cache[page, slot] = value
    case.v_cache[page, slot] = value
    bad_out, bad_lse, _ = run(backend, case)
    assert torch.equal(bad_out[2:], out[2:]) and torch.equal(bad_lse[2:], lse[2:])
    assert bad_out[:2].isnan().all()


def test_faulty_tables_hide_keys(backend):
    case = make_case((30, 19, 0, 0), (4, 5, 3, 2), heads=(4, 2), page=4)
    case.cache_lens[2:] = torch.tensor([2**31 - 9, -7])
    case = case.change(block_table=case.block_table[:, :8].contiguous())
    case.block_table[0, 2] = case.k_cache.shape[0]  # cached keys of the first request
    case.block_table[1, 5] = -1  # new tokens 1..4 of the second, which end in it
    expected = case.on("cpu")
    out, lse, after = run(backend, case)
    true_out, true_lse = verify_attention_f64(*expected.attention_args, **expected.options)
    assert (out.double() - true_out).abs().max() < 0.02
    assert (lse - true_lse).abs().max() < 1e-4
    assert torch.equal(bits(after.k_cache), bits(expected.k_cache))
    assert torch.equal(bits(after.v_cache), bits(expected.v_cache))


def test_nothing_visible(backend):
    """All pages are faulty: an empty row, or all of the probability in the sink."""
    case = make_case((9, 4), (2, 1))
    case.block_table[:] = -1
    out, lse, _ = run(backend, case)
    assert (out == 0).all() and (lse == -math.inf).all()
    sinks = torch.tensor([0.5, -3.0, 4.0, 0.0])
    out, lse, _ = run(backend, case.change(options=case.options | dict(sinks=sinks)))
    assert (out == 0).all() and torch.allclose(lse, sinks.expand_as(lse))


def test_rows_behind_max_q_len_are_padding(backend):
    case = make_case((20, 5), (6, 3), tree_mask=chain_tree((6, 3)))
    check(backend, case.change(max_q_len=4), against_eager=False)
    out, lse, _ = run(backend, case.change(max_q_len=4))
    assert (out[4:6] == 0).all() and (lse[4:6] == -math.inf).all()
    out, lse, after = run(backend, case.change(max_q_len=0))
    assert (out == 0).all() and (lse == -math.inf).all()
    assert torch.equal(after.k_cache, case.k_cache)


@pytest.mark.parametrize("offsets", [[3, 5, 2, 9], [0, 100, 100, 100], [-4, 2, 1, 8], [0, 0, 0, 0]])
def test_bad_offsets_are_clamped(backend, offsets):
    case = make_case((5, 0, 9), (4, 2, 2)).change(max_q_len=8)
    check(
        backend,
        case.change(cu_q_lens=torch.tensor(offsets, dtype=torch.int32)),
        against_eager=False,
    )


@pytest.mark.parametrize("lens,q_lens,padding", [((), (), 3), ((), (), 0), ((4, 9), (0, 0), 0),
                                                 ((4, 9), (0, 0), 2), ((0,), (0,), 1)])  # fmt: skip
def test_empty_calls(backend, lens, q_lens, padding):
    case = make_case(lens, q_lens, padding=padding)
    out, lse, after = run(backend, case)
    assert out.shape == case.q.shape and lse.shape == case.q.shape[:2]
    assert (out == 0).all() and (lse == -math.inf).all()
    assert torch.equal(after.k_cache, case.k_cache)


def test_a_wrong_mask_would_show(backend):
    """Each key's value is a power of two of its own, scores are equal: out names the keys seen."""
    case = make_case((8, 11), (4, 5), heads=(2, 1), dtype=torch.float16, tree_mask=TREE)
    case.q.zero_()
    for b, length in enumerate((8, 11)):
        slots = case.slots(b, 0, length)
        case.v_cache[slots] = 0.0
    case.v.zero_()
    for t in range(9):
        case.v[t, :, t] = 64.0
    out, _, _ = run(backend, case)
    for t in range(9):
        first, length = (0, 8) if t < 4 else (4, 11)
        seen = [first + j for j in range(5) if TREE[t] >> j & 1]
        row = torch.zeros(64)
        row[seen] = 64.0 / (length + len(seen))
        assert torch.allclose(out[t].float(), row.expand(2, -1), rtol=1e-3)


def test_window_slides_by_depth_under_a_tree(backend):
    case = make_case((37, 62), (4, 5), tree_mask=TREE, window=2, dtype=torch.float16)
    check(backend, case)
    _, lse, _ = run(backend, case.change(q=torch.zeros_like(case.q)))
    # Two keys each: the row's own token and its parent (or, for a root, the last cached key).
    assert torch.allclose(lse, torch.full_like(lse, math.log(2.0)))


# ---- metadata ------------------------------------------------------------------------------------


def test_strided_rows(backend):
    case = make_case((9, 4), (3, 2), (4, 2), 64)
    fused = torch.randn(5, 8, 64).bfloat16()
    strided = case.change(q=fused[:, :4], k=fused[:, 4:6], v=fused[:, 6:])
    dense = case.change(q=strided.q.clone(), k=strided.k.clone(), v=strided.v.clone())
    device_fused = fused.to(backend.device)
    given_ = strided.on(backend.device).change(
        q=device_fused[:, :4], k=device_fused[:, 4:6], v=device_fused[:, 6:]
    )
    out, lse = backend.ops.verify_attention(*given_.attention_args)
    dense_out, dense_lse, after = run(backend, dense)
    assert torch.equal(out.cpu(), dense_out) and torch.equal(lse.cpu(), dense_lse)
    assert torch.equal(given_.k_cache.cpu(), after.k_cache)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda c: dict(q=c.q.half()), "q must have dtype BFloat16, got Half"),
        (lambda c: dict(q=c.q[:2]), r"q must have shape \[T=5, Hq, D=64\], got \[2, 4, 64\]"),
        (lambda c: dict(q=c.q[:, :3]), "q must have a multiple of k's heads, 2, got 3"),
        (lambda c: dict(q=c.q.mT.contiguous().mT), "q must be contiguous in its last dimension"),
        (lambda c: dict(k=c.k.mT.contiguous().mT), "k must be contiguous in its last dimension"),
        (lambda c: dict(max_q_len=-1), "max_q_len must not be negative, got -1"),
        (lambda c: dict(options=dict(window=0)), "window must be -1 or at least 1, got 0"),
        (lambda c: dict(options=dict(softcap=-1.0)), "softcap must be finite and not negative"),
        (lambda c: dict(options=dict(sinks=torch.ones(3))), r"sinks must have shape \[Hq=4\]"),
        (lambda c: dict(options=dict(tree_mask=torch.ones(5))), "tree_mask must have dtype Long"),
        (
            lambda c: dict(max_q_len=65, options=dict(tree_mask=torch.ones(5).long())),
            "max_q_len must be at most 64 with a tree_mask, got 65",
        ),
        (lambda c: dict(options=dict(v_scale=torch.ones(1))), "v_scale needs a cache of dtype"),
        (lambda c: dict(k_cache=c.k_cache[0]), "k_cache must have shape"),
        (lambda c: dict(options=dict(layout="nhd")), "layout must be"),
    ],
)
def test_bad_metadata_is_named(change, message):
    case = make_case()
    case = case.change(**change(case))
    with pytest.raises(RuntimeError, match=message):
        ops.verify_attention(*case.attention_args, **case.options)


@pytest.mark.parametrize("options", [{}, dict(tree_mask=TREE, lens=(37, 62), q_lens=(4, 5))])
def test_opcheck_and_compile(options):
    case = make_case(**options)
    torch.library.opcheck(torch.ops.mtp.verify_attention, case.attention_args, case.options)
    compiled = torch.compile(ops.verify_attention, fullgraph=True, backend="aot_eager")
    eager_case, traced = case.on("cpu"), case.on("cpu")
    expected = ops.verify_attention(*eager_case.attention_args, **eager_case.options)
    got = compiled(*traced.attention_args, **traced.options)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
    assert torch.equal(eager_case.k_cache, traced.k_cache)


# ---- on the simulator ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_warps(backend, simulator, seed):
    case = make_case(**CASES["everything"])
    out, lse, _ = run(backend, case)
    with simulator.record(seed=seed):
        again, lse_again, _ = run(backend, case)
    assert torch.equal(out, again) and torch.equal(lse, lse_again)


COUNTED = {
    "q1": dict(lens=(200, 70), q_lens=(1, 1), heads=(8, 2), dim=128),
    "q8": dict(lens=(200, 70), q_lens=(8, 8), heads=(8, 2), dim=128),
    "64-rows": dict(lens=(200,), q_lens=(16,), heads=(4, 1), page=64, layout="HND"),
    "dim80": dict(lens=(150,), q_lens=(4,), heads=(2, 1), dim=80, page=3),
    "dim192": dict(lens=(100,), q_lens=(4,), heads=(2, 1), dim=192),
    "fp8": dict(lens=(150,), q_lens=(4,), heads=(2, 1), dim=128, cache_dtype=FP8),
    "splits": dict(lens=(1030,), q_lens=(4,), heads=(2, 1)),
    "window": dict(lens=(256,), q_lens=(4,), heads=(2, 1), window=64),
}


@pytest.mark.parametrize("name", COUNTED)
def test_each_key_is_loaded_once(backend, simulator, name):
    """Bytes loaded over the floor, whatever q_len is; no bank conflict anywhere."""
    case = make_case(**COUNTED[name])
    with simulator.record() as launches:
        run(backend, case)
    window = case.options.get("window", 10**9)
    # A window is read in whole tiles of 64 keys.
    keys = sum(min(n, -(-(window + m) // 64) * 64 + 64) for n, m in zip(
        case.cache_lens.tolist(), case.cu_q_lens.diff().tolist()))  # fmt: skip
    floor = keys * case.k.shape[1] * case.k.shape[2] * case.k_cache.element_size()
    for cache in ("k_cache", "v_cache"):
        assert launches[0].loaded_bytes(cache) <= 1.02 * floor
        assert launches[0].sector_efficiency(cache) == 1.0
    assert sum(launch.bank_conflicts for launch in launches) == 0
    assert len(launches) == (2 if case.block_table.shape[1] * case.page_size > 1024 else 1)


# ---- fuzz ----------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_fuzz(data):
    draw = data.draw
    batch = draw(st.integers(0, 4))
    lens = tuple(draw(st.integers(0, 90)) for _ in range(batch))
    q_lens = tuple(draw(st.integers(0, 9)) for _ in range(batch))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    padding = draw(st.integers(0, 3))
    cache_dtype = draw(st.sampled_from([None, FP8]))
    options = {
        "window": draw(st.sampled_from([-1, -1, 1, 5, 40])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.5])),
    }
    if draw(st.booleans()):
        options["sinks"] = torch.randn(kv_heads * group)
    if draw(st.booleans()):
        g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        size = (sum(q_lens) + padding,)
        options["tree_mask"] = torch.randint(-(2**63), 2**63 - 1, size, generator=g)
    if cache_dtype is not None and draw(st.booleans()):
        options["k_scale"] = torch.rand(1) + 0.1
        options["v_scale"] = torch.rand(kv_heads) + 0.1
    case = make_case(
        lens, q_lens, heads=(kv_heads * group, kv_heads),
        dim=draw(st.sampled_from([8, 16, 40, 64, 72])), page=draw(st.integers(1, 20)),
        layout=draw(st.sampled_from(["NHD", "HND"])), padding=padding, cache_dtype=cache_dtype,
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        seed=draw(st.integers(0, 9)), **options,
    )  # fmt: skip
    case = poison(case) if draw(st.booleans()) else case
    for _ in range(draw(st.integers(0, 2)) if batch else 0):
        b = draw(st.integers(0, batch - 1))
        column = draw(st.integers(0, case.block_table.shape[1] - 1))
        case.block_table[b, column] = draw(st.sampled_from([-1, case.k_cache.shape[0], 2**31 - 1]))
    case = case.change(max_q_len=draw(st.integers(max(0, case.max_q_len - 2), 12)))
    expected, given_ = case.on("cpu"), case.on("cpu")
    out, lse = ops.verify_attention(*given_.attention_args, **given_.options)
    true_out, true_lse = verify_attention_f64(*expected.attention_args, **expected.options)
    assert torch.equal(bits(given_.k_cache), bits(expected.k_cache))
    eps = torch.finfo(case.q.dtype).eps
    assert torch.allclose(out.double(), true_out, atol=2 * eps + 1e-6, rtol=2 * eps)
    assert torch.allclose(lse.double(), true_lse, atol=1e-5, rtol=2e-6)
