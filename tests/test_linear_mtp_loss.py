import itertools
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
from projections import normal, padded, threads

from mtp_ext import ops
from mtp_ext.reference.linear_mtp_loss import linear_mtp_loss as reference

OPTIONS = {
    "plain": {},
    "bias": dict(bias=True),
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(z_loss=1e-2),
    "softcap": dict(softcap=2.0),
    "documents": dict(cu_seqlens=offsets(0, 3, 3, 4, 13)),
    "offsets": dict(cu_seqlens=offsets(2, 9, 11)),
    "weights": dict(depth_weights=True),
    "mask": dict(loss_mask=True),
    "next_token": dict(first_shift=1),
    "all": dict(
        bias=True,
        label_smoothing=0.2,
        z_loss=1e-2,
        softcap=3.0,
        cu_seqlens=offsets(0, 8, 13),
        depth_weights=True,
        loss_mask=True,
        first_shift=1,
    ),
}


def make_case(k, t, h, v, dtype, **options):
    case = head(k, t, h, v, dtype, bias=options.pop("bias", False)) | options
    generator = torch.Generator().manual_seed(t + v)
    labels = torch.randint(0, v, (t,), generator=generator)
    if t > 4:
        labels[[1, 4]] = torch.tensor([-100, v])
    if options.get("depth_weights") is True:
        case["depth_weights"] = torch.tensor([0.5, 0.0, 0.3, 0.1])[:k].contiguous()
    if options.get("loss_mask") is True:
        case["loss_mask"] = torch.rand(t, generator=generator) < 0.7
    return case | dict(labels=labels)


def eager(
    hidden, weight, labels, *, cu_seqlens=None, loss_mask=None, depth_weights=None, bias=None,
    first_shift=2, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0,
):  # fmt: skip
    """As a user would write it: logits in hidden's dtype, the loss in f32."""
    k, t, _ = hidden.shape
    v = weight.shape[0]
    counts = (labels >= 0) & (labels < v) & (labels != ignore_index)
    if loss_mask is not None:
        counts = counts & loss_mask
    valid = rows_that_count(k, t, first_shift, counts, cu_seqlens)
    loss, depth_loss = torch.zeros(()), []
    for d in range(k):
        rows = valid[d].nonzero()[:, 0]
        y = labels[rows + d + first_shift]
        logits = F.linear(hidden[d, rows], weight, bias).float()
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        losses = F.cross_entropy(logits, y, reduction="sum", label_smoothing=label_smoothing)
        losses = (losses + z_loss * logits.logsumexp(-1).square().sum()) / max(len(y), 1)
        depth_loss.append(losses)
        loss = loss + losses * (1 / k if depth_weights is None else depth_weights[d])
    return loss, torch.stack(depth_loss).detach(), valid.sum(1)


def check(backend, case, scale=1.0):
    mtp_losses.check(backend.ops.linear_mtp_loss, reference, eager, case, backend.device, scale)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_matches_reference(backend, dtype, option):
    check(backend, make_case(3, 13, 24, 85, dtype, **OPTIONS[option]))


