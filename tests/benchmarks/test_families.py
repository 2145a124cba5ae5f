"""docs/models.md lists what benchmarks/families.py says of the models."""

from __future__ import annotations

import importlib
import re
from types import ModuleType

import pytest
import torch
from tiny_runs import ROOT

from tl_fast.models.build import build_model


@pytest.fixture
def families(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("families")


def read_table() -> dict[str, list[str]]:
    lines = [line for line in (ROOT / "docs" / "models.md").read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0].strip("`"): cells[1:] for cells in rows[2:]}


def test_the_document_lists_every_model(families):
    assert [f"{name}:{cells[0]}" for name, cells in read_table().items()] == list(families.MODELS)


@pytest.mark.parametrize("name, cells", read_table().items())
def test_a_row_of_the_document_is_true(families, name, cells):
    """But for the loss and torch.compile, which need memory and time."""
    with torch.device("meta"):
        model = build_model(name, img_size=int(cells[0]), num_classes=families.CLASSES)
    assert list(families.describe(model)) == cells[:-2]
    assert 10 < float(cells[-2]) < 11 and cells[-1] in ("captured", "no")


def test_the_script_prints_its_rows_and_what_is_refused(families, capsys):
    families.main(["resnet18:64", "pit_ti_224:64"])
    printed = capsys.readouterr().out
    assert re.search(
        r"\| `resnet18` \| 64 \| 2×2 \| 0 \| average \| 12\.20 M \| 0\.51 M \| yes \| [\d.]+ \| captured \|", printed
    )
    assert "- `pit_ti_224`: model pit_ti_224 at 64 px takes no token labels" in printed


@pytest.mark.parametrize("error, cell", [(0.0, "inductor"), (0.1, "no")])
def test_inductor_is_said_of_a_step_with_the_eager_steps_loss(families, monkeypatch, capsys, error, cell):
    """With a stand-in for what torch.compile makes: inductor itself takes a minute a model."""

    def stand_in(step, device):
        return lambda *tensors: (step(*tensors)[0] + error, None)

    monkeypatch.setattr(families, "compiled", stand_in)
    families.main(["--inductor", "vit_tiny_patch16_224:32"])
    assert capsys.readouterr().out.splitlines()[2].endswith(f" | {cell} |")
