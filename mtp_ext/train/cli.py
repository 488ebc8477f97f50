"""python -m mtp_ext train: generate data, train a head, measure it, write it.

Every stage can be interrupted and taken up again with the same command: finished shards are kept,
and training continues from the last checkpoint to the bits it would have had.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mtp_ext.models import Llama, load_model
from mtp_ext.nn import MTPBlock, MTPSpec, save_head
from mtp_ext.train.data import Documents, Shard, draft_vocabulary, load_shards
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
from mtp_ext.train.trainer import (
    Acceptance,
    Objective,
    TrainConfig,
    Trainer,
    closed_form_start,
    evaluate,
)

DOCUMENTS_PER_SHARD = 256


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mtp_ext train", description=__doc__)
    add = parser.add_argument
    add("--model", help="a .gguf file or a Hugging Face folder; default: SmolLM2-135M-Instruct")
    add("--out", type=Path, default=Path("mtp_head.safetensors"), help="where the head goes")
    add("--data", type=Path, default=Path("mtp_train_data"), help="folder of shards, reused")
    add("--tokens", type=int, default=1_000_000, help="answer tokens to generate")
    add("--text", type=Path, nargs="*", default=[], help=".txt, or .jsonl with a 'text' field")
    add("--epochs", type=float, default=TrainConfig.epochs)
    add(
        "--unrolled",
        type=float,
        default=TrainConfig.unrolled,
        help="part of the steps, at the end, that trains all depths",
    )
    add("--batch-size", type=int, default=TrainConfig.batch_size, help="documents per step")
    add("--lr", type=float, default=TrainConfig.lr)
    add("--draft-vocab", type=int, default=12288, help="rows of the LM head to draft from")
    add("--seed", type=int, default=0)
    add("--eval-every", type=int, default=200, help="steps between checkpoints with evaluation")
    add("--eval-documents", type=int, default=None, help="held-out documents used on the way")
    add("--slots", type=int, default=64, help="texts that are generated at once")
    add("--max-answer", type=int, default=224, help="longest training answer, tokens")
    add("--held-out-answer", type=int, default=256, help="longest held-out answer, tokens")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    args = parse(argv)
    torch.manual_seed(args.seed)
    model = load_model(args.model, torch.float32)
    spec = spec_for(model)
    start = time.monotonic()
    held_out = prepare_held_out(model, spec, args)
    shard = prepare_training(model, spec, args)
    generated = time.monotonic() - start

    documents = Documents(shard)
    token_map = draft_vocabulary(shard, model.config.vocab_size, args.draft_vocab)
    objective = Objective(model.embedding, model.lm_head, token_map, model.norm)
    block = MTPBlock(spec)
    config = TrainConfig(
        epochs=args.epochs,
        unrolled=args.unrolled,
        batch_size=args.batch_size,
        lr=args.lr,
        seed=args.seed,
    )
    trainer = Trainer(block, objective, documents, config)
    checkpoint = args.out.with_suffix(".ckpt")
    if checkpoint.exists():
        trainer.load(checkpoint)
        print(f"resuming {checkpoint} at step {trainer.step} of {trainer.total_steps}")
    else:
        closed_form_start(block, objective, documents, last_layer(model))
        print(f"closed-form start: {evaluate(block, objective, held_out)}")
    train(trainer, checkpoint, Documents(first(held_out.shard, args.eval_documents)), args)

    loops = looping(held_out.shard)
    no_loops = evaluate(block, objective, Documents(select(held_out.shard, ~loops)))
    acceptance = no_loops + evaluate(block, objective, Documents(select(held_out.shard, loops)))
    print(f"held out: {acceptance}\nwithout texts that loop: {no_loops}")
    save_head(
        args.out,
        block,
        token_map,
        trunk=Path(args.model).name if args.model else "SmolLM2-135M-Instruct",
        training={
            "answer_tokens": shard.num_answer_tokens(),
            "documents": len(documents),
            "steps": trainer.total_steps,
            "config": config.__dict__,
        },
        acceptance=summary(acceptance),
        acceptance_without_loops=summary(no_loops),
    )
    checkpoint.unlink(missing_ok=True)
    print(
        f"wrote {args.out}: data {generated:.0f} s, "
        f"training {time.monotonic() - start - generated:.0f} s"
    )
    return 0


def spec_for(model: Llama) -> MTPSpec:
    c = model.config
    return MTPSpec(
        hidden_size=c.hidden_size,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        intermediate_size=c.intermediate_size,
        rope_theta=c.rope_theta,
        max_positions=c.max_positions,
        eps=c.rms_eps,
    )


def last_layer(model: Llama) -> dict[str, torch.Tensor]:
    """The trunk's last layer under the block's parameter names."""
    c, layer = model.config, model.layers[-1]
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    names = ("q_proj", "k_proj", "v_proj")
    attention = dict(zip(names, layer.qkv.split([q, kv, kv])))
    gate, up = layer.gate_up.chunk(2)
    return {
        "input_layernorm.weight": layer.attn_norm,
        **{f"self_attn.{name}.weight": w for name, w in attention.items()},
        "post_attention_layernorm.weight": layer.mlp_norm,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
    }


def prepare_held_out(model: Llama, spec: MTPSpec, args: argparse.Namespace) -> Documents:
    path = args.data / "held_out" / "greedy.pt"
    if not path.exists():
        prompts = held_out_prompts()
        tasks = prompt_tasks(model, prompts)
        texts = generate(
            model,
            tasks,
            h_source=spec.h_source,
            slots=len(prompts),
            max_answer=args.held_out_answer,
        )
        write_shard(path, progress(texts, len(prompts), "held-out answers"))
    return Documents(Shard.load(path))


def prepare_training(model: Llama, spec: MTPSpec, args: argparse.Namespace) -> Shard:
    for path in args.text:
        target = args.data / f"text_{path.stem}.pt"
        if not target.exists():
            texts = list(read_texts(path))
            documents = annotate(model, texts, h_source=spec.h_source)
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
            h_source=spec.h_source,
            slots=args.slots,
            max_answer=args.max_answer,
            seed=seed,
        )
        label = f"generating, {tokens:,} of {args.tokens:,} tokens"
        tokens += write_shard(path, progress(texts, DOCUMENTS_PER_SHARD, label))
    return load_shards(args.data)


def write_shard(path: Path, documents: Iterator[Document]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    shard = to_shard(list(documents))
    shard.save(path)
    return shard.num_answer_tokens()


def train(
    trainer: Trainer, checkpoint: Path, held_out: Documents, args: argparse.Namespace
) -> None:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("training", total=trainer.total_steps, completed=trainer.step)

        def on_step(step: int, loss: float) -> None:
            depths = trainer.depths_at(step - 1)
            bar.update(task, completed=step, description=f"loss {loss:.3f}, depths {depths}")

        while trainer.step < trainer.total_steps:
            trainer.run(trainer.step + args.eval_every, on_step)
            trainer.save(checkpoint)
            accepted = evaluate(trainer.block, trainer.objective, held_out)
            bar.console.print(f"step {trainer.step}: {accepted}")


def progress(items: Iterator[Document], total: int | None, label: str) -> Iterator[Document]:
    from rich.progress import track

    return track(items, description=label, total=total)


def read_texts(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            yield from (json.loads(line)["text"] for line in file if line.strip())
        else:
            yield file.read()


def first(shard: Shard, count: int | None) -> Shard:
    return select(shard, torch.arange(len(shard.lens)) < (count or len(shard.lens)))


def looping(shard: Shard) -> torch.Tensor:
    """bool [documents]: those that end by repeating themselves."""
    tokens = shard.tokens.split(shard.lens.tolist())
    return torch.tensor([repeats(t.tolist()) for t in tokens])


def select(shard: Shard, keep: torch.Tensor) -> Shard:
    rows = keep.repeat_interleave(shard.lens)
    per_document = ("lens", "greedy", "looped")
    return Shard(**{k: v[keep if k in per_document else rows] for k, v in shard.__dict__.items()})


def summary(acceptance: Acceptance) -> dict[str, list[float]]:
    return {
        "conditional": [round(a, 4) for a in acceptance.conditional],
        "tokens_per_step": [round(t, 3) for t in acceptance.tokens_per_step],
    }
