"""The recipes of the published rows: each file is what docs/recipes.md says of it, field by field."""

from __future__ import annotations

import dataclasses
import re
import shlex
from typing import Any

import pytest
import yaml
from tiny_runs import ROOT

from tl_fast.training.config import TrainConfig, parse_config
from tl_fast.training.network import square_grid

RECIPES = ROOT / "recipes"
GPUS = 8  # of the published commands
# A flag of a row's command -> our field of the same meaning and unit.
FIELD_OF_FLAG = {
    "--model": "model",
    "--img-size": "img_size",
    "--drop-path": "drop_path",
    "--lr": "lr",
    "--min-lr": "min_lr",
    "--weight-decay": "weight_decay",
    "--aa": "auto_augment",
}
OTHER_FLAGS = {"-b", "--token-label-size", "--model-ema", "--finetune"}
PATHS = ("train_data", "val_data", "output_dir", "init_weights")


def read_tables() -> list[list[dict[str, str]]]:
    """The tables of docs/recipes.md: the rows' flags, fields from random weights, fields of fine-tuning."""
    tables, lines = [], []
    for line in [*(ROOT / "docs" / "recipes.md").read_text().splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            head, _, *body = lines
            tables.append([dict(zip(head, cells, strict=True)) for cells in body])
            lines = []
    return tables


ROWS, FROM_SCRATCH, FINE_TUNING = read_tables()
NAMES = [row["recipe"] for row in ROWS]


def value(cell: str) -> Any:
    """What a cell such as `0.5` says, as YAML has it."""
    return yaml.safe_load(re.fullmatch(r"`(.*)`", cell)[1])


def read_flags(row: dict[str, str]) -> dict[str, Any]:
    """The flags of a row's command and their values, True for those without."""
    words = shlex.split(re.fullmatch(r"`(.*)`", row["flags"])[1])
    flags: dict[str, Any] = {}
    for word in words:
        if word.startswith("-"):
            name = word
            flags[name] = True
        else:
            flags[name] = yaml.safe_load(word)
    assert flags.keys() <= FIELD_OF_FLAG.keys() | OTHER_FLAGS
    return flags


def expected_fields(row: dict[str, str], column: str) -> dict[str, Any]:
    """All fields but paths that a row's recipe sets: the tables' `column` ("published" or "ours"), and its command."""
    flags = read_flags(row)
    fields = {line["field"].strip("`"): value(line[column]) for line in FROM_SCRATCH}
    if "--finetune" in flags:
        fields |= {line["field"].strip("`"): value(line[column]) for line in FINE_TUNING}
    fields |= {FIELD_OF_FLAG[flag]: given for flag, given in flags.items() if flag in FIELD_OF_FLAG}
    batch = GPUS * flags["-b"]
    return {**fields, "batch_size": batch, "lr_base_batch": batch, "crop_pct": value(row["evaluation's crop"])}


def check(config: TrainConfig, row: dict[str, str], column: str) -> None:
    """That a recipe's config has the values of docs/recipes.md, and the default in every field which is not there."""
    fields = expected_fields(row, column)
    defaults = TrainConfig(train_data="x.beton").to_dict()
    for field in dataclasses.fields(TrainConfig):
        if field.name not in PATHS:
            resolved = config.to_dict()[field.name]
            assert resolved == fields.get(field.name, defaults[field.name]), field.name
    assert square_grid(config) == read_flags(row)["--token-label-size"]


def check_start(config: TrainConfig, row: dict[str, str], start: TrainConfig | None) -> None:
    """That a fine-tuned row starts from the folder of the run that the table names, and other rows from no weights."""
    assert ("--finetune" in read_flags(row)) == (start is not None)
    assert config.init_weights == (start and start.output_dir)
    if start is not None:
        assert start.model == config.model and start.img_size < config.img_size


def recipe(name: str, folder: str = ".") -> TrainConfig:
    return parse_config(["--config", str(RECIPES / folder / f"{name}.yaml")])


def test_the_commands_name_an_average_where_the_table_has_one():
    for row in ROWS:
        assert ("--model-ema" in read_flags(row)) == (expected_fields(row, "published")["ema_decay"] > 0)


def test_every_published_row_has_a_file():
    assert {path.stem for path in (RECIPES / "published").glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_published_recipe_is_the_published_command(row):
    config = recipe(row["recipe"], "published")
    check(config, row, "published")
    start = row["starts from"]
    check_start(config, row, recipe(start, "published") if start in NAMES else None)


@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_a_recipes_head_names_its_flags_its_command_and_the_accuracy(row):
    text = (RECIPES / "published" / f"{row['recipe']}.yaml").read_text()
    head = " ".join(line.lstrip("# ").rstrip("\\ ") for line in text.splitlines() if line.startswith("#"))
    for flag, given in read_flags(row).items():
        assert re.search(rf"{flag}\b" if given is True else rf"{flag} \S", head), flag
    assert f"--config recipes/published/{row['recipe']}.yaml" in head
    assert f"{row['top-1'].rstrip(' *')} % top-1" in head and "Not reproduced here yet" in head
