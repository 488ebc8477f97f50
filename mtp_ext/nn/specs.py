"""What an MTP head computes, besides its weights: `MTPSpec`, and the spec of each published family.

A family's function takes the dictionary of the checkpoint's config.json, so

    spec = specs.from_config(json.load(open(folder / "config.json")))

describes the head that was published with that model. Systems that run these heads differ in three
places that no checkpoint records: whether the trunk's state is taken before or after its final norm
(`h_source`), which of the head's states recurs (`recur_source`), and whether the row at position 0
gets a zero embedding (`zero_position0`). Each function says which it follows; any field can be
overridden: `specs.ernie4_5_moe(config, final_norm="none")`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class LatentSpec:
    """Multi-head latent attention (DeepSeek-AI 2024, "DeepSeek-V2")."""

    q_lora_rank: int | None  # None: queries are projected directly
    kv_lora_rank: int
    nope_dim: int  # elements of a head that are not rotated
    rope_dim: int  # rotated ones; their key is shared by all heads
    v_dim: int


@dataclass(frozen=True)
class MoESpec:
    """A mixture of SwiGLU experts, with shared experts that every token goes through.

    A token's experts are the `top_k` of the router's scores; with `scoring` "sigmoid" a correction
    bias takes part in the choice but not in the weights (DeepSeek-AI 2024, "DeepSeek-V3"), and only
    experts of the best `top_groups` of `num_groups` groups can be chosen.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_size: int = 0  # width of all shared experts together; 0: none
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    normalize: bool = True  # the chosen weights sum to 1
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    shared_gate: bool = False  # the shared output is scaled by sigmoid(gate . x)


