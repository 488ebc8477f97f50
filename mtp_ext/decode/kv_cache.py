"""A paged KV cache: fixed-size pages, handed out one by one, so requests of any length share it."""

import numpy as np
import torch
from torch import Tensor


def to_tensor(values: list, dtype: type, device: torch.device | str) -> Tensor:
    """A (nested) list of numbers, by way of NumPy: in half the time that torch.tensor takes."""
    return torch.from_numpy(np.array(values, dtype)).to(device)


class OutOfPages(RuntimeError):
    """More pages were asked for than are free. The allocator is as it was before the call."""


class PageAllocator:
    """Which pages are free. Ids are 0..num_pages-1; the most recently freed go out first."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages, or OutOfPages and no change."""
        if count > len(self._free):
            raise OutOfPages(
                f"{count} pages needed, {len(self._free)} of {self.num_pages} are free"
            )
        pages = [self._free.pop() for _ in range(count)]
        self._used.update(pages)
        return pages

    def release(self, pages: list[int]) -> None:
        if len(set(pages)) != len(pages) or not self._used.issuperset(pages):
            raise ValueError(f"pages {pages} are not all in use")
        self._used.difference_update(pages)
        self._free.extend(pages)


class PagedKVCache:
    """k[layer], v[layer]: [num_pages, page_size, Hkv, D].

    An MTP head may keep a cache of its own under the same page ids: a page then stands for
    page_size positions in every cache.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (num_pages, page_size, num_kv_heads, head_dim)
        self.k = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.v = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.page_size = page_size
        self.device = device
        self.allocator = PageAllocator(num_pages)

    def pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def block_table(self, page_lists: list[list[int]]) -> Tensor:
        """int32 [B, max_pages]; -1 where a request has no page, which operators skip."""
        width = max((len(pages) for pages in page_lists), default=0)
        rows = [pages + [-1] * (width - len(pages)) for pages in page_lists]
        return to_tensor(rows, np.int32, self.device).view(len(rows), width)
