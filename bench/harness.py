"""Times operators against the machine's measured ceilings and against their peers.

A bench_<op>.py declares cases: a shape, its inputs, the bytes that any implementation must move,
and the peers. Everything else happens here, the same way for every operator:

  - Inputs are rotated over enough sets to exceed the last-level cache, so weights and caches come
    from memory as they do in a decoding step.
  - Ours, every peer and a streaming probe run interleaved in shuffled order, round after round; a
    sample is the median of some calls in a row. A ratio is the median over rounds of the ratio
    within a round: load from other processes, or a clock that drifts, hits both sides of it alike.
  - On a GPU each sample replays a CUDA graph of calls over all input sets, between two events.
  - The percentage of the ceiling compares with the probe of the same round as well. The
    ceilings printed first are the same probes, measured alone.
"""

import argparse
import ctypes
import gc
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import mtp_ext
from bench import report

HERE = Path(__file__).resolve().parent
NOISE_LIMIT = 0.10  # (p90 - p10) / median above this is said aloud
MAX_SETS = 256
SAMPLE_SECONDS = 20e-3
LONG_SECONDS = 100e-3
VERSIONED = (
    "torch", "numpy", "transformers", "flashinfer-python", "flash-attn", "vllm", "liger-kernel",
    "cut-cross-entropy", "triton",
)  # fmt: skip


# ---- what a bench_<op>.py declares ---------------------------------------------------------------


@dataclass
class Case:
    """One row of the table.

    `make()` returns one set of inputs; `ours(ops, *inputs)` calls the operator in the namespace
    it is given (torch.ops.mtp, or the simulator's); each peer gets the inputs alone. A peer of
    None is missing here. `torch.compile` of the peer named "eager" is added by the harness.
    """

    shape: str
    dtype: str
    make: Callable[[], tuple]
    ours: Callable[..., Any]
    read: int  # bytes that must be read
    written: int  # bytes that must be written
    flops: int = 0
    peers: dict[str, Callable[..., Any] | None] = field(default_factory=dict)
    compile: bool = True
    memory: bool = False  # measure the peak of memory as well
    # Called with our result and eager's; raises if they do not do the same job.
    check: Callable[[Any, Any], None] | None = None

    @property
    def bytes(self) -> int:
        return self.read + self.written


def nbytes(*tensors: torch.Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def random_values(
    *shape: int, dtype: torch.dtype = torch.bfloat16, device: str = "cpu", scale: float = 1.0
) -> torch.Tensor:
    """Normal values, made faster than randn for large weights: a repeated block of odd length, so
    that no two rows are equal. int8 is scaled to its range."""
    count = math.prod(shape)
    block = torch.randn(min(count, 999_983), device=device) * scale
    block = (block * 40).clamp(-127, 127).to(dtype) if dtype == torch.int8 else block.to(dtype)
    return block.repeat(-(-count // len(block)))[:count].view(shape)


def clone(value: Any) -> Any:
    """A deep copy of the tensors in tuples and lists."""
    if isinstance(value, (tuple, list)):
        return type(value)(clone(item) for item in value)
    return value.clone() if isinstance(value, torch.Tensor) else value


def optional(module: str, build: Callable[[Any], Callable[..., Any]]) -> Callable[..., Any] | None:
    """The peer that `build(module)` makes, or None where the module cannot be imported."""
    try:
        return build(importlib.import_module(module))
    except (ImportError, AttributeError, OSError, RuntimeError):
        return None


# ---- the machine ---------------------------------------------------------------------------------


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    model = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        model += f" (family {fields['cpu family']} model {fields.get('model', '?')})"
    return model


def last_level_cache(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(t[:-1]) * units[t[-1]] for t in texts if t[-1:] in units), default=32 * 2**20)


def git_commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(HERE), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return mtp_ext.build_info()["commit"]


def describe_machine(device: str) -> dict[str, Any]:
    info = mtp_ext.build_info()
    versions = {"mtp_ext": info["version"], "python": platform.python_version()}
    for package in VERSIONED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        name = torch.cuda.get_device_name(0)
    else:
        name = cpu_model()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "kind": device,
        "device": name,
        "cpu": cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": info["cpu_isa"],
        "cuda_archs": info["cuda_archs"],
        "cache_bytes": last_level_cache(device),
        "commit": git_commit(),
        "build_commit": info["commit"],
        "compiler": info["compiler"],
        "versions": versions,
    }


class OtherLoad:
    """The share of all CPU time that other processes took since construction; None if unknown."""

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        except OSError:
            return None
        tick = os.sysconf("SC_CLK_TCK")
        user, nice, system, idle, iowait, irq, softirq, steal = (int(w) / tick for w in words)
        total = user + nice + system + idle + iowait + irq + softirq + steal
        return total, total - idle - iowait, sum(os.times()[:2])

    def share(self) -> float | None:
        now = self._read()
        if now is None or self.start is None or now[0] - self.start[0] < 0.1:
            return None
        total, busy, own = (a - b for a, b in zip(now, self.start))
        return min(1.0, max(0.0, (busy - own) / total))


# ---- timing --------------------------------------------------------------------------------------

Clock = Callable[[], float]
# The second counts the calling thread's time on a core, so it needs one thread; it is for machines
# that others keep busy, where a wall clock mostly shows the scheduler.
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.thread_time}


