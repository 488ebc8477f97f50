"""Runs a kernel: launch checks, waves of CTAs, scheduling, reconvergence."""

from __future__ import annotations

from dataclasses import dataclass

from .memory import GlobalMemory
from .parser import Module
from .report import LaunchReport


@dataclass(frozen=True)
class Device:
    """The limits that a launch is held to."""

    name: str
    arch: int  # 90 for sm_90
    sm_count: int
    smem_per_block: int  # without opt-in
    smem_per_block_optin: int
    smem_per_sm: int
    threads_per_block: int = 1024
    threads_per_sm: int = 2048
    regs_per_sm: int = 65536


H100 = Device("H100", 90, 132, 48 * 1024, 227 * 1024, 228 * 1024)
A100 = Device("A100", 80, 108, 48 * 1024, 163 * 1024, 164 * 1024)


@dataclass(frozen=True)
class Checks:
    """Which checks a launch runs; all are on by default."""

    races: bool = True  # shared-memory races, intra-warp ones included
    global_races: bool = True
    uninitialized: bool = True  # reads of shared memory that nothing wrote
    counters: bool = True


def launch(
    module: Module,
    kernel_name: str,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: bytes,
    *,
    dynamic_smem: int = 0,
    memory: GlobalMemory,
    device: Device = H100,
    seed: int | None = None,
    checks: Checks = Checks(),
    max_steps: int = 20_000_000,
) -> LaunchReport:
    """Executes one launch on host memory. `seed` asks for a random schedule."""
    raise NotImplementedError
