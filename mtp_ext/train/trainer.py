"""Trains an MTP head on shards: closed-form start, distillation, unrolled depths.

The recipe, in the order of what it buys:
1. A closed-form start. eh_proj is the ridge regression from [norm(e), norm(h[i])] onto the
   trunk's next state h[i+1]; the block copies the features of the trunk's last layer, and o_proj
   and down_proj are regressions onto what is still missing. It drafts before the first step.
2. The loss is the cross entropy to the trunk's own next-token distribution (its likeliest few
   entries), over the draft vocabulary only. Matrices are trained by Muon: the features that the
   closed-form start copies are of very different sizes, and Adam's even steps would destroy them.
3. Most steps train depth 1. The last ones unroll the head on its own hidden states, as drafting
   does.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.nn import MTPBlock
from mtp_ext.train.data import Batch, Documents
from mtp_ext.train.muon import Muon


@dataclass(frozen=True)
class TrainConfig:
    depths: int = 3
    epochs: float = 3.0
    unrolled: float = 0.4  # the part of the steps, at the end, that trains all depths
    unrolled_rows: float = 0.25  # the part of the rows whose drafts are unrolled then
    batch_size: int = 8  # documents
    lr: float = 1e-3  # of the matrices
    vector_lr: float = 0.3  # times lr, for the norms
    final_lr: float = 0.05  # times lr, at the end of a linear decay
    warmup: int = 5  # steps
    weight_decay: float = 0.01
    depth_weights: tuple[float, ...] = (1.0, 0.7, 0.5)
    seed: int = 0


class Objective:
    """The distillation loss of one batch at each depth, and the drafts' hits."""

    def __init__(self, embedding: Tensor, lm_head: Tensor, token_map: Tensor, trunk_norm: Tensor):
        self.embedding = embedding.float()
        self.weight = lm_head[token_map.long()].float()
        self.token_map = token_map.long()
        self.inverse = torch.full((len(lm_head),), -1)
        self.inverse[self.token_map] = torch.arange(len(token_map))
        self.trunk_norm = trunk_norm.float()

    def unroll(
        self, block: MTPBlock, batch: Batch, depths: int, rows: Tensor | None = None
    ) -> list[Tensor]:
        """The head's outputs y, one tensor per depth: row i of depth d predicts token i + d + 1.

        Depth 1 covers all rows, [B, S - 1, H]; deeper ones `rows` [R] (None: all that have the
        tokens they need, S - d of them).
        """
        length = batch.tokens.shape[1]
        positions = torch.arange(length - 1).expand(len(batch.tokens), length - 1)
        e = self.embedding[batch.tokens]
        y, trunk_kv = block.depth1(e[:, 1:], batch.hidden[:, :-1], positions)
        out, drafted = [y], []
        for depth in range(2, depths + 1):
            at = torch.arange(length - depth) if rows is None else rows
            # Without `rows` each depth has one row fewer than the one before.
            y = y[:, at] if depth == 2 or rows is None else y
            earlier = [tuple(t[:, : len(at)] for t in pair) for pair in drafted]
            y, kv = block.deeper(
                e[:, at + depth], block.recur(y, self.trunk_norm), at, trunk_kv, earlier
            )
            drafted.append(kv)
            out.append(y)
        return out

    def loss(
        self, block: MTPBlock, batch: Batch, depth_weights: tuple[float, ...], rows: Tensor
    ) -> Tensor:
        total = torch.zeros(())
        length = batch.tokens.shape[1]
        for n, y in enumerate(self.unroll(block, batch, len(depth_weights), rows)):
            depth = n + 1
            at = torch.arange(length - 2) if depth == 1 else rows
            # Row i is drafted while the trunk, at token i + depth, decides token i + depth + 1.
            valid = batch.answer[:, at + depth + 1]
            normed = block.normed(y[:, : len(at)][valid], self.trunk_norm)
            ids = self.inverse[batch.top_ids[:, at + depth][valid]]
            probs = batch.top_logits[:, at + depth][valid].exp().masked_fill(ids < 0, 0)
            log_q = F.log_softmax(normed @ self.weight.T, -1)
            picked = log_q.gather(1, ids.clamp(min=0))
            total = total - depth_weights[n] * (probs * picked).sum() / max(len(ids), 1)
        return total / sum(depth_weights)

    @torch.no_grad()
    def hits(self, block: MTPBlock, batch: Batch, depths: int) -> tuple[Tensor, Tensor]:
        """Whether each depth's draft is the text's token, [depths, B, S], and which rows count.

        On greedy text a hit is exactly an accepted draft, given that the shallower were.
        """
        hits = torch.zeros(depths, *batch.tokens.shape, dtype=torch.bool)
        for n, y in enumerate(self.unroll(block, batch, depths)):
            actual = batch.tokens[:, n + 2 :]
            logits = block.normed(y[:, : actual.shape[1]], self.trunk_norm) @ self.weight.T
            drafted = self.token_map[logits.argmax(-1)]
            hits[n, :, : actual.shape[1]] = (drafted == actual) & batch.answer[:, n + 2 :]
        valid = torch.zeros_like(batch.answer)
        valid[:, :-2] = batch.answer[:, 2:]
        return hits, valid


