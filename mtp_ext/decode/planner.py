"""How many tokens to draft: as many as make tokens per second largest, measured, not guessed."""

import statistics
import time
from collections.abc import Sequence


def expected_tokens(acceptance: Sequence[float], draft_len: int) -> float:
    """E(k) = 1 + a1 + a1 a2 + ...: tokens that a step with k drafts yields on average.

    acceptance[d] is the probability that the draft at depth d + 1 is accepted, given that those
    before it were.
    """
    expected, reach = 1.0, 1.0
    for a in acceptance[:draft_len]:
        reach *= a
        expected += reach
    return expected


def plan_draft_len(acceptance: Sequence[float], step_seconds: Sequence[float]) -> int:
    """The k >= 0 that maximises E(k) / T(k); the smallest of equals.

    Args:
        acceptance: conditional acceptance per depth, at least len(step_seconds) - 1 of them.
        step_seconds: T(k), the time of a step with k drafts, for k = 0, 1, ...
    """
    if not step_seconds:
        raise ValueError("step_seconds must hold T(0) at least")
    if len(acceptance) < len(step_seconds) - 1:
        raise ValueError(
            f"acceptance must hold {len(step_seconds) - 1} depths, got {len(acceptance)}"
        )
    rates = [expected_tokens(acceptance, k) / t for k, t in enumerate(step_seconds)]
    return max(range(len(rates)), key=lambda k: (rates[k], -k))


class DraftPlanner:
    """Chooses the draft length of every step from running estimates of acceptance and time.

    Acceptance is a decaying average that starts at an even prior. A length that is not chosen
    teaches nothing, so every `probe_every` steps the one left alone for longest is tried; k = 0
    is among them, and so is drafting after the planner has fallen back to k = 0.
    """

    def __init__(
        self,
        step_seconds: Sequence[float],
        *,
        prior: float = 0.5,
        prior_weight: float = 4.0,
        memory: float = 200.0,
        probe_every: int = 64,
    ):
        self.step_seconds = list(step_seconds)
        depths = len(self.step_seconds) - 1
        self._judged = [prior_weight] * depths
        self._accepted = [prior_weight * prior] * depths
        self._keep = 1.0 - 1.0 / memory
        self._probe_every = probe_every
        self._last_used = [0] * len(self.step_seconds)
        self._step = 0

    @property
    def acceptance(self) -> list[float]:
        return [a / j for a, j in zip(self._accepted, self._judged)]

    def choose(self) -> int:
        self._step += 1
        if self._step % self._probe_every == 0:
            k = min(range(len(self._last_used)), key=self._last_used.__getitem__)
        else:
            k = plan_draft_len(self.acceptance, self.step_seconds)
        self._last_used[k] = self._step
        return k

    def observe(
        self, k: int, judged: Sequence[int], accepted: Sequence[int], seconds: float | None = None
    ) -> None:
        """What a step with k drafts showed: counts per depth (`Metrics`) and its time."""
        for d, (j, a) in enumerate(zip(judged, accepted)):
            keep = self._keep**j
            self._judged[d] = self._judged[d] * keep + j
            self._accepted[d] = self._accepted[d] * keep + a
        if seconds is not None:
            # A step that was disturbed (a page fault, another process) must not swing the plan.
            seconds = min(seconds, 2 * self.step_seconds[k])
            self.step_seconds[k] += 0.05 * (seconds - self.step_seconds[k])


def measure_step_seconds(
    model, head, batch_size: int = 1, *, max_draft_len: int = 4, context: int = 64, repeats: int = 5
) -> list[float]:
    """T(0..max_draft_len) on this machine: medians of interleaved steps on made-up requests."""
    from mtp_ext.decode.decoder import Decoder
    from mtp_ext.decode.request import SamplingParams

    lengths = range(max_draft_len + 1)
    new_tokens = (repeats + 2) * sum(k + 1 for k in lengths)
    length = context + new_tokens + max_draft_len
    decoder = Decoder(model, head, num_tokens=batch_size * (length + 64), max_batch=batch_size)
    for b in range(batch_size):
        prompt = [(7919 * (i + 131 * b) + 11) % model.config.vocab_size for i in range(context)]
        decoder.submit(prompt, SamplingParams(max_new_tokens=new_tokens, ignore_eos=True))
    while any(r.cache_len + 1 < len(r.tokens) or not r.output for r in decoder.requests):
        decoder.step(0)
    for k in lengths:
        decoder.step(k)  # warms up, and feeds the head its prompt
    seconds: list[list[float]] = [[] for _ in lengths]
    for _ in range(repeats):
        for k in lengths:
            start = time.perf_counter()
            decoder.step(k)
            seconds[k].append(time.perf_counter() - start)
    return [statistics.median(s) for s in seconds]
