"""The harness itself, and a run of every benchmark on small shapes. Times are never asserted."""

import itertools
import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ptxsim.report import BufferCounts, LaunchReport, LineCounts

from bench import counters, harness, report, targets
from mtp_ext import bench as command


def options(*words: str):
    return harness.parse(["--small", "--seconds", "0", "--min-rounds", "2", *words])


@pytest.fixture(scope="module")
def ceilings() -> harness.Ceilings:
    return harness.Ceilings("cpu", scale=0.001)


def make_case(**changes) -> harness.Case:
    fields = dict(
        shape="n=4",
        dtype="f32",
        make=lambda: (torch.ones(4),),
        ours=lambda ops, x: x + 1,
        read=16,
        written=16,
        peers={"eager": lambda x: x + 1, "elsewhere": None},
    )
    return harness.Case(**(fields | changes))


def test_bytes():
    assert make_case().bytes == 32
    x = torch.ones(3, 5, dtype=torch.bfloat16)
    assert harness.nbytes(x, None, torch.ones(2, dtype=torch.int64)) == 3 * 5 * 2 + 16
    assert harness.nbytes(torch.ones(1, 5).expand(3, 5)) == 60


def test_input_sets_exceed_the_cache():
    cache = 32 * 2**20
    for size in (3 * 10**5, 33 * 10**6, 600 * 10**6):
        count = harness.set_count(size, cache)
        assert (count == 1 and size > 2 * cache) or count * size >= 2 * cache
    assert harness.set_count(0, cache) == harness.MAX_SETS


def test_rotation_is_shared_by_all_contenders():
    inputs = harness.Rotation([(0,), (1,), (2,)])
    seen: list[tuple[str, int]] = []
    timers = {
        name: harness.CpuTimer(
            lambda i, name=name: seen.append((name, i)), inputs, time.perf_counter
        )
        for name in ("a", "b")
    }
    for timer in timers.values():
        timer.calls = 2
    seen.clear()
    start = inputs.next()[0]
    harness.interleave({n: t.sample for n, t in timers.items()}, 0, 3, 3)
    assert [i for _, i in seen] == [(start + 1 + i) % 3 for i in range(12)]


def test_interleaving_takes_everyone_once_per_round_in_changing_order():
    calls: list[str] = []

    def contender(name: str):
        return lambda: calls.append(name) or float(len(calls))

    samples = harness.interleave({n: contender(n) for n in "abcd"}, 60, 20, 20)
    rounds = [tuple(calls[i : i + 4]) for i in range(0, 80, 4)]
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 5 and len({r[0] for r in rounds}) == 4
    assert all(len(s) == 20 for s in samples.values())


def test_rounds_end_with_the_time_but_not_before_the_minimum():
    def run(seconds, least, most):
        return len(harness.interleave({"a": lambda: 0.0}, seconds, least, most)["a"])

    assert run(0, 7, 50) == 3  # ten times the time is over: three rounds are kept
    assert run(60, 7, 50) == 50


def test_statistics():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert harness.quantile(values, 0) == 1 and harness.quantile(values, 1) == 5
    assert harness.quantile(values, 0.1) == pytest.approx(1.4)
    assert harness.spread(values) == pytest.approx((4.6 - 1.4) / 3)
    # A disturbance that hits both sides of a round leaves the ratio alone.
    assert harness.paired_ratio([2, 2, 20, 2], [1, 1, 10, 1]) == 2


def test_row(ceilings):
    row = harness.run_case("op", make_case(), ceilings, options("--peers", "--no-compile"))
    assert row["bytes"] == 32 and row["bound"] == "copy"
    assert row["rounds"] >= 2 and row["sets"] == harness.MAX_SETS
    assert row["gb_per_s"] == pytest.approx(32 / row["median_us"] / 1e3)
    assert row["peers"]["elsewhere"] is None and row["missing"] == {"elsewhere": "not installed"}
    assert row["peers"]["eager"]["ratio"] > 0
    assert "fits in cache" in row["notes"]
    json.dumps(row)


