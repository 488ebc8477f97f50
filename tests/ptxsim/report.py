"""What a launch did, counted exactly."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class BufferCounts:
    """Traffic of one registered buffer."""

    loaded_bytes: int = 0
    stored_bytes: int = 0
    atomic_bytes: int = 0
    load_sectors: int = 0
    store_sectors: int = 0
    unique_loaded_bytes: int = 0
    unique_stored_bytes: int = 0


@dataclass
class LineCounts:
    """Traffic of one PTX load, store, atomic or copy instruction."""

    line: int
    text: str
    source: str
    space: str
    requests: int = 0  # warp-level accesses
    bytes: int = 0
    sectors: int = 0  # 32-byte sectors, global only
    ideal_sectors: int = 0
    wavefronts: int = 0  # shared only
    ideal_wavefronts: int = 0


@dataclass
class LaunchReport:
    """Counters of one launch; all are exact and the same on every run."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    dynamic_smem: int
    static_smem: int
    threads: int = 0
    thread_instructions: int = 0
    warp_instructions: int = 0
    steps: int = 0  # instructions the simulator issued, whatever their width
    by_class: dict[str, int] = field(default_factory=dict)  # warp-level instructions
    mma: int = 0  # warp-level mma instructions
    barriers: int = 0  # CTA-level barrier completions
    buffers: dict[str, BufferCounts] = field(default_factory=dict)
    lines: dict[int, LineCounts] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)

    def _buffer(self, name: str) -> BufferCounts:
        return self.buffers.get(name) or BufferCounts()

    def loaded_bytes(self, name: str) -> int:
        """Bytes the threads asked for, repeats included."""
        return self._buffer(name).loaded_bytes

    def stored_bytes(self, name: str) -> int:
        return self._buffer(name).stored_bytes

    def unique_bytes(self, name: str) -> int:
        """Distinct bytes loaded: loaded_bytes / unique_bytes is how often a byte is re-read."""
        return self._buffer(name).unique_loaded_bytes

    def sector_efficiency(self, name: str) -> float:
        """Requested bytes over the bytes of the 32-byte sectors that the loads moved."""
        buffer = self._buffer(name)
        return buffer.loaded_bytes / (32 * buffer.load_sectors) if buffer.load_sectors else 1.0

    @property
    def bank_conflicts(self) -> int:
        """Shared-memory wavefronts beyond the ideal number."""
        return sum(line.wavefronts - line.ideal_wavefronts for line in self.lines.values())

    def table(self) -> str:
        """The report as text."""
        raise NotImplementedError
