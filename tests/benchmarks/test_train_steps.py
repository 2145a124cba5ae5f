"""benchmarks/train.py on the CPU: contenders and steps of LV-ViT and of other models, and the row of a whole run."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from tiny_runs import ROOT

from tl_fast.models.build import build_model
from tl_fast.system.mistakes import InputError


@pytest.fixture
def train(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return importlib.import_module("train")


def options(size: int = 64, **changes) -> argparse.Namespace:
    values = {"size": size, "batch": 2, "classes": 10, "drop_path": 0.1, "beton": None, "contenders": None}
    return argparse.Namespace(**{**values, **changes})


def test_the_published_style_is_written_for_lvvit_alone(train):
    assert train.contenders_of("lvvit_t", 64, options()) == list(train.CPU_CONTENDERS)
    ours = ["tl_fast, compiled", "tl_fast, eager", train.FED, train.BESIDE]
    assert train.contenders_of("resnet18", 64, options(beton="train.beton")) == ours
    with pytest.raises(InputError, match="published style is written for LV-ViT alone"):
        train.contenders_of("resnet18", 64, options(contenders=["published style, eager"]))


@pytest.mark.parametrize(
    "name, reason", [("pit_ti_224", "takes no token labels"), ("densenet121", "set drop_path 0, this model has none")]
)
def test_a_model_that_cannot_train_is_refused_with_its_reason(train, name, reason):
    with pytest.raises(InputError, match=f"{name} .*{reason}"):
        train.contenders_of(name, 224, options())


@pytest.mark.parametrize(
    "name, size, drop_path, cells, mixes",
    [
        ("vit_tiny_patch16_224", 64, 0.1, 16, True),
        ("swin_tiny_patch4_window7_224", 64, 0.1, 4, True),
        ("levit_128s", 224, 0.0, 16, False),
    ],
)
def test_a_step_of_any_model_has_its_own_grid(train, name, size, drop_path, cells, mixes):
    model = build_model(name, img_size=size, num_classes=10, drop_path=drop_path).train()
    side = train.Ours(model, "tl_fast, eager", options(size), torch.device("cpu"))
    tensors = side.synthetic(options(size))
    assert tensors[1].shape == (2, 1 + cells, 10) and model.can_mix_tokens == mixes
    before = side.model.get_token_head().weight.detach().clone()
    clock = train.Clock(torch.device("cpu"))
    for number in range(2):
        clock.mark(), clock.mark()
        side.step(number, clock, *tensors)
        clock.mark()
    assert len(clock.seconds()) == len(train.PHASES)
    assert torch.isfinite(side.loss) and not torch.equal(before, side.model.get_token_head().weight)


@pytest.mark.slow
def test_a_run_writes_the_row_of_another_model(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "train.py"), "--models", "vit_tiny_patch16_224:64"]
    flags = "--batch 2 --classes 10 --steps 1 --rounds 2 --warm-up 1 --threads 1".split()
    results = tmp_path / "rows.jsonl"
    contenders = ["--contenders", "tl_fast, eager", "published style, eager"]
    subprocess.run([*command, *flags, "--results", str(results), *contenders], check=True, capture_output=True)
    (row,) = map(json.loads, results.read_text().splitlines())
    assert (row["model"], row["size"], row["contender"]) == ("vit_tiny_patch16_224", 64, "tl_fast, eager")
    assert row["median"] > 0 and set(row["ms"]) == {"data", "forward", "backward", "update"}