@dataclass(frozen=True)
class MTPSpec:
    """Everything that decides what an MTP head computes, besides its weights."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rope_theta: float = 10000.0
    max_positions: int = 8192
    eps: float = 1e-5
    concat: Literal["eh", "he"] = "eh"  # [e; h] as DeepSeek, [h; e] as MiMo
    embed_norm: bool = True
    hidden_norm: bool = True
    gemma_norm: bool = False  # scale by 1 + w instead of w, in every norm
    h_source: Literal["pre_norm", "post_norm"] = "pre_norm"  # h[i]: around the trunk's final norm
    recur_source: Literal["pre_norm", "post_norm"] = "pre_norm"  # y: around the head's final norm
    final_norm: Literal["own", "trunk", "none"] = "own"  # before the LM head
    zero_position0: bool = False  # zero embedding in the row at position 0, as DeepSeek in vLLM
    qk_norm: bool = False  # RMSNorm over each head of q and k, before the rotation
    qkv_bias: bool = False
    output_gate: bool = False  # q_proj also gives a gate; attention's result times sigmoid(gate)
    rotary_dim: int | None = None  # the first elements of a head that are rotated; None: all
    rope_interleaved: bool = False  # element 2i turns with 2i + 1, not i with i + rotary_dim / 2
    rope_scaling: dict[str, Any] | None = None  # Hugging Face's keys; "yarn" only
    latent: LatentSpec | None = None  # in place of grouped-query attention
    moe: MoESpec | None = None  # in place of the dense MLP

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "MTPSpec":
        """From `to_dict`; also reads the `own_norm` flag of files written before `final_norm`."""
        values = dict(values)
        if "own_norm" in values:
            values["final_norm"] = "own" if values.pop("own_norm") else "trunk"
        for name, kind in (("latent", LatentSpec), ("moe", MoESpec)):
            if values.get(name) is not None:
                values[name] = kind(**values[name])
        return cls(**values)


def deepseek_v3(config: Mapping[str, Any], **changes: Any) -> MTPSpec:
    """DeepSeek-V3, R1 and V3.1 (DeepSeek-AI 2024, "DeepSeek-V3 technical report").

    [e; h], although the report writes [h; e]. The head was trained on the trunk's state after
    its final norm, and its own state is passed on after `shared_head.norm`, as SGLang and vLLM do
    today (older vLLM: before). `zero_position0` is vLLM's alone.
    """
    return _spec(
        config,
        changes,
        num_kv_heads=config["num_attention_heads"],
        head_dim=config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        h_source="post_norm",
        recur_source="post_norm",
        rope_interleaved=config.get("rope_interleave", True),
        latent=LatentSpec(
            q_lora_rank=config.get("q_lora_rank"),
            kv_lora_rank=config["kv_lora_rank"],
            nope_dim=config["qk_nope_head_dim"],
            rope_dim=config["qk_rope_head_dim"],
            v_dim=config["v_head_dim"],
        ),
        moe=_sigmoid_moe(config),
    )


def glm4_moe(config: Mapping[str, Any], **changes: Any) -> MTPSpec:
    """GLM-4.5, GLM-4.5-Air, GLM-4.6 (Zhipu AI 2025, "GLM-4.5").

    DeepSeek's wiring around GLM's own layer: grouped-query attention with biases on q, k and v,
    half of each head rotated, and norms on q and k except in GLM-4.5-Air.
    """
    return _spec(
        config,
        changes,
        h_source="post_norm",
        recur_source="post_norm",
        qk_norm=config.get("use_qk_norm", False),
        qkv_bias=config.get("attention_bias", False),
        moe=_sigmoid_moe(config),
    )


def qwen3_next(config: Mapping[str, Any], **changes: Any) -> MTPSpec:
    """Qwen3-Next (Qwen team 2025); a config without experts gives a dense layer.

    Every norm scales by 1 + w. The layer is the trunk's full-attention one: norms on q and k, a
    quarter of each head rotated, an output gate. Trunk and head pass on their normed states.
    """
    moe = None
    if config.get("num_experts"):
        moe = MoESpec(
            num_experts=config["num_experts"],
            top_k=config["num_experts_per_tok"],
            intermediate_size=config["moe_intermediate_size"],
            shared_size=config["shared_expert_intermediate_size"],
            scoring="softmax",
            normalize=config.get("norm_topk_prob", True),
            shared_gate=True,
        )
    return _spec(
        config,
        changes,
        gemma_norm=True,
        h_source="post_norm",
        recur_source="post_norm",
        qk_norm=True,
        qkv_bias=config.get("attention_bias", False),
        output_gate=True,
        moe=moe,
    )


def mimo(config: Mapping[str, Any], **changes: Any) -> MTPSpec:
    """MiMo-7B (Xiaomi 2025, "MiMo"): [h; e] and a Qwen2 layer.

    vLLM's trunk hands on its state before the final norm. The published head is one layer for
    depth 1; where it is applied again, the state before `final_layernorm` matches that input.
    `zero_position0` is set by vLLM and SGLang, not by Xiaomi's own modelling code.
    """
    return _spec(config, changes, concat="he", qkv_bias=True)


def ernie4_5_moe(config: Mapping[str, Any], **changes: Any) -> MTPSpec:
    """ERNIE 4.5 (Baidu 2025, "ERNIE 4.5 technical report"): a dense layer beside a MoE trunk.

    As Baidu trains it: un-normed states in and on, the trunk's final norm before the LM head. vLLM
    and SGLang use no norm there and a zero embedding at position 0: `final_norm="none",
    zero_position0=True` is their head.
    """
    return _spec(
        config,
        changes,
        final_norm="trunk",
        rope_interleaved=True,
        qkv_bias=config.get("use_bias", False),
    )


FAMILIES: dict[str, Callable[..., MTPSpec]] = {
    "deepseek_v3": deepseek_v3,
    "glm4_moe": glm4_moe,
    "qwen3_next": qwen3_next,
    "mimo": mimo,
    "ernie4_5_moe": ernie4_5_moe,
}


def family_of(config: Mapping[str, Any]) -> str:
    """The key of FAMILIES for a config.json."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} has no known MTP head ({', '.join(FAMILIES)} have)")
    return kind


def from_config(config: Mapping[str, Any], **changes: Any) -> MTPSpec:
    """The spec of the head published with a model, by its config's model_type."""
    return FAMILIES[family_of(config)](config, **changes)


def _spec(config: Mapping[str, Any], changes: Mapping[str, Any], **values: Any) -> MTPSpec:
    """What all families share, then the family's `values`, then the caller's `changes`."""
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    # Newer files keep everything about the rotation in one place.
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"rope_scaling type {kind!r} is not supported (default, yarn are)")
    part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    shared = {
        "hidden_size": config["hidden_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "intermediate_size": config["intermediate_size"],
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "max_positions": config["max_position_embeddings"],
        "eps": config["rms_norm_eps"],
        "rotary_dim": None if part == 1 else int(head_dim * part),
        "rope_scaling": dict(scaling) if kind == "yarn" else None,
    }
    return MTPSpec(**{**shared, **values, **changes})


def _sigmoid_moe(config: Mapping[str, Any]) -> MoESpec:
    """DeepSeek's and GLM's."""
    return MoESpec(
        num_experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        shared_size=config["moe_intermediate_size"] * (config.get("n_shared_experts") or 0),
        normalize=config.get("norm_topk_prob", True),
        scale=config.get("routed_scaling_factor", 1.0),
        num_groups=config.get("n_group") or 1,
        top_groups=config.get("topk_group") or 1,
    )
