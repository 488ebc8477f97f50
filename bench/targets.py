"""What the operators are meant to reach on a CPU, beside what a run measured."""

from typing import Any

Row = dict[str, Any]
SMOLLM2 = ("960x576", "576x576", "3072x576", "576x1536")
HEADS = (("V=49152", "H=576"), ("V=151936", "H=2048"))


def table(result: dict[str, Any]) -> list[list[str]]:
    """Lines of name, target, measured and met or missed: the worst of the rows that the target
    names. Targets whose rows were not run, or not beside their peer, are left out."""
    lines: list[list[str]] = []

    def rows(op: str, *words: str) -> list[Row]:
        return [
            row
            for row in result["rows"]
            if row["op"] == op and set(words) <= {*row["shape"].split(), row["dtype"]}
        ]

    def over_eager(found: list[Row]) -> list[float]:
        return [row["peers"]["eager"]["ratio"] for row in found if row["peers"].get("eager")]

    def of_read(found: list[Row]) -> list[float]:
        read = result["ceilings"]["read"]["per_second"]
        return [
            row["of_ceiling"] if row["bound"] == "read" else row["gb_per_s"] * 1e9 / read
            for row in found
        ]

    def times(above: list[Row], below: list[Row]) -> list[float]:
        return [a["median_us"] / b["median_us"] for a, b in zip(above, below)]

    def add(name: str, sign: str, bound: float, values: list[float], form: str = "{:.2f}x") -> None:
        if not values:
            return
        worst = min(values) if sign == ">=" else max(values)
        met = worst >= bound if sign == ">=" else worst <= bound
        lines.append([name, f"{sign} {form.format(bound)}", form.format(worst),
                      "met" if met else "missed"])  # fmt: skip

    def linear(m: int) -> list[Row]:
        return [r for s in SMOLLM2 for r in rows("skinny_linear", f"M={m}", s, "bf16")]

    name = "`skinny_linear` over torch's linear, M = 1..8, SmolLM2's layers"
    add(name, ">=", 1.3, over_eager([r for m in (1, 2, 4, 8) for r in linear(m)]))
    if "amx" in result["machine"]["isa"]:
        add("`skinny_linear`, time at M = 8 over M = 1", "<=", 1.15, times(linear(8), linear(1)))

    bf16 = [r for shape in HEADS for r in rows("head_topk", *shape, "bf16")]
    int8 = [r for shape in HEADS for r in rows("head_topk", *shape, "int8")]
    twin = {row["shape"]: row for row in bf16}
    int8 = [row for row in int8 if row["shape"] in twin]
    add("`head_topk` of the read bandwidth, M = 1..16", ">=", 0.85, of_read(bf16), "{:.0%}")
    add("`head_topk` over linear, topk and logsumexp", ">=", 1.2, over_eager(bf16))
    name = "`head_topk`, time in bf16 over int8"
    add(name, ">=", 1.7, times([twin[row["shape"]] for row in int8], int8))

    add("`eh_proj` over eager, M = 1..16", ">=", 1.3, over_eager(rows("eh_proj")))

    attention = rows("verify_attention", "B=4", "q=4", "ctx=4096")
    name = "`verify_attention` of the read bandwidth, 4 requests, 4 rows, context 4k"
    add(name, ">=", 0.7, of_read(attention), "{:.0%}")
    name = "`verify_attention` over gather and scaled_dot_product_attention"
    add(name, ">=", 3, over_eager(attention))
    q8, q1 = (rows("verify_attention", "ctx=16384", f"q={q}") for q in (8, 1))
    add("`verify_attention`, time of 8 rows over 1, context 16k", "<=", 1.15, times(q8, q1))

    for filters, bound in (("", 4), (" top_p=0.9", 10), (" top_k=50", 8)):
        one, sixteen = (
            [r for r in rows("rejection_sample", "f32") if r["shape"] == shape + filters]
            for shape in ("B=1 n=3 V=151936", "B=16 n=3 V=151936")
        )
        name = f"`rejection_sample` over eager, 16 requests,{filters or ' no filters'}"
        add(name, ">=", bound, over_eager(sixteen))
        name = f"`rejection_sample`, time of 1 request over 16,{filters or ' no filters'}"
        add(name, "<=", 0.125, times(one, sixteen), "{:.3f}x")

    name = "decoding: Python and dispatch of a step, batch 1"
    add(name, "<=", 0.1, [row["overhead"] for row in rows("decode", "B=1")], "{:.1%}")

    loss = rows("linear_mtp_loss", "K=3", "T=2048", "V=49152", "H=576", "bf16")
    add("`linear_mtp_loss` over eager", ">=", 1, over_eager(loss))
    peaks = [row["peak_bytes"] for row in loss]
    saved = [p["eager"] / max(1, p["ours"]) for p in peaks if p.get("eager") and p["ours"]]
    add("`linear_mtp_loss`, eager's peak of extra memory over its own", ">=", 10, saved, "{:.0f}x")
    return lines
