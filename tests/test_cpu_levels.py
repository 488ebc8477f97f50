"""Every instruction-set level below this processor's best one, forced as a user forces it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mtp_ext

HERE = Path(__file__).resolve().parent
LEVELS = ["generic", "avx2", "avx512", "avx512_bf16", "amx"]
COMPILED = mtp_ext.build_info()["cpu_isa_compiled"].split(",")
BEST = LEVELS.index(mtp_ext.build_info()["cpu_isa"])
# Where levels differ in more than the width of their vectors.
FILES = ["skinny_linear", "head_topk", "eh_proj", "verify_attention", "rejection_sample"]


@pytest.mark.parametrize("level", LEVELS[:-1])
def test_lower_levels_give_right_results(level):
    if level not in COMPILED or LEVELS.index(level) >= BEST:
        pytest.skip(f"{level} is this processor's level, above it or not compiled")
    env = os.environ | {"MTP_CPU_ISA": level}
    code = "import mtp_ext; print(mtp_ext.build_info()['cpu_isa'])"
    used = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=HERE.parent, capture_output=True, text=True
    )
    assert used.stdout.strip() == level, used.stderr
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k",
         "cpu and (reference or row)",
         *(f"tests/test_{name}.py" for name in FILES)],
        env=env, cwd=HERE.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-4000:]
