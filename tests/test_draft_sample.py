import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

import mtp_ext.ops as ops
from mtp_ext.reference.draft_sample import draft_sample as reference
from mtp_ext.reference.philox_uniform import philox_uniform
from mtp_ext.reference.rejection_sample import exponentials


def make_call(seed, batch, k, vocab=50000, ids_dtype=torch.int64):
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocab, generator=g)[:k] for _ in range(batch)] or [])
    logits = torch.randn(batch, k, generator=g) * 2
    return (
        logits,
        ids.to(ids_dtype).reshape(batch, k),
        torch.randint(-(2**63), 2**63 - 1, (batch,), generator=g),
        torch.randint(0, 2**40, (batch,), generator=g),
        seed % 7,
    ), torch.rand(batch, generator=g) + 0.3


def run(backend, args, temperature):
    args = [a.to(backend.device) if isinstance(a, torch.Tensor) else a for a in args]
    temperature = None if temperature is None else temperature.to(backend.device)
    return [t.cpu() for t in backend.ops.draft_sample(*args, temperature=temperature)]


def check(backend, args, temperature):
    tokens, probs = run(backend, args, temperature)
    expected, expected_probs = reference(*args, temperature=temperature)
    assert tokens.dtype == torch.int64 and probs.dtype == torch.float32
    assert torch.equal(tokens, expected)
    # The specification is a softmax in f64, rounded once.
    torch.testing.assert_close(probs, expected_probs, rtol=4e-6, atol=1e-12)
    return tokens, probs


@pytest.mark.parametrize("batch", [0, 1, 5, 130])
@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 33, 64])
def test_matches_reference(backend, batch, k):
    for seed, dtype in enumerate([torch.int64, torch.int32]):
        args, temperature = make_call(seed + k, max(batch, 1), k, ids_dtype=dtype)
        args = tuple(a[:batch] if isinstance(a, torch.Tensor) else a for a in args)
        temperature = temperature[:batch]
        check(backend, args, temperature)
        temperature[::2] = 0
        check(backend, args, temperature)
        check(backend, args, None)


def test_greedy_ties_go_to_the_lowest_id(backend):
    args, _ = make_call(0, 1, 5)
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    ids = torch.tensor([[4, 9, 7, 8, 1]])
    tokens, probs = check(backend, (logits, ids, *args[2:]), None)
    assert tokens.tolist() == [7] and probs.tolist() == [[0, 0, 1, 0, 0]]


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf, 1.0])
def test_faults_are_greedy(backend, temperature):
    args, _ = make_call(3, 4, 6)
    if temperature == 1.0:
        args[0][0, 2] = math.nan
        args[0][1, 3] = math.inf
        args[0][2] = -math.inf
        args[0][3] = math.nan
    tokens, probs = check(backend, args, torch.full((4,), temperature))
    assert torch.equal(probs.sum(1), torch.ones(4)) and probs.max() == 1
    assert all(int(t) in row for t, row in zip(tokens, args[1].tolist()))


def test_minus_infinity_is_never_drawn(backend):
    args, _ = make_call(5, 64, 4)
    args[0][:, 1:] = -math.inf
    tokens, probs = check(backend, args, torch.ones(64))
    assert torch.equal(tokens, args[1][:, 0]) and torch.equal(probs[:, 0], torch.ones(64))


def test_order_and_batch_do_not_matter(backend):
    args, temperature = make_call(6, 9, 20)
    tokens, _ = run(backend, args, temperature)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = (args[0][:, order].contiguous(), args[1][:, order].contiguous(), *args[2:])
    assert torch.equal(run(backend, shuffled, temperature)[0], tokens)
    alone = [a[4:5].clone() if isinstance(a, torch.Tensor) else a for a in args]
    assert torch.equal(run(backend, alone, temperature[4:5].clone())[0], tokens[4:5])


