"""What the sheets of samples are made of: classes and their colours, label maps over images, lines of text that fit,
the legend."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tl_fast.beton.samples import Samples
from tl_fast.pipeline.loader import Loader
from tl_fast.pipeline.regions import DecodeError
from tl_fast.sources.image import open_rgb
from tl_fast.system.atomic import write_atomic
from tl_fast.system.mistakes import InputError

PANEL = 224  # pixels: side of a crop's panel, and height of an original's beside it
WIDEST = 336  # pixels: an original wider than 3:2 is drawn lower instead
MARGIN, GAP, LINE, SWATCH = 14, 12, 20, 13  # pixels
OPACITY = 0.55  # of a cell whose class is certain; the image must stay visible below it
SMALLEST_GRID = 6  # pixels: the lines between cells smaller than this would hide them
NO_CLASS = -1

# Ordered so that the first few, all that most sheets use, differ most, also for the colour-blind.
PALETTE = np.array(
    [
        (230, 85, 0),
        (0, 114, 220),
        (240, 215, 30),
        (190, 60, 190),
        (0, 165, 100),
        (110, 205, 255),
        (205, 0, 50),
        (255, 165, 185),
        (140, 235, 60),
        (90, 50, 190),
        (150, 95, 30),
        (0, 225, 205),
    ],
    np.uint8,
)
OTHER = np.array((255, 255, 255), np.uint8)
PAPER = (238, 238, 238)  # not white, so that white photos keep their edges
FONT = ImageFont.load_default(size=14)  # comes with Pillow: the same picture on every machine


@dataclass(frozen=True)
class Cells:
    """Best class int64 [rows, columns] (NO_CLASS where none stands out) and its probability float32 [rows, columns]."""

    best: np.ndarray
    probability: np.ndarray


def choose(count: int, samples: int, first: int | None, ids: Sequence[int] | None, name: str) -> np.ndarray:
    """Which samples to show of a file of `count`, int64 [n]: `ids`, or `samples` of them from `first` on, or spread
    over the file.

    ValueError names an id that is not in the file.
    """
    if ids is not None and first is not None:
        raise InputError("give either ids or first, not both")
    if ids is not None:
        chosen = np.array(list(ids), np.int64)
        if not chosen.size:
            raise InputError("ids is empty; name at least one sample")
    elif samples < 1:
        raise InputError(f"samples must be at least 1, got {samples}")
    elif first is not None:
        chosen = np.arange(first, max(min(first + samples, count), first + 1), dtype=np.int64)
    else:
        chosen = np.linspace(0, count - 1, min(samples, count)).round().astype(np.int64)
    if (bad := chosen[(chosen < 0) | (chosen >= count)]).size:
        raise InputError(f"sample {bad[0]} is not in {name}, which has samples 0..{count - 1}")
    return chosen


def best_of_map(classes: np.ndarray, scores: np.ndarray, num_classes: int) -> Cells:
    """Best class of every cell of a sparse map: integers and float32 [k, H, W], unlisted classes at 0; softmax over all
    C classes."""
    k = len(classes)
    highest = np.maximum(scores.max(axis=0), 0.0)
    mass = np.exp(scores - highest).sum(axis=0) + (num_classes - k) * np.exp(-highest)
    best = scores.argmax(axis=0)
    top = np.take_along_axis(scores, best[None], axis=0)[0]
    # Nothing stands out where an unlisted class, of which there is no name, is as probable, or where all classes are
    # listed alike.
    stands_out = top > (0.0 if k < num_classes else scores.min(axis=0))
    best_class = np.take_along_axis(classes, best[None], axis=0)[0].astype(np.int64)
    return Cells(np.where(stands_out | (num_classes == 1), best_class, NO_CLASS), np.exp(top - highest) / mass)


def best_of_targets(targets: np.ndarray, grid: tuple[int, int]) -> Cells:
    """Best class of every token; targets float32 [rows * columns, C]; grid: (rows, columns). Uniform targets (tokens
    outside the label map) have none."""
    best, probability = targets.argmax(axis=1), targets.max(axis=1)
    stands_out = (probability > targets.min(axis=1) * 1.0001) | (targets.shape[1] == 1)
    return Cells(np.where(stands_out, best, NO_CLASS).reshape(grid), probability.reshape(grid))


def class_token(target: np.ndarray, names: Sequence[str]) -> str:
    """The best class of the class token's target float32 [C], in words."""
    whole = best_of_targets(target[None], (1, 1))
    c, probability = int(whole.best[0, 0]), whole.probability[0, 0]
    return "class token: " + ("none" if c == NO_CLASS else f"{class_name(names, c)} {probability:.0%}")


