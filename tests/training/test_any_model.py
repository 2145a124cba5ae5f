"""Models of many families through the training loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from model_families import FAMILIES
from tiny_runs import weights

from tl_fast.training import accuracy
from tl_fast.training import loop as training
from tl_fast.training.runlog import read_rows


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
