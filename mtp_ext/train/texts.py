"""Texts that others wrote, as tokens and what of them a head learns from."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtp_ext.models import Tokenizer

FORMATS = """--text takes
    .txt    one text
    .jsonl  one JSON object per line, with "text", or with "messages": [{"role": ..., "content":
            ...}, ...], of which the assistant's are learned"""


class DataError(ValueError):
    """Input that a user can put right."""


def read_texts(path: Path, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[bool]]]:
    """Tokens, and whether each is one to learn from, of every text in the file."""
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: its name ends in {path.suffix or 'nothing'!r}\n{FORMATS}")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    try:
        if path.suffix == ".txt":
            yield _whole(tokenizer.encode(path.read_text(encoding="utf-8")))
            return
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _record(line, f"{path}, line {number}", tokenizer)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error})") from error


def _whole(tokens: list[int]) -> tuple[list[int], list[bool]]:
    return tokens, [True] * len(tokens)


def _record(line: str, place: str, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error})") from error
    match record:
        case {"text": str(text)}:
            return _whole(tokenizer.encode(text))
        case {"messages": [*messages]} if all(_is_message(m) for m in messages):
            return _conversation(messages, tokenizer)
    raise DataError(f'{place}: neither "text" nor "messages" as expected\n{FORMATS}')


def _is_message(message: Any) -> bool:
    match message:
        case {"role": str(), "content": str()}:
            return True
    return False


def _conversation(
    messages: list[dict[str, str]], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    tokens = tokenizer.encode_chat(messages, for_answer=False)
    answer = [False] * len(tokens)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.encode_chat(messages[:i])
            after = tokenizer.encode_chat(messages[: i + 1], for_answer=False)
            # A template may close an earlier turn otherwise than it opens the next.
            begin, end = _shared(before, tokens), _shared(after, tokens)
            answer[begin:end] = [True] * (end - begin)
    return tokens, answer


def _shared(a: list[int], b: list[int]) -> int:
    """Length of their common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
