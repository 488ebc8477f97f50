"""Speculative decoding of a batch of requests of different lengths.

One step, for all running requests at once:

  draft     the MTP head proposes up to k tokens per request
  verify    the trunk computes every uncached token and the drafts in one ragged forward
  sample    `rejection_sample` accepts a prefix of the drafts and adds one token
  commit    the host reads what was accepted, the only read of a step; rejected drafts are rolled
            back by not counting them in the cache's length

A request whose prompt is not in the cache yet goes through the same forward, a chunk of the
prompt per step and no drafts; so prompts, drafts and single tokens mix freely. Every operator
computes a row from that row alone. Therefore the text of a request does not depend on the batch
it runs in, and with temperature 0 it does not depend on k either, to the bit.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtp_ext import ops
from mtp_ext.decode.kv_cache import OutOfPages, PagedKVCache, to_tensor
from mtp_ext.decode.metrics import Metrics
from mtp_ext.decode.planner import DraftPlanner
from mtp_ext.decode.request import Request, SamplingParams
from mtp_ext.models.llama import Llama
from mtp_ext.nn import MTPHead

MAX_DRAFT_LEN = 4


@dataclass(slots=True)
class Work:
    """A request's part in one step."""

    request: Request
    num_rows: int  # committed tokens to compute
    num_drafts: int = 0
    emits: bool = False  # the last committed token is among the rows
    decoding: bool = False  # it is the only one


