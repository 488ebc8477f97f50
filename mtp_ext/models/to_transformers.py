"""The same weights as a transformers model, to compare with."""

from typing import Any

from mtp_ext.models.llama import Llama


def to_transformers(model: Llama) -> Any:
    """A LlamaForCausalLM in the model's dtype; it shares no memory with it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c = model.config
    scaling = c.rope_scaling or {"rope_type": "default"}
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_positions,
        rms_norm_eps=c.rms_eps,
        rope_theta=c.rope_theta,
        rope_parameters={**scaling, "rope_theta": c.rope_theta},
        tie_word_embeddings=model.lm_head is model.embedding,
        eos_token_id=list(c.eos_ids) or None,
        pad_token_id=c.eos_ids[0] if c.eos_ids else None,
        bos_token_id=None,
    )
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    weights = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.norm}
    if model.lm_head is not model.embedding:
        weights["lm_head.weight"] = model.lm_head
    for i, layer in enumerate(model.layers):
        at = f"model.layers.{i}."
        weights[at + "input_layernorm.weight"] = layer.attn_norm
        weights[at + "post_attention_layernorm.weight"] = layer.mlp_norm
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        for name, part in zip(names, layer.qkv.split([q, kv, kv])):
            weights[f"{at}{name}.weight"] = part
        weights[at + "self_attn.o_proj.weight"] = layer.o
        for name, part in zip(("mlp.gate_proj", "mlp.up_proj"), layer.gate_up.chunk(2)):
            weights[f"{at}{name}.weight"] = part
        weights[at + "mlp.down_proj.weight"] = layer.down
    twin = LlamaForCausalLM(config).to(model.dtype)
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"weights do not fit transformers' Llama: {missing}, {unexpected}")
    return twin.eval()
