import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from tiny_models import OracleHead, tiny_head, tiny_llama

from mtp_ext.decode import (
    Decoder,
    DraftPlanner,
    Metrics,
    OutOfPages,
    PageAllocator,
    SamplingParams,
    measure_step_seconds,
    plan_draft_len,
)
from mtp_ext.reference.rejection_sample import target_distribution

PROMPTS = [[1, 2, 3, 4, 5], [7], [3] * 37, [9, 8, 7], [11, 3] * 9, [30, 5], [2] * 16, [60, 59, 58]]
NEW = 24


@pytest.fixture(scope="module")
def trunk():
    return tiny_llama()


@pytest.fixture(scope="module")
def texts(trunk):
    """Prompt and greedy output without drafts, each request alone."""
    return greedy_texts(trunk)


def greedy_texts(trunk, prompts=PROMPTS, new=NEW):
    params = SamplingParams(max_new_tokens=new)
    return [Decoder(trunk).generate([p], params)[0].tokens for p in prompts]


def sometimes_wrong(position):
    return position % 5 in (1, 4)


# ---- pages ---------------------------------------------------------------------------------------


@given(st.integers(0, 12), st.lists(st.tuples(st.booleans(), st.integers(0, 14)), max_size=40))
def test_allocator_never_hands_out_a_page_twice(num_pages, actions):
    allocator, held = PageAllocator(num_pages), []
    for allocate, n in actions:
        in_use = {page for pages in held for page in pages}
        if allocate:
            free = allocator.num_free
            if n > free:
                with pytest.raises(OutOfPages, match=f"{n} pages needed, {free} of {num_pages}"):
                    allocator.allocate(n)
                assert allocator.num_free == free
            else:
                pages = allocator.allocate(n)
                assert len(set(pages)) == n and not in_use & set(pages)
                assert all(0 <= page < num_pages for page in pages)
                held.append(pages)
        elif held:
            allocator.release(held.pop(n % len(held)))
        assert allocator.num_free + sum(map(len, held)) == num_pages


def test_allocator_refuses_what_it_did_not_hand_out():
    allocator = PageAllocator(4)
    pages = allocator.allocate(2)
    allocator.release(pages[:1])
    for wrong in (pages[:1], [pages[1], pages[1]], [99]):
        with pytest.raises(ValueError, match="not all in use"):
            allocator.release(wrong)
    assert allocator.num_free == 3


def test_a_request_that_never_fits_is_refused_and_harms_nobody(trunk, texts):
    decoder = Decoder(trunk, num_tokens=64, page_size=8)
    request = decoder.submit(PROMPTS[0], SamplingParams(max_new_tokens=NEW))
    decoder.step()
    with pytest.raises(OutOfPages, match="a request of 80 tokens needs 10 pages of 8"):
        decoder.submit([1] * 40, SamplingParams(max_new_tokens=40))
    assert decoder.requests == [request]
    list(decoder.run())
    assert request.tokens == texts[0]


@pytest.mark.parametrize("k", [0, 3])
def test_running_out_of_pages_delays_requests_but_loses_nothing(trunk, texts, k):
    head = OracleHead(trunk, texts, sometimes_wrong)
    # Room for the longest request and little more: the others are preempted and computed again.
    decoder = Decoder(trunk, head, num_tokens=72, page_size=4, prefill_chunk=16)
    requests = decoder.generate(PROMPTS, SamplingParams(max_new_tokens=NEW), k)
    assert [r.tokens for r in requests] == texts
    assert decoder.cache.allocator.num_free == 18


# ---- greedy --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_greedy_text_does_not_depend_on_k(dtype, batch):
    trunk = tiny_llama(dtype)
    texts = greedy_texts(trunk)
    for head in (OracleHead(trunk, texts, sometimes_wrong), tiny_head(trunk)):
        for k in range(5):
            decoder = Decoder(trunk, head, max_batch=batch)
            requests = decoder.generate(PROMPTS, SamplingParams(max_new_tokens=NEW), k)
            assert [r.tokens for r in requests] == texts, f"k = {k}"
            assert all(r.finish_reason == "length" and r.status == 0 for r in requests)


@pytest.mark.parametrize(
    "options", [{"page_size": 1}, {"prefill_chunk": 3}, {"max_batch": 3}], ids=str
)
def test_greedy_text_does_not_depend_on_pages_or_chunks(trunk, texts, options):
    decoder = Decoder(trunk, OracleHead(trunk, texts, sometimes_wrong), **options)
    requests = decoder.generate(PROMPTS, SamplingParams(max_new_tokens=NEW), 2)
    assert [r.tokens for r in requests] == texts


