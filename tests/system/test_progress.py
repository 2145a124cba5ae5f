"""Progress of long jobs: plain lines where nobody watches a terminal, a bar where somebody does."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from tl_fast.system import progress
from tl_fast.system.progress import ProgressDisplay, duration


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run(clock: list[float], console: Console, total: int = 1_200, resumed: int = 200) -> None:
    """A job of eight images a second that an earlier run began."""
    with ProgressDisplay("annotating", total, console) as display:
        for done in range(resumed, total + 1):
            display.update(done, "3 rejected" if done > 600 else "", size=1_000_000 * done)
            clock[0] += 0.125


def test_without_a_terminal_a_line_every_30_seconds_says_count_rate_and_time_left(clock):
    out = io.StringIO()
    run(clock, Console(file=out))
    lines = out.getvalue().splitlines()
    assert len(lines) == 4  # of 125 seconds
    assert lines[0] == "annotating: 440 of 1,200, 8.0 images/s, 8 MB/s, 95 s left"
    assert lines[1] == "annotating: 680 of 1,200, 8.0 images/s, 8 MB/s, 3 rejected, 65 s left" and lines[3].endswith(
        "5 s left"
    )


def test_on_a_terminal_there_is_the_bar_alone(clock):
    out = io.StringIO()
    run(clock, Console(file=out, force_terminal=True, width=120))
    assert "1200/1200" in out.getvalue() and "left" not in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_no_thread_is_started(terminal):
    before = threading.active_count()
    with ProgressDisplay("packing", 2, Console(file=io.StringIO(), force_terminal=terminal)) as display:
        display.update(1)
        assert threading.active_count() == before


def test_durations_in_words():
    assert [duration(seconds) for seconds in (40.2, 700, 11_110)] == ["40 s", "12 min", "3 h 05 min"]
