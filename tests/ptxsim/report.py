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
        out = [
            f"{self.kernel}",
            f"grid {self.grid} block {self.block} "
            f"shared {self.static_smem}+{self.dynamic_smem} bytes",
            f"{self.thread_instructions} thread instructions, {self.warp_instructions} warp "
            f"instructions, {self.mma} mma, {self.barriers} barriers, "
            f"{self.bank_conflicts} extra shared wavefronts",
            "warp instructions by class: "
            + ", ".join(f"{k} {n}" for k, n in sorted(self.by_class.items())),
        ]
        if self.buffers:
            rows = [
                (
                    "buffer",
                    "loaded",
                    "unique",
                    "reread",
                    "sectors",
                    "eff",
                    "stored",
                    "unique",
                    "sectors",
                    "atomic",
                )
            ]
            for name, b in self.buffers.items():
                reread = b.loaded_bytes / b.unique_loaded_bytes if b.unique_loaded_bytes else 0.0
                rows.append((
                    name, str(b.loaded_bytes), str(b.unique_loaded_bytes), f"{reread:.2f}",
                    str(b.load_sectors), f"{self.sector_efficiency(name):.2f}",
                    str(b.stored_bytes), str(b.unique_stored_bytes), str(b.store_sectors),
                    str(b.atomic_bytes),
                ))  # fmt: skip
            out += ["", *_columns(rows)]
        if self.lines:
            rows = [
                ("line", "requests", "bytes", "sectors", "ideal", "waves", "ideal", "source", "ptx")
            ]
            for key in sorted(self.lines):
                n = self.lines[key]
                rows.append((
                    str(n.line), str(n.requests), str(n.bytes), str(n.sectors),
                    str(n.ideal_sectors), str(n.wavefronts), str(n.ideal_wavefronts),
                    n.source.rsplit("/", 1)[-1], n.text[:60],
                ))  # fmt: skip
            out += ["", *_columns(rows)]
        return "\n".join(out)


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