def test_the_text_is_the_models(trunk, texts):
    tokens = list(PROMPTS[0])
    for _ in range(NEW):
        hidden = trunk.forward_dense(torch.tensor([tokens]))[0, -1:].clone()
        tokens.append(int(trunk.logits(hidden).argmax()))
    assert tokens == texts[0]


def test_requests_may_join_and_leave_at_any_step(trunk, texts):
    decoder = Decoder(trunk, OracleHead(trunk, texts, sometimes_wrong))
    requests = []
    for k, prompt in enumerate(PROMPTS):
        requests.append(decoder.submit(prompt, SamplingParams(max_new_tokens=NEW)))
        decoder.step(k % 5)
    decoder.cancel(requests[3])
    decoder.cancel(requests[3])
    list(decoder.run(3))
    assert requests[3].finish_reason == "cancelled"
    for i, request in enumerate(requests):
        assert request.tokens == texts[i][: len(request.tokens)]
        assert i == 3 or request.tokens == texts[i]
    assert decoder.cache.allocator.num_free == decoder.cache.allocator.num_pages


# ---- stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(5))
def test_stops_in_the_middle_of_accepted_drafts(trunk, texts, k):
    text = next(t for t, p in zip(texts, PROMPTS) if len(set(t[len(p) :])) > 6)
    prompt = PROMPTS[texts.index(text)]
    output = text[len(prompt) :]
    head = OracleHead(trunk, [text])
    for stop in dict.fromkeys(output):
        params = SamplingParams(max_new_tokens=NEW, stop_ids=(stop,))
        decoder = Decoder(trunk, head)
        request = decoder.generate([prompt], params, k)[0]
        assert request.output == output[: output.index(stop) + 1]
        assert request.finish_reason == "stop"
        assert len(request.depths) == len(request.output)
        assert decoder.cache.allocator.num_free == decoder.cache.allocator.num_pages


def test_eos_of_the_model_stops_unless_ignored():
    plain = tiny_llama()
    output = greedy_texts(plain)[0][len(PROMPTS[0]) :]
    trunk = tiny_llama(eos_ids=(output[4],))
    cut = Decoder(trunk).generate([PROMPTS[0]], SamplingParams(max_new_tokens=NEW))[0]
    assert cut.output == output[: output.index(output[4]) + 1]
    params = SamplingParams(max_new_tokens=NEW, ignore_eos=True)
    assert Decoder(trunk).generate([PROMPTS[0]], params)[0].output == output


@pytest.mark.parametrize("k", [0, 1, 4])
@pytest.mark.parametrize("new", [1, 2, 3, 5, 6, 11])
def test_stops_exactly_at_max_new_tokens(trunk, texts, k, new):
    decoder = Decoder(trunk, OracleHead(trunk, texts), page_size=2)
    requests = decoder.generate(PROMPTS[:3], SamplingParams(max_new_tokens=new), k)
    for request, text in zip(requests, texts):
        assert request.tokens == text[: request.prompt_len + new]
        assert request.finish_reason == "length"


@pytest.mark.parametrize("k", [0, 4])
@pytest.mark.parametrize("prompt_len", [1, 20, 31])
def test_stops_exactly_at_the_models_last_position(k, prompt_len):
    trunk = tiny_llama(max_positions=32)
    prompt = list(range(prompt_len))
    plain = Decoder(trunk).generate([prompt], SamplingParams(max_new_tokens=100))[0]
    decoder = Decoder(trunk, OracleHead(trunk, [plain.tokens]))
    request = decoder.generate([prompt], SamplingParams(max_new_tokens=100), k)[0]
    assert len(request.tokens) == 32 and request.tokens == plain.tokens
    assert request.finish_reason == "length"


