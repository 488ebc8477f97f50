"""Makes shards: the trunk answers prompts, many at a time, or reads text; states are recorded.

Greedy answers are what a head meets in greedy decoding, so they are most of the data. Generation
gives hidden states and soft targets for nothing: one trunk forward per token is all there is.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_ext.models import Llama
from mtp_ext.train.data import TOP, Shard
from mtp_ext.train.prompts import templated_prompt


@dataclass
class Task:
    """One document to write: tokens to start from, and how to go on."""

    prompt: list[int]
    temperature: float = 0.0
    stop_loops: bool = False  # end a text that has begun to repeat itself
    user_turn: bool = False  # the trunk first writes the user's words, until `suffix[0]`
    suffix: list[int] = field(default_factory=list)  # from the end of the user's words on


@dataclass
class Document:
    """A finished text with what the trunk computed at each of its tokens."""

    tokens: list[int]
    answer: list[bool]  # [T]: the tokens to learn from
    hidden: Tensor  # bf16 [T, H]
    top_ids: Tensor  # int32 [T, TOP], zero within the prompt but for its last token
    top_logits: Tensor  # f16 [T, TOP]
    greedy: bool
    looped: bool


def to_shard(documents: list[Document]) -> Shard:
    return Shard(
        tokens=torch.cat([torch.tensor(d.tokens, dtype=torch.int32) for d in documents]),
        answer=torch.cat([torch.tensor(d.answer) for d in documents]),
        hidden=torch.cat([d.hidden for d in documents]),
        top_ids=torch.cat([d.top_ids for d in documents]),
        top_logits=torch.cat([d.top_logits for d in documents]),
        lens=torch.tensor([len(d.tokens) for d in documents]),
        greedy=torch.tensor([d.greedy for d in documents]),
        looped=torch.tensor([d.looped for d in documents]),
    )


def source_hidden(model: Llama, hidden: Tensor, h_source: str) -> Tensor:
    """What a head with this `h_source` reads, from the residual stream."""
    return model.final_norm(hidden).float() if h_source == "post_norm" else hidden


def chat_frame(model: Llama) -> tuple[list[int], list[int]]:
    """The chat template's tokens before and after what the user says."""
    tokenizer = model.tokenizer
    ids = tokenizer.encode_chat([{"role": "user", "content": "@"}])
    before, after = tokenizer.decode(ids, skip_special_tokens=False).rsplit("@", 1)
    return tokenizer.encode(before), tokenizer.encode(after)


def chat_tasks(model: Llama, count: int, seed: int) -> Iterator[Task]:
    """Half templates, half questions of the trunk's own; 70% greedy."""
    rng = random.Random(seed)
    before, after = chat_frame(model)
    for _ in range(count):
        temperature = 0.0 if rng.random() < 0.7 else rng.choice([0.4, 0.7, 1.0])
        stop_loops = rng.random() < 0.8
        if rng.random() < 0.5:
            yield Task(before, temperature, stop_loops, user_turn=True, suffix=after)
        else:
            prompt = before + model.tokenizer.encode(templated_prompt(rng)) + after
            yield Task(prompt, temperature, stop_loops)


def prompt_tasks(model: Llama, prompts: Iterable[str]) -> Iterator[Task]:
    """Greedy answers to these prompts, to their end or limit."""
    for prompt in prompts:
        yield Task(model.tokenizer.encode_chat([{"role": "user", "content": prompt}]))


class _Slot:
    """A task under way in one row of the batch."""

    def __init__(self, task: Task, capacity: int, hidden_size: int):
        self.task = task
        self.tokens: list[int] = []
        self.pending = list(task.prompt)
        self.in_user_turn = task.user_turn
        self.num_prompt = 0 if task.user_turn else len(task.prompt)
        self.user_len = 0
        self.looped = False
        self.hidden = torch.zeros(capacity, hidden_size, dtype=torch.bfloat16)
        self.top_ids = torch.zeros(capacity, TOP, dtype=torch.int32)
        self.top_logits = torch.zeros(capacity, TOP, dtype=torch.float16)

    def take(self, token: int, max_user: int) -> None:
        """The trunk said this token."""
        if not self.in_user_turn:
            self.pending = [token]
            return
        suffix = self.task.suffix
        self.user_len += 1
        if token == suffix[0] or self.user_len >= max_user:
            self.in_user_turn = False
            self.pending = suffix if token == suffix[0] else [token, *suffix]
            self.num_prompt = len(self.tokens) + len(self.pending)
        else:
            self.pending = [token]

    def finished(self, eos_ids: tuple[int, ...], max_answer: int) -> bool:
        """Called after a forward: all of `tokens` is in the cache."""
        answered = len(self.tokens) - self.num_prompt
        if self.in_user_turn or answered < 1:
            return False
        if self.task.stop_loops and answered % 8 == 0 and repeats(self.tokens[self.num_prompt :]):
            self.looped = True
        full = answered >= max_answer or len(self.tokens) == len(self.hidden)
        return self.tokens[-1] in eos_ids or full or self.looped

    def document(self) -> Document:
        n = len(self.tokens)
        return Document(
            self.tokens,
            [i >= self.num_prompt for i in range(n)],
            self.hidden[:n],
            self.top_ids[:n],
            self.top_logits[:n],
            self.task.temperature == 0,
            self.looped,
        )


