"""Reads a Llama from a Hugging Face folder: config.json, *.safetensors, tokenizer.json."""

import json
from pathlib import Path

import torch
from torch import Tensor

from mtp_ext.models.llama import Llama, LlamaConfig
from mtp_ext.models.tokenizer import Tokenizer


def _json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def load_config(folder: Path) -> LlamaConfig:
    config = _json(folder / "config.json")
    if not config:
        raise FileNotFoundError(f"{folder}: there is no config.json")
    kind = config.get("model_type")
    if kind != "llama":
        raise ValueError(f"{folder}: model_type {kind!r} is not supported (llama is)")
    for option in ("attention_bias", "mlp_bias"):
        if config.get(option):
            raise ValueError(f"{folder}: {option} is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder}: hidden_act {config['hidden_act']!r} is not supported")
    eos = _json(folder / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    heads = config["num_attention_heads"]
    # Newer files keep theta and the scaling together.
    rope = config.get("rope_parameters") or {}
    return LlamaConfig(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        rms_eps=config["rms_norm_eps"],
        rope_theta=rope.get("rope_theta") or config.get("rope_theta", 10000.0),
        rope_scaling=config.get("rope_scaling") or rope or None,
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
    )


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """None where the folder has no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    from tokenizers import Tokenizer as Inner

    inner = Inner.from_file(str(path))
    options = _json(folder / "tokenizer_config.json")
    template = options.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text()
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    bos = options.get("bos_token")
    bos_id = inner.token_to_id(bos["content"] if isinstance(bos, dict) else bos) if bos else None
    return Tokenizer(inner, template, bos_id, options.get("add_bos_token", False))


def load_safetensors(path: str | Path, dtype: torch.dtype) -> Llama:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs the package safetensors:\n    pip install safetensors tokenizers"
        ) from error

    folder = Path(path)
    config = load_config(folder)
    index = _json(folder / "model.safetensors.index.json").get("weight_map")
    names = sorted(set(index.values())) if index else ["model.safetensors"]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder}: {', '.join(missing)} not found")
    files = [safe_open(folder / name, framework="pt") for name in names]
    home = {key: file for file in files for key in file.keys()}  # noqa: SIM118
    tied = _json(folder / "config.json").get("tie_word_embeddings", False)

    def tensor(name: str) -> Tensor | None:
        if name == "lm_head.weight" and (tied or name not in home):
            return None
        if name not in home:
            raise ValueError(f"{folder}: tensor {name} is missing")
        return home[name].get_tensor(name)

    return Llama.from_tensors(config, tensor, dtype, load_tokenizer(folder))
