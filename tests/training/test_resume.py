"""Where a run starts: what it falls back to, what it refuses to continue, and what it leaves on record."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import weights

from tl_fast.training import checkpoint, classification, lock, record
from tl_fast.training import loop as training


def test_a_run_that_fell_back_from_a_torn_checkpoint_keeps_what_it_saves(tiny):
    """keep 1, the newest torn: the summary and the folder hold the new one, and the next start goes on from it."""
    config = tiny(max_steps=9, checkpoint_steps=3, keep=9)
    torn = Path(training.train(config)["checkpoint"])
    (torn / checkpoint.OPTIMIZER).write_bytes(b"torn")
    again = dataclasses.replace(config, max_steps=7, keep=1, resume="auto")
    with pytest.warns(UserWarning, match=f"falling back.*{torn.name}"):
        summary = training.train(again)
    assert summary["steps"] == 7 and summary["checkpoint"].endswith("step-0000000007")
    assert checkpoint.checkpoints(torn.parent) == [Path(summary["checkpoint"])] and checkpoint.latest(torn.parent)


def test_another_data_set_is_not_continued_with(tiny, betons, tmp_path):
    config = tiny(max_steps=2)
    training.train(config)
    moved = shutil.copy(betons / "train.beton", tmp_path / "moved.beton")
    again = dataclasses.replace(config, train_data=str(moved), resume="auto", max_steps=3)
    assert training.train(again)["steps"] == 3  # the same samples in another file
    twice = dataclasses.replace(again, train_data=[str(moved), str(betons / "train.beton")], batch_size=32, max_steps=4)
    with pytest.raises(
        checkpoint.CheckpointError,
        match="train_data 87 samples with digest .* -> 174 samples with digest .*moved.beton.*--init_weights",
    ):
        training.train(twice)


@pytest.mark.usefixtures("one_thread")
def test_a_run_in_groups_resumes_exactly_and_in_its_order_alone(tiny):
    """Within an epoch. Two accumulated passes of 8 would have 8 groups, the 16 images of one pass have 16."""
    straight = training.train(tiny("straight", order="grouped", max_steps=7))
    config = tiny("broken", order="grouped", max_steps=3)
    stopped = Path(training.train(config)["checkpoint"])
    assert checkpoint.read_meta(stopped)["order_groups"] == 16
    for changes, said in (
        ({"order": "shuffled"}, "order 'grouped' -> 'shuffled', order_groups 16 -> 1"),
        ({"accumulate": 2}, "order_groups 16 -> 8"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=f"is of another run: {said}"):
            training.train(dataclasses.replace(config, resume="auto", max_steps=7, **changes))
    resumed = training.train(dataclasses.replace(config, resume="auto", max_steps=7))
    expected, continued = weights(straight["checkpoint"]), weights(resumed["checkpoint"])
    assert expected.keys() == continued.keys()
    assert not [name for name in expected if not torch.equal(expected[name], continued[name])]
    free = weights(training.train(tiny("free", max_steps=7))["checkpoint"])
    assert not torch.equal(free["model.safetensors:head.weight"], expected["model.safetensors:head.weight"])


def test_a_checkpoint_that_says_nothing_of_its_order_had_the_free_one(tiny, monkeypatch):
    """As those of earlier versions."""
    config = tiny(max_steps=2)
    training.train(config)
    read = checkpoint.read_meta

    def read_earlier(path: Path) -> dict:
        meta = read(path)
        del meta["order_groups"], meta["config"]["order"]
        return meta

    monkeypatch.setattr(checkpoint, "read_meta", read_earlier)
    again = dataclasses.replace(config, max_steps=3, resume="auto")
    with pytest.raises(checkpoint.CheckpointError, match="order 'shuffled' -> 'grouped', order_groups 1 -> 16"):
        training.train(dataclasses.replace(again, order="grouped"))
    assert training.train(again)["steps"] == 3


def test_what_two_runs_write_at_once_is_refused(tiny, monkeypatch):
    config = tiny(max_steps=2)
    monkeypatch.setattr(lock.sole_writer.__wrapped__, "__defaults__", (0.1,))
    with lock.sole_writer(Path(config.output_dir)):
        with pytest.raises(
            BlockingIOError,
            match=f"{config.output_dir} is being trained into by another process .process {os.getpid()} on",
        ):
            training.train(config)
    assert training.train(config)["steps"] == 2


def test_a_run_continues_without_the_weights_that_it_began_with(tiny, tmp_path):
    first = tiny("first", max_steps=1)
    copy = tmp_path / "weights.safetensors"
    shutil.copy(Path(training.train(first)["checkpoint"]) / checkpoint.MODEL, copy)
    config = tiny("second", max_steps=1, init_weights=str(copy))
    training.train(config)
    copy.unlink()
    assert training.train(dataclasses.replace(config, max_steps=2, resume="auto"))["steps"] == 2
    with pytest.raises(checkpoint.CheckpointError, match="weights.safetensors does not exist"):
        training.train(dataclasses.replace(config, output_dir=str(tmp_path / "third")))


@pytest.mark.parametrize(
    "run_id, restarts, continues", [("job7", 0, True), ("none", 1, True), ("none", 0, False), ("job8", 1, False)]
)
def test_a_job_that_torchrun_starts_again_continues_its_own_run(tiny, monkeypatch, run_id, restarts, continues):
    """Also where a node has joined, whose ranks count no restart and may hold the main one; another job's run is
    refused."""
    began = "job7" if run_id != "none" else "none"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", began)
    config = tiny(max_steps=1)
    training.train(config)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    again = dataclasses.replace(config, max_steps=2)
    if continues:
        assert training.train(again)["steps"] == 2
    else:
        with pytest.raises(checkpoint.CheckpointError, match="already holds"):
            training.train(again)


def test_another_command_under_the_same_name_is_another_job(tiny, monkeypatch):
    """So that a given --resume counts, and another recipe does not go on with what lies there."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job7")
    config, other = tiny(max_steps=1), tiny("other", max_steps=2)
    training.train(config), training.train(other)
    monkeypatch.setattr("sys.argv", ["train.py", "--max_steps", "3"])
    with pytest.raises(checkpoint.CheckpointError, match="already holds"):
        training.train(dataclasses.replace(config, max_steps=3))
    with pytest.raises(checkpoint.CheckpointError, match="already holds"):
        training.train(dataclasses.replace(config, max_steps=3, resume=other.output_dir))


