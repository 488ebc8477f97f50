"""CUDA code on the simulator: the operators' test-only build, or any .cu source.

Operators. `load_ops()` builds csrc/ once more, against the stub runtime in cudart.cpp, and
returns the operators; tests get them as `backend.ops`. They take CPU tensors, run the shipped
launcher, and the launch goes to `engine.launch`. What the simulator objects to is raised by the
operator call as the PtxSimError itself:

    with pytest.raises(errors.OutOfBounds):
        backend.ops.rejection_sample(...)

What launches did, on which device, under which schedule and checks:

    with runtime.record(device="a100", seed=7) as launches:
        backend.ops.rejection_sample(...)
    assert launches[0].loaded_bytes("target_logits") == launches[0].unique_bytes("target_logits")

`launches` holds one LaunchReport per launch, in order; buffers carry the names given to
`data_ptr` in csrc/torch. `seed` asks for a random order of warps. `checks=Checks(...)` (exported
here) switches a check off for a kernel that is right without it: say why beside it.
`use_device("a100")` only chooses the device. Each device has its own ordinal (0 is the H100,
1 the A100) and runs the PTX of its own architecture.

Only bytes that the bindings announced through `data_ptr` exist for the kernels, and only during
the operator call; anything else is out of bounds.

Other CUDA code. `compile(source)` gives a library whose extern "C" host functions are called
with NumPy arrays or torch tensors as named buffers and int, float, str or bytes as they are:

    lib = runtime.compile(source_text)
    lib.call("run_sum", x=x, out=out, n=x.size)

Builds live in build/ptxsim, are incremental, and take a file lock, so concurrent runs share them.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import engine
from .engine import A100, H100, Checks
from .harness import nvcc as find_nvcc
from .memory import GlobalMemory
from .parser import Module
from .report import LaunchReport

__all__ = ["Checks", "compile", "load_ops", "record", "use_device"]

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "ptxsim"
DEVICES = {"h100": H100, "a100": A100}
ARCHS = {"h100": "90a", "a100": "80"}

_INVALID_DEVICE_FUNCTION, _NO_KERNEL_IMAGE, _LAUNCH_FAILURE = 98, 209, 719


@dataclass
class _Settings:
    device: str = "h100"
    seed: int | None = None
    checks: Checks = field(default_factory=Checks)
    max_steps: int = 20_000_000


@dataclass
class _State:
    settings: _Settings = field(default_factory=_Settings)
    memory: GlobalMemory = field(default_factory=GlobalMemory)
    lists: list[list[LaunchReport]] = field(default_factory=list)  # of the open `record`s
    error: BaseException | None = None  # raised inside a callback, waiting for its caller
    call_buffers: list[int] | None = None  # registered by the current call


_state = _State()


# --- Callbacks of cudart.cpp; the structures repeat its declarations. -------------------------


_LIMITS = [
    "arch", "sm_count", "smem_per_block", "smem_per_block_optin", "smem_per_sm",
    "threads_per_block", "threads_per_sm", "regs_per_sm",
]  # fmt: skip


class _Limits(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 64)] + [(name, ctypes.c_int) for name in _LIMITS]


class _KernelInfo(ctypes.Structure):
    _fields_ = [("static_smem", ctypes.c_int), ("max_threads", ctypes.c_int)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("fatbin", ctypes.c_void_p),
        ("kernel", ctypes.c_char_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("cluster", ctypes.c_uint32 * 3),
        ("dynamic_smem", ctypes.c_uint64),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
    ]


_DESCRIBE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(_KernelInfo)
)
_LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))
_MEMORY = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p)
_SYMBOL = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)


class _Callbacks(ctypes.Structure):
    _fields_ = [
        ("describe", _DESCRIBE),
        ("launch", _LAUNCH),
        ("memory", _MEMORY),
        ("symbol", _SYMBOL),
    ]


def _keeps_error(failure: Any) -> Any:
    """A callback must not raise into C: the error waits for `_calling`, C gets `failure`."""

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def guarded(*args: Any) -> Any:
            try:
                return function(*args)
            except BaseException as error:
                _state.error = _state.error or error
                return failure

        return guarded

    return wrap


@_keeps_error(_INVALID_DEVICE_FUNCTION)
def _on_describe(fatbin: int, kernel: bytes, info: Any) -> int:
    module = _module(fatbin, _state.settings.device)
    if module is None:
        return _NO_KERNEL_IMAGE
    found = module.kernels[kernel.decode()]
    limit = found.reqntid or found.maxntid
    info.contents.static_smem = found.static_smem
    info.contents.max_threads = (
        int(np.prod(limit)) if limit else DEVICES[_state.settings.device].threads_per_block
    )
    return 0


@_keeps_error(_LAUNCH_FAILURE)
def _on_launch(pointer: Any) -> int:
    request, settings = pointer.contents, _state.settings
    module = _module(request.fatbin, settings.device)
    assert module is not None, "described before it is launched"
    name = request.kernel.decode()
    kernel = module.kernels[name]
    if tuple(request.cluster) != (1, 1, 1):
        raise NotImplementedError(f"{name}: the simulator does not launch clusters")
    args = bytearray(kernel.param_bytes)
    for i, param in enumerate(kernel.params):
        args[param.offset : param.offset + param.size] = ctypes.string_at(
            request.args[i], param.size
        )
    report = engine.launch(
        module,
        name,
        tuple(request.grid),
        tuple(request.block),
        bytes(args),
        dynamic_smem=request.dynamic_smem,
        memory=_state.memory,
        device=DEVICES[settings.device],
        seed=settings.seed,
        checks=settings.checks,
        max_steps=settings.max_steps,
    )
    for reports in _state.lists:
        reports.append(report)
    return 0


@_keeps_error(None)
def _on_memory(address: int, nbytes: int, name: bytes | None) -> None:
    if nbytes == 0:
        _state.memory.unregister(address)
    elif name == b"cudaMalloc":
        _state.memory.register(address, nbytes, f"cudaMalloc {address:#x}")
    else:
        _register(address, nbytes, (name or b"buffer").decode())


@_keeps_error(None)
def _on_symbol(fatbin: int, name: bytes) -> int | None:
    module = _module(fatbin, _state.settings.device)
    return module and engine.symbol_address(module, name.decode())


_CALLBACKS = _Callbacks(
    _DESCRIBE(_on_describe), _LAUNCH(_on_launch), _MEMORY(_on_memory), _SYMBOL(_on_symbol)
)


def _register(address: int, nbytes: int, name: str, writable: bool = True) -> None:
    _state.memory.register(address, nbytes, name, writable)
    if _state.call_buffers is not None:
        _state.call_buffers.append(address)


@contextlib.contextmanager
def _calling() -> Iterator[None]:
    """One call into CUDA host code: its buffers end with it, and a kept error is raised."""
    outer, _state.call_buffers, _state.error = _state.call_buffers, [], None
    try:
        yield
    except Exception:
        if _state.error is None:
            raise
    finally:
        for address in reversed(_state.call_buffers):
            _state.memory.unregister(address)
        _state.call_buffers = outer
    error, _state.error = _state.error, None
    if error is not None:
        _library[0].cudaGetLastError()  # what the error set, should the host code not have looked
        raise error from None


# --- Fatbins. ---------------------------------------------------------------------------------


def _fatbin_ptx(address: int) -> list[str]:
    """The uncompressed PTX images of a fatbin in memory."""
    magic, _, header, size = struct.unpack("<IHHQ", ctypes.string_at(address, 16))
    assert magic == 0xBA55ED50, hex(magic)
    images, at, end = [], address + header, address + header + size
    while at < end:
        kind, _, header, size, compressed = struct.unpack("<HHIQI", ctypes.string_at(at, 20))
        if kind == 1:
            if compressed:
                raise RuntimeError("compressed PTX: compile with nvcc --no-compress")
            images.append(ctypes.string_at(at + header, size).rstrip(b"\0").decode())
        at += header + size
    return images


@functools.lru_cache(None)
def _module(fatbin: int, device: str) -> Module | None:
    """The module a device would run: its exact architecture, else the newest older one."""
    images = {}
    for text in _fatbin_ptx(fatbin):
        target = text[text.index(".target sm_") + 11 :].split(None, 1)[0].rstrip(",")
        images[target] = text
    arch = DEVICES[device].arch
    usable = [a for a in images if a == ARCHS[device] or (a.isdigit() and int(a) <= arch)]
    if not usable:
        return None
    best = max(usable, key=lambda a: (int(a.rstrip("af")), a))
    return Module.parse(images[best])


# --- Building. --------------------------------------------------------------------------------


def _cuda_include() -> Path:
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("ptxsim needs nvcc: set CUDA_HOME or put it on PATH")
    home = Path(os.environ.get("CUDA_HOME", ""))
    for folder in (home, Path(nvcc).resolve().parent.parent):
        if (folder / "include" / "cuda_runtime_api.h").exists():
            return folder / "include"
    raise RuntimeError(f"no CUDA headers beside {nvcc}: set CUDA_HOME to the toolkit's folder")


@contextlib.contextmanager
def _build_lock(name: str) -> Iterator[None]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(command: list[str], what: str) -> None:
    environment = os.environ | {
        "MTP_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "8.0;9.0a",
        # With a base folder and without the working folder in the hash, checkouts share ccache.
        "CCACHE_BASEDIR": str(ROOT),
        "CCACHE_NOHASHDIR": "1",
    }
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if done.returncode:
        lines = [line[:300] for line in done.stdout.splitlines()]
        tail = "\n".join([line for line in lines if "error" in line.lower()][:10] or lines[-40:])
        raise RuntimeError(f"ptxsim: {what} failed:\n{tail}\ncommand: {' '.join(command)}")


def _built(name: str, inputs: bytes, command: Any, what: str) -> Path:
    """build/ptxsim/<name>-<hash of inputs>.so, made by command(output) unless it is there.

    `command` is called under the lock, so it may write the files that its compiler reads.
    """
    stem = f"{name}-{hashlib.sha256(inputs).hexdigest()[:16]}"
    output = BUILD / f"{stem}.so"
    with _build_lock(stem):
        if not output.exists():
            partial = BUILD / f"{stem}.partial.so"
            _run(command(str(partial)), what)
            partial.rename(output)
    return output


@functools.lru_cache(None)
def _stub() -> Path:
    """Builds and loads the stub runtime; every library that holds kernels needs it first."""
    source = Path(__file__).with_name("cudart.cpp")
    include = _cuda_include()
    # A symbol version keeps a real libcudart, if torch loaded one, from taking its place.
    versions = BUILD / "cudart.map"
    flags = [
        "-std=c++17", "-O1", "-fPIC", "-shared", f"-Wl,--version-script={versions}",
        "-Wl,-soname,libptxsim_cudart.so",
    ]  # fmt: skip

    def command(out: str) -> list[str]:
        versions.write_text("PTXSIM { global: *; };\n")
        return [os.environ.get("CXX", "g++"), *flags, f"-I{include}", str(source), "-o", out]

    inputs = source.read_bytes() + str((include, flags)).encode()
    path = _built("libptxsim_cudart", inputs, command, "building the stub CUDA runtime")
    library = ctypes.CDLL(str(path))
    library.ptxsim_set_callbacks(ctypes.byref(_CALLBACKS))
    for device in DEVICES.values():
        values = [getattr(device, name) for name in _LIMITS]
        limits = _Limits(f"ptxsim {device.name}".encode(), *values)
        library.ptxsim_add_device(ctypes.byref(limits))
    _library.append(library)
    return path


_library: list[ctypes.CDLL] = []


def load_ops() -> Any:
    """The operators of this checkout's csrc/, built for the simulator."""
    ops, error = _try_load_ops()
    if error is not None:
        raise error
    return ops


