"""Several processes of one run: one process per GPU, or several on CPUs (torchrun, srun).

The launcher tells each process RANK, WORLD_SIZE and LOCAL_RANK. Values on the CPU travel by gloo,
gradients on CUDA by nccl.
"""

import contextlib
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among all processes of the run: 0 <= rank < world_size."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is rank 0, which alone writes files and prints."""
        return self.rank == 0

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def max(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.world_size == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def broadcast(self, value):
        """Return rank 0's value (any object that can be pickled) on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]


@contextlib.contextmanager
def join_processes(device: torch.device):
    """Join the processes that a launcher has started, if it has, and yield this one's Ranks.

    Raises:
        ValueError: Two processes share one GPU.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        gpus: list[Any] = [None] * world_size
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        dist.all_gather_object(gpus, (socket.gethostname(), uuid))
        check_gpus_differ(gpus)
    yield Ranks(rank, world_size)
    dist.barrier()  # leave together
    dist.destroy_process_group()


def check_gpus_differ(gpus: list[tuple[str, str]]) -> None:
    """Raise ValueError if two ranks have the same (host name, GPU): nccl would fail or hang."""
    ranks_of: dict[tuple[str, str], list[int]] = {}
    for rank, gpu in enumerate(gpus):
        ranks_of.setdefault(gpu, []).append(rank)
    for (host, _), ranks in ranks_of.items():
        if len(ranks) > 1:
            raise ValueError(
                f"processes {', '.join(map(str, ranks))} share one GPU of {host}: start one "
                f"process per GPU, and leave the index out of --device"
            )
