"""Builds and imports as a user meets them: each failure names its cause and the command to run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mtp_ext

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str, check: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Runs `words` in the repository; a variable given as "" is unset."""
    env = {k: v for k, v in (os.environ | environment).items() if v != ""}
    result = subprocess.run(
        words, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert not check or result.returncode == 0, result.stdout
    return result


def flat(text: str) -> str:
    """CMake wraps its messages."""
    return " ".join(text.split())


def configure(build: Path, **environment: str) -> subprocess.CompletedProcess:
    return run(
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build),
        f"-DPython_EXECUTABLE={sys.executable}", **environment,
    )  # fmt: skip


@pytest.fixture
def package_copy(tmp_path):
    """The package's Python files without the extension."""
    copy = tmp_path / "mtp_ext"
    shutil.copytree(ROOT / "mtp_ext", copy, ignore=shutil.ignore_patterns("*.so", "weights"))
    return copy


# An editable install adds a finder that would still offer the real extension.
NO_EDITABLE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"


def import_copy(copy: Path, code: str = "") -> str:
    result = subprocess.run(
        [sys.executable, "-c", NO_EDITABLE + code + "\nimport mtp_ext"],
        cwd=copy.parent, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": str(copy.parent)},
    )  # fmt: skip
    assert result.returncode != 0
    return result.stderr


def test_build_info_is_complete():
    info = mtp_ext.build_info()
    assert info["version"] == mtp_ext.__version__
    for key in ("commit", "torch", "compiler", "cpu_isa", "cpu_isa_compiled"):
        assert info[key], key
    assert info["cpu_isa"] in info["cpu_isa_compiled"].split(",")


def test_import_without_the_extension(package_copy):
    error = import_copy(package_copy)
    assert "the extension is not built for this Python" in error
    assert "pip install --no-build-isolation -e ." in error


def test_import_under_another_torch(package_copy):
    extension = next((ROOT / "mtp_ext").glob("_C*.so"))
    shutil.copy(extension, package_copy)
    error = import_copy(package_copy, "import torch; torch.__version__ = '9.9.9'")
    built = mtp_ext.build_info()["torch"]
    assert f"built against torch {built}, but torch 9.9.9 is running" in error
    assert "pip install --no-build-isolation -e ." in error


def test_import_of_an_extension_that_does_not_load(package_copy):
    extension = next((ROOT / "mtp_ext").glob("_C*.so"))
    (package_copy / extension.name).write_bytes(b"not an object file")
    error = import_copy(package_copy)
    assert "does not load under torch" in error and "Rebuild" in error


