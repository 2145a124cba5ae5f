"""Draw a sheet of samples to look at: `python -m tl_fast.show FILE.beton --out picture.png`.

One row a sample: the original with its crop box, the crop as the loader hands it to training, the label map over the original and the token
targets over the crop. Image and labels come from `pipeline.Loader` itself, so what looks aligned here is aligned in training. Cells and
tokens are coloured by their best class, over a grey image and the more opaque the higher that class's probability.
"""
from __future__ import annotations

import argparse
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tl_fast.labelmap import write_atomic
from tl_fast.pipeline import DecodeError, Loader, crop_fractions

PANEL = 224  # pixels: height of a row's panels, side of the crop's
WIDEST = 336  # pixels: an original wider than 3:2 is drawn lower instead
MARGIN, GAP, LINE, SWATCH = 14, 12, 20, 13  # pixels
OPACITY = 0.55  # of a cell whose class is certain; the image must stay visible below it
SMALLEST_GRID = 6  # pixels: the lines between cells smaller than this would hide them
NO_CLASS = -1

# Ordered so that the first few, all that most sheets use, differ most, also for the colour-blind.
PALETTE = np.array(
    [
        (230, 85, 0), (0, 114, 220), (240, 215, 30), (190, 60, 190), (0, 165, 100), (110, 205, 255), (205, 0, 50), (255, 165, 185),
        (140, 235, 60), (90, 50, 190), (150, 95, 30), (0, 225, 205),
    ],
    np.uint8,
)  # fmt: skip
OTHER = np.array((255, 255, 255), np.uint8)
PAPER = (238, 238, 238)  # not white, so that white photos keep their edges


@dataclass(frozen=True)
class Cells:
    """Best class int64 [rows, columns] (NO_CLASS where none stands out) and its probability float32 [rows, columns]."""

    best: np.ndarray
    probability: np.ndarray


@dataclass(frozen=True)
class Row:
    """What the sheet shows of one sample.

    label: class index; original: uint8 [h, w, 3] as drawn; crop: uint8 [PANEL, PANEL, 3]; box: (left, top, right, bottom) of the crop in
    pixels of the drawn original; span: the drawn original as (top, left, height, width) in fractions of what the label map covers.
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
    image_size: int = 224,
    grid: int = 14,
    smoothing: float = 0.0,
) -> Path:
    """Write the sheet of some samples of `beton` to `out` and return its path.

    Which samples: `ids`, in that order; or `samples` of them in sequence from `first`; or `samples` of them spread evenly over the file.
    epoch, seed, image_size (pixels), grid (tokens a side) and smoothing are the loader's. `out` must end as a picture does (.png); it
    appears whole or not at all. Raises ValueError for settings or sample ids that do not fit the file, FileNotFoundError without the
    file, DecodeError for a damaged JPEG.
    """
    out = Path(out)
    picture_format = Image.registered_extensions().get(out.suffix.lower())
    if picture_format not in Image.SAVE:
        raise ValueError(f"{out}: no picture can be written under the name ending {out.suffix!r}; use .png")
    with Loader(beton, 1, image_size=image_size, grid=grid, seed=seed, smoothing=smoothing, threads=1) as loader:
        loader.set_epoch(epoch)
        chosen = choose(len(loader.samples), samples, first, ids, str(beton))
        rows = [_row(loader, int(sample_id)) for sample_id in chosen]
        header, names = _header(loader, epoch), loader.samples.class_names
    picture = _draw(rows, header, assign_colours(rows), names)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda file: picture.save(file, format=picture_format))
    return out


def choose(count: int, samples: int, first: int | None, ids: Sequence[int] | None, name: str) -> np.ndarray:
    """The sample ids to show of a file of `count` samples, int64 [n]; see `show`. ValueError names an id that is not in the file."""
    if ids is not None and first is not None:
        raise ValueError("give either ids or first, not both")
    if ids is not None:
        chosen = np.array(list(ids), np.int64)
        if not chosen.size:
            raise ValueError("ids is empty; name at least one sample")
    elif samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    elif first is not None:
        chosen = np.arange(first, max(min(first + samples, count), first + 1), dtype=np.int64)
    else:
        chosen = np.linspace(0, count - 1, min(samples, count)).round().astype(np.int64)
    if (bad := chosen[(chosen < 0) | (chosen >= count)]).size:
        raise ValueError(f"sample {bad[0]} is not in {name}, which has samples 0..{count - 1}")
    return chosen


def best_of_map(classes: np.ndarray, scores: np.ndarray, num_classes: int) -> Cells:
    """Best class of every cell of a sparse map: integers and float32 [k, H, W], unlisted classes at 0; softmax over all C classes."""
    k = len(classes)
    highest = np.maximum(scores.max(axis=0), 0.0)
    mass = np.exp(scores - highest).sum(axis=0) + (num_classes - k) * np.exp(-highest)
    best = scores.argmax(axis=0)
    top = np.take_along_axis(scores, best[None], axis=0)[0]
    # Nothing stands out where an unlisted class, of which there is no name, is as probable, or where all classes are listed alike.
    stands_out = top > (0.0 if k < num_classes else scores.min(axis=0))
    found = np.take_along_axis(classes, best[None], axis=0)[0].astype(np.int64)
    return Cells(np.where(stands_out | (num_classes == 1), found, NO_CLASS), np.exp(top - highest) / mass)


def best_of_targets(targets: np.ndarray, grid: int) -> Cells:
    """Best class of every token; targets float32 [grid * grid, C]. Uniform targets (tokens outside the label map) have none."""
    best, probability = targets.argmax(axis=1), targets.max(axis=1)
    stands_out = (probability > targets.min(axis=1) * 1.0001) | (targets.shape[1] == 1)
    return Cells(np.where(stands_out, best, NO_CLASS).reshape(grid, grid), probability.reshape(grid, grid))


def assign_colours(rows: Sequence[Row]) -> dict[int, np.ndarray]:
    """Class -> colour uint8 [3], largest share of the sheet's panels first; classes for which there is no colour left get OTHER."""
    shares: dict[int, float] = {}
    for cells in (cells for row in rows for cells in (row.label_map, row.tokens) if cells is not None):
        found, counts = np.unique(cells.best[cells.best != NO_CLASS], return_counts=True)
        for c, count in zip(found.tolist(), counts.tolist(), strict=True):
            shares[c] = shares.get(c, 0.0) + count / cells.best.size
    by_share = sorted(shares, key=lambda c: (-shares[c], c))
    return {c: PALETTE[i] if i < len(PALETTE) else OTHER for i, c in enumerate(by_share)}


