"""Inputs that are not square, from training to annotation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from model_families import FAMILIES
from tiny_runs import TINY, weights

from tl_fast.annotation.run import AnnotateConfig, annotate
from tl_fast.labelmaps.store import LabelMapStore
from tl_fast.training import accuracy
from tl_fast.training import loop as training
from tl_fast.training.runlog import read_rows
from tl_fast.training.trained import load_model

# Pixels and tokens of each model.
MODELS = {
    "lvvit_t": (TINY, (64, 96), (4, 6)),
    "vit_tiny_patch16_224": (FAMILIES["vit_tiny_patch16_224"].options, (96, 64), (6, 4)),
    "swin_tiny_patch4_window7_224": (FAMILIES["swin_tiny_patch4_window7_224"].options, (64, 96), (2, 3)),
    "convnext_atto": (FAMILIES["convnext_atto"].options, (64, 96), (2, 3)),
}
RECIPE = dict(batch_size=8, auto_augment="rand-m9-mstd0.5-inc1", erase=0.5)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_validates_resumes_and_annotates(tiny, betons, photos, tmp_path, name):
    options, size, grid = MODELS[name]
    same = dict(model=name, model_kwargs=options, img_size=size, **RECIPE)
    first = training.train(tiny("run", val_data=str(betons / "val.beton"), max_steps=1, **same))
    (step,) = (row for row in read_rows(Path(first["metrics"])) if row["kind"] == "train")
    assert 0.5 * math.log(4) < step["token_loss"] < 2.5 * math.log(4)
    model = load_model(tmp_path / "run")
    assert model.grid_size == grid and model(torch.zeros(1, 3, *size)).shape == (1, 4)
    evaluated = accuracy.evaluate(str(betons / "val.beton"), tmp_path / "run", use_ema=False)
    assert evaluated["top1"] == pytest.approx(first["val_top1_raw"])

    again = training.train(tiny("run", resume="auto", max_steps=2, **same))
    straight = training.train(tiny("straight", max_steps=2, **same))
    resumed, expected = weights(again["checkpoint"]), weights(straight["checkpoint"])
    assert [key for key in expected if not torch.equal(resumed[key], expected[key])] == []

    manifest = annotate(
        AnnotateConfig(images=photos / "val", out=tmp_path / "maps", checkpoint=tmp_path / "run", device="cpu")
    )
    assert manifest["preprocessing"]["img_size"] == list(size)
    assert LabelMapStore(tmp_path / "maps").spec.shape[1:] == grid


@pytest.mark.parametrize("name", ["lvvit_t", "vit_tiny_patch16_224"])
def test_a_square_run_is_fine_tuned_on_rectangles_and_mixed(tiny, tmp_path, name):
    """Position embeddings are resized; mixup and CutMix mix rectangles, too."""
    options, size, grid = MODELS[name]
    same = dict(model=name, model_kwargs=options, **RECIPE)
    training.train(tiny("square", max_steps=1, **same))
    mixed = dict(token_label=False, mix_token=False, mixup=0.8, cutmix=1.0)
    start = str(tmp_path / "square")
    summary = training.train(tiny("tuned", init_weights=start, img_size=size, max_steps=1, **same | mixed))
    (positions,) = (
        value for key, value in weights(summary["checkpoint"]).items() if key.startswith("model") and "pos_embed" in key
    )
    assert positions.shape[1] == 1 + np.prod(grid)
    meta = json.loads((Path(summary["checkpoint"]) / "meta.json").read_text())
    assert meta["config"]["img_size"] == list(size)
