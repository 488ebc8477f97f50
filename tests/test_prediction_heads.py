"""The heads beside `MTPBlock`: chained over sequences, parallel, Medusa."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext import ops
from mtp_ext.nn import (
    MedusaHeads,
    MTPHead,
    MTPPredictionHead,
    MTPSpec,
    ParallelDrafter,
    ParallelHeads,
)

H, V, B, S, K = 32, 41, 2, 9, 3
SPEC = MTPSpec(
    hidden_size=H,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=40,
    max_positions=32,
)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Weights that bf16 holds exactly, norms and biases included."""
    generator = torch.Generator().manual_seed(4)
    for p in module.parameters():
        noise = torch.randn(p.shape, generator=generator)
        p.data = noise / p.shape[1] ** 0.5 if p.ndim == 2 else 1 + 0.3 * noise
        p.data = p.data.to(torch.bfloat16).float()
    return module


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, S, H, generator=generator).to(torch.bfloat16).float()
    return hidden, torch.randint(V, (B, S), generator=generator)


def chained(**changes) -> MTPPredictionHead:
    options = {n: changes.pop(n) for n in ("share_block", "depth") if n in changes}
    spec = dataclasses.replace(SPEC, **changes)
    return randomize(MTPPredictionHead(spec, V, options.pop("depth", K), **options))


def one_by_one(head: MTPPredictionHead, hidden: Tensor, ids: Tensor, norm=None) -> Tensor:
    """Every document [S, H] of its own, row after row, by the formula in the class's docstring."""
    s = len(ids)
    logits = torch.zeros(head.depth, s, V)
    state = {i: hidden[i] for i in range(s)}
    for d in range(head.depth):
        block, computed = head.blocks[d if len(head.blocks) > 1 else 0], {}
        for i in range(s - 1 - d):
            # Row i from scratch, with all rows before it.
            e = torch.stack([head.embedding[ids[j + d + 1]] for j in range(i + 1)])
            h = torch.stack([state[j] for j in range(i + 1)])
            y, _ = block.depth1(e[None], h[None], torch.arange(i + 1)[None] + d)
            computed[i] = block.recur(y[0, i], norm)
            logits[d, i] = head.lm_head @ block.normed(y[0, i], norm)
        state = computed
    return logits


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_block": True},
        {"recur_source": "post_norm"},
        {"final_norm": "trunk", "recur_source": "post_norm"},
        {"zero_position0": True},
        {"concat": "he", "gemma_norm": True},
    ],
    ids=str,
)
def test_logits_are_the_formula(changes) -> None:
    head, (hidden, ids) = chained(**changes), inputs()
    norm = 1 + torch.arange(H) / H
    logits = head(hidden, ids, trunk_norm=norm)
    assert logits.shape == (B, K, S, V)
    for b in range(B):
        expected = one_by_one(head, hidden[b], ids[b], norm)
        torch.testing.assert_close(logits[b], expected, rtol=1e-4, atol=1e-4)


