"""Switches of how a step is computed: short runs with each of them follow the run without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tl_fast.training import loop as training
from tl_fast.training.config import TrainConfig
from tl_fast.training.runlog import read_rows


def losses(config: TrainConfig) -> list[float]:
    summary = training.train(config)
    return [row["loss"] for row in read_rows(Path(summary["metrics"])) if row["kind"] == "train"]


@pytest.mark.parametrize(
    "base, switches, tolerance",
    [
        pytest.param({}, {"stem_space_to_depth": True}, 1e-4, id="stem_space_to_depth"),
    ],
)
def test_a_short_run_follows_the_one_without_the_switch(tiny, base, switches, tolerance):
    """8 steps; the loss moves by much more than the tolerance."""
    expected = losses(tiny("plain", max_steps=8, **base))
    actual = losses(tiny("switched", max_steps=8, **base, **switches))
    assert len(expected) == 8 and np.ptp(expected) > 0.02 > 5 * tolerance
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_a_run_may_go_on_with_other_switches(tiny):
    """They change no weight's name or shape, so a checkpoint fits with them and without."""
    training.train(tiny(max_steps=2))
    assert training.train(tiny(max_steps=4, resume="auto", stem_space_to_depth=True))["steps"] == 4