def test_refuses_what_makes_no_sense(trunk):
    decoder = Decoder(trunk)
    for prompt, message in (
        ([], "at least one token"),
        ([61], r"must be in \[0, 61\)"),
        ([-1], r"must be in \[0, 61\)"),
        ([1] * 512, "the model takes 512 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder.submit(prompt)
    decoder.submit([1])
    with pytest.raises(ValueError, match="needs an MTP head"):
        decoder.step(1)
    with pytest.raises(ValueError, match=r"k must be in 0\.\.4"):
        decoder.step(5)
    with pytest.raises(ValueError, match="max_new_tokens"):
        SamplingParams(max_new_tokens=0)
    for name, bits in (("top_k", 32), ("seed", 64)):
        for value in (2 ** (bits - 1), -(2 ** (bits - 1)) - 1):
            with pytest.raises(ValueError, match=f"{name} must fit int{bits}, got {value}"):
                SamplingParams(**{name: value})
            SamplingParams(**{name: value - 1 if value > 0 else value + 1})


# ---- sampling ------------------------------------------------------------------------------------


def test_sampled_text_does_not_depend_on_the_batch(trunk):
    head = tiny_head(trunk)
    settings = [
        SamplingParams(max_new_tokens=NEW, temperature=t, top_k=k, top_p=p, min_p=m, seed=seed)
        for seed, (t, k, p, m) in enumerate(
            [(1.0, 0, 1.0, 0.0), (0.7, 5, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (0.0, 0, 1.0, 0.0)] * 2
        )
    ]
    for k in (0, 3):
        together = Decoder(trunk, head, page_size=4)
        requests = [together.submit(p, s) for p, s in zip(PROMPTS, settings)]
        list(together.run(k))
        for prompt, params, request in zip(PROMPTS, settings, requests):
            alone = Decoder(trunk, head, page_size=16).generate([prompt], params, k)[0]
            assert alone.tokens == request.tokens
        again = Decoder(trunk, head).generate([PROMPTS[0]], settings[0], k)[0]
        assert again.tokens == requests[0].tokens
    other_seed = SamplingParams(max_new_tokens=NEW, temperature=1.0, seed=99)
    assert (
        Decoder(trunk, head).generate([PROMPTS[0]], other_seed, k)[0].output != requests[0].output
    )


def joint_distribution(trunk, prompt, length, params):
    """Probability of every continuation, by enumeration over the dense forward in f64."""
    size, joint = trunk.config.vocab_size, {}
    for head in itertools.product(range(size), repeat=length - 1):
        hidden = trunk.forward_dense(torch.tensor([[*prompt, *head]]))[0]
        rows = trunk.logits(hidden[len(prompt) - 1 :].contiguous())
        filters = (params.temperature, params.top_k, params.top_p, params.min_p)
        p = [target_distribution(row, *filters)[0] for row in rows]
        reach = 1.0
        for row, token in zip(p, head):
            reach *= float(row[token])
        for last in range(size):
            joint[(*head, last)] = reach * float(p[-1][last])
    return joint


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 3}, {"top_p": 0.85, "temperature": 1.4}, {"min_p": 0.1}],
    ids=str,
)
def test_sampled_text_follows_the_models_distribution(filters):
    """Joint chi-squared over all texts of four tokens; false-alarm rate 1e-5 per k and filter."""
    trunk = tiny_llama(vocab_size=4, seed=5)
    head = tiny_head(trunk, seed=2)
    prompt, length, trials = [1, 3], 4, 5000
    params = SamplingParams(**{"temperature": 0.9, **filters})
    joint = joint_distribution(trunk, prompt, length, params)
    assert abs(sum(joint.values()) - 1) < 1e-9
    for k in (0, 2):
        decoder = Decoder(
            trunk, head, max_batch=500, num_tokens=500 * 8, page_size=8, prefill_chunk=1000,
            num_candidates=3,
        )  # fmt: skip
        requests = [
            decoder.submit(
                prompt,
                SamplingParams(max_new_tokens=length, seed=seed, **{"temperature": 0.9, **filters}),
            )
            for seed in range(1, trials + 1)
        ]
        list(decoder.run(k))
        counts = dict.fromkeys(joint, 0)
        for request in requests:
            counts[tuple(request.output)] += 1
        statistic, cells, rest, rest_count = 0.0, 0, 0.0, 0
        for text, p in joint.items():
            if p == 0:
                assert counts[text] == 0, f"{text} is impossible"
            elif p * trials < 5:
                rest, rest_count = rest + p * trials, rest_count + counts[text]
            else:
                statistic += (counts[text] - p * trials) ** 2 / (p * trials)
                cells += 1
        if rest > 0:
            statistic += (rest_count - rest) ** 2 / rest
            cells += 1
        assert cells > 10
        assert chi2.sf(statistic, cells - 1) > 1e-5, f"k = {k}: {statistic:.1f}, {cells} cells"
        if k:
            assert 0.2 < decoder.metrics.acceptance[0] < 1.0


