"""MTP heads in the checkpoints they were published in: Hugging Face folders of safetensors.

    block = load_checkpoint(folder)          # of DeepSeek-V3, GLM-4.5, Qwen3-Next, MiMo, ERNIE 4.5
    save_checkpoint(out, [block], config)    # under the same names again

A folder holds config.json and either model.safetensors or shards with model.safetensors.index.json;
only the shards that hold the head are opened. `NAMES` says what each family calls the parameters of
`MTPBlock`. Weights in DeepSeek's fp8 (e4m3 with one scale per block of 128 x 128, stored as
"weight_scale_inv") are dequantised.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_ext.nn import specs
from mtp_ext.nn.layers import rope_order, rope_table
from mtp_ext.nn.mtp_block import MTPBlock

INDEX = "model.safetensors.index.json"
SCALE = "_scale_inv"  # of DeepSeek's fp8 weights, behind the weight's name


@dataclass(frozen=True)
class Names:
    """A family's names. {i} is the head's number, {n} its layer number, after the trunk's."""

    layer: str  # what stands before the names of the decoder layer
    enorm: str
    hnorm: str
    eh_proj: str
    norm: str | None  # the head's own final norm
    renamed: dict[str, str] = field(default_factory=dict)  # inside the decoder layer
    copies: tuple[str, ...] = ()  # of the trunk's tensors, which are not read
    count: str = "num_nextn_predict_layers"  # the config's key for the number of heads

    def of(self, name: str, config: Mapping[str, Any], index: int) -> str:
        """The published name of a parameter or buffer of `MTPBlock`."""
        module, _, kind = name.rpartition(".")
        outside = {
            "enorm": self.enorm,
            "hnorm": self.hnorm,
            "eh_proj": self.eh_proj,
            "shared_head.norm": self.norm,
        }
        if module in outside:
            if outside[module] is None:
                raise ValueError(f"this family has no place for {name}")
            published = f"{outside[module]}.{kind}"
        else:
            for ours, theirs in self.renamed.items():
                name = name.replace(ours, theirs)
            published = self.layer + name
        return self.fill(published, config, index)

    def fill(self, pattern: str, config: Mapping[str, Any], index: int) -> str:
        return pattern.format(i=index, n=config["num_hidden_layers"] + index)

    def owns(self, published: str, config: Mapping[str, Any], index: int) -> bool:
        """Whether a checkpoint's tensor belongs to this head."""
        patterns = [self.layer, self.enorm, self.hnorm, self.eh_proj, self.norm]
        starts = [self.fill(p, config, index) for p in patterns if p is not None]
        return any(published.startswith(s if s.endswith(".") else s + ".") for s in starts)


_DEEPSEEK = Names(
    layer="model.layers.{n}.",
    enorm="model.layers.{n}.enorm",
    hnorm="model.layers.{n}.hnorm",
    eh_proj="model.layers.{n}.eh_proj",
    norm="model.layers.{n}.shared_head.norm",
    copies=(
        "model.layers.{n}.embed_tokens.weight",
        "model.layers.{n}.shared_head.head.weight",
    ),
)

NAMES: dict[str, Names] = {
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": _DEEPSEEK,
    "qwen3_next": Names(
        layer="mtp.layers.{i}.",
        enorm="mtp.pre_fc_norm_embedding",
        hnorm="mtp.pre_fc_norm_hidden",
        eh_proj="mtp.fc",
        norm="mtp.norm",
        renamed={"mlp.shared_experts.": "mlp.shared_expert."},
    ),
    "mimo": Names(
        layer="model.mtp_layers.{i}.",
        enorm="model.mtp_layers.{i}.token_layernorm",
        hnorm="model.mtp_layers.{i}.hidden_layernorm",
        eh_proj="model.mtp_layers.{i}.input_proj",
        norm="model.mtp_layers.{i}.final_layernorm",
    ),
    "ernie4_5_moe": Names(
        layer="model.mtp_block.{i}.",
        enorm="model.mtp_emb_norm.{i}",
        hnorm="model.mtp_hidden_norm.{i}",
        eh_proj="model.mtp_linear_proj.{i}",
        norm=None,
    ),
}


