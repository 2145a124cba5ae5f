"""The sheet of a beton's samples: `python -m tl_fast.show FILE.beton --out picture.png`.

One row a sample: the original with its crop box, the crop as the loader hands it to training, the label map over the
original and the token targets over the crop. Image and labels come from `pipeline.Loader` itself, so what looks aligned
here is aligned in training. Cells and tokens are coloured by their best class, over a grey image and the more opaque
the higher that class's probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tl_fast.pictures import sheet
from tl_fast.pictures.sheet import GAP, LINE, MARGIN, PANEL, PAPER, SWATCH, Cells, best_of_map, best_of_targets
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.boxes import crop_fractions
from tl_fast.system.sides import Sides


@dataclass(frozen=True)
class Row:
    """What the sheet shows of one sample.

    label: class index; original: uint8 [h, w, 3] as drawn; crop: uint8 [h, w, 3], its longer side PANEL; box: (left,
    top, right, bottom) of the crop in pixels of the drawn original; span: the drawn original as (top, left, height,
    width) in fractions of what the label map covers.
    """

    caption: list[str]
    label: int
    original: np.ndarray
    crop: np.ndarray
    box: tuple[int, int, int, int]
    span: np.ndarray | None = None
    label_map: Cells | None = None
    tokens: Cells | None = None


def show(
    beton: str | Path,
    out: str | Path,
    *,
    samples: int = 8,
    first: int | None = None,
    ids: Sequence[int] | None = None,
    epoch: int = 0,
    seed: int = 0,
    image_size: Sides = 224,
    grid: Sides = 14,
    smoothing: float = 0.0,
) -> Path:
    """Write the sheet of some samples of `beton` to `out` and return its path.

    Which samples: `ids`, in that order; or `samples` of them in sequence from `first`; or `samples` of them spread
    evenly over the file. epoch, seed, image_size (pixels), grid (tokens) and smoothing are the loader's. `out`
    must end as a picture does (.png); it appears whole or not at all. Raises ValueError for settings or sample ids that
    do not fit the file, FileNotFoundError without the file, DecodeError for a damaged JPEG.
    """
    out = Path(out)
    sheet.check_name(out)
    with Loader(beton, 1, image_size=image_size, grid=grid, seed=seed, smoothing=smoothing, threads=1) as loader:
        loader.set_epoch(epoch)
        chosen = sheet.choose(len(loader.samples), samples, first, ids, str(beton))
        rows = [_row(loader, int(sample_id)) for sample_id in chosen]
        header, names = sheet.describe(loader, epoch), loader.samples.class_names
    colours = sheet.assign_colours(cells for row in rows for cells in (row.label_map, row.tokens))
    sheet.save(_draw(rows, header, colours, names), out)
    return out


def _row(loader: Loader, sample_id: int) -> Row:
    """Decode and draw one sample with the loader's own crop and targets."""
    samples, one = loader.samples, np.array([sample_id])
    batch, plan = loader.batch(one), loader.draw(one)[0]
    reader, index = samples.locate(sample_id)
    original = sheet.open_original(samples, sample_id)
    height, width = original.height, original.width
    drawn = sheet.original_size(height, width)[::-1]
    top, left, crop_height, crop_width = (int(plan[name]) for name in ("top", "left", "height", "width"))
    edges = (left, 0, width), (top, 1, height), (left + crop_width, 0, width), (top + crop_height, 1, height)
    box = tuple(round(edge * drawn[axis] / size) for edge, axis, size in edges)
    label = int(batch.labels[0])
    caption = [
        f"sample {sample_id}",
        sheet.plain(reader.source_ids[index]),
        f"label: {sheet.class_name(samples.class_names, label)}",
        f"crop: top {top}, left {left}, height {crop_height}, width {crop_width} of {height} x {width}",
        "flipped" if plan["flip"] else "not flipped",
    ]
    span = label_map = tokens = None
    if batch.targets is not None:
        targets = batch.targets[0].numpy()
        caption.append(sheet.class_token(targets[0], samples.class_names))
        classes, scores = samples.label_maps(one)
        label_map = best_of_map(classes[0], scores[0], samples.spec.num_classes)
        tokens = best_of_targets(targets[1:], loader.grid)
        size = np.array([height]), np.array([width])
        span = crop_fractions(np.array([[0, 0, height, width]], float), *size, samples.spec.extent)[0]
    resized = np.asarray(original.resize(drawn, Image.Resampling.LANCZOS))
    return Row(caption, label, resized, sheet.panel_of(batch.images[0]), box, span, label_map, tokens)


def _draw(rows: Sequence[Row], header: list[str], colours: dict[int, np.ndarray], names: list[str]) -> Image.Image:
    """The sheet: header, legend, column titles, rows."""
    titles = ["original, crop box", "crop as trained on"]
    widest = max(row.original.shape[1] for row in rows)
    columns = [widest, PANEL]
    if rows[0].tokens is not None:
        titles += ["label map over original", "token targets over crop"]
        columns *= 2
    lefts = [MARGIN + sum(columns[:i]) + GAP * i for i in range(len(columns))]
    width = lefts[-1] + columns[-1] + MARGIN
    room = width - 2 * MARGIN
    top = sheet.Top(header, colours, names, room)
    indent = SWATCH + 6 if colours else 0  # room for the colour of the label
    captions = [sheet.wrap(row.caption, room - indent) for row in rows]
    row_heights = [LINE * len(lines) + PANEL for lines in captions]
    height = top.height + LINE + sum(row_heights) + GAP * (len(rows) - 1) + MARGIN

    picture = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(picture)
    top.draw(draw)
    y = top.height
    for left, title in zip(lefts, titles, strict=True):
        sheet.write_text(draw, left, y, title, "dimgray")
    y += LINE
    for row, lines in zip(rows, captions, strict=True):
        if row.label in colours:
            sheet.swatch(draw, MARGIN, y, colours[row.label])
        for line in lines:
            sheet.write_text(draw, MARGIN + indent, y, line)
            y += LINE
        panels = [row.original, row.crop]
        if row.tokens is not None:
            panels.append(sheet.overlay(row.original, row.label_map, row.span, colours))
            panels.append(sheet.overlay(row.crop, row.tokens, np.array([0, 0, 1, 1]), colours))
        for i, (left, panel) in enumerate(zip(lefts, panels, strict=True)):
            picture.paste(Image.fromarray(panel), (left, y))
            if i in (0, 2):
                _outline(draw, row.box, left, y)
        y += PANEL + GAP
    return picture


def _outline(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], left: int, top: int) -> None:
    """The crop's border, white between black lines to stand out on any picture; its outer edge is the crop's own."""
    x0, y0, x1, y1 = box[0] + left, box[1] + top, box[2] + left - 1, box[3] + top - 1
    for inset, colour in enumerate(("black", "white", "black")):
        if x1 - inset >= x0 + inset and y1 - inset >= y0 + inset:
            draw.rectangle((x0 + inset, y0 + inset, x1 - inset, y1 - inset), outline=colour)
