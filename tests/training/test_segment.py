"""Training for segmentation by the loop that classification has: it resumes exactly, stops for signals, guards its
steps, and validates within an epoch."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import yaml
from small_betons import masked_beton, write
from tiny_runs import TINY, flags, torchrun, weights

from tl_fast import segment
from tl_fast.models.normalise import Normalise
from tl_fast.pipeline.segment_loader import SegmentLoader
from tl_fast.system.ranks import Ranks
from tl_fast.training import checkpoint
from tl_fast.training.accuracy import Classifier
from tl_fast.training.loop import train
from tl_fast.training.meter import Meter
from tl_fast.training.nonfinite import NonFiniteError
from tl_fast.training.runlog import read_rows
from tl_fast.training.segment_config import SegmentConfig
from tl_fast.training.segment_task import Segmentation
from tl_fast.training.segmentation_accuracy import segmentation_accuracy
from tl_fast.training.trained import load_model
from tl_fast.training.windows import Inference

ALONE = Ranks(0, 1, torch.device("cpu"))
BACKBONE = {"model": "lvvit_t", "model_kwargs": {**TINY, "depth": 4}}


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    """Folder of train.beton, 20 images with masks of 5 classes, and val.beton, 7 images of two sizes."""
    folder = tmp_path_factory.mktemp("masked")
    masked_beton(folder / "train.beton", 20, ((64, 80), (72, 64)))
    masked_beton(folder / "val.beton", 7, ((64, 80), (48, 64)), seed=100)
    return folder


@pytest.fixture
def small(masked, tmp_path):
    """Makes configs of a tiny segmenter: 5 steps an epoch, 8 in all, validated every 3."""

    def make(name: str = "run", **changes) -> SegmentConfig:
        values = dict(
            train_data=str(masked / "train.beton"),
            val_data=str(masked / "val.beton"),
            output_dir=str(tmp_path / name),
            **BACKBONE,
            crop_size=64,
            decoder_channels=8,
            aux_channels=8,
            batch_size=4,
            steps=8,
            warmup_steps=2,
            lr=1e-3,
            eval_steps=3,
            checkpoint_steps=4,
            log_every=1,
            threads=1,
            device="cpu",
        )
        return SegmentConfig(**{**values, **changes})

    return make


@pytest.mark.usefixtures("one_thread")
def test_a_run_that_a_signal_ends_within_an_epoch_resumes_exactly(small, monkeypatch):
    """After two steps; the other run validates at steps 3, 6 and 8. Drop path, a moving average and distortion are
    on."""
    settings = dict(drop_path=0.2, ema_decay=0.9)
    straight = train(small("straight", **settings))
    end_step, calls = Meter.end_step, []

    def stopped(self) -> None:
        end_step(self)
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Meter, "end_step", stopped)
        broken = train(small("broken", **settings))
    assert broken["stopped"] == signal.SIGTERM and broken["steps"] <= 3 and broken["best_miou"] is None
    resumed = train(small("broken", **settings, resume="auto"))
    before, after = weights(straight["checkpoint"]), weights(resumed["checkpoint"])
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    rows = [read_rows(Path(summary["metrics"])) for summary in (straight, resumed)]
    timing = {"images_per_second", "data_wait"}
    plain = [[{key: row[key] for key in row.keys() - timing} for row in run] for run in rows]
    assert plain[0] == plain[1]
    assert [row["step"] for row in rows[0] if row["kind"] == "val"] == [3, 6, 8]
    train_row, val_row = (next(row for row in rows[0] if row["kind"] == kind) for kind in ("train", "val"))
    assert train_row["loss"] == pytest.approx(train_row["decoder_loss"] + 0.4 * train_row["aux_loss"], rel=1e-5)
    names = {f"val_{key}_{of}" for key in ("miou", "mean_accuracy", "pixel_accuracy") for of in ("raw", "ema")}
    assert val_row.keys() == {"kind", "step", "epoch"} | names
    scores = [max(row["val_miou_raw"], row["val_miou_ema"]) for row in rows[0] if row["kind"] == "val"]
    assert resumed["best_miou"] == straight["best_miou"] == max(scores)
    meta = checkpoint.read_meta(Path(straight["checkpoint"]))
    assert meta["task"] == "segmentation" and meta["class_names"] == [f"class {c}" for c in range(5)]
    assert meta["config"]["num_classes"] == 5


def test_a_step_that_is_not_finite_stops_the_run_and_keeps_its_samples_on_record(small, monkeypatch):
    forward, calls = Normalise.forward, []

    def poisoned(self, images):
        calls.append(None)
        return forward(self, images) * (math.nan if len(calls) == 2 else 1)

    monkeypatch.setattr(Normalise, "forward", poisoned)
    config = small(val_data=None)
    with pytest.raises(NonFiniteError, match="loss nan, gradient norm nan at step 1 .*--non_finite skip"):
        train(config)
    record = json.loads((Path(config.output_dir) / "nonfinite" / "step-0000000001.json").read_text())
    assert len(record["ranks"][0]["sample_ids"]) == 4 and len(record["names"]) == 4


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_size": 1}, "UPerNet's batch norms need two images .* leaves one: raise batch_size"),
        ({"batch_size": 40}, "20 samples do not fill one global batch of 40"),
        ({"num_classes": 4}, "train.beton has masks of 5 classes, the model 4: set num_classes to 5"),
        ({"eval_mode": "whole"}, "eval_mode whole: model lvvit_t takes images of crop_size 64 alone"),
        ({"crop_size": 72}, "multiples of 16"),
        ({"model_kwargs": {**TINY, "depth": 2}}, "it has 2 blocks; UPerNet takes the features of four"),
    ],
)
def test_settings_that_do_not_fit_are_named(small, changes, said):
    with pytest.raises(ValueError, match=said):
        train(small(**changes))


def test_data_without_masks_or_with_other_classes_are_named(small, masked, photos, tmp_path):
    write(tmp_path / "plain.beton", [path.read_bytes() for path in sorted(photos.glob("val/fish/*.jpg"))[:4]])
    with pytest.raises(ValueError, match="plain.beton.*no masks"):
        train(small(train_data=str(tmp_path / "plain.beton")))
    masked_beton(tmp_path / "four.beton", 4, num_classes=4)
    with pytest.raises(ValueError, match="four.beton has masks of 4 classes, the model 5"):
        train(small(val_data=str(tmp_path / "four.beton")))


def test_a_run_continues_with_its_own_masks_and_crop_alone(small, masked, tmp_path):
    config = small(max_steps=1, val_data=None)
    train(config)
    again = dataclasses.replace(config, resume="auto", max_steps=2)
    masked_beton(tmp_path / "other.beton", 20, ((64, 80), (72, 64)), seed=50)
    for changes, said in (
        ({"crop_size": 80}, "crop_size 64 -> 80"),
        ({"decoder_channels": 4}, "decoder_channels 8 -> 4"),
        ({"train_data": str(tmp_path / "other.beton")}, "train_data 20 samples with digest"),
    ):
        with pytest.raises(checkpoint.CheckpointError, match=f"is of another run: {said}"):
            train(dataclasses.replace(again, **changes))
    assert train(again)["steps"] == 2
    with pytest.raises(ValueError, match="is of a segmentation run, and no classifier"):
        load_model(config.output_dir)


def test_a_backbone_starts_from_a_classification_run(small, tiny):
    classification = tiny("classification", max_steps=1, **BACKBONE)
    trained = weights(train(classification)["checkpoint"])
    task = Segmentation(small(init_weights=classification.output_dir, num_classes=5, init_ema=False), ALONE)
    model = task.build_network()
    task.read_weights(model)
    backbone = model.backbone.state_dict()
    shared = [name for name in backbone if f"model.safetensors:{name}" in trained]
    assert len(shared) > 40 and all(torch.equal(backbone[n], trained[f"model.safetensors:{n}"]) for n in shared)


def test_the_command_trains_and_tells_mistakes_in_a_sentence(small, tmp_path, capsys):
    config = small(max_steps=1, val_data=None)
    segment.main(flags(config, tmp_path / "c.yaml"))
    resolved = yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text())
    assert resolved["num_classes"] == 5 and resolved["crop_size"] == 64
    capsys.readouterr()
    for options, code, said in (
        (["--crop_size", "8"], 2, r"segment.py: crop_size must be in .*"),
        (["--train_data", "nowhere.beton"], 1, r"segment.py: no beton at nowhere.beton.*"),
    ):
        with pytest.raises(SystemExit) as end:
            segment.main([*flags(config, tmp_path / "c.yaml"), *options])
        text = capsys.readouterr().err
        assert end.value.code == code and re.fullmatch(said + "\n", text), text


@pytest.mark.slow
def test_two_ranks_validate_every_sample_once(small, masked, tmp_path):
    config = small(max_steps=2, batch_size=8)
    done = torchrun(["tl_fast/segment.py", *flags(config, tmp_path / "c.yaml")], 2)
    assert done.returncode == 0, done.stderr
    (row,) = [row for row in read_rows(Path(config.output_dir) / "metrics.jsonl") if row["kind"] == "val"]
    config = dataclasses.replace(config, num_classes=5)
    model = Segmentation(config, ALONE).build_network()
    checkpoint.load_weights(model, checkpoint.find(Path(config.output_dir)), use_ema=False)
    with SegmentLoader(str(masked / "val.beton"), 4, crop_size=64, train=False, threads=1) as loader:
        (alone,) = segmentation_accuracy(
            [Classifier(model, config, ALONE.device)],
            loader,
            ALONE,
            num_classes=5,
            ignore_index=255,
            samples=7,
            inference=Inference(crop=64, stride=config.window_stride, fill=config.fill),
        )
    assert alone == pytest.approx({key: row[f"val_{key}_raw"] for key in alone}, abs=0.05)