def assign_colours(panels: Iterable[Cells | None]) -> dict[int, np.ndarray]:
    """Class -> colour uint8 [3], largest share of the sheet's panels first; classes for which there is no colour left
    get OTHER."""
    shares: dict[int, float] = {}
    for cells in (cells for cells in panels if cells is not None):
        classes, counts = np.unique(cells.best[cells.best != NO_CLASS], return_counts=True)
        for c, count in zip(classes.tolist(), counts.tolist(), strict=True):
            shares[c] = shares.get(c, 0.0) + count / cells.best.size
    by_share = sorted(shares, key=lambda c: (-shares[c], c))
    return {c: PALETTE[i] if i < len(PALETTE) else OTHER for i, c in enumerate(by_share)}


def open_original(samples: Samples, sample_id: int) -> Image.Image:
    """A sample's image, upright, RGB. Raises DecodeError naming the sample."""
    try:
        return open_rgb(samples.image_file(sample_id))[0]
    except ValueError as error:
        raise DecodeError(f"cannot decode {samples.name(sample_id)}: {error}, then convert again") from error


def original_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) in pixels at which an image of this size is drawn: PANEL high, WIDEST wide at most."""
    scale = min(PANEL / height, WIDEST / width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def panel_of(image: Tensor) -> np.ndarray:
    """An image uint8 [3, H, W] as uint8 [h, w, 3], whose longer side is PANEL."""
    longer = max(image.shape[1:])
    height, width = (max(round(PANEL * side / longer), 1) for side in image.shape[1:])
    # BOX keeps the image's own pixels: unchanged at 224, repeated when it is smaller, averaged when larger.
    drawn = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).resize((width, height), Image.Resampling.BOX)
    return np.asarray(drawn)


def overlay(panel: np.ndarray, cells: Cells, span: np.ndarray, colours: dict[int, np.ndarray]) -> np.ndarray:
    """`panel` uint8 [h, w, 3] in grey under its coloured cells and the lines between them; what `cells` does not cover
    is dark.

    span: the panel as (top, left, height, width) in fractions of what `cells` covers, so the whole grid over the panel
    is (0, 0, 1, 1).
    """
    grey = panel.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    out = np.repeat(grey[:, :, None], 3, axis=2)
    row, column = (
        _cells_of_pixels(panel.shape[axis], span[axis], span[axis + 2], cells.best.shape[axis]) for axis in (0, 1)
    )
    colour = np.zeros((*cells.best.shape, 3), np.float32)
    for c in np.unique(cells.best[cells.best != NO_CLASS]):
        colour[cells.best == c] = colours[int(c)]
    alpha = np.where(cells.best != NO_CLASS, OPACITY * cells.probability, 0.0)[..., None]
    row_in, column_in = (
        (index >= 0) & (index < count) for index, count in zip((row, column), cells.best.shape, strict=True)
    )
    inside = np.ix_(row_in, column_in)
    cell = np.ix_(row[row_in], column[column_in])
    out[inside] = out[inside] * (1 - alpha[cell]) + colour[cell] * alpha[cell]
    out[~(row_in[:, None] & column_in)] *= 0.35
    if min(row_in.sum() / len(set(row[row_in])), column_in.sum() / len(set(column[column_in]))) >= SMALLEST_GRID:
        lines = (np.diff(row, prepend=row[0]) != 0)[:, None] | (np.diff(column, prepend=column[0]) != 0)
        out[lines & row_in[:, None] & column_in] *= 0.8
    return out.round().clip(0, 255).astype(np.uint8)


def _cells_of_pixels(pixels: int, start: float, extent: float, cells: int) -> np.ndarray:
    """The cell under each pixel's centre along one axis, int64 [pixels]; below 0 or beyond `cells` - 1 outside the
    label map."""
    return np.floor((start + (np.arange(pixels) + 0.5) / pixels * extent) * cells).astype(np.int64)


def describe(loader: Loader, epoch: int) -> list[str]:
    """The sheet's first lines, in pieces that stay together."""
    samples = loader.samples
    pieces = [", ".join(path.name for path in samples.paths), f"{len(samples)} samples"]
    if samples.spec is None:
        pieces.append("no label maps in this file: label map and token targets are left out")
    else:
        spec, annotator = samples.spec, samples.readers[0].annotator or {}
        pieces += [
            f"annotator: {annotator.get('model', 'unknown')}{' with a fitted head' if annotator.get('probe') else ''}",
            f"label maps {spec.height} x {spec.width}, {spec.k} of {spec.num_classes} classes a cell, "
            f"extent {spec.extent}",
            f"{loader.grid[0]} x {loader.grid[1]} tokens",
            f"smoothing {loader.smoothing:g}",
        ]
    height, width = loader.image_size
    crops = f"crops {height} px" if height == width else f"crops {height} x {width} px"
    return [plain(piece) for piece in [*pieces, crops, f"epoch {epoch}, seed {loader.seed}"]]


