"""Data-parallel training under torchrun; without it, one process that is the first of one."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

# The first process may write training data for hours while the others wait.
PATIENCE = timedelta(days=7)


def active() -> bool:
    """Whether there are several processes; a PyTorch without torch.distributed has one."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if active() else 0


def world_size() -> int:
    return dist.get_world_size() if active() else 1


@contextlib.contextmanager
def process_group(device: str) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did, and yields this one's device."""
    if "RANK" not in os.environ or active():
        yield torch.device(device)
        return
    mine = torch.device(device)
    if mine.type == "cuda":
        mine = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if mine.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield mine
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def first_process_first() -> Iterator[None]:
    """The others enter once the first has left, and find the files that it has written."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and active():
        dist.barrier()
