"""Checkpoints: atomic, verified, pruned; and weights of other origin."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import resource
import shutil

import pytest
import safetensors.torch
import torch
from torch import nn

from tl_fast.models.lvvit import LVViT
from tl_fast.models.weights import WeightsError
from tl_fast.training import checkpoint
from tl_fast.training.checkpoint import CheckpointError

TINY = dict(img_size=64, embed_dim=16, depth=1, num_heads=2, stem_width=4, num_classes=5)


def trained(seed: int) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """A model, another as its EMA, and an optimiser with moments."""
    torch.manual_seed(seed)
    model, ema = LVViT(**TINY), LVViT(**TINY)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sum(logits.square().mean() for logits in model(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    return model, ema, optimizer


def write(folder, step: int, top1: float | None = None, seed: int = 0):
    model, ema, optimizer = trained(seed)
    metrics = {} if top1 is None else {"val_top1_ema": top1, "val_top1_raw": top1 - 1}
    meta = {"global_step": step, "epoch": step // 10, "step_in_epoch": 0, "config": {}, "metrics": metrics}
    return checkpoint.save(folder, checkpoint.snapshot(model=model, ema=ema, optimizer=optimizer, meta=meta))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_restore_brings_back_everything(tmp_path):
    model, ema, optimizer = trained(1)
    model.to(memory_format=torch.channels_last)
    meta = {"global_step": 7, "epoch": 1, "step_in_epoch": 2}
    path = checkpoint.save(tmp_path, checkpoint.snapshot(model=model, ema=ema, optimizer=optimizer, meta=meta))
    other_model, other_ema, other_optimizer = trained(2)
    assert not same(model, other_model)
    meta = checkpoint.restore(path, model=other_model, ema=other_ema, optimizer=other_optimizer)
    assert (meta["global_step"], meta["epoch"], meta["step_in_epoch"]) == (7, 1, 2)
    assert same(model, other_model) and same(ema, other_ema)
    for mine, theirs in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert mine["step"] == theirs["step"] == 1
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"]) and torch.equal(mine["exp_avg_sq"], theirs["exp_avg_sq"])


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.EMA, checkpoint.OPTIMIZER, checkpoint.META])
@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_a_damaged_checkpoint_is_refused_by_name_and_an_older_one_used(tmp_path, name, damage):
    old, new = write(tmp_path, 10), write(tmp_path, 20)
    assert checkpoint.latest(tmp_path) == new
    content = bytearray((new / name).read_bytes())
    if damage == "cut":
        (new / name).write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 2 if name != checkpoint.META else content.index(b"tl_fast")] ^= 1
        (new / name).write_bytes(content)
    else:
        (new / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(new)
    with pytest.warns(UserWarning, match=f"falling back to .*{old.name}.*{new.name}"):
        assert checkpoint.latest(tmp_path) == old
    shutil.rmtree(old)
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize(
    "change", [('"step_in_epoch": 0', '"step_in_epoch": 1'), ('"crc32":', '"crc33":'), ("}", "} ")]
)
def test_meta_that_changed_is_refused_by_name(tmp_path, change):
    """Still JSON of our format: without a check of its own it would resume somewhere else. Spacing alone is no
    change."""
    path = write(tmp_path, 20)
    text = (path / checkpoint.META).read_text()
    assert change[0] in text
    (path / checkpoint.META).write_text(text.replace(*change))
    if change[0] == "}":
        assert checkpoint.verify(path)["global_step"] == 20
    else:
        with pytest.raises(CheckpointError, match=r"step-0000000020/meta\.json does not have the CRC-32"):
            checkpoint.verify(path)


def test_a_damaged_older_checkpoint_does_not_stop_a_run(tmp_path):
    """Pruning looks for the best checkpoint in all of them."""
    old, good, new = (write(tmp_path, step, top1) for step, top1 in ((10, 90.0), (20, 50.0), (30, 40.0)))
    (old / checkpoint.META).write_text("torn")
    assert checkpoint.best(tmp_path) == good
    checkpoint.prune(new, keep=1)
    assert checkpoint.checkpoints(tmp_path) == [good, new]


def test_pruning_never_prefers_a_torn_checkpoint_that_the_run_fell_back_from(tmp_path):
    """The best, the newest by name and torn: continued from step 10, the run saved 12, which must stay and be the
    newest and the best."""
    first, torn = write(tmp_path, 10, 50.0), write(tmp_path, 30, 90.0)
    (torn / checkpoint.MODEL).write_bytes(b"torn")
    assert checkpoint.best(tmp_path) == first
    saved = write(tmp_path, 12, 40.0)
    assert checkpoint.checkpoints(tmp_path, saved) == [first, saved] and checkpoint.best(tmp_path, saved) == first
    checkpoint.prune(saved, keep=1)
    assert checkpoint.checkpoints(tmp_path) == [first, saved] and checkpoint.latest(tmp_path) == saved


def test_what_is_not_a_checkpoint_is_not_pruned(tmp_path):
    (tmp_path / "step-0000000001-copy").mkdir()
    (tmp_path / "step-notes").mkdir()
    for step in (1, 2, 3):
        checkpoint.prune(write(tmp_path, step), keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000000001-copy", "step-0000000003", "step-notes"]


def test_foreign_folders_are_refused(tmp_path):
    (tmp_path / "step-1").mkdir()
    for text, named in (
        ("not json", "not a checkpoint of tl_fast"),
        ('{"format": "other 3"}', "other 3"),
        ("[]", "format"),
    ):
        (tmp_path / "step-1" / checkpoint.META).write_text(text)
        with pytest.raises(CheckpointError, match=named):
            checkpoint.read_meta(tmp_path / "step-1")
    assert checkpoint.latest(tmp_path / "nothing here") is None


def test_a_path_means_the_same_everywhere(tmp_path):
    """A run's folder (its newest intact checkpoint), a checkpoint's folder, or a weights file; everything else is
    refused by name."""
    run, weights = tmp_path / "run", tmp_path / "weights.pth"
    older, newest = (write(run / "checkpoints", step) for step in (1, 2))
    weights.touch()
    assert [checkpoint.find(path) for path in (run, older, weights)] == [newest, older, weights]
    (newest / checkpoint.EMA).unlink()
    assert checkpoint.find(newest) == newest  # who asks for it gets it, to be told what is wrong with it
    with pytest.warns(UserWarning, match=f"falling back to {older}"):
        assert checkpoint.find(run) == older
    (older / checkpoint.EMA).unlink()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.lock").touch()
    (tmp_path / "photos").mkdir()
    for name, named in (
        ("run", "no intact checkpoint in .*checkpoints"),
        ("nowhere", "nowhere does not exist"),
        ("new", "new is the folder of a run that has not saved a checkpoint"),
        ("photos", "photos is neither a run's folder, nor a checkpoint's .*, nor a weights file"),
    ):
        with pytest.raises(CheckpointError, match=named):
            checkpoint.find(tmp_path / name)


@pytest.mark.parametrize("victim", ["save_file", "fsync", "rename"])
def test_a_failed_save_leaves_the_previous_one(tmp_path, monkeypatch, victim):
    old = write(tmp_path, 10)
    before = {file.name: file.read_bytes() for file in old.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.safetensors.torch if victim == "save_file" else checkpoint.os, victim, full)
        with pytest.raises(OSError, match="No space"):
            write(tmp_path, 20)
    assert checkpoint.latest(tmp_path) == old and [p.name for p in tmp_path.iterdir()] == [old.name]
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before
    assert checkpoint.latest(tmp_path) == old and write(tmp_path, 20) == checkpoint.latest(tmp_path)


@contextlib.contextmanager
def files_no_larger_than(size: int):
    """What `ulimit -f` sets: the write that crosses it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", [0.5, 1.5])
