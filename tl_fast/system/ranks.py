"""Joins the processes of one job: reads torchrun's environment, sets this rank's device, makes the process group.

A process alone needs no group.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tl_fast.system.cores import usable_cores
from tl_fast.system.mistakes import EXPECTED, InputError, share

JOINING = datetime.timedelta(minutes=10)  # how long a rank waits for the others to join, who have only to start


@dataclass(frozen=True)
class Ranks:
    """This process among all of a job.

    It is `rank` of `world_size` and computes on `device`. control: a gloo group for values on the host.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = None

    @property
    def main(self) -> bool:
        """True on the one rank that writes logs and checkpoints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: torch.Tensor) -> torch.Tensor:
        """1.0 on every rank where a flag (a tensor of 0 and 1, or bool) is set on one of them, else 0.0.

        The result stays on the device; the host does not wait for it.
        """
        # Contiguous: NCCL refuses a column of a table, gloo garbles it.
        flag = flag.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if self.world_size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag

    def start_max(self, values: Sequence[int]) -> tuple[torch.Tensor, Any]:
        """Start computing the maxima over ranks of a few integers on the host.

        Returns them and a handle; they are valid after the handle's wait(), or at once where the handle is None.
        """
        maxima = torch.tensor(values, dtype=torch.int64)
        if self.world_size == 1:
            return maxima, None
        return maxima, dist.all_reduce(maxima, dist.ReduceOp.MAX, group=self.control, async_op=True)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in the order of ranks, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value):
        """Rank 0's picklable value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def on_main(self, function: Callable, *arguments: Any) -> Any:
        """Call the function on rank 0 only; returns its result, which must be picklable, on every rank.

        A mistake, ValueError or OSError that it raises is raised on every rank: if rank 0 left alone, the others would
        wait for it.
        """
        result = None
        if self.main:
            try:
                result = function(*arguments)
            except (*EXPECTED, ValueError) as error:
                result = share(error)
        result = self.from_main(result)
        if isinstance(result, Exception):
            raise result
        return result

    def agree(self, function: Callable, *arguments: Any) -> Any:
        """Call the function on every rank; each gets its own result.

        If ranks meet a mistake or OSError, that of the lowest such rank is raised on all.
        """
        result = mistake = None
        try:
            result = function(*arguments)
        except EXPECTED as error:
            mistake = error
        answers = self.gather((mistake, f"rank {self.rank} on {socket.gethostname()}: "))
        first = next((rank for rank, (error, _) in enumerate(answers) if error is not None), None)
        if first is None:
            return result
        error = mistake if first == self.rank else answers[first][0]  # this rank's own has its traceback
        everybodys = len({str(error) for error, _ in answers}) == 1
        raise share(error, "" if everybodys else answers[first][1])

    def fill_from_main(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite tensors, of any device and type, by rank 0's, one at a time over the host."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            host = tensor.detach().cpu().contiguous()
            dist.broadcast(host.view(-1).view(torch.uint8), src=0, group=self.control)
            if not self.main:
                tensor.detach().copy_(host)

    def average_buffers(self, *modules: nn.Module) -> None:
        """Replace the floating-point buffers (batch norm's running statistics) by their mean over ranks, in place."""
        if self.world_size == 1:
            return
        buffers = [buffer for module in modules for buffer in module.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        # One message for all of them.
        flat = self.sum(torch.cat([buffer.flatten() for buffer in buffers])) / self.world_size
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))


def cores_of_this_rank() -> int:
    """The CPU cores that this process may use, quotas included, shared among the ranks of its host; at least 1."""
    return max(usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)


def _own_part(store: dist.Store, rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The part of torchrun's store that belongs to this start of the ranks, and to no earlier one.

    Ranks that torchrun starts again get the store of the ranks before them. A quick rank would read addresses of ranks
    that are gone, and wait for them. So all need the same new prefix, but torchrun tells them nothing that is new and
    the same on all nodes. They agree on one: rank 0 writes a new word, each other rank answers that word with a new
    word of its own, and rank 0 lists the answers. A rank that reads its own word in the list knows that rank 0's word
    is of this start. Raises TimeoutError.
    """
    word, answered, deadline = uuid.uuid4().hex, "", time.monotonic() + timeout.total_seconds()

    def read(name: str) -> list[str]:
        return store.get(f"tl_fast/{name}").decode().split() if store.check([f"tl_fast/{name}"]) else [""]

    if rank == 0:
        store.set("tl_fast/call", word)
    while time.monotonic() < deadline:
        if rank == 0:
            answers = [read(f"answer/{other}") for other in range(1, world_size)]
            if all(answer[0] == word for answer in answers):
                store.set("tl_fast/list", " ".join([word, *(answer[1] for answer in answers)]))
                return dist.PrefixStore(word, store)
        else:
            (call,) = read("call")
            if call != answered:
                store.set(f"tl_fast/answer/{rank}", f"{call} {word}")
                answered = call
            call, *words = read("list")
            if word in words:
                return dist.PrefixStore(call, store)
        time.sleep(0.02)
    raise TimeoutError(f"rank {rank} of {world_size} did not hear of the others in {timeout.total_seconds():.0f} s")


@contextlib.contextmanager
def join(device: str = "auto", timeout_minutes: float = 10, backend: str | None = None) -> Iterator[Ranks]:
    """Join the job that torchrun's environment describes; without torchrun a world of one, and no process group.

    Args:
        device: "cpu", "cuda", or "auto" (cuda when there is one). Gloo connects ranks on the CPU, NCCL on GPUs.
        timeout_minutes: how long a collective waits for a rank that lives but does not come. (A rank that dies ends it
            at once: its connections close.) The slowest legitimate wait is for another rank's torch.compile, or for
            rank 0's checkpoint.
        backend: "gloo" for jobs on GPUs that exchange next to nothing; None: chosen by the device.

    Raises ValueError for "cuda" without a GPU, or with fewer GPUs than local ranks.
    """
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda":
        if local_rank >= gpus:
            raise InputError(
                f"device cuda: local rank {local_rank} has no GPU, this host has {gpus}; lower "
                "--nproc_per_node or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
    chosen = torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")
    if world_size == 1:
        yield Ranks(rank, world_size, chosen)
        return
    timeout = datetime.timedelta(minutes=timeout_minutes)
    ours = not dist.is_initialized()  # the caller's group stays the caller's
    if ours:
        options = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            joining = min(timeout, JOINING)
            store, *_ = next(dist.rendezvous("env://", timeout=joining))
            options = {"store": _own_part(store, rank, world_size, joining), "rank": rank, "world_size": world_size}
        backend = backend or ("nccl" if device == "cuda" else "gloo")
        dist.init_process_group(backend, timeout=timeout, device_id=chosen if backend == "nccl" else None, **options)
    control = dist.new_group(backend="gloo", timeout=timeout)
    try:
        yield Ranks(rank, world_size, chosen, control)
    except BaseException as error:
        # torchrun takes the failure with the earliest second for the cause, of equals the lowest rank's: let the rank
        # that closed the connection be first.
        if isinstance(error, RuntimeError) and "by peer" in str(error):
            time.sleep(2)
        # Another rank may be gone. Gloo's threads must end before the process does; NCCL's would wait for that rank.
        dist.destroy_process_group(None if ours and backend == "gloo" else control)
        raise
    if ours:
        dist.destroy_process_group()
    else:
        dist.destroy_process_group(control)