def test_failing_peer_is_a_dash_with_a_reason(ceilings):
    def fails(x):
        raise NotImplementedError("no bf16 here\nmore")

    case = make_case(peers={"eager": lambda x: x, "broken": fails})
    row = harness.run_case("op", case, ceilings, options("--peers", "--no-compile"))
    assert row["peers"]["broken"] is None
    assert row["missing"]["broken"] == "NotImplementedError: no bf16 here"
    with pytest.raises(NotImplementedError):
        harness.run_case("op", make_case(ours=lambda ops, x: fails(x)), ceilings, options())


def test_disagreement_with_eager_is_an_error(ceilings):
    case = make_case(ours=lambda ops, x: x, check=torch.testing.assert_close)
    with pytest.raises(AssertionError):
        harness.run_case("op", case, ceilings, options("--peers", "--no-compile"))


def test_check_sees_the_same_inputs_twice(ceilings):
    """An operator that writes into its inputs does not hand its result to eager."""

    def doubles(x):
        return x.mul_(2)

    def check(ours, eager):
        assert ours.data_ptr() != eager.data_ptr()
        assert torch.equal(ours, eager)

    case = make_case(ours=lambda ops, x: doubles(x), peers={"eager": doubles}, check=check)
    harness.run_case("op", case, ceilings, options("--peers", "--no-compile"))


def make_report(kernel: str, **changes):
    fields = dict(kernel=kernel, grid=(4, 2, 1), block=(128, 1, 1), dynamic_smem=0, static_smem=0,
                  warp_instructions=100, barriers=3)  # fmt: skip
    launch = LaunchReport(**(fields | changes))
    launch.buffers["x"] = BufferCounts(loaded_bytes=40, unique_loaded_bytes=24, load_sectors=4)
    launch.buffers["out"] = BufferCounts(stored_bytes=24)
    launch.lines[1] = LineCounts(1, "ld", "", "global", sectors=6, ideal_sectors=4)
    launch.lines[2] = LineCounts(2, "ld", "", "shared", wavefronts=5, ideal_wavefronts=2)
    return launch


def test_counters():
    case = make_case()
    (line,) = counters.cells(case, [make_report("_ZN3mtp4cuda6kernelIfEEvi")])
    row = dict(zip(counters.HEADER, line))
    assert row["grid x block"] == "4x2 x 128" and row["loaded"] == "40 B"
    assert row["x floor"] == "2.00" and row["once x floor"] == "1.50"
    assert row["sectors"] == "6" and row["x ideal sectors"] == "1.50"
    assert row["bank conflicts"] == "3" and row["warp instructions"] == "100"
    launches = [make_report("split"), make_report("combine", grid=(1, 1, 1))]
    *parts, whole = counters.cells(case, launches)
    assert [dict(zip(counters.HEADER, p))["x floor"] for p in parts] == ["", ""]
    row = dict(zip(counters.HEADER, whole))
    assert row["kernel"] == "all" and row["x floor"] == "4.00" and row["barriers"] == "6"


def test_kernel_names_are_readable():
    assert counters.kernel_name("mtp::cuda::(anonymous namespace)::split<4, 2>(P)") == "split"
    assert counters.kernel_name("plain") == "plain"


def test_noise_is_said(ceilings, monkeypatch):
    steps = iter([1.0, 1.0, 1.0, 3.0, 3.0] * 100)
    monkeypatch.setattr(harness.CpuTimer, "sample", lambda self: next(steps))
    row = harness.run_case("op", make_case(), ceilings, options("--seconds", "60"))
    assert row["noise"] > harness.NOISE_LIMIT
    assert any(note.startswith("noise ") for note in row["notes"])


