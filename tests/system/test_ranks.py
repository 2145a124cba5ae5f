"""The process group's few operations, in two real gloo processes."""

from __future__ import annotations

import datetime
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.multiprocessing

from tl_fast.system.ranks import _own_part, join


def work(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    store = torch.distributed.FileStore(f"{folder}/store", 2)  # no port to collide on
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with join("cpu") as ranks:
        norm = torch.nn.BatchNorm1d(3)
        norm.running_mean += 1 + 2 * rank  # 1 and 3
        norm.num_batches_tracked += 5
        ranks.average_buffers(norm)
        table = torch.tensor([[5.0 + rank, 0], [6, rank], [7, 0]])
        result = {
            "main": ranks.main,
            "mean": norm.running_mean.tolist(),
            "count": int(norm.num_batches_tracked),
            "sum": ranks.sum(torch.tensor([rank + 1.0])).item(),
            "said": ranks.from_main(f"hello from {rank}"),
            "gathered": ranks.gather({"rank": rank}),
            "any": [ranks.any(torch.tensor(rank == 1)).item(), ranks.any(torch.tensor([False])).tolist()],
            "column": [ranks.any(table[:, 1]).tolist(), table.tolist() == [[5 + rank, 0], [6, rank], [7, 0]]],
        }
        votes, work = ranks.start_max((rank, 5 - rank))
        work.wait()
        result["votes"] = votes.tolist()
    assert torch.distributed.is_initialized(), "a group that join did not make is not its to destroy"
    torch.save(result, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # gloo's threads would abort a process that exits around them


def test_two_processes_share_what_they_should(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    expected = {
        "mean": [2.0] * 3,
        "count": 5,
        "sum": 3.0,
        "said": "hello from 0",
        "gathered": [{"rank": 0}, {"rank": 1}],
        "any": [1.0, [0.0]],
        "column": [[0.0, 1.0, 0.0], True],
        "votes": [1, 5],
    }
    assert first == {"main": True, **expected} and second == {"main": False, **expected}


def test_ranks_that_are_started_again_share_a_new_part_of_the_store():
    """Three threads for ranks, and in the store what ranks before them have left, who called, answered and went on."""
    store, timeout = torch.distributed.HashStore(), datetime.timedelta(seconds=20)
    parts = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as threads:
            started = [threads.submit(_own_part, store, 2, 3, timeout), threads.submit(_own_part, store, 1, 3, timeout)]
            time.sleep(0.1)  # the first is late: the others meet what is old
            started.append(threads.submit(_own_part, store, 0, 3, timeout))
            parts.append([future.result() for future in started])
        parts[-1][2].set("address", f"of {len(parts)}")
    for number, part in enumerate(parts, 1):
        assert [each.get("address").decode() for each in part] == [f"of {number}"] * 3
    with pytest.raises(TimeoutError, match="rank 1 of 3 did not hear"):
        _own_part(store, 1, 3, datetime.timedelta(seconds=0.2))


def test_a_world_of_one_needs_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as ranks:
        assert (ranks.rank, ranks.world_size, ranks.main, ranks.device.type) == (0, 1, True, "cpu")
        assert not torch.distributed.is_initialized()
        assert (
            ranks.gather(3) == [3]
            and ranks.start_max((1, 2))[0].tolist() == [1, 2]
            and ranks.any(torch.tensor(True)) == 1
        )
        assert ranks.from_main(3) == 3 and ranks.sum(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="no GPU"), join("cuda"):
        pass
