"""End to end: tokens per second against draft length, batch and context, on the shipped model.

Each sample decodes the same greedy continuation from the same cached context; prefill is not timed.
A step must read every weight of the trunk once and the context's keys and values, so `bytes` and
`%` are a step's, while the time is a token's. Peer `k=0` is plain decoding by the same code;
`transformers` runs the same weights at batch 1. `overhead` is what the same steps take of a model
of as many layers and as good as no width, over a step's time: Python, dispatch, allocation and the
host's read, and above them a little of the kernels' own.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
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
SETTINGS = [(1, 32), (4, 32), (16, 32), (1, 2048), (4, 2048)]  # batch, context
MAX_K = 3
MAX_NEW_TOKENS = 256


def tiny_model(layers: int, dtype: torch.dtype) -> tuple[Llama, MTPHead]:
    """As many calls as a model of so many layers makes, and next to nothing to compute."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_layers=layers, num_heads=2, num_kv_heads=1,
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

    trunk = Llama.from_tensors(config, tensor, dtype)
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


class Runs:
    """Requests that stand behind their prompts, and go there again before every sample."""

    names = ("tokens", "depths", "cache_len", "head_len", "pending_hidden")

    def __init__(
        self, model: Llama, head: MTPHead | None, texts: list[list[int]], clock: harness.Clock
    ):
        self.clock = clock
        room = sum(len(text) + MAX_NEW_TOKENS for text in texts) + 64 * len(texts)
        self.decoder = Decoder(model, head, num_tokens=room, max_batch=len(texts))
        params = SamplingParams(max_new_tokens=MAX_NEW_TOKENS, ignore_eos=True)
        self.requests = [self.decoder.submit(text, params) for text in texts]
        while not all(r.output for r in self.requests):
            self.decoder.step(0)
        self.decoder.step(1 if head else 0)  # the head sees the prompt
        self.saved = [self._copy({n: getattr(r, n) for n in self.names}) for r in self.requests]

    @staticmethod
    def _copy(state: dict[str, Any]) -> dict[str, Any]:
        return {n: list(v) if isinstance(v, list) else v for n, v in state.items()}

    def sample(self, k: int, new_tokens: int) -> tuple[float, int, int]:
        """Seconds, steps and tokens until every request has its new tokens."""
        for request, state in zip(self.requests, self.saved):
            for name, value in self._copy(state).items():
                setattr(request, name, value)
        before = [len(r.tokens) for r in self.requests]
        steps, start = 0, self.clock()
        while min(len(r.tokens) - n for r, n in zip(self.requests, before)) < new_tokens:
            self.decoder.step(k)
            steps += 1
        seconds = self.clock() - start
        return seconds, steps, sum(len(r.tokens) - n for r, n in zip(self.requests, before))


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
) -> Iterator[dict[str, Any]]:
    if small:
        model, head = tiny_model(2, torch.float32)
    else:
        model = load_model()
        head = load_head(trunk=model) if Path(default_head_path()).exists() else None
    tiny, tiny_head = tiny_model(len(model.layers), model.dtype)
    for batch, context in [(2, 16)] if small else SETTINGS:
        texts = prompts(model, batch, context)
        length = max(map(len, texts))
        if options.only and not any(text in f"B={batch} ctx={length}" for text in options.only):
            continue
        # Enough steps for a sample, though batch 1 follows one text only.
        new_tokens = 4 if small else max(24, 96 // batch)
        runs = Runs(model, head, texts, ceilings.clock)
        same_calls = Runs(
            tiny, head and tiny_head, [[1 + b] * 16 for b in range(batch)], ceilings.clock
        )
        counted = {}  # tokens and tokens per step: the same in every sample

        def per_token(k: int, runs=runs, n=new_tokens, counted=counted) -> float:
            seconds, steps, tokens = runs.sample(k, n)
            counted[k] = tokens / steps
            return seconds / tokens

        def per_step_of_nothing(k: int, runs=same_calls, n=new_tokens) -> float:
            seconds, steps, _ = runs.sample(k, n)
            return seconds / steps

        lengths = range(MAX_K + 1) if head else [0]
        contenders = {f"k={k}": partial(per_token, k) for k in lengths}
        contenders |= {f"overhead {k}": partial(per_step_of_nothing, k) for k in lengths}
        contenders["ceiling"] = ceilings.timer("read").sample
        missing = {}
        if options.peers and options.clock == "wall" and (batch, context) == SETTINGS[0]:
            peer = make_transformers(model, texts[0], new_tokens)
            if peer is None:
                missing["transformers"] = "not installed"
            else:
                contenders["transformers"] = peer
        load = harness.OtherLoad()
        samples = harness.interleave(contenders, 10 * options.seconds, 9, 50)
        others = load.share()
        moved = step_bytes(model, batch, length)
        for k in lengths:
            mine = samples[f"k={k}"]
            shape = f"k={k} B={batch} ctx={length}"
            row = harness.describe("decode", shape, dtype_name(model.dtype), mine, others)
            overhead = harness.paired_ratio(samples[f"overhead {k}"], mine) / counted[k]
            peers = {p: harness.describe_peer(samples[p], mine)
                     for p in ("k=0", "transformers") if p in samples}  # fmt: skip
            yield row | {
                "k": k, "batch": batch, "context": length,
                "tok_per_s": 1e6 / row["median_us"],
                "tokens_per_step": counted[k] / batch,
                "overhead": overhead,
                "read": moved, "written": 0, "bytes": moved, "flops": 0, "sets": 1,
                "gb_per_s": moved / statistics.median(mine) / counted[k] / 1e9,
                "bound": "read",
                "ceiling_per_s": ceilings.stream_bytes / statistics.median(samples["ceiling"]),
                "of_ceiling": harness.paired_ratio(samples["ceiling"], mine) / counted[k]
                * moved / ceilings.stream_bytes,
                "peers": peers | dict.fromkeys(missing),
                "missing": missing,
            }  # fmt: skip
