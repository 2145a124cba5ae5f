"""The sheet of masks: panels where they must be, of the classes' colours; predictions that fit no mask; errors."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_betons import masked_beton, write

from tl_fast.pictures.mask_sheet import show_masks
from tl_fast.show import main
from tl_fast.training.predictions import voc_colours

MARGIN, GAP, LINE, PANEL, WIDEST = 14, 12, 20, 224, 336
HEIGHT, WIDTH, CLASSES, COUNT = 112, 168, 5, 4  # drawn at twice the size


@pytest.fixture(scope="module")
def beton(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    path = tmp_path_factory.mktemp("masks") / "masked.beton"
    return path, masked_beton(path, COUNT, ((HEIGHT, WIDTH),), CLASSES)


def write_predictions(folder: Path, masks: list[np.ndarray]) -> list[np.ndarray]:
    """Predictions that are right above the diagonal, and of class 0 below it."""
    folder.mkdir()
    above = np.arange(WIDTH) * HEIGHT >= np.arange(HEIGHT)[:, None] * WIDTH
    predictions = [np.where(above & (mask != 255), mask, 0).astype(np.uint8) for mask in masks]
    for i, prediction in enumerate(predictions):
        Image.fromarray(prediction).save(folder / f"image-{i}.png")
    return predictions


def panels(picture: Path, rows: int, columns: int) -> list[list[np.ndarray]]:
    """The sheet's panels uint8 [PANEL, WIDEST, 3], by where they must be: counted from the bottom."""
    sheet = np.asarray(Image.open(picture).convert("RGB"))
    assert sheet.shape[1] == 2 * MARGIN + columns * WIDEST + (columns - 1) * GAP
    lefts = [MARGIN + i * (WIDEST + GAP) for i in range(columns)]
    tops = [sheet.shape[0] - MARGIN - PANEL - i * (PANEL + LINE + GAP) for i in reversed(range(rows))]
    return [[sheet[top : top + PANEL, left : left + WIDEST] for left in lefts] for top in tops]


def coloured(classes: np.ndarray) -> np.ndarray:
    """The panel of classes uint8 [HEIGHT, WIDTH]."""
    colours = voc_colours(256)
    colours[255] = 255
    return colours[classes].repeat(2, axis=0).repeat(2, axis=1)


def test_panels(beton, tmp_path) -> None:
    path, masks = beton
    predictions = write_predictions(tmp_path / "network", masks)
    out = tmp_path / "sheet.png"
    assert show_masks(path, out, predictions=[tmp_path / "network"], ids=[2, 0]) == out
    for (image, mask, predicted), sample in zip(panels(out, 2, 3), (2, 0), strict=True):
        np.testing.assert_array_equal(mask, coloured(masks[sample]))
        np.testing.assert_array_equal(predicted, coloured(predictions[sample]))
        # The images have one colour a class.
        labelled = masks[sample].repeat(2, axis=0).repeat(2, axis=1)
        means = [image[labelled == c].mean(axis=0) for c in np.unique(masks[sample])]
        spread = max(image[labelled == c].std(axis=0).max() for c in np.unique(masks[sample]))
        assert spread < 35 < np.ptp(means, axis=0).max()


def test_command(beton, tmp_path, capsys) -> None:
    path, _ = beton
    out = tmp_path / "sheet.png"
    main([str(path), "--masks", "--out", str(out), "--samples", "3"])
    assert capsys.readouterr().out == f"{out}\n"
    assert len(panels(out, 3, 2)) == 3
    for arguments, message in (
        (["--masks", "--grid", "4"], "masks are shown whole: --grid is for crops"),
        (["--masks", "--recipe", "lvvit_s_224"], "masks are shown whole: --recipe is for crops"),
    ):
        with pytest.raises(SystemExit) as end:
            main([str(path), "--out", str(out), *arguments])
        assert end.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main([str(path), "--out", str(out), "--predictions", str(tmp_path / "nowhere")])
    assert end.value.code == 1 and "nowhere/image-0.png is not there: predictions are written by" in (
        capsys.readouterr().err
    )


def test_what_fits_no_mask(beton, tmp_path, photos) -> None:
    path, masks = beton
    folder, out = tmp_path / "other", tmp_path / "sheet.png"
    write_predictions(folder, masks)
    for prediction in (
        Image.fromarray(masks[1][:-1]),
        Image.fromarray(np.full((HEIGHT, WIDTH), CLASSES, np.uint8)),
        Image.new("RGB", (WIDTH, HEIGHT)),
    ):
        prediction.save(folder / "image-1.png")
        with pytest.raises(ValueError, match=re.escape(f"{folder}/image-1.png is no prediction of this sample")):
            show_masks(path, out, predictions=[folder])
    bare = write(tmp_path / "bare.beton", [next((photos / "val").glob("*/*.jpg")).read_bytes()], workers=1)
    with pytest.raises(ValueError, match="has no masks to show: pack them with"):
        show_masks(bare, out)
    assert not out.exists()
