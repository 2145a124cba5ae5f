"""The processes of one job: torchrun's environment, the device of this rank, and the process group where there is more than one."""
from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Iterator

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world_size`, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """True on the one rank that writes logs and checkpoints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def from_main(self, value):
        """Rank 0's picklable value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def average_buffers(self, *modules: nn.Module) -> None:
        """Replace the floating-point buffers (batch norm's running statistics) by their mean over ranks, in place."""
        if self.world_size == 1:
            return
        for module in modules:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world_size


def cores_of_this_rank() -> int:
    """The CPU cores that this process may use, shared among the ranks of its host; at least 1."""
    return max(len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


@contextlib.contextmanager
def join(device: str = "auto") -> Iterator[Ranks]:
    """This process's place in the job that torchrun's environment describes; without torchrun a world of one, and no process group.

    Args:
        device: "cpu", "cuda", or "auto" (cuda when there is one). Gloo connects ranks on the CPU, NCCL on GPUs.

    Raises ValueError for "cuda" without a GPU, or with fewer GPUs than local ranks.
    """
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        if local_rank >= gpus:
            raise ValueError(f"device cuda: local rank {local_rank} has no GPU, this host has {gpus}; lower --nproc_per_node or use "
                             "--device cpu")
        torch.cuda.set_device(local_rank)
    ranks = Ranks(rank, world_size, torch.device(device, local_rank) if device == "cuda" else torch.device("cpu"))
    if world_size == 1 or dist.is_initialized():  # the caller's group stays the caller's
        yield ranks
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo", device_id=ranks.device if device == "cuda" else None)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