def test_invalid_rows_are_zero_and_valid_ones_are_named() -> None:
    head, (hidden, ids) = chained(), inputs()
    logits, valid = head(hidden, ids), head.valid_rows(ids)
    for d in range(K):
        assert valid[:, d].sum(1).tolist() == [S - 1 - d] * B
        assert valid[:, d, : S - 1 - d].all()
    assert (logits[~valid] == 0).all() and (logits[valid].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_sequences_shorter_than_the_depth(length: int) -> None:
    head, (hidden, ids) = chained(), inputs()
    logits = head(hidden[:, :length], ids[:, :length])
    assert logits.shape == (B, K, length, V)
    valid = head.valid_rows(ids[:, :length])
    assert int(valid.sum()) == B * sum(max(length - 1 - d, 0) for d in range(K))
    assert (logits[~valid] == 0).all()


def test_packed_documents_are_as_alone() -> None:
    head, (hidden, ids) = chained(zero_position0=True), inputs()
    lengths = [4, 1, 4]
    documents = torch.tensor([7] * 4 + [1] + [7] * 4).expand(B, S)
    documents = torch.where(torch.arange(S) > 4, documents + 1, documents)
    logits, valid = head(hidden, ids, documents=documents), head.valid_rows(ids, documents)
    start = 0
    for n in lengths:
        for b in range(B):
            rows = slice(start, start + n)
            expected = one_by_one(head, hidden[b, rows], ids[b, rows])
            torch.testing.assert_close(logits[b, :, rows], expected, rtol=1e-4, atol=1e-4)
        assert valid[0, :, start : start + n].sum(1).tolist() == [
            max(n - 1 - d, 0) for d in range(K)
        ]
        start += n


def test_a_row_knows_nothing_of_its_target() -> None:
    """Row i of depth d changes with token i + d + 1 and with no later one."""
    head, (hidden, ids) = chained(), inputs()
    logits = head(hidden, ids)
    for later in range(S):
        other = ids.clone()
        other[:, later] = (other[:, later] + 1) % V
        changed = (head(hidden, other) != logits).any(-1)
        for d in range(K):
            assert not changed[:, d, : max(later - d - 1, 0)].any()
            if later - d - 1 >= 0:
                assert changed[:, d, later - d - 1].all()
        moved = hidden.clone()
        moved[:, later] += 1
        assert not (head(moved, ids) != logits).any(-1)[:, :, :later].any()


def test_gradients_reach_everything_and_only_from_valid_rows() -> None:
    embedding = torch.nn.Parameter(torch.randn(V, H))
    lm_head = torch.nn.Parameter(torch.randn(V, H))
    head = MTPPredictionHead(SPEC, V, K, embedding=embedding, lm_head=lm_head)
    assert head.embedding is embedding and head.lm_head is lm_head
    hidden, ids = inputs()
    hidden.requires_grad_()
    head(hidden, ids).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
    assert (hidden.grad[:, : S - 1].abs().sum(-1) > 0).all()
    assert (hidden.grad[:, S - 1] == 0).all()  # its next token is not known
    used = torch.zeros(V, dtype=torch.bool)
    used[ids[:, 1:]] = True
    assert (embedding.grad[~used] == 0).all()


def test_gradients_against_finite_differences() -> None:
    spec = dataclasses.replace(SPEC, recur_source="post_norm", qk_norm=True, output_gate=True)
    head = randomize(MTPPredictionHead(spec, V, 2)).double()
    hidden, ids = (t[:1, :4] for t in inputs())
    hidden = hidden.double().requires_grad_()
    names = ["blocks.0.eh_proj.weight", "blocks.1.hnorm.weight", "blocks.1.self_attn.q_norm.weight"]
    parameters = dict(head.named_parameters())

    def loss(hidden: Tensor, *values: Tensor) -> Tensor:
        call = torch.func.functional_call
        return call(head, dict(zip(names, values)), (hidden, ids)).tanh().mean()

    values = [parameters[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, (hidden, *values), fast_mode=True)


def test_states_are_what_the_loss_takes() -> None:
    """`linear_mtp_loss` on `states` is the cross entropy of the logits, with its gradients."""
    head, (hidden, ids) = chained(), inputs()
    documents = (torch.arange(S) >= 5).long().expand(B, S)

    states = head.states(hidden, ids, documents=documents).transpose(0, 1).flatten(1, 2)
    ends = torch.tensor([0, 5, S, S + 5, 2 * S], dtype=torch.int32)
    loss, depth_loss, count, _ = ops.linear_mtp_loss(
        states, head.lm_head, ids.flatten(), cu_seqlens=ends
    )
    loss.backward()
    grads = {name: p.grad.clone() for name, p in head.named_parameters()}
    head.zero_grad()

    logits, per_depth = head(hidden, ids, documents=documents), []
    for d in range(K):
        i = torch.tensor([*range(5 - d - 2), *range(5, S - d - 2)])
        assert int(count[d]) == B * len(i)
        targets = ids[:, i + d + 2]
        per_depth.append(F.cross_entropy(logits[:, d, i].flatten(0, 1), targets.flatten()))
    torch.testing.assert_close(depth_loss, torch.stack(per_depth))
    torch.stack(per_depth).mean().backward()
    for name, p in head.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-3, atol=1e-6)


def test_unknown_ids_have_no_embedding() -> None:
    head, (hidden, ids) = chained(), inputs()
    ids[0, 3], ids[1, 5] = -100, V
    zero = torch.cat([head.embedding, torch.zeros(1, H)])
    other = chained()
    other.embedding = torch.nn.Parameter(zero)
    logits = other(hidden, ids.where((ids >= 0) & (ids < V), V))
    torch.testing.assert_close(head(hidden, ids), logits)


def test_a_tensor_of_the_trunk_is_not_saved() -> None:
    head = MTPPredictionHead(SPEC, V, K, embedding=torch.zeros(V, H), lm_head=torch.zeros(V, H))
    assert not {"embedding", "lm_head"} & head.state_dict().keys()
    assert {n.split(".")[1] for n in head.state_dict()} == {"0", "1", "2"}
    shared = MTPPredictionHead(SPEC, V, K, share_block=True)
    assert len(shared.blocks) == 1 and {"embedding", "lm_head"} < shared.state_dict().keys()


def test_wrong_shapes_are_refused_by_name() -> None:
    head, (hidden, ids) = chained(), inputs()
    with pytest.raises(ValueError, match=r"hidden_states must be \[B, S, 32\], is \[2, 9, 31\]"):
        head(hidden[..., 1:], ids)
    with pytest.raises(ValueError, match=r"target_ids must be \[2, 9\], is \[2, 8\]"):
        head(hidden, ids[:, 1:])
    with pytest.raises(ValueError, match=r"documents must be \[2, 9\], is \[9\]"):
        head(hidden, ids, documents=ids[0])
    with pytest.raises(ValueError, match=r"lm_head must be \[41, 32\], is \[32, 41\]"):
        MTPPredictionHead(SPEC, V, K, lm_head=torch.zeros(H, V))
    with pytest.raises(ValueError, match="depth must be at least 1"):
        MTPPredictionHead(SPEC, V, 0)


def paged(n: int) -> dict:
    """One request of n rows on an empty cache of pages of 4."""
    return {
        "block_table": torch.arange(-(-n // 4), dtype=torch.int32).flip(0)[None],
        "cache_lens": torch.zeros(1, dtype=torch.int32),
        "cu_q_lens": torch.tensor([0, n], dtype=torch.int32),
        "max_q_len": n,
    }


@pytest.mark.parametrize("share_block", [False, True])
def test_the_chain_decodes_over_the_operators(share_block: bool) -> None:
    """Each depth as an `MTPHead` with its own cache, fed by the one before."""
    head, (hidden, ids) = chained(share_block=share_block), inputs()
    logits = head(hidden, ids)[0].detach()
    state = hidden[0]
    for d in range(K):
        n = S - 1 - d
        decoding = MTPHead(
            head.blocks[0 if share_block else d], head.embedding.detach(), head.lm_head.detach()
        )
        caches = decoding.new_cache(3, 4)
        y = decoding.extend(ids[0, d + 1 :], state[:n], torch.arange(n) + d, *caches, **paged(n))
        top, top_ids, lse = decoding.propose(y, 5)
        expected = logits[d, :n].topk(5, -1)
        torch.testing.assert_close(top, expected.values, rtol=1e-4, atol=1e-4)
        assert torch.equal(top_ids, expected.indices)
        torch.testing.assert_close(lse, logits[d, :n].logsumexp(-1), rtol=1e-4, atol=1e-4)
        state = decoding.recur(y)


# ---- parallel and Medusa -------------------------------------------------------------------------


@pytest.mark.parametrize("gemma_norm", [False, True])
def test_parallel_heads_draft_in_one_call(gemma_norm: bool, monkeypatch) -> None:
    spec = dataclasses.replace(SPEC, gemma_norm=gemma_norm)
    heads = randomize(ParallelHeads(spec, K))
    norm, lm_head = 1 + torch.arange(H) / H, torch.randn(V, H)
    hidden, _ = inputs()
    y = heads(hidden)
    assert y.shape == (K, B, S, H)
    for k, head in enumerate(heads.extra_heads):  # each on its own
        alone, _ = head.layer(hidden, torch.arange(S).expand(B, S))
        assert torch.equal(y[k], alone)
    logits = (heads.normed(y, norm) @ lm_head.T).detach()

    calls = []
    real = ops.head_topk
    monkeypatch.setattr(ops, "head_topk", lambda *a, **b: calls.append(len(a[0])) or real(*a, **b))
    drafter = ParallelDrafter(heads, lm_head, norm)
    state = drafter.extend(hidden[0], torch.arange(S), drafter.new_cache(3, 4), **paged(S))
    top, ids, lse = drafter.propose(state, 4)
    assert calls == [K * S]
    expected = logits[:, 0].topk(4, -1)
    torch.testing.assert_close(top, expected.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(lse, logits[:, 0].logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_parallel_heads_continue_from_their_caches() -> None:
    heads, (hidden, _) = randomize(ParallelHeads(SPEC, K)), inputs()
    token_map = torch.tensor([2, 3, 5, 7, 11], dtype=torch.int32)
    drafter = ParallelDrafter(heads, torch.randn(V, H), torch.ones(H), token_map=token_map)
    whole = drafter.extend(hidden[0], torch.arange(S), drafter.new_cache(3, 4), **paged(S))
    caches, table = drafter.new_cache(3, 4), paged(S)["block_table"]
    parts = []
    for begin, end in ((0, 5), (5, 6), (6, S)):
        parts.append(
            drafter.extend(
                hidden[0, begin:end],
                torch.arange(begin, end),
                caches,
                table,
                torch.tensor([begin], dtype=torch.int32),
                torch.tensor([0, end - begin], dtype=torch.int32),
                end - begin,
            )
        )
    assert torch.equal(torch.cat(parts, 1), whole)
    _, ids, _ = drafter.propose(whole, 5)
    assert sorted(ids[0, 0].tolist()) == token_map.tolist()


def test_parallel_heads_keep_documents_apart() -> None:
    heads, (hidden, _) = randomize(ParallelHeads(SPEC, 2)), inputs()
    documents = (torch.arange(S) >= 4).long().expand(B, S)
    positions = torch.cat([torch.arange(4), torch.arange(S - 4)]).expand(B, S)
    packed = heads(hidden, positions, documents)
    torch.testing.assert_close(packed[:, :, 4:], heads(hidden[:, 4:]))
    torch.testing.assert_close(packed[:, :, :4], heads(hidden[:, :4]))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_medusa_heads(num_layers: int, bias: bool) -> None:
    lm_head = torch.randn(V, H)
    heads = MedusaHeads(H, V, K, num_layers=num_layers, bias=bias, lm_head=lm_head)
    hidden = inputs()[0][0]
    assert torch.equal(heads(hidden), (hidden @ lm_head.T).expand(K, S, V))  # an identity at first
    randomize(heads)
    expected = []
    state = heads.state_dict()
    for k in range(K):
        x = hidden
        for n in range(num_layers):
            z = x @ state[f"medusa_head.{k}.{n}.linear.weight"].T
            z = z + state[f"medusa_head.{k}.{n}.linear.bias"] if bias else z
            x = x + z / (1 + torch.exp(-z))
        expected.append(x @ state[f"medusa_head.{k}.{num_layers}.weight"].T)
    expected = torch.stack(expected)
    torch.testing.assert_close(heads(hidden), expected, rtol=1e-4, atol=1e-4)
    assert heads(hidden[None]).shape == (K, 1, S, V)
    logits, ids, lse = heads.propose(hidden, 4)
    top = expected.topk(4, -1)
    torch.testing.assert_close(logits, top.values, rtol=1e-4, atol=1e-4)
    assert torch.equal(ids, top.indices)
    torch.testing.assert_close(lse, expected.logsumexp(-1), rtol=1e-4, atol=1e-4)
    alone = heads.propose(hidden[2:3], 4)
    assert torch.equal(alone[0][:, 0], logits[:, 2]) and torch.equal(alone[2][:, 0], lse[:, 2])
    heads(hidden).sum().backward()
    assert all(p.grad is not None for p in heads.parameters())


def test_medusa_refuses_another_lm_head() -> None:
    with pytest.raises(ValueError, match=r"lm_head must be \[41, 32\], is \[41, 31\]"):
        MedusaHeads(H, V, K, lm_head=torch.zeros(V, H - 1))
