"""silu(gate) * up of rows that hold gate, then up."""

import torch
from torch import Tensor


def silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.double().chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)
