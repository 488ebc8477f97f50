"""Verification of drafts against raw logits: reading the target rows is all that must happen."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import Case, nbytes
from bench.report import dtype_name


def eager_rejection_sample(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    temperature: Tensor,
    drafts: int,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a careful user writes: every row at once, no loop, no host sync. The same number of
    drafts in every request; q is one-hot or dense."""
    batch, vocab = len(temperature), target_logits.shape[1]
    logits = target_logits.float().view(batch, drafts + 1, vocab) / temperature[:, None, None]
    if top_k is not None:
        values, index = logits.topk(top_k)
        if top_p is not None:
            mass = values.softmax(-1)
            values = values.masked_fill(mass.cumsum(-1) - mass >= top_p, -torch.inf)
        probs = torch.zeros_like(logits).scatter_(-1, index, values.softmax(-1))
    elif top_p is not None:
        values, index = logits.sort(descending=True)
        mass = values.softmax(-1)
        mass = mass.masked_fill(mass.cumsum(-1) - mass >= top_p, 0.0)
        mass /= mass.sum(-1, keepdim=True)
        probs = torch.empty_like(logits).scatter_(-1, index, mass)
    else:
        probs = logits.softmax(-1)

    tokens = draft_token_ids.view(batch, drafts)
    p_draft = probs[:, :drafts].gather(-1, tokens[..., None])[..., 0]
    q_rows = None if q is None else q.view(batch, drafts, vocab)
    q_draft = 1.0 if q_rows is None else q_rows.gather(-1, tokens[..., None])[..., 0]
    rejected = torch.rand_like(p_draft) * q_draft >= p_draft
    accepted = torch.where(rejected.any(1), rejected.float().argmax(1), drafts)

    final = probs[torch.arange(batch, device=probs.device), accepted]
    row = accepted.clamp(max=drafts - 1)
    at = torch.arange(batch, device=probs.device)
    stopped = (accepted < drafts)[:, None]
    if q_rows is None:
        minus = torch.zeros_like(final).scatter_(1, tokens[at, row][:, None], 1.0)
    else:
        minus = q_rows[at, row]
    residual = (final - minus * stopped).clamp_(min=0)
    extra = (residual / torch.empty_like(residual).exponential_()).argmax(-1)
    columns = torch.arange(drafts + 1, device=probs.device)
    padded = torch.cat([tokens, tokens[:, :1]], 1)
    result = torch.where(columns < accepted[:, None], padded, -1)
    return result.scatter(1, accepted[:, None], extra[:, None]).int(), accepted.int()


def case(
    device: str,
    batch: int,
    vocab: int,
    dtype: torch.dtype,
    *,
    drafts: int = 3,
    top_k: int | None = None,
    top_p: float | None = None,
    q: str = "one-hot",
) -> Case:
    def full(value: float, kind: torch.dtype) -> Tensor | None:
        return None if value is None else torch.full((batch,), value, dtype=kind, device=device)

    filters = dict(top_k=full(top_k, torch.int32), top_p=full(top_p, torch.float32))
    cu = torch.arange(batch + 1, dtype=torch.int32, device=device) * drafts
    temperature = torch.full((batch,), 0.8, device=device)

    def make() -> tuple:
        logits = (torch.randn(batch * (drafts + 1), vocab, device=device) * 2).to(dtype)
        # A draft that the target gives about 0.7: its logit holds as much as the rest twice over.
        tokens = torch.randint(0, vocab, (batch * drafts,), device=device)
        rows = torch.arange(batch * drafts, device=device)
        rows = rows + rows // drafts
        rest = (logits[rows].float() / 0.8).logsumexp(-1)
        logits[rows, tokens] = ((rest + 0.85) * 0.8).to(dtype)
        seeds = torch.randint(0, 2**62, (batch,), device=device)
        positions = torch.randint(0, 2**30, (batch,), device=device)
        probs = None
        if q == "dense":
            probs = (logits[rows].float() / 0.9).softmax(-1)
        return logits, tokens, seeds, positions, probs

    def ours(ops, logits, tokens, seeds, positions, probs) -> tuple:
        return ops.rejection_sample(
            logits, tokens, cu, seeds, positions, drafts, draft_probs=probs,
            temperature=temperature, **filters,
        )  # fmt: skip

    def eager(logits, tokens, seeds, positions, probs) -> tuple:
        return eager_rejection_sample(
            logits, tokens, temperature, drafts, top_k=top_k, top_p=top_p, q=probs
        )

    def check(mine: tuple, other: tuple) -> None:
        # Different random numbers: only the share of accepted drafts can be compared.
        a, b = mine[1].float().mean(), other[1].float().mean()
        assert abs(a - b) < 4 * drafts / batch**0.5, f"accepted {a} and {b} drafts on average"

    logits, tokens, seeds, positions, probs = make()
    name = f"B={batch} n={drafts} V={vocab}"
    for label, value in (("k", top_k), ("p", top_p)):
        name += "" if value is None else f" top_{label}={value}"
    return Case(
        shape=name + ("" if q == "one-hot" else f" q={q}"),
        dtype=dtype_name(dtype),
        make=make,
        ours=ours,
        read=nbytes(logits, tokens, cu, seeds, positions, probs),
        written=batch * (drafts + 3) * 4,
        peers={"eager": eager},
        compile=top_k is None and top_p is None,  # minutes of compilation for a sort
        check=check,
    )


def cases(device: str, small: bool) -> Iterator[Case]:
    if small:
        yield case(device, 2, 1000, torch.float32)
        yield case(device, 2, 1000, torch.bfloat16, top_k=50, top_p=0.9)
        return
    batches = [1, 16] if device == "cpu" else [1, 8, 64, 256]
    for batch in batches:
        yield case(device, batch, 151936, torch.float32)
        yield case(device, batch, 151936, torch.float32, top_p=0.9)
        yield case(device, batch, 151936, torch.float32, top_k=50)
    yield case(device, 16, 151936, torch.float32, q="dense")
    yield case(device, 16, 151936, torch.bfloat16, top_k=50, top_p=0.9)
