"""Models of many families through the training loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from model_families import FAMILIES
from tiny_runs import weights

from tl_fast.models.token_label import backbone_state_dict
from tl_fast.system.mistakes import InputError
from tl_fast.training import accuracy
from tl_fast.training import loop as training
from tl_fast.training.runlog import read_rows
from tl_fast.training.trained import load_model


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_validates_and_resumes(tiny, betons, name):
    family = FAMILIES[name]
    same = dict(model=name, img_size=family.img_size, model_kwargs=family.options, batch_size=8, auto_augment=None)
    first = training.train(tiny("broken", val_data=str(betons / "val.beton"), max_steps=1, **same))
    (step,) = (row for row in read_rows(Path(first["metrics"])) if row["kind"] == "train")
    for kind in ("class_loss", "token_loss"):  # of untrained weights: not far from 4 classes at random
        assert 0.5 * math.log(4) < step[kind] < 2.5 * math.log(4)
    assert step["loss"] == pytest.approx(step["class_loss"] + 0.5 * step["token_loss"], rel=1e-4)
    evaluated = accuracy.evaluate(str(betons / "val.beton"), Path(first["checkpoint"]), use_ema=False)
    assert evaluated["top1"] == pytest.approx(first["val_top1_raw"])

    again = training.train(tiny("broken", resume="auto", max_steps=2, **same))
    straight = training.train(tiny("straight", max_steps=2, **same))
    resumed, expected = weights(again["checkpoint"]), weights(straight["checkpoint"])
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