def test_ceiling_is_the_one_met_first(ceilings):
    read, peak = (ceilings.found[k]["per_second"] for k in ("read", "matmul"))
    assert ceilings.bound(make_case(read=100, written=1)) == "read"
    assert ceilings.bound(make_case(read=1, written=100)) == "copy"
    flops = int(1e6 * peak / read)
    assert ceilings.bound(make_case(read=10**6, written=0, flops=2 * flops)) == "matmul"
    assert ceilings.bound(make_case(read=10**6, written=0, flops=flops // 2)) == "read"


def test_a_sample_is_the_median_of_calls_in_a_row():
    durations = [5.0, 0.01, 0.01, 0.01, 7.0]  # the first call is a slow one, and the last
    for scale, calls in ((1e-9, 20_000), (1, 3), (harness.LONG_SECONDS / 0.01, 1)):
        now, count = [0.0], itertools.count()

        def call(n, now=now, count=count, scale=scale):
            now[0] += durations[next(count) % 5] * scale

        timer = harness.CpuTimer(call, harness.Rotation([(0,)]), lambda now=now: now[0])
        assert timer.calls == calls
        assert scale != 1 or timer.sample() == pytest.approx(0.01)


def make_row(op="op", shape="M=1", us=100.0, noise=0.02, **changes) -> dict:
    row = dict(
        op=op, shape=shape, dtype="bf16", median_us=us, p10_us=us, p90_us=us, noise=noise,
        bytes=1000, flops=2000, gb_per_s=1.0, bound="read", of_ceiling=0.5, notes=[],
        peers={"eager": {"ratio": 2.0}, "flashinfer": None},
    )  # fmt: skip
    return row | changes


def make_result(*rows: dict, **machine) -> dict:
    ceilings = {
        kind: {"probe": "p", "per_second": 1e10, "noise": 0.0}
        for kind in ("read", "copy", "matmul")
    }
    described = dict(kind="cpu", device="Some CPU", cores=2, threads=2, isa="avx2", clock="wall",
                     compiler="c", commit="abc", versions={"torch": "1"})  # fmt: skip
    return {
        "command": "bench",
        "machine": described | machine,
        "ceilings": ceilings,
        "rows": list(rows),
    }


def test_table_shows_a_missing_peer_as_a_dash():
    header, line = report.table([make_row(notes=["noise 12%"])]).splitlines()
    assert "x eager" in header and "x flashinfer" in header
    assert line.split()[-4:] == ["2.00", "-", "noise", "12%"]


def test_compare():
    old = make_result(make_row("a"), make_row("b"), make_row("c", noise=0.5), make_row("gone"))
    new = make_result(make_row("a", us=150), make_row("b", us=101), make_row("c", us=140),
                      make_row("added"), threads=1, commit="def")  # fmt: skip
    lines = report.compare(old, new).splitlines()
    assert lines[0] == "change from abc to def"
    assert lines[1] == "not comparable: threads was 2, is 1"
    verdicts = {line.split()[0]: line for line in lines[3:]}
    assert "1.50" in verdicts["a"] and verdicts["a"].endswith("slower")
    assert verdicts["b"].endswith("same")
    assert verdicts["c"].endswith("same, noisy")
    assert verdicts["added"].endswith("new")
    assert verdicts["gone"].endswith("not run")


def test_results_carry_device_and_commit(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [make_row(), make_row(shape="M=8"), *make_decode_rows()]
    paths = report.write(make_result(*rows), tmp_path)
    assert [p.name for p in paths] == [
        "cpu-some-cpu.md",
        "cpu-some-cpu-roofline.svg",
        "cpu-some-cpu-speedup.svg",
        "cpu-some-cpu-decode.svg",
    ]
    for path in paths:
        assert "Some CPU" in path.read_text() and "commit abc" in path.read_text()
        assert path.stat().st_size < 50_000


def make_decode_rows() -> list[dict]:
    extra = dict(batch=1, context=44, tok_per_s=10.0, tokens_per_step=1.0, overhead=0.07, flops=0)
    return [
        make_row("decode", f"k={k} B=1 ctx=44", us=1e5, k=k, **extra,
                 peers={"k=0": {"ratio": 1.0 + k / 4}, "transformers": None})
        for k in (0, 1)
    ]  # fmt: skip


def test_results_text():
    def peers(ratio):
        return {"eager": {"ratio": ratio}, "compile": None}

    rows = [
        make_row("a", peers=peers(2.0), of_ceiling=0.6),
        make_row("a", "M=8", peers=peers(8.0), of_ceiling=0.9),
        make_row("a", "M=9", peers=peers(1.0), of_ceiling=9.0, dtype="int8",
                 notes=["fits in cache"]),
        *make_decode_rows(),
    ]  # fmt: skip
    text = report.results_text(make_result(*rows))
    assert "| `a bf16` | 2 | 60%-90% | 4.00x (2.00-8.00) | - |" in text
    assert "| `a int8` | 1 | - | 1.00x | - |" in text
    assert "| 1 | 44 | 10.0 | 10.0 (1.25x) | - | 7% |" in text
    assert "| k=1 B=1 ctx=44 | bf16 | 10.0 | 1.00 | 7.0% |" in text
    assert "decoding: Python and dispatch of a step, batch 1 | <= 10.0% | 7.0% | met" in text


def test_targets():
    def row(op, shape, us, ratio, **changes):
        return make_row(op, shape, us=us, peers={"eager": {"ratio": ratio}}, **changes)

    head = [
        row("head_topk", f"M={m} V=49152 H=576 k=8", us, ratio, dtype=dtype, of_ceiling=share)
        for m, us, ratio, dtype, share in (
            (1, 100, 1.5, "bf16", 0.9), (16, 100, 1.1, "bf16", 0.95), (1, 50, 2.5, "int8", 0.8),
        )
    ]  # fmt: skip
    other = row("head_topk", "M=1 V=12288 H=576 k=8", 100, 0.1, of_ceiling=0.1)  # no target
    sampling = [
        row("rejection_sample", f"B={b} n=3 V=151936 top_p=0.9", us, ratio, dtype="f32")
        for b, us, ratio in ((1, 200, 3.0), (16, 1000, 12.0))
    ]
    found = {line[0]: line[1:] for line in targets.table(make_result(*head, other, *sampling))}
    assert found == {
        "`head_topk` of the read bandwidth, M = 1..16": [">= 85%", "90%", "met"],
        "`head_topk` over linear, topk and logsumexp": [">= 1.20x", "1.10x", "missed"],
        "`head_topk`, time in bf16 over int8": [">= 1.70x", "2.00x", "met"],
        "`rejection_sample` over eager, 16 requests, top_p=0.9": [">= 10.00x", "12.00x", "met"],
        "`rejection_sample`, time of 1 request over 16, top_p=0.9": [
            "<= 0.125x", "0.200x", "missed",
        ],
    }  # fmt: skip


def test_command_says_when_it_runs_without_the_repository(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "__file__", str(tmp_path / "site-packages/mtp_ext/bench.py"))
    assert command.main([]) == 2
    assert "not of the wheel" in capsys.readouterr().err


def test_unknown_operator_is_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["no_such_op"])
    assert "no benchmark for no_such_op; there are" in capsys.readouterr().err


def test_only_selects_rows(ceilings):
    rows = list(harness.run_op("eh_proj", ceilings, options("--only", "no such shape")))
    assert rows == []


def test_cpu_time_needs_one_thread(monkeypatch, capsys):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with pytest.raises(SystemExit):
        options("--clock", "cpu")
    assert "set OMP_NUM_THREADS=1" in capsys.readouterr().err
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert options("--clock", "cpu").clock == "cpu"


def test_command_end_to_end(tmp_path, monkeypatch, capsys):
    first = harness.Ceilings("cpu", scale=0.001)
    monkeypatch.setattr(harness, "Ceilings", lambda *_: first)
    words = ["philox_uniform", "--small", "--seconds", "0", "--min-rounds", "1"]
    path = tmp_path / "new" / "old.json"
    assert command.main([*words, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert set(result) == {"schema", "command", "machine", "ceilings", "rows"}
    machine = result["machine"]
    for key in ("device", "cpu", "cores", "threads", "isa", "commit", "versions"):
        assert machine[key], key
    assert machine["versions"]["torch"] == torch.__version__
    assert set(result["ceilings"]) == {"read", "copy", "matmul"}
    assert command.main(["--from", str(path), "--compare", str(path)]) == 0
    assert "change from" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--json", "--compare", "--from"])
def test_files_are_checked_before_anything_is_measured(option, tmp_path, capsys):
    wrong = tmp_path / "wrong"
    wrong.write_text("not a result")
    path = wrong / "result.json" if option == "--json" else wrong
    with pytest.raises(SystemExit):
        options(option, str(path))
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.parametrize("op", list(harness.available()))
def test_every_benchmark_runs(op, ceilings):
    table = list(harness.run_op(op, ceilings, options("--peers", "--no-compile")))
    assert table and report.table(table)
    for row in table:
        assert set(row["missing"].values()) <= {"not installed"}, row["missing"]
        json.dumps(row)
