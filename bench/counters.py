"""Counts of the CUDA kernels executed on the simulator (tests/ptxsim). Exact, and never times."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from bench.harness import HERE, Case, git_commit, load_cases
from bench.report import bytes_text, layout

ROOT = HERE.parent
TITLE = "Counts, not times: the PTX that ships, executed on the simulator (H100 limits), commit "
HEADER = [
    "shape", "kernel", "grid x block", "loaded", "stored", "x floor", "x ideal sectors",
    "bank conflicts", "warp instructions", "mma", "barriers", "",
]  # fmt: skip


def kernel_name(mangled: str) -> str:
    """namespace::kernel<arguments>(parameters) as kernel."""
    name = mangled
    if shutil.which("c++filt"):
        name = subprocess.run(["c++filt", name], capture_output=True, text=True).stdout.strip()
    found = re.search(r"(\w+)\s*(?:<.*)?\(", name)
    return found.group(1) if found else name


def cells(case: Case, launches: Sequence[Any]) -> list[list[str]]:
    """One line per launch; a last one for the operator if there were several."""
    totals = {"loaded": 0, "stored": 0, "conflicts": 0, "instructions": 0, "mma": 0, "barriers": 0}
    sectors = ideal = 0
    lines = []
    for launch in launches:
        buffers = launch.buffers.values()
        counts = {
            "loaded": sum(b.loaded_bytes + b.atomic_bytes for b in buffers),
            "stored": sum(b.stored_bytes + b.atomic_bytes for b in buffers),
            "conflicts": launch.bank_conflicts,
            "instructions": launch.warp_instructions,
            "mma": launch.mma,
            "barriers": launch.barriers,
        }
        moved = sum(line.sectors for line in launch.lines.values())
        needed = sum(line.ideal_sectors for line in launch.lines.values())
        sectors, ideal = sectors + moved, ideal + needed
        for name in totals:
            totals[name] += counts[name]
        shape = "x".join(str(n) for n in launch.grid if n > 1) or "1"
        shape += " x " + "x".join(str(n) for n in launch.block if n > 1)
        lines.append(_line(case, kernel_name(launch.kernel), shape, counts, moved, needed, False))
    if len(launches) == 1:
        return [_line(case, kernel_name(launches[0].kernel), shape, totals, sectors, ideal, True)]
    return [*lines, _line(case, "all", f"{len(launches)} launches", totals, sectors, ideal, True)]


def _line(
    case: Case,
    kernel: str,
    shape: str,
    counts: dict[str, int],
    moved: int,
    needed: int,
    whole: bool,
) -> list[str]:
    floor = (counts["loaded"] + counts["stored"]) / case.bytes
    return [
        f"{case.shape} {case.dtype}", kernel, shape, bytes_text(counts["loaded"]),
        bytes_text(counts["stored"]), f"{floor:.2f}" if whole else "",
        f"{moved / needed:.2f}" if needed else "-", str(counts["conflicts"]),
        str(counts["instructions"]), str(counts["mma"]), str(counts["barriers"]), "",
    ]  # fmt: skip


def main(ops: Sequence[str]) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from ptxsim import runtime

    if runtime.find_nvcc() is None:
        print("--counters needs nvcc, to compile the kernels to PTX", file=sys.stderr)
        return 2
    simulated = runtime.load_ops()
    print(TITLE + git_commit())
    for op in ops:
        if not (ROOT / "csrc" / "cuda" / f"{op}.cu").exists():
            continue
        rows = []
        for case in load_cases(op, "cpu", small=True):
            inputs = case.make()
            with runtime.record() as launches:
                case.ours(simulated, *inputs)
            rows += cells(case, launches)
        print(f"\n{op}\n{layout(HEADER, rows)}", flush=True)
    return 0
