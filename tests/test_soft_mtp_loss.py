import math

import mtp_losses
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mtp_losses import (
    FLOATS,
    differentiable,
    evaluate,
    head,
    offsets,
    on,
    rows_that_count,
)
from projections import normal, padded

from mtp_ext import ops
from mtp_ext.reference.soft_mtp_loss import soft_mtp_loss as reference

TEACHERS = ("hidden", "pairs")
OPTIONS = {
    "kl": {},
    "tv": dict(kl_weight=0.0, tv_weight=1.0),
    "both": dict(kl_weight=0.5, tv_weight=2.0),
    "documents": dict(cu_seqlens=offsets(1, 3, 3, 4, 12)),
    "same_row": dict(first_shift=1),
    "all": dict(
        bias=True,
        softcap=3.0,
        tv_weight=0.3,
        cu_seqlens=offsets(0, 8, 13),
        depth_weights=torch.tensor([0.5, 0.0, 0.3]),
        loss_mask=torch.arange(13) % 3 > 0,
    ),
}


def make_case(teacher, k, t, h, v, dtype, m=6, **options):
    case = head(k, t, h, v, dtype, bias=options.pop("bias", False)) | options
    if teacher == "hidden":
        return case | dict(teacher_hidden=normal(t, h, seed=4).to(dtype))
    logits = 2 * normal(t, v + 3, seed=5)
    logprobs, ids = torch.log_softmax(logits, -1).topk(min(m, v + 3))
    return case | dict(teacher_ids=ids.where(ids < v, -1), teacher_logprobs=logprobs.contiguous())


def eager(
    hidden, weight, *, teacher_hidden=None, teacher_ids=None, teacher_logprobs=None,
    cu_seqlens=None, loss_mask=None, depth_weights=None, bias=None, first_shift=2, kl_weight=1.0,
    tv_weight=0.0, softcap=0.0,
):  # fmt: skip
    """As a user would write it: logits in hidden's dtype, the loss in f32."""

    def log_probs(x, w, b):
        logits = F.linear(x, w, b).float()
        return torch.log_softmax(softcap * torch.tanh(logits / softcap) if softcap else logits, -1)

    k, t, _ = hidden.shape
    counts = torch.ones(t, dtype=torch.bool) if loss_mask is None else loss_mask
    valid = rows_that_count(k, t, first_shift - 1, counts, cu_seqlens)
    if teacher_hidden is not None:
        with torch.no_grad():
            p = log_probs(teacher_hidden, weight, bias).exp()
    else:
        p = torch.zeros(t, weight.shape[0] + 1)
        p = p.scatter_add(1, teacher_ids % p.shape[1], teacher_logprobs.exp())[:, :-1]
    loss, depth_loss, acceptance = torch.zeros(()), [], []
    for d in range(k):
        rows = valid[d].nonzero()[:, 0]
        log_q, p_d = log_probs(hidden[d, rows], weight, bias), p[rows + d + first_shift - 1]
        kl = F.kl_div(log_q, p_d, reduction="sum")
        overlap = torch.minimum(p_d, log_q.exp()).sum()
        n = max(len(rows), 1)
        depth_loss.append((kl_weight * kl + tv_weight * (len(rows) - overlap)) / n)
        acceptance.append(overlap.detach() / n)
        loss = loss + depth_loss[-1] * (1 / k if depth_weights is None else depth_weights[d])
    return loss, torch.stack(depth_loss).detach(), valid.sum(1), torch.stack(acceptance)


def check(backend, case, scale=1.0):
    mtp_losses.check(backend.ops.soft_mtp_loss, reference, eager, case, backend.device, scale)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(backend, dtype, teacher, option):
    check(backend, make_case(teacher, 3, 13, 24, 85, dtype, **OPTIONS[option]))


SHAPES = {
    "cpu": [(1, 1, 8, 2), (2, 33, 65, 1000), (4, 70, 17, 49), (2, 90, 40, 2050)],
    "ptxsim": [(1, 1, 8, 2), (2, 33, 40, 301), (4, 40, 16, 49)],
}
SHAPES["cuda"] = SHAPES["ptxsim"] + [(3, 700, 512, 5003)]


@pytest.mark.parametrize("teacher", TEACHERS)
def test_shapes(backend, teacher):
    for k, t, h, v in SHAPES[backend.name]:
        case = make_case(teacher, k, t, h, v, torch.float32, bias=True, first_shift=1)
        check(backend, case | dict(tv_weight=0.5), scale=3.0)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_several_chunks(backend, teacher, monkeypatch):
    """More rows than one chunk of logits holds; a position's depths fall into two chunks."""
    monkeypatch.setenv("MTP_LOSS_CHUNK_BYTES", "1")
    check(backend, make_case(teacher, 3, 50, 8, 60, torch.float32, tv_weight=0.5))


