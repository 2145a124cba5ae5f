"""Runs of train.py in forked processes that get a signal at a chosen moment; for test_survival.py.

The processes are forked from a server that has imported everything, so that a case takes seconds. What a rank does is
written to a trace as it
happens: one line a step with what the step was made of.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tl_fast import train
from tl_fast.models.loss import TokenLabelLoss
from tl_fast.models.normalise import Normalise
from tl_fast.training import checkpoint, classification, learner, stopping
from tl_fast.training import loop as training
from tl_fast.training.config import TrainConfig

PATIENCE = 60  # seconds: "within a minute"


@dataclass(frozen=True)
class Blow:
    """A signal that rank `rank` sends itself at the `count`-th time that it comes by a moment; None: "reading images"
    then gives NaN."""

    moment: str
    number: signal.Signals | None
    rank: int
    count: int


def strike(blow: Blow) -> None:
    """Arrange for the signal in this process."""
    left = [blow.count]

    def pass_by(early: bool = False) -> None:
        left[0] -= 1
        if left[0] == 0:
            if early:  # while the process waits, not before it starts to
                threading.Timer(0.05, os.kill, (os.getpid(), blow.number)).start()
                time.sleep(0.2)
            else:
                os.kill(os.getpid(), blow.number)

    def before(
        owner: Any, name: str, condition: Callable[..., bool] = lambda *_, **__: True, early: bool = False
    ) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments, **options):
            if condition(*arguments, **options):
                pass_by(early)
            return original(*arguments, **options)

        setattr(owner, name, wrapped)

    if blow.moment == "before the first step":
        before(learner, "build_optimizer")
    elif blow.moment == "waiting for data":
        before(training.Meter, "fetch", early=True)
    elif blow.moment == "in a step":
        before(TokenLabelLoss, "forward")
    elif blow.moment == "before the weights change":
        before(training.torch.optim.AdamW, "step")
    elif blow.moment == "writing a checkpoint":
        before(checkpoint.safetensors.torch, "save_file", lambda _, path: path.name == checkpoint.EMA)
    elif blow.moment == "renaming a checkpoint":
        before(checkpoint.os, "rename", lambda _, name: Path(name).name.startswith("step-"))
    elif blow.moment == "pruning checkpoints":
        before(shutil, "rmtree", lambda path, *_, **__: Path(path).name.startswith(".tmp-step-"))
    elif blow.moment == "writing the log":
        before(training.RunLog, "row")
    elif blow.moment == "reading images":  # no signal: images that are not numbers
        original = Normalise.forward

        def forward(self, images):
            left[0] -= 1
            return original(self, images) * (float("nan") if left[0] == 0 else 1)

        Normalise.forward = forward
    elif blow.moment == "in validation":
        original = stopping.Agreement.until_stopped

        def batches(self, loader):
            for number, batch in enumerate(original(self, loader)):
                if number == 1:
                    pass_by()
                yield batch

        stopping.Agreement.until_stopped = batches
    else:
        raise ValueError(f"unknown moment {blow.moment!r}")


def trace_steps(path: Path) -> None:
    """Append to `path`, for every step of this rank, [step, epoch, lr, sample ids, MixToken's box], when its gradients
    are there."""
    boxes: list[list[int]] = []
    draw, add_step = classification.mix_box, training.Meter.add_step

    def mix_box(*arguments):
        box = draw(*arguments)
        boxes.append(box.tolist())
        return box

    def traced(self, step, epoch, lr, norm):
        ids = [i for batch in self._sample_ids for i in batch.tolist()]
        with path.open("a") as file:
            file.write(json.dumps([step, epoch, lr, ids, boxes[-1] if boxes else None]) + "\n")
        return add_step(self, step, epoch, lr, norm)

    classification.mix_box, training.Meter.add_step = mix_box, traced


def rank_main(
    config: str, rank: int, world_size: int, port: int, trace: Path, output: Path, blow: Blow | None, late: bool
) -> None:
    """One rank's process: what `torchrun tl_fast/train.py --config config` would run."""
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout.reconfigure(line_buffering=True)
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in names.items()} | {
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    training.torch.set_num_threads(1)
    trace_steps(trace)
    if late:
        init = training.Meter.__init__
        training.Meter.__init__ = lambda self, *rest: init(self, *rest) or setattr(self, "_at_once", False)
    if blow is not None and blow.rank == rank:
        strike(blow)
    sys.argv = ["tl_fast/train.py", "--config", config]
    train.main()


def server() -> Any:
    """A multiprocessing context whose processes are forked from one that has imported this module."""
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [folder, str(Path(folder).parent), os.environ.get("PYTHONPATH", "")]
    )  # the server's imports
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["kill_run"])
    return context


@dataclass
class Run:
    """What became of a run: exit codes and outputs by rank, seconds, and steps as traced: step -> [epoch, lr, ids by
    rank, box]."""

    codes: list[int]
    outputs: list[str]
    seconds: float
    steps: dict[int, list]


def run(context: Any, config: TrainConfig, world_size: int, blow: Blow | None = None, late: bool = False) -> Run:
    """Train in `world_size` processes until all have ended. TimeoutError, and the rest killed, when one is still there
    PATIENCE after the first end.

    late: losses are read in the order of a GPU, after the end of their window.
    """
    folder = Path(config.output_dir).parent
    name = Path(config.output_dir).name
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(config.to_dict()))
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    traces, outputs = ([folder / f"{name}.{kind}{rank}" for rank in range(world_size)] for kind in ("trace", "output"))
    for path in traces:
        path.unlink(missing_ok=True)
    start = time.monotonic()
    ranks = [
        context.Process(
            target=rank_main, args=(str(recipe), rank, world_size, port, traces[rank], outputs[rank], blow, late)
        )
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    multiprocessing.connection.wait([process.sentinel for process in ranks], 240)
    deadline = time.monotonic() + PATIENCE
    for process in ranks:
        process.join(max(deadline - time.monotonic(), 0))
    late = [process for process in ranks if process.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    texts = [path.read_text() for path in outputs]
    if late:
        raise TimeoutError(f"{len(late)} of {world_size} ranks did not end: {texts}")
    steps: dict[int, list] = {}
    for path in traces:
        for step, epoch, lr, ids, box in map(json.loads, path.read_text().splitlines()) if path.exists() else ():
            steps.setdefault(step, [epoch, lr, [], box])[2].append(ids)
    return Run([process.exitcode for process in ranks], texts, time.monotonic() - start, steps)