SHAPES = {
    # Rows in several chunks and passes; then weights in several blocks.
    "cpu": [(1, 1, 8, 2), (1, 9, 1, 1), (2, 33, 65, 1000), (4, 70, 17, 49), (3, 200, 40, 2050),
            (1, 12, 4096, 1100)],
    "ptxsim": [(1, 1, 8, 2), (1, 9, 8, 1), (2, 33, 40, 301), (4, 40, 16, 49)],
}  # fmt: skip
SHAPES["cuda"] = SHAPES["ptxsim"] + [(3, 700, 512, 5003)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_shapes(backend, dtype):
    for k, t, h, v in SHAPES[backend.name]:
        check(backend, make_case(k, t, h, v, dtype, bias=True), scale=3.0)


def test_several_chunks(backend, monkeypatch):
    """More rows than one chunk of logits holds: 64 rows on CPU, 128 on CUDA."""
    monkeypatch.setenv("MTP_LOSS_CHUNK_BYTES", "1")
    check(backend, make_case(3, 50, 8, 60, torch.float32, bias=True, label_smoothing=0.1))
    check(backend, make_case(3, 50, 8, 60, torch.bfloat16))


@pytest.mark.parametrize("missing", ["hidden", "weight", "bias"])
def test_only_some_gradients(backend, missing):
    case = make_case(2, 12, 16, 40, torch.float32, bias=True)
    full = differentiable(on(backend.device, case), torch.float32)
    _, expected = evaluate(backend.ops.linear_mtp_loss, full)
    frozen = full | {missing: full[missing].detach()}
    _, got = evaluate(backend.ops.linear_mtp_loss, frozen)
    assert missing not in got and len(got) == 2
    for name, gradient in got.items():
        assert torch.equal(gradient, expected[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient_in_the_callers_buffer(backend, dtype):
    case = differentiable(on(backend.device, make_case(2, 12, 16, 40, dtype)), dtype)
    buffer = normal(40, 16, seed=9).to(backend.device)
    before = buffer.clone()
    exact = differentiable(on("cpu", case), torch.float64)
    exact_buffer = torch.zeros(40, 16, dtype=torch.float64)
    for scale in (1.0, 0.5):
        loss = backend.ops.linear_mtp_loss(**case, weight_grad_accum=buffer)[0]
        assert torch.equal(buffer, before) or scale == 0.5  # the forward leaves it alone
        (loss * scale).backward()
        (reference(**exact, weight_grad_accum=exact_buffer)[0] * scale).backward()
    assert case["weight"].grad is None and exact["weight"].grad is None
    # Products may be of the weight's dtype, the sum is not: in bf16 it would be wrong by 7e-3.
    allowed = 1e-6 * before.abs().max()
    if dtype == torch.bfloat16:
        allowed = allowed + exact_buffer.abs().max() / 2**8
    assert ((buffer - before).cpu().double() - exact_buffer).abs().max() <= allowed.item()


def test_hidden_rows_that_do_not_count_are_never_read(backend):
    case = make_case(3, 20, 16, 50, torch.float32, cu_seqlens=offsets(0, 6, 7, 15), loss_mask=True)
    counts = (case["labels"] >= 0) & (case["labels"] < 50) & case["loss_mask"]
    valid = rows_that_count(3, 20, 2, counts, case["cu_seqlens"])
    assert 0 < valid.sum() < 30
    clean = differentiable(on(backend.device, case), torch.float32)
    expected, expected_gradients = evaluate(backend.ops.linear_mtp_loss, clean)
    case["hidden"] = case["hidden"].masked_fill(~valid[..., None], math.nan)
    dirty = differentiable(on(backend.device, case), torch.float32)
    got, gradients = evaluate(backend.ops.linear_mtp_loss, dirty)
    for a, b in zip((*got, *gradients.values()), (*expected, *expected_gradients.values())):
        assert torch.equal(a, b)
    assert (gradients["hidden"][~valid] == 0).all()
    assert torch.equal(got[2], valid.sum(1))


@pytest.mark.parametrize("how", ["ignored", "out of range", "masked", "too short", "no documents"])
def test_finite_when_nothing_counts(backend, how):
    case = make_case(2, 9, 16, 40, torch.float32, bias=True)
    if how == "ignored":
        case["labels"][:] = -100
    elif how == "out of range":
        case["labels"] = torch.tensor([40, 41, -1, -2, 2**62, -(2**62), 40, 99, 1000])
    elif how == "masked":
        case["loss_mask"] = torch.zeros(9, dtype=torch.bool)
    elif how == "too short":
        case["cu_seqlens"] = torch.arange(0, 10, 2, dtype=torch.int32)[:5].contiguous()
    else:
        case["cu_seqlens"] = offsets(4)
    case["hidden"][:] = math.nan
    got, gradients = evaluate(
        backend.ops.linear_mtp_loss, differentiable(on(backend.device, case), torch.float32)
    )
    for t in (*got, *gradients.values()):
        assert (t == 0).all()


def test_ignore_index_may_be_a_token(backend):
    case = make_case(2, 30, 16, 5, torch.float32, ignore_index=3)
    got = backend.ops.linear_mtp_loss(**on(backend.device, case))
    assert torch.equal(got[2].cpu(), reference(**case)[2])
    assert got[2].sum() < reference(**case | dict(ignore_index=-100))[2].sum()


def test_empty(backend):
    case = make_case(2, 0, 16, 20, torch.float32)
    got, gradients = evaluate(
        backend.ops.linear_mtp_loss, differentiable(on(backend.device, case), torch.float32)
    )
    assert gradients["hidden"].shape == (2, 0, 16)
    assert all((t == 0).all() for t in (*got, *gradients.values()))


def test_documents_do_not_see_each_other(backend):
    """A batch of packed documents is the sum of its documents, and other documents' labels and
    hiddens change nothing of a document's gradient."""
    bounds = [0, 7, 8, 19, 24]
    case = make_case(3, 26, 16, 60, torch.float32, cu_seqlens=offsets(*bounds))
    case["depth_weights"] = torch.tensor([1.0, 2.0, 3.0])
    run = backend.ops.linear_mtp_loss
    packed = run(**on(backend.device, case))
    sums, counts = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int64)
    for begin, end in itertools.pairwise(bounds):
        part = case | dict(
            hidden=case["hidden"][:, begin:end], labels=case["labels"][begin:end], cu_seqlens=None
        )
        _, depth_loss, tokens, _ = (t.cpu() for t in run(**on(backend.device, part)))
        sums += depth_loss.double() * tokens
        counts += tokens
    assert torch.equal(packed[2].cpu(), counts)
    torch.testing.assert_close(packed[1].cpu().double(), sums / counts, rtol=1e-6, atol=0)

    def gradient_of_third(labels):
        leaf = differentiable(on(backend.device, case | dict(labels=labels)), torch.float32)
        return evaluate(run, leaf)[1]["hidden"][:, 8:19]

    labels = case["labels"].clone()
    labels[:8] = (labels[:8] + 1).clamp(0, 59)
    labels[[1, 4]] = case["labels"][[1, 4]]
    labels[19:] = 7
    assert torch.equal(gradient_of_third(labels), gradient_of_third(case["labels"]))


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_which_label_is_whose(backend, shift):
    """Hiddens that name the label they expect win exactly when the shift is right; a head that is
    given the token before, or after, stays at the loss of a wrong answer."""
    t, v, k = 24, 32, 3
    labels = torch.randperm(v - 1)[:t] + 1  # 0 is what a row of equal logits names
    weight = 50 * torch.eye(v)
    hidden = torch.zeros(k, t, v)
    for d in range(k):
        for row in range(t - d - shift):
            hidden[d, row, labels[row + d + shift]] = 1
    case = on(backend.device, dict(hidden=hidden, weight=weight, labels=labels))
    loss, _, tokens, correct = backend.ops.linear_mtp_loss(**case, first_shift=shift)
    assert loss < 1e-6 and torch.equal(tokens, correct)
    assert tokens.tolist() == [t - shift - d for d in range(k)]
    for wrong in {1, 2, 3, 4} - {shift}:
        loss, _, tokens, correct = backend.ops.linear_mtp_loss(**case, first_shift=wrong)
        assert loss > 3 and correct.sum() == 0


def test_argmax_ties_take_the_lowest_id(backend):
    hidden = torch.zeros(1, 4, 8)
    case = on(backend.device, dict(hidden=hidden, weight=torch.ones(6, 8)))
    for label, correct in ((0, 2), (1, 0), (5, 0)):
        labels = torch.full((4,), label, device=backend.device)
        assert backend.ops.linear_mtp_loss(**case, labels=labels)[3].tolist() == [correct]


def test_large_logits_stay_finite(backend):
    case = make_case(2, 9, 16, 40, torch.float32)
    case["weight"] = case["weight"] * 1e4
    check(backend, case)


def test_strides(backend):
    case = make_case(3, 11, 24, 50, torch.bfloat16)
    expected = backend.ops.linear_mtp_loss(**on(backend.device, case))
    wide = padded(case["hidden"].transpose(0, 1).reshape(33, 24).to(backend.device))
    hidden = torch.as_strided(wide, (3, 11, 24), (32, 96, 1), wide.storage_offset())
    assert torch.equal(hidden.cpu(), case["hidden"])
    got = backend.ops.linear_mtp_loss(
        **on(backend.device, case)
        | dict(hidden=hidden, weight=padded(case["weight"].to(backend.device)))
    )
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_repeats_are_equal(backend):
    t = 200 if backend.name != "ptxsim" else 20
    case = differentiable(
        on(backend.device, make_case(3, t, 32, 300, torch.bfloat16, bias=True)), torch.bfloat16
    )
    first, gradients = evaluate(backend.ops.linear_mtp_loss, case)
    second, again = evaluate(backend.ops.linear_mtp_loss, case)
    for a, b in zip((*first, *gradients.values()), (*second, *again.values())):
        assert torch.equal(a, b)


def test_memory_traffic(backend, simulator):
    """Per chunk the weight is loaded twice, only hiddens of rows that count are, and only once;
    nothing has bank conflicts."""
    k, t, h, v = 2, 40, 64, 256
    case = make_case(k, t, h, v, torch.bfloat16, cu_seqlens=offsets(3, 9, 40))
    with simulator.record() as launches:
        got, _ = evaluate(backend.ops.linear_mtp_loss, differentiable(case, torch.bfloat16))

    def loaded(name):
        return sum(launch.loaded_bytes(name) for launch in launches)

    assert loaded("weight") == 2 * case["weight"].nbytes
    assert loaded("hidden") == got[2].sum() * h * 2 < case["hidden"].nbytes
    assert sum(launch.bank_conflicts for launch in launches) == 0


def test_threads_change_only_rounding():
    case = differentiable(make_case(3, 100, 32, 500, torch.float32), torch.float32)
    results = []
    for count in (1, 3):
        with threads(count):
            results.append(evaluate(ops.linear_mtp_loss, case))
    (one, gradients), (three, others) = results
    torch.testing.assert_close(one, three, rtol=1e-6, atol=0)
    for name in gradients:
        top = gradients[name].abs().max().item()
        torch.testing.assert_close(gradients[name], others[name], rtol=0, atol=1e-6 * top)


def test_backward_twice():
    case = differentiable(make_case(2, 12, 16, 40, torch.bfloat16), torch.bfloat16)
    _, expected = evaluate(ops.linear_mtp_loss, case)
    inputs = (case["hidden"], case["weight"])
    loss = ops.linear_mtp_loss(**case)[0]
    for scale, keep in ((2.0, True), (1.0, True), (1.0, False)):
        got = torch.autograd.grad(loss * scale, inputs, retain_graph=keep)
        for gradient, name in zip(got, expected):
            assert torch.equal(gradient, expected[name] * scale)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)
    loss = ops.linear_mtp_loss(**case)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, inputs, create_graph=True)