def test_a_disk_that_takes_no_more_leaves_the_previous_one(tmp_path, room):
    """The kernel itself refuses to let a file grow: room for half the weights, or for the weights but not for the
    optimiser's state."""
    old = write(tmp_path, 10)
    before = {file.name: file.read_bytes() for file in old.iterdir()}
    limit = int(room * len(before[checkpoint.MODEL]))
    assert limit < max(map(len, before.values()))
    with (
        files_no_larger_than(limit),
        pytest.raises(OSError, match="cannot write checkpoint .*step-0000000020") as caught,
    ):
        write(tmp_path, 20, seed=1)
    assert "--resume auto" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == [old.name] and checkpoint.latest(tmp_path) == old
    assert {file.name: file.read_bytes() for file in old.iterdir()} == before


@pytest.mark.parametrize("renames", [0, 1])
def test_killed_while_replacing_a_step_one_of_the_two_is_there(tmp_path, monkeypatch, renames):
    """Killed before the first and between the two renames; what the next start of the run finds."""
    path, done, rename = write(tmp_path, 10, seed=1), [], os.rename

    class Killed(BaseException):
        pass

    def dying(*names):
        if len(done) == renames:
            monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # the dead clear nothing up
            monkeypatch.setattr(checkpoint.os, "rename", lambda *_: None)
            raise Killed
        done.append(rename(*names))

    with monkeypatch.context():
        monkeypatch.setattr(checkpoint.os, "rename", dying)
        with pytest.raises(Killed):
            write(tmp_path, 10, seed=2)
        monkeypatch.undo()
    assert path.exists() == (renames == 0) and len(list(tmp_path.iterdir())) == 2
    checkpoint.recover(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name] and checkpoint.latest(tmp_path) == path
    model, ema, optimizer = trained(3)
    checkpoint.restore(path, model=model, ema=ema, optimizer=optimizer)
    assert same(model, trained(1)[0])


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 10, seed=1)
    path = write(tmp_path, 10, seed=2)
    model, ema, optimizer = trained(3)
    checkpoint.restore(path, model=model, ema=ema, optimizer=optimizer)
    assert same(model, trained(2)[0]) and len(list(tmp_path.iterdir())) == 1


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for step, top1 in ((10, 40.0), (20, 60.0), (30, None), (40, 50.0), (50, 55.0)):
        checkpoint.prune(write(tmp_path, step, top1), keep=2)
    assert [int(path.name[5:]) for path in checkpoint.checkpoints(tmp_path)] == [20, 40, 50]
    assert (
        checkpoint.best(tmp_path).name.endswith("20")
        and checkpoint.score(checkpoint.read_meta(checkpoint.best(tmp_path))) == 60
    )


