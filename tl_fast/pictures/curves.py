"""The curves of a run, drawn from its metrics.jsonl: `python -m tl_fast.show RUN_DIR` writes RUN_DIR/curves.png.

One panel a quantity over optimiser steps: loss with its class and token terms, validation top-1 and loss of EMA and raw
weights, learning rate, gradient norm, images/s, data wait. Grey vertical lines are the steps at which the run was
continued after a stop.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tl_fast.system.atomic import write_atomic
from tl_fast.system.mistakes import InputError
from tl_fast.training.record import read_record
from tl_fast.training.runlog import read_rows

SCALE = 2  # pixels of the picture for one of the layout
WIDTH, HEIGHT = 460, 240  # of a panel, in the layout's pixels
LEFT, RIGHT, ABOVE, BELOW = 62, 14, 46, 34  # from a panel's edge to its axes
MARGIN, HEADER = 18, 58
INK, GREY, LINE, PAPER = (32, 32, 32), (120, 120, 120), (226, 226, 226), (255, 255, 255)
COLOURS = (
    (0, 90, 181),
    (220, 50, 32),
    (0, 140, 90),
)  # told apart by the colour-blind too, and in this order in every panel


@dataclass(frozen=True)
class Panel:
    """One quantity: `names` are the rows' keys -> what the legend calls them; `kind` the rows that have it; `zero`: the
    axis starts there; `share`: it is in percent."""

    title: str
    kind: str
    names: dict[str, str]
    zero: bool = False
    share: bool = False


PANELS = (
    Panel("training loss, nats", "train", {"loss": "loss", "class_loss": "class token", "token_loss": "patch tokens"}),
    Panel("validation top-1, %", "val", {"val_top1_ema": "EMA", "val_top1_raw": "raw"}),
    Panel("validation loss, nats", "val", {"val_loss_ema": "EMA", "val_loss_raw": "raw"}),
    Panel("learning rate", "train", {"lr": "lr"}, zero=True),
    Panel("gradient norm before clipping", "train", {"grad_norm": "norm"}, zero=True),
    Panel("images/s, all ranks", "train", {"images_per_second": "images/s"}, zero=True),
    Panel("waiting for data, share of the time", "train", {"data_wait": "wait"}, zero=True, share=True),
)


def draw_curves(folder: Path, out: Path | None = None) -> Path:
    """Draw the run in `folder` to `out` (a .png; default folder/curves.png), whole or not at all -> its path.

    Panels of which the run has no rows are left out. Raises ValueError when `folder` is not a run's or has no rows yet.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise InputError(f"{folder} is not the folder of a run: it has no metrics.jsonl")
    rows = read_rows(metrics)
    if not rows:
        raise InputError(f"{metrics} has no rows yet: the first comes after log_every steps")
    out = out or folder / "curves.png"
    if out.suffix.lower() != ".png":
        raise InputError(f"the picture's name must end in .png, got {out}")
    panels = [(panel, found) for panel in PANELS if (found := _lines(panel, rows))]
    resumed = [start["step"] for start in read_record(folder) if start["step"]]
    last = max(row["step"] for row in rows)
    columns = min(2, len(panels))
    size = 2 * MARGIN + columns * WIDTH, HEADER + -(-len(panels) // columns) * HEIGHT + MARGIN
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), PAPER)
    canvas = _Canvas(image)
    canvas.text(MARGIN, 22, str(folder), 16)
    epoch = max(row["epoch"] for row in rows)
    canvas.text(
        MARGIN, 43, f"step {last:,}, epoch {epoch}" + f", continued {len(resumed)} times" * bool(resumed), 12, GREY
    )
    for number, (panel, lines) in enumerate(panels):
        left, top = MARGIN + number % columns * WIDTH, HEADER + number // columns * HEIGHT
        _draw_panel(canvas, panel, lines, left, top, last, resumed)
    picture = io.BytesIO()
    image.save(picture, "PNG")
    write_atomic(out, lambda file: file.write(picture.getvalue()))
    return out


def _lines(panel: Panel, rows: Sequence[dict]) -> dict[str, list[tuple[int, float]]]:
    """The panel's lines: name in the legend -> (step, value) of every finite value."""
    found = {}
    for key, name in panel.names.items():
        points = [
            (row["step"], row[key])
            for row in rows
            if row["kind"] == panel.kind and math.isfinite(row.get(key, math.nan))
        ]
        if points:
            found[name] = points
    return found


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` + 1 round numbers (1, 2 or 5 times a power of ten apart) that enclose low..high. `low` <
    `high`."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (power, 2 * power, 5 * power, 10 * power, 20 * power):
        first, final = math.floor(low / step * (1 + 1e-12)), math.ceil(high / step * (1 - 1e-12))
        if final - first <= most:
            break
    return [i * step for i in range(first, final + 1)]


class _Canvas:
    """Draws in the layout's pixels."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def text(
        self, x: float, y: float, words: str, size: int, colour: tuple[int, int, int] = INK, anchor: str = "lm"
    ) -> float:
        """Its width."""
        font = ImageFont.load_default(size * SCALE)
        self._draw.text((x * SCALE, y * SCALE), words, colour, font, anchor)
        return font.getlength(words) / SCALE

    def line(self, points: Sequence[tuple[float, float]], colour: tuple[int, int, int], width: float = 1) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        if len(scaled) > 1:
            self._draw.line(scaled, colour, round(width * SCALE), "curve")

    def dot(self, x: float, y: float, colour: tuple[int, int, int], radius: float = 2.2) -> None:
        self._draw.ellipse(
            [(x - radius) * SCALE, (y - radius) * SCALE, (x + radius) * SCALE, (y + radius) * SCALE], colour
        )


def _draw_panel(
    canvas: _Canvas,
    panel: Panel,
    lines: dict[str, list[tuple[int, float]]],
    left: float,
    top: float,
    last: int,
    resumed: Sequence[int],
) -> None:
    x0, x1, y0, y1 = left + LEFT, left + WIDTH - RIGHT, top + ABOVE, top + HEIGHT - BELOW
    values = [value for points in lines.values() for _, value in points]
    low, high = (min(values), max(values))
    if panel.zero:
        low = min(low, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: a line in the middle
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    marks = ticks(low, high)
    low, high = marks[0], marks[-1]

    def place(step: float, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * step / max(last, 1), y1 - (y1 - y0) * (value - low) / (high - low)

    canvas.text(left + 8, top + 12, panel.title, 13)
    for mark in marks:
        _, y = place(0, mark)
        canvas.line([(x0, y), (x1, y)], LINE)
        canvas.text(x0 - 6, y, f"{100 * mark:.4g}%" if panel.share else f"{mark:.6g}", 11, GREY, "rm")
    for mark in ticks(0, max(last, 1)):
        if mark == round(mark) and mark <= last:
            x, _ = place(mark, low)
            canvas.line([(x, y1), (x, y1 + 4)], GREY)
            canvas.text(x, y1 + 13, f"{mark:,.0f}", 11, GREY, "mm")
    for step in resumed:
        canvas.line([place(step, low), place(step, high)], (200, 200, 200))
    x = left + 8
    for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
        shown = [place(*point) for point in points]
        canvas.line(shown, colour, 1.4)
        if len(shown) <= 40:  # so few that a line alone would hide where they are
            for point in shown:
                canvas.dot(*point, colour)
        canvas.line([(x, top + 31), (x + 16, top + 31)], colour, 3)
        final = points[-1][1]
        x += 38 + canvas.text(x + 22, top + 31, f"{name} {final:.1%}" if panel.share else f"{name} {final:.4g}", 12)
