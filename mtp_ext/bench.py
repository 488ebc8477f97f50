"""python -m mtp_ext bench: the benchmarks live in the repository's bench/ folder."""

import importlib
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    if not (root / "bench" / "harness.py").exists():
        print(
            "mtp_ext bench: the benchmarks are part of the repository, not of the wheel. Clone it "
            "and run `make bench` there.",
            file=sys.stderr,
        )
        return 2
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.harness").main(argv)