def repeats(tokens: list[int]) -> bool:
    """Whether the text ends in several equal stretches of up to 32 tokens."""
    n = len(tokens)
    for period in range(1, 33):
        span = max(3 * period, 24)
        if n >= span + period and tokens[-span:] == tokens[-span - period : -period]:
            return True
    return False


@dataclass
class _Pages:
    k: list[Tensor]
    v: list[Tensor]


@torch.no_grad()
def generate(
    model: Llama,
    tasks: Iterable[Task],
    *,
    h_source: str = "pre_norm",
    slots: int = 64,
    max_answer: int = 224,
    max_user: int = 80,
    max_prompt: int = 128,
    seed: int = 0,
) -> Iterator[Document]:
    """Runs the tasks, `slots` of them at a time, and yields each as it ends.

    A text ends where the model's positions do. A task whose prompt is longer than max_prompt, or
    leaves no room for an answer, is left out.
    """
    c = model.config
    capacity = min(max_prompt + max_user + max_answer, c.max_positions)
    shape = (slots, capacity, c.num_kv_heads, c.head_dim)  # one page per slot
    cache = _Pages(
        [torch.zeros(shape, dtype=model.dtype) for _ in range(c.num_layers)],
        [torch.zeros(shape, dtype=model.dtype) for _ in range(c.num_layers)],
    )
    rng = torch.Generator().manual_seed(seed)
    queue = iter(tasks)
    running: dict[int, _Slot] = {}
    free = list(range(slots))
    while True:
        while free and (task := next(queue, None)) is not None:
            user = max_user + len(task.suffix) if task.user_turn else 0
            if len(task.prompt) <= max_prompt and len(task.prompt) + user < capacity:
                running[free.pop()] = _Slot(task, capacity, c.hidden_size)
        if not running:
            return
        pages, batch = list(running), list(running.values())
        counts = [len(s.pending) for s in batch]
        starts = [len(s.tokens) for s in batch]
        ends = torch.tensor(counts).cumsum(0)
        hidden = model.forward(
            torch.tensor([t for s in batch for t in s.pending]),
            torch.cat([torch.arange(a, a + n) for a, n in zip(starts, counts)]),
            cache,
            torch.tensor(pages, dtype=torch.int32)[:, None],
            torch.tensor(starts, dtype=torch.int32),
            F.pad(ends, (1, 0)).to(torch.int32),
            max(counts),
        )
        logits = model.logits(hidden[ends - 1]).float()
        top = logits.topk(TOP, -1)
        top_logits = (top.values - logits.logsumexp(-1, keepdim=True)).half()
        recorded = source_hidden(model, hidden, h_source).to(torch.bfloat16).split(counts)
        sampled = torch.multinomial(_probabilities(batch, top.values), 1, generator=rng)
        said = top.indices.gather(1, sampled)[:, 0].tolist()
        for i, (page, slot) in enumerate(zip(pages, batch)):
            slot.hidden[starts[i] : starts[i] + counts[i]] = recorded[i]
            slot.tokens += slot.pending
            slot.top_ids[len(slot.tokens) - 1] = top.indices[i].int()
            slot.top_logits[len(slot.tokens) - 1] = top_logits[i]
            if slot.finished(c.eos_ids, max_answer):
                yield slot.document()
                del running[page]
                free.append(page)
            else:
                slot.take(said[i], max_user)


def _probabilities(batch: list[_Slot], top_logits: Tensor) -> Tensor:
    """What each slot draws from: among the kept tokens at its temperature."""
    temperature = torch.tensor([1.0 if s.in_user_turn else s.task.temperature for s in batch])
    hot = F.softmax(top_logits / temperature.clamp(min=1e-3)[:, None], -1)
    greedy = F.one_hot(torch.zeros(len(batch), dtype=torch.int64), top_logits.shape[1]).float()
    return torch.where((temperature == 0)[:, None], greedy, hot)


@torch.no_grad()
def annotate(
    model: Llama,
    texts: Iterable[tuple[list[int], list[bool]]],
    *,
    h_source: str = "pre_norm",
    length: int = 256,
) -> Iterator[Document]:
    """Texts that others wrote (`read_texts`), cut to `length` tokens a document; one prefill each.

    Pieces of fewer than 8 tokens, or with nothing to learn from, are left out.
    """
    for ids, learned in texts:
        for start in range(0, len(ids), length):
            tokens, answer = ids[start : start + length], learned[start : start + length]
            if len(tokens) < 8 or not any(answer[2:]):
                continue
            hidden = model.forward_dense(torch.tensor([tokens]))[0]
            logits = model.logits(hidden).float()
            top = logits.topk(TOP, -1)
            yield Document(
                tokens,
                answer,
                source_hidden(model, hidden, h_source).to(torch.bfloat16),
                top.indices.int(),
                (top.values - logits.logsumexp(-1, keepdim=True)).half(),
                greedy=False,
                looped=False,
            )