class Rotation:
    """Input sets taken in turn by every contender, so that the next one is never in the cache."""

    def __init__(self, sets: Sequence[tuple]) -> None:
        self.sets = sets
        self._turn = itertools.cycle(sets)

    def next(self) -> tuple:
        return next(self._turn)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {name}")


def peak_bytes(device: str, call: Callable[..., Any], inputs: tuple) -> int | None:
    """The most memory that a call holds beyond what is held before it, results included; None
    where the system does not tell."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # or what is free already would be used without a trace
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
        before = _status_bytes("VmRSS")
        call(*inputs)
        return _status_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None


def set_count(case_bytes: int, cache_bytes: int) -> int:
    return min(MAX_SETS, max(1, -(-2 * cache_bytes // max(1, case_bytes))))


class CpuTimer:
    """One sample is the median of calls one after the other, as in a decoding loop: the first ones
    find sleeping threads, the code of another contender and, where the memory has been idle, a
    memory that takes a while to wake up. Long calls stand alone."""

    def __init__(self, call: Callable[..., Any], inputs: Rotation, clock: Clock) -> None:
        self.call, self.inputs, self.clock = call, inputs, clock
        self.calls = 1
        self.sample()
        once = self.sample()
        if once < LONG_SECONDS:
            self.calls = max(3, round(SAMPLE_SECONDS / max(once, 1e-6)))

    def sample(self) -> float:
        times = []
        for _ in range(self.calls):
            inputs = self.inputs.next()
            start = self.clock()
            self.call(*inputs)
            times.append(self.clock() - start)
        return statistics.median(times)


class CudaTimer:
    """One sample replays a graph of one call per input set. What cannot be captured (a peer that
    synchronises) runs eagerly, and `note` says so."""

    def __init__(self, call: Callable[..., Any], inputs: Rotation) -> None:
        self.calls = len(inputs.sets)
        self.note = ""
        # Small operators: enough replays between the events.
        self.repeats = max(1, 20 // self.calls)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call(*inputs.sets[0])
        torch.cuda.synchronize()

        def run_all() -> None:
            for arguments in inputs.sets:
                call(*arguments)

        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run_all()
            self.run = graph.replay
        except RuntimeError:
            torch.cuda.synchronize()
            self.run, self.note = run_all, "not captured in a graph"
        self.run()
        torch.cuda.synchronize()

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.repeats):
            self.run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (self.calls * self.repeats)


def make_timer(
    device: str, call: Callable[..., Any], inputs: Rotation, clock: Clock
) -> CpuTimer | CudaTimer:
    return CudaTimer(call, inputs) if device == "cuda" else CpuTimer(call, inputs, clock)


def interleave(
    contenders: dict[str, Callable[[], float]], seconds: float, min_rounds: int, max_rounds: int
) -> dict[str, list[float]]:
    """Samples of every contender, one each per round, in a new shuffled order every round. Stops
    after `seconds`, but not before `min_rounds`, unless those take ten times as long."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    shuffler = random.Random(0)
    start = time.perf_counter()
    for done in range(max_rounds):
        elapsed = time.perf_counter() - start
        if (elapsed > seconds and done >= min_rounds) or (elapsed > 10 * seconds and done >= 3):
            break
        shuffler.shuffle(order)
        for name in order:
            samples[name].append(contenders[name]())
    return samples


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> float:
    """(p90 - p10) / median."""
    return (quantile(values, 0.9) - quantile(values, 0.1)) / statistics.median(values)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator))


