"""The state of a wave of CTAs and the instructions that touch more than registers.

A wave holds `ctas` CTAs of `width` thread slots (a multiple of 32). Compiled blocks call the
methods below with arrays over the active threads: either every slot of the wave (then `live` says
which count) or the gathered subset `idx`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import matrix
from . import numerics as nx
from .errors import (
    BarrierError,
    GlobalRace,
    LaunchError,
    Misaligned,
    OutOfBounds,
    SharedRace,
    UnknownInstruction,
)
from .memory import GlobalMemory, read_host, write_host
from .numerics import F4, U1, U2, U4, U8
from .program import LOCAL_WINDOW, PARAM_WINDOW, SHARED_BASE, SHARED_WINDOW, Op, Program
from .report import BufferCounts, LaunchReport, LineCounts
from .shadow import Found, GlobalShadow, SharedShadow

_LANES = np.arange(32)
_BITS = (np.uint32(1) << np.arange(32, dtype=U4)).astype(U4)
_EMPTY = np.zeros(0, np.int64)


_WINDOWS = {"shared": SHARED_WINDOW, "local": LOCAL_WINDOW, "param": PARAM_WINDOW}


class Active:
    """A set of threads that execute together."""

    def __init__(self, wave: Wave, idx: np.ndarray | None, live: np.ndarray | None, count: int):
        self.idx, self.live, self.count = idx, live, count
        self.width = wave.slots if idx is None else len(idx)
        self.wave = wave
        self._layout: tuple | None = None
        self.warpgroups: Warpgroups | None = None

    @property
    def threads(self) -> np.ndarray:
        if self.idx is not None:
            return self.idx
        return self.wave.everyone if self.live is None else np.flatnonzero(self.live)

    @property
    def layout(self) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        """(warps, slot, present): slot scatters into [warps, 32], None where it is a reshape."""
        if self._layout is None:
            if self.idx is None:
                present = None if self.live is None else self.live.reshape(-1, 32)
                self._layout = self.wave.all_warps, None, present
            else:
                warp = self.idx >> 5
                first = np.flatnonzero(np.concatenate(([True], warp[1:] != warp[:-1])))
                warps = warp[first]
                if len(warps) * 32 == len(self.idx):
                    self._layout = warps, None, None
                else:
                    row = np.cumsum(np.concatenate(([0], warp[1:] != warp[:-1])))
                    slot = row * 32 + (self.idx & 31)
                    present = np.zeros(len(warps) * 32, bool)
                    present[slot] = True
                    self._layout = warps, slot, present.reshape(-1, 32)
        return self._layout

    def whole(self, span: int) -> bool:
        """Whether every live lane of every warp (span 1) or warpgroup (4) concerned is here."""
        if self.idx is None:
            return True
        if span > 1:
            return bool(self.complete(span)[self.idx].all())
        warps, _, present = self.layout
        if present is None:
            return True
        alive = self.wave.alive.reshape(-1, 32)[warps]
        return bool((present == alive).all())

    def complete(self, span: int) -> np.ndarray:
        """Per thread slot: are the live lanes of its group of `span` warps all here?"""
        wave = self.wave
        group = wave.cta_of * -(-wave.warps_per_cta // span) + (wave.tid_of >> 5) // span
        here = np.bincount(group[self.threads], minlength=int(group[-1]) + 1)
        return (here == np.bincount(group, wave.alive))[group]


@dataclass
class Warpgroups:
    """The warpgroups that execute together."""

    rows: np.ndarray  # of to_warps(), four per warpgroup
    index: np.ndarray  # in the wave
    cta: np.ndarray  # in the wave
    warp: np.ndarray  # the first one in the CTA

    def part(self, pick: np.ndarray) -> Warpgroups:
        rows = self.rows.reshape(-1, 4)[pick].reshape(-1)
        return Warpgroups(rows, self.index[pick], self.cta[pick], self.warp[pick])


@dataclass
class Flight:
    """A wgmma that has not been waited for."""

    groups: Warpgroups
    batch: np.ndarray  # how many groups each warpgroup had committed before
    registers: frozenset[int]
    reads: list[np.ndarray]  # pieces of shared memory, [warpgroups, pieces]

    def part(self, pick: np.ndarray) -> Flight:
        reads = [flat[pick] for flat in self.reads]
        return Flight(self.groups.part(pick), self.batch[pick], self.registers, reads)


_CLEAN, _TOUCHED = 0, -1  # beside the number of the shape that accumulates in a register


class WgmmaState:
    """What the warpgroups of a wave have under way."""

    def __init__(self, warpgroups: int) -> None:
        self.committed = np.zeros(warpgroups, np.int64)
        self.fenced = np.zeros(warpgroups, bool)
        self.flights: list[Flight] = []
        self.touched: dict[int, np.ndarray] = {}  # since the last fence, by register
        self.shapes: dict[tuple, int] = {}

    def of(self, register: int) -> np.ndarray:
        if register not in self.touched:
            self.touched[register] = np.zeros(len(self.committed), np.int16)
        return self.touched[register]


class Wave:
    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        first_cta: int,
        ctas: int,
        args: np.ndarray,
        smem: int,
        checks,
        device,
        report: LaunchReport,
        globals_: GlobalShadow | None,
    ) -> None:
        self.program, self.memory, self.report, self.device = program, memory, report, device
        self.grid, self.block_dim, self.first_cta, self.ctas = grid, block, first_cta, ctas
        self.args, self.smem, self.checks = args, smem, checks
        threads = block[0] * block[1] * block[2]
        self.threads_per_cta = threads
        self.width = -(-threads // 32) * 32
        self.warps_per_cta = self.width // 32
        self.slots = ctas * self.width
        self.everyone = np.arange(self.slots)
        self.all_warps = np.arange(self.slots // 32)
        self.alive = np.ones(self.slots, bool)
        if threads != self.width:
            self.alive = np.tile(np.arange(self.width) < threads, ctas)
        self.cta_of = self.everyone // self.width
        self.tid_of = (self.everyone % self.width).astype(np.int32)
        self.stride = -(-max(smem, 16) // 128) * 128
        self.shared = np.zeros(ctas * self.stride, U1)
        self._shared_views = {s: self.shared.view(f"u{s}") for s in (1, 2, 4, 8)}
        self.cta_shared = (self.cta_of * self.stride - SHARED_BASE).astype(np.int64)
        self.local_stride = -(-max(program.local_size, 16) // 16) * 16
        self.local = np.zeros(self.slots * self.local_stride if program.local_size else 16, U1)
        self.shadow = None
        if checks.races or checks.uninitialized:
            wgmma = bool(program.wgmma_regs)
            self.shadow = SharedShadow(ctas, self.warps_per_cta, self.stride, checks, wgmma)
        # How much a warp knows of the others: the length of a row of the shadow's `known`.
        self.facts = self.warps_per_cta if self.shadow is None else self.shadow.known.shape[2]
        self.globals = globals_
        self.ticks = 0
        self.rng: np.random.Generator | None = None
        self.copies: list[list] = []  # pending cp.async: [threads, flat, data, size, group]
        self.committed = np.zeros(self.slots, np.int64)
        self.wgmma_state = WgmmaState(ctas * -(-self.warps_per_cta // 4))
        self.mbar_known: dict[int, np.ndarray] = {}
        self.woken = False  # an mbarrier phase completed
        self.active: Active = Active(self, None, None, self.slots)
        self._init_registers()

    def _init_registers(self) -> None:
        """Registers start as poison; special registers hold their values."""
        base: list[np.ndarray] = []
        for k in self.program.home:
            poison = {"b1": 0, "u2": 0x7FFF, "i2": 0x7FFF}.get(k, 0x7FC0DEAD)
            base.append(np.array([poison], "u" + k[1]).view(k) if k != "b1" else np.zeros(1, bool))
        tid = self.tid_of.astype(np.int64)
        cta = self.cta_of + self.first_cta
        bx, by, _ = self.block_dim
        gx, gy, _ = self.grid
        lane = tid & 31

        def one(value: int) -> np.ndarray:
            return np.array([value])

        values = {
            "%tid.x": lambda: tid % bx,
            "%tid.y": lambda: tid // bx % by,
            "%tid.z": lambda: tid // (bx * by),
            "%ctaid.x": lambda: cta % gx,
            "%ctaid.y": lambda: cta // gx % gy,
            "%ctaid.z": lambda: cta // (gx * gy),
            "%laneid": lambda: lane,
            "%warpid": lambda: tid >> 5,
            "%nwarpid": lambda: one(self.device.threads_per_sm // 32),
            "%smid": lambda: cta % self.device.sm_count,
            "%nsmid": lambda: one(self.device.sm_count),
            "%clusterid.x": lambda: cta % gx,
            "%clusterid.y": lambda: cta // gx % gy,
            "%clusterid.z": lambda: cta // (gx * gy),
            "%lanemask_eq": lambda: 1 << lane,
            "%lanemask_lt": lambda: (1 << lane) - 1,
            "%lanemask_le": lambda: (2 << lane) - 1,
            "%lanemask_gt": lambda: 0xFFFFFFFF ^ ((2 << lane) - 1),
            "%lanemask_ge": lambda: 0xFFFFFFFF ^ ((1 << lane) - 1),
            "%dynamic_smem_size": lambda: one(self.report.dynamic_smem),
            "%total_smem_size": lambda: one(self.smem),
            "%aggr_smem_size": lambda: one(self.smem + 1024),
        }
        for axis, n, g in zip("xyz", self.block_dim, self.grid):
            values[f"%ntid.{axis}"] = lambda n=n: one(n)
            values[f"%nctaid.{axis}"] = lambda g=g: one(g)
            values[f"%nclusterid.{axis}"] = lambda g=g: one(g)
            values[f"%cluster_nctaid.{axis}"] = lambda: one(1)
        values["%cluster_nctarank"] = lambda: one(1)
        if self.ctas == 1:
            cta = np.array([self.first_cta])
        for name, r in self.program.specials.items():
            k = self.program.home[r]
            value = values[name]() if name in values else one(0)
            base[r] = (
                (
                    np.asarray(value).astype(np.int64)
                    & (2 ** (8 * int(k[1])) - 1 if k[1] != "8" else -1)
                )
                .astype("u" + k[1])
                .view(k)
            )
        self.base = base

    # --- errors ----------------------------------------------------------------------------

    def location(self, op: Op | None, thread: int | None = None) -> dict[str, object]:
        where: dict[str, object] = {"kernel": self.program.kernel.name}
        if op is not None:
            where["ptx"] = f"line {op.instr.line}: {op.instr.text}"
            where["source"] = self.source(op.instr)
        if thread is not None:
            where["block"] = self.block_index(thread // self.width)
            where["thread"] = self.thread_index(thread % self.width)
        return where

    def source(self, instr) -> str:
        files = self.program.kernel.module.files
        return " inlined at ".join(f"{files.get(file, '?')}:{line}" for file, line in instr.source)

    def block_index(self, cta: int) -> tuple[int, int, int]:
        c = int(cta) + self.first_cta
        gx, gy, _ = self.grid
        return c % gx, c // gx % gy, c // (gx * gy)

    def thread_index(self, tid: int) -> tuple[int, int, int]:
        bx, by, _ = self.block_dim
        tid = int(tid)
        return tid % bx, tid // bx % by, tid // (bx * by)

    def fail(
        self, kind: type, message: str, op: Op | None, thread: int | None, address=None
    ) -> None:
        where = self.location(op, thread)
        if address is not None:
            where["address"] = hex(int(address))
        raise kind(message, **where)

    def unknown(self, op: Op, why: str) -> None:
        message = "instruction not implemented" + (f" ({why})" if why else "")
        self.fail(UnknownInstruction, message, op, int(self.active.threads[0]))

    def trap(self, op: Op, mask) -> None:
        _, threads = self.lanes(mask)
        if len(threads):
            self.fail(LaunchError, "trap", op, int(threads[0]))

    def clock(self, k: str) -> np.ndarray:
        self.ticks += 64
        return np.array([self.ticks & 0xFFFFFFFF if k == "u4" else self.ticks], k)

    # --- lanes -----------------------------------------------------------------------------

    def lanes(self, mask: np.ndarray | None) -> tuple[np.ndarray | None, np.ndarray]:
        """(positions within the arrays or None for all, thread slots) under a guard."""
        a = self.active
        if mask is not None and mask.size == 1 and a.width != 1:
            if not mask[0]:
                return _EMPTY, _EMPTY
            mask = None
        if a.idx is None:
            if mask is None:
                mask = a.live
            elif a.live is not None:
                mask = mask & a.live
            if mask is None:
                return None, self.everyone
            pos = np.flatnonzero(mask)
            return pos, pos
        if mask is None:
            return None, a.idx
        pos = np.flatnonzero(mask)
        return pos, a.idx[pos]

    def pick(self, x: np.ndarray, pos: np.ndarray | None, n: int) -> np.ndarray:
        """Operand x for the chosen lanes."""
        if x.size == 1:
            return x if n == 1 else np.repeat(x, n)
        return x if pos is None else x[pos]

    def spread(self, values: np.ndarray, pos: np.ndarray | None) -> np.ndarray:
        """Results of the chosen lanes at full width."""
        if pos is None:
            return values
        out = np.zeros(self.active.width, values.dtype)
        out[pos] = values
        return out

    def to_warps(self, x: np.ndarray) -> np.ndarray:
        warps, slot, _ = self.active.layout
        if slot is None:
            if x.size == 1:
                x = np.repeat(x, len(warps) * 32)
            return x.reshape(-1, 32)
        out = np.zeros(len(warps) * 32, x.dtype)
        out[slot] = x
        return out.reshape(-1, 32)

    def from_warps(self, x: np.ndarray) -> np.ndarray:
        slot = self.active.layout[1]
        return x.reshape(-1) if slot is None else x.reshape(-1)[slot]

    def present(self, mask: np.ndarray | None) -> np.ndarray | None:
        """[W, 32] lanes that take part, None for all."""
        present = self.active.layout[2]
        if mask is not None:
            guard = self.to_warps(mask)
            present = guard if present is None else present & guard
        return present

    # --- counters --------------------------------------------------------------------------

    def line(self, op: Op, space: str) -> LineCounts:
        key = op.instr.line
        counts = self.report.lines.get(key)
        if counts is None:
            counts = LineCounts(key, op.instr.text, self.source(op.instr), space)
            self.report.lines[key] = counts
        return counts

    def _count_global(
        self, op: Op, kind: str, region: int, a: np.ndarray, threads: np.ndarray, size: int
    ) -> None:
        warp = threads >> 5
        # One key per warp and sector; accesses are in thread order, so mostly sorted already.
        key = (warp << 42) | (a >> np.uint64(5)).view(np.int64)
        if len(key) > 1:
            step = key[1:] - key[:-1]
            if step.min() < 0:
                key.sort()
                step = key[1:] - key[:-1]
            sectors = 1 + int(np.count_nonzero(step))
            requests = 1 + int(np.count_nonzero(warp[1:] != warp[:-1]))
        else:
            sectors = requests = len(key)
        counts = self.line(op, "global")
        nbytes = len(a) * size
        counts.requests += requests
        counts.bytes += nbytes
        counts.sectors += sectors
        if requests * 32 == len(a):
            counts.ideal_sectors += requests * size
        else:
            per_warp = np.bincount(np.cumsum(np.concatenate(([0], warp[1:] != warp[:-1]))))
            counts.ideal_sectors += int(((per_warp * size + 31) // 32).sum())
        buffer = self.buffer(region)
        if kind == "load":
            buffer.loaded_bytes += nbytes
            buffer.load_sectors += sectors
        elif kind == "store":
            buffer.stored_bytes += nbytes
            buffer.store_sectors += sectors
        else:
            buffer.atomic_bytes += nbytes

    def buffer(self, region: int) -> BufferCounts:
        name = self.memory.regions[region].name
        counts = self.report.buffers.get(name)
        if counts is None:
            counts = self.report.buffers[name] = BufferCounts()
        return counts

    def _count_shared(self, op: Op, address: np.ndarray, threads: np.ndarray, size: int) -> None:
        """Wavefronts: per group of lanes that is served together, the worst bank's words."""
        group = 32 if size <= 4 else 16 if size == 8 else 8
        gid = threads // group
        change = np.concatenate(([True], gid[1:] != gid[:-1]))
        starts = np.flatnonzero(change)
        words = address >> 2
        if len(starts) * group == len(threads):
            grid = words.reshape(-1, group)
        else:
            grid = np.repeat(words[starts], group).reshape(-1, group)
            grid[np.cumsum(change) - 1, threads % group] = words
        counts = self.line(op, "shared")
        counts.requests += 1 + int(np.count_nonzero(threads[1:] >> 5 != threads[:-1] >> 5))
        counts.bytes += len(threads) * size
        counts.ideal_wavefronts += len(grid)
        # A pattern's wavefronts do not depend on where it starts, and loops repeat patterns.
        relative = (grid - grid[:, :1]).astype(np.int32)
        key = (hash(relative.tobytes()), relative.shape, size)
        waves = self.program.patterns.get(key)
        if waves is None:
            waves = self.program.patterns[key] = _wavefronts(relative, size)
        counts.wavefronts += waves

    # --- global ----------------------------------------------------------------------------

    def _global(
        self, op: Op, kind: str, a: np.ndarray, threads: np.ndarray, size: int, excuse=None
    ):
        """Checks, records and counts one access per lane. Returns lost writes, if any."""
        low = np.uint64(size - 1)
        if np.bitwise_or.reduce(a) & low:
            bad = int(np.flatnonzero(a & low)[0])
            self.fail(Misaligned, f"{kind} of {size} bytes is misaligned", op, threads[bad], a[bad])
        region, several = self.memory.locate(a, size)
        if several is None:
            return self._global_region(op, kind, region, a, threads, size, excuse)
        bad = several < 0
        if bad.any():
            i = int(np.flatnonzero(bad)[0])
            self.fail(
                OutOfBounds,
                f"{kind} of {size} bytes outside every buffer{self._near(int(a[i]))}",
                op, threads[i], a[i],
            )  # fmt: skip
        lost_all = []
        for r in np.flatnonzero(np.bincount(several)).tolist():
            at = np.flatnonzero(several == r)
            part = None if excuse is None else (lambda i, at=at: excuse(at[i]))
            lost = self._global_region(op, kind, r, a[at], threads[at], size, part)
            if lost is not None:
                lost_all.append(at[lost])
        return np.concatenate(lost_all) if lost_all else None

    def _near(self, address: int) -> str:
        best = min(
            self.memory.regions,
            key=lambda r: max(r.start - address, address - r.end),
            default=None,
        )
        if best is None:
            return " (no buffer is registered)"
        if address >= best.end or address + 1 > best.end:
            return f" ({address - best.end} bytes past the end of {best.name})"
        if address < best.start:
            return f" ({best.start - address} bytes before {best.name})"
        return f" (across the end of {best.name})"

    def _global_region(self, op, kind, region, a, threads, size, excuse):
        r = self.memory.regions[region]
        if kind != "load" and not r.writable:
            self.fail(OutOfBounds, f"{kind} to read-only {r.name}", op, threads[0], a[0])
        lost = None
        if self.globals is not None:
            cta = self.cta_of[threads] + self.first_cta
            try:
                lost = self.globals.region(region, r).access(
                    self.globals,
                    kind,
                    a,
                    size,
                    cta,
                    op.strong or kind == "atomic",
                    excuse,
                    op.noncoherent,
                )
            except Found as found:
                self.fail(
                    found.kind,
                    f"{found.message} ({r.name})",
                    op,
                    threads[found.lane],
                    a[found.lane],
                )
        if self.checks.counters:
            self._count_global(op, kind, region, a, threads, size)
        return lost

    def _strong(self, op: Op, threads: np.ndarray, release: bool) -> None:
        if self.globals is not None:
            ctas = self.cta_of[threads]
            ctas = ctas[np.concatenate(([True], ctas[1:] != ctas[:-1]))] + self.first_cta
            self.globals.strong(ctas, release)

    def fence(self, mask) -> None:
        if self.globals is not None:
            _, threads = self.lanes(mask)
            if len(threads):
                ctas = self.cta_of[threads]
                ctas = ctas[np.concatenate(([True], ctas[1:] != ctas[:-1]))]
                self.globals.fence(ctas + self.first_cta)

    # --- shared ----------------------------------------------------------------------------

    def _flat_shared(
        self, op: Op, kind: str, address: np.ndarray, threads: np.ndarray, size: int
    ) -> np.ndarray:
        """Checked positions in the wave's shared memory."""
        address = address.astype(np.int64)
        if np.bitwise_or.reduce(address) & (size - 1):
            bad = int(np.flatnonzero(address & (size - 1))[0])
            self.fail(
                Misaligned,
                f"shared {kind} of {size} bytes is misaligned",
                op,
                threads[bad],
                address[bad],
            )
        if address.min() < SHARED_BASE or address.max() + size > SHARED_BASE + self.smem:
            bad = int(
                np.flatnonzero(
                    (address < SHARED_BASE) | (address + size > SHARED_BASE + self.smem)
                )[0]
            )
            self.fail(
                OutOfBounds,
                f"shared {kind} of {size} bytes outside the {self.smem} bytes of this CTA "
                f"(offset {int(address[bad]) - SHARED_BASE})",
                op, threads[bad], address[bad],
            )  # fmt: skip
        if self.checks.counters:
            self._count_shared(op, address, threads, size)
        return address + (
            self.cta_shared[0] if self.ctas == 1 else
            self.cta_shared if threads is self.everyone else self.cta_shared[threads]
        )  # fmt: skip

    def _where(self, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if threads is self.everyone:
            return self.tid_of, self.cta_of
        return self.tid_of[threads], self.cta_of[threads]

    def _shadowed(self, op: Op, method: str, flat: np.ndarray, threads: np.ndarray, *args):
        try:
            return getattr(self.shadow, method)(flat, *args)
        except Found as found:
            t = threads[found.lane]
            address = flat[found.lane] - self.cta_shared[t]
            self.fail(found.kind, found.message, op, t, address)

    def _read(self, flat: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        view = self._shared_views[size]
        index = flat >> (size.bit_length() - 1)
        if count == 1:
            return [view[index]]
        rows = view.reshape(-1, count)[index // count]
        return list(np.ascontiguousarray(rows.T))

    # --- ld, st ----------------------------------------------------------------------------

    def _space(self, op: Op, a: np.ndarray) -> str | None:
        """Space of generic addresses, None where they differ."""
        if op.space != "generic":
            return op.space
        high = int(a.max()) >> 56, int(a.min()) >> 56
        spaces = [
            "global" if h == 0 else "shared" if h == 1 else "local" if h == 2 else "param"
            for h in high
        ]
        return spaces[0] if spaces[0] == spaces[1] else None

    def load(self, op: Op, address: np.ndarray, mask) -> list[np.ndarray]:
        pos, threads = self.lanes(mask)
        n = len(threads)
        if n == 0:
            return [np.zeros(self.active.width, f"u{op.size}")] * op.count
        a = self.pick(address, pos, n)
        space = self._space(op, a)
        if space is None:
            values = self._mixed(op, a, threads, None)
        else:
            if op.space == "generic" and space in _WINDOWS:
                a = a - np.uint64(_WINDOWS[space])
            values = self._load(op, space, a, threads)
        return values if pos is None else [self.spread(v, pos) for v in values]

    def _load(self, op: Op, space: str, a: np.ndarray, threads: np.ndarray) -> list[np.ndarray]:
        size, count = op.size, op.count
        total = size * count
        if space in ("global", "const"):
            self._global(op, "load", a, threads, total)
            if op.strong:
                self._strong(op, threads, False)
            if count == 1:
                return [read_host(a, size)]
            if total > 8:
                wide = [read_host(a + np.uint64(8 * i), 8) for i in range(total // 8)]
                per = 8 // size
                return [
                    (w >> np.uint64(8 * size * j)).astype(f"u{size}") if per > 1 else w
                    for w in wide for j in range(per)
                ]  # fmt: skip
            return [read_host(a + np.uint64(size * i), size) for i in range(count)]
        if space == "shared":
            flat = self._flat_shared(op, "load", a, threads, total)
            if self.shadow is not None:
                self._shadowed(op, "load", flat, threads, total, self._where(threads), op.strong)
            return self._read(flat, size, count)
        if space == "local":
            flat = self._flat_local(op, "load", a, threads, total)
            view = self.local.view(f"u{size}")
            return [view[(flat >> (size.bit_length() - 1)) + i] for i in range(count)]
        if space == "param":
            offset = a.astype(np.int64)
            if offset.min() < 0 or offset.max() + total > len(self.args):
                self.fail(OutOfBounds, "load outside the kernel's parameters", op, threads[0], a[0])
            view = self.args[: len(self.args) // size * size].view(f"u{size}")
            return [view[offset // size + i] for i in range(count)]
        self.unknown(op, f"load from .{space}")
        return []

    def _flat_local(
        self, op: Op, kind: str, a: np.ndarray, threads: np.ndarray, size: int
    ) -> np.ndarray:
        offset = a.astype(np.int64)
        if np.bitwise_or.reduce(offset) & (size - 1):
            self.fail(
                Misaligned, f"local {kind} of {size} bytes is misaligned", op, threads[0], a[0]
            )
        if offset.min() < 0 or offset.max() + size > self.program.local_size:
            bad = int(np.flatnonzero((offset < 0) | (offset + size > self.program.local_size))[0])
            self.fail(OutOfBounds, f"local {kind} outside local memory", op, threads[bad], a[bad])
        return offset + threads * self.local_stride

    def _mixed(self, op: Op, a: np.ndarray, threads: np.ndarray, values):
        """A generic access whose lanes lie in different spaces: one space after the other."""
        kinds = (a >> np.uint64(56)).astype(np.int64)
        out = [np.zeros(len(a), f"u{op.size}") for _ in range(op.count)]
        for bit, space in ((0, "global"), (1, "shared"), (2, "local"), (4, "param")):
            at = np.flatnonzero(kinds == bit)
            if len(at):
                part = a[at] - np.uint64(_WINDOWS.get(space, 0))
                if values is None:
                    for o, v in zip(out, self._load(op, space, part, threads[at])):
                        o[at] = v
                else:
                    self._store(op, space, part, threads[at], [v[at] for v in values])
        return out

    def store(self, op: Op, address: np.ndarray, mask, values: tuple[np.ndarray, ...]) -> None:
        pos, threads = self.lanes(mask)
        n = len(threads)
        if n == 0:
            return
        a = self.pick(address, pos, n)
        chosen = [self.pick(v, pos, n) for v in values]
        space = self._space(op, a)
        if space is None:
            self._mixed(op, a, threads, chosen)
            return
        if op.space == "generic" and space in _WINDOWS:
            a = a - np.uint64(_WINDOWS[space])
        self._store(op, space, a, threads, chosen)

    def _store(self, op: Op, space: str, a: np.ndarray, threads: np.ndarray, values) -> None:
        size, count = op.size, op.count
        total = size * count
        shift = size.bit_length() - 1
        if space == "global":

            def same(at: np.ndarray) -> np.ndarray:
                ok = np.ones(len(at), bool)
                for i, v in enumerate(values):
                    ok &= read_host(a[at] + np.uint64(size * i), size) == v[at]
                return ok

            lost = self._global(op, "store", a, threads, total, same)
            if op.strong:
                self._strong(op, threads, op.release)
            for i, v in enumerate(values):
                write_host(a + np.uint64(size * i), size, v)
            if lost is not None and not (ok := same(lost)).all():
                bad = lost[np.flatnonzero(~ok)[0]]
                self.fail(
                    GlobalRace,
                    "global memory race: CTAs write different values to the same bytes unordered",
                    op, threads[bad], a[bad],
                )  # fmt: skip
        elif space == "shared":
            flat = self._flat_shared(op, "store", a, threads, total)
            view = self._shared_views[size]
            index = flat >> shift

            def same_shared(at: np.ndarray) -> np.ndarray:
                ok = np.ones(len(at), bool)
                for i, v in enumerate(values):
                    ok &= view[index[at] + i] == v[at]
                return ok

            lost = None
            if self.shadow is not None:
                lost = self._shadowed(
                    op, "store", flat, threads, total, self._where(threads), op.strong, same_shared
                )
            if count == 1:
                view[index] = values[0]
            else:
                view.reshape(-1, count)[index // count] = np.stack(values, 1)
            if lost is not None and not (ok := same_shared(lost)).all():
                bad = lost[np.flatnonzero(~ok)[0]]
                self.fail(
                    SharedRace,
                    "shared memory race: threads write different values to the same bytes in one "
                    "instruction",
                    op, threads[bad], a[bad],
                )  # fmt: skip
        elif space == "local":
            flat = self._flat_local(op, "store", a, threads, total)
            view = self.local.view(f"u{size}")
            for i, v in enumerate(values):
                view[(flat >> shift) + i] = v
        else:
            self.unknown(op, f"store to .{space}")

    # --- atomics ---------------------------------------------------------------------------

    def atomic(
        self, op: Op, address: np.ndarray, mask, elements: tuple, want: bool
    ) -> list[np.ndarray]:
        pos, threads = self.lanes(mask)
        n = len(threads)
        dtype = f"u{op.size}"
        if n == 0:
            return [np.zeros(self.active.width, dtype)] * len(elements)
        a = self.pick(address, pos, n)
        space = self._space(op, a)
        if space is None:
            self.unknown(op, "atomic on mixed address spaces")
        if op.space == "generic" and space in _WINDOWS:
            a = a - np.uint64(_WINDOWS[space])
        total = op.size * len(elements)
        order = None
        if self.rng is not None:
            order = self.rng.permutation(n)
        if space == "shared":
            flat = self._flat_shared(op, "atomic", a, threads, total)
            if self.shadow is not None:
                self._shadowed(op, "update", flat, threads, total, self._where(threads))
            view = self._shared_views[op.size]
            key = flat >> (op.size.bit_length() - 1)
            read, write = view.__getitem__, view.__setitem__
        elif space == "global":
            self._global(op, "atomic", a, threads, total)
            self._strong(op, threads, op.release)
            key = a.view(np.int64) >> (op.size.bit_length() - 1)
            size = op.size
            read = lambda i: read_host((i * size).view(U8), size)  # noqa: E731
            write = lambda i, v: write_host((i * size).view(U8), size, v)  # noqa: E731
        else:
            self.unknown(op, f"atomic on .{space}")
        out = []
        for i, values in enumerate(elements):
            operands = [self.pick(v, pos, n) for v in values]
            old = _atomic(op.extra, key + i, operands, read, write, order)
            out.append(self.spread(old, pos))
        return out if want else []

    # --- cp.async --------------------------------------------------------------------------

    def cp_async(self, op: Op, dst: np.ndarray, src: np.ndarray, source_size, mask) -> None:
        pos, threads = self.lanes(mask)
        n = len(threads)
        if n == 0:
            return
        size = op.size
        d = self.pick(dst, pos, n)
        if op.space == "shared" and int(d.max()) >= SHARED_WINDOW:
            d = d - np.uint64(SHARED_WINDOW)
        s = self.pick(src, pos, n)
        copy = Op(op.instr, "global", size, klass="load")
        low = np.uint64(size - 1)
        if np.bitwise_or.reduce(s) & low:
            bad = int(np.flatnonzero(s & low)[0])
            self.fail(
                Misaligned, f"cp.async source is not {size}-byte aligned", op, threads[bad], s[bad]
            )
        step = min(size, 8)
        data = np.zeros((n, size // step), f"u{step}")
        lengths = np.full(1, size) if source_size is None else self.pick(source_size, pos, n)
        # Bytes beyond the source size are not read, so whole, partial and empty copies differ.
        for length in np.unique(np.minimum(lengths, size)).tolist():
            some = length < size or not (lengths >= size).all()
            at = np.flatnonzero(np.minimum(lengths, size) == length) if some else slice(None)
            a, t = s[at], threads[at]
            if length == size:
                self._global(copy, "load", a, t, size)
                for i in range(size // step):
                    data[at, i] = read_host(a + np.uint64(step * i), step)
            else:
                unit = 4 if length % 4 == 0 else 2 if length % 2 == 0 else 1
                part = np.zeros((len(a), size), U1)
                for i in range(0, length, unit):
                    self._global(copy, "load", a + np.uint64(i), t, unit)
                    part[:, i : i + unit] = (
                        read_host(a + np.uint64(i), unit).view(U1).reshape(-1, unit)
                    )
                data[at] = part.view(data.dtype)
        flat = self._flat_shared(op, "cp.async", d, threads, size)
        if self.shadow is not None:
            lost = self._shadowed(
                op, "store", flat, threads, size, self._where(threads), False, None, True
            )
            if lost is not None:
                self.fail(
                    SharedRace,
                    "shared memory race: two cp.async of one instruction write the same bytes",
                    op, threads[lost[0]], d[lost[0]],
                )  # fmt: skip
        self.copies.append([threads, flat, data, size, self.committed[threads]])

    def cp_commit(self, mask) -> None:
        self.committed[self.lanes(mask)[1]] += 1

    def cp_wait(self, keep: int, mask) -> None:
        """Lands every copy of these threads but those of the last `keep` groups (-1: all)."""
        if not self.copies:
            return
        _, threads = self.lanes(mask)
        limit = np.full(self.slots, -1, np.int64)
        limit[threads] = np.iinfo(np.int64).max if keep < 0 else self.committed[threads] - keep
        self._land(limit)

    def _land(self, limit: np.ndarray) -> None:
        rest = []
        for copy in self.copies:
            threads, flat, data, size, group = copy
            ready = group < limit[threads]
            if not ready.any():
                rest.append(copy)
                continue
            if not ready.all():
                wait = ~ready
                rest.append([threads[wait], flat[wait], data[wait], size, group[wait]])
                threads, flat, data = threads[ready], flat[ready], data[ready]
            step = min(size, 8)
            view = self._shared_views[step]
            for i in range(size // step):
                view[flat // step + i] = data[:, i]
            if self.shadow is not None:
                self.shadow.landed(flat, size, self.tid_of[threads])
        self.copies = rest
        if not rest and self.shadow is not None:
            self.shadow.settle()

    def cp_mbarrier_arrive(self, op: Op, address: np.ndarray, mask, noinc: bool) -> None:
        # The copies land here rather than at some later time: whoever does not wait on the
        # mbarrier is found by the race check, because it did not learn of them.
        self.cp_wait(-1, mask)
        if not noinc:
            self._mbar_pending(op, address, mask, 1)
        self.mbar_update(op, "arrive", address, None, None, False, mask)

    # --- mbarrier --------------------------------------------------------------------------
    # The 64-bit object: bits 0-19 pending arrivals, 20-39 expected arrivals, 40-61 pending
    # transaction bytes (biased), 63 phase.

    _TX_BIAS = 1 << 20

    def _mbar_flat(self, op: Op, address: np.ndarray, mask) -> tuple:
        pos, threads = self.lanes(mask)
        n = len(threads)
        if n == 0:
            return pos, threads, _EMPTY
        a = self.pick(address, pos, n)
        if int(a.max()) >= SHARED_WINDOW:
            a = a - np.uint64(SHARED_WINDOW)
        return pos, threads, self._flat_shared(op, "mbarrier", a, threads, 8)

    def _mbar_pending(self, op: Op, address: np.ndarray, mask, by: int) -> None:
        _, _, flat = self._mbar_flat(op, address, mask)
        view = self._shared_views[8]
        np.add.at(view, flat >> 3, np.uint64(by))

    def mbar_update(
        self, op: Op, kind: str, address, count, tx, drop: bool, mask
    ) -> list[np.ndarray]:
        pos, threads, flat = self._mbar_flat(op, address, mask)
        n = len(threads)
        if n == 0:
            return [np.zeros(self.active.width, U8)]
        index = flat >> 3
        view = self._shared_views[8]
        counts = (
            np.ones(n, np.int64) if count is None else self.pick(count, pos, n).astype(np.int64)
        )
        txs = np.zeros(n, np.int64) if tx is None else self.pick(tx, pos, n).astype(np.int64)
        if kind == "init":
            c = counts.astype(U8)
            view[index] = c | (c << U8.type(20)) | U8.type(self._TX_BIAS << 40)
            if self.shadow is not None:
                self.shadow.landed(flat, 8, self.tid_of[threads])
            for f in flat.tolist():
                self.mbar_known.pop(f, None)
            return []
        if kind == "inval":
            view[index] = 0
            return []
        states = np.empty(n, U8)
        know = None
        if kind == "arrive" and self.shadow is not None:
            know = self.shadow.publish(threads >> 5)
        keys = index.tolist()
        for i, key in enumerate(keys):
            word = int(view[key])
            states[i] = word
            pending, expected = word & 0xFFFFF, (word >> 20) & 0xFFFFF
            left, phase = ((word >> 40) & 0x3FFFFF) - self._TX_BIAS, word >> 63
            if expected == 0:
                self.fail(BarrierError, "mbarrier is not initialised", op, threads[i], flat[i])
            if kind in ("arrive", "expect_tx"):
                left += int(txs[i])
            elif kind == "complete_tx":
                left -= int(txs[i])
            if kind == "arrive":
                if counts[i] > pending:
                    self.fail(
                        BarrierError, "mbarrier arrivals exceed the expected count", op, threads[i]
                    )
                pending -= int(counts[i])
                if drop:
                    expected -= int(counts[i])
                if know is not None:
                    f = int(flat[i])
                    slot = self.mbar_known.setdefault(f, np.zeros((2, self.facts), np.int32))
                    np.maximum(slot[0], know[i], out=slot[0])
            if pending == 0 and left == 0:
                phase ^= 1
                pending = expected
                self.woken = True
                slot = self.mbar_known.get(int(flat[i]))
                if slot is not None:
                    slot[1] = np.maximum(slot[1], slot[0])
            view[key] = pending | expected << 20 | (left + self._TX_BIAS) << 40 | phase << 63
        return [self.spread(states, pos)]

    def mbar_test(self, op: Op, address, arg, parity: bool, mask) -> list[np.ndarray]:
        """Whether the phase given by parity or state has completed; success orders memory."""
        pos, threads, flat = self._mbar_flat(op, address, mask)
        n = len(threads)
        if n == 0:
            return [np.zeros(self.active.width, bool)]
        phase = (self._shared_views[8][flat >> 3] >> np.uint64(63)).astype(U8)
        wanted = self.pick(arg, pos, n)
        wanted = (wanted & wanted.dtype.type(1)) if parity else wanted >> U8.type(63)
        done = phase != wanted.astype(U8)
        if self.shadow is not None and done.any():
            at = np.flatnonzero(done)
            warps = threads[at] >> 5
            keep = np.flatnonzero(np.concatenate(([True], warps[1:] != warps[:-1])))
            rows = np.zeros((len(keep), self.facts), np.int32)
            for j, i in enumerate(at[keep].tolist()):
                slot = self.mbar_known.get(int(flat[i]))
                if slot is not None:
                    rows[j] = slot[1]
            self.shadow.learn(warps[keep], rows)
        return [self.spread(done, pos)]

    def mbar_pending(self, state: np.ndarray) -> list[np.ndarray]:
        return [(state & U8.type(0xFFFFF)).astype(U4)]

    # --- warp-level ------------------------------------------------------------------------

    def warp_sync(self) -> None:
        if self.shadow is not None:
            warps, _, present = self.active.layout
            whole = self.active.idx is None and present is None
            # A sync of part of a warp orders only that part; treating it as all of it would
            # hide races, but groups of lanes rarely share data without the rest.
            self.shadow.warp_sync(None if whole else warps)

    def shfl(self, mode: str, a, b, c, mask) -> tuple[np.ndarray, np.ndarray]:
        uniform = b.size == 1 and c.size == 1
        if uniform:
            delta, control = b.astype(np.int64) & 31, c.astype(np.int64)
        else:
            delta, control = (
                self.to_warps(b).astype(np.int64) & 31,
                self.to_warps(c).astype(np.int64),
            )
        clamp, segment = control & 31, (control >> 8) & 31
        low = _LANES & segment
        high = low | (clamp & ~segment & 31)
        if mode == "up":
            j = _LANES - delta
            valid = j >= high
        elif mode == "down":
            j = _LANES + delta
            valid = j <= high
        elif mode == "bfly":
            j = _LANES ^ delta
            valid = j <= high
        else:
            j = low | (delta & ~segment & 31)
            valid = j <= high
        j = np.where(valid, j, _LANES)
        values = self.to_warps(a)
        if uniform:
            out = values.take(j, 1)
            valid = np.broadcast_to(valid, values.shape)
        else:
            out = np.take_along_axis(values, j, 1)
        return self.from_warps(out), self.from_warps(valid)

    def vote(self, mode: str, p, member, mask) -> list[np.ndarray]:
        values = self.to_warps(p)
        present = self.present(mask)
        if member is not None and not (member.size == 1 and member[0] == 0xFFFFFFFF):
            members = self._member_lanes(member)
            present = members if present is None else present & members
        rows = len(values)
        if mode == "ballot":
            hit = values if present is None else values & present
            out = (hit * _BITS).sum(1, dtype=U4)
            if present is not None and member is not None and member.size > 1:
                return [self._grouped(member, hit)]
        elif mode == "any":
            out = (values if present is None else values & present).any(1)
        elif mode == "all":
            out = (values if present is None else values | ~present).all(1)
        else:
            every = (values if present is None else values | ~present).all(1)
            some = (values if present is None else values & present).any(1)
            out = every | ~some
        if member is not None and member.size > 1 and mode != "ballot":
            return [self._grouped_bool(member, values, mode)]
        return [self.from_warps(np.repeat(out, 32).reshape(rows, 32))]

    def _member_lanes(self, member: np.ndarray) -> np.ndarray:
        """[W, 32] whether each lane is in its own member mask."""
        return (self.to_warps(member) & _BITS) != 0

    def _bits(self, lanes: np.ndarray) -> np.ndarray:
        return (lanes * _BITS).sum(1, dtype=U4)

    def _grouped(self, member: np.ndarray, hit: np.ndarray) -> np.ndarray:
        """Ballot where lanes of one warp may belong to different groups."""
        return self.from_warps(self._bits(hit)[:, None] & self.to_warps(member))

    def _grouped_bool(self, member: np.ndarray, values: np.ndarray, mode: str) -> np.ndarray:
        member_w = self.to_warps(member)
        ones = self._bits(values)[:, None] & member_w
        present = self.present(None)
        if present is not None:
            member_w = member_w & self._bits(present)[:, None]
            ones = ones & member_w
        if mode == "any":
            return self.from_warps(ones != 0)
        if mode == "all":
            return self.from_warps(ones == member_w)
        return self.from_warps((ones == member_w) | (ones == 0))

    def match(self, mode: str, a, member, mask) -> tuple[np.ndarray, np.ndarray]:
        values, members = (
            self.to_warps(a),
            self.to_warps(
                np.broadcast_to(member, (self.active.width,)) if member.size == 1 else member
            ),
        )
        present = self.present(mask)
        equal = values[:, :, None] == values[:, None, :]
        if present is not None:
            equal &= present[:, None, :]
        same = (equal * _BITS).sum(2, dtype=U4) & members
        if mode == "any":
            return self.from_warps(same), self.from_warps(same != 0)
        full = members if present is None else members & self._bits(present)[:, None]
        every = same == full
        return self.from_warps(np.where(every, full, U4.type(0))), self.from_warps(every)

    def redux(self, action: str, a, member, nan: bool, absolute: bool, mask) -> list[np.ndarray]:
        values = self.to_warps(a)
        present = self.present(mask)
        members = None
        if not (member.size == 1 and member[0] == 0xFFFFFFFF):
            members = self.to_warps(
                np.repeat(member, self.active.width) if member.size == 1 else member
            )
        if absolute:
            values = np.abs(values)
        fn = {
            "add": np.add, "min": np.minimum, "max": np.maximum,
            "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
        }[action]  # fmt: skip
        if values.dtype == F4 and not nan:
            fn = np.fmin if action == "min" else np.fmax
        if present is None and members is None:
            out = fn.reduce(values, axis=1, dtype=values.dtype)
            return [self.from_warps(np.repeat(out, 32).reshape(-1, 32))]
        lanes = np.ones(values.shape, bool) if present is None else present
        rows = np.zeros_like(values)
        if members is None:
            members = np.full(values.shape, 0xFFFFFFFF, U4)
        for w in range(len(values)):
            for m in set(members[w][lanes[w]].tolist()):
                pick = lanes[w] & ((m & _BITS) != 0)
                rows[w][pick & (members[w] == m)] = fn.reduce(values[w][pick])
        return [self.from_warps(rows)]

    def activemask(self, mask) -> list[np.ndarray]:
        present = self.present(mask)
        if present is None:
            return [np.array([0xFFFFFFFF], U4)]
        return [self.from_warps(np.repeat(self._bits(present), 32).reshape(-1, 32))]

    def elect(self, member, mask) -> tuple[np.ndarray, np.ndarray]:
        present = self.present(mask)
        rows = len(self.active.layout[0])
        lanes = np.ones((rows, 32), bool) if present is None else present
        lanes = lanes & (
            (
                self.to_warps(np.repeat(member, self.active.width) if member.size == 1 else member)
                & _BITS
            )
            != 0
        )
        leader = lanes.argmax(1)
        first = np.repeat(leader.astype(U4), 32).reshape(-1, 32)
        return self.from_warps(first), self.from_warps(leader[:, None] == _LANES)

    # --- matrices --------------------------------------------------------------------------

    def _stack(self, regs: tuple) -> np.ndarray:
        return np.stack([self.to_warps(r) for r in regs], 1)

    def mma(self, plan, a: tuple, b: tuple, c: tuple) -> list[np.ndarray]:
        present = self.active.layout[2]
        self.report.mma += (
            len(self.active.layout[0]) if present is None else int(present.any(1).sum())
        )
        out = matrix.mma(plan, self._stack(a), self._stack(b), self._stack(c))
        return [self.from_warps(np.ascontiguousarray(out[:, i])) for i in range(out.shape[1])]

    def _row_lanes(
        self, address: np.ndarray, count: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row addresses of 8 * count lanes per warp, their threads, and the warps that count."""
        warps, _, present = self.active.layout
        rows = self.to_warps(address)[:, : 8 * count]
        threads = (warps * 32)[:, None] + np.arange(8 * count)
        use = np.ones(len(warps), bool) if present is None else present.any(1)
        return rows[use].reshape(-1), threads[use].reshape(-1), use

    def ldmatrix(self, op: Op, address: np.ndarray, count: int, trans: bool) -> list[np.ndarray]:
        a, threads, use = self._row_lanes(address, count)
        if len(a) and int(a.max()) >= SHARED_WINDOW:
            a = a - np.uint64(SHARED_WINDOW)
        flat = self._flat_shared(op, "ldmatrix", a, threads, 16)
        if self.shadow is not None:
            self._shadowed(op, "load", flat, threads, 16, self._where(threads), False)
        rows = self._shared_views[8].reshape(-1, 2)[flat >> 4]  # [W * count * 8, 2]
        if trans:
            m = rows.view(U2).reshape(-1, count, 8, 8).swapaxes(2, 3)
            words = np.ascontiguousarray(m).view(U4).reshape(-1, count, 32)
        else:
            words = rows.view(U4).reshape(-1, count, 32)
        if not use.all():
            full = np.zeros((len(use), count, 32), U4)
            full[use] = words
            words = full
        return [self.from_warps(np.ascontiguousarray(words[:, i])) for i in range(count)]

    def stmatrix(self, op: Op, address: np.ndarray, values: tuple, trans: bool) -> None:
        count = len(values)
        a, threads, use = self._row_lanes(address, count)
        if len(a) and int(a.max()) >= SHARED_WINDOW:
            a = a - np.uint64(SHARED_WINDOW)
        words = np.ascontiguousarray(self._stack(values)[use])
        if trans:
            m = words.view(U2).reshape(-1, count, 8, 8).swapaxes(2, 3)
            words = np.ascontiguousarray(m).view(U4)
        flat = self._flat_shared(op, "stmatrix", a, threads, 16)
        if self.shadow is not None:
            self._shadowed(op, "store", flat, threads, 16, self._where(threads), False, None)
        self._shared_views[8].reshape(-1, 2)[flat >> 4] = words.reshape(-1).view(U8).reshape(-1, 2)

    def movmatrix(self, a: np.ndarray) -> list[np.ndarray]:
        m = np.ascontiguousarray(self.to_warps(a)).view(U2).reshape(-1, 8, 8).swapaxes(1, 2)
        return [self.from_warps(np.ascontiguousarray(m).view(U4).reshape(-1, 32))]

    # --- wgmma -----------------------------------------------------------------------------
    # The product is formed when it is issued; until it is waited for, its registers and the
    # memory that it reads are watched instead.

    def proxy_fence(self, mask) -> None:
        if self.shadow is not None:
            _, threads = self.lanes(mask)
            if len(threads):
                # A fence by some lanes is taken for one by their warp.
                self.shadow.proxy_fence(np.unique(threads >> 5))

    def _warpgroups(self, op: Op) -> Warpgroups:
        if self.active.warpgroups is None:
            warps, _, present = self.active.layout
            rows = np.arange(len(warps)) if present is None else np.flatnonzero(present.any(1))
            cta, warp = np.divmod(warps[rows], self.warps_per_cta)
            group = cta * -(-self.warps_per_cta // 4) + warp // 4
            lanes = np.full(len(rows), 32) if present is None else present[rows].sum(1)
            short = np.bincount(group, lanes)[group] != 128
            if short.any():
                first = int(warps[rows[np.flatnonzero(short)[0]]]) * 32
                self.fail(BarrierError, "a warpgroup without all of its 128 threads", op, first)
            self.active.warpgroups = Warpgroups(rows, group[::4], cta[::4], warp[::4])
        return self.active.warpgroups

    def wgmma_fence(self, op: Op) -> None:
        groups = self._warpgroups(op).index
        self.wgmma_state.fenced[groups] = True
        for touched in self.wgmma_state.touched.values():
            touched[groups] = _CLEAN

    def wgmma_commit(self, op: Op) -> None:
        self.wgmma_state.committed[self._warpgroups(op).index] += 1

    def wgmma_wait(self, op: Op, keep: int) -> None:
        state = self.wgmma_state
        groups = self._warpgroups(op).index
        limit = np.full(len(state.committed), -1)
        limit[groups] = state.committed[groups] - keep
        flying = []
        for flight in state.flights:
            done = flight.batch < limit[flight.groups.index]
            if self.shadow is not None and done.any():
                for flat in flight.reads:
                    self.shadow.end_matrices(flat[done], flight.groups.warp[done])
            if not done.all():
                flying.append(flight.part(~done))
        state.flights = flying

    def wgmma_touch(self, op: Op, regs: list[int], mask) -> None:
        """Another instruction uses registers of wgmma."""
        _, threads = self.lanes(mask)
        if not len(threads):
            return
        cta, warp = self.cta_of[threads], self.tid_of[threads] >> 5
        groups = cta * -(-self.warps_per_cta // 4) + warp // 4
        state = self.wgmma_state
        for flight in state.flights:
            if not flight.registers.isdisjoint(regs):
                busy = np.isin(groups, flight.groups.index)
                if busy.any():
                    name = self.program.reg_names[min(flight.registers.intersection(regs))]
                    thread = int(threads[np.flatnonzero(busy)[0]])
                    self.fail(SharedRace, f"{name} belongs to a wgmma in flight", op, thread)
        for r in regs:
            state.of(r)[groups] = _TOUCHED

    def wgmma(self, op: Op, plan, d: tuple, a, b, scale) -> list[np.ndarray]:
        groups, state = self._warpgroups(op), self.wgmma_state
        rows = groups.rows
        first = self.active.layout[0][rows[::4]] * 32  # a thread of each group, for messages

        def uniform(x: np.ndarray, what: str) -> np.ndarray:
            values = self.to_warps(x)[rows].reshape(-1, 128)
            differ = (values != values[:, :1]).any(1)
            if differ.any():
                thread = int(first[np.flatnonzero(differ)[0]])
                self.fail(BarrierError, f"{what} differs within a warpgroup", op, thread)
            return values[:, 0]

        self._wgmma_order(op, plan, groups, first)
        reads = []

        def operand(descriptor: np.ndarray, count: int, outer: bool) -> np.ndarray:
            address = matrix.wgmma_pieces(uniform(descriptor, "a descriptor"), count, outer)
            flat = self._matrix_pieces(op, address.reshape(len(first), -1), groups, first)
            reads.append(flat)
            words = self._shared_views[8].reshape(-1, 2)[flat >> 4]
            return matrix.wgmma_operand(
                np.ascontiguousarray(words.reshape(*address.shape, 2)), plan.in_type, outer
            )

        if plan.a:
            left = matrix.wgmma_fragment(self._stack(a)[rows], plan.in_type)
        else:
            left = operand(a, 64, plan.a_outer)
        right = operand(b, plan.n, plan.b_outer)
        keep = uniform(scale, "scale-d")
        out = self._stack(d)
        out[rows] = matrix.wgmma(plan, left, right, out[rows], keep)
        registers = frozenset(plan.d + plan.a)
        state.flights.append(Flight(groups, state.committed[groups.index], registers, reads))
        self.report.mma += len(rows)
        return [self.from_warps(np.ascontiguousarray(out[:, i])) for i in range(out.shape[1])]

    def _matrix_pieces(self, op: Op, address: np.ndarray, groups, first) -> np.ndarray:
        """Checked positions of 16-byte pieces [warpgroups, pieces] in the wave's shared memory."""
        outside = (address < SHARED_BASE) | (address + 16 > SHARED_BASE + self.smem)
        if outside.any():
            i, j = np.argwhere(outside)[0]
            self.fail(
                OutOfBounds,
                f"wgmma reads outside the {self.smem} bytes of this CTA "
                f"(offset {int(address[i, j]) - SHARED_BASE})",
                op, int(first[i]), address[i, j],
            )  # fmt: skip
        flat = address + (groups.cta * self.stride - SHARED_BASE)[:, None]
        if self.shadow is not None:
            try:
                self.shadow.read_matrices(flat, groups.cta, groups.warp)
            except Found as found:
                i, j = divmod(found.lane, address.shape[1])
                self.fail(found.kind, found.message, op, int(first[i]), address[i, j])
        return flat

    def _wgmma_order(self, op: Op, plan, groups: Warpgroups, first: np.ndarray) -> None:
        """wgmma.fence stands between other uses of a register and wgmma's.

        Accumulators that wgmmas of one shape share are ordered without it.
        """
        state = self.wgmma_state

        def need(bad: np.ndarray, why: str) -> None:
            if bad.any():
                thread = int(first[np.flatnonzero(bad)[0]])
                self.fail(SharedRace, f"wgmma without wgmma.fence: {why}", op, thread)

        need(~state.fenced[groups.index], "the warpgroup's first one")
        shape = state.shapes.setdefault((plan.n, plan.in_type, plan.d_type), len(state.shapes) + 1)
        for r in (*plan.d, *plan.a):
            before = state.of(r)[groups.index]
            fine = (before == _CLEAN) | (before == shape) if r in plan.d else before == _CLEAN
            need(~fine, f"{self.program.reg_names[r]} was used otherwise")
        for r in plan.d:
            state.of(r)[groups.index] = shape

    # --- printf, assert --------------------------------------------------------------------

    def _local_word(self, thread: int, offset: int, size: int) -> int:
        at = thread * self.local_stride + offset
        return int(self.local[at : at + size].view(f"u{size}")[0])

    def _string(self, address: int) -> str:
        out = bytearray()
        while len(out) < 4096:
            byte = int(read_host(np.array([address + len(out)], U8), 1)[0])
            if not byte:
                break
            out.append(byte)
        return out.decode(errors="replace")

    def builtin(self, op: Op, name: str, offsets: list[int], result: int | None, mask) -> None:
        _, threads = self.lanes(mask)
        for t in threads.tolist():
            words = [self._local_word(t, o, 8) for o in offsets[:2]]
            if name == "__assertfail":
                where = f"{self._string(words[1])}:{self._local_word(t, offsets[2], 4)}"
                self.fail(
                    LaunchError, f"assertion failed: {self._string(words[0])} at {where}", op, t
                )
            text = self._string(words[0])
            self.report.printed.append(self._format(text, t, words[1]))
            if result is not None:
                at = t * self.local_stride + result
                self.local[at : at + 4].view(U4)[0] = 0

    def _format(self, text: str, thread: int, args: int) -> str:
        import re

        at = (args - LOCAL_WINDOW) if args >= LOCAL_WINDOW else None

        def value(match: re.Match) -> str:
            nonlocal at
            spec = match[0]
            kind = spec[-1]
            if kind == "%" or at is None:
                return "%"
            wide = kind in "fFeEgGaAsp" or "l" in spec
            size = 8 if wide else 4
            at = -(-at // size) * size
            bits = self._local_word(thread, at, size)
            at += size
            spec = re.sub(r"[lhzjt]", "", spec)
            if kind == "s":
                return spec % self._string(bits)
            if kind == "p":
                return hex(bits)
            if kind in "fFeEgG":
                return spec % float(np.array([bits], U8).view("f8")[0])
            if kind in "di":
                bits = int(np.array([bits], f"u{size}").view(f"i{size}")[0])
            return chr(bits & 255) if kind == "c" else spec.replace("u", "d") % bits

        return re.sub(r"%[-+ #0]*\d*(?:\.\d+)?[lhzjt]*[a-zA-Z%]", value, text)


_WEIGHTS = np.random.default_rng(7).integers(1, 1 << 30, 32).astype(np.float64)


def _wavefronts(relative: np.ndarray, size: int) -> int:
    """Over rows of word addresses: the most distinct words that one bank has to deliver, summed."""
    # Offsets below 2^17 times weights below 2^30: exact sums in f64 tell rows apart.
    keys = relative.astype(np.float64) @ _WEIGHTS[: relative.shape[1]]
    _, first, times = np.unique(keys, return_index=True, return_counts=True)
    rows = relative[first]
    if size > 4:
        rows = (rows[:, :, None] + np.arange(size // 4)).reshape(len(rows), -1)
    rows = np.sort(rows, axis=1)
    distinct = np.ones(rows.shape, bool)
    np.not_equal(rows[:, 1:], rows[:, :-1], out=distinct[:, 1:])
    bank = ((rows & 31) + 32 * np.arange(len(rows))[:, None])[distinct]
    worst = np.bincount(bank, minlength=32 * len(rows)).reshape(-1, 32).max(1)
    return int((worst * times).sum())


# --- atomic arithmetic ---------------------------------------------------------------------


def _atomic(extra: tuple, key: np.ndarray, operands: list, read, write, order) -> np.ndarray:
    """Applies lanes in order (or in the given one); returns each lane's old value."""
    action, t = extra
    if order is not None:
        key, operands = key[order], [o[order] for o in operands]
    n = len(key)
    by_address = np.argsort(key, kind="stable") if n > 1 else np.zeros(1, np.int64)
    sorted_key = key[by_address]
    first = np.concatenate(([True], sorted_key[1:] != sorted_key[:-1]))
    starts = np.flatnonzero(first)
    values = [o[by_address] for o in operands]
    old = np.empty(n, operands[0].dtype)
    if len(starts) == n:  # no two lanes share an address
        current = read(sorted_key)
        old[:] = current
        write(sorted_key, _apply(action, t, current, values))
    elif action == "add" and t[0] in "us" and t[-2:] != "x2":
        current = read(sorted_key[starts])
        total = np.cumsum(values[0], dtype=values[0].dtype)
        before = total - values[0]
        segment = np.cumsum(first) - 1
        old[:] = current[segment] + (before - before[starts][segment])
        ends = np.append(starts[1:], n) - 1
        write(sorted_key[starts], old[ends] + values[0][ends])
    else:
        # The k-th lane of every address together: rounds are as many as the busiest address has.
        segment = np.cumsum(first) - 1
        position = np.arange(n) - starts[segment]
        current = read(sorted_key[starts])
        if len(starts) == 1 or position.max() > 64:
            for i in range(n):
                s = segment[i : i + 1]
                old[i] = current[s][0]
                current[s] = _apply(action, t, current[s], [v[i : i + 1] for v in values])
        else:
            for k in range(int(position.max()) + 1):
                at = np.flatnonzero(position == k)
                s = segment[at]
                old[at] = current[s]
                current[s] = _apply(action, t, current[s], [v[at] for v in values])
        write(sorted_key[starts], current)
    out = np.empty_like(old)
    out[by_address] = old
    if order is not None:
        back = np.empty_like(out)
        back[order] = out
        return back
    return out


def _apply(action: str, t: str, old: np.ndarray, operands: list) -> np.ndarray:
    x = operands[0]
    if action == "exch":
        return x
    if action == "cas":
        return np.where(old == x, operands[1], old)
    if action == "inc":
        return np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1))
    if action == "dec":
        return np.where((old == 0) | (old > x), x, old - old.dtype.type(1))
    if action in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[action](old, x)
    if t in ("f16", "bf16", "f16x2", "bf16x2"):
        load = nx.f16_to_f32 if t.startswith("f16") else nx.bf16_to_f32
        store = nx.f32_to_f16 if t.startswith("f16") else nx.f32_to_bf16
        fn = {"add": np.add, "min": np.fmin, "max": np.fmax}[action]
        a, b = np.ascontiguousarray(old).view(U2), np.ascontiguousarray(x).view(U2)
        return store(fn(load(a), load(b))).view(old.dtype)
    k = {"u": "u", "s": "i", "f": "f", "b": "u"}[t[0]] + str(old.dtype.itemsize)
    fn = {"add": np.add, "min": np.minimum, "max": np.maximum}[action]
    if k[0] == "f" and action != "add":
        fn = np.fmin if action == "min" else np.fmax
    return fn(old.view(k), x.view(k)).view(old.dtype)