def overlay(panel: np.ndarray, cells: Cells, span: np.ndarray, colours: dict[int, np.ndarray]) -> np.ndarray:
    """`panel` uint8 [h, w, 3] in grey under its coloured cells and the lines between them; what `cells` does not cover is dark.

    span: the panel as (top, left, height, width) in fractions of what `cells` covers, so the whole grid over the panel is (0, 0, 1, 1).
    """
    grey = panel.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    out = np.repeat(grey[:, :, None], 3, axis=2)
    row, column = (_cells_of_pixels(panel.shape[axis], span[axis], span[axis + 2], cells.best.shape[axis]) for axis in (0, 1))
    colour = np.zeros((*cells.best.shape, 3), np.float32)
    for c in np.unique(cells.best[cells.best != NO_CLASS]):
        colour[cells.best == c] = colours[int(c)]
    alpha = np.where(cells.best != NO_CLASS, OPACITY * cells.probability, 0.0)[..., None]
    row_in, column_in = ((index >= 0) & (index < count) for index, count in zip((row, column), cells.best.shape, strict=True))
    inside = np.ix_(row_in, column_in)
    at = np.ix_(row[row_in], column[column_in])
    out[inside] = out[inside] * (1 - alpha[at]) + colour[at] * alpha[at]
    out[~(row_in[:, None] & column_in)] *= 0.35
    if min(row_in.sum() / len(set(row[row_in])), column_in.sum() / len(set(column[column_in]))) >= SMALLEST_GRID:
        lines = (np.diff(row, prepend=row[0]) != 0)[:, None] | (np.diff(column, prepend=column[0]) != 0)
        out[lines & row_in[:, None] & column_in] *= 0.8
    return out.round().clip(0, 255).astype(np.uint8)


def _cells_of_pixels(pixels: int, start: float, extent: float, cells: int) -> np.ndarray:
    """The cell under each pixel's centre along one axis, int64 [pixels]; below 0 or beyond `cells` - 1 outside the label map."""
    return np.floor((start + (np.arange(pixels) + 0.5) / pixels * extent) * cells).astype(np.int64)


