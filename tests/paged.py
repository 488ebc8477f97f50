"""Inputs of the operators on the paged KV cache, and their unused parts filled with poison."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn


@dataclass
class Case:
    """One call. Arguments lie on the CPU; `on(device)` gives fresh copies elsewhere."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    cache_lens: Tensor
    cu_q_lens: Tensor
    max_q_len: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def attention_args(self) -> tuple:
        return (self.q, *self.append_args, self.max_q_len)

    @property
    def append_args(self) -> tuple:
        return (
            self.k, self.v, self.k_cache, self.v_cache, self.block_table, self.cache_lens,
            self.cu_q_lens,
        )  # fmt: skip

    @property
    def append_options(self) -> dict[str, Any]:
        names = ("k_scale", "v_scale", "layout")
        return {name: self.options[name] for name in names if name in self.options}

    def on(self, device: str) -> "Case":
        def copy(x):
            return x.to(device, copy=True) if isinstance(x, Tensor) else x

        fields = {name: copy(getattr(self, name)) for name in self.__dataclass_fields__}
        return Case(**fields | {"options": {n: copy(x) for n, x in self.options.items()}})

    def change(self, **fields) -> "Case":
        return replace(self, **fields)

    def slots(self, b: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Pages and offsets of positions [begin, end)."""
        position = torch.arange(begin, end)
        page = self.page_size
        return self.block_table[b, position // page].long(), position % page

    @property
    def hnd(self) -> bool:
        return self.options.get("layout", "NHD") == "HND"

    @property
    def page_size(self) -> int:
        return self.k_cache.shape[2 if self.hnd else 1]


def nhd(cache: Tensor, layout: str = "NHD") -> Tensor:
    return cache if layout == "NHD" else cache.transpose(1, 2)


def bits(t: Tensor) -> Tensor:
    """For comparisons that NaN does not defeat."""
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return t.contiguous().view(views[t.element_size()])


def make_case(
    lens: tuple[int, ...] = (37, 0, 5),
    q_lens: tuple[int, ...] = (3, 2, 0),
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    page: int = 16,
    layout: str = "NHD",
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    padding: int = 0,
    spare_pages: int = 2,
    seed: int = 0,
    **options,
) -> Case:
    """Random data; pages in random order; the table has one spare column."""
    g = torch.Generator().manual_seed(seed)
    q_heads, kv_heads = heads
    batch, total = len(lens), sum(q_lens) + padding
    columns = 1 + max([-(-(n + m) // page) for n, m in zip(lens, q_lens)], default=0)
    pages = batch * columns + spare_pages
    shape = (pages, page, kv_heads, dim) if layout == "NHD" else (pages, kv_heads, page, dim)

    def random(*size):
        return torch.randn(*size, generator=g)

    stored = cache_dtype or dtype
    return Case(
        q=random(total, q_heads, dim).to(dtype),
        k=random(total, kv_heads, dim).to(dtype),
        v=random(total, kv_heads, dim).to(dtype),
        k_cache=random(*shape).to(stored),
        v_cache=random(*shape).to(stored),
        block_table=torch.randperm(pages, generator=g)[: batch * columns]
        .view(batch, columns)
        .int(),
        cache_lens=torch.tensor(lens, dtype=torch.int32),
        cu_q_lens=torch.tensor([0, *q_lens]).cumsum(0).int(),
        max_q_len=max(q_lens, default=0),
        options={"layout": layout, **options},
    )


def poison(case: Case) -> Case:
    """NaN in every slot that holds no cached token, and in padding; garbage in unused entries."""
    case = case.on("cpu")
    layout = case.options["layout"]
    for cache in (case.k_cache, case.v_cache):
        view, kept = nhd(cache, layout), {}
        for b, length in enumerate(case.cache_lens.tolist()):
            slots = case.slots(b, 0, length)
            kept[b] = slots, view[slots].clone()
        view.copy_(torch.full(view.shape, float("nan")))
        for slots, rows in kept.values():
            view[slots] = rows
    counts = case.cu_q_lens.diff()
    for b, (length, count) in enumerate(zip(case.cache_lens.tolist(), counts.tolist())):
        used = -(-(length + count) // case.page_size)
        garbage = torch.tensor([2**31 - 1, -(2**31), -1, 10**9, case.k_cache.shape[0]])
        tail = case.block_table[b, used:]
        tail.copy_(garbage.repeat(len(tail))[: len(tail)])
    for rows in (case.q, case.k, case.v):
        rows[int(case.cu_q_lens[-1]) :] = float("nan")
    return case
