"""Runs a kernel: launch checks, waves of CTAs, scheduling, reconvergence, barriers.

All threads of a wave that are at the same block execute together. Among several groups the one at
the lowest-ranked block runs first, so that groups meet again where their paths join; groups that
wait (at a barrier, for the rest of their warp, for an mbarrier) are parked. A group that loops
while others wait is put behind them after a while, so that spinning on another thread's progress
works. With a seed, the group and the warps that run next are drawn at random.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import BarrierError, LaunchError, StepLimit
from .memory import GlobalMemory
from .parser import Imm, Module
from .program import Block, Op, Program, bits
from .report import LaunchReport
from .shadow import GlobalShadow
from .wave import Active, Wave


@dataclass(frozen=True)
class Device:
    """The limits that a launch is held to."""

    name: str
    arch: int  # 90 for sm_90
    sm_count: int
    smem_per_block: int  # without opt-in
    smem_per_block_optin: int
    smem_per_sm: int
    threads_per_block: int = 1024
    threads_per_sm: int = 2048
    regs_per_sm: int = 65536


H100 = Device("H100", 90, 132, 48 * 1024, 227 * 1024, 228 * 1024)
A100 = Device("A100", 80, 108, 48 * 1024, 163 * 1024, 164 * 1024)


@dataclass(frozen=True)
class Checks:
    """Which checks a launch runs; all are on by default."""

    races: bool = True  # shared-memory races between threads
    warp_races: bool = True  # those between lanes of one warp too
    global_races: bool = True
    uninitialized: bool = True  # reads of shared memory that nothing wrote
    counters: bool = True


ALL_CHECKS = Checks()

# Threads that run concurrently. Real devices hold more, but no kernel may rely on it unless it
# is launched to fit; beyond this the arrays only get slower.
WAVE_THREADS = 132 * 1024
_WAVE_BYTES = 1 << 30


def symbol_address(module: Module, name: str) -> int:
    """Host address of a module-scope .global or .const variable."""
    store = module.__dict__.setdefault("_storage", {})
    if name not in store:
        v = module.variables[name]
        raw = np.zeros(v.size + v.align + 32, np.uint8)
        start = -raw.ctypes.data % max(v.align, 16)
        view = raw[start : start + v.size]
        store[name] = view
        if v.init is not None:
            view[: v.size] = np.frombuffer(_initial(module, v), np.uint8)[: v.size]
    return store[name].ctypes.data


def _initial(module: Module, v) -> bytes:
    from .parser import _number, type_size

    size = type_size(v.elem)
    out = bytearray()
    for item in v.init.replace("{", " ").replace("}", " ").split(","):
        item = item.strip()
        if item.startswith("generic("):
            item = item[8:-1].strip()
        if not item:
            continue
        if item[0].isalpha() or item[0] in "_$%":
            value = symbol_address(module, item)
        else:
            value = _number(item).value
        out += (value & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
    return bytes(out.ljust(v.size, b"\0"))


def launch(
    module: Module,
    kernel_name: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: bytes,
    *,
    dynamic_smem: int = 0,
    memory: GlobalMemory,
    device: Device = H100,
    seed: int | None = None,
    checks: Checks = ALL_CHECKS,
    max_steps: int = 5_000_000,
) -> LaunchReport:
    """Executes one launch on host memory. `seed` asks for a random schedule."""
    kernel = module.kernels.get(kernel_name)
    if kernel is None:
        raise LaunchError(f"no kernel {kernel_name} in this module")
    threads = block[0] * block[1] * block[2]
    ctas = grid[0] * grid[1] * grid[2]

    def refuse(message: str) -> None:
        raise LaunchError(message, kernel=kernel_name, grid=grid, block=block)

    if min(grid) < 1 or min(block) < 1:
        refuse("a grid or block dimension is zero")
    if threads > device.threads_per_block or block[2] > 64:
        refuse(f"{threads} threads per block; the device allows {device.threads_per_block}")
    if grid[0] >= 1 << 31 or max(grid[1:]) > 65535:
        refuse("grid dimension out of range")
    if kernel.reqntid and tuple(kernel.reqntid) != tuple(block):
        refuse(f"the kernel requires blocks of {kernel.reqntid}")
    if kernel.maxntid:
        most = kernel.maxntid[0] * kernel.maxntid[1] * kernel.maxntid[2]
        if threads > most:
            refuse(f"{threads} threads per block; the kernel was compiled for at most {most}")
    if len(args) < kernel.param_bytes:
        refuse(f"{len(args)} bytes of arguments; the kernel takes {kernel.param_bytes}")
    program: Program | None = kernel.__dict__.get("_program")
    if program is None:
        program = kernel.__dict__["_program"] = Program(kernel)
    smem = (
        -(-program.static_smem // 16) * 16 + dynamic_smem if dynamic_smem else program.static_smem
    )
    if smem > device.smem_per_block_optin:
        refuse(f"{smem} bytes of shared memory; the device allows {device.smem_per_block_optin}")

    report = LaunchReport(kernel_name, tuple(grid), tuple(block), dynamic_smem, program.static_smem)
    report.threads = threads * ctas
    argument_bytes = np.zeros(-(-max(len(args), 8) // 8) * 8, np.uint8)
    argument_bytes[: len(args)] = np.frombuffer(args, np.uint8)
    shadow = (
        GlobalShadow(ctas, checks.global_races) if checks.global_races or checks.counters else None
    )
    warps = -(-threads // 32)
    per_cta = smem * (2 + (4 * warps + 4) // 4) + 32 * warps * program.local_size
    wave_ctas = max(1, min(ctas, WAVE_THREADS // (32 * warps), _WAVE_BYTES // max(per_cta, 1)))
    rng = np.random.default_rng(seed) if seed is not None else None
    storage = _register_symbols(module, program, memory)
    try:
        with np.errstate(all="ignore"):
            for first in range(0, ctas, wave_ctas):
                wave = Wave(
                    program, memory, grid, block, first, min(wave_ctas, ctas - first),
                    argument_bytes, smem, checks, device, report, shadow,
                )  # fmt: skip
                wave.rng = rng
                _Scheduler(wave, program, report, max_steps, rng).run()
        if shadow is not None:
            for index, region in shadow.regions.items():
                name = memory.regions[index].name
                counts = report.buffers.get(name)
                if counts is not None:
                    counts.unique_loaded_bytes += region.unique("loaded")
                    counts.unique_stored_bytes += region.unique("stored")
    finally:
        for address in storage:
            memory.unregister(address)
    return report


def _register_symbols(module: Module, program: Program, memory: GlobalMemory) -> list[int]:
    """Makes the module's variables addressable for this launch."""
    out = []
    for name, v in module.variables.items():
        if v.space in ("global", "const") and v.size:
            address = symbol_address(module, name)
            memory.register(address, v.size, name, v.space == "global")
            out.append(address)
    return out


