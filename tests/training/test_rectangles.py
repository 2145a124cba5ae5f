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

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.layers import resample_abs_pos_embed

from tl_fast.annotation.run import AnnotateConfig, annotate
from tl_fast.labelmaps.store import LabelMapStore
from tl_fast.models.build import build_model
from tl_fast.models.weights import fit
from tl_fast.system.mistakes import InputError
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


def trained_at(size: tuple[int, int], name: str, options: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build_model(name, img_size=size, num_classes=3, options=options).state_dict()


@pytest.mark.parametrize("name", ["lvvit_t", "vit_tiny_patch16_224", "beit_base_patch16_224"])
@pytest.mark.parametrize("size", [(96, 64), (128, 128)], ids=str)
def test_weights_of_rectangles_come_along_to_another_size(name, size):
    """As many tokens in another shape are resized, too."""
    options = TINY if name == "lvvit_t" else FAMILIES[name].options
    state, model = trained_at((64, 96), name, options), build_model(name, img_size=size, num_classes=3, options=options)
    fit(model, state, Path("x"), (64, 96))
    for key, value in model.state_dict().items():
        if key.endswith("pos_embed"):
            grids = [size[0] // 16, size[1] // 16], [4, 6]
            assert torch.equal(value, resample_abs_pos_embed(state[key], *grids, num_prefix_tokens=1))
        elif "relative_position_bias_table" in key:
            grids = (2 * size[0] // 16 - 1, 2 * size[1] // 16 - 1), (7, 11)
            old, new = state[key][:-3].unflatten(0, grids[1]), value[:-3].unflatten(0, grids[0])
            torch.testing.assert_close(new[grids[0][0] // 2, grids[0][1] // 2], old[3, 5])  # a token with itself
        elif "relative_position" not in key:
            assert torch.equal(value, state[key]), key


def test_windows_and_convolutions_fit_any_size_and_other_positions_are_refused_by_name():
    for name, size in (("convnext_atto", (192, 128)), ("swin_tiny_patch4_window7_224", (448, 672))):
        trained, options = (size[0] // 2, size[1] // 2), FAMILIES[name].options
        model, state = (
            build_model(name, img_size=size, num_classes=3, options=options),
            trained_at(trained, name, options),
        )
        fit(model, state, Path("x"), trained)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if "weight" in key)
    for name, size in (("cait_xxs24_224", (96, 64)), ("swin_tiny_patch4_window7_224", (224, 160))):
        options = FAMILIES[name].options
        model, state = (
            build_model(name, img_size=size, num_classes=3, options=options),
            trained_at(size[::-1], name, options),
        )
        with pytest.raises(InputError, match="does not resize the positions of (Cait|SwinTransformer) from rectangles"):
            fit(model, state, Path("x"), size[::-1])