@pytest.mark.parametrize(
    "there, here", [(torch.channels_last, torch.contiguous_format), (torch.contiguous_format, torch.channels_last)]
)
def test_moments_take_the_layout_of_the_weights_that_they_are_restored_to(tmp_path, there, here):
    """A run may continue on another device, where the stem's layout is another; fused AdamW walks memory, not
    indices."""

    def make(layout):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=layout)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.contiguous_format)).square().sum().backward()
        optimizer.step()

    model, optimizer = make(there)
    step(model, optimizer, 1)
    state = checkpoint.snapshot(model=model, ema=model, optimizer=optimizer, meta={"global_step": 1})
    path = checkpoint.save(tmp_path, state)
    other, other_optimizer = make(here)
    checkpoint.restore(path, model=other, ema=make(here)[0], optimizer=other_optimizer)
    for pair in ((model, optimizer), (other, other_optimizer)):
        step(*pair, 2)
    assert other.weight.is_contiguous(memory_format=here)
    torch.testing.assert_close(other.weight, model.weight, rtol=1e-5, atol=1e-6)


def test_restore_refuses_another_model(tmp_path):
    path = write(tmp_path, 10)
    model = LVViT(**{**TINY, "embed_dim": 32})
    with pytest.raises(CheckpointError, match=f"{path.name} does not fit"):
        checkpoint.restore(path, model=model, ema=model, optimizer=torch.optim.AdamW(model.parameters()))


