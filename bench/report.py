"""What the harness measured: text tables, a comparison with an earlier run, and the Markdown tables
and SVG figures in results/ that README shows."""

import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from bench import targets

SCHEMA = 2
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


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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


def cells(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of an operator's table."""
    peers = peer_names(rows)
    end_to_end = "tok_per_s" in rows[0]
    header = ["shape", "dtype", *(["tok/s", "tokens/step", "overhead"] if end_to_end else [])]
    header += ["median", "p10-p90", "bytes", "GB/s", "ceiling", "%"]
    header += [f"x {name}" for name in peers] + ["notes"]
    lines = []
    for row in rows:
        line = [row["shape"], row["dtype"]]
        if end_to_end:
            line += [f"{row['tok_per_s']:.1f}", f"{row['tokens_per_step']:.2f}",
                     f"{row['overhead']:.1%}"]  # fmt: skip
        line += [
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
        lines.append([*line, "; ".join(row["notes"])])
    return header, lines


def table(rows: list[dict[str, Any]]) -> str:
    return layout(*cells(rows))


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


# ---- results/ ------------------------------------------------------------------------------------


def slug(machine: dict[str, Any]) -> str:
    """cpu-amd-epyc-...: names result files."""
    return f"{machine['kind']}-" + re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")


def caption(machine: dict[str, Any]) -> str:
    where = machine["device"]
    if machine["kind"] == "cpu":
        where += f", {machine['threads']} threads, {machine['isa']}"
        where += ", CPU time" if machine["clock"] == "cpu" else ""
    return f"{where}, commit {commit_text(machine)}, torch {machine['versions']['torch']}"


def by_op(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of operators, those of one operator and dtype together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["op"] != "decode":
            groups.setdefault(f"{row['op']} {row['dtype']}", []).append(row)
    return groups


def ratios(rows: list[dict[str, Any]], peer: str) -> list[float]:
    return [row["peers"][peer]["ratio"] for row in rows if row["peers"].get(peer)]


def times_text(values: list[float]) -> str:
    """Geometric mean and range."""
    if not values:
        return "-"
    text = f"{statistics.geometric_mean(values):.2f}x"
    return text if len(values) == 1 else f"{text} ({min(values):.2f}-{max(values):.2f})"


def share_text(values: list[float]) -> str:
    if not values:
        return "-"
    low, high = f"{min(values):.0%}", f"{max(values):.0%}"
    return low if low == high else f"{low}-{high}"


def decode_table(rows: list[dict[str, Any]]) -> str:
    """A line per batch and context, a column per k."""
    lengths = sorted({row["k"] for row in rows})
    header = ["batch", "context", *(f"k = {k}" for k in lengths), "transformers", "overhead"]
    lines = []
    for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in rows):
        mine = {r["k"]: r for r in rows if (r["batch"], r["context"]) == (batch, context)}
        line = [str(batch), str(context)]
        for k in lengths:
            ratio = mine[k]["peers"]["k=0"]["ratio"]
            line.append(f"{mine[k]['tok_per_s']:.1f}" + (f" ({ratio:.2f}x)" if k else ""))
        twin = mine[0]["peers"].get("transformers")
        line.append(f"{1e6 / twin['median_us']:.1f}" if twin else "-")
        lines.append([*line, share_text([r["overhead"] for r in mine.values()])])
    return markdown(header, lines)


def op_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for name, group in by_op(rows).items():
        shares = [r["of_ceiling"] for r in group if "fits in cache" not in r["notes"]]
        eager, compiled = (times_text(ratios(group, peer)) for peer in ("eager", "compile"))
        lines.append([f"`{name}`", str(len(group)), share_text(shares), eager, compiled])
    return markdown(["", "shapes", "of the ceiling", "over eager", "over torch.compile"], lines)


def results_text(result: dict[str, Any]) -> str:
    """Everything of a run, the summary first."""
    machine, rows = result["machine"], result["rows"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["op"], []).append(row)
    parts = [f"# {caption(machine)}", f"`{result['command']}`"]
    ceilings = [
        f"{kind} {found['per_second'] / 1e9:.1f} {'GFLOP/s' if kind == 'matmul' else 'GB/s'}"
        for kind, found in result["ceilings"].items()
    ]
    parts.append(f"Ceilings measured in the same run: {', '.join(ceilings)}.")
    if "decode" in groups:
        parts += ["## Decoding, tok/s", decode_table(groups["decode"])]
    if any(name != "decode" for name in groups):
        parts += ["## Operators", "Geometric mean over the shapes, and the range.", op_table(rows)]
    found = targets.table(result)
    if found:
        parts += ["## Targets", markdown(["", "target", "measured", ""], found)]
    for name, group in groups.items():
        parts += [f"## {name}", markdown(*cells(group))]
    return "\n\n".join(parts) + "\n"


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """The tables and figures of a run, under names that depend on the device only."""
    import matplotlib

    matplotlib.use("svg")
    # Text stays text: small files, and the reader's own font.
    matplotlib.rcParams.update({
        "svg.fonttype": "none", "svg.hashsalt": "mtp_ext", "font.size": 10,
        "font.family": "sans-serif", "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
        "axes.spines.top": False, "axes.spines.right": False,
    })  # fmt: skip
    folder.mkdir(exist_ok=True)
    name = slug(result["machine"])
    written = [folder / f"{name}.md"]
    written[0].write_text(results_text(result))
    figures: dict[str, Callable[[dict[str, Any]], Any]] = {
        "roofline": _roofline, "speedup": _speedup, "decode": _decode,
    }  # fmt: skip
    for kind, draw in figures.items():
        figure = draw(result)
        if figure is None:
            continue
        figure.text(0.01, 0.0, caption(result["machine"]), fontsize=8, color="0.3", va="top")
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
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    intensity = [row["flops"] / row["bytes"] for row in rows]
    low, high = min(intensity) / 2, max(2 * max(intensity), 4 * peak / bandwidth)
    xs = [low, peak / bandwidth, high]
    axes.plot(xs, [min(peak, x * bandwidth) / 1e9 for x in xs], color="0.2", linewidth=1.2)
    axes.annotate(f"{bandwidth / 1e9:.0f} GB/s read", (low, low * bandwidth / 1e9),
                  xytext=(0, 14), textcoords="offset points", fontsize=9)  # fmt: skip
    axes.annotate(f"{peak / 1e9:.0f} GFLOP/s matmul", (high, peak / 1e9), ha="right",
                  xytext=(0, 4), textcoords="offset points", fontsize=9)  # fmt: skip
    for name, group in by_op(rows).items():
        axes.plot([row["flops"] / row["bytes"] for row in group],
                  [row["flops"] / row["median_us"] / 1e3 for row in group],
                  "o", markersize=5, label=name, alpha=0.8)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="GFLOP/s",
             title="Operators under the ceilings measured in the same run")  # fmt: skip
    axes.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _speedup(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    groups = by_op(result["rows"])
    bars = {}  # by peer: place, ratios
    places, y = {}, 0.0
    for name, rows in groups.items():
        peers = [peer for peer in peer_names(rows) if ratios(rows, peer)]
        for peer in peers:
            bars.setdefault(peer, []).append((y, ratios(rows, peer)))
            y += 1
        if peers:
            places[name] = y - len(peers) / 2 - 0.5
            y += 0.6
    if not bars:
        return None
    everything = [value for found in bars.values() for _, values in found for value in values]
    smallest, largest = min([1, *everything]), max([1, *everything])
    figure = Figure(figsize=(8, 1.3 + 0.16 * y), layout="constrained")
    axes = figure.subplots()
    for peer, found in bars.items():
        means = [statistics.geometric_mean(values) for _, values in found]
        axes.barh([place for place, _ in found], [mean - 1 for mean in means], 0.9, left=1,
                  label=f"over {peer}")  # fmt: skip
        for (place, values), mean in zip(found, means):
            if len(values) > 1:
                axes.plot([min(values), max(values)], [place] * 2, color="0.35", linewidth=1)
            axes.annotate(f"{mean:.2g}", (max(values), place), xytext=(4, 0), va="center",
                          textcoords="offset points", fontsize=8)  # fmt: skip
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set_yticks(list(places.values()), list(places), fontsize=9)
    axes.set_ylim(y - 0.6, -1)
    axes.set(xscale="log", title="Times faster than peers in the same process")
    axes.set_xlabel("bar and number: geometric mean over the shapes measured; line: their range")
    ticks = [2.0**i for i in range(-9, 12) if smallest / 2 <= 2.0**i <= 1.5 * largest]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlim(smallest / 1.3, 1.6 * largest)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure


def _decode(result: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["op"] == "decode"]
    if not rows:
        return None
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for batch, context in dict.fromkeys((row["batch"], row["context"]) for row in rows):
        mine = [r for r in rows if (r["batch"], r["context"]) == (batch, context)]
        axes.plot([r["k"] for r in mine], [r["tok_per_s"] for r in mine], "o-",
                  label=f"batch {batch}, context {context}")  # fmt: skip
    twin = rows[0]["peers"].get("transformers")
    if twin:
        axes.plot([0], [1e6 / twin["median_us"]], "x", color="0.2", label="transformers, batch 1")
    axes.set(yscale="log", xlabel="drafts per step, k", ylabel="tok/s, all requests",
             title="SmolLM2-135M with the shipped head, greedy")  # fmt: skip
    low, high = (f(r["tok_per_s"] for r in rows) for f in (min, max))
    ticks = [t for t in (5 * 2**i for i in range(12)) if low / 2 < t < high * 1.5]
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.set_xticks(sorted({r["k"] for r in rows}))
    axes.minorticks_off()
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    return figure