@functools.lru_cache(None)
def _try_load_ops() -> tuple[Any, Exception | None]:
    """Once per process, so that a build that fails does so once."""
    try:
        return _load_ops(), None
    except Exception as error:
        return None, error


def _load_ops() -> Any:
    stub = _stub()
    folder = BUILD / "ops"
    configure = [
        "cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(folder), "-DMTP_PTXSIM=ON",
        f"-DMTP_PTXSIM_RUNTIME={stub}", "-DMTP_MODULE_NAME=_C_ptxsim",
        f"-DMTP_OUTPUT_DIR={folder}", "-DMTP_CPU_ISA_LEVELS=generic",
        f"-DPython_EXECUTABLE={sys.executable}",
    ]  # fmt: skip
    stamp = folder / "configured"
    with _build_lock(folder.name):
        if not stamp.exists() or stamp.read_text() != "\n".join(configure):
            _run(configure, "configuring the simulator's build of csrc/")
            stamp.write_text("\n".join(configure))
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        _run(["cmake", "--build", str(folder), "-j", jobs], "the simulator's build of csrc/")
    module = next(folder.glob("_C_ptxsim.*.so"))
    spec = importlib.util.spec_from_file_location("_C_ptxsim", module)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return _Ops(torch.ops.mtp_ptxsim)