def _row(loader: Loader, sample_id: int) -> Row:
    """Decode and draw one sample with the loader's own crop and targets."""
    samples, one = loader.samples, np.array([sample_id])
    batch, plan = loader.batch(one), loader.draw(one)[0]
    reader, index = samples.locate(sample_id)
    try:
        original = Image.open(io.BytesIO(samples.jpeg(sample_id))).convert("RGB")
    except OSError as error:
        raise DecodeError(f"cannot decode {samples.name(sample_id)}: {error}; convert again") from error
    height, width = original.height, original.width
    scale = min(PANEL / height, WIDEST / width)
    drawn = max(round(width * scale), 1), max(round(height * scale), 1)
    top, left, crop_height, crop_width = (int(plan[name]) for name in ("top", "left", "height", "width"))
    box = tuple(
        round(edge * drawn[axis] / size)
        for edge, axis, size in ((left, 0, width), (top, 1, height), (left + crop_width, 0, width), (top + crop_height, 1, height))
    )
    # BOX keeps the crop's own pixels: unchanged at 224, repeated when it is smaller, averaged when larger.
    crop = Image.fromarray(batch.images[0].permute(1, 2, 0).contiguous().numpy()).resize((PANEL, PANEL), Image.Resampling.BOX)
    label = int(batch.labels[0])
    caption = [
        f"sample {sample_id}",
        _plain(reader.source_ids[index]),
        f"label: {_name(samples.class_names, label)}",
        f"crop: top {top}, left {left}, height {crop_height}, width {crop_width} of {height} x {width}",
        "flipped" if plan["flip"] else "not flipped",
    ]
    span = label_map = tokens = None
    if batch.targets is not None:
        targets = batch.targets[0].numpy()
        whole = best_of_targets(targets[:1], 1)
        c, probability = int(whole.best[0, 0]), whole.probability[0, 0]
        caption.append("class token: " + ("none" if c == NO_CLASS else f"{_name(samples.class_names, c)} {probability:.0%}"))
        classes, scores = samples.label_maps(one)
        label_map = best_of_map(classes[0], scores[0], samples.spec.num_classes)
        tokens = best_of_targets(targets[1:], loader.grid)
        size = np.array([height]), np.array([width])
        span = crop_fractions(np.array([[0, 0, height, width]], float), *size, samples.spec.extent)[0]
    return Row(caption, label, np.asarray(original.resize(drawn, Image.Resampling.LANCZOS)), np.asarray(crop), box, span, label_map, tokens)


def _header(loader: Loader, epoch: int) -> list[str]:
    """The sheet's first lines, in pieces that stay together."""
    samples = loader.samples
    pieces = [", ".join(path.name for path in samples.paths), f"{len(samples)} samples"]
    if samples.spec is None:
        pieces.append("no label maps in this file: label map and token targets are left out")
    else:
        spec, annotator = samples.spec, samples.readers[0].annotator or {}
        pieces += [
            f"annotator: {annotator.get('model', 'unknown')}{' with a fitted head' if annotator.get('probe') else ''}",
            f"label maps {spec.height} x {spec.width}, {spec.k} of {spec.num_classes} classes a cell, extent {spec.extent}",
            f"{loader.grid} x {loader.grid} tokens", f"smoothing {loader.smoothing:g}",
        ]  # fmt: skip
    return [_plain(piece) for piece in [*pieces, f"crops {loader.image_size} px", f"epoch {epoch}, seed {loader.seed}"]]


def _plain(text: str) -> str:
    """In letters the built-in font has: accents are dropped, what has no ASCII form becomes "?"."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return letters.encode("ascii", "replace").decode("ascii")


def _name(names: Sequence[str], c: int) -> str:
    return _plain(names[c]) if c < len(names) else f"class {c}"


def _fit(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`text`, its middle replaced by an ellipsis when it is wider than `width` pixels."""
    keep = len(text)
    shortened = text
    while keep > 2 and font.getlength(shortened) > width:
        keep -= 1
        shortened = f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}"
    return shortened


