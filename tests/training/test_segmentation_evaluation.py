"""Evaluation of a segmentation run's checkpoint, by its command."""

from __future__ import annotations

import csv
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_betons import masked_beton, masked_samples, write
from tiny_runs import TINY

from tl_fast import evaluate, segment
from tl_fast.models.segmentation import build_segmenter
from tl_fast.pipeline.segment_loader import SegmentLoader
from tl_fast.system.ranks import Ranks
from tl_fast.training import checkpoint
from tl_fast.training.accuracy import Classifier
from tl_fast.training.predictions import palette
from tl_fast.training.segment_config import SegmentConfig
from tl_fast.training.segmentation_accuracy import count_pixels
from tl_fast.training.windows import Inference, probabilities

ALONE = Ranks(0, 1, torch.device("cpu"))
SIZES = [(64, 96), (64, 96), (96, 64), (40, 48)]
OPTIONS = ["--device", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    """A beton of 8 images and its masks; 5 classes, sizes in turn."""
    path = tmp_path_factory.mktemp("masked") / "val.beton"
    return path, masked_beton(path, 8, SIZES)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, SegmentConfig, torch.nn.Module]:
    """The folder of a run of a tiny network, its config and the network that its checkpoint holds, in eval mode."""
    folder = tmp_path_factory.mktemp("run")
    config = SegmentConfig(
        train_data="unused.beton",
        model="lvvit_t",
        model_kwargs={**TINY, "depth": 4},
        crop_size=64,
        num_classes=5,
        decoder_channels=16,
        drop_path=0.0,
    )
    torch.manual_seed(3)
    model = build_segmenter(
        config.model, crop_size=64, num_classes=5, options=config.model_options, decoder_channels=16
    ).eval()
    torch.nn.init.normal_(model.classifier.weight)  # so that several classes are predicted
    meta = dict(
        global_step=1,
        epoch=0,
        step_in_epoch=1,
        config=config.to_dict(),
        metrics={},
        task="segmentation",
        class_names=[f"class {c}" for c in range(5)],
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    checkpoint.save(folder / "checkpoints", checkpoint.snapshot(model=model, ema=model, optimizer=optimizer, meta=meta))
    return folder, config, model


def predicted(data, run, inference: Inference) -> list[np.ndarray]:
    """Classes of every sample, one image at a time."""
    _, config, model = run
    call = Classifier(model, config, ALONE.device)
    classes = []
    with SegmentLoader(data[0], 1, train=False, threads=1) as loader, torch.inference_mode():
        for batch in loader:
            values = probabilities(call, batch.images, tuple(batch.masks.shape[1:]), inference)
            classes.append(values.argmax(dim=1)[0].numpy())
    return classes


def test_a_checkpoint_is_scored_and_its_predictions_written(data, run, tmp_path, capsys):
    beton, masks = data
    arguments = ["--evaluate", str(beton), "--checkpoint", str(run[0]), *OPTIONS, "--batch-size", "3", "--flip"]
    arguments += ["--scales", "0.75", "1", "--stride", "40"]
    arguments += ["--csv", str(tmp_path / "classes.csv"), "--save-predictions", str(tmp_path / "new"), "--overlays"]
    result = segment.main(arguments)
    settings = Inference(crop=64, stride=40, scales=(0.75, 1.0), flip=True, fill=run[1].fill)
    classes = predicted(data, run, settings)
    matrix = np.zeros((5, 5), np.int64)
    for i, (mask, expected) in enumerate(zip(masks, classes, strict=True)):
        with Image.open(tmp_path / "new" / f"image-{i}.png") as picture:
            agreeing = (np.asarray(picture) == expected).mean()
            assert picture.mode == "P" and picture.size == mask.shape[::-1] and agreeing > 0.999
            assert picture.getpalette()[:15] == palette(5)[:5].flatten().tolist()
            np.add.at(matrix, (mask[mask != 255], np.asarray(picture)[mask != 255]), 1)
        with Image.open(tmp_path / "new" / "overlays" / f"image-{i}.jpg") as picture:
            assert picture.size == mask.shape[::-1]
    assert len(set(np.concatenate([values.flatten() for values in classes]))) > 1
    iou = np.diag(matrix) / (matrix.sum(axis=0) + matrix.sum(axis=1) - np.diag(matrix))
    assert result["miou"] == pytest.approx(100 * np.nanmean(iou)) and result["samples"] == 8
    with open(tmp_path / "classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"class {c}" for c in range(5)]
    assert [int(row["pixels"]) for row in rows] == matrix.sum(axis=1).tolist()
    assert f"(ema): mIoU {result['miou']:.2f} %, mean accuracy" in capsys.readouterr().out


def test_whole_images_need_a_network_of_any_size(data, run, capsys):
    beton, _ = data
    with pytest.raises(SystemExit) as stop:
        segment.main(["--evaluate", str(beton), "--checkpoint", str(run[0]), *OPTIONS, "--mode", "whole"])
    assert stop.value.code == 1 and "set eval_mode slide" in capsys.readouterr().err


def test_another_crop_resizes_the_networks_positions(data, run):
    beton, _ = data
    result = segment.main(["--evaluate", str(beton), "--checkpoint", str(run[0]), *OPTIONS, "--crop", "[96,64]"])
    assert 0 < result["pixel_accuracy"] < 100


def test_mistakes_end_it_in_one_sentence(data, run, tmp_path, capsys):
    beton, folder = str(data[0]), str(run[0])
    (tmp_path / "weights.pth").touch()
    fewer = tmp_path / "fewer.beton"
    masked_beton(fewer, 2, num_classes=4)
    plain = write(tmp_path / "plain.beton", [image for image, _ in masked_samples(2)])
    twice = ["--evaluate", beton, beton, "--checkpoint", folder]
    for arguments, code, said in (
        (["--evaluate", "nowhere.beton", "--checkpoint", folder], 1, "no beton at nowhere.beton"),
        (["--evaluate", str(plain), "--checkpoint", folder], 1, "no masks"),
        (["--evaluate", str(fewer), "--checkpoint", folder], 1, "has masks of 4 classes"),
        (["--evaluate", beton, "--checkpoint", str(tmp_path / "weights.pth")], 1, "does not say how its network is"),
        (["--evaluate", beton, "--checkpoint", folder, "--overlays"], 1, "give --save-predictions DIR too"),
        (["--evaluate", beton, "--checkpoint", folder, "--stride", "65"], 1, "stride at most crop"),
        ([*twice, "--save-predictions", str(tmp_path)], 1, "would have one name, image-0.png"),
        (["--evaluate", "--checkpoint", folder], 2, "--evaluate needs at least one beton"),
        (["--evaluate", beton], 2, "--checkpoint"),
    ):
        with pytest.raises(SystemExit) as stop:
            segment.main([*arguments, *OPTIONS])
        text = capsys.readouterr().err
        assert stop.value.code == code and said in text and "Traceback" not in text, text
        assert code == 2 or text.startswith("segment.py: ") and text.count("\n") == 1, text


def test_each_run_is_evaluated_by_its_own_command(data, run, tiny, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([str(data[0]), "--checkpoint", str(run[0])])
    assert "tl-fast segment --evaluate" in capsys.readouterr().err
    config = tiny()
    model = torch.nn.Linear(1, 1)
    meta = dict(global_step=1, epoch=0, step_in_epoch=1, config=config.to_dict(), metrics={})
    kept = checkpoint.snapshot(model=model, ema=model, optimizer=torch.optim.SGD(model.parameters(), 0.1), meta=meta)
    path = checkpoint.save(Path(config.output_dir) / "checkpoints", kept)
    with pytest.raises(SystemExit):
        segment.main(["--evaluate", str(data[0]), "--checkpoint", str(path)])
    assert "is of a classification run" in capsys.readouterr().err


def test_decoding_goes_on_while_the_network_computes(data, run):
    """The network's first windows wait until a mask of a later batch was read."""
    _, config, model = run
    later = threading.Event()
    with SegmentLoader(data[0], 1, train=False, threads=1) as loader:
        read = loader.samples.mask

        def mask(sample_id: int) -> np.ndarray:
            if sample_id >= 2:
                later.set()
            return read(sample_id)

        loader.samples.mask = mask

        class Waiting(Classifier):
            def __call__(self, images: torch.Tensor) -> torch.Tensor:
                assert later.wait(30)
                return super().__call__(images)

        segmenter = Waiting(model, config, ALONE.device)
        options = dict(num_classes=5, ignore_index=255, samples=8, inference=Inference(crop=64, stride=64, batch=1))
        _, visits = count_pixels([segmenter], loader, ALONE, **options)
    assert visits.tolist() == [1] * 8