class Decoder:
    """Holds the caches and the requests.

    Args:
        model: the trunk.
        head: the MTP head; without one, k must be 0.
        num_tokens: capacity of the cache, over all requests, rounded up to whole pages.
        page_size: positions per page.
        max_batch: requests that run at once; the others wait.
        prefill_chunk: prompt tokens that one step computes at most.
        num_candidates: tokens that the head's draft distribution keeps when sampling.
    """

    def __init__(
        self,
        model: Llama,
        head: MTPHead | None = None,
        *,
        num_tokens: int = 8192,
        page_size: int = 32,
        max_batch: int = 8,
        prefill_chunk: int = 256,
        num_candidates: int = 32,
    ):
        c = model.config
        self.model, self.head = model, head
        num_pages = -(-num_tokens // page_size)
        self.cache = PagedKVCache(
            c.num_layers,
            num_pages,
            page_size,
            c.num_kv_heads,
            c.head_dim,
            model.dtype,
            model.device,
        )
        self.head_cache = head.new_cache(num_pages, page_size) if head else ()
        self.max_batch = max_batch
        self.prefill_chunk = prefill_chunk
        self.num_candidates = num_candidates
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.metrics = Metrics()

    # ---- requests --------------------------------------------------------------------------------

    @property
    def requests(self) -> list[Request]:
        """Those not finished, in order of arrival."""
        return [*self.running, *self.waiting]

    def submit(self, prompt: list[int], params: SamplingParams | None = None) -> Request:
        """Queues a request. OutOfPages if it could not run even alone; the others are unharmed."""
        params = params or SamplingParams()
        c = self.model.config
        if not prompt:
            raise ValueError("the prompt must hold at least one token")
        if len(prompt) >= c.max_positions:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; the model takes {c.max_positions} positions"
            )
        if min(prompt) < 0 or max(prompt) >= c.vocab_size:
            raise ValueError(f"prompt ids must be in [0, {c.vocab_size})")
        max_len = min(len(prompt) + params.max_new_tokens, c.max_positions)
        needed, total = self.cache.pages_for(max_len), self.cache.allocator.num_pages
        if needed > total:
            raise OutOfPages(f"a request of {max_len} tokens needs {needed} pages of {total}")
        stops = params.stop_ids if params.ignore_eos else (*params.stop_ids, *c.eos_ids)
        request = Request(len(prompt), list(prompt), params, max_len, frozenset(stops))
        self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request that is not finished and frees its pages."""
        if not request.finished:
            request.finish_reason = "cancelled"
            if request in self.waiting:
                self.waiting.remove(request)
            else:
                self._release(request)

    def generate(
        self,
        prompts: Iterable[list[int]],
        params: SamplingParams | None = None,
        k: int | DraftPlanner = 0,
    ) -> list[Request]:
        """Submits all and runs until nothing is left."""
        requests = [self.submit(prompt, params) for prompt in prompts]
        for _ in self.run(k):
            pass
        return requests

    def run(self, k: int | DraftPlanner = 0) -> Iterator[list[Request]]:
        """Steps until nothing is left; yields the requests that got tokens."""
        while self.running or self.waiting:
            yield self.step(k)

    # ---- one step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, k: int | DraftPlanner = 0) -> list[Request]:
        """One step with up to k drafts per request, k in 0..4; returns who got tokens."""
        start = time.perf_counter()
        planner = k if isinstance(k, DraftPlanner) else None
        k = planner.choose() if planner else k
        if not 0 <= k <= MAX_DRAFT_LEN:
            raise ValueError(f"k must be in 0..{MAX_DRAFT_LEN}, got {k}")
        if k and self.head is None:
            raise ValueError("drafting (k > 0) needs an MTP head")
        works = self._schedule(k)
        if not works:
            return []
        scheduled = time.perf_counter()
        drafts = self._draft([w for w in works if w.num_drafts])
        drafted = time.perf_counter()
        hidden, logits = self._verify(works, drafts)
        verified = time.perf_counter()
        results = self._sample([w for w in works if w.emits], logits, drafts)
        sampled = time.perf_counter()
        updated = self._commit(works, hidden, results, planner, k, sampled - start)
        m = self.metrics
        m.add_time("draft", drafted - scheduled)
        m.add_time("verify", verified - drafted)
        m.add_time("sample", sampled - verified)
        m.add_time("schedule", scheduled - start + time.perf_counter() - sampled)
        return updated

    def _schedule(self, k: int) -> list[Work]:
        """Who computes how many rows. Oldest first: when pages run out, the newest give way."""
        allocator, pages_for = self.cache.allocator, self.cache.pages_for
        while self.waiting and len(self.running) < self.max_batch:
            needed = pages_for(len(self.waiting[0].tokens))
            if needed > allocator.num_free:
                break
            request = self.waiting.popleft()
            request.pages = allocator.allocate(needed)
            self.running.append(request)

        works, budget, index = [], self.prefill_chunk, 0
        while index < len(self.running):
            r = self.running[index]
            index += 1
            uncached = len(r.tokens) - r.cache_len
            work = Work(r, uncached, decoding=uncached == 1 and len(r.tokens) > r.prompt_len)
            if work.decoding:
                work.num_drafts = min(k, r.max_len - len(r.tokens) - 1)
            else:
                work.num_rows = min(uncached, budget)
                budget -= work.num_rows
            work.emits = work.num_rows == uncached
            if work.num_rows == 0:
                continue
            missing = pages_for(r.cache_len + work.num_rows + work.num_drafts) - len(r.pages)
            while missing > allocator.num_free and self.running[-1] is not r:
                self._preempt(self.running[-1])
            if missing > allocator.num_free:
                self._preempt(r)
                break
            if missing > 0:
                r.pages = r.pages + allocator.allocate(missing)
            works.append(work)
        return works

    def _draft(self, works: list[Work]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Token ids int64 [N], and when sampling q as probs f32 [N, m] and ids int64 [N, m]."""
        if not works:
            return self._tensor([]), None, None
        head, requests = self.head, [w.request for w in works]
        table = self.cache.block_table([r.pages for r in requests])
        greedy = all(r.params.temperature == 0 for r in requests)
        num_candidates = 1 if greedy else min(self.num_candidates, len(head.lm_head))
        if not greedy:
            seeds = self._tensor([r.params.seed for r in requests])
            next_positions = self._tensor([len(r.tokens) for r in requests])
            temperature = self._tensor([r.params.temperature for r in requests], np.float32)

        # Depth 1: the rows whose hidden states the trunk has computed since the last draft.
        counts = [r.cache_len - r.head_len for r in requests]
        hidden = _cat([h for r in requests for h in r.pending_hidden])
        if head.spec.h_source == "post_norm":
            hidden = self.model.final_norm(hidden)
        ids = [t for r in requests for t in r.tokens[r.head_len + 1 : r.cache_len + 1]]
        positions = [p for r in requests for p in range(r.head_len, r.cache_len)]
        cu = _offsets(counts)
        y = head.extend(
            self._tensor(ids),
            hidden,
            self._tensor(positions),
            *self.head_cache,
            table,
            self._tensor([r.head_len for r in requests], np.int32),
            self._tensor(cu, np.int32),
            max(counts),
        )
        if len(ids) != len(requests):
            y = y[self._tensor([end - 1 for end in cu[1:]])]
        for r in requests:
            r.head_len, r.pending_hidden = r.cache_len, []

        # Deeper: the head's own hidden state and draft stand in for the trunk's.
        one_each = self._tensor(range(len(requests) + 1), np.int32)
        lens = self._tensor([r.cache_len for r in requests], np.int32)
        depth = max(w.num_drafts for w in works)
        drafts, probs, candidates = [], [], []
        for row in range(depth):
            top_logits, top_ids, _ = head.propose(y, num_candidates)
            if greedy:
                drafts.append(top_ids[:, 0])
            else:
                token, q = ops.draft_sample(
                    top_logits, top_ids, seeds, next_positions, row, temperature=temperature
                )
                drafts.append(token)
                probs.append(q)
                candidates.append(top_ids)
            if row + 1 < depth:
                y = head.extend(
                    drafts[-1],
                    head.recur(y),
                    lens.long(),
                    *self.head_cache,
                    table,
                    lens,
                    one_each,
                    1,
                )
                lens = lens + 1

        # Request by request, and only as many as each may use.
        keep = None
        if any(w.num_drafts < depth for w in works):
            keep = self._tensor(
                [b * depth + d for b, w in enumerate(works) for d in range(w.num_drafts)]
            )

        def flatten(columns: list[Tensor]) -> Tensor | None:
            if not columns:
                return None
            flat = torch.stack(columns, 1).flatten(0, 1)
            return flat if keep is None else flat[keep]

        return flatten(drafts), flatten(probs), flatten(candidates)

    def _verify(self, works: list[Work], drafts: tuple) -> tuple[Tensor, Tensor | None]:
        """Hidden states f32 [T, H] of all rows; logits of the rows that a token comes out of."""
        ids, positions, draft_rows, logit_rows, counts = [], [], [], [], []
        for w in works:
            r, start = w.request, len(ids)
            ids += r.tokens[r.cache_len : r.cache_len + w.num_rows] + [0] * w.num_drafts
            positions += range(r.cache_len, r.cache_len + w.num_rows + w.num_drafts)
            draft_rows += range(len(ids) - w.num_drafts, len(ids))
            if w.emits:
                logit_rows += range(len(ids) - w.num_drafts - 1, len(ids))
            counts.append(len(ids) - start)
        token_ids = self._tensor(ids)
        if draft_rows:
            token_ids[self._tensor(draft_rows)] = drafts[0]
        hidden = self.model.forward(
            token_ids,
            self._tensor(positions),
            self.cache,
            self.cache.block_table([w.request.pages for w in works]),
            self._tensor([w.request.cache_len for w in works], np.int32),
            self._tensor(_offsets(counts), np.int32),
            max(counts),
        )
        if not logit_rows:
            return hidden, None
        rows = hidden if len(logit_rows) == len(ids) else hidden[self._tensor(logit_rows)]
        return hidden, self.model.logits(rows)

    def _sample(self, works: list[Work], logits: Tensor | None, drafts: tuple) -> list[list[int]]:
        """Per request its tokens, padded, then the accepted count and the status bits."""
        if not works:
            return []
        params = [w.request.params for w in works]
        lengths = [w.num_drafts for w in works]
        draft_ids, probs, candidates = drafts

        def column(values: list, off: float, dtype: type) -> Tensor | None:
            return None if all(v == off for v in values) else self._tensor(values, dtype)

        token_ids, num_accepted, status = ops.rejection_sample(
            logits,
            draft_ids,
            self._tensor(_offsets(lengths), np.int32),
            self._tensor([p.seed for p in params]),
            self._tensor([len(w.request.tokens) for w in works]),
            max(lengths),
            draft_probs=probs,
            draft_ids=candidates,
            temperature=column([p.temperature for p in params], 0, np.float32),
            top_k=column([p.top_k for p in params], 0, np.int32),
            top_p=column([p.top_p for p in params], 1, np.float32),
            min_p=column([p.min_p for p in params], 0, np.float32),
        )
        return torch.cat([token_ids, torch.stack([num_accepted, status], 1)], 1).tolist()

    def _commit(
        self,
        works: list[Work],
        hidden: Tensor,
        results: list[list[int]],
        planner: DraftPlanner | None,
        k: int,
        seconds: float,
    ) -> list[Request]:
        updated, row, result = [], 0, iter(results)
        step = Metrics()
        for w in works:
            r, computed = w.request, w.num_rows
            if w.emits:
                *tokens, num_accepted, status = next(result)
                computed += num_accepted
                r.status |= status
                before = len(r.tokens)
                for i, token in enumerate(tokens[: num_accepted + 1]):
                    if not r.append(token, i + 1 if i < num_accepted else 0):
                        break
                if w.decoding:
                    step.add_step(w.num_drafts, num_accepted, len(r.tokens) - before)
                updated.append(r)
            r.cache_len += computed
            if self.head is not None:
                r.pending_hidden.append(hidden[row : row + computed])
            row += w.num_rows + w.num_drafts
            if r.finished:
                self._release(r)
        self.metrics.add(step)
        if planner and all(w.decoding for w in works):
            planner.observe(k, step.judged, step.accepted, seconds)
        return updated

    # ---- pages -----------------------------------------------------------------------------------

    def _release(self, r: Request) -> None:
        self.running.remove(r)
        self.cache.allocator.release(r.pages)
        r.pages, r.pending_hidden = [], []

    def _preempt(self, r: Request) -> None:
        """Takes a request's pages. It keeps its tokens and is computed again when there is room,
        to the same bits."""
        self._release(r)
        r.cache_len = r.head_len = 0
        self.waiting.appendleft(r)

    def _tensor(self, values: Iterable, dtype: type = np.int64) -> Tensor:
        return to_tensor(list(values), dtype, self.model.device)


def _offsets(counts: list[int]) -> list[int]:
    offsets = [0]
    for count in counts:
        offsets.append(offsets[-1] + count)
    return offsets


def _cat(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