def _wrap(pieces: Sequence[str], font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines at most `width` pixels wide, broken between pieces only."""
    lines: list[str] = []
    for piece in (_fit(piece, font, width) for piece in pieces):
        joined = f"{lines[-1]}  ·  {piece}" if lines else piece
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(piece)
    return lines


def _draw(rows: Sequence[Row], header: list[str], colours: dict[int, np.ndarray], names: list[str]) -> Image.Image:
    """The sheet: header, legend, column titles, rows."""
    font = ImageFont.load_default(size=14)
    titles = ["original, crop box", "crop as trained on"]
    widest = max(row.original.shape[1] for row in rows)
    columns = [widest, PANEL]
    if rows[0].tokens is not None:
        titles += ["label map over original", "token targets over crop"]
        columns *= 2
    lefts = [MARGIN + sum(columns[:i]) + GAP * i for i in range(len(columns))]
    width = lefts[-1] + columns[-1] + MARGIN
    room = width - 2 * MARGIN
    head = _wrap(header, font, room)
    legend = _legend(colours, names, font, room)
    indent = SWATCH + 6 if colours else 0  # room for the colour of the label
    captions = [_wrap(row.caption, font, room - indent) for row in rows]
    legend_height = legend[-1][1] + LINE if legend else 0
    row_heights = [LINE * len(lines) + PANEL for lines in captions]
    height = MARGIN + LINE * len(head) + legend_height + 8 + LINE + sum(row_heights) + GAP * (len(rows) - 1) + MARGIN

    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)

    def text(x: float, y: float, line: str, fill: str = "black") -> None:
        draw.text((x, y + LINE / 2), line, fill=fill, font=font, anchor="lm")

    def swatch(x: float, y: float, colour: np.ndarray) -> None:
        draw.rectangle((x, y + (LINE - SWATCH) // 2, x + SWATCH, y + (LINE + SWATCH) // 2), fill=tuple(colour.tolist()), outline="black")

    y = MARGIN
    for line in head:
        text(MARGIN, y, line)
        y += LINE
    for x, dy, colour, name in legend:
        swatch(MARGIN + x, y + dy, colour)
        text(MARGIN + x + SWATCH + 6, y + dy, name)
    y += legend_height + 8
    for left, title in zip(lefts, titles, strict=True):
        text(left, y, title, "dimgray")
    y += LINE
    for row, lines in zip(rows, captions, strict=True):
        if row.label in colours:
            swatch(MARGIN, y, colours[row.label])
        for line in lines:
            text(MARGIN + indent, y, line)
            y += LINE
        panels = [row.original, row.crop]
        if row.tokens is not None:
            panels.append(overlay(row.original, row.label_map, row.span, colours))
            panels.append(overlay(row.crop, row.tokens, np.array([0, 0, 1, 1]), colours))
        for i, (left, panel) in enumerate(zip(lefts, panels, strict=True)):
            sheet.paste(Image.fromarray(panel), (left, y))
            if i in (0, 2):
                _outline(draw, row.box, left, y)
        y += PANEL + GAP
    return sheet


def _legend(
    colours: dict[int, np.ndarray], names: list[str], font: ImageFont.FreeTypeFont, room: int
) -> list[tuple[int, int, np.ndarray, str]]:
    """(x, y, colour, name) of every entry, in pixels from the legend's corner."""
    entries = [(colour, _name(names, c)) for c, colour in colours.items()][: len(PALETTE)]
    if (rest := len(colours) - len(entries)) > 0:
        entries.append((OTHER, f"other ({rest} classes)"))
    placed, x, y = [], 0, 0
    for colour, name in entries:
        name = _fit(name, font, min(room - SWATCH - 6, 200))
        size = SWATCH + 6 + int(font.getlength(name)) + 18
        if x and x + size - 18 > room:
            x, y = 0, y + LINE
        placed.append((x, y, colour, name))
        x += size
    return placed


def _outline(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], left: int, top: int) -> None:
    """The crop's border, white between black lines to stand out on any picture; its outer edge is the crop's own."""
    x0, y0, x1, y1 = box[0] + left, box[1] + top, box[2] + left - 1, box[3] + top - 1
    for inset, colour in enumerate(("black", "white", "black")):
        if x1 - inset >= x0 + inset and y1 - inset >= y0 + inset:
            draw.rectangle((x0 + inset, y0 + inset, x1 - inset, y1 - inset), outline=colour)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sample ids such as 1,2,3") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; bad input ends with status 2 and one line that says what to change."""
    parser = argparse.ArgumentParser(prog="python -m tl_fast.show", description="Draw a sheet of a beton's samples with their labels.")
    parser.add_argument("beton", metavar="FILE.beton", help="the file to look into")
    parser.add_argument("--out", required=True, metavar="picture.png", help="where to write the picture")
    parser.add_argument("--samples", type=int, default=8, help="rows of the sheet, spread evenly over the file (default %(default)s)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--first", type=int, metavar="ID", help="show samples in sequence from this one")
    which.add_argument("--ids", type=_ids, metavar="1,2,3", help="show these samples (--samples does not count then)")
    parser.add_argument("--epoch", type=int, default=0, help="whose crops and flips (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the crops and flips (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the crops in pixels (default %(default)s)")
    parser.add_argument("--grid", type=int, default=14, help="tokens a side (default %(default)s)")
    parser.add_argument("--smoothing", type=float, default=0.0, help="label smoothing of the token targets (default %(default)s)")
    settings = vars(parser.parse_args(arguments))
    try:
        print(show(settings.pop("beton"), settings.pop("out"), **settings))
    except (ValueError, OSError, DecodeError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