def load_checkpoint(
    folder: str | Path, index: int = 0, *, dtype: torch.dtype = torch.float32, **changes: Any
) -> MTPBlock:
    """The head that was published with a model.

    Args:
        folder: config.json and safetensors, in shards or in one file; the trunk's tensors may be
            there or not.
        index: which head, of those the config counts.
        dtype: of the block's parameters; a router's correction bias stays f32.
        changes: fields of `MTPSpec` that replace what the family's function in `specs` says.

    Returns:
        An `MTPBlock` with the family's spec. The embedding, the LM head and, for ERNIE, the final
        norm are the trunk's; the copies of them that DeepSeek and GLM store are not read.

    Raises ValueError for an unknown model_type, for tensors of the head that are missing, have
    another shape, or are there but have no place in the block, each by its name with the expected
    and the actual shape, and for weights quantised in another way than DeepSeek's fp8.
    FileNotFoundError for a file that is not there.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    names = NAMES[specs.family_of(config)]
    if not 0 <= index < (count := config.get(names.count, 1)):
        raise ValueError(f"{folder}: there is no MTP head {index}, {names.count} is {count}")
    spec = specs.from_config(config, **changes)
    with torch.device("meta"):  # a DeepSeek head has 11.5 billion parameters to draw otherwise
        block = MTPBlock(spec)
    wanted = {names.of(n, config, index): (n, t) for n, t in block.state_dict().items()}

    home = _shard_of(folder)
    copies = {names.fill(c, config, index) for c in names.copies}
    scales = {name + SCALE for name in wanted}
    unexpected = [
        name
        for name in home
        if names.owns(name, config, index)
        and name not in wanted.keys() | copies | scales
        and not name.endswith("rotary_emb.inv_freq")  # a constant that some files carry along
    ]
    missing = [f"{n} {list(t.shape)}" for n, (_, t) in wanted.items() if n not in home]
    if missing or unexpected:
        raise ValueError(
            f"{folder}: this is not the head that {config['model_type']} publishes"
            + _listed("missing", missing)
            + _listed("unexpected", unexpected)
        )

    block_size = config.get("quantization_config", {}).get("weight_block_size") or [128, 128]
    state, wrong = {}, []
    for published, tensor in _read(folder, home, [n for n in home if n in wanted.keys() | scales]):
        name, expected = wanted[published.removesuffix(SCALE)]
        if published.endswith(SCALE):
            name += SCALE
        elif tensor.shape != expected.shape:
            wrong.append(f"{published}: expected {list(expected.shape)}, is {list(tensor.shape)}")
        state[name] = tensor
    if wrong:
        raise ValueError(
            f"{folder}: the checkpoint does not fit the head" + _listed("shape", wrong)
        )
    parameters = {name for name, _ in block.named_parameters()}
    for published, (name, _) in wanted.items():
        weight = _dequantized(published, state[name], state.pop(name + SCALE, None), block_size)
        state[name] = weight.to(dtype if name in parameters else torch.float32)
    block.load_state_dict(state, assign=True)
    block.rope, block.self_attn.order = rope_table(spec), rope_order(spec)
    return block


def save_checkpoint(
    folder: str | Path,
    blocks: Sequence[MTPBlock],
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype | None = torch.bfloat16,
    embedding: Tensor | None = None,
    lm_head: Tensor | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes heads under the names of config["model_type"], with config.json, to a folder.

    Args:
        folder: is made if need be; must not hold a checkpoint yet.
        blocks: head 0, 1, ...
        config: the trunk's, with num_hidden_layers.
        dtype: of the written parameters; None leaves each as it is. Nothing is quantised.
        embedding, lm_head: the trunk's [V, H], for the copies that DeepSeek and GLM store.
        max_shard_bytes: a new file is begun before one would exceed it.

    Raises ValueError where a block has a parameter that the family has no name for, and
    FileExistsError rather than mixing two checkpoints.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    names = NAMES[specs.family_of(config)]
    tensors: dict[str, Tensor] = {}
    for index, block in enumerate(blocks):
        parameters = {name for name, _ in block.named_parameters()}
        for name, tensor in block.state_dict().items():
            kept = dtype is None or name not in parameters
            tensors[names.of(name, config, index)] = tensor.to(tensor.dtype if kept else dtype)
        for pattern, tensor in zip(names.copies, (embedding, lm_head)):
            if tensor is not None:
                tensors[names.fill(pattern, config, index)] = tensor.clone()

    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    if existing := sorted(folder.glob("*.safetensors*")):
        raise FileExistsError(f"{existing[0]} exists; heads are written to a folder of their own")
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in tensors.values())
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=2))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path} not found")
    return json.loads(path.read_text())


def _shard_of(folder: Path) -> dict[str, str]:
    """The file of every tensor."""
    from safetensors import safe_open

    if (folder / INDEX).exists():
        return _read_json(folder / INDEX)["weight_map"]
    file = "model.safetensors"
    if not (folder / file).exists():
        raise FileNotFoundError(f"{folder}: neither {file} nor {INDEX} found")
    with safe_open(folder / file, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), file)


def _read(
    folder: Path, home: Mapping[str, str], names: Sequence[str]
) -> Iterable[tuple[str, Tensor]]:
    """The named tensors; every file is opened once."""
    from safetensors import safe_open

    for file in sorted({home[name] for name in names}):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder}: {file} not found, which holds tensors of the head")
        with safe_open(folder / file, framework="pt") as opened:
            for name in names:
                if home[name] == file:
                    yield name, opened.get_tensor(name)


def _dequantized(
    name: str, weight: Tensor, scale: Tensor | None, block_size: Sequence[int]
) -> Tensor:
    """f32 where the weight is fp8 with one scale per block; any other float weight as it is."""
    if weight.dtype != torch.float8_e4m3fn:
        if not weight.is_floating_point() or weight.element_size() == 1 or scale is not None:
            raise ValueError(
                f"{name} is stored as {str(weight.dtype).removeprefix('torch.')}; only float "
                f"weights and float8_e4m3fn with {name + SCALE} can be read"
            )
        return weight
    if scale is None:
        raise ValueError(f"{name} is float8_e4m3fn, but there is no {name + SCALE}")
    expected = [-(-n // b) for n, b in zip(weight.shape, block_size)]
    if list(scale.shape) != expected:
        raise ValueError(
            f"{name + SCALE}: expected {expected}, one per block of {list(block_size)}, "
            f"is {list(scale.shape)}"
        )
    rows, columns = weight.shape
    scale = scale.float().repeat_interleave(block_size[0], 0)[:rows]
    return weight.float() * scale.repeat_interleave(block_size[1], 1)[:, :columns]


def _listed(title: str, items: Sequence[str], limit: int = 8) -> str:
    """Lines of an error message; nothing for no items."""
    shown = [f"\n  {title}: {item}" for item in items[:limit]]
    if len(items) > limit:
        shown.append(f"\n  {title}: and {len(items) - limit} more")
    return "".join(shown)
