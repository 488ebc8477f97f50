"""Train a multi-token-prediction head for a model: make the data, train, measure, write the head.

By default the model writes its own training text; the head starts from a closed-form solution and
learns the model's next-token distribution, first one token ahead, then further on its own drafts.
Every stage can be interrupted and taken up again with the same command: finished shards of data are
kept, and training continues from the last checkpoint to the bits it would have had.

Several processes share the work, each with --batch-size documents per step:
    torchrun --nproc-per-node 2 -m mtp_ext train ...
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F

from mtp_ext.models import load_model
from mtp_ext.nn import MTPBlock, save_head
from mtp_ext.train import prepare
from mtp_ext.train.config import TrainConfig
from mtp_ext.train.data import Documents, Shard, draft_vocabulary
from mtp_ext.train.distributed import first_process_first, process_group, rank
from mtp_ext.train.evaluate import Acceptance, evaluate
from mtp_ext.train.generate import to_shard
from mtp_ext.train.objective import Objective, Report
from mtp_ext.train.plot import plot
from mtp_ext.train.start import closed_form_start, last_layer, spec_for
from mtp_ext.train.texts import FORMATS, DataError
from mtp_ext.train.trainer import Trainer
from mtp_ext.train.trunk import FrozenTrunk, JointTrunk


def parse(argv: list[str]) -> argparse.Namespace:
    default = TrainConfig()
    parser = argparse.ArgumentParser(
        prog="python -m mtp_ext train",
        description=__doc__,
        epilog=FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="a .gguf file or a Hugging Face folder; default: SmolLM2-135M-Instruct")
    add("--out", type=Path, default=Path("mtp_head.safetensors"), help="where the head goes")
    add("--seed", type=int, default=default.seed, help="of the data and of the training")
    add("--device", default="cpu", help="where training runs; data are made on the CPU")

    add = parser.add_argument_group("data").add_argument
    add("--data", type=Path, default=Path("mtp_train_data"), help="folder of shards, reused")
    add(
        "--tokens",
        type=int,
        default=1_000_000,
        help="the model writes answers until the folder has so many tokens to learn from; 0: none",
    )
    add("--text", type=Path, nargs="*", default=[], help=".txt or .jsonl files, see below")
    add("--text-length", type=int, default=256, help="texts are cut into documents so long")
    add("--slots", type=int, default=64, help="texts that are generated at once")
    add("--max-answer", type=int, default=224, help="longest training answer, tokens")
    add("--held-out-answer", type=int, default=256, help="longest held-out answer, tokens")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=float, default=default.epochs, help="(default: %(default)s)")
    add("--batch-size", type=int, default=default.batch_size, help="documents per step and process")
    add(
        "--lr", type=float, default=default.lr, help="of the head's matrices (default: %(default)s)"
    )
    add("--draft-vocab", type=int, default=12288, help="LM head rows to draft from")
    add(
        "--depth-starts",
        type=float,
        nargs="+",
        default=default.depth_starts,
        metavar="F",
        help="the curriculum, a number per depth: the part of the steps after which it joins "
        f"(default: {spaced(default.depth_starts)})",
    )
    add(
        "--depth-weights",
        type=float,
        nargs="+",
        default=default.depth_weights,
        metavar="W",
        help="weight of each depth's loss; a single number D means 1, D, D^2, ... "
        f"(default: {spaced(default.depth_weights)})",
    )
    add(
        "--labels",
        choices=["soft", "hard"],
        help="learn the model's distribution of the next token (soft, the default), or the text's "
        "own token",
    )
    add(
        "--joint",
        action="store_true",
        help="train the model too, with its next-token loss and hard labels; it is written beside "
        "the head as a Hugging Face folder",
    )
    add(
        "--trunk-lr",
        type=float,
        default=default.trunk_lr,
        help="with --joint: the model's learning rate, times --lr (default: %(default)s)",
    )
    add(
        "--mtp-weight",
        type=float,
        nargs=2,
        default=default.mtp_weight,
        metavar=("FIRST", "LAST"),
        help="with --joint: weight of the head's loss at the first step and at the last "
        f"(default: {spaced(default.mtp_weight)})",
    )
    add(
        "--bf16",
        action="store_true",
        help="the model writes in bf16 and the head computes in bf16; parameters stay f32",
    )
    add("--eval-every", type=int, default=200, help="steps between checkpoints with evaluation")
    add("--eval-documents", type=int, default=None, help="held-out documents used on the way")
    args = parser.parse_args(argv)

    if args.data.exists() and not args.data.is_dir():
        parser.error(f"--data {args.data} is a file, not a folder")
    if len(args.depth_weights) == 1:
        args.depth_weights = [args.depth_weights[0] ** d for d in range(len(args.depth_starts))]
    try:
        args.config = TrainConfig(
            epochs=args.epochs,
            depth_starts=tuple(args.depth_starts),
            depth_weights=tuple(args.depth_weights),
            labels=args.labels or ("hard" if args.joint else "soft"),
            joint=args.joint,
            mtp_weight=tuple(args.mtp_weight),
            trunk_lr=args.trunk_lr,
            bf16=args.bf16,
            batch_size=args.batch_size,
            lr=args.lr,
            seed=args.seed,
        )
    except ValueError as error:
        parser.error(str(error))
    return args


def spaced(values: Iterable[float]) -> str:
    return " ".join(f"{value:g}" for value in values)


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        with process_group(args.device) as device:
            run(args, device)
    except (DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace, device: torch.device) -> None:
    if args.joint and importlib.util.find_spec("transformers") is None:
        raise DataError("--joint writes the model with transformers:\n    pip install transformers")
    torch.manual_seed(args.seed)
    model = load_model(args.model, torch.float32)
    spec, begin = spec_for(model), time.monotonic()
    with first_process_first():
        writer = load_model(args.model, torch.bfloat16) if args.bf16 else model
        writer.linear = F.linear  # texts need not be independent of their batch
        held_out = prepare.held_out_shard(writer, spec.h_source, args)
        shard = prepare.training_shard(writer, spec.h_source, args)
        del writer
    prepared = time.monotonic()

    documents, block = Documents(shard), MTPBlock(spec)
    token_map = draft_vocabulary(shard, model.config.vocab_size, args.draft_vocab)
    frozen = FrozenTrunk(model.embedding, model.lm_head, model.norm)
    checkpoint = args.out.with_suffix(".ckpt")
    if rank() == 0 and not checkpoint.exists():
        objective = Objective(block, frozen, token_map)
        closed_form_start(objective, documents, last_layer(model))
        print(f"closed-form start: {evaluate(objective, Documents(held_out), args.config.depths)}")
    trunk = JointTrunk(model) if args.joint else frozen
    trainer = Trainer(Objective(block, trunk, token_map, args.config).to(device), documents)
    if checkpoint.exists():
        trainer.load(checkpoint)
        if rank() == 0:
            print(f"resuming {checkpoint} at step {trainer.step} of {trainer.total_steps}")
    train(trainer, checkpoint, Documents(held_out.first(args.eval_documents)), args.eval_every)
    if rank() > 0:
        return

    if args.joint:
        folder = args.out.with_name(args.out.stem + "_trunk")
        trunk.to("cpu").save(folder)
        print(f"wrote {folder}")
        held_out = to_shard(
            list(prepare.held_out_answers(model, spec.h_source, args.held_out_answer))
        )
    training = {
        "answer_tokens": shard.num_answer_tokens(),
        "documents": len(documents),
        "steps": trainer.total_steps,
        "config": asdict(args.config),
    }
    write(args, trainer, held_out, training)
    checkpoint.unlink(missing_ok=True)
    done = time.monotonic()
    print(f"data {prepared - begin:.0f} s, training {done - prepared:.0f} s")


def train(trainer: Trainer, checkpoint: Path, held_out: Documents, eval_every: int) -> None:
    """To the end of the schedule, with checkpoints, measurements and a progress bar."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    depths = trainer.config.depths
    accepted = "acceptance" if trainer.config.labels == "soft" else "accuracy"
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), disable=rank() > 0) as bar:
        task = bar.add_task("training", total=trainer.total_steps, completed=trainer.step)

        def on_step(step: int, report: Report) -> None:
            text = f"loss {numbers(report.loss)}, {accepted} {numbers(report.accepted)}"
            if report.next_token is not None:
                text += f", trunk {float(report.next_token):.2f}"
            if trainer.held_out:
                text += f", held out {numbers(trainer.held_out[-1][1])}"
            bar.update(task, completed=step, description=text)

        while trainer.step < trainer.total_steps:
            trainer.run(trainer.step + eval_every, on_step)
            if rank() == 0:
                measured = evaluate(trainer.objective, held_out, depths)
                trainer.note(measured)
                bar.console.print(f"step {trainer.step}: held out: {measured}")
                trainer.save(checkpoint)


