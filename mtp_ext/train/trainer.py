"""Trains an MTP head on shards, from its closed-form start to its last checkpoint.

The recipe, in the order of what it buys:
1. A closed-form start (`start.py`). eh_proj is the ridge regression from [norm(e), norm(h[i])] onto
   the trunk's next state h[i+1]; the block copies the features of the trunk's last layer, and
   o_proj and down_proj are regressions onto what is still missing.
2. Distillation from the trunk's own distribution (`objective.py`). Matrices are trained by Muon
   (`muon.py`): the features that the closed-form start copies are of very different sizes, and
   Adam's even steps would destroy them.
3. A curriculum (`config.py`). Most steps train depth 1; later ones unroll the head on its own
   hidden states, as drafting does.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mtp_ext.train.data import Documents
from mtp_ext.train.distributed import active, rank, world_size
from mtp_ext.train.evaluate import Acceptance
from mtp_ext.train.muon import Muon
from mtp_ext.train.objective import Objective, Report


class Trainer:
    """Owns the objective, its optimisers and the position in the schedule; can stop and resume.

    Where torch.distributed is initialised a step takes `batch_size` documents per process, and all
    processes take the same step; the first one's parameters are those that all begin with.
    """

    def __init__(self, objective: Objective, documents: Documents):
        self.objective, self.documents = objective, documents
        self.config = config = objective.config
        self.documents_per_step = config.batch_size * world_size()
        self.steps_per_epoch = -(-len(documents) // self.documents_per_step)
        self.total_steps = round(config.epochs * self.steps_per_epoch)
        self.step = 0
        self.history = torch.full((self.total_steps, 2, config.depths), torch.nan)
        self.held_out: list[tuple[int, list[float]]] = []  # step, acceptance per depth
        self.depth_weights = torch.zeros(config.depths, device=objective.device)
        self.model = objective
        if active():  # buffers hold the frozen trunk: the same everywhere
            self.model = DistributedDataParallel(objective, broadcast_buffers=False)
        block, trunk = objective.block.parameters(), list(objective.trunk.parameters())
        matrices, vectors = [], []
        for p in block:
            (matrices if p.ndim == 2 else vectors).append(p)
        adam = dict(betas=(0.9, 0.99), weight_decay=0.0)
        self.optimizers = {
            "matrices": Muon(
                matrices, lr=config.lr, weight_decay=config.weight_decay, dtype=objective.dtype
            ),
            "vectors": torch.optim.AdamW(vectors, **adam),
        }
        if trunk:
            self.optimizers["trunk"] = torch.optim.AdamW(trunk, **adam)

    def run(self, until: int | None = None, on_step: Callable[[int, Report], Any] | None = None):
        """Trains up to step `until` (the end of the schedule if None)."""
        until = self.total_steps if until is None else min(until, self.total_steps)
        while self.step < until:
            epoch, offset = divmod(self.step, self.steps_per_epoch)
            order = list(self.documents.epoch(self.documents_per_step, self.config.seed, epoch))
            for indices in order[offset:]:
                report = self._train_step(indices)
                self.step += 1
                if on_step is not None:
                    on_step(self.step, report)
                if self.step >= until:
                    break

    def _train_step(self, indices: list[int]) -> Report:
        c, done = self.config, self.step / self.total_steps
        lr = c.lr_at(self.step, self.total_steps)
        scales = {"matrices": 1.0, "vectors": c.vector_lr, "trunk": c.trunk_lr}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = lr * scales[name]

        depths = c.depths_at(done)
        self.depth_weights[:depths] = torch.tensor(c.weights_at(done))
        length = int(self.documents.shard.lens[indices].max())
        rows = self._unrolled_rows(length, depths).to(self.objective.device)
        mine = indices[rank() :: world_size()]
        batch = self.documents.batch(mine or indices[:1], length).to(self.objective.device)
        if not mine:  # this process takes part, but has nothing to say
            batch.answer.zero_()

        loss, report = self.model(batch, rows, self.depth_weights[:depths])
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.history[self.step, 0, :depths] = report.loss.cpu()
        self.history[self.step, 1, :depths] = report.accepted.cpu()
        return report

    def _unrolled_rows(self, length: int, depths: int) -> Tensor:
        """Where drafts deeper than depth 1 start: the same rows in every document of the step."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        candidates = max(length - depths - 1, 1)
        count = max(1, round(candidates * self.config.unrolled_rows))
        return torch.randperm(candidates, generator=generator)[:count].sort().values

    def note(self, acceptance: Acceptance) -> None:
        """Keeps a measurement on held-out texts with the history."""
        self.held_out.append((self.step, acceptance.conditional))

    def save(self, path: Path) -> None:
        """The first process writes; the others hold the same."""
        if rank() > 0:
            return
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "config": asdict(self.config),
                "step": self.step,
                "objective": self.objective.state_dict(),
                "optimizers": {n: o.state_dict() for n, o in self.optimizers.items()},
                "history": self.history,
                "held_out": self.held_out,
            },
            partial,
        )
        partial.rename(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["config"] != asdict(self.config) or len(state["history"]) != self.total_steps:
            raise ValueError(
                f"{path} was written with another configuration or other data; remove it to start "
                f"over, or go on with {state['config']}, {len(state['history'])} steps"
            )
        self.objective.load_state_dict(state["objective"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.step, self.history = state["step"], state["history"]
        self.held_out = state["held_out"]
