"""What a run survives: signals at any moment on one rank and on two, dead ranks, restarts; and that it then continues
exactly.

The kill matrix is marked `matrix`: `make test-all` runs all of it, about five minutes on two cores, `make test` a
handful of its cases.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from pathlib import Path

import kill_run
import numpy as np
import pytest
import torch
from kill_run import Blow
from tiny_runs import tiny_config, weights

from tl_fast.training import checkpoint
from tl_fast.training.runlog import read_rows

PER_EPOCH, EPOCHS, EVERY = 5, 2, 2  # steps, epochs, steps between checkpoints
SETTINGS = dict(epochs=EPOCHS, checkpoint_steps=EVERY, keep=2, resume="auto", checkpoint_minutes=None)

# Moment -> which rank is hit on two ranks (the first alone writes), and at which pass: always in the second epoch, past
# a checkpoint within it.
MOMENTS = {
    "before the first step": (1, 1),
    "waiting for data": (1, 8),
    "in a step": (1, 8),
    "before the weights change": (1, 8),
    "writing a checkpoint": (0, 4),  # those of steps 2, 4, 5 and 6
    "renaming a checkpoint": (0, 4),
    "pruning checkpoints": (0, 2),
    "in validation": (1, 2),  # of the second epoch
    "writing the log": (0, 9),
}
CASES = list(itertools.product((signal.SIGTERM, signal.SIGINT, signal.SIGKILL), MOMENTS, (1, 2)))
EVERY_TIME = [  # the cases of every run of the tests
    (signal.SIGTERM, "in a step", 2),
    (signal.SIGTERM, "in validation", 1),
    (signal.SIGINT, "before the first step", 1),
    (signal.SIGKILL, "writing a checkpoint", 1),
    (signal.SIGKILL, "before the weights change", 2),
    (signal.SIGTERM, "waiting for data", 1),
]


@pytest.fixture(scope="module")
def context():
    return kill_run.server()


@pytest.fixture(scope="module")
def straight(context, betons, tmp_path_factory):
    """world size -> config and Run of a run that nothing happened to; made when first asked for."""
    made = {}

    def make(world_size: int):
        if world_size not in made:
            folder = tmp_path_factory.mktemp("straight")
            config = tiny_config(betons, folder / "run", val_data=str(betons / "val.beton"), **SETTINGS)
            run = kill_run.run(context, config, world_size)
            assert run.codes == [0] * world_size, run.outputs
            assert list(run.steps) == list(range(PER_EPOCH * EPOCHS))
            made[world_size] = config, run
        return made[world_size]

    return make


def same_weights(found: Path, expected: Path, world_size: int) -> None:
    """Bit for bit; with several ranks batch norm's running statistics, which no gradient sees, to rounding: saving
    averages them over ranks."""
    a, b = weights(found), weights(expected)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        if world_size > 1 and "running_" in name:
            torch.testing.assert_close(tensor, b[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, b[name]), name


def newest(config) -> Path | None:
    return checkpoint.latest(Path(config.output_dir) / "checkpoints")


def losses(config) -> list[tuple]:
    return [
        (row["kind"], row["step"], row["epoch"], row.get("loss"), row.get("lr"), row.get("val_loss_ema"))
        for row in read_rows(Path(config.output_dir) / "metrics.jsonl")
    ]


def parameters(case, *marks):
    number, moment, world_size = case
    name = f"{number.name} {moment}, {world_size} rank{'s' * (world_size > 1)}"
    return pytest.param(number, moment, world_size, *MOMENTS[moment], marks=marks, id=name)


@pytest.mark.parametrize(
    "number, moment, world_size, rank, count",
    [
        *(parameters(case) for case in EVERY_TIME),
        *(parameters(case, pytest.mark.slow, pytest.mark.matrix) for case in CASES if case not in EVERY_TIME),
    ],
)
def test_killed_and_resumed(context, straight, betons, tmp_path, number, moment, world_size, rank, count):
    expected_config, expected = straight(world_size)
    config = dataclasses.replace(expected_config, output_dir=str(tmp_path / "run"))
    if moment == "waiting for data" and world_size == 1:
        rank = 0
    rank = min(rank, world_size - 1)
    run = kill_run.run(context, config, world_size, Blow(moment, number, rank, count))
    done = max(run.steps, default=-1) + 1  # steps begun, of which the last may not have been taken
    if number == signal.SIGKILL:
        assert run.codes[rank] == -signal.SIGKILL, run.outputs
        assert all(code not in (0, -signal.SIGKILL) for i, code in enumerate(run.codes) if i != rank), run.outputs
        # At least the last but one that was begun: the last may have been under way, and is then lost.
        begun = [step for step in range(1, done) if step % EVERY == 0 or step % PER_EPOCH == 0]
        expected_step = begun[-2] if len(begun) > 1 else 0
        if moment in ("writing a checkpoint", "renaming a checkpoint"):
            expected_step = PER_EPOCH
    else:
        assert run.codes == [128 + number] * world_size, run.outputs
        assert f"{number.name}: stopped after step {done} of {PER_EPOCH * EPOCHS}" in run.outputs[0]
        expected_step = done  # nothing is lost
    left = newest(config)
    step = checkpoint.read_meta(left)["global_step"] if left else 0
    assert step >= expected_step if number == signal.SIGKILL else step == expected_step
    assert moment == "before the first step" or step >= PER_EPOCH, "the blow came too early to test anything"

    resumed = kill_run.run(context, config, world_size)
    assert resumed.codes == [0] * world_size, resumed.outputs
    assert list(resumed.steps) == list(range(step, PER_EPOCH * EPOCHS))
    for taken, what in resumed.steps.items():
        assert what == expected.steps[taken], f"step {taken}: epoch, lr, sample ids by rank, box"
    same_weights(newest(config), newest(expected_config), world_size)
    rows, expected_rows = losses(config), losses(expected_config)
    if world_size == 1:
        assert rows == expected_rows
    else:  # the validation's figures rest on the running statistics
        assert [row[:5] for row in rows] == [row[:5] for row in expected_rows]
    folder = Path(config.output_dir) / "checkpoints"
    assert not list(folder.glob(".tmp*")) and 2 <= len(checkpoint.checkpoints(folder)) <= 3
    starts = json.loads((Path(config.output_dir) / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == ([0, step] if step else [0]) and starts[0][
        "config"
    ] == config.to_dict() | {"num_classes": 4}


@pytest.mark.slow  # every time: test_ddp.py's, where nobody is killed
def test_another_world_size_takes_the_same_samples_in_every_step(context, straight, tmp_path):
    """Killed on two ranks, continued on one, in two passes a step: the samples of a global step, its lr and box are a
    function of the step."""
    _, expected = straight(1)
    config = dataclasses.replace(straight(2)[0], output_dir=str(tmp_path / "run"))
    first = kill_run.run(context, config, 2, Blow("in a step", signal.SIGTERM, 0, 7))
    second = kill_run.run(context, dataclasses.replace(config, accumulate=2), 1)
    assert first.codes == [143, 143] and second.codes == [0], first.outputs + second.outputs
    assert list(first.steps) + list(second.steps) == list(range(PER_EPOCH * EPOCHS))
    for step, (epoch, lr, ids, box) in (first.steps | second.steps).items():
        want_epoch, want_lr, want_ids, want_box = expected.steps[step]
        assert (epoch, box) == (want_epoch, want_box) and lr == pytest.approx(want_lr, rel=1e-12)
        assert sorted(sum(ids, [])) == sorted(sum(want_ids, [])) and len(sum(ids, [])) == 16
    assert np.isfinite([row[3] for row in losses(config) if row[0] == "train"]).all()