def test_a_perfect_draft_loses_nothing(backend):
    """q = p at the shifted position: no loss, no gradient, certain acceptance."""
    k, t, h, v = 3, 14, 16, 40
    case = make_case("hidden", k, t, h, v, torch.float32, bias=True, tv_weight=1.0)
    for d in range(k):
        case["hidden"][d, : t - d - 1] = case["teacher_hidden"][d + 1 :]
    got, gradients = evaluate(
        backend.ops.soft_mtp_loss, differentiable(on(backend.device, case), torch.float32)
    )
    assert got[0].abs() < 1e-5 and (got[3] - 1).abs().max() < 1e-5
    assert all(g.abs().max() < 1e-5 for g in gradients.values())
    moved = backend.ops.soft_mtp_loss(**on(backend.device, case), first_shift=1)
    assert moved[0] > 0.1 and (moved[3] < 0.95).all()


def test_acceptance_is_that_of_rejection_sampling(backend):
    """Exact enumeration: draw from q, accept with probability min(1, p / q)."""
    case = make_case("hidden", 1, 5, 8, 7, torch.float32, first_shift=1)
    q = torch.softmax(case["hidden"][0].double() @ case["weight"].double().T, -1)
    p = torch.softmax(case["teacher_hidden"].double() @ case["weight"].double().T, -1)
    expected = (q * (p / q).clamp(max=1)).sum(-1).mean()
    got = backend.ops.soft_mtp_loss(**on(backend.device, case))
    assert abs(got[3].item() - expected.item()) < 1e-6