# ---- ceilings ------------------------------------------------------------------------------------


class Ceilings:
    """Streaming read, streaming copy (bytes read plus bytes written) and a large matmul, as the
    best of several ways to ask torch for it."""

    def __init__(self, device: str, scale: float = 1.0, clock: Clock = CLOCKS["wall"]) -> None:
        self.device, self.clock = device, clock
        cache = last_level_cache(device)
        floats = int(max(4 * cache, 2**20) * scale) // 4 // 8192 * 8192
        self.stream_bytes = 4 * floats
        source = torch.ones(floats, device=device)
        target = torch.empty_like(source)
        rows = source.view(-1, 4096)
        words = source.view(torch.int64).view(-1, 4096)
        vector = torch.ones(4096, device=device)
        read = {
            "sum of f32 rows": lambda: rows.sum(1),
            "max of f32 rows": lambda: rows.amax(1),
            "sum of int64 rows": lambda: words.sum(1),
            "norm of f32": lambda: torch.linalg.vector_norm(source),
            "f32 matrix @ vector": lambda: rows @ vector,
        }
        copy = {"copy_": lambda: target.copy_(source)}
        n = max(64, int((8192 if device == "cuda" else 1024) * min(1.0, scale)))
        matmul = {}
        for dtype in (torch.float32, torch.bfloat16):
            a = torch.ones(n, n, device=device, dtype=dtype)
            matmul[f"{report.dtype_name(dtype)} {n}^3"] = lambda a=a: a @ a
        self.found: dict[str, dict[str, Any]] = {}
        self.calls: dict[str, Callable[[], Any]] = {}
        for kind, probes, work in (
            ("read", read, self.stream_bytes),
            ("copy", copy, 2 * self.stream_bytes),
            ("matmul", matmul, 2 * n**3),
        ):
            timers = {
                name: make_timer(device, call, Rotation([()]), clock)
                for name, call in probes.items()
            }
            samples = interleave({name: t.sample for name, t in timers.items()}, 1.0, 5, 30)
            best = min(samples, key=lambda name: statistics.median(samples[name]))
            self.calls[kind] = probes[best]
            self.found[kind] = {
                "probe": best,
                "per_second": work / statistics.median(samples[best]),
                "noise": spread(samples[best]),
            }
        self.work = {"read": self.stream_bytes, "copy": 2 * self.stream_bytes, "matmul": 2 * n**3}

    def bound(self, case: Case) -> str:
        """Which ceiling this case meets first."""
        kind = "copy" if case.written > 0.1 * case.bytes else "read"
        memory = case.bytes / self.found[kind]["per_second"]
        return "matmul" if case.flops / self.found["matmul"]["per_second"] > memory else kind

    def timer(self, kind: str) -> CpuTimer | CudaTimer:
        return make_timer(self.device, self.calls[kind], Rotation([()]), self.clock)


