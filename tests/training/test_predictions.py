"""Predictions on disk: colours, names, index pictures and overlays."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from tl_fast.system.mistakes import InputError
from tl_fast.training import predictions
from tl_fast.training.predictions import PredictionWriter, file_names, palette, voc_colours


def test_colours_are_those_of_pascal_voc():
    listed = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128), 255: (224, 224, 192)}
    colours = voc_colours(256)
    assert {c: tuple(colours[c].tolist()) for c in listed} == listed
    assert len({tuple(colour) for colour in colours.tolist()}) == 256


def test_classes_have_their_own_colours():
    colours = palette(2, [(1, 2, 3), (255, 0, 7)])
    assert colours[:2].tolist() == [[1, 2, 3], [255, 0, 7]]
    assert np.array_equal(colours[2:], voc_colours(256)[2:]) and np.array_equal(palette(2), voc_colours(256))


def test_names_are_ids_without_the_extension_of_an_image():
    ids = ["a.jpg", "city/b.0.PNG", "city/frame.0001", "n01440764/c.JPEG", "12", "city/.png"]
    assert file_names(ids) == ["a", "city/b.0", "city/frame.0001", "n01440764/c", "12", "city/.png"]


@pytest.mark.parametrize("wrong", ["../a.jpg", "/etc/a.jpg", "a/../../b.jpg", "a//b.jpg", "./a.jpg", "..", "", "a\0b"])
def test_ids_that_lead_elsewhere_are_refused(wrong):
    with pytest.raises(InputError, match="cannot name a file of a prediction"):
        file_names(["good.jpg", wrong])


@pytest.mark.parametrize("pair", [("x/a.jpg", "x/a.png"), ("a.jpg", "a"), ("a.jpg", "a.jpg")])
def test_ids_that_share_a_file_are_refused(pair):
    with pytest.raises(InputError, match=r"'(x/)?a.jpg' and .* would have one name, (x/)?a\.png"):
        file_names(pair)


@pytest.fixture
def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """Image uint8 [3, 24, 40] and classes uint8 [24, 40]."""
    rows, columns = torch.meshgrid(torch.arange(24), torch.arange(40), indexing="ij")
    return torch.stack([rows * 8, columns * 5, rows + columns]).to(torch.uint8), (rows // 8 * 5 + columns // 8).byte()


def test_a_prediction_comes_back_with_its_colours(tmp_path, sample):
    image, classes = sample
    with PredictionWriter(tmp_path / "new", ["a", "city/b"], palette(15), True, 2) as writer:
        writer.write(1, image, classes)
        writer.write(0, image, 14 - classes)
    files = {str(path.relative_to(tmp_path / "new")) for path in tmp_path.rglob("*.*")}
    assert files == {"a.png", "city/b.png", "overlays/a.jpg", "overlays/city/b.jpg"}
    with Image.open(tmp_path / "new/city/b.png") as picture:
        assert picture.mode == "P" and np.array_equal(picture, classes.numpy())
        assert np.array_equal(picture.convert("RGB"), voc_colours(256)[classes.numpy()])
    with Image.open(tmp_path / "new/overlays/city/b.jpg") as picture:
        blend = (image.permute(1, 2, 0).numpy() / 2.0) + voc_colours(256)[classes.numpy()] / 2.0
        assert picture.size == (40, 24) and np.abs(np.asarray(picture) - blend).mean() < 6


def test_pictures_are_written_while_others_come(tmp_path, sample, monkeypatch):
    """Not more of them wait than the limit; the first write has not ended when the second one is asked for."""
    image, classes = sample
    gate, begun, write = threading.Event(), threading.Event(), predictions._write

    def slow(*arguments):
        begun.set()
        assert gate.wait(20)
        write(*arguments)

    monkeypatch.setattr(predictions, "_write", slow)
    with PredictionWriter(tmp_path, [str(i) for i in range(9)], palette(15), False, 1) as writer:
        for i in range(predictions.AHEAD):
            writer.write(i, image, classes)
        assert begun.wait(20) and not any(tmp_path.iterdir())
        gate.set()
        for i in range(predictions.AHEAD, 9):
            writer.write(i, image, classes)
    assert len(list(tmp_path.iterdir())) == 9


def test_an_error_of_a_thread_is_raised(tmp_path, sample):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        with PredictionWriter(tmp_path / "file", ["a"], palette(15), False, 1) as writer:
            writer.write(0, *sample)
    with pytest.raises(RuntimeError, match="of the caller"):
        with PredictionWriter(tmp_path / "file", ["a"], palette(15), False, 1) as writer:
            writer.write(0, *sample)
            raise RuntimeError("of the caller")