class _Barrier:
    """One barrier number in all CTAs of a wave."""

    def __init__(self, ctas: int, facts: int) -> None:
        self.arrived = np.zeros(ctas)
        self.expected = np.zeros(ctas)  # 0: all threads of the CTA
        self.known = np.zeros((ctas, facts), np.int32)  # what those that arrived know
        self.parked: list[tuple[np.ndarray, int, Op]] = []
        self.votes: list[tuple[np.ndarray, np.ndarray]] = []


class _Scheduler:
    SPIN, SPIN_STRONG = 20_000, 64

    def __init__(
        self, wave: Wave, program: Program, report: LaunchReport, max_steps: int, rng
    ) -> None:
        self.wave, self.program, self.report, self.rng = wave, program, report, rng
        self.max_steps = max_steps
        self.blocks = program.blocks
        self.waiting: dict[int, list[Active]] = {}
        self.stalled: dict[int, list[Active]] = {}  # wait for the rest of their warps
        self.deferred: list[tuple[int, Active]] = []  # spin
        self.sleeping: list[tuple[int, Active, Op]] = []  # wait for an mbarrier
        self.barriers: dict[int, _Barrier] = {}
        self.live = int(np.count_nonzero(wave.alive))
        self.full = Active(wave, None, None if wave.alive.all() else wave.alive.copy(), self.live)
        self.cache: list = [None] * len(program.regs)
        self.cached = 0
        self.dirty = 0
        self.owner: Active | None = None
        self.runs = [0] * len(self.blocks)
        self.warp_runs = [0] * len(self.blocks)
        self.spins = 0
        self.polling: dict[tuple[int, int], bool] = {}  # (first, last block of a loop)
        self.carry_on = 0.75  # random mode: chance that a group keeps running

    # --- register file ---------------------------------------------------------------------

    def registers(self, active: Active, block: Block) -> list:
        base = self.wave.base
        if active.idx is None:
            return base
        cache = self.cache
        if self.owner is not active:
            self.cached = self.dirty = 0
            self.owner = active
        missing = block.use & ~self.cached
        if missing:
            idx = active.idx
            for r in block.uses:
                if missing >> r & 1:
                    value = base[r]
                    cache[r] = value if value.size == 1 else value[idx]
            self.cached |= missing
        return cache

    def flush(self, live: int) -> None:
        """Writes the gathered registers that are still needed back to the wave."""
        if self.owner is not None:
            dirty = self.dirty & live
            if dirty:
                idx = self.owner.idx
                for r in bits(dirty):
                    self.scatter(r, idx, self.cache[r])
            self.owner = None
            self.cached = self.dirty = 0

    def scatter(self, r: int, idx: np.ndarray, value: np.ndarray) -> None:
        base = self.wave.base
        old = base[r]
        if old.size == 1 and self.wave.slots != 1:
            new = np.empty(self.wave.slots, old.dtype)
            new[:] = old
        else:
            new = old.copy()
        new[idx] = value
        base[r] = new

    # --- groups ----------------------------------------------------------------------------

    def group(self, idx: np.ndarray) -> Active:
        if len(idx) == self.live and 2 * self.live > self.wave.slots:
            return self.full
        return Active(self.wave, idx, None, len(idx))

    def push(self, rank: int, active: Active) -> None:
        if active.count:
            self.waiting.setdefault(rank, []).append(active)

    def pick(self) -> tuple[int, Active] | None:
        while not self.waiting:
            if self.deferred:
                for rank, active in self.deferred:
                    self.push(rank, active)
                self.deferred.clear()
                continue
            if self.live == 0:
                return None
            self.deadlock()
        self.spins = 0
        if self.rng is None:
            rank = min(self.waiting)
        else:
            ranks = list(self.waiting)
            rank = ranks[int(self.rng.integers(len(ranks)))]
        parts = self.waiting.pop(rank) + self.stalled.pop(rank, [])
        if len(parts) == 1:
            active = parts[0]
        else:
            active = self.group(np.sort(np.concatenate([p.threads for p in parts])))
        if self.rng is not None:
            threads = active.threads
            warps = threads >> 5
            chosen = self.rng.random(int(warps[-1]) + 1) < 0.5
            take = chosen[warps]
            if take.any() and not take.all():
                self.push(rank, self.group(threads[~take]))
                active = self.group(threads[take])
        return rank, active

    def deadlock(self) -> None:
        wave = self.wave
        lines = []
        first: tuple[Op | None, int] | None = None
        for number, barrier in sorted(self.barriers.items()):
            for idx, _, op in barrier.parked:
                t = int(idx[0])
                cta = int(wave.cta_of[t])
                want = barrier.expected[cta] or wave.alive.reshape(wave.ctas, -1)[cta].sum()
                lines.append(
                    f"{len(idx)} threads wait at barrier {number} (line {op.instr.line}: "
                    f"{op.instr.text}); in block {wave.block_index(cta)} "
                    f"{int(barrier.arrived[cta])} of {int(want)} arrived"
                )
                first = first or (op, t)
        for rank, parts in self.stalled.items():
            instr, _, span = self.blocks[rank].sync
            t = int(parts[0].threads[0])
            mates = "lanes of their warps" if span == 1 else "warps of their warpgroups"
            lines.append(
                f"{sum(p.count for p in parts)} threads wait for {mates} that never "
                f"reach line {instr.line}: {instr.text}"
            )
            first = first or (Op(instr), t)
        for _, active, op in self.sleeping:
            t = int(active.threads[0])
            lines.append(
                f"{active.count} threads wait for an mbarrier "
                f"(line {op.instr.line}: {op.instr.text})"
            )
            first = first or (op, t)
        op, t = first if first else (None, int(np.flatnonzero(wave.alive)[0]))
        wave.fail(BarrierError, "deadlock: nothing can run\n  " + "\n  ".join(lines), op, t)

    # --- main loop -------------------------------------------------------------------------

    def run(self) -> None:
        wave, blocks = self.wave, self.blocks
        steps = self.report.steps
        self.push(0, self.full)
        current = self.pick()
        while current is not None:
            rank, active = current
            block = blocks[rank]
            if block.fn is None:
                self.program.compile(block)
            if block.sync is not None and (
                block.sync[1] is not None or not active.whole(block.sync[2])
            ):
                active = self.collect(block, rank, active)
                if active is None:
                    current = self.pick()
                    continue
            registers = self.registers(active, block)
            wave.active = active
            result = block.fn(wave, registers)
            if active.idx is not None:
                self.cached |= block.saves
                self.dirty |= block.saves
            self.runs[rank] += active.count
            self.warp_runs[rank] += self.warp_count(active)
            steps += len(block.instrs)
            if steps > self.max_steps:
                instr = block.instrs[0]
                wave.fail(
                    StepLimit,
                    f"more than {self.max_steps} steps",
                    Op(instr),
                    int(active.threads[0]),
                )
            term = block.term
            if term == "fall" or term == "jump":
                following = block.targets[0]
            elif term == "branch":
                following = self.branch(block, active, result)
            elif term == "exit":
                following = self.exit(block, active, result)
            elif term == "bar":
                following = self.barrier(block, active, result)
            elif term == "wait":
                following = self.wait(block, rank, active, result)
            else:
                following = self.switch(block, active, result)
            if wave.woken:
                wave.woken = False
                for r, sleeper, _ in self.sleeping:
                    self.push(r, sleeper)
                self.sleeping.clear()
            if following is None:
                current = self.pick()
                continue
            if following in self.stalled:  # warp mates wait there: join them
                keep = False
            elif self.rng is not None:
                keep = self.rng.random() < self.carry_on and following not in self.waiting
            else:
                keep = not self.waiting or following < min(self.waiting)
                if keep and following <= rank and (self.waiting or self.deferred):
                    self.spins += 1
                    strong = self.polls(following, rank)
                    if self.spins > (self.SPIN_STRONG if strong else self.SPIN):
                        self.flush(blocks[following].live_in)
                        self.deferred.append((following, active))
                        current = self.pick()
                        continue
            if keep:
                current = following, active
            else:
                self.flush(blocks[following].live_in)
                self.push(following, active)
                current = self.pick()
        self.report.steps = steps
        self.account()

    def polls(self, first: int, last: int) -> bool:
        """Does the loop over these blocks read memory that other threads may change?"""
        if (first, last) not in self.polling:
            self.polling[first, last] = any(
                instr.op in ("atom", "mbarrier", "nanosleep")
                or not {"volatile", "relaxed", "acquire"}.isdisjoint(instr.parts)
                for block in self.blocks[first : last + 1]
                for instr in block.instrs
            )
        return self.polling[first, last]

    def warp_count(self, active: Active) -> int:
        count = getattr(active, "warp_total", None)
        if count is None:
            present = active.layout[2] if active.idx is None else None
            count = len(active.layout[0]) if present is None else int(present.any(1).sum())
            active.warp_total = count
        return count

    def account(self) -> None:
        report = self.report
        for block, runs, warps in zip(self.blocks, self.runs, self.warp_runs):
            if not runs:
                continue
            report.thread_instructions += runs * len(block.instrs)
            report.warp_instructions += warps * len(block.instrs)
            for klass, n in block.classes.items():
                report.by_class[klass] = report.by_class.get(klass, 0) + n * warps

    # --- terminators: each returns the rank where the whole group goes on, or None ----------

    def branch(self, block: Block, active: Active, p: np.ndarray) -> int | None:
        yes, no = block.targets
        if p.size == 1:
            return yes if p[0] else no
        if active.live is not None:
            p = p & active.live
        taken = int(np.count_nonzero(p))
        if taken == active.count:
            return yes
        if taken == 0:
            return no
        self.flush(self.blocks[yes].live_in | self.blocks[no].live_in)
        if active.idx is None:
            rest = ~p if active.live is None else active.live & ~p
            self.push(yes, self.group(np.flatnonzero(p)))
            self.push(no, self.group(np.flatnonzero(rest)))
        else:
            self.push(yes, self.group(active.idx[p]))
            self.push(no, self.group(active.idx[~p]))
        return None

    def switch(self, block: Block, active: Active, index: np.ndarray) -> int | None:
        if index.size == 1:
            return block.targets[int(index[0])]
        live = 0
        for t in block.targets:
            live |= self.blocks[t].live_in
        self.flush(live)
        threads = active.threads
        values = index[threads] if active.idx is None else index
        for i, target in enumerate(block.targets):
            at = threads[values == i]
            if len(at):
                self.push(target, self.group(at))
        return None

    def split(
        self, active: Active, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Threads for which the guard holds, and the others (None if there are none)."""
        threads = active.threads
        if mask is None:
            return threads, None
        if mask.size == 1:
            mask = np.repeat(mask, len(threads))
        elif active.idx is None:
            mask = mask[threads]
        rest = threads[~mask]
        return threads[mask], rest if len(rest) else None

    def exit(self, block: Block, active: Active, mask: np.ndarray | None) -> int | None:
        wave = self.wave
        gone, rest = self.split(active, mask)
        if rest is not None:
            if not len(gone):
                return block.targets[0]
            self.flush(self.blocks[block.targets[0]].live_in)
        else:
            self.flush(0)
        wave.alive[gone] = False
        self.live -= len(gone)
        self.full = Active(wave, None, wave.alive.copy(), self.live)
        if rest is not None:
            self.push(block.targets[0], self.group(rest))
        if wave.shadow is not None:
            ctas = np.flatnonzero(np.bincount(wave.cta_of[gone], minlength=wave.ctas))
            done = ctas[~wave.alive.reshape(wave.ctas, -1)[ctas].any(1)]
            if len(done):
                wave.shadow.retire(done)
        for rank, parts in list(self.stalled.items()):
            self.stalled.pop(rank)
            for part in parts:
                self.push(rank, part)
        for number in list(self.barriers):
            self.complete(number)
        return None

    def wait(self, block: Block, rank: int, active: Active, result: tuple) -> int | None:
        op, _, done, mask = result
        if mask is not None:
            done = done | ~mask
        ready, rest = self.split(active, done)
        if rest is None:
            return block.targets[0]
        self.flush(self.blocks[block.targets[0]].live_in | block.live_in)
        self.sleeping.append((rank, self.group(rest), op))
        if len(ready):
            self.push(block.targets[0], self.group(ready))
        return None

    def collect(self, block: Block, rank: int, active: Active) -> Active | None:
        """At a synchronous instruction: keeps the threads whose warp(group) mates are all here."""
        wave = self.wave
        instr, operand, span = block.sync
        threads = active.threads
        if span > 1:
            return self.keep(block, rank, active, active.complete(span)[threads])
        warps, _, present = active.layout
        if operand is None:
            member = np.full(len(threads), 0xFFFFFFFF, np.uint32)
        elif isinstance(operand, Imm):
            member = np.full(len(threads), operand.value & 0xFFFFFFFF, np.uint32)
        else:
            value = self.registers(active, block)[operand.index].view(np.uint32)
            member = np.broadcast_to(value, (active.width,))
            if active.idx is None:
                member = member[threads]
        weights = (np.uint32(1) << np.arange(32, dtype=np.uint32)).astype(np.uint32)
        own = member & weights[threads & 31]
        if instr.guard is None and (own == 0).any():
            t = int(threads[np.flatnonzero(own == 0)[0]])
            wave.fail(BarrierError, "a lane is not in its own member mask", Op(instr), t)
        if active.whole(1):
            return active
        if present is None:
            present_bits = np.full(len(warps), 0xFFFFFFFF, np.uint32)
        else:
            present_bits = (present * weights).sum(1, dtype=np.uint32)
        alive_bits = (wave.alive.reshape(-1, 32)[warps] * weights).sum(1, dtype=np.uint32)
        row = np.searchsorted(warps, threads >> 5)
        return self.keep(block, rank, active, (member & alive_bits[row] & ~present_bits[row]) == 0)

    def keep(self, block: Block, rank: int, active: Active, ok: np.ndarray) -> Active | None:
        """Goes on with these threads; the others wait."""
        threads = active.threads
        if ok.all():
            return active
        self.flush(block.live_in)
        self.stalled.setdefault(rank, []).append(self.group(threads[~ok]))
        return self.group(threads[ok]) if ok.any() else None

    # --- barriers --------------------------------------------------------------------------

    def barrier(self, block: Block, active: Active, result: tuple) -> int | None:
        op, which, count, predicate, mask = result
        following = block.targets[0]
        action, reduce, dest, _ = op.extra
        wave = self.wave
        whole = active is self.full and mask is None and which.size == 1
        if whole and action != "arrive" and (count is None or count.size == 1):
            n = None if count is None else int(count[0])
            state = self.barriers.get(int(which[0]))
            idle = state is None or not state.arrived.any()
            full_count = -(-wave.threads_per_cta // 32) * 32
            if idle and self.live and (n is None or (n == full_count and active.live is None)):
                if wave.shadow is not None:
                    wave.shadow.barrier_all(None)
                self.report.barriers += self.live_ctas()
                if action == "red":
                    wave.base[dest] = self.reduced(
                        reduce,
                        wave.everyone,
                        np.broadcast_to(predicate, (wave.slots,)) & wave.alive,
                    ).astype(wave.base[dest].dtype)
                return following
        self.flush(self.blocks[following].live_in)
        threads, rest = self.split(active, mask)
        if rest is not None:
            self.push(following, self.group(rest))

        def full_width(x: np.ndarray | None) -> np.ndarray | None:
            """Operand per thread slot."""
            if x is None:
                return None
            out = np.zeros(wave.slots, x.dtype)
            if x.size == 1:
                out[:] = x
            elif active.idx is None:
                return x
            else:
                out[active.idx] = x
            return out

        numbers, counts, votes = full_width(which), full_width(count), full_width(predicate)
        for number in np.unique(numbers[threads]).tolist():
            at = threads[numbers[threads] == number]
            if not 0 <= number < 16:
                wave.fail(BarrierError, f"barrier {number} does not exist", op, int(at[0]))
            self.arrive(number, op, at, counts, votes, following)
        return None

    def live_ctas(self) -> int:
        return int(self.wave.alive.reshape(self.wave.ctas, -1).any(1).sum())

    def reduced(self, reduce: str, threads: np.ndarray, votes: np.ndarray) -> np.ndarray:
        """bar.red per thread; `votes` is indexed by slot."""
        wave = self.wave
        cta = wave.cta_of[threads]
        hits = np.bincount(cta, votes[threads], wave.ctas).astype(np.int64)
        if reduce == "popc":
            return hits[cta]
        if reduce == "or":
            return hits[cta] > 0
        voters = np.bincount(cta, wave.alive[threads], wave.ctas).astype(np.int64)
        return hits[cta] == voters[cta]

    def arrive(
        self, number: int, op: Op, threads: np.ndarray, counts, votes, following: int
    ) -> None:
        wave = self.wave
        action = op.extra[0]
        state = self.barriers.get(number)
        if state is None:
            state = self.barriers[number] = _Barrier(wave.ctas, wave.facts)
        cta = wave.cta_of[threads]
        if counts is None:
            weight = np.ones(len(threads))
            expected = np.zeros(wave.ctas)
        else:
            # Hardware counts whole warps, lanes that do not exist included.
            lanes = wave.alive.reshape(-1, 32).sum(1)[threads >> 5]
            weight = 32.0 / lanes
            expected = np.zeros(wave.ctas)
            expected[cta] = counts[threads]
            differ = expected[cta] != counts[threads]
            if differ.any():
                t = int(threads[np.flatnonzero(differ)[0]])
                wave.fail(
                    BarrierError, f"barrier {number} is used with different thread counts", op, t
                )
            if (expected[cta] % 32).any():
                wave.fail(
                    BarrierError, "a barrier's thread count is not a multiple of the warp size",
                    op, int(threads[0]),
                )  # fmt: skip
        arriving = np.bincount(cta, weight, wave.ctas)
        here = np.flatnonzero(arriving)
        busy = here[state.arrived[here] > 0]
        mismatch = busy[state.expected[busy] != expected[busy]]
        if len(mismatch):
            t = int(threads[cta == mismatch[0]][0])
            wave.fail(
                BarrierError,
                f"barrier {number} is used with different thread counts "
                f"({int(state.expected[mismatch[0]])} and {int(expected[mismatch[0]])}; 0: all)",
                op, t,
            )  # fmt: skip
        alive = wave.alive.reshape(wave.ctas, -1).sum(1)
        want = np.where(expected > 0, expected, alive)
        over = here[state.arrived[here] + arriving[here] > want[here] + 1e-6]
        if len(over):
            # More arrivals than the barrier takes: warp by warp, the surplus opens the next
            # generation.
            warps = np.unique(threads >> 5)
            if len(warps) == 1:
                wave.fail(
                    BarrierError, f"more threads arrive at barrier {number} than it expects", op,
                    int(threads[0]),
                )  # fmt: skip
            for w in warps.tolist():
                self.arrive(number, op, threads[threads >> 5 == w], counts, votes, following)
            return
        state.expected[here] = expected[here]
        state.arrived += arriving
        if wave.shadow is not None:
            warps = (threads >> 5)[np.concatenate(([True], np.diff(threads >> 5) != 0))]
            rows = wave.shadow.publish(warps)
            np.maximum.at(state.known, warps // wave.warps_per_cta, rows)
        if votes is not None:
            state.votes.append((threads, votes))
        if action == "arrive":
            self.push(following, self.group(threads))
        else:
            state.parked.append((threads, following, op))
        self.complete(number)

    def complete(self, number: int) -> None:
        """Releases the CTAs whose barrier has all its threads."""
        wave, state = self.wave, self.barriers[number]
        alive = wave.alive.reshape(wave.ctas, -1).sum(1)
        want = np.where(state.expected > 0, state.expected, alive)
        done = (state.arrived > 0) & (state.arrived >= want - 1e-6)
        if not done.any():
            return
        wave_ctas = np.flatnonzero(done)
        self.report.barriers += len(wave_ctas)
        released: list[tuple[np.ndarray, int, Op]] = []
        parked = []
        for idx, rank, op in state.parked:
            free = done[wave.cta_of[idx]]
            if free.all():
                released.append((idx, rank, op))
            else:
                parked.append((idx[~free], rank, op))
                if free.any():
                    released.append((idx[free], rank, op))
        state.parked = parked
        if released:
            everyone = np.concatenate([idx for idx, _, _ in released])
            self.check_divergence(number, released)
            if released[0][2].extra[0] == "red":
                self.reduce_votes(state, released, everyone)
            if wave.shadow is not None:
                synced = np.bincount(wave.cta_of[everyone], minlength=wave.ctas)
                full = np.flatnonzero(done & (synced >= alive))
                if len(full):
                    wave.shadow.barrier_all(full)
                partial = done & (synced < alive)
                if partial.any():
                    some = everyone[partial[wave.cta_of[everyone]]]
                    warps = np.unique(some >> 5)
                    wave.shadow.learn(warps, state.known[warps // wave.warps_per_cta])
            for idx, rank, _ in released:
                self.push(rank, self.group(idx))
        state.arrived[done] = 0
        state.expected[done] = 0
        state.known[done] = 0
        state.votes = [(t, v) for t, v in state.votes if not done[wave.cta_of[t]].all()]

    def check_divergence(self, number: int, released: list) -> None:
        """All threads of a warp must come from the same bar instruction."""
        if len(released) == 1:
            return
        seen: dict[int, Op] = {}
        for idx, _, op in released:
            if not op.extra[3]:
                continue
            for w in np.unique(idx >> 5).tolist():
                if seen.setdefault(w, op).instr.line != op.instr.line:
                    self.wave.fail(
                        BarrierError,
                        f"divergent barrier {number}: threads of one warp wait at line "
                        f"{seen[w].instr.line} and at line {op.instr.line}",
                        op, int(idx[idx >> 5 == w][0]),
                    )  # fmt: skip

    def reduce_votes(self, state: _Barrier, released: list, everyone: np.ndarray) -> None:
        wave = self.wave
        votes = np.zeros(wave.slots, bool)
        for threads, values in state.votes:
            votes[threads] = values[threads]
        for idx, _, op in released:
            _, reduce, dest, _ = op.extra
            cta = wave.cta_of[idx]
            hits = np.bincount(wave.cta_of[everyone], votes[everyone], wave.ctas).astype(np.int64)
            total = np.bincount(wave.cta_of[everyone], minlength=wave.ctas)
            value = {
                "popc": hits, "or": hits > 0, "and": hits == total,
            }[reduce][cta]  # fmt: skip
            self.scatter(dest, idx, value.astype(wave.base[dest].dtype))
