"""A run's record, run.json: what it was started with, on what, and when."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

import torch

import tl_fast
from tl_fast.system.atomic import write_atomic
from tl_fast.system.ranks import Ranks
from tl_fast.system.versions import commit, version
from tl_fast.training.run_config import RunConfig

RECORD = "run.json"


def _job() -> str:
    """Names the torchrun job that this process belongs to; the same after a restart of its ranks, another for another
    job."""
    name, parent = _run_id(), os.getppid()
    if name is not None:
        return name
    started = ""
    with contextlib.suppress(OSError):  # in a container every torchrun may be process 1
        started = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19]
    return f"{socket.gethostname()}:{parent}:{started}"


def _run_id() -> str | None:
    """torchrun's --rdzv-id, also that which --standalone draws; None where nobody has set one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if name == "none" else name


def began_here(folder: Path, restarts: int) -> bool:
    """Whether this very job, with this very command, began the run in `folder` (and was not refused).

    An id of the job says so on any host; somebody may start another command under the same id. Without an id its
    process on this host says so, but only when torchrun has restarted its ranks. A change of members is no restart in
    torchrun's count.
    """
    starts = read_record(folder)
    return (
        bool(starts)
        and (starts[-1]["job"], starts[-1]["command"]) == (_job(), sys.argv)
        and (_run_id() is not None or restarts > 0)
    )


def read_record(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where there is no readable record."""
    try:
        return json.loads((folder / RECORD).read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_record(
    folder: Path, config: RunConfig, step: int, versions: dict[str, str | None], resolved: dict[str, Any]
) -> None:
    """Add this start at `step` to the run's record: time, command, versions and commit, the recipe, and what came of
    its "auto" and null."""
    start = {
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": step,
        "job": _job(),
        "host": socket.gethostname(),
        "command": sys.argv,
        "versions": versions,
        "resolved": resolved,
        "config": config.to_dict(),
    }
    _write_starts(folder, [*(read_record(folder) if step else []), start])


def complete_record(folder: Path, resolved: dict[str, Any]) -> None:
    """Replace what the last start has `resolved`: the loader decides about `decode` in the first steps."""
    *earlier, last = read_record(folder)
    _write_starts(folder, [*earlier, last | {"resolved": resolved}])


def _write_starts(folder: Path, starts: list[dict[str, Any]]) -> None:
    text = json.dumps({"starts": starts}, indent=1)
    write_atomic(folder / RECORD, lambda file: file.write(text.encode()))


def versions(ranks: Ranks) -> dict[str, str | None]:
    """What the run runs on: packages, CUDA, NCCL, device, and the commit of the checkout. None for what is not there;
    the commit where the package does not lie in a checkout."""
    gpu = ranks.device.type == "cuda"
    name = torch.cuda.get_device_name(ranks.device) if gpu else platform.processor() or platform.machine()
    packages = {package: version(package) for package in ("torchvision", "timm", "numba", "numba-cuda", "numpy")}
    dali = next(filter(None, (version(f"nvidia-dali-cuda{major}0") for major in (13, 12, 11))), None)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if gpu and torch.distributed.is_nccl_available() else None
    return {
        "tl_fast": tl_fast.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
        "dali": dali,
        "cuda": torch.version.cuda,
        "nccl": nccl,
        "device": f"{ranks.world_size} x {name}",
    }
