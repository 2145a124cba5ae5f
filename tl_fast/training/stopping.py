"""Ending a run in good order: the signals that ask for it, and how all ranks agree after which step they do."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch

from tl_fast.system.ranks import Ranks

# Seconds. The terminal sends a Ctrl-C to the workers, and torchrun sends it to them again: two signals within this time
# are one Ctrl-C.
IMPATIENCE = 2.0


class StopSignals:
    """While entered, SIGTERM and SIGINT do not end the process but set `received` to their number (0: none).

    A second Ctrl-C, more than IMPATIENCE later, raises KeyboardInterrupt. Outside the main thread, where Python allows
    no handlers, it does nothing. The handlers from before come back at the exit, so that a process that is failing can
    be terminated at once.
    """

    def __init__(self) -> None:
        self.received = 0
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > IMPATIENCE:
            raise KeyboardInterrupt


class Agreement:
    """One decision for all ranks: whether to stop, and whether a checkpoint is due by the clock.

    A signal reaches ranks in different steps, and clocks differ; a rank that left alone would let the others wait for
    it. After each step the ranks combine what they know over the CPU group `ranks.control`. On GPUs the result of one
    step is read after the next, so that neither host nor device waits for it; it also notices within a step that a rank
    has died. On CPUs, where a step may take longer than a scheduler's patience, it is read at once.

    Args:
        signals: this rank's.
        minutes: between checkpoints, by rank 0's clock; None: never.
    """

    def __init__(self, ranks: Ranks, signals: StopSignals, minutes: float | None) -> None:
        self.ranks, self.signals = ranks, signals
        self._seconds = None if minutes is None else 60 * minutes
        self._saved = time.monotonic()
        self._lag = ranks.device.type == "cuda"
        self._vote: tuple[torch.Tensor, Any] | None = None
        self.stop = 0
        """Number of the signal that the ranks have agreed to stop for; 0: none."""

    def after_step(self) -> bool:
        """Called by every rank after every step; sets `stop`. True when a checkpoint is due by the clock."""
        if self.ranks.world_size == 1:
            self.stop, due = self._mine()
            return bool(due)
        if self._lag:
            earlier, self._vote = self._vote, self.ranks.start_max(self._mine())
            return self._count(earlier) if earlier else False
        return self._count(self.ranks.start_max(self._mine()))

    def now(self) -> int:
        """`stop`, agreed on at this moment; every rank calls it."""
        self.finish()
        if not self.stop:
            self._count(self.ranks.start_max(self._mine()))
        return self.stop

    def saved(self) -> None:
        """Set the clock of checkpoints back; every rank calls it after every checkpoint.

        A vote still under way was cast before the checkpoint: what it says of stopping counts, that one is due no
        longer does.
        """
        self.finish()
        self._saved = time.monotonic()

    def until_stopped(self, batches: Iterable) -> Iterator:
        """`batches` up to a signal to this rank, but at least the first: for passes whose end is a collective, after
        which `now` is asked."""
        for batch in batches:
            yield batch
            if self.signals.received:
                return

    def finish(self) -> None:
        """Read what is still under way: a process group must not be left with it."""
        if self._vote:
            earlier, self._vote = self._vote, None
            self._count(earlier)

    def _mine(self) -> tuple[int, int]:
        due = self._seconds is not None and self.ranks.main and time.monotonic() - self._saved > self._seconds
        return self.signals.received, int(due)

    def _count(self, vote: tuple[torch.Tensor, Any]) -> bool:
        values, work = vote
        if work is not None:
            work.wait()
        stop, due = values.tolist()
        self.stop = self.stop or stop
        return bool(due)
