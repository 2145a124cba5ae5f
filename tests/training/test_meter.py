"""The meter's order of calls, and what a window's row holds."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from tl_fast.system.ranks import Ranks
from tl_fast.training.config import TrainConfig
from tl_fast.training.meter import Meter
from tl_fast.training.nonfinite import NonFinite


class Log:
    """Keeps rows."""

    def __init__(self):
        self.rows = []

    def row(self, kind, step, epoch, values, note):
        self.rows.append((kind, step, epoch, values))


@pytest.fixture
def meter(tmp_path) -> Meter:
    """Of a run of 2 batches a step and 2 steps a window."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    config = TrainConfig(train_data="none", batch_size=4, accumulate=2, log_every=2, lr_base_batch=4)
    return Meter(ranks, NonFinite(ranks, "skip", 10, tmp_path), Log(), config, ("class_loss", "token_loss"))


def batches(count: int):
    return (SimpleNamespace(sample_ids=torch.tensor([2 * i, 2 * i + 1])) for i in range(count))


def run_step(meter: Meter, step: int, loss: float = 1.0) -> float:
    """Whether the step was bad."""
    for part in (-0.5, 0.5):
        meter.fetch()
        meter.add_loss(torch.tensor(loss + part), torch.tensor([loss, 2 * loss]))
    bad = meter.add_step(step, 0, 0.1, torch.tensor(3.0))
    meter.end_step()
    return bad.item()


def test_rows_are_means_of_windows_written_a_step_late_and_at_the_end(meter):
    written = []
    with meter.epoch(batches(10)):
        for step in range(5):
            run_step(meter, step, loss=step + 1.0)
            written.append(len(meter.log.rows))
    assert written == [0, 0, 1, 1, 2]
    assert [row[:3] for row in meter.log.rows] == [("train", 2, 0), ("train", 4, 0), ("train", 5, 0)]
    assert [row[3]["loss"] for row in meter.log.rows] == [1.5, 3.5, 5.0]
    assert [row[3]["token_loss"] for row in meter.log.rows] == [3.0, 7.0, 10.0]
    assert all(row[3]["grad_norm"] == 3 and row[3]["lr"] == 0.1 for row in meter.log.rows)
    assert meter.row == meter.log.rows[-1][3]


def test_saving_writes_the_row_that_is_due(meter):
    with meter.epoch(batches(8)):
        for step in range(4):
            run_step(meter, step)
            with meter.saving():
                assert len(meter.log.rows) == (step + 1) // 2
    assert len(meter.log.rows) == 2


def test_a_bad_step_is_left_out_of_its_window(meter):
    with meter.epoch(batches(4)):
        assert run_step(meter, 0, math.nan) == 1 and run_step(meter, 1, 2.0) == 0
    assert meter.row["loss"] == 2 and meter.row["skipped"] == 1 and meter.guard.skipped == 1


def test_calls_out_of_order_are_refused(meter):
    scalar = torch.tensor(1.0)

    def add_loss():
        meter.add_loss(scalar, torch.ones(2))

    def add_step():
        meter.add_step(0, 0, 0.1, scalar)

    def refused(call, *belongs):
        with pytest.raises(RuntimeError, match=f"out of order, where {' or '.join(belongs)} may come"):
            call()

    def save():
        with meter.saving():
            pass

    def begin():
        with meter.epoch(batches(1)):
            pass

    refused(meter.fetch, "epoch")
    with meter.epoch(batches(4)):
        refused(save, "fetch", "the epoch's end")
        for after in (["fetch", "the epoch's end"], ["fetch"]):
            refused(add_loss, *after)
            meter.fetch()
            refused(meter.fetch, "add_loss")
            refused(add_step, "add_loss")
            add_loss()
        refused(meter.end_step, "add_step")
        add_step()
        refused(meter.fetch, "end_step")
        meter.end_step()
        save()
        refused(begin, "fetch", "the epoch's end")
    with pytest.raises(RuntimeError, match="the epoch's end is out of order, where add_loss may come"):
        with meter.epoch(batches(1)):
            meter.fetch()


def test_a_loader_that_ends_early_is_named(meter):
    with pytest.raises(RuntimeError, match="the loader ended before the epoch"):
        with meter.epoch(batches(1)):
            run_step(meter, 0)
