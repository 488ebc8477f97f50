"""The data of a training: shards that are read if they exist, written if not."""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from mtp_ext.models import Llama
from mtp_ext.train.data import Shard, load_shards
from mtp_ext.train.generate import (
    Document,
    annotate,
    chat_tasks,
    generate,
    prompt_tasks,
    repeats,
    to_shard,
)
from mtp_ext.train.prompts import held_out_prompts
from mtp_ext.train.texts import DataError, read_texts

DOCUMENTS_PER_SHARD = 256


def held_out_shard(model: Llama, h_source: str, args: argparse.Namespace) -> Shard:
    """The trunk's greedy answers to the held-out prompts."""
    path = args.data / "held_out" / "greedy.pt"
    if not path.exists():
        write_shard(path, held_out_answers(model, h_source, args.held_out_answer))
    return Shard.load(path)


def held_out_answers(model: Llama, h_source: str, max_answer: int) -> Iterator[Document]:
    prompts = held_out_prompts()
    tasks = prompt_tasks(model, prompts)
    texts = generate(model, tasks, h_source=h_source, slots=len(prompts), max_answer=max_answer)
    return progress(texts, len(prompts), "held-out answers")


def training_shard(model: Llama, h_source: str, args: argparse.Namespace) -> Shard:
    """All shards of the folder, after reading `--text` and generating up to `--tokens`."""
    for path in args.text:
        target = args.data / f"text_{path.stem}.pt"
        if not target.exists():
            length = min(args.text_length, model.config.max_positions)
            texts = read_texts(path, model.tokenizer)
            documents = annotate(model, texts, h_source=h_source, length=length)
            write_shard(target, progress(documents, None, f"reading {path.name}"))
    tokens = sum(Shard.load(p).num_answer_tokens() for p in args.data.glob("*.pt"))
    number = 0
    while tokens < args.tokens:
        path = args.data / f"chat_{args.seed}_{number:05d}.pt"
        number += 1
        if path.exists():
            continue
        # A shard depends on the seed and its number only, so an interrupted run loses at most one.
        seed = args.seed * 1_000_003 + number
        texts = generate(
            model,
            chat_tasks(model, DOCUMENTS_PER_SHARD, seed),
            h_source=h_source,
            slots=args.slots,
            max_answer=args.max_answer,
            seed=seed,
        )
        label = f"generating, {tokens:,} of {args.tokens:,} tokens"
        tokens += write_shard(path, progress(texts, DOCUMENTS_PER_SHARD, label))
    try:
        return load_shards(args.data)
    except FileNotFoundError as error:
        raise DataError(f"{error}: give --text, or --tokens above 0") from error


def write_shard(path: Path, documents: Iterable[Document]) -> int:
    written = list(documents)
    if not written:
        raise DataError(f"nothing to write to {path}: no text has 8 tokens with some to learn from")
    path.parent.mkdir(parents=True, exist_ok=True)
    shard = to_shard(written)
    shard.save(path)
    return shard.num_answer_tokens()


def progress(items: Iterator[Document], total: int | None, label: str) -> Iterator[Document]:
    from rich.progress import track

    return track(items, description=label, total=total)


def looping(shard: Shard) -> torch.Tensor:
    """bool [documents]: those that end by repeating themselves."""
    tokens = shard.tokens.split(shard.lens.tolist())
    return torch.tensor([repeats(t.tolist()) for t in tokens])
