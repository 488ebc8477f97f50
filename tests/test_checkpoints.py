"""Heads in published checkpoints: names of every family, shards, fp8, and refusals by name."""

import json

import published_heads
import pytest
import torch
from published_heads import CONFIGS, LAYERS, H
from safetensors import safe_open

from mtp_ext.nn import MTPBlock, load_checkpoint, save_checkpoint, specs

COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def read(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", CONFIGS)
def test_round_trip(family: str, shards: int, tmp_path) -> None:
    config, weights = CONFIGS[family], published_heads.tensors(family)
    published_heads.write(tmp_path / "in", config, weights, shards)
    count = config.get("num_nextn_predict_layers", 1)
    blocks = [load_checkpoint(tmp_path / "in", i) for i in range(count)]
    copies = {}
    if f"model.layers.{LAYERS}.embed_tokens.weight" in weights:
        copies = {
            "embedding": weights[f"model.layers.{LAYERS}.embed_tokens.weight"],
            "lm_head": weights[f"model.layers.{LAYERS}.shared_head.head.weight"],
        }
    limit = 10**9 if shards == 1 else 20_000
    save_checkpoint(tmp_path / "out", blocks, config, **copies, max_shard_bytes=limit)
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 1) == (shards > 1)
    again = read(tmp_path / "out")
    assert again.keys() == weights.keys()
    for name, weight in weights.items():
        assert again[name].dtype == weight.dtype and torch.equal(again[name], weight), name
    for i, block in enumerate(blocks):  # what was written can be read
        other = load_checkpoint(tmp_path / "out", i)
        assert other.spec == block.spec
        for name, tensor in block.state_dict().items():
            assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("family", CONFIGS)
def test_a_loaded_block_is_whole(family: str, tmp_path) -> None:
    """No tensor is left on the meta device, everything trains, tables are those of a new block."""
    published_heads.write(tmp_path, CONFIGS[family], published_heads.tensors(family))
    block = load_checkpoint(tmp_path)
    fresh = MTPBlock(block.spec)
    for (name, a), (_, b) in zip(block.named_buffers(), fresh.named_buffers()):
        assert a.device.type == "cpu" and a.shape == b.shape, name
    assert torch.equal(block.rope, fresh.rope)
    assert {n for n, _ in block.named_parameters()} == {n for n, _ in fresh.named_parameters()}
    assert all(p.requires_grad and p.dtype == torch.float32 for p in block.parameters())
    x = torch.randn(1, 6, H)
    y, _ = block.depth1(x, x, torch.arange(6)[None])
    y.sum().backward()
    half = load_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())
    assert all(b.dtype != torch.bfloat16 for b in half.buffers())