def test_build_without_torch(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('hidden by the test')")
    result = run(sys.executable, "setup.py", "build_ext", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "torch cannot be imported at build time (hidden by the test)" in result.stdout
    assert "pip install --no-build-isolation ." in result.stdout


def test_build_without_compiler(tmp_path):
    result = run(sys.executable, "setup.py", "build_ext", PATH=str(tmp_path), CXX="")
    assert result.returncode != 0
    assert "no C++ compiler found" in result.stdout and "set CXX" in result.stdout


def test_cuda_is_required_but_missing(tmp_path):
    result = configure(tmp_path / "b", MTP_CUDA="1", CUDA_HOME=str(tmp_path))
    assert result.returncode != 0
    assert f"there is no nvcc in CUDA_HOME={tmp_path}" in flat(result.stdout)


def test_cuda_auto_says_why_not(tmp_path):
    result = configure(tmp_path / "b", MTP_CUDA="auto", CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stdout
    assert f"building without CUDA, because there is no nvcc in CUDA_HOME={tmp_path}" in flat(
        result.stdout
    )


def test_cuda_switch_has_three_values(tmp_path):
    result = configure(tmp_path / "b", MTP_CUDA="yes")
    assert "MTP_CUDA must be auto, 1 or 0, got 'yes'" in flat(result.stdout)


NVCC = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"


@pytest.mark.skipif(not NVCC.exists(), reason="no nvcc")
@pytest.mark.parametrize(
    "archs,expected",
    [
        ("8.0 9.0a+PTX", r"CUDA architectures 8.0 9.0a\+PTX$"),
        ("8.0;9.0a", "CUDA architectures 8.0 9.0a$"),
        ("", r"CUDA architectures 8.0 8.6 8.9 9.0a .*\+PTX$"),
        ("Hopper", "TORCH_CUDA_ARCH_LIST holds 'Hopper'"),
        ("7.5", "asks for 7.5; the kernels need 8.0 or newer"),
        ("99.0", "asks for 99.0, which .* does not know"),
    ],
)
def test_architecture_list(archs, expected):
    result = run(
        "cmake", f"-DMTP_NVCC={NVCC}", "-P", "cmake/CudaArchs.cmake", TORCH_CUDA_ARCH_LIST=archs
    )
    assert re.search(expected, flat(result.stdout)), result.stdout
    assert (result.returncode == 0) == expected.startswith("CUDA architectures")


def test_env_report():
    result = run(sys.executable, "-m", "mtp_ext", "env", check=True)
    for name in ("mtp_ext", "python", "torch", "cpu", "memory", "gpu", "nvcc", "c++"):
        assert re.search(rf"^{re.escape(name)} ", result.stdout, re.M), name
    assert "failed:" not in result.stdout


def test_command_line_lists_its_commands():
    result = run(sys.executable, "-m", "mtp_ext")
    assert result.returncode == 2
    assert all(name in result.stdout for name in ("demo", "train", "bench", "env"))


def object_files(level: str) -> list[Path]:
    return sorted((ROOT / "build").glob(f"*/CMakeFiles/mtp_module_{level}.dir/**/*.o"))


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("level", ["avx2", "avx512", "avx512_bf16", "amx"])
def test_no_shared_symbol_is_compiled_for_a_newer_processor(level):
    """The linker keeps one copy of an out-of-line template. If that copy came from a file built
    for AVX2, a processor without it would crash in code that looks harmless."""
    objects = object_files(level)
    if not objects:
        pytest.skip(f"no build folder with {level} objects")
    for file in objects:
        symbols = run("nm", "-C", "--defined-only", str(file), check=True).stdout.splitlines()
        weak = [s for s in symbols if s.split()[1] in "WVu" and " DW.ref." not in s]  # data
        assert not [s for s in weak if f"mtp::cpu::{level}::" not in s], file.name


@pytest.mark.skipif(
    not os.environ.get("MTP_TEST_TORCH"),
    reason="set MTP_TEST_TORCH to torch versions that pip can install, e.g. '2.13.0 2.14.1'",
)
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("version", (os.environ.get("MTP_TEST_TORCH") or "unset").split())
def test_builds_and_imports_under(version, tmp_path):
    """The documented pip commands in a new virtual environment, then an operator through it."""
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"), check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = (python, "-m", "pip", "install", "--quiet")
    run(*pip, f"torch=={version}", "pybind11", "cmake", "ninja", "setuptools>=77", check=True)
    run(
        *pip, "--no-build-isolation", ".", check=True,
        MTP_BUILD_DIR=str(tmp_path / "build"), TORCH_CUDA_ARCH_LIST="9.0a",
    )  # fmt: skip
    code = (
        "import torch, mtp_ext; z = torch.zeros(1, dtype=torch.int64);"
        "print(mtp_ext.build_info()['torch'], mtp_ext.build_info()['cuda_archs'],"
        "torch.ops.mtp.philox_uniform(z, z, 0, 0, 4).shape)"
    )
    result = subprocess.run(
        [python, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert result.stdout.startswith(version) and "torch.Size([1, 4])" in result.stdout
    if shutil.which("nvcc") or os.environ.get("CUDA_HOME"):
        assert "9.0a" in result.stdout