def test_all_pairs_are_the_whole_distribution(backend):
    """A teacher as hidden states, and the same as pairs of its full vocabulary."""
    dense = make_case("hidden", 2, 9, 16, 40, torch.float32, tv_weight=0.7)
    logprobs = torch.log_softmax(dense["teacher_hidden"] @ dense["weight"].T, -1)
    ids = torch.randperm(40, generator=torch.Generator().manual_seed(0)).int()
    pairs = {n: t for n, t in dense.items() if n != "teacher_hidden"} | dict(
        teacher_ids=ids.repeat(9, 1), teacher_logprobs=logprobs[:, ids].contiguous()
    )
    results = [
        evaluate(backend.ops.soft_mtp_loss, differentiable(on(backend.device, case), torch.float32))
        for case in (dense, pairs)
    ]
    for a, b in zip(results[0][0], results[1][0]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(results[0][1].values(), results[1][1].values()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_one_certain_pair_is_cross_entropy(backend):
    t, v = 12, 30
    case = head(2, t, 16, v, torch.float32)
    labels = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(1))
    soft = case | dict(
        teacher_ids=labels.roll(-1)[:, None].contiguous(),
        teacher_logprobs=torch.zeros(t, 1),
        loss_mask=torch.arange(t) < t - 1,  # the last row's next token is unknown
    )
    hard = on(backend.device, case | dict(labels=labels))
    assert backend.ops.soft_mtp_loss(**on(backend.device, soft))[0].item() == pytest.approx(
        ops.linear_mtp_loss(**on("cpu", hard))[0].item(), rel=1e-6
    )


def test_pairs_outside_the_vocabulary_are_skipped(backend):
    """Whatever their log-probability: it may even be NaN."""
    case = make_case("pairs", 2, 10, 16, 40, torch.float32, tv_weight=0.3)
    case["teacher_ids"][:, 1] = torch.tensor([-1, 40, -(2**62), 2**62, -1] * 2)
    case["teacher_logprobs"][:, 1] = math.nan
    got, gradients = evaluate(
        backend.ops.soft_mtp_loss, differentiable(on(backend.device, case), torch.float32)
    )
    keep = [0, 2, 3, 4, 5]
    rest = case | dict(
        teacher_ids=case["teacher_ids"][:, keep].contiguous(),
        teacher_logprobs=case["teacher_logprobs"][:, keep].contiguous(),
    )
    expected, expected_gradients = evaluate(
        backend.ops.soft_mtp_loss, differentiable(on(backend.device, rest), torch.float32)
    )
    # A pair's place decides when it is added.
    for a, b in zip((*got, *gradients.values()), (*expected, *expected_gradients.values())):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("columns", [0, 1])
def test_no_pairs(backend, columns):
    case = make_case("pairs", 2, 10, 16, 40, torch.float32)
    case["teacher_ids"] = torch.full((10, columns), -1)
    case["teacher_logprobs"] = torch.zeros(10, columns)
    got, gradients = evaluate(
        backend.ops.soft_mtp_loss, differentiable(on(backend.device, case), torch.float32)
    )
    assert got[2].tolist() == [9, 8] and (got[3] == 0).all() and (got[1] == 0).all()
    assert all((g == 0).all() for g in gradients.values())


def test_improbable_pairs(backend):
    """A probability of zero adds nothing, even where q is zero too."""
    case = make_case("pairs", 1, 6, 16, 40, torch.float32, bias=True, tv_weight=0.5)
    case["teacher_logprobs"][:, 2] = -math.inf
    case["bias"][case["teacher_ids"][3, 2]] = -math.inf
    case["teacher_logprobs"][:, 3] = -200.0
    got = backend.ops.soft_mtp_loss(**on(backend.device, case))
    exact = reference(**case)
    assert got[0].isfinite()
    torch.testing.assert_close(got[0].cpu().double(), exact[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_rows_that_do_not_count_are_never_read(backend, teacher):
    k, t = 2, 14
    case = make_case(teacher, k, t, 16, 50, torch.float32, cu_seqlens=offsets(2, 6, 7, 12))
    case["loss_mask"] = torch.arange(t) % 4 > 0
    valid = rows_that_count(k, t, 1, case["loss_mask"], case["cu_seqlens"])
    expected, expected_gradients = evaluate(
        backend.ops.soft_mtp_loss, differentiable(on(backend.device, case), torch.float32)
    )
    case["hidden"] = case["hidden"].masked_fill(~valid[..., None], math.nan)
    unused = torch.ones(t, dtype=torch.bool)
    for d, row in valid.nonzero().tolist():
        unused[row + d + 1] = False
    name = "teacher_hidden" if teacher == "hidden" else "teacher_logprobs"
    case[name] = case[name].masked_fill(unused[:, None], math.nan)
    got, gradients = evaluate(
        backend.ops.soft_mtp_loss, differentiable(on(backend.device, case), torch.float32)
    )
    for a, b in zip((*got, *gradients.values()), (*expected, *expected_gradients.values())):
        assert torch.equal(a, b)
    assert (gradients["hidden"][~valid] == 0).all()


@pytest.mark.parametrize("teacher", TEACHERS)
def test_nothing_counts(backend, teacher):
    for t, options in ((0, {}), (9, dict(cu_seqlens=offsets(4))), (3, dict(first_shift=9))):
        case = make_case(teacher, 2, t, 16, 40, torch.float32, **options)
        got, gradients = evaluate(
            backend.ops.soft_mtp_loss, differentiable(on(backend.device, case), torch.float32)
        )
        assert all((x == 0).all() for x in (*got, *gradients.values()))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_repeats_are_equal_and_strides_free(backend, teacher):
    case = make_case(teacher, 2, 14, 16, 70, torch.bfloat16, tv_weight=0.5)
    first = evaluate(
        backend.ops.soft_mtp_loss, differentiable(on(backend.device, case), torch.bfloat16)
    )
    if teacher == "hidden":
        case["teacher_hidden"] = padded(case["teacher_hidden"])
    second = evaluate(
        backend.ops.soft_mtp_loss, differentiable(on(backend.device, case), torch.bfloat16)
    )
    for a, b in zip((*first[0], *first[1].values()), (*second[0], *second[1].values())):
        assert torch.equal(a, b)


def test_weight_gradient_in_the_callers_buffer(backend):
    case = differentiable(
        on(backend.device, make_case("hidden", 2, 12, 16, 40, torch.float32)), torch.float32
    )
    _, gradients = evaluate(backend.ops.soft_mtp_loss, case)
    buffer = torch.zeros(40, 16, device=backend.device)
    backend.ops.soft_mtp_loss(**case, weight_grad_accum=buffer)[0].backward()
    assert case["weight"].grad is None and torch.equal(buffer.cpu(), gradients["weight"])


def test_replaces_a_trainers_distillation():
    """Cross entropy to the likeliest ids of a large vocabulary, over a reduced one: the same
    gradients, and a loss that differs by the entropy of the pairs."""
    n, v, full, m = 40, 60, 200, 16
    case = differentiable(head(1, n, 24, v, torch.float32), torch.float32)
    token_map = torch.randperm(full, generator=torch.Generator().manual_seed(2))[:v]
    inverse = torch.full((full,), -1)
    inverse[token_map] = torch.arange(v)
    logprobs, ids = torch.log_softmax(3 * normal(n, full, seed=6), -1).topk(m)
    ids = inverse[ids]
    probs = logprobs.exp().masked_fill(ids < 0, 0)
    picked = torch.log_softmax(case["hidden"][0] @ case["weight"].T, -1).gather(1, ids.clamp(min=0))
    loss = -(probs * picked).sum() / n
    expected = torch.autograd.grad(loss, (case["hidden"], case["weight"]))
    got = ops.soft_mtp_loss(
        case["hidden"], case["weight"], teacher_ids=ids, teacher_logprobs=logprobs, first_shift=1
    )
    entropy = -(probs * logprobs).sum() / n
    torch.testing.assert_close(got[0] + entropy, loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(got[0], (case["hidden"], case["weight"])), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def good():
    return dict(
        hidden=torch.zeros(2, 5, 8),
        weight=torch.zeros(20, 8),
        teacher_ids=torch.zeros(5, 3, dtype=torch.int64),
        teacher_logprobs=torch.zeros(5, 3),
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(teacher_hidden=torch.zeros(5, 8)), "the teacher must be either"),
        (dict(teacher_ids=None, teacher_logprobs=None), "the teacher must be either"),
        (dict(teacher_logprobs=None), "go together"),
        (dict(teacher_ids=torch.zeros(5, 3)), "teacher_ids must have dtype Int or Long"),
        (dict(teacher_ids=torch.zeros(4, 3).long()), r"teacher_ids must have shape \[T=5, m\]"),
        (dict(teacher_ids=torch.zeros(5, 257).long()), "at most 256 columns, got 257"),
        (dict(teacher_logprobs=torch.zeros(5, 4)), r"teacher_logprobs must have shape \[T=5, m=3"),
        (dict(teacher_logprobs=torch.zeros(5, 3).half()), "teacher_logprobs must have dtype Float"),
        (dict(weight=torch.zeros(20, 7)), r"weight must have shape \[V, H=8\]"),
        (dict(first_shift=0), "first_shift must be at least 1, got 0"),
    ],
)
def test_bad_metadata_is_named(change, message):
    with pytest.raises(RuntimeError, match=f"soft_mtp_loss: .*{message}"):
        ops.soft_mtp_loss(**(good() | change))


def test_bad_teacher_hidden_is_named():
    for t, message in ((torch.zeros(5, 7), "shape"), (torch.zeros(5, 8).half(), "dtype Float")):
        with pytest.raises(RuntimeError, match=f"teacher_hidden must have {message}"):
            ops.soft_mtp_loss(torch.zeros(2, 5, 8), torch.zeros(20, 8), teacher_hidden=t)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_opcheck_and_compile(teacher):
    case = make_case(teacher, 2, 9, 8, 20, torch.float32, cu_seqlens=offsets(0, 4, 9))
    leaf = differentiable(case, torch.float32)
    arguments = [leaf.pop("hidden"), leaf.pop("weight")]
    torch.library.opcheck(torch.ops.mtp.soft_mtp_loss, arguments, leaf)

    compiled = torch.compile(ops.soft_mtp_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (9, 14):
        case = make_case(teacher, 2, t, 8, 20, torch.float32)
        expected, gradients = evaluate(ops.soft_mtp_loss, differentiable(case, torch.float32))
        got, others = evaluate(compiled, differentiable(case, torch.float32))
        for a, b in zip((*got, *others.values()), (*expected, *gradients.values())):
            assert torch.equal(a, b)


@settings(max_examples=30, deadline=None)
@given(
    teacher=st.sampled_from(TEACHERS),
    k=st.integers(1, 4),
    t=st.integers(1, 30),
    h=st.integers(1, 40),
    v=st.integers(1, 120),
    m=st.integers(1, 40),
    shift=st.integers(1, 5),
    tv=st.sampled_from([0.0, 0.5]),
    cuts=st.lists(st.integers(0, 35), min_size=1, max_size=5),
)
def test_fuzz(teacher, k, t, h, v, m, shift, tv, cuts):
    case = make_case(teacher, k, t, h, v, torch.float32, m, bias=True, first_shift=shift)
    case |= dict(cu_seqlens=offsets(*sorted(cuts)), tv_weight=tv)
    got, gradients = evaluate(ops.soft_mtp_loss, differentiable(case, torch.float32))
    exact, exact_gradients = evaluate(reference, differentiable(case, torch.float64))
    assert torch.equal(got[2], exact[2])
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got[3].double(), exact[3], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        top = exact_gradients[name].abs().max().item()
        assert (gradient.double() - exact_gradients[name]).abs().max() <= 1e-5 * top + 1e-6
