"""Small checkpoints of MTP heads in the naming of the published ones, for tests.

Names, shapes and config keys are written out here as the model folders have them, independently of
the maps in `mtp_ext.nn`.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

H, F, V, LAYERS = 48, 40, 61, 5  # hidden, MLP, vocabulary; layers of the trunk

_COMMON = {
    "hidden_size": H,
    "intermediate_size": F,
    "vocab_size": V,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_MOE = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
CONFIGS = {
    "deepseek_v3": {
        **_COMMON,
        **_MOE,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
        "q_lora_rank": 24,
        "kv_lora_rank": 20,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
    },
    "glm4_moe": {
        **_COMMON,
        **_MOE,
        "model_type": "glm4_moe",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 1,
    },
    "qwen3_next": {
        **_COMMON,
        "model_type": "qwen3_next",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "attention_bias": False,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
        "norm_topk_prob": True,
    },
    "mimo": {
        **_COMMON,
        "model_type": "mimo",
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rms_norm_eps": 1e-5,
        "rope_theta": 640000,
        "num_nextn_predict_layers": 2,
    },
    "ernie4_5_moe": {
        **_COMMON,
        "model_type": "ernie4_5_moe",
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000,
        "use_bias": False,
        "num_nextn_predict_layers": 1,
    },
}


def _mlp(at: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}.gate_proj.weight": (width, H),
        f"{at}.up_proj.weight": (width, H),
        f"{at}.down_proj.weight": (H, width),
    }


def _grouped_query(at: str, d: int, *, bias=False, norms=False, gate=False) -> dict:
    n, kv = 4, 2
    shapes = {
        f"{at}.q_proj.weight": (n * d * (2 if gate else 1), H),
        f"{at}.k_proj.weight": (kv * d, H),
        f"{at}.v_proj.weight": (kv * d, H),
        f"{at}.o_proj.weight": (H, n * d),
    }
    if bias:
        shapes |= {f"{at}.{p}_proj.bias": (w * d,) for p, w in (("q", n), ("k", kv), ("v", kv))}
    if norms:
        shapes |= {f"{at}.q_norm.weight": (d,), f"{at}.k_norm.weight": (d,)}
    return shapes


def _sigmoid_experts(at: str) -> dict:
    shapes = {f"{at}.gate.weight": (8, H), f"{at}.gate.e_score_correction_bias": (8,)}
    for e in range(8):
        shapes |= _mlp(f"{at}.experts.{e}", 12)
    return shapes | _mlp(f"{at}.shared_experts", 24)


def _around(at: str) -> dict:
    return {
        f"{at}.input_layernorm.weight": (H,),
        f"{at}.post_attention_layernorm.weight": (H,),
    }


def _appended(at: str) -> dict:
    return {
        f"{at}.embed_tokens.weight": (V, H),
        f"{at}.enorm.weight": (H,),
        f"{at}.hnorm.weight": (H,),
        f"{at}.eh_proj.weight": (H, 2 * H),
        f"{at}.shared_head.norm.weight": (H,),
        f"{at}.shared_head.head.weight": (V, H),
        **_around(at),
    }


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Every tensor of the family's heads."""
    if family == "deepseek_v3":
        at = f"model.layers.{LAYERS}"
        attn = f"{at}.self_attn"
        return {
            **_appended(at),
            f"{attn}.q_a_proj.weight": (24, H),
            f"{attn}.q_a_layernorm.weight": (24,),
            f"{attn}.q_b_proj.weight": (4 * 24, 24),
            f"{attn}.kv_a_proj_with_mqa.weight": (20 + 8, H),
            f"{attn}.kv_a_layernorm.weight": (20,),
            f"{attn}.kv_b_proj.weight": (4 * (16 + 10), 20),
            f"{attn}.o_proj.weight": (H, 4 * 10),
            **_sigmoid_experts(f"{at}.mlp"),
        }
    if family == "glm4_moe":
        at = f"model.layers.{LAYERS}"
        attn = _grouped_query(f"{at}.self_attn", 16, bias=True, norms=True)
        return {**_appended(at), **attn, **_sigmoid_experts(f"{at}.mlp")}
    if family == "qwen3_next":
        at = "mtp.layers.0"
        result = {
            "mtp.fc.weight": (H, 2 * H),
            "mtp.pre_fc_norm_embedding.weight": (H,),
            "mtp.pre_fc_norm_hidden.weight": (H,),
            "mtp.norm.weight": (H,),
            **_around(at),
            **_grouped_query(f"{at}.self_attn", 16, norms=True, gate=True),
            f"{at}.mlp.gate.weight": (8, H),
            **_mlp(f"{at}.mlp.shared_expert", 20),
            f"{at}.mlp.shared_expert_gate.weight": (1, H),
        }
        for e in range(8):
            result |= _mlp(f"{at}.mlp.experts.{e}", 12)
        return result
    if family == "mimo":
        result = {}
        for at in ("model.mtp_layers.0", "model.mtp_layers.1"):
            result |= {
                f"{at}.token_layernorm.weight": (H,),
                f"{at}.hidden_layernorm.weight": (H,),
                f"{at}.input_proj.weight": (H, 2 * H),
                f"{at}.final_layernorm.weight": (H,),
                **_around(at),
                **_grouped_query(f"{at}.self_attn", 24, bias=True),
                **_mlp(f"{at}.mlp", F),
            }
        return result
    assert family == "ernie4_5_moe"
    at = "model.mtp_block.0"
    return {
        "model.mtp_emb_norm.0.weight": (H,),
        "model.mtp_hidden_norm.0.weight": (H,),
        "model.mtp_linear_proj.0.weight": (H, 2 * H),
        **_around(at),
        **_grouped_query(f"{at}.self_attn", 16),
        **_mlp(f"{at}.mlp", F),
    }


def tensors(family: str, seed: int = 0) -> dict[str, Tensor]:
    """Random weights that bf16 holds exactly; norm weights far from 1 (Qwen3-Next: from 0)."""
    result = {}
    for name, shape in shapes(family).items():
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            weight = noise / shape[1] ** 0.5
        elif "norm" in name:
            weight = 0.4 * noise + (family != "qwen3_next")
        else:
            weight = 0.3 * noise
        result[name] = weight.to(torch.bfloat16)
        if name.endswith("e_score_correction_bias"):
            result[name] = result[name].float()
    return result


def write(folder: Path, config: dict, weights: dict[str, Tensor], shards: int = 1) -> None:
    """A model folder, with some of the trunk's tensors beside the head's."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        "model.layers.0.input_layernorm.weight": torch.ones(H),
        "model.norm.weight": torch.ones(H),
        **weights,
    }
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(weights))}
    for file in set(weight_map.values()):
        part = {name: weights[name] for name, home in weight_map.items() if home == file}
        save_file(part, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
