"""The sheet of a beton's masks: `python -m tl_fast.show FILE.beton --masks --out picture.png`.

One row a sample: the image, its mask, and what networks predicted, from folders that `tl-fast segment --evaluate
--save-predictions` wrote. Classes have the colours of the masks' table of classes, or PASCAL VOC's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tl_fast.beton.samples import Samples
from tl_fast.masks.format import MaskSpec
from tl_fast.pictures import sheet
from tl_fast.pictures.sheet import GAP, LINE, MARGIN, PAPER
from tl_fast.system.mistakes import InputError
from tl_fast.training.predictions import file_names, palette

UNLABELLED = 255, 255, 255


@dataclass(frozen=True)
class Row:
    """What the sheet shows of one sample: its image uint8 [h, w, 3], its classes uint8 [H, W], first the mask's, then
    every prediction's, and a line of text over each of these panels."""

    image: np.ndarray
    classes: list[np.ndarray]
    titles: list[str]


def show_masks(
    beton: str | Path,
    out: str | Path,
    *,
    predictions: Sequence[str | Path] = (),
    samples: int = 8,
    first: int | None = None,
    ids: Sequence[int] | None = None,
) -> Path:
    """Write the sheet of some samples of `beton` to `out` and return its path.

    predictions: folders of index pictures, as `tl_fast.training.predictions.PredictionWriter` names them. Each is a
    column, called as its folder is, with the share of a sample's labelled pixels that are predicted right. Which
    samples: as for `sample_sheet.show`.

    Raises ValueError for a beton without masks, and for predictions of another size or of other values than the
    masks'; FileNotFoundError for a file or a sample's prediction that is not there; DecodeError for a damaged JPEG.
    """
    out = Path(out)
    sheet.check_name(out)
    with contextlib.closing(Samples(beton)) as data:
        spec = data.mask_spec
        if spec is None:
            raise InputError(f"{beton} has no masks to show: pack them with `converters/to_beton.py --masks DIR`")
        chosen = sheet.choose(len(data), samples, first, ids, str(beton))
        names = file_names([sample_id for reader in data.readers for sample_id in reader.source_ids])
        folders = [Path(folder) for folder in predictions]
        rows = [
            _row(data, int(sample_id), [folder / f"{names[sample_id]}.png" for folder in folders])
            for sample_id in chosen
        ]
        header = [
            ", ".join(path.name for path in data.paths),
            f"{len(data)} samples",
            f"masks of {spec.num_classes} classes",
        ]
    colours = palette(spec.num_classes, spec.colours)
    colours[spec.ignore_index] = UNLABELLED
    picture = _draw(rows, [sheet.plain(piece) for piece in header], colours, _names(spec))
    sheet.save(picture, out)
    return out


def _names(spec: MaskSpec) -> list[str]:
    """A name for every value 0..255 that a mask may have."""
    names = [sheet.class_name(spec.class_names, c) for c in range(spec.num_classes)]
    return [*names, *["not labelled"] * (256 - spec.num_classes)]


def _row(data: Samples, sample_id: int, predictions: Sequence[Path]) -> Row:
    mask, spec = data.mask(sample_id), data.mask_spec
    labelled = mask != spec.ignore_index
    classes, titles = [mask], ["mask"]
    for path in predictions:
        predicted = _read_prediction(path, mask.shape, spec.num_classes)
        right = f"{(predicted == mask)[labelled].mean():.0%}" if labelled.any() else "nothing labelled"
        classes.append(predicted)
        titles.append(f"{sheet.plain(path.parent.name)}: {right}")
    reader, index = data.locate(sample_id)
    image = np.asarray(sheet.open_original(data, sample_id))
    return Row(image, classes, [f"sample {sample_id}: {sheet.plain(reader.source_ids[index])}", *titles])


def _read_prediction(path: Path, size: tuple[int, int], num_classes: int) -> np.ndarray:
    """The classes uint8 [H, W] of a prediction. Raises FileNotFoundError or InputError naming the file."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is not there: predictions are written by `tl-fast segment --evaluate FILE.beton --save-predictions"
            " DIR`"
        )
    with Image.open(path) as picture:
        classes = np.array(picture) if picture.mode in ("P", "L") else np.zeros((0, 0), np.uint8)
    if classes.shape != size or classes.max() >= num_classes:
        raise InputError(
            f"{path} is no prediction of this sample, whose mask has {size[0]} x {size[1]} pixels of {num_classes}"
            " classes: name the folder of predictions on this beton"
        )
    return classes


def _draw(rows: Sequence[Row], header: list[str], colours: np.ndarray, names: list[str]) -> Image.Image:
    """The sheet: header, legend, rows. colours: uint8 [256, 3], of the classes' values."""
    sizes = [sheet.original_size(*row.image.shape[:2]) for row in rows]
    column = max(width for _, width in sizes)
    count = 1 + len(rows[0].classes)
    width = 2 * MARGIN + column * count + GAP * (count - 1)
    shares = sum(np.bincount(classes.ravel(), minlength=256) / classes.size for row in rows for classes in row.classes)
    legend = {int(c): colours[c] for c in np.argsort(-shares, kind="stable") if shares[c]}
    top = sheet.Top(header, legend, names, width - 2 * MARGIN)
    height = top.height + sum(LINE + rows_shown for rows_shown, _ in sizes) + GAP * (len(rows) - 1) + MARGIN
    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    top.draw(draw)
    y = top.height
    for row, (rows_shown, columns_shown) in zip(rows, sizes, strict=True):
        size = columns_shown, rows_shown
        panels = [Image.fromarray(row.image).resize(size, Image.Resampling.LANCZOS)]
        panels += [Image.fromarray(colours[classes]).resize(size, Image.Resampling.NEAREST) for classes in row.classes]
        for i, (panel, title) in enumerate(zip(panels, row.titles, strict=True)):
            x = MARGIN + i * (column + GAP)
            sheet.write_text(draw, x, y, sheet.fit(title, column))
            picture.paste(panel, (x, y + LINE))
        y += LINE + rows_shown + GAP
    return picture