def test_follows_the_returned_distribution(backend):
    """Chi-squared, false alarm 1e-5."""
    draws = 1000 if backend.name == "ptxsim" else 50000
    args, _ = make_call(7, 1, 10)
    many = [a.expand(draws, *a.shape[1:]).contiguous() for a in args[:3]]
    many[2] = torch.arange(draws)
    tokens, probs = run(backend, (*many, torch.full((draws,), 5), 2), torch.ones(draws))
    index = (tokens[:, None] == many[1]).float().argmax(1)
    expected = probs[0].double().numpy() * draws
    counts = np.bincount(index.numpy(), minlength=10)
    assert ((counts - expected) ** 2 / expected).sum() < stats.chi2.isf(1e-5, 9)


def test_streams_rows_and_positions_are_independent(backend):
    """The draft's race, the coins and other rows of a step never share randomness."""
    args, _ = make_call(8, 400, 8)
    args = (torch.zeros(400, 8), torch.arange(8).expand(400, 8).contiguous(), *args[2:4])
    draws = [run(backend, (*args, row), torch.ones(400))[0] for row in (0, 1)]
    later = run(backend, (*args[:3], args[3] + 1, 0), torch.ones(400))[0]
    for other in (draws[1], later):
        agree = int((draws[0] == other).sum())
        assert abs(agree - 50) < 4.5 * math.sqrt(400 * 7 / 64)
    coin = philox_uniform(args[2], args[3], 0, 1, 1)
    final = exponentials(args[2][:1], args[3][:1], 0, 2, torch.arange(8))
    draft = exponentials(args[2][:1], args[3][:1], 0, 0, torch.arange(8))
    assert coin.shape == (400, 1) and not torch.equal(final, draft)


def test_exponentials_have_mean_one():
    e = exponentials(torch.arange(1), torch.zeros(1, dtype=torch.int64), 0, 0, torch.arange(4096))
    assert float(e.min()) > 0 and float(e.max()) <= -math.log(2**-24) + 1e-9
    assert abs(float(e.mean()) - 1) < 4.5 / math.sqrt(4096)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(topk_logits=torch.zeros(2, 65)), "topk_logits must have 1 to 64 columns, got 65"),
        (dict(topk_logits=torch.zeros(2, 3).half()), "topk_logits must have dtype Float"),
        (dict(topk_ids=torch.zeros(2, 4).long()), r"topk_ids must have shape \[B=2, k=3\]"),
        (dict(topk_ids=torch.zeros(2, 3)), "topk_ids must have dtype Int or Long"),
        (dict(seeds=torch.zeros(3).long()), r"seeds must have shape \[B=2\]"),
        (dict(positions=torch.zeros(2).int()), "positions must have dtype Long"),
        (dict(row=65536), "row must be in"),
        (dict(temperature=torch.zeros(2).double()), "temperature must have dtype Float"),
    ],
)
def test_bad_metadata_is_named(change, message):
    arguments = dict(
        topk_logits=torch.zeros(2, 3), topk_ids=torch.zeros(2, 3).long(),
        seeds=torch.zeros(2).long(), positions=torch.zeros(2).long(), row=0,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        ops.draft_sample(**(arguments | change))


def test_opcheck_and_compile():
    args, temperature = make_call(1, 3, 5)
    torch.library.opcheck(torch.ops.mtp.draft_sample, args, dict(temperature=temperature))
    compiled = torch.compile(ops.draft_sample, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(*args, temperature=temperature), ops.draft_sample(*args, temperature=temperature)
    ):
        assert torch.equal(got, expected)


@settings(
    max_examples=50, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_fuzz(data):
    k = data.draw(st.integers(1, 64))
    args, temperature = make_call(data.draw(st.integers(0, 2**32)), 3, k)
    special = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38, 1e-40])
    for _ in range(data.draw(st.integers(0, 3))):
        args[0].view(-1)[data.draw(st.integers(0, 3 * k - 1))] = data.draw(special)
        temperature[data.draw(st.integers(0, 2))] = data.draw(special)
    tokens, probs = ops.draft_sample(*args, temperature=temperature)
    expected, expected_probs = reference(*args, temperature=temperature)
    assert torch.equal(tokens, expected)
    torch.testing.assert_close(probs, expected_probs, rtol=1e-5, atol=1e-12)