def test_weights_of_every_origin_load(tmp_path):
    model, ema, _ = trained(4)
    state, ema_state = model.state_dict(), ema.state_dict()
    published = {
        "epoch": 3,
        "arch": "lvvit_s",
        "args": argparse.Namespace(lr=1),
        "state_dict": {f"module.{k}": v for k, v in state.items()},
        "state_dict_ema": {f"module.{k}": v for k, v in ema_state.items()},
    }
    torch.save(published, tmp_path / "published.pth.tar")
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": {f"_orig_mod.{k}": v for k, v in state.items()}}, tmp_path / "compiled.pth")
    safetensors.torch.save_file(state, tmp_path / "weights.safetensors")
    ours = write(tmp_path, 10, seed=4)
    for file, use_ema, expected in (
        ("published.pth.tar", True, ema),
        ("published.pth.tar", False, model),
        ("bare.pth", True, model),
        ("compiled.pth", True, model),
        ("weights.safetensors", True, model),
        (ours.name, True, ema),
        (ours.name, False, model),
    ):
        torch.manual_seed(9)
        fresh = LVViT(**TINY)
        checkpoint.load_weights(fresh, tmp_path / file, use_ema)
        assert same(fresh, expected), (file, use_ema)


def test_position_embeddings_are_resized(tmp_path):
    model = trained(5)[0]
    torch.save(model.state_dict(), tmp_path / "w.pth")
    larger = LVViT(**{**TINY, "img_size": 128})
    remarks = checkpoint.load_weights(larger, tmp_path / "w.pth")
    assert any("from 16 to 64 tokens" in remark for remark in remarks)
    grid = model.pos_embed[:, 1:].detach().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(
        larger.pos_embed[:, 1:].detach(), expected.permute(0, 2, 3, 1).reshape(1, 64, -1), rtol=1e-4, atol=1e-5
    )
    assert torch.equal(larger.pos_embed[:, :1], model.pos_embed[:, :1])


def test_heads_of_another_class_count_are_left_out_and_said(tmp_path):
    model = trained(6)[0]
    torch.save(model.state_dict(), tmp_path / "w.pth")
    other = LVViT(**{**TINY, "num_classes": 3})
    before = other.head.weight.detach().clone()
    remarks = checkpoint.load_weights(other, tmp_path / "w.pth")
    assert any("head.weight (5 classes)" in remark and "3 classes" in remark for remark in remarks)
    assert torch.equal(other.head.weight, before) and torch.equal(other.cls_token, model.cls_token)


def test_unusable_weights_are_refused_by_name(tmp_path):
    state = trained(7)[0].state_dict()
    torch.save(state, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "torn.pth").write_bytes(whole[: len(whole) // 2])
    safetensors.torch.save_file(state, tmp_path / "whole.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-100])
    torch.save({"something": 1}, tmp_path / "foreign.pth")
    torch.save(["malicious", print], tmp_path / "code.pth")
    (tmp_path / "text.pth").write_text("hello")
    torch.save({k: v for k, v in state.items() if k != "cls_token"}, tmp_path / "short.pth")
    torch.save({**state, "extra": torch.zeros(1)}, tmp_path / "long.pth")
    torch.save({**state, "norm.weight": torch.zeros(99)}, tmp_path / "shape.pth")
    (tmp_path / "folder.pth").mkdir()
    for name in (
        "torn.pth",
        "torn.safetensors",
        "foreign.pth",
        "code.pth",
        "text.pth",
        "short.pth",
        "long.pth",
        "shape.pth",
        "folder.pth",
        "missing.pth",
    ):
        with pytest.raises(WeightsError, match=name):
            checkpoint.load_weights(LVViT(**TINY), tmp_path / name)


def test_meta_is_json_that_people_can_read(tmp_path):
    meta = json.loads((write(tmp_path, 10, 42.0) / checkpoint.META).read_text())
    assert meta["format"] == checkpoint.FORMAT and meta["metrics"]["val_top1_ema"] == 42.0
    assert set(meta["files"]) == {"model.safetensors", "ema.safetensors", "optimizer.pt"}
