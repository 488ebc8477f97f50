"""Text files: what is learned of them, and what is said of files that are wrong."""

import json
from pathlib import Path

import pytest

from mtp_ext.train import cli
from mtp_ext.train.texts import DataError, read_texts


class Characters:
    """A token is a character; a turn is <role|content>, and an answer begins with <assistant|."""

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_chat(self, messages: list[dict[str, str]], for_answer: bool = True) -> list[int]:
        text = "".join(f"<{m['role']}|{m['content']}>" for m in messages)
        return self.encode(text + "<assistant|" * for_answer)


def read(path: Path, content: str | bytes) -> list[tuple[str, str]]:
    """Each text, and what is learned of it."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    texts = list(read_texts(path, Characters()))
    return [
        ("".join(map(chr, ids)), "".join(chr(i) for i, learned in zip(ids, flags) if learned))
        for ids, flags in texts
    ]


def test_plain_text(tmp_path: Path) -> None:
    assert read(tmp_path / "a.txt", "two\nlines") == [("two\nlines", "two\nlines")]


def test_json_lines(tmp_path: Path) -> None:
    messages = [("user", "hi"), ("assistant", "yes?"), ("user", "bye"), ("assistant", "so long")]
    records = [
        {"text": "plain", "other": 1},
        {"messages": [{"role": role, "content": content} for role, content in messages]},
    ]
    [plain, chat] = read(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, records)) + "\n")
    assert plain == ("plain", "plain")
    assert chat[0] == "<user|hi><assistant|yes?><user|bye><assistant|so long>"
    assert chat[1] == "yes?>so long>"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", "its name ends in '.csv'"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"txt": "a"}', 'line 1: neither "text" nor "messages"'),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', 'neither "text" nor "messages"'),
        ("a.jsonl", "[1]", 'neither "text" nor "messages"'),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_wrong_files_are_named(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, content)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"nowhere\.txt: there is no such file"):
        list(read_texts(Path("nowhere.txt"), Characters()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data FILE", "is a file, not a folder"),
        ("--depth-starts 0.5 0.6", "ascend from 0"),
        ("--joint --labels soft", "hard labels"),
    ],
)
def test_wrong_arguments_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        cli.parse(arguments.replace("FILE", str(tmp_path / "file")).split())
    assert message in capsys.readouterr().err


def test_one_depth_weight_is_a_decay() -> None:
    config = cli.parse(["--depth-starts", "0", "0.5", "0.6", "--depth-weights", "0.5"]).config
    assert config.depth_weights == (1.0, 0.5, 0.25)
    assert cli.parse([]).config == cli.TrainConfig()


def test_what_joint_training_lacks_is_said_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["--joint"]) == 1
    assert "pip install transformers" in capsys.readouterr().err