@dataclass
class Acceptance:
    """Counts per depth d = 1..depths, and per draft length k = 1..depths."""

    reached: list[int]  # rows whose drafts before d were accepted
    accepted: list[int]  # of those, draft d too
    tokens: list[int]  # emitted when decoding with k drafts
    steps: list[int]  # verification steps that took
    rows: int

    @property
    def conditional(self) -> list[float]:
        """Acceptance of draft d, given that the ones before it were accepted."""
        return [a / max(r, 1) for a, r in zip(self.accepted, self.reached)]

    @property
    def tokens_per_step(self) -> list[float]:
        return [t / max(s, 1) for t, s in zip(self.tokens, self.steps)]

    def __add__(self, other: "Acceptance") -> "Acceptance":
        def summed(name: str) -> list[int]:
            return [a + b for a, b in zip(getattr(self, name), getattr(other, name))]

        names = ("reached", "accepted", "tokens", "steps")
        return Acceptance(*map(summed, names), self.rows + other.rows)

    def __str__(self) -> str:
        accepted = " ".join(f"{a:.3f}" for a in self.conditional)
        tokens = " ".join(f"{t:.2f}" for t in self.tokens_per_step)
        return f"acceptance {accepted}, tokens/step {tokens} (k=1..{len(self.conditional)})"


def evaluate(
    block: MTPBlock, objective: Objective, documents: Documents, depths: int = 3
) -> Acceptance:
    """Acceptance on greedy documents, exactly as a greedy decoding loop would meet it."""
    total = Acceptance([0] * depths, [0] * depths, [0] * depths, [0] * depths, 0)
    for start in range(0, len(documents), 8):
        indices = list(range(start, min(start + 8, len(documents))))
        hits, valid = objective.hits(block, documents.batch(indices), depths)
        run = torch.cat([torch.ones_like(hits[:1]), hits]).long().cumprod(0)
        total.rows += int(valid.sum())
        for d in range(depths):
            total.reached[d] += int((run[d].bool() & valid).sum())
            total.accepted[d] += int((run[d + 1].bool() & valid).sum())
            emitted = run[: d + 2].sum(0)  # accepted drafts + 1
            for row, ok in zip(emitted.tolist(), valid.tolist()):
                i = ok.index(True) if True in ok else len(ok)
                while i < len(ok) and ok[i]:
                    total.steps[d] += 1
                    total.tokens[d] += row[i]
                    i += row[i]
    return total


class Ridge:
    """Accumulates rows of a linear regression y = x w."""

    def __init__(self, inputs: int, outputs: int, ridge: float):
        self.gram = torch.zeros(inputs, inputs)
        self.cross = torch.zeros(inputs, outputs)
        self.ridge = ridge
        self.rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        self.rows += len(x)
        self.gram += x.T @ x
        self.cross += x.T @ y

    def solve(self) -> Tensor:
        """The weight as nn.Linear holds it, [outputs, inputs]."""
        scale = self.gram.diagonal()
        damping = torch.diag(self.ridge * scale + 1e-6 * scale.mean())
        return torch.linalg.solve(self.gram + damping, self.cross).T


def _keep_input(inputs: list[Tensor], _: nn.Module, args: tuple[Tensor]) -> None:
    inputs.append(args[0])


