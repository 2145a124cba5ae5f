"""Shows how far a long job is: a bar on a terminal; elsewhere (SLURM's logs, CI) a plain line every 30 seconds."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0
BAR_SECONDS = 0.1


class ProgressDisplay:
    """Shows `update(done)` of `total` images on `console` (by default standard error), with images/s and the time left.

    label: what is being done. enabled: False shows nothing. The first `update` sets the start, so that the rate leaves
    out what an earlier run did. No thread is started: a job may fork while its progress is shown.
    """

    def __init__(self, label: str, total: int, console: Console | None = None, *, enabled: bool = True) -> None:
        self._label, self._total, self._enabled = label, total, enabled
        self._console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._start: tuple[float, int, int] | None = None  # time, images and bytes of the first update
        self._shown = 0.0

    def update(self, done: int, note: str = "", size: int | None = None) -> None:
        """`done` images are done. note: more to show, such as how many were left out. size: bytes so far, which adds
        MB/s.
        """
        if not self._enabled:
            return
        now = time.monotonic()
        if self._start is None:
            self._start, self._shown = (now, done, size or 0), now
            if self._console.is_terminal:
                self._open_bar(done)
        if now - self._shown < (LINE_SECONDS if self._bar is None else BAR_SECONDS) and (
            done < self._total or self._bar is None
        ):
            return
        self._shown = now
        then, begun, begun_size = self._start
        seconds = max(now - then, 1e-3)
        rate = (done - begun) / seconds
        texts = [f"{rate:,.0f} images/s" if rate >= 10 else f"{rate:.1f} images/s"]
        texts += [f"{(size - begun_size) / seconds / 1e6:,.0f} MB/s"] if size is not None else []
        texts += [note] if note else []
        if self._bar is not None:
            self._bar.update(self._task, completed=done, rate="  ".join(texts))
            self._bar.refresh()
            return
        texts += [f"{duration((self._total - done) / rate)} left"] if rate else []
        line = f"{self._label}: {done:,} of {self._total:,}, {', '.join(texts)}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _open_bar(self, done: int) -> None:
        columns = (
            TextColumn(self._label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, auto_refresh=False)
        self._bar.start()
        self._task = self._bar.add_task("", total=self._total, completed=done, rate="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Such as '40 s', '12 min' or '3 h 05 min'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
