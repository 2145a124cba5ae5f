"""When a run validates, saves and ends."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_runs import weights

from tl_fast.training import checkpoint
from tl_fast.training.config import TrainConfig
from tl_fast.training.loop import train
from tl_fast.training.milestones import Milestones
from tl_fast.training.progress import Progress
from tl_fast.training.runlog import read_rows


def walk(milestones: Milestones) -> tuple[list[int], list[int], list[int]]:
    """The steps at which a run pauses, validates and saves."""
    progress, pauses, validations, checkpoints = Progress(), [], [], []
    while progress.global_step < milestones.end:
        pause = milestones.pause(progress)
        assert progress.global_step < pause
        while progress.global_step < pause:
            progress.end_step()
            if progress.global_step < pause and milestones.checkpoint_is_due_between(progress):
                checkpoints.append(progress.global_step)
        if progress.step_in_epoch == milestones.steps_per_epoch:
            progress.end_epoch()
        pauses.append(progress.global_step)
        if milestones.validation_is_due(progress):
            validations.append(progress.global_step)
        if milestones.checkpoint_is_due(progress):
            checkpoints.append(progress.global_step)
    return pauses, validations, checkpoints


def test_a_classification_run_pauses_between_epochs():
    config = TrainConfig(
        train_data="x.beton",
        epochs=4,
        cooldown_epochs=1,
        warmup_epochs=0,
        eval_every=2,
        checkpoint_every=3,
        checkpoint_steps=7,
        max_steps=18,
    )
    assert walk(config.milestones(4)) == ([4, 8, 12, 16, 18], [8, 16, 18], [7, 12, 14, 18])


@pytest.mark.parametrize(
    "eval_steps, checkpoint_steps, expected",
    [
        (4, 4, ([4, 5, 8, 10, 12, 13], [4, 8, 12, 13], [4, 8, 12, 13])),
        (10, 5, ([5, 10, 13], [10, 13], [5, 10, 13])),
        (None, None, ([5, 10, 13], [13], [13])),
        (4, 6, ([4, 5, 8, 10, 12, 13], [4, 8, 12, 13], [6, 12, 13])),
        (20, 20, ([5, 10, 13], [13], [13])),
    ],
)
def test_a_run_by_steps_pauses_where_it_validates_and_between_epochs(eval_steps, checkpoint_steps, expected):
    milestones = Milestones(13, steps_per_epoch=5, eval_steps=eval_steps, checkpoint_steps=checkpoint_steps)
    assert walk(milestones) == expected


def test_what_is_validated_already_is_not_validated_again():
    milestones, progress = Milestones(end=8, steps_per_epoch=5, eval_steps=4), Progress(4, 0, 4)
    assert milestones.validation_is_due(progress) and not milestones.checkpoint_is_due(progress)
    assert milestones.checkpoint_is_due(progress, improved=True)
    progress.validated = True
    assert not milestones.validation_is_due(progress) and milestones.pause(progress) == 5


@pytest.mark.usefixtures("one_thread")
def test_validation_within_an_epoch_leaves_the_training_as_it_is(tiny, betons, monkeypatch):
    """Two epochs of five steps: without validation, with one every three steps, and the latter resumed behind one."""
    straight = train(tiny("straight", epochs=2))
    by_epoch = TrainConfig.milestones
    monkeypatch.setattr(
        TrainConfig,
        "milestones",
        lambda self, steps: dataclasses.replace(by_epoch(self, steps), eval_epochs=None, eval_steps=3),
    )
    config = tiny(
        "paused", epochs=2, val_data=str(betons / "val.beton"), checkpoint_every=9, checkpoint_steps=4, keep=9
    )
    train(dataclasses.replace(config, max_steps=4))
    paused = train(dataclasses.replace(config, resume="auto"))
    rows = read_rows(Path(paused["metrics"]))
    assert [row["step"] for row in rows if row["kind"] == "val"] == [3, 4, 6, 9, 10]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 11))
    steps = [int(path.name[-4:]) for path in checkpoint.checkpoints(Path(config.output_dir) / "checkpoints")]
    assert {3, 4, 8, 10} <= set(steps)
    before, after = weights(straight["checkpoint"]), weights(paused["checkpoint"])
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
