"""For tests of the simulator itself: small CUDA or PTX sources run on NumPy arrays."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from .engine import launch
from .memory import GlobalMemory
from .parser import Module, type_size
from .report import LaunchReport


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")


def cutlass_headers() -> Path | None:
    """The include directory of the nvidia-cutlass package."""
    spec = importlib.util.find_spec("cutlass_library")
    return Path(spec.origin).parent / "source" / "include" if spec and spec.origin else None


def compile_cuda(source: str, arch: str = "sm_90a", flags: tuple[str, ...] = ()) -> Module:
    """PTX of a CUDA source; results are kept in the temporary directory."""
    compiler = nvcc()
    assert compiler, "nvcc is missing"
    key = hashlib.sha256("\0".join((source, arch, *flags, compiler)).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / "ptxsim-cache"
    folder.mkdir(exist_ok=True)
    ptx = folder / f"{key}.ptx"
    if not ptx.exists():
        cu = folder / f"{key}-{os.getpid()}.cu"
        cu.write_text(source)
        made = cu.with_suffix(".ptx")
        command = [compiler, "-ptx", f"-arch={arch}", "-lineinfo", "-std=c++17", *flags, str(cu)]
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
        cu.unlink()
        assert done.returncode == 0, done.stderr
        made.replace(ptx)
    return Module.parse(ptx.read_text())


def run(
    module: Module, kernel: str, grid: int | tuple, block: int | tuple, *args: object, **options
) -> LaunchReport:
    """Launches `kernel`, given by its plain or mangled name. Arrays are passed as pointers.

    Arrays are known to reports as arg0, arg1, ... by their position; integers and floats are
    packed to the size of the parameter.
    """
    (name,) = [k for k in module.kernels if k == kernel or f"{len(kernel)}{kernel}" in k]
    params = module.kernels[name].params
    assert len(params) == len(args), f"{name} takes {len(params)} arguments"
    packed = bytearray(module.kernels[name].param_bytes)
    memory = GlobalMemory()
    for i, (p, value) in enumerate(zip(params, args)):
        if isinstance(value, np.ndarray):
            memory.register(value.ctypes.data, value.nbytes, f"arg{i}", value.flags.writeable)
            raw = int(value.ctypes.data).to_bytes(8, "little")
        elif isinstance(value, float):
            raw = np.array(value, f"f{p.size}").tobytes()
        else:
            raw = (int(value) & ((1 << 8 * p.size) - 1)).to_bytes(p.size, "little")
        packed[p.offset : p.offset + p.size] = raw

    def three(x: int | tuple) -> tuple[int, int, int]:
        x = (x,) if isinstance(x, int) else x
        return (*x, *(1,) * (3 - len(x)))

    return launch(module, name, three(grid), three(block), bytes(packed), memory=memory, **options)


def ptx_kernel(body: str, params: int, target: str = "sm_90a", shared: int = 0) -> Module:
    """A kernel `k` of `params` pointers, loaded into %p0, %p1, ...; %t is the thread's index."""
    loads = "\n".join(f"ld.param.u64 %p{i}, [k_{i}];" for i in range(params))
    declared = f".shared .align 128 .b8 smem[{shared}];" if shared else ""
    text = f"""
.version 9.0
.target {target}
.address_size 64
.visible .entry k({", ".join(f".param .u64 k_{i}" for i in range(params))})
{{
.reg .b64 %p<{params + 1}>;
.reg .b64 %a<8>;
.reg .b32 %t;
{declared}
mov.u32 %t, %tid.x;
{loads}
{body}
ret;
}}
"""
    return Module.parse(text)


def elementwise(instr: str, out: str, ins: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Runs one instruction over arrays, one element per thread.

    `instr` uses D, A, B, C for its registers; types are PTX types, "pred" for predicates that are
    made from and stored as bytes. Values travel as bits.
    """
    n = len(ins[0][1])
    names = "ABCE"[: len(ins)]
    lines, size = [], type_size
    for i, (name, (t, _)) in enumerate(zip(names, ins)):
        lines.append(f"mad.wide.u32 %a{i}, %t, {size(t)}, %p{i + 1};")
        if t == "pred":
            lines += [
                f".reg .pred %{name}; .reg .b16 %{name}b;",
                f"ld.global.u8 %{name}b, [%a{i}];",
                f"setp.ne.u16 %{name}, %{name}b, 0;",
            ]
        else:
            width = 8 * size(t)
            lines += [
                f".reg .b{max(width, 16)} %{name};",
                f"ld.global.{'u8' if width == 8 else f'b{width}'} %{name}, [%a{i}];",
            ]
    lines.append(f"mad.wide.u32 %a6, %t, {size(out)}, %p0;")
    if out == "pred":
        lines += [".reg .pred %D; .reg .b16 %Db;"]
        store = "selp.u16 %Db, 1, 0, %D; st.global.u8 [%a6], %Db;"
    else:
        width = 8 * size(out)
        lines += [f".reg .b{max(width, 16)} %D;"]
        store = f"st.global.{'u8' if width == 8 else f'b{width}'} [%a6], %D;"
    text = re.sub(r"\b([DABCE])\b", r"%\1", instr)
    body = "\n".join([*lines, text + ";", store])
    module = ptx_kernel(body, 1 + len(ins))
    block = 128
    padded = -(-n // block) * block
    arrays = []
    for t, values in ins:
        raw = np.zeros(padded, f"u{size(t)}")
        raw[:n] = np.ascontiguousarray(values).view(f"u{size(t)}")
        arrays.append(raw)
    result = np.zeros(padded, f"u{size(out)}")
    for first in range(0, padded, 1024):
        part = slice(first, min(first + 1024, padded))
        chunk = [np.ascontiguousarray(a[part]) for a in arrays]
        res = np.zeros(len(chunk[0]), result.dtype)
        run(module, "k", 1, len(res), res, *chunk)
        result[part] = res
    return result[:n]