def test_only_loss_is_differentiable():
    case = differentiable(make_case(2, 12, 16, 40, torch.float32), torch.float32)
    loss, *others = ops.linear_mtp_loss(**case)
    assert loss.requires_grad and not any(t.requires_grad for t in others)
    with torch.no_grad():
        assert not ops.linear_mtp_loss(**case)[0].requires_grad


def good():
    return dict(
        hidden=torch.zeros(2, 5, 8),
        weight=torch.zeros(20, 8),
        labels=torch.zeros(5, dtype=torch.int64),
    )


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(hidden=torch.zeros(5, 8)), r"hidden must have shape \[K, T, H\]"),
        (dict(hidden=torch.zeros(2, 5, 8, dtype=torch.float64)), "hidden must have dtype"),
        (dict(hidden=torch.zeros(2, 8, 5).transpose(1, 2)), "hidden must be contiguous in its"),
        (dict(hidden=torch.zeros(65, 5, 8)), "1 to 64 depths, got 65"),
        (dict(weight=torch.zeros(20, 7)), r"weight must have shape \[V, H=8\]"),
        (dict(weight=torch.zeros(20, 8).bfloat16()), "weight must have dtype Float"),
        (dict(weight=torch.zeros(8, 20).T), "weight must be contiguous in its last"),
        (dict(weight=torch.zeros(0, 8)), "weight must have at least one row"),
        (dict(labels=torch.zeros(5, dtype=torch.int32)), "labels must have dtype Long"),
        (dict(labels=torch.zeros(6, dtype=torch.int64)), r"labels must have shape \[T=5\]"),
        (dict(cu_seqlens=torch.zeros(2)), "cu_seqlens must have dtype Int"),
        (dict(cu_seqlens=offsets()), "cu_seqlens must have at least one"),
        (dict(loss_mask=torch.zeros(5)), "loss_mask must have dtype Bool"),
        (dict(depth_weights=torch.ones(3)), r"depth_weights must have shape \[K=2\]"),
        (dict(depth_weights=torch.ones(2, requires_grad=True)), "depth_weights gets no gradient"),
        (dict(bias=torch.zeros(20).half()), "bias must have dtype Float"),
        (dict(weight_grad_accum=torch.zeros(20, 7)), "weight_grad_accum must be Float"),
        (dict(first_shift=0), "first_shift must be at least 1, got 0"),
        (dict(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
        (dict(softcap=-1.0), "softcap must be 0"),
    ],
)
def test_bad_metadata_is_named(change, message):
    with pytest.raises(RuntimeError, match=f"linear_mtp_loss: .*{message}"):
        ops.linear_mtp_loss(**(good() | change))


