"""End to end: tokens per second against draft length, batch and context, on the shipped model.

Each sample decodes the same greedy continuation from the same cached context; prefill is not timed.
A step must read every weight of the trunk once and the context's keys and values, so `bytes` and
`%` are a step's, while the time is a token's. Peer `k=0` is plain decoding by the same code;
`transformers` runs the same weights at batch 1.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import harness
from bench.report import dtype_name
from mtp_ext.decode import Decoder, SamplingParams
from mtp_ext.models import Llama, LlamaConfig, load_model
from mtp_ext.nn import MTPBlock, MTPHead, MTPSpec, default_head_path, load_head

QUESTIONS = (
    "Explain to a ten-year-old why the sea is salty.",
    "Write a short story about a clockmaker who loses his sense of time.",
    "What should I think about before I adopt a dog?",
    "How does a refrigerator keep food cold?",
)
MAX_K = 3


def random_model() -> tuple[Llama, MTPHead]:
    """Small enough to show that everything runs."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=16, vocab_size=96, max_positions=512,
    )  # fmt: skip
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    h, f = config.hidden_size, config.intermediate_size
    shapes = {
        "q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q),
        "gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f),
    }  # fmt: skip

    def tensor(name: str) -> torch.Tensor | None:
        if "lm_head" in name:
            return None
        if "norm" in name:
            return torch.ones(h)
        return torch.randn(shapes.get(name.split(".")[-2], (config.vocab_size, h))) / 4

    trunk = Llama.from_tensors(config, tensor, torch.float32)
    spec = MTPSpec(h, config.num_heads, config.num_kv_heads, config.head_dim, f)
    return trunk, MTPHead(MTPBlock(spec), trunk.embedding, trunk.lm_head, trunk_norm=trunk.norm)


def prompts(model: Llama, batch: int, context: int) -> list[list[int]]:
    """A question each, after as much of the licence as fills the context."""
    if model.tokenizer is None:
        return [
            [(7 * i + b) % model.config.vocab_size for i in range(context)] for b in range(batch)
        ]
    text = (harness.HERE.parent / "LICENSE").read_text()
    found = []
    for b in range(batch):
        question = QUESTIONS[b % len(QUESTIONS)]
        plain = model.tokenizer.encode_chat([{"role": "user", "content": question}])
        missing = context - len(plain)
        if missing > 0:
            passage = model.tokenizer.encode(text)[:missing]
            content = f"{model.tokenizer.decode(passage)}\n\n{question}"
            plain = model.tokenizer.encode_chat([{"role": "user", "content": content}])
        found.append(plain)
    return found


@dataclass
class Run:
    """Requests that stand behind their prompt, and go there again before every sample."""

    decoder: Decoder
    k: int
    new_tokens: int
    clock: harness.Clock

    def start(self, texts: Sequence[list[int]]) -> None:
        params = SamplingParams(max_new_tokens=8 * self.new_tokens, ignore_eos=True)
        self.requests = [self.decoder.submit(text, params) for text in texts]
        while not all(r.output for r in self.requests):
            self.decoder.step(0)
        self.decoder.step(self.k)  # the head sees the prompt
        names = ("tokens", "depths", "cache_len", "head_len", "pending_hidden")
        self.saved = [{name: getattr(r, name) for name in names} for r in self.requests]
        for state in self.saved:
            for name in ("tokens", "depths", "pending_hidden"):
                state[name] = list(state[name])

    def sample(self) -> float:
        """Seconds per token."""
        for request, state in zip(self.requests, self.saved):
            for name, value in state.items():
                setattr(request, name, list(value) if isinstance(value, list) else value)
        before = [len(r.tokens) for r in self.requests]
        steps, start = 0, self.clock()
        while min(len(r.tokens) - n for r, n in zip(self.requests, before)) < self.new_tokens:
            self.decoder.step(self.k)
            steps += 1
        seconds = self.clock() - start
        made = sum(len(r.tokens) - n for r, n in zip(self.requests, before))
        self.tokens_per_step = made / steps
        return seconds / made


def make_transformers(model: Llama, text: list[int], new_tokens: int) -> Callable[[], float] | None:
    try:
        from mtp_ext.decode.demo import transformers_tok_s
        from mtp_ext.models.to_transformers import to_transformers

        twin = to_transformers(model)
    except ImportError:
        return None
    params = SamplingParams(max_new_tokens=new_tokens)
    return lambda: 1 / transformers_tok_s(twin, text, params)


def step_bytes(model: Llama, batch: int, context: int) -> int:
    c = model.config
    weights = [getattr(layer, name) for layer in model.layers for name in layer.__slots__]
    cached = 2 * c.num_layers * batch * context * c.num_kv_heads * c.head_dim
    return harness.nbytes(*weights, model.norm, model.lm_head) + cached * model.dtype.itemsize


def rows(
    device: str, small: bool, ceilings: harness.Ceilings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    if small:
        model, head = random_model()
        settings, new_tokens = [(2, 16)], 4
    else:
        model = load_model()
        head = load_head(trunk=model) if Path(default_head_path()).exists() else None
        settings, new_tokens = [(1, 32), (4, 32), (1, 2048)], 48
    lengths = range(MAX_K + 1) if head else [0]
    table = []
    for batch, context in settings:
        texts = prompts(model, batch, context)
        length = max(map(len, texts))
        runs = {}
        for k in lengths:
            room = batch * (length + 8 * new_tokens + 64)
            decoder = Decoder(model, head, num_tokens=room, max_batch=batch)
            runs[f"k={k}"] = Run(decoder, k, new_tokens, ceilings.clock)
            runs[f"k={k}"].start(texts)
        contenders = {name: run.sample for name, run in runs.items()}
        contenders["ceiling"] = ceilings.timer("read").sample
        missing = {}
        if options.peers and options.clock == "wall" and batch == 1 and not small:
            peer = make_transformers(model, texts[0], new_tokens)
            if peer is None:
                missing["transformers"] = "not installed"
            else:
                contenders["transformers"] = peer
        load = harness.OtherLoad()
        samples = harness.interleave(contenders, 4 * options.seconds, options.min_rounds, 50)
        others = load.share()
        for name, run in runs.items():
            shape = f"{name} B={batch} ctx={length}"
            row = harness.describe("decode", shape, dtype_name(model.dtype), samples[name], others)
            step_seconds = statistics.median(samples[name]) * run.tokens_per_step
            moved = step_bytes(model, batch, length)
            ratio = harness.paired_ratio(samples["ceiling"], samples[name]) / run.tokens_per_step
            peers = {p: harness.describe_peer(samples[p], samples[name])
                     for p in ("k=0", "transformers") if p in samples}  # fmt: skip
            table.append(row | {
                "tok_per_s": 1e6 / row["median_us"],
                "tokens_per_step": run.tokens_per_step / batch,
                "read": moved, "written": 0, "bytes": moved, "flops": 0, "sets": 1,
                "gb_per_s": moved / step_seconds / 1e9,
                "bound": "read",
                "ceiling_per_s": ceilings.stream_bytes / statistics.median(samples["ceiling"]),
                "of_ceiling": ratio * moved / ceilings.stream_bytes,
                "peers": peers | dict.fromkeys(missing),
                "missing": missing,
            })  # fmt: skip
    return table