def test_files_that_cannot_be_deleted_do_not_end_a_run(tiny, monkeypatch):
    """Such as those on NFS that another process reads."""
    remove = os.unlink
    monkeypatch.setattr(
        os,
        "unlink",
        lambda path, **options: remove(path, **options) if not str(path).endswith(checkpoint.EMA) else _denied(path),
    )
    config = tiny(max_steps=3, checkpoint_steps=1, keep=1)
    assert training.train(config)["steps"] == 3
    folder = Path(config.output_dir) / "checkpoints"
    assert len(list(folder.glob(".tmp*"))) == 2 and len(checkpoint.checkpoints(folder)) == 1
    assert training.train(dataclasses.replace(config, max_steps=4, resume="auto"))["steps"] == 4
    monkeypatch.undo()
    assert training.train(dataclasses.replace(config, max_steps=5, resume="auto"))["steps"] == 5
    assert not list(folder.glob(".tmp*"))


def _denied(path: object) -> None:
    raise OSError(16, "Device or resource busy", str(path))


def test_the_record_says_what_auto_came_to(tiny):
    config = tiny(max_steps=1, deterministic=True)
    training.train(config)
    (start,) = record.read_record(Path(config.output_dir))
    assert start["resolved"] == {
        "device": "cpu",
        "world_size": 1,
        "dtype": "float32",
        "compile": False,
        "threads": 1,
        "decode": "cpu",
        "hybrid_share": None,
    }
    assert start["config"]["decode"] == "cpu" and {
        "torch",
        "torchvision",
        "timm",
        "numba",
        "numpy",
        "dali",
        "cuda",
        "nccl",
        "commit",
    } <= set(start["versions"])


def test_a_checkpoint_that_a_run_fell_back_from_is_no_rival(tiny, betons, monkeypatch):
    """Its files' sizes are right, so only its step tells; what is validated before that step must not be lost for its
    sake."""
    scores = iter((50.0, 80.0, 70.0, 60.0, 65.0))
    monkeypatch.setattr(classification, "validate", lambda *_: {"val_top1_ema": next(scores), "val_top1_raw": 0.0})
    config = tiny(epochs=4, val_data=str(betons / "val.beton"), keep=9)
    damaged = Path(training.train(dataclasses.replace(config, max_steps=10))["checkpoint"])
    file = damaged / checkpoint.MODEL
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    with pytest.warns(UserWarning, match="falling back"):
        summary = training.train(dataclasses.replace(config, checkpoint_every=9, resume="auto"))
    assert summary["best_top1"] == 70 and summary["best_checkpoint"] == str(damaged)


def test_the_best_weights_are_saved_between_the_epochs_that_are(tiny, betons, monkeypatch):
    scores = iter((50.0, 70.0, 60.0, 65.0))
    monkeypatch.setattr(classification, "validate", lambda *_: {"val_top1_ema": next(scores), "val_top1_raw": 0.0})
    config = tiny(epochs=4, checkpoint_every=4, val_data=str(betons / "val.beton"), keep=1)
    summary = training.train(config)
    assert summary["best_top1"] == 70 and summary["best_checkpoint"].endswith(f"step-{summary['steps'] // 2:010d}")