def numbers(values: Iterable[float]) -> str:
    return " ".join(f"{float(v):.2f}" for v in values)


def write(args: argparse.Namespace, trainer: Trainer, held_out: Shard, training: dict) -> None:
    """The head, with what it was made of and how good it is in its header, and the plot."""
    objective, depths = trainer.objective.to("cpu"), trainer.config.depths
    loops = prepare.looping(held_out)
    no_loops = evaluate(objective, Documents(held_out.select(~loops)), depths)
    with_loops = evaluate(objective, Documents(held_out.select(loops)), depths)
    acceptance = no_loops + with_loops
    print(f"held out: {acceptance}\nwithout texts that loop: {no_loops}")
    save_head(
        args.out,
        objective.block,
        objective.token_map,
        trunk=Path(args.model).name if args.model else "SmolLM2-135M-Instruct",
        training=training,
        acceptance=summary(acceptance),
        acceptance_without_loops=summary(no_loops),
    )
    print(f"wrote {args.out}\n{plot(trainer, args.out.with_suffix('.png'))}")


def summary(acceptance: Acceptance) -> dict[str, list[float]]:
    return {
        "conditional": [round(a, 4) for a in acceptance.conditional],
        "tokens_per_step": [round(t, 3) for t in acceptance.tokens_per_step],
    }
