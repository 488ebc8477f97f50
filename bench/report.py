"""What the harness measured, as text tables, as a comparison with an earlier run, and as SVG."""

import re
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float8_e4m3fn": "fp8"}


def dtype_name(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return NAMES.get(name, name)


def layout(header: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell; the first two, texts, to the left."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    last = len(header) - 1
    lines = []
    for row in [header, *rows]:
        cells = [
            cell.ljust(width) if i < 2 or i == last else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def time_text(microseconds: float) -> str:
    if microseconds >= 1e4:
        return f"{microseconds / 1e3:.1f} ms"
    return f"{microseconds:.1f} us" if microseconds < 100 else f"{microseconds:.0f} us"


def bytes_text(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def commit_text(machine: dict[str, Any]) -> str:
    """The commit that was measured: of the compiled kernels too, where that is another one."""
    commit, built = machine["commit"], machine.get("build_commit", machine["commit"])
    return commit if commit.startswith(built) else f"{commit}, kernels built from {built}"


def headline(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    where = machine["device"]
    if machine["kind"] == "cpu":
        where += f", {machine['threads']} threads on {machine['cores']} cores, {machine['isa']}"
        where += ", CPU time" if machine["clock"] == "cpu" else ""
    return f"{where}\ncommit {commit_text(machine)}; {versions}"


def ceiling_lines(ceilings: dict[str, dict[str, Any]]) -> str:
    rows = []
    for kind, found in ceilings.items():
        unit = "GFLOP/s" if kind == "matmul" else "GB/s"
        rows.append([kind, found["probe"], f"{found['per_second'] / 1e9:.1f} {unit}",
                     f"noise {found['noise']:.0%}"])  # fmt: skip
    return "ceilings, measured now\n" + layout(["", "best probe", "", ""], rows)


def peer_names(rows: list[dict[str, Any]]) -> list[str]:
    names = {name: None for row in rows for name in row["peers"]}
    return [n for n in ("eager", "compile") if n in names] + [
        n for n in names if n not in ("eager", "compile")
    ]


def table(rows: list[dict[str, Any]]) -> str:
    peers = peer_names(rows)
    speed = ["tok/s", "tokens/step"] if "tok_per_s" in rows[0] else []
    header = ["shape", "dtype", *speed, "median", "p10-p90", "bytes", "GB/s", "ceiling", "%"]
    header += [f"x {name}" for name in peers] + ["notes"]
    cells = []
    for row in rows:
        line = [
            row["shape"],
            row["dtype"],
            *([f"{row['tok_per_s']:.1f}", f"{row['tokens_per_step']:.2f}"] if speed else []),
            time_text(row["median_us"]),
            f"{time_text(row['p10_us'])} - {time_text(row['p90_us'])}",
            bytes_text(row["bytes"]),
            f"{row['gb_per_s']:.1f}",
            row["bound"],
            f"{row['of_ceiling']:.0%}",
        ]
        for name in peers:
            peer = row["peers"].get(name)
            line.append(f"{peer['ratio']:.2f}" if peer else "-")
        cells.append([*line, "; ".join(row["notes"])])
    return layout(header, cells)


# ---- comparison ----------------------------------------------------------------------------------


def compare(old: dict[str, Any], new: dict[str, Any]) -> str:
    """One line per row in either run. A change counts only where it exceeds the noise of both."""
    lines = [f"change from {old['machine']['commit']} to {new['machine']['commit']}"]
    for key in ("device", "cores", "threads", "isa", "clock", "compiler"):
        before, after = old["machine"].get(key), new["machine"].get(key)
        if before != after:
            lines.append(f"not comparable: {key} was {before}, is {after}")

    def keyed(result: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
        return {(row["op"], row["shape"], row["dtype"]): row for row in result["rows"]}

    before, after = keyed(old), keyed(new)
    cells = []
    for key in list(after) + [key for key in before if key not in after]:
        name = [f"{key[0]} {key[1]}", key[2]]
        if key not in before or key not in after:
            row = after.get(key) or before[key]
            cell = time_text(row["median_us"])
            cells.append(
                [*name, *(["-", cell] if key in after else [cell, "-"]), "-", "-",
                 "new" if key in after else "not run"]
            )  # fmt: skip
            continue
        a, b = before[key], after[key]
        ratio = b["median_us"] / a["median_us"]
        margin = 1 + max(a["noise"], b["noise"], 0.03)
        verdict = "slower" if ratio > margin else "faster" if ratio < 1 / margin else "same"
        if max(a["noise"], b["noise"]) > 0.10:
            verdict += ", noisy"
        cells.append([
            *name, time_text(a["median_us"]), time_text(b["median_us"]), f"{ratio:.2f}",
            f"{a['of_ceiling']:.0%} -> {b['of_ceiling']:.0%}", verdict,
        ])  # fmt: skip
    header = ["case", "dtype", "before", "now", "time ratio", "% of ceiling", "verdict"]
    return "\n".join(lines) + "\n" + layout(header, cells)


# ---- plots ---------------------------------------------------------------------------------------


def slug(machine: dict[str, Any]) -> str:
    """cpu-amd-epyc-...: names result files."""
    return f"{machine['kind']}-" + re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")


def caption(machine: dict[str, Any]) -> str:
    where = machine["device"]
    if machine["kind"] == "cpu":
        where += f", {machine['threads']} threads, {machine['isa']}"
        where += ", CPU time" if machine["clock"] == "cpu" else ""
    return f"{where}, commit {commit_text(machine)}, torch {machine['versions']['torch']}"


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "mtp_ext", "font.size": 9})
    folder.mkdir(exist_ok=True)
    name = slug(result["machine"])
    written = []
    for kind, draw in (("roofline", _roofline), ("speedup", _speedup)):
        figure = draw(result)
        if figure is None:
            continue
        figure.text(0.01, 0.005, caption(result["machine"]), fontsize=7, color="0.35")
        path = folder / f"{name}-{kind}.svg"
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
        written.append(path)
    return written


def _roofline(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["flops"]]
    if not rows:
        return None
    bandwidth = result["ceilings"]["read"]["per_second"]
    peak = result["ceilings"]["matmul"]["per_second"]
    figure = Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensity) / 2, max(2 * max(intensity), 4 * peak / bandwidth)
    xs = [low, peak / bandwidth, high]
    axes.plot(xs, [min(peak, x * bandwidth) / 1e9 for x in xs], color="0.2", linewidth=1.2)
    axes.annotate(f"{bandwidth / 1e9:.0f} GB/s read", (low, low * bandwidth / 1e9),
                  xytext=(4, 10), textcoords="offset points", fontsize=8)  # fmt: skip
    axes.annotate(f"{peak / 1e9:.0f} GFLOP/s matmul", (high, peak / 1e9), ha="right",
                  xytext=(0, 4), textcoords="offset points", fontsize=8)  # fmt: skip
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        axes.scatter([row["flops"] / row["bytes"] for row in mine],
                     [row["flops"] / row["median_us"] / 1e3 for row in mine],
                     s=22, label=op, alpha=0.8)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s",
             title="Measured ceilings and operators")  # fmt: skip
    axes.legend(fontsize=8, loc="lower right")
    return figure


def _speedup(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if any(row["peers"].values())]
    if not rows:
        return None
    peers = [n for n in peer_names(rows) if any(row["peers"].get(n) for row in rows)]
    figure = Figure(figsize=(8, 1 + 0.16 * (len(peers) + 1) * len(rows)))
    axes = figure.subplots()
    height = 0.8 / len(peers)
    for i, name in enumerate(peers):
        places = [y + i * height for y, row in enumerate(rows) if row["peers"].get(name)]
        ratios = [row["peers"][name]["ratio"] for row in rows if row["peers"].get(name)]
        bars = axes.barh(places, ratios, height, align="edge", label=f"over {name}")
        axes.bar_label(bars, fmt="%.2g", fontsize=7, padding=2)
    axes.axvline(1, color="0.2", linewidth=1)
    labels = []
    for row in rows:
        noisy = " *" if row["notes"] and "noise" in "".join(row["notes"]) else ""
        labels.append(f"{row['op']} {row['shape']} {row['dtype']}{noisy}")
    axes.set_yticks([y + 0.4 for y in range(len(rows))], labels, fontsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="times faster (* noise above 10%)", title="Speed-up over peers")
    axes.legend(fontsize=8)
    return figure
