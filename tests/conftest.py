"""The `backend` fixture: where an operator's tests run.

A test that takes `backend` runs once for each place that exists on this machine:

  cpu      torch.ops.mtp on CPU tensors
  cuda     torch.ops.mtp on CUDA tensors, if there is a GPU and the operator has a kernel
  ptxsim   the CUDA kernel and its launcher on CPU tensors, executed by tests/ptxsim, if nvcc is
           there and the operator has a kernel: once as sm_90a code on an H100's limits, once as
           sm_80 code on an A100's

A test that also takes `simulator` (tests/ptxsim/runtime.py, with the counts and the schedules) runs
on the simulator only.

The operator is the test file's own name: tests/test_<op>.py. `pytest -k "ptxsim and <op>"` selects,
`-k "sm_80 and <op>"` one architecture.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SIMULATED = {"ptxsim-sm_90a": "h100", "ptxsim-sm_80": "a100"}
sys.path.insert(0, str(ROOT / "tests"))

from ptxsim.harness import nvcc  # noqa: E402

import mtp_ext  # noqa: E402


@dataclass(frozen=True)
class Backend:
    """`ops.<op>(...)` runs the operator; inputs go on `device`."""

    name: str
    device: str
    ops: Any

    def __str__(self) -> str:
        return self.name


def _has_kernel(op: str) -> bool:
    return (ROOT / "csrc" / "cuda" / f"{op}.cu").exists()


def _has_simulator() -> bool:
    return nvcc() is not None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    op = Path(metafunc.module.__file__).stem.removeprefix("test_")
    names = ["cpu"]
    if _has_kernel(op):
        if torch.cuda.is_available() and mtp_ext.build_info()["cuda_archs"]:
            names.append("cuda")
        if _has_simulator():
            names += SIMULATED
    if "simulator" in metafunc.fixturenames:
        names = [name for name in names if name in SIMULATED]
    metafunc.parametrize("backend", names, indirect=True, scope="module")


@pytest.fixture(scope="module")  # so that a module without it finds the simulator as it begins
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if request.param not in SIMULATED:
        yield Backend(request.param, request.param, torch.ops.mtp)
        return
    from ptxsim import runtime

    with runtime.use_device(SIMULATED[request.param]):
        yield Backend("ptxsim", "cpu", runtime.load_ops())


@pytest.fixture
def simulator(backend: Backend) -> ModuleType:
    from ptxsim import runtime

    return runtime


def pytest_report_header() -> list[str]:
    info = mtp_ext.build_info()
    lines = [f"mtp_ext {info['version']} {info['commit']}, cpu {info['cpu_isa']}"]
    if not _has_simulator():
        lines.append("no nvcc: the CUDA kernels are not executed on the simulator")
    return lines
