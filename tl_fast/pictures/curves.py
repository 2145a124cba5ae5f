"""The curves of a run, drawn from its metrics.jsonl: `python -m tl_fast.show RUN_DIR` writes RUN_DIR/curves.png.

One panel a quantity over optimiser steps: loss with its two terms, validation top-1 (mIoU in segmentation) and loss of
EMA and raw weights, learning rate, gradient norm, images/s, data wait. Grey vertical lines are the steps at which the
run was continued after a stop.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from tl_fast.system.atomic import write_atomic
from tl_fast.system.mistakes import InputError
from tl_fast.training.record import read_record
from tl_fast.training.runlog import read_rows

WIDTH, HEIGHT = 4.8, 2.7  # of a panel, in inches
DPI = 200  # pixels per inch
COLOURS = ("#005ab5", "#dc3220", "#008c5a")  # told apart by the colour-blind too; in this order in every panel
ROUND = (1, 2, 5, 10)  # ticks lie one of these, times a power of ten, apart
MANY = 40  # points; of a line with fewer each is marked by a dot


@dataclass(frozen=True)
class Panel:
    """One quantity over steps.

    title, unit: of the value axis; unit "" where the quantity has none.
    kind: of the rows that have it, "train" or "val".
    names: a row's key -> what the legend calls it.
    zero: the value axis starts at 0.
    scale: from the rows' values to the unit.
    """

    title: str
    unit: str
    kind: str
    names: dict[str, str]
    zero: bool = False
    scale: float = 1


# The loss's two terms are those of classification or of segmentation.
LOSSES = {"loss": "loss", "class_loss": "class", "token_loss": "tokens", "decoder_loss": "decoder", "aux_loss": "aux"}
PANELS = (
    Panel("training loss", "nats", "train", LOSSES),
    Panel("validation top-1", "%", "val", {"val_top1_ema": "EMA", "val_top1_raw": "raw"}),
    Panel("validation mIoU", "%", "val", {"val_miou_ema": "EMA", "val_miou_raw": "raw"}),
    Panel("validation loss", "nats", "val", {"val_loss_ema": "EMA", "val_loss_raw": "raw"}),
    Panel("learning rate", "", "train", {"lr": "lr"}, zero=True),
    Panel("gradient norm before clipping", "", "train", {"grad_norm": "norm"}, zero=True),
    Panel("speed, all ranks", "images/s", "train", {"images_per_second": "images/s"}, zero=True),
    Panel("waiting for data", "% of the time", "train", {"data_wait": "wait"}, zero=True, scale=100),
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
    resumed = [start["step"] for start in read_record(folder) if start["step"]]
    picture = io.BytesIO()
    FigureCanvasAgg(figure_of(str(folder), rows, resumed)).print_png(picture)
    write_atomic(out, lambda file: file.write(picture.getvalue()))
    return out


def figure_of(name: str, rows: Sequence[dict[str, Any]], resumed: Sequence[int]) -> Figure:
    """The figure of a run's rows (at least one), an axes for each panel that has any.

    name: of the run, the figure's title. resumed: steps at which the run was continued.
    """
    panels = [(panel, lines) for panel in PANELS if (lines := _lines(panel, rows))]
    last_step, epoch = (max(row[key] for row in rows) for key in ("step", "epoch"))
    columns = min(2, max(len(panels), 1))
    length = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(columns * WIDTH, length * HEIGHT + 0.6), dpi=DPI, layout="constrained")
    continued = f", continued {len(resumed)} times" * bool(resumed)
    title = f"{name}\nstep {last_step:,}, epoch {epoch}{continued}"
    figure.suptitle(title, x=0.01, horizontalalignment="left", fontsize="medium", parse_math=False)
    for number, (panel, lines) in enumerate(panels, 1):
        _draw_panel(figure.add_subplot(length, columns, number), panel, lines, last_step, resumed)
    return figure


def _lines(panel: Panel, rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """The panel's lines: name in the legend -> (step, value) of every finite value; a name without any is left out."""
    lines = {
        name: [
            (row["step"], panel.scale * row[key])
            for row in rows
            if row["kind"] == panel.kind and math.isfinite(row.get(key, math.nan))
        ]
        for key, name in panel.names.items()
    }
    return {name: points for name, points in lines.items() if points}


def _draw_panel(
    axes: Axes, panel: Panel, lines: dict[str, list[tuple[int, float]]], last_step: int, resumed: Sequence[int]
) -> None:
    axes.set_title(panel.title, loc="left", fontsize="medium", pad=20)  # above the legend
    axes.set_xlabel("optimiser step", fontsize="small")
    axes.set_ylabel(panel.unit, fontsize="small")
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=ROUND, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=ROUND))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axes.tick_params(labelsize="small")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    for step in resumed:
        axes.axvline(step, color="0.75", linewidth=1)
    for colour, (name, points) in zip(COLOURS, lines.items(), strict=False):
        steps, values = zip(*points, strict=True)
        dots = "." if len(points) <= MANY else None
        axes.plot(steps, values, color=colour, linewidth=1.2, marker=dots, label=f"{name} {values[-1]:.4g}")
    axes.set_xlim(0, max(last_step, 1))
    if panel.zero:
        axes.set_ylim(bottom=0)
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(COLOURS), "borderaxespad": 0.2}
    legend = axes.legend(**above, frameon=False, fontsize="small", handlelength=1.2, columnspacing=1.2)
    legend.set_in_layout(False)  # a long one would push the columns apart
