"""Horizontal bars of benchmark rows: the median as a bar and a number, the slowest and fastest round as a whisker."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

OURS, OTHERS, INK = "#1f77b4", "#a8b2bc", "#202020"
WIDTH, ROW = 10.0, 0.32  # inches: the picture, and a bar with the space around it
AROUND = 2.5  # rows that a panel's heading and axis take


def draw(panels: dict[str, list[dict]], path: Path, *, title: str, footer: str) -> None:
    """panels: heading -> rows of `rows.write_rows`, drawn one below the other, each on a scale of its own. Writes a PNG
    to `path`."""
    heights = [len(rows) + AROUND for rows in panels.values()]
    figure = Figure(figsize=(WIDTH, ROW * sum(heights) + 0.9), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    figure.supxlabel(footer, x=0.01, horizontalalignment="left", fontsize="small", color="0.4")
    grid = figure.subplots(len(panels), height_ratios=heights, squeeze=False)
    for axes, (heading, rows) in zip(grid[:, 0], panels.items(), strict=True):
        medians = [row["median"] for row in rows]
        # The median is rounded to five digits, so that of one round may lie outside its range.
        below, above = ([max(row[a] - row[b], 0) for row in rows] for a, b in (("median", "min"), ("max", "median")))
        bars = axes.barh(
            range(len(rows)),
            medians,
            height=0.6,
            xerr=[below, above],
            color=[OURS if row["contender"].startswith("tl_fast") else OTHERS for row in rows],
            error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1.2},
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=5)
        axes.set_yticks(range(len(rows)), [row["contender"] for row in rows])
        axes.invert_yaxis()  # the first row on top
        axes.margins(x=0.1, y=0.02)  # room for the numbers
        axes.set_title(heading, loc="left", fontsize="medium")
        axes.set_xlabel(rows[0]["unit"])
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="0.88")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    FigureCanvasAgg(figure).print_png(path, pil_kwargs={"optimize": True})
