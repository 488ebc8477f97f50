"""Reads a Llama from a GGUF file: configuration, weights, tokenizer and chat template."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mtp_ext.models.llama import Llama, LlamaConfig
from mtp_ext.models.tokenizer import Tokenizer

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face weight."""
    if name in _TOP:
        return _TOP[name]
    index, _, rest = name.removeprefix("model.layers.").partition(".")
    return f"blk.{index}.{_IN_LAYER[rest.removesuffix('.weight')]}.weight"


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undoes GGUF's order of q and k rows.

    GGUF rotates neighbouring rows (2i, 2i+1) of a head; here, as in Hugging Face, row i goes with
    row i + D/2.
    """
    rows, columns = weight.shape
    pairs = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns)


def load_gguf(path: str | Path, dtype: torch.dtype) -> Llama:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs the package gguf:\n    pip install gguf tokenizers"
        ) from error

    class Reader(gguf.GGUFReader):
        """Reads through a plain array: slicing the memory map itself costs several times more."""

        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._plain = mapped.view(np.ndarray)

    reader = Reader(path)
    architecture = reader.fields["general.architecture"].contents()
    if architecture != "llama":
        raise ValueError(f"{path}: architecture {architecture!r} is not supported (llama is)")

    def field(name: str, default=None):
        found = reader.fields.get(name)
        return default if found is None else found.contents()

    heads = field("llama.attention.head_count")
    hidden = field("llama.embedding_length")
    head_dim = field("llama.attention.key_length", hidden // heads)
    if field("llama.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{path}: rotating only part of a head is not supported")
    scaling = field("llama.rope.scaling.type", "none")
    if scaling not in ("none", "linear") or "rope_freqs.weight" in {t.name for t in reader.tensors}:
        raise ValueError(f"{path}: rope scaling other than none and linear is not supported")
    tokens = field("tokenizer.ggml.tokens")
    stops = [field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=field("llama.feed_forward_length"),
        num_layers=field("llama.block_count"),
        num_heads=heads,
        num_kv_heads=field("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=len(tokens),
        max_positions=field("llama.context_length"),
        rms_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=field("llama.rope.freq_base", 10000.0),
        rope_scaling=None
        if scaling == "none"
        else {"rope_type": scaling, "factor": field("llama.rope.scaling.factor")},
        eos_ids=tuple(dict.fromkeys(i for i in stops if i is not None)),
    )

    kind = field("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"{path}: tokenizer {kind!r} is not supported (gpt2, byte-level BPE, is)")
    tokenizer = Tokenizer.byte_level_bpe(
        tokens,
        field("tokenizer.ggml.merges"),
        field("tokenizer.ggml.token_type"),
        field("tokenizer.ggml.pre", "gpt-2"),
        chat_template=field("tokenizer.chat_template"),
        bos_id=field("tokenizer.ggml.bos_token_id"),
        add_bos=field("tokenizer.ggml.add_bos_token", False),
    )

    stored = {t.name: t for t in reader.tensors}

    def tensor(name: str) -> Tensor | None:
        item = stored.get(gguf_name(name))
        if item is None:
            if name == "lm_head.weight":
                return None
            raise ValueError(f"{path}: tensor {gguf_name(name)} is missing")
        weight = torch.tensor(gguf.quants.dequantize(item.data, item.tensor_type))
        if name.endswith("q_proj.weight"):
            return unpermute(weight, config.num_heads)
        if name.endswith("k_proj.weight"):
            return unpermute(weight, config.num_kv_heads)
        return weight

    return Llama.from_tensors(config, tensor, dtype, tokenizer)
