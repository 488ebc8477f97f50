"""A tiny trunk, random shards, and the training loss in its most obvious form."""

import torch
from torch import Tensor

from mtp_ext.models import Llama, LlamaConfig
from mtp_ext.nn import MTPBlock, MTPSpec
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.data import TOP, Documents, Shard
from mtp_ext.train.generate import Task, generate, to_shard
from mtp_ext.train.objective import Objective
from mtp_ext.train.start import spec_for
from mtp_ext.train.trunk import FrozenTrunk, JointTrunk

VOCAB, SIZE = 48, 32
SPEC = MTPSpec(
    hidden_size=SIZE,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=128,
)


def random_shard(lens: list[int], seed: int = 0) -> Shard:
    g = torch.Generator().manual_seed(seed)
    total = sum(lens)
    logits = torch.randn(total, VOCAB, generator=g)
    top = logits.log_softmax(-1).topk(TOP, -1)
    return Shard(
        tokens=torch.randint(VOCAB, (total,), generator=g).int(),
        answer=torch.ones(total, dtype=torch.bool),
        hidden=torch.randn(total, SIZE, generator=g).bfloat16(),
        top_ids=top.indices.int(),
        top_logits=top.values.half(),
        lens=torch.tensor(lens),
        greedy=torch.ones(len(lens), dtype=torch.bool),
        looped=torch.zeros(len(lens), dtype=torch.bool),
    )


def make_objective(config: TrainConfig | None = None, seed: int = 0) -> Objective:
    """A head before a trunk of random weights."""
    g = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB, SIZE, generator=g)
    torch.manual_seed(seed)
    trunk = FrozenTrunk(embedding, embedding, torch.ones(SIZE))
    return Objective(MTPBlock(SPEC), trunk, torch.arange(VOCAB), config)


def reference_loss(
    objective: Objective, shard: Shard, depth_weights: tuple[float, ...], rows: list[int]
) -> Tensor:
    """Documents, depths and rows one by one, with full logits; differentiable."""
    block, trunk, soft = objective.block, objective.trunk, objective.config.labels == "soft"
    weight = trunk.lm_head[objective.token_map]
    terms: list[list[Tensor]] = [[] for _ in depth_weights]
    next_token = []
    for i in range(len(shard.lens)):
        batch = Documents(shard).batch([i])
        hidden, length = trunk.hidden(batch), len(batch.tokens)
        e = trunk.embedding[batch.tokens][None]
        positions = torch.arange(length)[None]
        y, trunk_kv = block.depth1(e[:, 1:], hidden[None, :-1], positions[:, :-1])
        drafted: list[tuple[Tensor, Tensor]] = []
        for n, losses in enumerate(terms):
            at = torch.arange(length - 1)
            if n:
                at = torch.tensor([r for r in rows if r + n + 1 < length], dtype=torch.int64)
                y = y[:, at] if n == 1 else y[:, : len(at)]
                earlier = [tuple(t[:, : len(at)] for t in pair) for pair in drafted]
                y, kv = block.deeper(e[:, at + n + 1], y, at, trunk_kv, earlier)
                drafted.append(kv)
            log_q = (block.normed(y[0], trunk.norm) @ weight.T).log_softmax(-1)
            for row, start in zip(log_q, at.tolist()):
                j = start + n + 1
                if j + 1 >= length or not batch.answer[j + 1]:
                    continue
                if soft:
                    ids = objective.inverse[batch.top_ids[j]]
                    p = batch.top_logits[j].exp()[ids >= 0]
                    losses.append((p * (p.log() - row[ids[ids >= 0]])).sum())
                elif (label := objective.inverse[batch.tokens[j + 1]]) >= 0:
                    losses.append(-row[label])
        if trunk.joint:
            normed = torch.nn.functional.rms_norm(hidden, (SIZE,), trunk.norm, SPEC.eps)
            log_p = (normed @ trunk.lm_head.T).log_softmax(-1)
            for j in range(length - 1):
                if batch.answer[j + 1]:
                    next_token.append(-log_p[j, batch.tokens[j + 1]])
    total = sum(w * torch.stack(t).mean() for w, t in zip(depth_weights, terms) if t)
    return total + torch.stack(next_token).mean() if trunk.joint else total


def assert_same_gradients(objective: Objective, loss: Tensor, expected: Tensor) -> None:
    parameters = dict(objective.named_parameters())
    for name, p in zip(parameters, torch.autograd.grad(expected, list(parameters.values()))):
        parameters[name].grad = None
        parameters[name].naive = p
    loss.backward()
    for name, p in parameters.items():
        torch.testing.assert_close(p.grad, p.naive, rtol=2e-4, atol=2e-6, msg=name)


def tiny_llama() -> Llama:
    """Random weights; sharp enough for its greedy text to be worth predicting."""
    config = LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_positions=128,
        eos_ids=(0,),
    )
    shapes = {
        "model.embed_tokens": (VOCAB, SIZE),
        "model.norm": (SIZE,),
        "q_proj": (32, SIZE),
        "k_proj": (16, SIZE),
        "v_proj": (16, SIZE),
        "o_proj": (SIZE, 32),
        "gate_proj": (48, SIZE),
        "up_proj": (48, SIZE),
        "down_proj": (SIZE, 48),
    }

    def tensor(name: str) -> Tensor | None:
        name = name.removesuffix(".weight")
        if name == "lm_head":
            return None
        shape = shapes.get(name) or shapes.get(name.rsplit(".", 1)[-1]) or (SIZE,)
        g = torch.Generator().manual_seed(sum(name.encode()))
        noise = torch.randn(shape, generator=g)
        return 1 + 0.1 * noise if len(shape) == 1 else noise / shape[1] ** 0.5

    return Llama.from_tensors(config, tensor, torch.float32)


def self_written(model: Llama, count: int, seed: int = 0) -> Shard:
    g = torch.Generator().manual_seed(seed)
    tasks = [Task(torch.randint(1, VOCAB, (4,), generator=g).tolist()) for _ in range(count)]
    return to_shard(list(generate(model, tasks, slots=16, max_answer=40, max_user=8)))


def objective_for(model: Llama, config: TrainConfig | None = None, seed: int = 0) -> Objective:
    torch.manual_seed(seed)
    block = MTPBlock(spec_for(model))
    joint = config is not None and config.joint
    trunk = JointTrunk(model) if joint else FrozenTrunk(model.embedding, model.lm_head, model.norm)
    return Objective(block, trunk, torch.arange(model.config.vocab_size), config)