# ---- one row -------------------------------------------------------------------------------------


def run_case(
    op: str, case: Case, ceilings: Ceilings, options: argparse.Namespace
) -> dict[str, Any]:
    device = ceilings.device
    count = set_count(case.bytes, last_level_cache(device))
    inputs = Rotation([case.make() for _ in range(count)])
    calls: dict[str, Callable[..., Any] | None] = {
        "ours": lambda *arguments: case.ours(torch.ops.mtp, *arguments)
    }
    failures = {}
    if options.peers:
        calls |= case.peers
        if case.compile and options.compile and case.peers.get("eager"):
            torch._dynamo.reset()
            calls["compile"] = torch.compile(case.peers["eager"], dynamic=False)
    timers, peaks = {}, {}
    for name, call in calls.items():
        if call is None:
            failures[name] = "not installed"
            continue
        try:
            if case.memory and name != "compile":
                peaks[name] = peak_bytes(device, call, inputs.sets[0])  # of its first call
            timers[name] = make_timer(device, call, inputs, ceilings.clock)
        except Exception as error:  # a peer that fails is a dash and a reason
            if name == "ours":
                raise
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    if case.check and "eager" in timers:
        # Eager gets a copy: an operator may write into its inputs.
        copy = clone(inputs.sets[0])
        case.check(calls["ours"](*inputs.sets[0]), calls["eager"](*copy))
    bound = ceilings.bound(case)
    timers["ceiling"] = ceilings.timer(bound)

    load = OtherLoad()
    samples = interleave(
        {name: timer.sample for name, timer in timers.items()},
        options.seconds,
        options.min_rounds,
        200,
    )
    others = load.share()
    ours, ceiling = samples["ours"], samples["ceiling"]
    work = case.flops if bound == "matmul" else case.bytes
    row = describe(op, case.shape, case.dtype, ours, others if device == "cpu" else None)
    if getattr(timers["ours"], "note", ""):
        row["notes"].append(timers["ours"].note)
    if count * case.bytes < last_level_cache(device):
        row["notes"].append("fits in cache")
    known = [f"{name} {peak / 2**20:.0f} MiB" for name, peak in peaks.items() if peak is not None]
    if known:
        row["notes"].append(f"peak memory: {', '.join(known)}")
    peers = {
        name: None if name in failures else describe_peer(samples[name], ours)
        for name in calls
        if name != "ours"
    }
    return row | {
        "sets": count,
        "read": case.read,
        "written": case.written,
        "bytes": case.bytes,
        "flops": case.flops,
        "gb_per_s": case.bytes / statistics.median(ours) / 1e9,
        "bound": bound,
        "ceiling_per_s": ceilings.work[bound] / statistics.median(ceiling),
        "of_ceiling": paired_ratio(ceiling, ours) * work / ceilings.work[bound],
        "peers": peers,
        "missing": failures,
        "peak_bytes": peaks,
    }


def describe(
    op: str, shape: str, dtype: str, samples: Sequence[float], others: float | None
) -> dict[str, Any]:
    """The part of a row that the samples alone decide."""
    noise, notes = spread(samples), []
    if noise > NOISE_LIMIT:
        notes.append(f"noise {noise:.0%}")
    if others is not None and others > NOISE_LIMIT:
        notes.append(f"others took {others:.0%} of the CPU")
    return {
        "op": op,
        "shape": shape,
        "dtype": dtype,
        "median_us": statistics.median(samples) * 1e6,
        "p10_us": quantile(samples, 0.1) * 1e6,
        "p90_us": quantile(samples, 0.9) * 1e6,
        "noise": noise,
        "rounds": len(samples),
        "others_cpu": others,
        "notes": notes,
    }


