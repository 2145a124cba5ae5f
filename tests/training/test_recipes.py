"""The recipes of the published rows, LV-ViT's and VOLO-D1's: each file is what docs/recipes.md says of it, field by
field; each one's model is the published one, and each one trains."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import ROOT, TINY, weights

from tl_fast.models.lvvit import PATCH
from tl_fast.training.config import TrainConfig, parse_config
from tl_fast.training.loop import train
from tl_fast.training.network import build_network, grid_of
from tl_fast.training.runlog import read_rows

RECIPES = ROOT / "recipes"
GPUS = 8  # of the published commands
TIMM_NAMES = {"volo_d1": "volo_d1_224"}  # where the published code calls a model otherwise
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
    """The tables of docs/recipes.md: the rows' flags, fields from random weights, fields of fine-tuning, VOLO-D1's row,
    its fields, other models."""
    tables, lines = [], []
    for line in [*(ROOT / "docs" / "recipes.md").read_text().splitlines(), ""]:
        if line.startswith("|"):
            lines.append([cell.strip() for cell in line.strip("|").split("|")])
        elif lines:
            head, _, *body = lines
            tables.append([dict(zip(head, cells, strict=True)) for cells in body])
            lines = []
    return tables


LVVIT_ROWS, FROM_SCRATCH, FINE_TUNING, VOLO_ROWS, VOLO_FIELDS, OTHER_MODELS = read_tables()
ROWS = [*LVVIT_ROWS, *VOLO_ROWS]
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
    if row in VOLO_ROWS:
        fields |= {line["field"].strip("`"): value(line[column]) for line in VOLO_FIELDS}
    fields |= {FIELD_OF_FLAG[flag]: given for flag, given in flags.items() if flag in FIELD_OF_FLAG}
    fields["model"] = TIMM_NAMES.get(fields["model"], fields["model"])
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
    assert grid_of(config) == (read_flags(row)["--token-label-size"],) * 2


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


def test_every_published_row_has_its_files():
    published = {path.stem for path in (RECIPES / "published").glob("*.yaml")}
    assert published == set(NAMES) <= {path.stem for path in RECIPES.glob("*.yaml")}


BOTH = pytest.mark.parametrize("folder, column", [("published", "published"), (".", "ours")], ids=["published", "ours"])
EACH_ROW = pytest.mark.parametrize("row", ROWS, ids=NAMES)


@BOTH
@EACH_ROW
def test_a_recipe_is_what_the_document_says(row, folder, column):
    config = recipe(row["recipe"], folder)
    check(config, row, column)
    start = row["starts from"]
    check_start(config, row, recipe(start, folder) if start in NAMES else None)


@BOTH
@EACH_ROW
def test_a_recipes_head_names_its_command_and_the_published_accuracy(row, folder, column):
    path = RECIPES / folder / f"{row['recipe']}.yaml"
    config, text = recipe(row["recipe"], folder), path.read_text()
    head = " ".join(line.lstrip("# ").rstrip("\\ ") for line in text.splitlines() if line.startswith("#"))
    assert f"--config {path.relative_to(ROOT)} " in head and f"--output_dir {config.output_dir}" in head
    assert config.init_weights is None or f"--init_weights {config.init_weights} " in head
    assert f"{row['top-1'].rstrip(' *')} % top-1" in head and "Not reproduced here yet" in head
    if column == "published":
        for flag, given in read_flags(row).items():
            assert re.search(rf"{flag}\b" if given is True else rf"{flag} \S", head), flag
    else:
        assert "Expected time:" in head


# Millions of parameters with 1,000 classes: the published table's, and for L at 288 px that of 448 px with 18 x 18
# position embeddings of 768 channels instead of 28 x 28. VOLO-D1's is timm's; its paper says 26.6.
PARAMETERS = {
    "lvvit_t_224": 8.53,
    "lvvit_s_224": 26.15,
    "lvvit_s_384": 26.30,
    "lvvit_m_224": 55.83,
    "lvvit_m_384": 56.03,
    "lvvit_m_448": 56.13,
    "lvvit_l_288": 150.12,
    "lvvit_l_448": 150.47,
    "lvvit_l_512": 150.66,
    "volo_d1_224": 26.63,
}


@BOTH
@EACH_ROW
def test_a_recipes_model_is_the_published_one(row, folder, column):
    """At its full size, without memory."""
    with torch.device("meta"):
        model = build_network(recipe(row["recipe"], folder))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert parameters == pytest.approx(PARAMETERS[row["recipe"]], abs=0.006)
    assert model.grid_size == 2 * (read_flags(row)["--token-label-size"],)


def one_small_step(config: TrainConfig, betons: Path, run: Path, **changes) -> TrainConfig:
    """A recipe's config for one step on four photos and four classes into `run`, with `changes`, which make the model
    small."""
    return dataclasses.replace(
        config,
        train_data=str(betons / "train.beton"),
        output_dir=str(run),
        num_classes=None,
        batch_size=4,
        lr_base_batch=4,
        max_steps=1,
        log_every=1,
        threads=1,
        device="cpu",
        **changes,
    )


def take_a_step(name: str, folder: str, betons: Path, runs: Path) -> TrainConfig:
    """Run a recipe's first step on about two sevenths of its tokens a side, with four photos, four classes and a tiny
    LV-ViT, or VOLO as it is; a fine-tuned one after the recipe that it starts from. The config that ran, with its run
    in `runs`."""
    config = recipe(name, folder)
    start = None
    if config.init_weights is not None:
        start = take_a_step(next(row for row in ROWS if row["recipe"] == name)["starts from"], folder, betons, runs)
    changes = dict(val_data=None, init_weights=start and start.output_dir)
    changes |= dict(img_size=PATCH * (grid_of(config)[0] * 2 // 7))
    changes |= dict(model_kwargs=TINY if config.model.startswith("lvvit") else {})
    reduced = one_small_step(config, betons, runs / name, **changes)
    assert train(reduced)["steps"] == 1
    return reduced


@BOTH
@EACH_ROW
def test_a_recipe_takes_a_step(row, folder, column, betons, tmp_path):
    config = take_a_step(row["recipe"], folder, betons, tmp_path)
    run = Path(config.output_dir)
    (step,) = [line for line in read_rows(run / "metrics.jsonl") if line["kind"] == "train"]
    terms = config.cls_weight * step["class_loss"] + config.dense_weight * step["token_loss"]
    assert step["loss"] == pytest.approx(terms, rel=1e-4) and 0 < step["loss"] < 10
    assert step["lr"] == pytest.approx(config.warmup_lr if config.warmup_epochs else 5e-6)
    after = weights(next((run / "checkpoints").glob("step-*")))
    if config.ema_decay == 0:
        (head,) = (name for name in after if re.fullmatch(r"model\.safetensors:(backbone\.)?head\.weight", name))
        assert torch.equal(after[head.replace("model", "ema", 1)], after[head])
    if config.init_weights is not None:
        before = weights(next((Path(config.init_weights) / "checkpoints").glob("step-*")))
        file = "ema" if config.init_ema else "model"
        moved = after["model.safetensors:head.weight"] - before[f"{file}.safetensors:head.weight"]
        assert 0 < moved.abs().max() <= 1.01 * step["lr"]  # AdamW's first step is as long as the learning rate
        assert after["model.safetensors:pos_embed"].shape[1] > before["model.safetensors:pos_embed"].shape[1]


# Other models

OTHERS = pytest.mark.parametrize("row", OTHER_MODELS, ids=[row["recipe"] for row in OTHER_MODELS])
REDUCED = {  # what makes them small
    "deit_small_224": {"depth": 1},
    "swin_tiny_224": {"depths": [1, 1, 1, 1], "embed_dim": 24},
    "convnext_tiny_224": {"depths": [1, 1, 1, 1], "dims": [16, 24, 32, 48]},
}


def test_every_recipe_is_in_a_table():
    of_tables = {row["recipe"] for row in (*ROWS, *OTHER_MODELS)}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == of_tables | {"demo_photos", "segment_lvvit_s_ade20k"}


@OTHERS
def test_a_recipe_of_another_model_is_what_the_document_says(row):
    config, defaults = recipe(row["recipe"]), TrainConfig(train_data="x.beton").to_dict()
    fields = {line["field"].strip("`"): value(line["ours"]) for line in FROM_SCRATCH}
    fields |= {name: value(row[name]) for name in ("model", "drop_path", "lr", "warmup_epochs", "crop_pct")}
    for field in dataclasses.fields(TrainConfig):
        if field.name not in PATHS:
            resolved = config.to_dict()[field.name]
            assert resolved == fields.get(field.name, defaults[field.name]), field.name
    assert config.init_weights is None
    text = (RECIPES / f"{row['recipe']}.yaml").read_text()
    assert f"--config recipes/{row['recipe']}.yaml " in text and f"--output_dir {config.output_dir}" in text
    assert f"{row['published without token labels']} % top-1" in text and "yet" in text
    assert "without token labels" in text


@OTHERS
def test_the_size_of_another_model_is_what_the_document_says(row):
    with torch.device("meta"):
        model = build_network(recipe(row["recipe"]))
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert parameters == pytest.approx(value(row["parameters, M"]), abs=0.006)
    assert model.grid_size == 2 * (value(row["tokens"]),) and model.can_mix_tokens


@OTHERS
def test_a_recipe_of_another_model_takes_a_step(row, betons, tmp_path):
    changes = dict(val_data=str(betons / "val.beton"), model_kwargs=REDUCED[row["recipe"]], img_size=64)
    config = one_small_step(recipe(row["recipe"]), betons, tmp_path / "run", **changes)
    assert train(config)["steps"] == 1
    (step,) = [line for line in read_rows(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "train"]
    assert step["loss"] == pytest.approx(step["class_loss"] + 0.5 * step["token_loss"], rel=1e-4)
