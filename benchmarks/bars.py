"""Horizontal bars of benchmark rows, drawn with Pillow: the median as a bar and a number, the slowest and fastest round
as a whisker."""

from __future__ import annotations

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SCALE = 2  # pixels of the file for one of the layout
WIDTH, LABEL, ROW, BAR, MARGIN = 1000, 420, 30, 18, 24
INK, GREY, LINE = (32, 32, 32), (110, 110, 110), (222, 222, 222)
OURS, OTHERS = (31, 119, 180), (168, 178, 188)


def nice_step(highest: float, marks: int = 5) -> float:
    """The step of 1, 2 or 5 times a power of ten that puts at most `marks` marks up to `highest`."""
    power = 10.0 ** math.floor(math.log10(highest / marks))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step * marks >= highest)


def draw(panels: dict[str, list[dict]], path: Path, *, title: str, footer: str) -> None:
    """panels: heading -> rows of `rows.write_rows`, drawn one below the other, each on a scale of its own. Writes a PNG
    to `path`."""
    size = {"title": 20, "heading": 15, "text": 13, "small": 11}
    fonts = {name: ImageFont.load_default(points * SCALE) for name, points in size.items()}
    height = MARGIN + 40 + sum(34 + ROW * len(rows) + 34 for rows in panels.values()) + 34
    image = Image.new("RGB", (WIDTH * SCALE, height * SCALE), "white")
    canvas = ImageDraw.Draw(image)

    def text(x: float, y: float, words: str, font: str, colour: tuple[int, int, int] = INK, anchor: str = "lm") -> None:
        canvas.text((x * SCALE, y * SCALE), words, colour, fonts[font], anchor)

    def box(left: float, top: float, right: float, bottom: float, colour: tuple[int, int, int]) -> None:
        left, top, right, bottom = (round(value * SCALE) for value in (left, top, right, bottom))
        canvas.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), colour)  # at least a pixel

    text(MARGIN, MARGIN + 8, title, "title")
    y = MARGIN + 40
    for heading, rows in panels.items():
        text(MARGIN, y + 12, heading, "heading")
        text(MARGIN + LABEL, y + 16, rows[0]["unit"], "small", GREY)
        y += 34
        highest = max(row["max"] for row in rows)
        step = nice_step(highest)
        left, right = MARGIN + LABEL, WIDTH - MARGIN - 60
        per_unit = (right - left) / (step * -(-highest // step))
        bottom = y + ROW * len(rows)
        mark = 0.0
        while left + mark * per_unit <= right + 0.5:
            x = left + mark * per_unit
            box(x, y, x + 1, bottom, LINE)
            text(x, bottom + 10, f"{mark:,.0f}", "small", GREY, "mm")
            mark += step
        for row in rows:
            middle = y + ROW / 2
            text(left - 10, middle, row["contender"], "text", anchor="rm")
            end = left + row["median"] * per_unit
            box(
                left,
                middle - BAR / 2,
                end,
                middle + BAR / 2,
                OURS if row["contender"].startswith("tl_fast") else OTHERS,
            )
            low, high = left + row["min"] * per_unit, left + row["max"] * per_unit
            box(low, middle - 0.75, high, middle + 0.75, INK)
            for x in (low, high):
                box(x - 0.75, middle - 4, x + 0.75, middle + 4, INK)
            text(max(end, high) + 8, middle, f"{row['median']:,.0f}", "text")
            y += ROW
        y += 34
    text(MARGIN, height - 18, footer, "small", GREY)
    image.save(path, optimize=True)
