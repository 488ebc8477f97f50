"""A head's closed-form start: it drafts before the first step of training."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_ext.models import Llama
from mtp_ext.nn import MTPSpec
from mtp_ext.train.data import Documents
from mtp_ext.train.objective import Objective


def spec_for(model: Llama) -> MTPSpec:
    """A head with one layer of the trunk's own shape."""
    c = model.config
    return MTPSpec(
        hidden_size=c.hidden_size,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.intermediate_size,
        rope_theta=c.rope_theta,
        max_positions=c.max_positions,
        eps=c.rms_eps,
    )


def last_layer(model: Llama) -> dict[str, Tensor]:
    """The trunk's last layer under the block's parameter names."""
    c, layer = model.config, model.layers[-1]
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    names = ("q_proj", "k_proj", "v_proj")
    attention = dict(zip(names, layer.qkv.split([q, kv, kv])))
    gate, up = layer.gate_up.chunk(2)
    return {
        "input_layernorm.weight": layer.attn_norm,
        **{f"self_attn.{name}.weight": w for name, w in attention.items()},
        "post_attention_layernorm.weight": layer.mlp_norm,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
    }


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
    objective: Objective,
    documents: Documents,
    last_layer: dict[str, Tensor] | None = None,
    max_rows: int = 100_000,
    ridge: float = 3e-3,
) -> None:
    """Solves the block's output projections one after another, each for what is still missing.

    eh_proj maps [norm(e), norm(h[i])] onto the trunk's next state at unit RMS; then o_proj, then
    down_proj map onto the rest, given the features of the trunk's last layer (`last_layer`, by
    the block's parameter names), which the block copies. Without it both start at zero. It reads
    the states in the shards, and runs where they are.
    """
    block, trunk_norm = objective.block, objective.trunk.norm
    spec, size = block.spec, block.spec.hidden_size
    if block.shared_head is not None:
        block.shared_head.norm.weight.copy_(trunk_norm - 1 if spec.gemma_norm else trunk_norm)
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
            output, _ = objective.depth1(batch, batch.hidden)
            teacher, valid = batch.targets(batch.slots, 0)  # the row itself, before an answer token
            following = batch.hidden[teacher[valid] + 1]
            if spec.h_source == "post_norm":
                following = following / trunk_norm
            eps = spec.eps if spec.h_source == "pre_norm" else None
            target = F.rms_norm(following, (size,), eps=eps)
            regression.add(inputs.pop()[valid], target - output[valid])
            if regression.rows >= max_rows:
                break
        hook.remove()
        stage.weight.copy_(regression.solve())