def quantized(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 and one scale per block, element by element as DeepSeek's file format says."""
    rows, columns = weight.shape
    scale = torch.zeros(-(-rows // size), -(-columns // size))
    out = torch.zeros(rows, columns)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = weight[i * size : (i + 1) * size, j * size : (j + 1) * size].float()
            scale[i, j] = block.abs().max() / 448
            out[i * size : (i + 1) * size, j * size : (j + 1) * size] = block / scale[i, j]
    return out.to(torch.float8_e4m3fn), scale


def test_fp8_weights_are_dequantised(tmp_path) -> None:
    config = {**CONFIGS["deepseek_v3"], "quantization_config": {"weight_block_size": [32, 32]}}
    weights = published_heads.tensors("deepseek_v3")
    expected = {}
    for name in [n for n, w in weights.items() if w.ndim == 2 and "_proj" in n]:
        weight = weights[name].float()
        weights[name], weights[f"{name}_scale_inv"] = quantized(weight, 32)
        expected[name] = weight
    published_heads.write(tmp_path, config, weights, shards=2)
    state = load_checkpoint(tmp_path).state_dict()
    assert len(expected) > 10
    for name, weight in expected.items():
        loaded = state[name.removeprefix(f"model.layers.{LAYERS}.")]
        # e4m3 keeps three bits of fraction; what is left is half a step of the block's largest.
        assert (loaded - weight).abs().max() <= weight.abs().max() / 16 / 1.75
        assert (loaded - weight).norm() < 0.04 * weight.norm()


def refused(tmp_path, family: str, match: str, config=None, **replaced) -> None:
    """replaced: tensors by the end of their name; None takes one away."""
    weights = published_heads.tensors(family)
    for end, tensor in replaced.items():
        end = end.replace("__", ".")
        [name] = [n for n in weights if n.endswith(end)] or [f"model.layers.{LAYERS}.{end}"]
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    published_heads.write(tmp_path, {**CONFIGS[family], **(config or {})}, weights)
    with pytest.raises(ValueError, match=match):
        load_checkpoint(tmp_path)


def test_missing_tensors_are_named(tmp_path) -> None:
    refused(
        tmp_path,
        "glm4_moe",
        rf"missing: model.layers.{LAYERS}.self_attn.q_norm.weight \[16\]",
        self_attn__q_norm__weight=None,
    )


def test_unexpected_tensors_are_named(tmp_path) -> None:
    refused(
        tmp_path,
        "glm4_moe",
        rf"unexpected: model.layers.{LAYERS}.self_attn.indexer.wk.weight",
        self_attn__indexer__wk__weight=torch.zeros(4, 4),
    )


def test_wrong_shapes_are_named(tmp_path) -> None:
    refused(
        tmp_path,
        "deepseek_v3",
        rf"model.layers.{LAYERS}.eh_proj.weight: expected \[48, 96\], is \[96, 48\]",
        eh_proj__weight=torch.zeros(96, 48),
    )


def test_a_config_that_does_not_fit_names_what_differs(tmp_path) -> None:
    refused(tmp_path, "glm4_moe", "unexpected: .*q_norm", config={"use_qk_norm": False})


def test_other_quantisations_are_refused_by_name(tmp_path) -> None:
    refused(
        tmp_path,
        "deepseek_v3",
        r"eh_proj.weight is stored as int8",
        eh_proj__weight=torch.zeros(48, 96, dtype=torch.int8),
    )


def test_fp8_without_scales_is_refused(tmp_path) -> None:
    refused(
        tmp_path,
        "deepseek_v3",
        r"eh_proj.weight is float8_e4m3fn, but there is no model.*eh_proj.weight_scale_inv",
        eh_proj__weight=torch.zeros(48, 96).to(torch.float8_e4m3fn),
    )


def test_fp8_scales_of_other_blocks_are_refused(tmp_path) -> None:
    refused(
        tmp_path,
        "deepseek_v3",
        r"eh_proj.weight_scale_inv: expected \[1, 1\], .* is \[2, 3\]",
        eh_proj__weight=torch.zeros(48, 96).to(torch.float8_e4m3fn),
        eh_proj__weight_scale_inv=torch.ones(2, 3),
    )


def test_files_that_are_not_there(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["mimo"]))
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor"):
        load_checkpoint(tmp_path)
    weights = published_heads.tensors("mimo")
    published_heads.write(tmp_path, CONFIGS["mimo"], weights, shards=3)
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1.safetensors"):
        load_checkpoint(tmp_path)


def test_only_shards_of_the_head_are_opened(tmp_path) -> None:
    weights = published_heads.tensors("mimo")
    published_heads.write(tmp_path, CONFIGS["mimo"], weights)
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    index["weight_map"]["model.layers.0.self_attn.q_proj.weight"] = "not-there.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    load_checkpoint(tmp_path, 1)


def test_heads_that_are_not_there(tmp_path) -> None:
    published_heads.write(tmp_path, CONFIGS["mimo"], published_heads.tensors("mimo"))
    with pytest.raises(ValueError, match="no MTP head 2, num_nextn_predict_layers is 2"):
        load_checkpoint(tmp_path, 2)
    with pytest.raises(ValueError, match="model_type 'llama' has no known MTP head"):
        specs.from_config({"model_type": "llama"})


def test_two_checkpoints_are_not_mixed(tmp_path) -> None:
    config = CONFIGS["ernie4_5_moe"]
    published_heads.write(tmp_path, config, published_heads.tensors("ernie4_5_moe"))
    block = load_checkpoint(tmp_path)
    with pytest.raises(FileExistsError, match=r"model\.safetensors exists"):
        save_checkpoint(tmp_path, [block], config)


def test_a_parameter_without_a_name_is_refused(tmp_path) -> None:
    config = CONFIGS["ernie4_5_moe"]
    block = MTPBlock(specs.from_config(config, final_norm="own"))
    with pytest.raises(ValueError, match=r"no place for shared_head.norm.weight"):
        save_checkpoint(tmp_path, [block], config)


def test_published_size() -> None:
    """DeepSeek-V3's config gives the 11.5B parameters of its head that the model's files state."""
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "num_attention_heads": 128,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-6,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
    }
    with torch.device("meta"):
        block = MTPBlock(specs.from_config(config))
    assert abs(sum(p.numel() for p in block.parameters()) / 11.5e9 - 1) < 0.01
