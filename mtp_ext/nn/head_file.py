"""MTP heads on disk: a safetensors file with the spec, the trunk and the training in its header."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_ext.nn.mtp_block import MTPBlock
from mtp_ext.nn.mtp_head import MTPHead
from mtp_ext.nn.specs import MTPSpec

DEFAULT_HEAD = "smollm2_135m_mtp.safetensors"


def default_head_path() -> Path:
    """The shipped head, for SmolLM2-135M-Instruct."""
    return Path(str(resources.files("mtp_ext.nn"))) / "weights" / DEFAULT_HEAD


def save_head(
    path: str | Path, block: MTPBlock, token_map: Tensor | None = None, **metadata: Any
) -> None:
    """Writes the block: parameters in bf16, a router's correction bias as it is.

    metadata (trunk, training tokens, acceptance, ...) must be JSON.
    """
    from safetensors.torch import save_file

    tensors = {name: t.detach().contiguous() for name, t in block.state_dict().items()}
    for name, p in block.named_parameters():
        tensors[name] = p.detach().to(torch.bfloat16).contiguous()
    if token_map is not None:
        tensors["token_map"] = token_map.to(torch.int32).contiguous()
    header = {"spec": json.dumps(block.spec.to_dict())}
    header.update({k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})
    save_file(tensors, str(path), metadata=header)


def read_head(path: str | Path | None = None) -> tuple[MTPBlock, Tensor | None, dict[str, str]]:
    """The block (f32), its token_map and the file's metadata. No path: the shipped head."""
    from safetensors import safe_open

    path = Path(path) if path is not None else default_head_path()
    with safe_open(str(path), framework="pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "spec" not in metadata:
        raise ValueError(f"{path}: no 'spec' in the header; not a head written by save_head")
    token_map = tensors.pop("token_map", None)
    block = MTPBlock(MTPSpec.from_dict(json.loads(metadata.pop("spec"))))
    block.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return block, token_map, metadata


def load_head(path: str | Path | None = None, *, trunk: Any, int8: bool = True) -> MTPHead:
    """A head ready to draft for `trunk`: anything with `embedding` and `lm_head`, [V, H] each.

    The head takes the embedding's dtype and device; its large matrices become int8 unless told
    otherwise (`MTPHead`). A head that borrows the trunk's final norm also needs `trunk.norm`.
    """
    block, token_map, metadata = read_head(path)
    vocab, hidden = trunk.embedding.shape
    if hidden != block.spec.hidden_size:
        raise ValueError(
            f"the head has hidden_size {block.spec.hidden_size}, the trunk {hidden}: "
            "it was trained for another model"
        )
    if token_map is not None and int(token_map.max()) >= vocab:
        raise ValueError(f"the head drafts ids beyond the trunk's vocabulary of {vocab}")
    return MTPHead(
        block,
        trunk.embedding,
        trunk.lm_head,
        trunk_norm=trunk.norm if block.spec.final_norm == "trunk" else None,
        token_map=token_map,
        metadata=metadata,
        int8=int8,
    )