def test_bad_offsets_are_clamped(backend):
    case = make_case(2, 12, 16, 30, torch.float32)
    odd = on(backend.device, case | dict(cu_seqlens=offsets(-5, 7, 3, 9, 2**31 - 1)))
    sound = on(backend.device, case | dict(cu_seqlens=offsets(0, 7, 7, 9, 12)))
    for a, b in zip(backend.ops.linear_mtp_loss(**odd), backend.ops.linear_mtp_loss(**sound)):
        assert torch.equal(a, b)


def test_opcheck():
    case = make_case(2, 9, 8, 20, torch.float32, **OPTIONS["documents"], bias=True)
    case = differentiable(case, torch.float32)
    arguments = [case.pop(n) for n in ("hidden", "weight", "labels")]
    torch.library.opcheck(torch.ops.mtp.linear_mtp_loss, arguments, case)
    private = [None, None, None, case["bias"], 2, -100, 0.0, 0.0, 0.0, True, True, False]
    plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in (*arguments, *private)]
    torch.library.opcheck(torch.ops.mtp._linear_mtp_loss, plain)


@pytest.mark.parametrize("accumulate", [False, True])
def test_compile(accumulate):
    def step(hidden, weight, labels, bias, buffer):
        loss, depth_loss, tokens, correct = ops.linear_mtp_loss(
            hidden * 2, weight, labels, bias=bias, weight_grad_accum=buffer
        )
        return loss * 3, depth_loss, tokens, correct

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for t in (9, 14):
        case = make_case(2, t, 8, 20, torch.float32, bias=True)
        outcome = []
        for function in (step, compiled):
            leaf = differentiable(case, torch.float32)
            buffer = torch.zeros(20, 8) if accumulate else None
            inputs = (leaf["hidden"], leaf["weight"], leaf["labels"], leaf["bias"], buffer)
            results = function(*inputs)
            results[0].backward()
            kept = (leaf["hidden"].grad, leaf["bias"].grad)
            outcome.append((*results, *kept, buffer if accumulate else leaf["weight"].grad))
        for a, b in zip(*outcome):
            assert torch.equal(a, b)


@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(1, 4),
    t=st.integers(1, 40),
    h=st.integers(1, 40),
    v=st.integers(1, 120),
    shift=st.integers(1, 5),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    dtype=st.sampled_from(FLOATS),
    cuts=st.lists(st.integers(0, 45), min_size=1, max_size=5),
    seed=st.integers(0, 2**20),
)
def test_fuzz(k, t, h, v, shift, smoothing, dtype, cuts, seed):
    case = make_case(k, t, h, v, dtype, bias=True, label_smoothing=smoothing, first_shift=shift)
    case["cu_seqlens"] = offsets(*sorted(cuts))
    generator = torch.Generator().manual_seed(seed)
    case["labels"] = torch.randint(-1, v + 1, (t,), generator=generator)
    got, gradients = evaluate(ops.linear_mtp_loss, differentiable(case, dtype))
    exact, exact_gradients = evaluate(reference, differentiable(case, torch.float64))
    assert torch.equal(got[2], exact[2])
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-5, atol=1e-6)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for name, gradient in gradients.items():
        top = exact_gradients[name].abs().max().item()
        assert (gradient.double() - exact_gradients[name]).abs().max() <= tolerance * top + 1e-7
