import json
import re

import pytest
import torch
from tiny_models import tiny_head, tiny_llama

from mtp_ext.decode import SamplingParams, demo
from mtp_ext.decode.decoder import Decoder
from mtp_ext.models import Tokenizer


@pytest.fixture
def tiny(monkeypatch):
    """The demo on a random model whose tokens are bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    def load(arguments):
        model = tiny_llama(demo.DTYPES[arguments.dtype], vocab_size=256)
        characters = sorted(ByteLevel.alphabet())
        model.tokenizer = Tokenizer.byte_level_bpe(characters, [], [1] * 256, "gpt-2")
        return model, None if arguments.model else tiny_head(model), "tiny"

    monkeypatch.setattr(demo, "load", load)


def run(tmp_path, *options):
    path = tmp_path / "result.json"
    arguments = ["--max-new-tokens", "12", "--rounds", "1", "--json", str(path), *options]
    assert demo.main(arguments) == 0
    return json.loads(path.read_text())


def test_table_of_all_draft_lengths(tiny, tmp_path, capsys):
    result = run(tmp_path, "--prompt", "Hello there")
    out = capsys.readouterr().out
    assert [row["k"] for row in result["rows"]] == [0, 1, 2, 3]
    for row in result["rows"]:
        assert set(row) == {
            "k", "tok_s", "speedup", "tokens_per_step", "acceptance", "identical",
        }  # fmt: skip
        assert row["identical"] is True and row["tok_s"] > 0
        assert len(row["acceptance"]) <= row["k"]
        assert all(0 <= a <= 1 for a in row["acceptance"])
        assert re.search(rf"k = {row['k']} +{row['tok_s']:.1f} .*yes", out)
    assert result["rows"][0]["speedup"] == 1.0
    assert result["rows"][0]["tokens_per_step"] == 1.0
    assert result["transformers_tok_s"] > 0
    assert result["environment"]["threads"] == torch.get_num_threads()
    assert result["environment"]["torch"].startswith(torch.__version__)
    assert "> Hello there" in out and "\033" not in out


def test_one_draft_length_and_sampling(tiny, tmp_path, capsys):
    result = run(tmp_path, "--k", "4", "--temperature", "0.8", "--seed", "3", "--dtype", "f32")
    assert [row["k"] for row in result["rows"]] == [0, 4]
    assert [row["identical"] for row in result["rows"]] == [None, None]
    assert "6 prompts" in capsys.readouterr().out
    assert [row["k"] for row in run(tmp_path, "--k", "0")["rows"]] == [0]


def test_without_transformers_and_without_a_head(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "load_twin", lambda model: None)
    result = run(tmp_path, "--model", "other", "--prompt", "x")
    assert [row["k"] for row in result["rows"]] == [0]
    assert result["transformers_tok_s"] is None
    assert "not installed" in capsys.readouterr().out
    assert demo.main(["--model", "other", "--k", "2"]) == 1
    assert "needs its head: --head PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--k", "5"], ["--max-new-tokens", "1"], ["--rounds", "0"], ["--dtype", "int3"]]
)
def test_bad_options_are_refused(options, capsys):
    with pytest.raises(SystemExit):
        demo.main(options)
    assert options[0] in capsys.readouterr().err


def test_missing_model_says_so(capsys):
    assert demo.main(["--model", "/no/such/model.gguf"]) == 1
    assert capsys.readouterr().err == ("mtp_ext demo: model /no/such/model.gguf does not exist\n")


def test_accepted_drafts_are_coloured_by_depth(tiny, capsys, monkeypatch):
    monkeypatch.setattr(demo, "use_colour", lambda: True)
    model, _, _ = demo.load(demo.parse([]))
    params = SamplingParams(max_new_tokens=3)
    plain = Decoder(model).generate([[65]], params)[0]
    decoder = Decoder(model)

    def with_depths(k):
        request = decoder.requests[0]
        for depth, token in zip((0, 1, 2), plain.output):
            request.append(token, depth)
            yield [request]

    monkeypatch.setattr(decoder, "run", with_depths)
    monkeypatch.setattr(demo, "TextStream", lambda tokenizer: FixedText())
    demo.stream_text(decoder, [65], params, 2)
    assert capsys.readouterr().out == "a\033[32ma\033[0m\033[36ma\033[0m.\n"


class FixedText:
    def push(self, ids):
        return "a" * len(ids)

    def finish(self):
        return "."
