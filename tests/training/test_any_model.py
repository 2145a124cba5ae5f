"""Models of many families through the training loop."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import kill_run
import pytest
import timm
import torch
from conversions import run
from model_families import FAMILIES
from tiny_runs import weights

from tl_fast.annotation.run import AnnotateConfig, annotate
from tl_fast.models.token_label import backbone_state_dict
from tl_fast.system.mistakes import InputError
from tl_fast.training import accuracy, record
from tl_fast.training import loop as training
from tl_fast.training.runlog import read_rows
from tl_fast.training.trained import load_model


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_validates_and_resumes(tiny, betons, name):
    family = FAMILIES[name]
    same = dict(model=name, img_size=family.img_size, model_kwargs=family.options, batch_size=8, auto_augment=None)
    same |= dict(val_data=str(betons / "val.beton"), max_steps=2, checkpoint_steps=1)
    config = tiny(**same)
    straight = training.train(config)
    step = next(row for row in read_rows(Path(straight["metrics"])) if row["kind"] == "train")
    for kind in ("class_loss", "token_loss"):  # of untrained weights: not far from 4 classes at random
        assert 0.5 * math.log(4) < step[kind] < 2.5 * math.log(4)
    assert step["loss"] == pytest.approx(step["class_loss"] + 0.5 * step["token_loss"], rel=1e-4)
    evaluated = accuracy.evaluate(str(betons / "val.beton"), Path(straight["checkpoint"]), use_ema=False)
    assert evaluated["top1"] == pytest.approx(straight["val_top1_raw"])

    expected = weights(straight["checkpoint"])
    shutil.rmtree(straight["checkpoint"])  # the run was cut off after its first step, then
    resumed = weights(training.train(dataclasses.replace(config, val_data=None, resume="auto"))["checkpoint"])
    assert [start["step"] for start in record.read_record(Path(config.output_dir))] == [0, 1]
    assert resumed.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(resumed[key], expected[key])] == []


def test_a_trained_model_is_loaded_and_goes_back_to_stock_timm(tiny, betons):
    name, family = "vit_tiny_patch16_224", FAMILIES["vit_tiny_patch16_224"]
    same = dict(model=name, img_size=family.img_size, model_kwargs=family.options, batch_size=8)
    summary = training.train(tiny(max_steps=2, **same))
    run = Path(summary["checkpoint"]).parents[1]
    stock = timm.create_model(name, img_size=family.img_size, num_classes=4, **family.options).eval()
    images = torch.randn(2, 3, family.img_size, family.img_size)
    logits = {}
    for use_ema, prefix in ((True, "ema"), (False, "model")):
        model = load_model(run, use_ema=use_ema)
        stock.load_state_dict(backbone_state_dict(model), strict=True)
        stored = weights(summary["checkpoint"])[f"{prefix}.safetensors:backbone.head.weight"]
        assert torch.equal(stock.head.weight, stored)
        with torch.inference_mode():
            logits[prefix] = model(images)
            torch.testing.assert_close(logits[prefix], stock(images), rtol=0, atol=0)
    assert not torch.equal(logits["ema"], logits["model"])
    # A file of stock timm's needs the model's name
    torch.save(stock.state_dict(), run / "stock.pth")
    with pytest.raises(InputError, match=r"stock\.pth does not say which model it is"):
        load_model(run / "stock.pth")
    shallow = dict(model=name, img_size=family.img_size)
    with pytest.raises(InputError, match=r"stock\.pth does not fit VisionTransformer"):  # which has 12 blocks
        load_model(run / "stock.pth", **shallow)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name, compiled", [("vit_tiny_patch16_224", True), ("swin_tiny_patch4_window7_224", False)])
def test_two_ranks_follow_one(tiny, name, compiled):
    """2 ranks x 8 images against 1 rank x 16; compiled on both ranks, eager on one."""
    family, losses, context = FAMILIES[name], {}, kill_run.server()
    options = family.options | ({"depth": 1} if compiled else {})  # compiling takes most of the time
    same = dict(model=name, img_size=family.img_size, model_kwargs=options, batch_size=16, max_steps=6)
    same |= dict(drop_path=0.0, mix_token=False, deterministic=True)
    for ranks in (1, 2):
        config = tiny(f"{ranks}", compile=compiled and ranks == 2, bucket_mb=1.0, **same)
        job = kill_run.run(context, config, ranks)
        assert job.codes == [0] * ranks, job.outputs
        rows = read_rows(Path(config.output_dir) / "metrics.jsonl")
        losses[ranks] = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses[1]) == 6 and losses[2] == pytest.approx(losses[1], abs=1e-3)


def test_a_teacher_of_ours_labels_a_student(tiny, betons, tmp_path, photos, to_beton):
    """A vision transformer trained with token labels annotates, and another model trains on the strongest classes."""
    family = FAMILIES["vit_tiny_patch16_224"]
    same = dict(batch_size=8, max_steps=1)
    training.train(tiny("teacher", model="vit_tiny_patch16_224", img_size=64, model_kwargs=family.options, **same))
    maps, data = tmp_path / "maps", tmp_path / "student.beton"
    annotate(AnnotateConfig(images=photos / "train", out=maps, checkpoint=tmp_path / "teacher", device="cpu"))
    assert run(to_beton, photos / "train", data, "--label-maps", maps) == 0
    student = tiny("student", train_data=str(data), labels="argmax", **same)
    (step,) = (row for row in read_rows(Path(training.train(student)["metrics"])) if row["kind"] == "train")
    assert math.isfinite(step["token_loss"]) and step["token_loss"] > 0
