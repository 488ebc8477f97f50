"""Counts of the CUDA kernels executed on the simulator (tests/ptxsim). Exact, and never times."""

import importlib
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.harness import HERE, Case, available, git_commit
from bench.report import bytes_text, layout, markdown

ROOT = HERE.parent
DEVICE, ARCH = "h100", "sm_90a"
HEADER = [
    "shape", "kernel", "grid x block", "loaded", "stored", "x floor", "once x floor", "sectors",
    "x ideal sectors", "bank conflicts", "warp instructions", "mma", "barriers",
]  # fmt: skip
LEGEND = """\
Counts, not times: the PTX that ships, executed on a simulator. `x floor` is all bytes that threads
loaded and stored over those that must move; `once x floor` counts a byte once however often it is
loaded, which is what memory delivers while L2 holds the rest. `x ideal sectors` is 32-byte sectors
over requested bytes / 32, below 1 where lanes share an address."""


def kernel_name(mangled: str) -> str:
    """namespace::kernel<arguments>(parameters) as kernel."""
    name = mangled
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    found = re.search(r"(\w+)\s*(?:<.*)?\(", name)
    return found.group(1) if found else name


def count(launch: Any) -> dict[str, int]:
    buffers, lines = launch.buffers.values(), launch.lines.values()
    atomic = sum(b.atomic_bytes for b in buffers)
    return {
        "loaded": sum(b.loaded_bytes for b in buffers) + atomic,
        "once": sum(b.unique_loaded_bytes for b in buffers) + atomic,
        "stored": sum(b.stored_bytes for b in buffers) + atomic,
        "sectors": sum(line.sectors for line in lines),
        "ideal": sum(line.ideal_sectors for line in lines),
        "conflicts": launch.bank_conflicts,
        "instructions": launch.warp_instructions,
        "mma": launch.mma,
        "barriers": launch.barriers,
    }


def cells(case: Case, launches: Sequence[Any]) -> list[list[str]]:
    """One line per launch; a last one for the operator if there were several."""

    def line(kernel: str, shape: str, n: dict[str, int], whole: bool) -> list[str]:
        floors = [(n["loaded"] + n["stored"]) / case.bytes, (n["once"] + n["stored"]) / case.bytes]
        return [
            f"{case.shape} {case.dtype}", kernel, shape, bytes_text(n["loaded"]),
            bytes_text(n["stored"]), *(f"{floor:.2f}" if whole else "" for floor in floors),
            str(n["sectors"]), f"{n['sectors'] / n['ideal']:.2f}" if n["ideal"] else "-",
            str(n["conflicts"]), str(n["instructions"]), str(n["mma"]), str(n["barriers"]),
        ]  # fmt: skip

    counts = [count(launch) for launch in launches]
    lines = []
    for launch, n in zip(launches, counts):
        shape = "x".join(str(n) for n in launch.grid if n > 1) or "1"
        shape += " x " + "x".join(str(n) for n in launch.block if n > 1)
        lines.append(line(kernel_name(launch.kernel), shape, n, len(launches) == 1))
    if len(launches) > 1:
        total = {name: sum(n[name] for n in counts) for name in counts[0]}
        lines.append(line("all", f"{len(launches)} launches", total, True))
    return lines


def nvcc_version(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found.group(1) if found else "unknown"


def main(ops: Sequence[str], folder: Path | None) -> int:
    """Prints the tables; writes them into `folder` as well."""
    sys.path.insert(0, str(ROOT / "tests"))
    from ptxsim import runtime

    nvcc = runtime.find_nvcc()
    if nvcc is None:
        print("--counters needs nvcc, to compile the kernels to PTX", file=sys.stderr)
        return 2
    simulated = runtime.load_ops()
    title = f"Counters, {ARCH}, commit {git_commit()}, nvcc {nvcc_version(nvcc)}"
    print(f"{title}\n\n{LEGEND}")
    parts = [f"# {title}", LEGEND]
    for op in ops:
        if not (ROOT / "csrc" / "cuda" / f"{op}.cu").exists():
            continue
        module = importlib.import_module(available()[op])
        # Shapes that a simulator can take: a module's own, where the small ones would mislead.
        counted = module.counted() if hasattr(module, "counted") else module.cases("cpu", True)
        rows = []
        for case in counted:
            inputs = case.make()
            with runtime.record(device=DEVICE) as launches:
                case.ours(simulated, *inputs)
            rows += cells(case, launches)
        print(f"\n{op}\n{layout(HEADER, rows)}", flush=True)
        parts += [f"## {op}", markdown(HEADER, rows)]
    if folder:
        path = folder / f"counters-{ARCH}.md"
        path.write_text("\n\n".join(parts) + "\n")
        print(f"\nwrote {path}")
    return 0