class _Ops:
    """torch.ops.mtp_ptxsim, with every operator called inside `_calling`."""

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._namespace, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            with _calling():
                return op(*args, **kwargs)

        call.__name__ = name
        setattr(self, name, call)
        return call


@dataclass
class Library:
    """A compiled CUDA source."""

    dll: ctypes.CDLL

    def call(self, function: str, **arguments: Any) -> int:
        """Calls an extern "C" function returning int (or nothing); arrays become buffers."""
        values: list[Any] = []
        with _calling():
            for name, value in arguments.items():
                if isinstance(value, torch.Tensor):
                    address, nbytes, writable = value.data_ptr(), value.nbytes, True
                elif isinstance(value, np.ndarray):
                    address, nbytes = value.ctypes.data, value.nbytes
                    writable = value.flags.writeable
                else:
                    convert = {int: ctypes.c_int64, float: ctypes.c_float}.get(type(value))
                    values.append(convert(value) if convert else value)
                    continue
                _register(address, nbytes, name, writable)
                values.append(ctypes.c_void_p(address))
            return getattr(self.dll, function)(*values)


def compile(source: str | Path, *, archs: tuple[str, ...] = ("90a",), flags: tuple[str, ...] = ()):
    """Compiles CUDA source text, or a file without local includes, to PTX and loads it."""
    stub = _stub()
    text = source.read_text() if isinstance(source, Path) else source
    options = [
        "-std=c++17", "--no-compress", "-lineinfo", "--expt-relaxed-constexpr", "-cudart=none",
        "-shared", "-Xcompiler=-fPIC,-O1", "-Wno-deprecated-gpu-targets",
        *(f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs), *flags,
    ]  # fmt: skip
    key = hashlib.sha256((text + str((options, stub.name))).encode()).hexdigest()[:16]
    file = source if isinstance(source, Path) else BUILD / f"source-{key}.cu"

    def command(out: str) -> list[str]:
        if file is not source:
            file.write_text(text)
        return [str(find_nvcc()), *options, str(file), str(stub), "-o", out]

    path = _built("cuda", key.encode(), command, f"compiling {file.name}")
    return Library(ctypes.CDLL(str(path)))


# --- Devices, schedules, reports. -------------------------------------------------------------


@contextlib.contextmanager
def record(
    device: str | None = None,
    *,
    seed: int | None = None,
    checks: Checks | None = None,
    max_steps: int | None = None,
) -> Iterator[list[LaunchReport]]:
    """Collects the reports of the launches inside; what is given holds for them."""
    given = {"device": device, "seed": seed, "checks": checks, "max_steps": max_steps}
    launches: list[LaunchReport] = []
    _state.lists.append(launches)
    try:
        with _changed(**{k: v for k, v in given.items() if v is not None}):
            yield launches
    finally:
        _state.lists = [reports for reports in _state.lists if reports is not launches]


def use_device(device: str) -> contextlib.AbstractContextManager[None]:
    """Runs the launches inside on "h100" or "a100"."""
    return _changed(device=device)


@contextlib.contextmanager
def _changed(**given: Any) -> Iterator[None]:
    _stub()
    outer = _state.settings
    _select(replace(outer, **given))
    try:
        yield
    finally:
        _select(outer)


def _select(settings: _Settings) -> None:
    _library[0].cudaSetDevice(list(DEVICES).index(settings.device))
    _state.settings = settings
