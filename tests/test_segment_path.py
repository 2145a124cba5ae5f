"""Semantic segmentation from folders of images and masks to scores and pictures, by its commands, on images as large as
CamVid's."""

import csv

import numpy as np
import pytest
from PIL import Image
from small_betons import polygon_mask
from tiny_runs import TINY

from tl_fast.command import main

CLASSES, VOID = 5, 11  # CamVid's void is 11, too
COLOURS = np.array([(60, 120, 240), (230, 200, 60), (90, 90, 95), (40, 160, 60), (200, 50, 60)], np.uint8)


def write_folders(folder, count: int, seed: int) -> None:
    """Images of 480 x 360 pixels, coloured as their masks say, with noise."""
    rng = np.random.default_rng(seed)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number in range(count):
        mask = polygon_mask(360, 480, CLASSES, seed=seed + number)
        noise = rng.normal(0, 25, (360, 480, 3)) + rng.normal(0, 15, 3)
        image = np.clip(COLOURS[np.minimum(mask, CLASSES - 1)] + noise, 0, 255).astype(np.uint8)
        mask[mask == 255] = VOID
        Image.fromarray(image).save(folder / f"images/{number:03}.jpg", quality=90)
        Image.fromarray(mask).save(folder / f"masks/{number:03}.png")


@pytest.mark.slow
def test_commands_pack_train_and_evaluate(tmp_path, capsys):
    """From random weights a tiny network learns classes that colours tell."""
    for name, count, seed in (("train", 24, 0), ("val", 4, 1000)):
        write_folders(tmp_path / name, count, seed)
        masks = ["--masks", str(tmp_path / name / "masks"), "--mask-classes", str(CLASSES), "--ignore-index", str(VOID)]
        command = [
            "convert",
            str(tmp_path / name / "images"),
            str(tmp_path / f"{name}.beton"),
            *masks,
            "--workers",
            "2",
        ]
        assert main(command) == 0
    run = str(tmp_path / "run")
    settings = {
        "train_data": tmp_path / "train.beton",
        "val_data": tmp_path / "val.beton",
        "output_dir": run,
        "model": "lvvit_t",
        "model_kwargs": {**TINY, "depth": 4},
        "crop_size": 128,
        "distort": False,
        "decoder_channels": 16,
        "aux_channels": 16,
        "batch_size": 8,
        "steps": 120,
        "warmup_steps": 5,
        "lr": 3e-3,
        "eval_steps": 60,
        "device": "cpu",
    }
    flags = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    assert main(["segment", *flags]) == 0
    table, predictions = tmp_path / "classes.csv", tmp_path / "predictions"
    written = ["--csv", str(table), "--save-predictions", str(predictions), "--overlays"]
    main(["segment", "--evaluate", str(tmp_path / "val.beton"), "--checkpoint", run, "--device", "cpu", *written])
    rows = list(csv.DictReader(table.open()))
    ious = [float(row["iou"]) for row in rows]
    assert len(ious) == CLASSES and np.mean(ious) > 45
    labelled = 0
    for number in range(4):
        with Image.open(predictions / f"{number:03}.png") as file:
            predicted = np.array(file)
        with Image.open(tmp_path / f"val/masks/{number:03}.png") as file:
            truth = np.array(file)
        assert predicted.shape == truth.shape and (predicted == truth)[truth != VOID].mean() > 0.6
        labelled += (truth != VOID).sum()
        assert (predictions / f"overlays/{number:03}.jpg").exists()
    assert sum(int(row["pixels"]) for row in rows) == labelled
