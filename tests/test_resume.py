"""Where a run starts: what it falls back to, what it refuses to continue, and what it leaves on record."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tiny_runs import betons, tiny, weights  # noqa: F401  two of them are fixtures

from tl_fast import checkpoint
from tl_fast import train as training


def test_a_run_that_fell_back_from_a_torn_checkpoint_keeps_what_it_saves(tiny):
    """keep 1, the newest torn: the summary and the folder hold the new one, and the next start goes on from it."""
    config = tiny(max_steps=9, checkpoint_steps=3, keep=9)
    torn = Path(training.train(config)["checkpoint"])
    (torn / checkpoint.OPTIMIZER).write_bytes(b"torn")
    again = dataclasses.replace(config, max_steps=7, keep=1, resume="auto")
    with pytest.warns(UserWarning, match=f"falling back.*{torn.name}"):
        summary = training.train(again)
    assert summary["steps"] == 7 and summary["checkpoint"].endswith("step-0000000007")
    assert checkpoint.checkpoints(torn.parent) == [Path(summary["checkpoint"])] and checkpoint.latest(torn.parent)