@torch.no_grad()
def closed_form_start(
    block: MTPBlock,
    objective: Objective,
    documents: Documents,
    last_layer: dict[str, Tensor] | None = None,
    max_rows: int = 100_000,
    ridge: float = 3e-3,
) -> None:
    """Solves the block's output projections one after another, each for what is still missing.

    eh_proj maps [norm(e), norm(h[i])] onto the trunk's next state at unit RMS; then o_proj, then
    down_proj map onto the rest, given the features of the trunk's last layer (`last_layer`, by
    the block's parameter names), which the block copies. Without it both start at zero.
    """
    spec, size = block.spec, block.spec.hidden_size
    if block.shared_head is not None:
        weight = objective.trunk_norm
        block.shared_head.norm.weight.copy_(weight - 1 if spec.gemma_norm else weight)
    block.load_state_dict(last_layer or {}, strict=False)
    stages = [block.eh_proj, block.self_attn.o_proj, block.mlp.down_proj]
    for stage in stages:
        stage.weight.zero_()
    for stage in stages if last_layer else stages[:1]:
        inputs: list[Tensor] = []
        hook = stage.register_forward_pre_hook(partial(_keep_input, inputs))
        regression = Ridge(stage.in_features, size, ridge)
        for start in range(0, len(documents), 8):
            batch = documents.batch(list(range(start, min(start + 8, len(documents)))))
            target = F.rms_norm(batch.hidden[:, 1:], (size,), eps=spec.eps)
            if spec.h_source == "post_norm":
                target = F.rms_norm(batch.hidden[:, 1:] / objective.trunk_norm, (size,))
            [output] = objective.unroll(block, batch, 1)
            valid = batch.answer[:, 1:]
            regression.add(inputs.pop()[valid], (target - output)[valid])
            if regression.rows >= max_rows:
                break
        hook.remove()
        stage.weight.copy_(regression.solve())


class Trainer:
    """Owns the block, its optimisers and the position in the schedule; can stop and resume."""

    def __init__(
        self, block: MTPBlock, objective: Objective, documents: Documents, config: TrainConfig
    ):
        self.block, self.objective, self.documents = block, objective, documents
        self.config = config
        self.steps_per_epoch = -(-len(documents) // config.batch_size)
        self.total_steps = round(config.epochs * self.steps_per_epoch)
        self.step = 0
        matrices = [p for p in block.parameters() if p.ndim == 2]
        vectors = [p for p in block.parameters() if p.ndim < 2]
        self.optimizers = {
            "matrices": Muon(matrices, lr=config.lr, weight_decay=config.weight_decay),
            "vectors": torch.optim.AdamW(vectors, betas=(0.9, 0.99), weight_decay=0.0),
        }

    def learning_rate(self, step: int) -> float:
        c = self.config
        left = 1 - step / max(self.total_steps, 1)
        return c.lr * min(1, (step + 1) / c.warmup) * (c.final_lr + (1 - c.final_lr) * left)

    def depths_at(self, step: int) -> int:
        unrolled_from = self.total_steps * (1 - self.config.unrolled)
        return self.config.depths if step >= unrolled_from else 1

    def run(self, until: int | None = None, on_step: Callable[[int, float], Any] | None = None):
        """Trains up to step `until` (the end of the schedule if None)."""
        until = self.total_steps if until is None else min(until, self.total_steps)
        while self.step < until:
            epoch, offset = divmod(self.step, self.steps_per_epoch)
            order = list(self.documents.epoch(self.config.batch_size, self.config.seed, epoch))
            for indices in order[offset:]:
                loss = self._train_step(self.documents.batch(indices))
                self.step += 1
                if on_step is not None:
                    on_step(self.step, loss)
                if self.step >= until:
                    break

    def _train_step(self, batch: Batch) -> float:
        lr = self.learning_rate(self.step)
        for name, scale in (("matrices", 1.0), ("vectors", self.config.vector_lr)):
            for group in self.optimizers[name].param_groups:
                group["lr"] = lr * scale
        depths = self.depths_at(self.step)
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        candidates = batch.tokens.shape[1] - depths - 1
        count = max(1, round(candidates * self.config.unrolled_rows))
        rows = torch.randperm(candidates, generator=generator)[:count].sort().values
        weights = self.config.depth_weights[:depths]
        loss = self.objective.loss(self.block, batch, weights, rows)
        self.block.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.block.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss.item()

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "config": asdict(self.config),
                "step": self.step,
                "block": self.block.state_dict(),
                "optimizers": {n: o.state_dict() for n, o in self.optimizers.items()},
            },
            partial,
        )
        partial.rename(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if state["config"] != asdict(self.config):
            raise ValueError(f"{path} was written with another configuration: {state['config']}")
        self.block.load_state_dict(state["block"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step = state["step"]