# ---- metrics and planning ------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 4])
def test_metrics_of_a_perfect_and_a_useless_head(trunk, texts, k):
    text, prompt = texts[0], PROMPTS[0]
    params = SamplingParams(max_new_tokens=1 + 3 * (k + 1))
    long_text = Decoder(trunk).generate([prompt], params)[0].tokens
    decoder = Decoder(trunk, OracleHead(trunk, [long_text]))
    request = decoder.generate([prompt], params, k)[0]
    assert decoder.metrics.acceptance == [1.0] * k
    assert decoder.metrics.tokens_per_step == k + 1
    assert request.depths == [0, *([*range(1, k + 1), 0] * 3)]
    assert set(decoder.metrics.seconds) == {"draft", "verify", "sample", "schedule"}

    decoder = Decoder(trunk, OracleHead(trunk, [text], lambda position: True))
    request = decoder.generate([prompt], SamplingParams(max_new_tokens=9), k)[0]
    assert decoder.metrics.acceptance == [0.0] and decoder.metrics.tokens_per_step == 1.0
    assert request.depths == [0] * 9


def test_metrics_count_only_drafts_that_were_reached():
    metrics = Metrics()
    metrics.add_step(num_drafts=3, num_accepted=1, num_tokens=2)
    metrics.add_step(num_drafts=2, num_accepted=2, num_tokens=3)
    metrics.add_step(num_drafts=0, num_accepted=0, num_tokens=1)
    assert (metrics.judged, metrics.accepted) == ([2, 2], [2, 1])
    assert metrics.tokens_per_step == 2.0


def test_plan_draft_len():
    assert plan_draft_len([], [1.0]) == 0
    assert plan_draft_len([0.0, 0.0], [1.0, 1.1, 1.2]) == 0
    assert plan_draft_len([1.0, 1.0], [1.0, 1.1, 1.2]) == 2
    assert plan_draft_len([0.5, 0.5], [1.0, 1.2, 1.5]) == 1  # rates 1, 1.25, 1.167
    assert plan_draft_len([0.5, 0.9], [1.0, 1.5, 1.5]) == 2
    assert plan_draft_len([0.0], [1.0, 1.0]) == 0  # the smallest of equals
    with pytest.raises(ValueError, match="acceptance must hold 2 depths, got 1"):
        plan_draft_len([0.5], [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"T\(0\)"):
        plan_draft_len([], [])


def test_planner_learns_falls_back_and_comes_back():
    planner = DraftPlanner([1.0, 1.25, 1.5], probe_every=16)

    def run(acceptance, steps):
        chosen = []
        for _ in range(steps):
            k = planner.choose()
            chosen.append(k)
            if k:
                planner.observe(k, [1] * k, [acceptance] * k)
        return chosen

    assert run(1, 300)[-1] == 2
    useless = run(0, 700)
    assert max(set(useless[-100:]), key=useless[-100:].count) == 0
    assert {1, 2} <= set(useless[-100:])  # still probed
    assert run(1, 2000)[-1] == 2


def test_planner_drives_the_decoder(trunk, texts):
    head = OracleHead(trunk, texts, sometimes_wrong)
    seconds = measure_step_seconds(trunk, tiny_head(trunk), repeats=2, context=8)
    assert len(seconds) == 5 and min(seconds) > 0
    planner = DraftPlanner(seconds, probe_every=3)
    requests = Decoder(trunk, head).generate(PROMPTS, SamplingParams(max_new_tokens=NEW), planner)
    assert [r.tokens for r in requests] == texts


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_the_same_text(trunk, texts, data):
    head = OracleHead(trunk, texts, lambda position: hash((position, salt)) % 3 == 0)
    salt = data.draw(st.integers(0, 99))
    decoder = Decoder(
        trunk,
        head,
        num_tokens=data.draw(st.integers(64, 300)),
        page_size=data.draw(st.integers(1, 9)),
        max_batch=data.draw(st.integers(1, 8)),
        prefill_chunk=data.draw(st.integers(1, 40)),
    )
    params = SamplingParams(max_new_tokens=NEW)
    requests = [decoder.submit(prompt, params) for prompt in PROMPTS]
    while decoder.requests:
        decoder.step(data.draw(st.integers(0, 4)))
    assert [r.tokens for r in requests] == texts
