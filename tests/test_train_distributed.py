"""Two processes over gloo train what one process does with the doubled batch."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from training_cases import make_objective, objective_for, random_shard, tiny_llama

from mtp_ext.train.config import TrainConfig
from mtp_ext.train.data import Documents, Shard
from mtp_ext.train.distributed import first_process_first, process_group
from mtp_ext.train.objective import Objective
from mtp_ext.train.trainer import Trainer

STEPS = 5


def texts() -> Shard:
    """Of different lengths, with a prompt; one more than batches of four take."""
    shard = random_shard([20, 31, 17, 40, 22])
    shard.answer[:15] = False
    return shard


def objective(batch_size: int, joint: bool, seed: int = 0) -> Objective:
    config = TrainConfig(
        epochs=4,
        batch_size=batch_size,
        warmup=1,
        depth_starts=(0.0, 0.2, 0.4),
        joint=joint,
        labels="hard" if joint else "soft",
    )
    return objective_for(tiny_llama(), config, seed) if joint else make_objective(config, seed)


def one_of_two(rank: int, port: int, folder: Path, joint: bool) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with process_group("cpu"):
        with first_process_first():
            assert (folder / "made").exists() == (rank == 1)
            (folder / "made").touch()
        # The second process begins with other weights: the first one's count.
        trainer = Trainer(objective(2, joint, seed=rank), Documents(texts()))
        trainer.run(STEPS)
        trainer.save(folder / "first.ckpt")
        torch.save(trainer.objective.state_dict(), folder / f"rank{rank}.pt")
        dist.barrier()


@pytest.mark.parametrize("joint", [False, True])
def test_two_processes_are_one_with_the_doubled_batch(tmp_path: Path, joint: bool) -> None:
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch was built without gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (port, tmp_path, joint), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    alone = Trainer(objective(4, joint), Documents(texts()))
    start = {name: p.clone() for name, p in alone.objective.state_dict().items()}
    alone.run(STEPS)
    for name, p in alone.objective.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        moved = (p - start[name]).norm()
        assert moved > 0 and (ranks[0][name] - p).norm() < 0.01 * moved, name
    saved = torch.load(tmp_path / "first.ckpt")
    assert saved["step"] == STEPS
