"""python -m mtp_ext demo: a language model writes, its MTP head runs ahead of it."""

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mtp_ext import build_info, env
from mtp_ext.decode.decoder import MAX_DRAFT_LEN, Decoder
from mtp_ext.decode.metrics import Metrics
from mtp_ext.decode.planner import DraftPlanner, measure_step_seconds
from mtp_ext.decode.request import Request, SamplingParams
from mtp_ext.models import Llama, TextStream, default_model_path, load_model
from mtp_ext.nn import MTPHead, load_head

PROMPTS = (  # among those that training holds out
    "How do I fix a flat bicycle tire?",
    "Who was Marie Curie and what did she discover?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Write a thank-you note to a neighbor who watered my plants.",
    "What are the ingredients of a classic pancake recipe?",
    "Why is the sky blue?",
)
DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "f16": torch.float16}
DEPTH_COLOURS = ("", "\033[32m", "\033[36m", "\033[35m", "\033[33m")  # of accepted drafts
RESET = "\033[0m"


@dataclass
class Row:
    """What the table says about one k."""

    k: int
    tok_s: list[float] = field(default_factory=list)  # one per round
    metrics: Metrics = field(default_factory=Metrics)
    outputs: list[list[int]] = field(default_factory=list)

    def summary(self, base: "Row", greedy: bool) -> dict:
        ratios = [own / other for own, other in zip(self.tok_s, base.tok_s)]
        return {
            "k": self.k,
            "tok_s": statistics.median(self.tok_s),
            "speedup": statistics.median(ratios),
            "tokens_per_step": self.metrics.tokens_per_step,
            "acceptance": self.metrics.acceptance,
            "identical": self.outputs == base.outputs if greedy else None,
        }


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m mtp_ext demo", description=__doc__)
    parser.add_argument("--prompt", help="default: six built-in ones")
    parser.add_argument(
        "--k",
        default="all",
        choices=[*map(str, range(MAX_DRAFT_LEN + 1)), "all"],
        help="drafts per step; all (default): the planner's choice while streaming, then 0..3",
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--model", help=".gguf file or Hugging Face folder; default: SmolLM2-135M")
    parser.add_argument("--head", help="MTP head of that model; default: the one of SmolLM2-135M")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=3, help="of the table's measurements")
    parser.add_argument("--json", metavar="PATH", help="write the table and the environment there")
    arguments = parser.parse_args(argv)
    if arguments.max_new_tokens < 2:
        parser.error("--max-new-tokens must be at least 2: speed is measured after the first")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


def load(arguments: argparse.Namespace) -> tuple[Llama, MTPHead | None, str]:
    """The model, its head if there is one, and the model's name."""
    path = Path(arguments.model) if arguments.model else default_model_path()
    model = load_model(path, DTYPES[arguments.dtype])
    if model.tokenizer is None:
        raise ValueError(f"{path} has no tokenizer.json")
    if arguments.model and not arguments.head:
        return model, None, path.name
    return model, load_head(arguments.head, trunk=model), path.name


# ---- the text ------------------------------------------------------------------------------------


def use_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, depth: int, colour: bool) -> str:
    return f"{DEPTH_COLOURS[depth]}{text}{RESET}" if colour and depth and text else text


def stream_text(
    decoder: Decoder, prompt: list[int], params: SamplingParams, k: int | DraftPlanner
) -> Request:
    """Writes the answer as it comes, each character in the colour of the token that ends it."""
    text, colour, shown = TextStream(decoder.model.tokenizer), use_colour(), 0
    request = decoder.submit(prompt, params)
    for _ in decoder.run(k):
        for token, depth in zip(request.output[shown:], request.depths[shown:]):
            print(paint(text.push([token]), depth, colour), end="")
        shown = len(request.output)
        sys.stdout.flush()
    print(text.finish())
    return request


# ---- the table -----------------------------------------------------------------------------------


def measure(decoder: Decoder, prompts: list[list[int]], params: SamplingParams, row: Row) -> None:
    """Decodes every prompt alone. Speed counts from the first token on, as for transformers."""
    decoder.metrics = Metrics()
    row.outputs, tokens, seconds = [], 0, 0.0
    for prompt in prompts:
        request = decoder.submit(prompt, params)
        while not request.output:
            decoder.step(0)
        start = time.perf_counter()
        while not request.finished:
            decoder.step(row.k)
        seconds += time.perf_counter() - start
        tokens += len(request.output) - 1
        row.outputs.append(request.output)
    row.tok_s.append(tokens / seconds if tokens else 0.0)
    row.metrics = decoder.metrics


