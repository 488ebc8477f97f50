"""Builds mtp_ext._C with CMake and Ninja in a persistent folder, so rebuilds are incremental.

Environment: MTP_CUDA, TORCH_CUDA_ARCH_LIST, CUDA_HOME (cmake/Cuda.cmake), MTP_CPU_ISA_LEVELS
(cmake/CpuKernels.cmake), MAX_JOBS, MTP_BUILD_DIR.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
GIB_PER_JOB = 2.0


def version() -> str:
    text = (ROOT / "mtp_ext" / "version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text).group(1)


def job_count() -> int:
    """MAX_JOBS, or as many compilers as both the cores and the free memory carry."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        by_memory = int(int(free.group(1)) / 2**20 / GIB_PER_JOB)
    except (OSError, AttributeError):
        by_memory = cores
    return max(1, min(cores or 1, by_memory))


def require_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        sys.exit(
            f"mtp_ext: torch cannot be imported at build time ({error}).\n"
            "The extension is compiled against the torch you run, which pip's isolated build\n"
            "environment hides. Install torch and the build tools, then build without isolation:\n"
            "    pip install torch pybind11 cmake ninja setuptools\n"
            "    pip install --no-build-isolation ."
        )


def require_compiler() -> None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        sys.exit(
            f"mtp_ext: no C++ compiler found (looked for {', '.join(names)}).\n"
            "Install one (Debian, Ubuntu: apt-get install g++) or set CXX to its path."
        )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        require_torch()
        require_compiler()
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        build = Path(os.environ.get("MTP_BUILD_DIR") or ROOT / "build" / tag)
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DMTP_VERSION={version()}",
            f"-DMTP_OUTPUT_DIR={output}",
            f"-DMTP_CPU_ISA_LEVELS={os.environ.get('MTP_CPU_ISA_LEVELS', '')}",
        ]  # fmt: skip
        for command in (configure, ["cmake", "--build", str(build), f"-j{job_count()}"]):
            try:
                subprocess.run(command, check=True)
            except FileNotFoundError:
                sys.exit("mtp_ext: cmake not found; pip install cmake ninja")
            except subprocess.CalledProcessError as error:
                sys.exit(f"mtp_ext: '{' '.join(command[:2])}' failed with {error.returncode}; "
                         "the cause is printed above")  # fmt: skip


setup(
    version=version(),
    ext_modules=[Extension("mtp_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
