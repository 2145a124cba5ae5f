"""Where a run starts: anew, or where a checkpoint left it; and the record of every start, `run.json`."""
from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import tl_fast.compat  # noqa: F401  before timm
import timm

import tl_fast
from tl_fast import checkpoint
from tl_fast.config import TrainConfig
from tl_fast.ranks import Ranks

# A run continued with other values of these would be neither the old run nor a new one.
FIXED_ON_RESUME = ("model", "model_kwargs", "img_size", "num_classes", "token_label", "batch_size", "seed", "steps_per_epoch")
FRESH = {"global_step": 0, "epoch": 0, "step_in_epoch": 0, "last_validation": {}, "validated": False, "skipped": 0}
RECORD = "run.json"


def resume(config: TrainConfig, ranks: Ranks, steps_per_epoch: int, *, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load what `config.resume` asks for; where to continue, with FRESH's keys.

    When torchrun starts its ranks again (--max-restarts), they continue the run that they began, whatever `resume` says.
    Raises CheckpointError for broken or foreign checkpoints, when one of FIXED_ON_RESUME differs from the checkpoint's config, and when
    output_dir holds checkpoints that the run would not continue.
    """
    found = ranks.from_main(_caught(_choose, config) if ranks.main else None)
    if isinstance(found, checkpoint.CheckpointError):
        raise found  # on every rank: the others would wait for the first
    if found is None:
        return FRESH
    meta = checkpoint.read_meta(found)
    then, now = meta["config"] | {"steps_per_epoch": meta["steps_per_epoch"]}, config.to_dict() | {"steps_per_epoch": steps_per_epoch}
    different = [f"{name} {then.get(name)!r} -> {now[name]!r}" for name in FIXED_ON_RESUME if then.get(name) != now[name]]
    if different:
        raise checkpoint.CheckpointError(f"{found} is of another run: {', '.join(different)}. Restore these, choose another output_dir, or "
                                         "start from its weights with --init_weights")
    settings = [{name: group[name] for name in ("weight_decay", "betas", "eps")} for group in optimizer.param_groups]
    checkpoint.restore(found, model=model, ema=ema, optimizer=optimizer)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)  # what this run's config says, not what the checkpoint's optimiser had
    return {name: meta[name] for name in FRESH}


def _caught(function, *arguments):
    """The function's result, or the CheckpointError that it raised."""
    try:
        return function(*arguments)
    except checkpoint.CheckpointError as error:
        return error


def _choose(config: TrainConfig) -> Path | None:
    """The checkpoint to continue from; the main rank alone looks, so that all take the same."""
    folder = Path(config.output_dir) / "checkpoints"
    if folder.is_dir():
        checkpoint.recover(folder)
    if config.resume == "auto" or (_restarted(Path(config.output_dir)) and checkpoint.checkpoints(folder)):
        return checkpoint.latest(folder)
    path = checkpoint.find(Path(config.resume)) if config.resume else None
    # A run that starts before them would be pruned against them, and a later --resume auto would take one of theirs.
    stale = [other for other in checkpoint.checkpoints(folder)
             if path is None or path.parent.resolve() != folder.resolve() or other.name > path.name]
    if stale:
        raise checkpoint.CheckpointError(f"output_dir {config.output_dir} already holds {stale[-1]}: continue it with --resume auto, "
                                         "remove its later checkpoints, or choose another output_dir")
    return path


def _job() -> str:
    """Names the torchrun job that this process belongs to; the same after a restart of its ranks, another for another job."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()}:{os.getppid()}"


def _restarted(folder: Path) -> bool:
    """Whether torchrun has started this job's ranks before and they began the run in `folder` then (and were not refused)."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return False
    starts = read_record(folder)
    return bool(starts) and starts[-1]["job"] == _job()


def read_record(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, oldest first; none where there is no readable record."""
    try:
        return json.loads((folder / RECORD).read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def write_record(folder: Path, config: TrainConfig, ranks: Ranks, step: int) -> None:
    """Add this start at `step` to the run's record: time, command, versions and commit, and the resolved recipe."""
    start = {"time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "step": step, "job": _job(), "host": socket.gethostname(),
             "command": sys.argv, "versions": versions(ranks), "config": config.to_dict()}
    temporary = folder / f"{RECORD}.tmp"
    temporary.write_text(json.dumps({"starts": [*(read_record(folder) if step else []), start]}, indent=1))
    os.replace(temporary, folder / RECORD)


def versions(ranks: Ranks) -> dict[str, str | None]:
    """What the run runs on: packages, device, and the commit of the checkout (None where the package does not lie in one)."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor() or platform.machine()
    return {"tl_fast": tl_fast.__version__, "commit": commit(), "python": platform.python_version(), "torch": torch.__version__,
            "timm": timm.__version__, "numpy": np.__version__, "device": f"{ranks.world_size} x {name}"}


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it; None without git or outside a checkout of ours."""
    root = Path(tl_fast.__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed package must not report the commit of what it happens to lie in
        return None
    try:
        found = subprocess.run(["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"], cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
