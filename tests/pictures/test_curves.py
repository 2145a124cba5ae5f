"""The curves of a run: what the picture shows is where the numbers are."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tl_fast import show
from tl_fast.pictures import curves


def write_run(folder, steps=range(100, 2001, 100), **columns):
    rows = [
        {
            "kind": "train",
            "step": step,
            "epoch": step // 500,
            "loss": 5 - step / 1000,
            "lr": 1e-3,
            **{k: f(step) for k, f in columns.items()},
        }
        for step in steps
    ]
    rows += [
        {"kind": "val", "step": step, "epoch": step // 500, "val_top1_ema": step / 40, "val_top1_raw": step / 50}
        for step in (500, 1000)
    ]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pixels(picture) -> np.ndarray:
    return np.asarray(Image.open(picture).convert("RGB")).astype(int)


def line_of(image: np.ndarray, colour: tuple[int, int, int], panel: int) -> dict[int, float]:
    """Column -> mean row of the pixels of this colour inside a panel's axes."""
    left = curves.MARGIN + panel % 2 * curves.WIDTH + curves.LEFT
    top = curves.HEADER + panel // 2 * curves.HEIGHT + curves.ABOVE
    bottom, right = top + curves.HEIGHT - curves.ABOVE - curves.BELOW, left + curves.WIDTH - curves.LEFT - curves.RIGHT
    part = image[top * curves.SCALE : bottom * curves.SCALE + 1, left * curves.SCALE : right * curves.SCALE + 1]
    rows, columns = np.nonzero((np.abs(part - colour) < 30).all(-1))
    return {int(column): rows[columns == column].mean() / (part.shape[0] - 1) for column in np.unique(columns)}


def test_the_loss_is_drawn_where_it_is(tmp_path, capsys):
    """A falling line over axes of 3..5 (its ticks) and 0..2,000 steps: each column's height is the loss of its step."""
    run = write_run(tmp_path / "run")
    show.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "curves.png")
    line = line_of(pixels(run / "curves.png"), curves.COLOURS[0], 0)
    width = (curves.WIDTH - curves.LEFT - curves.RIGHT) * curves.SCALE
    assert min(line) / width == pytest.approx(0.05, abs=0.02) and max(line) / width == pytest.approx(1, abs=0.02)
    for column, height in line.items():
        assert height == pytest.approx((5 - (5 - 2 * column / width)) / 2, abs=0.03)


def test_panels_without_rows_are_left_out_and_values_that_are_not_finite(tmp_path):
    few = write_run(tmp_path / "few")
    heights = {Image.open(curves.draw_curves(few)).height}
    more = write_run(
        tmp_path / "more", grad_norm=lambda step: math.nan if step == 500 else 1.0, data_wait=lambda _: 0.1
    )
    heights.add(Image.open(curves.draw_curves(more, tmp_path / "x.png")).height)
    never = write_run(tmp_path / "never", grad_norm=lambda _: math.inf)
    heights.add(Image.open(curves.draw_curves(never)).height)
    rows = [curves.HEADER + curves.MARGIN + rows * curves.HEIGHT for rows in (2, 3)]
    assert heights == {height * curves.SCALE for height in rows}


def test_continued_runs_show_where(tmp_path):
    run = write_run(tmp_path / "run")
    before = pixels(curves.draw_curves(run))
    (run / "run.json").write_text(json.dumps({"starts": [{"step": 0}, {"step": 1000}]}))
    after = pixels(curves.draw_curves(run))
    left, right = curves.MARGIN + curves.LEFT, curves.MARGIN + curves.WIDTH - curves.RIGHT
    columns = np.nonzero((before != after).any(-1)[(curves.HEADER + curves.ABOVE) * curves.SCALE :].any(0))[0]
    assert np.abs(columns / curves.SCALE - (left + right) / 2).min() < 1


def test_a_run_of_one_row_can_be_drawn(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 1, "epoch": 0, "loss": 2.0, "lr": 0.0}) + "\n"
    )
    assert pixels(curves.draw_curves(run)).min() < 50


@pytest.mark.parametrize("content, named", [(None, "has no metrics.jsonl"), ("", "has no rows yet")])
def test_what_is_no_run_is_refused_by_name(tmp_path, capsys, content, named):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(SystemExit) as exit:
        show.main([str(tmp_path)])
    errors = capsys.readouterr().err
    assert exit.value.code == 1 and str(tmp_path) in errors and named in errors


def test_options_of_betons_and_other_formats_are_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for arguments, named in (
        (["--image-size", "64"], "--image-size is for betons"),
        (["--out", str(tmp_path / "x.jpg")], "must end in .png"),
    ):
        with pytest.raises(SystemExit):
            show.main([str(run), *arguments])
        assert named in capsys.readouterr().err


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_round_and_enclose(low, span):
    high = low + span
    if high - low < 1e-9 * abs(low):
        return
    marks = curves.ticks(low, high)
    step = marks[1] - marks[0]
    assert (
        2 <= len(marks) <= 6
        and marks[0] <= low + 1e-9 * abs(low) + 1e-12
        and marks[-1] >= high - 1e-9 * abs(high) - 1e-12
    )
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-3 * mantissa