def plain(text: str) -> str:
    """In letters the built-in font has: accents are dropped, what has no ASCII form becomes "?"."""
    letters = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return letters.encode("ascii", "replace").decode("ascii")


def class_name(names: Sequence[str], c: int) -> str:
    return plain(names[c]) if c < len(names) else f"class {c}"


def fit(text: str, width: float) -> str:
    """`text`, its middle replaced by an ellipsis when it is wider than `width` pixels."""
    keep = len(text)
    shortened = text
    while keep > 2 and FONT.getlength(shortened) > width:
        keep -= 1
        shortened = f"{text[: keep // 2]}…{text[-(keep - keep // 2) :]}"
    return shortened


def wrap(pieces: Sequence[str], width: float, between: str = "  ·  ") -> list[str]:
    """Lines at most `width` pixels wide, broken between pieces only."""
    lines: list[str] = []
    for piece in (fit(piece, width) for piece in pieces):
        joined = f"{lines[-1]}{between}{piece}" if lines else piece
        if lines and FONT.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(piece)
    return lines


def _legend(colours: dict[int, np.ndarray], names: Sequence[str], room: int) -> list[tuple[int, int, np.ndarray, str]]:
    """(x, y, colour, name) of every entry, in pixels from the legend's corner."""
    entries = [(colour, class_name(names, c)) for c, colour in colours.items() if colour is not OTHER]
    if (rest := len(colours) - len(entries)) > 0:
        entries.append((OTHER, f"other ({rest} classes)"))
    placed, x, y = [], 0, 0
    for colour, name in entries:
        name = fit(name, min(room - SWATCH - 6, 200))
        size = SWATCH + 6 + int(FONT.getlength(name)) + 18
        if x and x + size - 18 > room:
            x, y = 0, y + LINE
        placed.append((x, y, colour, name))
        x += size
    return placed


def write_text(draw: ImageDraw.ImageDraw, x: float, y: float, line: str, fill: str = "black") -> None:
    """A line of text in the LINE pixels from `y` on."""
    draw.text((x, y + LINE / 2), line, fill=fill, font=FONT, anchor="lm")


def swatch(draw: ImageDraw.ImageDraw, x: float, y: float, colour: np.ndarray) -> None:
    """A square of `colour` uint8 [3] in the line of text from `y` on."""
    draw.rectangle(
        (x, y + (LINE - SWATCH) // 2, x + SWATCH, y + (LINE + SWATCH) // 2),
        fill=tuple(colour.tolist()),
        outline="black",
    )


class Top:
    """The first lines of a sheet and the legend of its colours, `room` pixels wide between the margins; `height`: with
    the margin above."""

    def __init__(self, header: Sequence[str], colours: dict[int, np.ndarray], names: Sequence[str], room: int):
        self._lines, self._legend = wrap(header, room), _legend(colours, names, room)
        legend_height = self._legend[-1][1] + LINE if self._legend else 0
        self.height = MARGIN + LINE * len(self._lines) + legend_height + 8

    def draw(self, draw: ImageDraw.ImageDraw) -> None:
        y = MARGIN
        for line in self._lines:
            write_text(draw, MARGIN, y, line)
            y += LINE
        for x, dy, colour, name in self._legend:
            swatch(draw, MARGIN + x, y + dy, colour)
            write_text(draw, MARGIN + x + SWATCH + 6, y + dy, name)


def check_name(out: Path) -> None:
    """Raises ValueError unless Pillow can write a picture under this name."""
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise InputError(f"{out}: no picture can be written under the name ending {out.suffix!r}; use .png")


def save(picture: Image.Image, out: Path) -> None:
    """Write the picture, whole or not at all; its format is that of the name."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, lambda file: picture.save(file, format=Image.registered_extensions()[out.suffix.lower()]))
