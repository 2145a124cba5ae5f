"""Checkpoints written by a thread: of the moment they were asked for, one at a time, and no error is lost."""

from __future__ import annotations

import copy
import errno
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from tl_fast.training import checkpoint, checkpoint_writer, lock
from tl_fast.training import loop as training
from tl_fast.training.checkpoint_writer import CheckpointWriter


class Learner:
    """A model, its moving average and an optimiser that has moments."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.ema = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)) for _ in range(2))
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.step()

    def step(self) -> None:
        """Change everything in place."""
        self.model(torch.randn(2, 3, 8, 8)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.param_groups[0]["lr"] /= 2
        with torch.no_grad():
            for tensor in self.ema.state_dict().values():
                tensor.add_(1)

    def parts(self, step: int) -> dict:
        return dict(model=self.model, ema=self.ema, optimizer=self.optimizer, meta={"global_step": step, "metrics": {}})

    def state(self) -> dict:
        return {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}


@pytest.fixture
def held(monkeypatch):
    """Writes of checkpoints wait for `go` and then take a moment; `under_way` is set while they do."""

    class Held:
        go, under_way = threading.Event(), threading.Event()

    save_file = checkpoint.safetensors.torch.save_file

    def slow(*arguments):
        Held.under_way.set()
        assert Held.go.wait(20)
        time.sleep(0.1)
        save_file(*arguments)
        Held.under_way.clear()

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", slow)
    yield Held
    Held.go.set()


def same(a, b) -> bool:
    """Equal trees of dicts and lists with tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(value, b[key]) for key, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path, held):
    """Though weights, averages, moments, settings and meta change before the first byte is written."""
    learner = Learner()
    parts, then = learner.parts(7), copy.deepcopy(learner.state())
    with CheckpointWriter(tmp_path, keep=3) as writer:
        writer.save(**parts)
        learner.step()
        parts["meta"]["metrics"]["val_top1_ema"] = 50.0
        assert not same(learner.state(), then) and not checkpoint.checkpoints(tmp_path)
        held.go.set()
    other = Learner()
    meta = checkpoint.restore(checkpoint.latest(tmp_path), model=other.model, ema=other.ema, optimizer=other.optimizer)
    assert same(other.state(), then) and meta["metrics"] == {} and meta["global_step"] == 7


def test_a_checkpoint_waits_for_the_one_before(tmp_path, held):
    learner = Learner()
    with CheckpointWriter(tmp_path, keep=3) as writer:
        writer.save(**learner.parts(1))
        threading.Timer(0.2, held.go.set).start()
        writer.save(**learner.parts(2))
        assert checkpoint.path_of(tmp_path, 1) in checkpoint.checkpoints(tmp_path)
        writer.wait()
        assert len(checkpoint.checkpoints(tmp_path)) == 2
        writer.wait()


@pytest.mark.parametrize("call", ["save", "check", "wait", "the end"])
def test_an_error_is_raised_once_by_the_next_call(tmp_path, monkeypatch, call):
    learner, failed = Learner(), threading.Event()

    def full(*_):
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="cannot write checkpoint .*step-0000000002"):
        with CheckpointWriter(tmp_path, keep=3) as writer:
            writer.save(**learner.parts(1))
            writer.wait()
            patch.setattr(checkpoint.safetensors.torch, "save_file", full)
            writer.save(**learner.parts(2))
            assert failed.wait(20)
            patch.undo()
            if call == "save":
                writer.save(**learner.parts(3))
            elif call == "wait":
                writer.wait()
            elif call == "check":
                for _ in range(2000):
                    writer.check()
                    time.sleep(0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001"]


def test_an_error_does_not_hide_the_one_that_ends_the_run(tmp_path, monkeypatch):
    def full(*_):
        time.sleep(0.1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", full)
    with pytest.warns(UserWarning, match="cannot write checkpoint"), pytest.raises(ValueError, match="a sample"):
        with CheckpointWriter(tmp_path, keep=3) as writer:
            writer.save(**Learner().parts(1))
            raise ValueError("a sample")


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_keeps_its_lock_until_its_checkpoint_is_on_disk(tiny, monkeypatch, held, fails):
    """Also a run that an error ends while the checkpoint of its second step is written."""
    config = tiny(max_steps=4, checkpoint_steps=2)
    folder, locked, prune = Path(config.output_dir), [], checkpoint.prune

    def pruned(*arguments):
        with pytest.raises(BlockingIOError), lock.sole_writer(folder, patience=0):
            pass
        locked.append(arguments[0].name)
        prune(*arguments)

    def add_step(self, step, *rest):
        if step == 2:
            assert held.under_way.wait(20) and not checkpoint.checkpoints(folder / "checkpoints")
            held.go.set()
            if fails:
                raise ValueError("a sample")
        return original(self, step, *rest)

    original = training.Meter.add_step
    monkeypatch.setattr(training.Meter, "add_step", add_step)
    monkeypatch.setattr(checkpoint_writer.checkpoint, "prune", pruned)
    if fails:
        with pytest.raises(ValueError, match="a sample"):
            training.train(config)
    else:
        summary = training.train(config)
        assert summary["checkpoint"].endswith("step-0000000004") and checkpoint.verify(Path(summary["checkpoint"]))
    assert locked == ["step-0000000002", "step-0000000004"][: 2 - fails]
    with lock.sole_writer(folder, patience=0):
        assert [path.name for path in checkpoint.checkpoints(folder / "checkpoints")] == locked
