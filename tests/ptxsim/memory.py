"""Global memory: real addresses of this process, usable only inside registered ranges.

Tests hand tensors to kernels by their host addresses. `GlobalMemory` knows which ranges a launch
may touch; `window(dtype)` reads and writes them: a NumPy array that starts at address zero, so
that the element index is `address // itemsize`. Nothing may index it before `locate` agreed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_ADDRESS_BITS = 47


class _AddressSpace:
    def __init__(self, dtype: np.dtype) -> None:
        # NumPy refuses a null pointer, so the view starts at 4096; `window` adds it back.
        self.__array_interface__ = {
            "shape": (((1 << _ADDRESS_BITS) - _FIRST) // dtype.itemsize,),
            "typestr": dtype.str,
            "data": (_FIRST, False),
            "version": 3,
        }


_FIRST = 4096
_WINDOWS: dict[int, np.ndarray] = {
    size: np.asarray(_AddressSpace(np.dtype(f"u{size}"))) for size in (1, 2, 4, 8)
}


def read_host(addresses: np.ndarray, size: int) -> np.ndarray:
    """Unsigned values of `size` bytes at checked, aligned host addresses."""
    index = (addresses - np.uint64(_FIRST)) >> np.uint64(size.bit_length() - 1)
    return _WINDOWS[size][index.view(np.int64)]


def write_host(addresses: np.ndarray, size: int, values: np.ndarray) -> None:
    """The inverse of `read_host`; of duplicate addresses the last one stays."""
    index = (addresses - np.uint64(_FIRST)) >> np.uint64(size.bit_length() - 1)
    _WINDOWS[size][index.view(np.int64)] = values


@dataclass
class Region:
    """A maximal registered range: overlapping registrations are one region."""

    start: int
    end: int
    writable: bool
    names: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]


class GlobalMemory:
    """The ranges of host memory that kernels may access."""

    def __init__(self) -> None:
        self._registered: list[tuple[int, int, str, bool]] = []
        self._regions: list[Region] | None = None
        self._starts = np.zeros(0, np.uint64)
        self._ends = np.zeros(0, np.uint64)

    def register(self, addr: int, nbytes: int, name: str, writable: bool = True) -> None:
        """Allows access to [addr, addr + nbytes). Ranges may repeat and overlap."""
        if nbytes > 0:
            self._registered.append((addr, addr + nbytes, name, writable))
            self._regions = None

    def unregister(self, addr: int) -> None:
        """Takes back the latest registration that starts at `addr`."""
        for i in reversed(range(len(self._registered))):
            if self._registered[i][0] == addr:
                del self._registered[i]
                self._regions = None
                return

    def clear(self) -> None:
        self._registered.clear()
        self._regions = None

    @property
    def regions(self) -> list[Region]:
        if self._regions is None:
            regions: list[Region] = []
            # Larger ranges first, so that a region is named after the whole tensor.
            for start, end, name, writable in sorted(
                set(self._registered), key=lambda r: (r[0], -r[1])
            ):
                if regions and start < regions[-1].end:
                    last = regions[-1]
                    last.end = max(last.end, end)
                    last.writable |= writable
                    if name not in last.names:
                        last.names.append(name)
                else:
                    regions.append(Region(start, end, writable, [name]))
            self._regions = regions
            self._starts = np.array([r.start for r in regions], np.uint64)
            self._ends = np.array([r.end for r in regions], np.uint64)
        return self._regions

    def find(self, name: str) -> list[int]:
        """Indices of the regions that carry `name`."""
        return [i for i, r in enumerate(self.regions) if name in r.names]

    def locate(self, addresses: np.ndarray, size: int) -> tuple[int, np.ndarray | None]:
        """Region of each access: (index, None) when all share one, else (-2, indices).

        An access outside every region has index -1.
        """
        regions = self.regions
        if not regions:
            return -2, np.full(addresses.shape, -1)
        low, high = int(addresses.min()), int(addresses.max()) + size
        first = int(np.searchsorted(self._starts, np.uint64(low), side="right")) - 1
        if first >= 0 and high <= regions[first].end:
            return first, None
        index = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        ends = self._ends[np.maximum(index, 0)]
        return -2, np.where((index >= 0) & (addresses + np.uint64(size) <= ends), index, -1)