class TransformersClock:
    """A streamer that only looks at the clock."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def tok_s(self) -> float:
        times = self.times[1:]  # the first call brings the prompt
        return (len(times) - 1) / (times[-1] - times[0])


def transformers_tok_s(twin, prompt: list[int], params: SamplingParams) -> float:
    clock = TransformersClock()
    sampling = {"do_sample": False}
    if params.temperature > 0:
        sampling = {"do_sample": True, "temperature": params.temperature, "top_k": 0}
    torch.manual_seed(params.seed)
    ids = torch.tensor([prompt])
    twin.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=params.max_new_tokens,
        min_new_tokens=2,
        streamer=clock,
        **sampling,
    )
    return clock.tok_s()


def load_twin(model: Llama):
    """The same model in transformers, or None where it is not installed."""
    try:
        from transformers.utils import logging
    except ImportError:
        return None
    from mtp_ext.models.to_transformers import to_transformers

    logging.set_verbosity_error()
    return to_transformers(model)


def compare(
    model: Llama,
    decoder: Decoder,
    prompts: list[list[int]],
    params: SamplingParams,
    lengths: list[int],
    rounds: int,
) -> tuple[list[dict], float | None]:
    """Rounds of all k, one after the other, so that a disturbance meets them all alike."""
    rows = [Row(k) for k in lengths]
    twin, twin_tok_s = load_twin(model), []
    for number in range(rounds):
        for row in rows:
            progress(f"round {number + 1} of {rounds}, k = {row.k}")
            measure(decoder, prompts, params, row)
        if twin is not None:
            progress(f"round {number + 1} of {rounds}, transformers")
            prompt = prompts[number % len(prompts)]
            twin_tok_s.append(transformers_tok_s(twin, prompt, params))
    progress("")
    summaries = [row.summary(rows[0], params.temperature == 0) for row in rows]
    return summaries, statistics.median(twin_tok_s) if twin_tok_s else None


def progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def print_table(rows: list[dict], twin_tok_s: float | None) -> None:
    print(f"{'':14}{'tok/s':>7}{'speed-up':>10}{'tokens/step':>13}   acceptance      identical")
    for row in rows:
        acceptance = " ".join(f"{a:.2f}" for a in row["acceptance"]) or "-"
        identical = {True: "yes", False: "NO", None: "-"}[row["identical"]]
        print(
            f"{'k = ' + str(row['k']):14}{row['tok_s']:7.1f}{row['speedup']:9.2f}x"
            f"{row['tokens_per_step']:13.2f}   {acceptance:16}{identical}"
        )
    if twin_tok_s is None:
        print("transformers  not installed")
    else:
        ratio = twin_tok_s / rows[0]["tok_s"]
        print(f"{'transformers':14}{twin_tok_s:7.1f}{ratio:9.2f}x")


def main(argv: list[str]) -> int:
    arguments = parse(argv)
    try:
        model, head, name = load(arguments)
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"mtp_ext demo: {error}", file=sys.stderr)
        return 1
    if head is None and arguments.k not in ("0", "all"):
        print("mtp_ext demo: drafting with this model needs its head: --head PATH", file=sys.stderr)
        return 1

    params = SamplingParams(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        seed=arguments.seed,
    )
    texts = PROMPTS if arguments.prompt is None else (arguments.prompt,)
    prompts = [model.tokenizer.encode_chat([{"role": "user", "content": t}]) for t in texts]
    longest = max(map(len, prompts)) + params.max_new_tokens
    decoder = Decoder(model, head, num_tokens=longest + 64, max_batch=1)
    isa, threads = build_info()["cpu_isa"], torch.get_num_threads()
    print(f"{name}, {arguments.dtype}, {threads} threads, {isa}")

    if head is None:
        lengths, k = [0], 0
    elif arguments.k == "all":
        lengths, k = [0, 1, 2, 3], DraftPlanner(measure_step_seconds(model, head))
    else:
        k = int(arguments.k)
        lengths = sorted({0, k})
    if use_colour() and k:
        legend = (paint(f"depth {d}", d, True) for d in range(1, MAX_DRAFT_LEN + 1))
        print(f"Accepted drafts: {', '.join(legend)}; uncoloured: sampled by the model.")
    print(f"\n> {texts[0]}\n")
    try:
        stream_text(decoder, prompts[0], params, k)
    except ValueError as error:
        print(f"mtp_ext demo: {error}", file=sys.stderr)
        return 1

    print(
        f"\n{len(prompts)} prompt{'s'[: len(prompts) > 1]}, up to {params.max_new_tokens} tokens "
        f"each, from the first token on; medians of {arguments.rounds} interleaved rounds."
        "\nAcceptance per depth, given that the drafts before were accepted.\n"
    )
    rows, twin_tok_s = compare(model, decoder, prompts, params, lengths, arguments.rounds)
    print_table(rows, twin_tok_s)
    if arguments.json:
        environment = {
            **env.collect(),
            "model": name,
            "dtype": arguments.dtype,
            "threads": threads,
            "temperature": params.temperature,
            "seed": params.seed,
            "max_new_tokens": params.max_new_tokens,
            "prompts": len(prompts),
            "rounds": arguments.rounds,
        }
        result = {"rows": rows, "transformers_tok_s": twin_tok_s, "environment": environment}
        Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(row["identical"] is not False for row in rows) else 1