def describe_peer(samples: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    return {
        "median_us": statistics.median(samples) * 1e6,
        "p10_us": quantile(samples, 0.1) * 1e6,
        "noise": spread(samples),
        "ratio": paired_ratio(samples, ours),
    }


# ---- the command ---------------------------------------------------------------------------------


def available() -> dict[str, str]:
    """Operator to module, in the order they are listed."""
    return {
        p.stem.removeprefix("bench_"): f"bench.{p.stem}" for p in sorted(HERE.glob("bench_*.py"))
    }


def run_op(op: str, ceilings: Ceilings, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of one file: of its cases, or those that it measures itself, with `rows`."""
    module = importlib.import_module(available()[op])
    if hasattr(module, "rows"):
        yield from module.rows(ceilings.device, options.small, ceilings, options)
    else:
        for case in module.cases(ceilings.device, options.small):
            if not options.only or any(text in case.shape for text in options.only):
                yield run_case(op, case, ceilings, options)


def saved(path: str) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"not a result of --json: {error}") from error


def writable(path: str) -> Path:
    """Known before anything is measured, since that takes minutes."""
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        is_new = not file.exists()
        file.touch()
        if is_new:
            file.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return file


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mtp_ext bench", description=__doc__.split("\n", 1)[0]
    )
    add = parser.add_argument
    add("op", nargs="*", help=f"default: all of {', '.join(available())}")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: time on the core, of one thread")
    add("--peers", action="store_true", help="time the peers too")
    add("--no-compile", dest="compile", action="store_false", help="without torch.compile")
    add("--only", metavar="TEXT", action="append", help="rows whose shape holds TEXT; repeatable")
    add("--small", action="store_true", help="shapes that only show that everything runs")
    add("--seconds", type=float, default=1.0, help="time per row (default 1)")
    add("--min-rounds", type=int, default=9)
    add("--json", metavar="PATH", type=writable, help="write everything measured")
    add(
        "--from",
        metavar="PATH",
        dest="source",
        type=saved,
        help="take results from there, measure nothing",
    )
    add("--plot", action="store_true", help="write tables and figures into bench/results/")
    add("--compare", metavar="OLD.json", type=saved, help="print what changed since")
    add(
        "--counters",
        action="store_true",
        help="counts of the simulated CUDA kernels, no times; with --plot into bench/results/",
    )
    options = parser.parse_args(argv)
    unknown = sorted(set(options.op) - set(available()))
    if unknown:
        parser.error(f"no benchmark for {', '.join(unknown)}; there are {', '.join(available())}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if options.clock == "cpu" and (options.device == "cuda" or torch.get_num_threads() > 1):
        parser.error("--clock cpu counts one thread on a CPU: set OMP_NUM_THREADS=1")
    return options


def measure(ops: Sequence[str], options: argparse.Namespace, command: str) -> dict[str, Any]:
    machine = describe_machine(options.device) | {"clock": options.clock}
    print(report.headline(machine), flush=True)
    ceilings = Ceilings(options.device, 0.01 if options.small else 1.0, CLOCKS[options.clock])
    print(report.ceiling_lines(ceilings.found), flush=True)
    rows = []
    for op in ops:
        table = []
        for row in run_op(op, ceilings, options):
            table.append(row)
            print(".", end="", file=sys.stderr, flush=True)
        if not table:
            continue
        print(file=sys.stderr)
        print(f"\n{op}\n{report.table(table)}", flush=True)
        rows += table
    return {
        "schema": report.SCHEMA,
        "command": command,
        "machine": machine,
        "ceilings": ceilings.found,
        "rows": rows,
    }


def main(argv: list[str]) -> int:
    options = parse(argv)
    ops = options.op or list(available())
    if options.counters:
        from bench import counters

        return counters.main(ops, HERE / "results" if options.plot else None)
    result = options.source or measure(ops, options, "python -m mtp_ext bench " + " ".join(argv))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.compare:
        print(f"\n{report.compare(options.compare, result)}")
    if options.plot:
        for path in report.write(result, HERE / "results"):
            print(f"wrote {path}")
    return 0
