"""The ranks' agreement to stop and to save, in the order of a GPU, where a vote is read one step late."""

from __future__ import annotations

import signal

import pytest
import torch

from tl_fast.system.ranks import Ranks
from tl_fast.training import stopping
from tl_fast.training.stopping import Agreement, StopSignals


class Work:
    """A collective under way, which must be waited for before its result is read."""

    def __init__(self) -> None:
        self.done = False

    def wait(self) -> None:
        self.done = True


class TwoRanks(Ranks):
    """This rank of two; the other knows nothing of its own."""

    def start_max(self, values):
        return torch.tensor(values), Work()


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def agreement():
    made = Agreement(TwoRanks(0, 2, torch.device("cpu")), StopSignals(), minutes=1)
    made._lag = True
    return made


def test_a_checkpoint_by_the_clock_is_written_once(clock, agreement):
    """A step takes 25 s: of the steps from 0 on the third is the first to end after a minute, and a vote is read a step
    later."""
    due = []
    for step in range(12):
        clock[0] += 25
        if agreement.after_step():
            due.append(step)
            agreement.saved()
    assert due == [3, 7, 11]


def test_a_vote_to_stop_that_was_under_way_while_saving_counts(clock, agreement):
    clock[0] = 61
    assert not agreement.after_step()
    agreement.signals.received = signal.SIGTERM
    assert agreement.after_step() and not agreement.stop  # what was known before the signal
    agreement.saved()
    assert agreement.stop == signal.SIGTERM and agreement._vote is None
    agreement.signals.received = 0
    assert not agreement.after_step() and agreement.now() == signal.SIGTERM
