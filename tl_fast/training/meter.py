"""What a training step measures, kept on the device and read on the host one step late; and the guard against
non-finite steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from tl_fast.pipeline.batch import Batch
from tl_fast.system.ranks import Ranks
from tl_fast.training.nonfinite import NonFinite
from tl_fast.training.runlog import RunLog

# One step's values on the device, float32 [5]: loss, gradient norm, class term, token term, and 1 where it was not
# finite on some rank.
_LOSS, _NORM, _CLASS, _TOKENS, _BAD = range(5)


class Meter:
    """Collects loss and gradient norm over a window of steps without making the host wait for the device.

    Order of calls: `start` once an epoch; in each step `fetch` and `add_loss` per batch, `add_step`, then `report`;
    `close` in the steps that end a window. `report` writes the row of a window closed in an earlier step, by when its
    values have long arrived. Before weights are
    saved: `close` and `report`, or, within a window, `check`. On the CPU, where looking costs nothing, `add_step`
    itself hands a step that is not finite to `guard`, before the weights change; on GPUs `report` and `check` do. All
    ranks see the same steps as bad.
    """

    def __init__(self, ranks: Ranks, guard: NonFinite, batch_size: int, accumulate: int = 1) -> None:
        self.ranks, self.guard, self.batch_size, self.accumulate = ranks, guard, batch_size, accumulate
        self.row: dict[str, float] = {}  # of the last window reported
        self._at_once = ranks.device.type == "cpu"
        self._window: list[Tensor] = []  # one [5] a step
        self._seen: list[tuple[int, int, float, list[Tensor]]] = []  # step, epoch, lr and ids of each of them
        self._loss = self._terms = torch.zeros((), device=ranks.device)  # of the step under way
        self._ids: list[Tensor] = []
        self._judged = 0  # steps before this one have been handed to the guard, those that were not finite
        self._pending: tuple[Tensor, torch.cuda.Event | None, dict[str, float], list] | None = None
        self._waited, self._clock = 0.0, time.perf_counter()
        self._windows: list[tuple[int, float, float]] = []  # images, seconds, seconds waited for data

    def start(self) -> None:
        """Set the clock: what went before (validation, saving) is not training time."""
        self._waited, self._clock = 0.0, time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not training time."""
        start = time.perf_counter()
        yield
        self._clock += time.perf_counter() - start

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, its waiting time counted. Raises RuntimeError if the loader ends before the epoch does."""
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise RuntimeError("the loader ended before the epoch: its length and its batches disagree")
        self._waited += time.perf_counter() - start
        self._ids.append(batch.sample_ids.clone())  # a view of all that was uploaded for its batch, on a GPU
        return batch

    def add_loss(self, loss: Tensor, terms: Tensor) -> None:
        """Count one batch's detached loss, a scalar, and its class and token terms [2]."""
        self._loss = self._loss + loss / self.accumulate
        self._terms = self._terms + terms / self.accumulate

    def add_step(self, step: int, epoch: int, lr: float, norm: Tensor) -> Tensor | None:
        """Count one step's gradient norm; called before the optimiser changes the weights. `step` counts from 0 over
        the run.

        Where steps may be skipped: whether this one must be, a float32 scalar on the device, 0 or 1, the same on all
        ranks. Else None.
        """
        bad = ~torch.isfinite(self._loss + norm)
        if self._at_once or self.guard.skips:
            bad = self.ranks.any(bad)
        self._window.append(torch.stack((self._loss, norm, *self._terms, bad.float())).float())
        self._seen.append((step, epoch, lr, self._ids))
        self._loss = self._terms = torch.zeros((), device=self.ranks.device)
        self._ids = []
        if self._at_once and bad:
            self._judge(self._seen[-1], self._window[-1].tolist())
        return bad.float() if self.guard.skips else None

    def close(self, step: int) -> None:
        """End the window after `step` steps of the run: start moving its values to the host. Nothing if it has no
        steps."""
        if not self._window:
            return
        now = time.perf_counter()
        seconds, images = now - self._clock, len(self._window) * self.batch_size
        self._windows.append((images, seconds, self._waited))
        timing = {"lr": self._seen[-1][2], "images_per_second": images / seconds, "data_wait": self._waited / seconds}
        window = self._combined()
        good = window[:, _BAD] == 0
        sums = torch.where(good[:, None], window[:, :_BAD], 0).sum(0, dtype=torch.float64) / good.sum()
        values, event = torch.cat((self.ranks.sum(sums) / self.ranks.world_size, window.double().flatten())), None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            values, event = host, torch.cuda.Event()
            event.record()
        self._pending = values, event, timing, self._seen
        self._window, self._seen = [], []
        self._waited, self._clock = 0.0, now

    def report(self, log: RunLog) -> None:
        """Write the row of the window closed before, if any; hand steps that were not finite to the guard."""
        if self._pending is None:
            return
        (values, event, timing, seen), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        loss, norm, of_class, of_tokens, *window = values.tolist()
        if not self._at_once:
            self._judge_all(seen, window)
        bad = int(sum(window[_BAD::5]))
        means = {"loss": loss, "class_loss": of_class, "token_loss": of_tokens, "grad_norm": norm}
        self.row = (means if bad < len(seen) else {}) | timing | ({"skipped": bad} if self.guard.skips else {})
        step, epoch, *_ = seen[-1]
        log.row(
            "train",
            step + 1,
            epoch,
            self.row,
            f"loss {loss:.4f}, {timing['images_per_second']:.0f} images/s, data wait {timing['data_wait']:.0%}, lr"
            f" {timing['lr']:.2e}",
        )

    def check(self, log: RunLog) -> None:
        """Before weights are saved within a window: wait for the device, write what `report` would write later, which a
        run that continues from those weights would miss, and hand steps that were not finite to the guard."""
        self.report(log)
        if not self._at_once and self._window:
            self._judge_all(self._seen, self._combined().flatten().tolist())

    def speed(self) -> tuple[float, float]:
        """Images/s over all ranks, and the share of the time spent waiting for data. The first window (compilation,
        start-up) is left out when there are others; (0, 0) before any."""
        windows = self._windows[1:] or self._windows
        images, seconds, waited = (sum(column) for column in zip(*windows, strict=False)) if windows else (0, 1, 0)
        return images / seconds, waited / seconds

    def _combined(self) -> Tensor:
        """The window's values [S, 5], with the same bad steps on all ranks."""
        window = torch.stack(self._window)
        if not (self._at_once or self.guard.skips):  # else add_step has asked the others already
            window[:, _BAD] = self.ranks.any(window[:, _BAD])
        return window

    def _judge_all(self, seen: list, window: list[float]) -> None:
        for i, step in enumerate(seen):
            values = window[5 * i : 5 * i + 5]
            if values[_BAD] and step[0] >= self._judged:
                self._judge(step, values)

    def _judge(self, seen: tuple[int, int, float, list[Tensor]], values: list[float]) -> None:
        step, epoch, lr, ids = seen
        self._judged = step + 1
        self.guard.report(step, epoch, lr, values[_LOSS], values[_NORM], torch.cat(ids).tolist())
