"""The curves of a run: the figure's lines hold the numbers of its rows."""

from __future__ import annotations

import json
import math

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tl_fast import show
from tl_fast.pictures import curves
from tl_fast.training.runlog import read_rows


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


def figure_of(folder, resumed=()) -> Figure:
    return curves.figure_of(str(folder), read_rows(folder / "metrics.jsonl"), resumed)


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def points(axes) -> dict[str, list[tuple[float, float]]]:
    """Name in the legend, with the last value -> (step, value) of the line."""
    return {
        line.get_label(): list(zip(*line.get_data(), strict=True))
        for line in axes.get_lines()
        if not line.get_label().startswith("_")  # a step at which the run was continued
    }


def test_lines_hold_the_numbers_of_the_rows(tmp_path):
    run = write_run(tmp_path / "run", class_loss=lambda _: 1.5, data_wait=lambda step: step / 10_000)
    figure = figure_of(run)
    assert titles(figure) == ["training loss", "validation top-1", "learning rate", "waiting for data"]
    loss, top1, lr, wait = figure.axes
    steps = range(100, 2001, 100)
    assert points(loss) == {
        "loss 3": [(step, 5 - step / 1000) for step in steps],
        "class 1.5": [(step, 1.5) for step in steps],
    }
    assert points(top1) == {"EMA 25": [(500, 12.5), (1000, 25.0)], "raw 20": [(500, 10.0), (1000, 20.0)]}
    assert points(lr) == {"lr 0.001": [(step, 1e-3) for step in steps]}
    assert points(wait)["wait 20"] == [(step, pytest.approx(step / 100)) for step in steps], "percent"


def test_axes_have_units_and_start_where_they_should(tmp_path):
    loss, top1, lr = figure_of(write_run(tmp_path / "run")).axes
    assert [axes.get_ylabel() for axes in (loss, top1, lr)] == ["nats", "%", ""]
    for axes in (loss, top1, lr):
        assert axes.get_xlabel() == "optimiser step" and axes.get_xlim() == (0, 2000)
    assert lr.get_ylim()[0] == 0 and loss.get_ylim()[0] > 2 and loss.get_ylim()[1] > 4.9


def test_the_picture_is_written_and_named(tmp_path, capsys):
    run = write_run(tmp_path / "run $1$")  # no formula
    show.main([str(run)])
    assert capsys.readouterr().out.strip() == str(run / "curves.png")
    image = Image.open(run / "curves.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert image.width > 1500
    assert {tuple(bytes.fromhex(colour[1:])) for colour in curves.COLOURS[:2]} <= colours


def test_panels_without_rows_are_left_out_and_values_that_are_not_finite(tmp_path):
    few = titles(figure_of(write_run(tmp_path / "few")))
    holed = figure_of(write_run(tmp_path / "holed", grad_norm=lambda step: math.nan if step == 500 else 1.0))
    assert titles(holed) == [*few, "gradient norm before clipping"]
    assert [step for step, _ in points(holed.axes[-1])["norm 1"]] == [
        step for step in range(100, 2001, 100) if step != 500
    ]
    assert titles(figure_of(write_run(tmp_path / "never", grad_norm=lambda _: math.inf))) == few


def test_continued_runs_show_where(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"starts": [{"step": 0}, {"step": 1000}]}))
    figures, draw = [], curves.figure_of
    monkeypatch.setattr(curves, "figure_of", lambda *arguments: figures.append(draw(*arguments)) or figures[-1])
    curves.draw_curves(run)
    assert "step 2,000, epoch 4, continued 1 times" in figures[0].get_suptitle()
    for axes in figures[0].axes:
        (mark,) = (line for line in axes.get_lines() if line.get_label().startswith("_"))
        assert list(mark.get_xdata()) == [1000, 1000]


def test_a_run_of_one_row_can_be_drawn(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "step": 1, "epoch": 0, "loss": 2.0, "lr": 0.0}) + "\n"
    )
    assert points(figure_of(run).axes[0]) == {"loss 2": [(1, 2.0)]}
    assert curves.draw_curves(run).stat().st_size > 1000


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


def test_a_segmentation_run_has_its_own_terms_and_mean_iou(tmp_path):
    losses = {"loss": 1.4, "decoder_loss": 1.0, "aux_loss": 1.0}
    rows = [{"kind": "train", "step": step, "epoch": 0, **losses} for step in (10, 20)]
    rows += [{"kind": "val", "step": 20, "epoch": 0, "val_miou_ema": 40.0, "val_miou_raw": 39.0}]
    figure = curves.figure_of("run", rows, ())
    assert titles(figure) == ["training loss", "validation mIoU"]
    assert points(figure.axes[0]).keys() == {"loss 1.4", "decoder 1", "aux 1"}
    assert points(figure.axes[1]) == {"EMA 40": [(20, 40.0)], "raw 39": [(20, 39.0)]}
