"""What a training step measures, kept on the device and read on the host one step late; and the guard against
non-finite steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tl_fast.pipeline.batch import Batch
from tl_fast.system.ranks import Ranks
from tl_fast.training.nonfinite import NonFinite
from tl_fast.training.run_config import RunConfig
from tl_fast.training.runlog import RunLog

# One step's values on the device, float32 [5]: loss, gradient norm, the loss's two terms, and 1 where it was not finite
# on some rank.
_LOSS, _NORM, _FIRST_TERM, _SECOND_TERM, _BAD = range(5)


@dataclass(frozen=True)
class _Step:
    """What the host knows of a step. step: from 0 over the run; sample_ids: of this rank, one tensor a batch."""

    step: int
    epoch: int
    lr: float
    sample_ids: list[Tensor]


@dataclass(frozen=True)
class _Window:
    """A window that has ended. values: float64, on their way to the host: means over good steps and ranks of loss,
    norm and the loss's two terms, then five values a step; arrived: when they are there, None: at once."""

    steps: list[_Step]
    timing: dict[str, float]
    values: Tensor
    arrived: torch.cuda.Event | None


class Meter:
    """Collects loss and gradient norm over windows of `log_every` steps without making the host wait for the device. A
    row calls the two terms of the loss `loss_terms`.

    with meter.epoch(loader):
        for every step:
            for each of its batches: `fetch`, forward and backward, `add_loss`
            `add_step`, the optimiser's step, `end_step`
            before saving: with meter.saving(): ...

    A call out of this order raises RuntimeError. A window also ends with its epoch. Its row is written by the
    `end_step` after its last one, by when its values have long arrived, or at the epoch's end or before saving, which
    wait for the device. On the CPU, where looking costs nothing, `add_step` itself hands a step that is not finite to
    `guard`, before the weights change; on GPUs this happens where the row is written. All ranks see the same steps as
    bad.
    """

    def __init__(
        self, ranks: Ranks, guard: NonFinite, log: RunLog, config: RunConfig, loss_terms: tuple[str, str]
    ) -> None:
        self.ranks, self.guard, self.log, self.config, self.loss_terms = ranks, guard, log, config, loss_terms
        self.row: dict[str, float] = {}  # of the last window reported
        self._at_once = ranks.device.type == "cpu"
        self._allowed: tuple[str, ...] = ("epoch",)  # calls that may come next
        self._batches: Iterator[Batch] = iter(())  # of the epoch under way
        # Of the step under way.
        self._loss = self._terms = torch.zeros((), device=ranks.device)
        self._sample_ids: list[Tensor] = []
        # Of the window under way.
        self._values: list[Tensor] = []  # one [5] a step
        self._steps: list[_Step] = []
        self._waited, self._clock = 0.0, time.perf_counter()
        self._ended: _Window | None = None  # and not reported yet
        self._judged = 0  # steps before this one have been handed to the guard, those that were not finite
        self._speeds: list[tuple[int, float, float]] = []  # of every window: images, seconds, seconds waited for data

    @contextlib.contextmanager
    def epoch(self, loader: Iterable[Batch]) -> Iterator[None]:
        """An epoch, or what is left of it, over the batches of `loader`. Its last window is reported at the end, so
        that poisoned weights get no further than there; not when an exception leaves the epoch."""
        self._in_order("epoch", "fetch", "the epoch's end")
        self._waited, self._clock = 0.0, time.perf_counter()  # validation and saving are not training time
        with contextlib.closing(iter(loader)) as self._batches:
            yield
        self._in_order("the epoch's end", "epoch")
        self._end_window()
        self._report()

    def fetch(self) -> Batch:
        """The next batch, its waiting time counted. Raises RuntimeError if the loader ends before the epoch does."""
        self._in_order("fetch", "add_loss")
        start = time.perf_counter()
        batch = next(self._batches, None)
        if batch is None:
            raise RuntimeError("the loader ended before the epoch: its length and its batches disagree")
        self._waited += time.perf_counter() - start
        self._sample_ids.append(batch.sample_ids.clone())  # a view of all that was uploaded for its batch, on a GPU
        return batch

    def add_loss(self, loss: Tensor, terms: Tensor) -> None:
        """Count one batch's detached loss, a scalar, and its two terms [2]."""
        self._in_order("add_loss", "fetch" if len(self._sample_ids) < self.config.accumulate else "add_step")
        self._loss = self._loss + loss / self.config.accumulate
        self._terms = self._terms + terms / self.config.accumulate

    def add_step(self, step: int, epoch: int, lr: float, norm: Tensor) -> Tensor | None:
        """Count one step's gradient norm; called before the optimiser changes the weights. `step` counts from 0 over
        the run.

        Where steps may be skipped: whether this one must be, a float32 scalar on the device, 0 or 1, the same on all
        ranks. Else None.
        """
        self._in_order("add_step", "end_step")
        bad = ~torch.isfinite(self._loss + norm)
        if self._at_once or self.guard.skips:
            bad = self.ranks.any(bad)
        self._values.append(torch.stack((self._loss, norm, *self._terms, bad.float())).float())
        self._steps.append(_Step(step, epoch, lr, self._sample_ids))
        self._loss = self._terms = torch.zeros((), device=self.ranks.device)
        self._sample_ids = []
        if self._at_once and bad:
            self._judge(self._steps[-1], self._values[-1].tolist())
        return bad.float() if self.guard.skips else None

    def end_step(self) -> None:
        """Report the window that ended with the step before, if one did; end the one under way where this step is its
        last."""
        self._in_order("end_step", "fetch", "saving", "the epoch's end")
        self._report()
        if (self._steps[-1].step + 1) % self.config.log_every == 0:
            self._end_window()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Around saving weights within an epoch: not training time. First waits for the device, writes the row that
        would be written later, which a run that continues from those weights would miss, and hands steps that were
        not finite to the guard."""
        self._in_order("saving", "fetch", "the epoch's end")
        start = time.perf_counter()
        self._report()
        if not self._at_once and self._steps:
            self._judge_all(self._steps, self._combined().flatten().tolist())
        yield
        self._clock += time.perf_counter() - start

    def speed(self) -> tuple[float, float]:
        """Images/s over all ranks, and the share of the time spent waiting for data. The first window (compilation,
        start-up) is left out when there are others; (0, 0) before any."""
        speeds = self._speeds[1:] or self._speeds or [(0, 1.0, 0.0)]
        images, seconds, waited = (sum(column) for column in zip(*speeds, strict=True))
        return images / seconds, waited / seconds

    def _in_order(self, call: str, *following: str) -> None:
        if call not in self._allowed:
            raise RuntimeError(f"Meter: {call} is out of order, where {' or '.join(self._allowed)} may come")
        self._allowed = following

    def _end_window(self) -> None:
        """Start moving the window's values to the host. Nothing if it has no steps."""
        if not self._steps:
            return
        now = time.perf_counter()
        seconds, images = now - self._clock, len(self._steps) * self.config.batch_size
        self._speeds.append((images, seconds, self._waited))
        timing = {"lr": self._steps[-1].lr, "images_per_second": images / seconds, "data_wait": self._waited / seconds}
        window = self._combined()
        good = window[:, _BAD] == 0
        means = torch.where(good[:, None], window[:, :_BAD], 0).sum(0, dtype=torch.float64) / good.sum()
        values = torch.cat((self.ranks.sum(means) / self.ranks.world_size, window.double().flatten()))
        arrived = None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            values, arrived = host, torch.cuda.Event()
            arrived.record()
        self._ended = _Window(self._steps, timing, values, arrived)
        self._values, self._steps = [], []
        self._waited, self._clock = 0.0, now

    def _report(self) -> None:
        """Write the row of the window that has ended, if any; hand steps that were not finite to the guard."""
        ended, self._ended = self._ended, None
        if ended is None:
            return
        if ended.arrived is not None:
            ended.arrived.synchronize()
        loss, norm, first_term, second_term, *window = ended.values.tolist()
        if not self._at_once:
            self._judge_all(ended.steps, window)
        bad = int(sum(window[_BAD::5]))
        terms = dict(zip(self.loss_terms, (first_term, second_term), strict=True))
        means = {"loss": loss, **terms, "grad_norm": norm}
        skipped = {"skipped": bad} if self.guard.skips else {}
        timing, last = ended.timing, ended.steps[-1]
        self.row = (means if bad < len(ended.steps) else {}) | timing | skipped
        note = (
            f"loss {loss:.4f}, {timing['images_per_second']:.0f} images/s, data wait {timing['data_wait']:.0%}, lr"
            f" {timing['lr']:.2e}"
        )
        self.log.row("train", last.step + 1, last.epoch, self.row, note)

    def _combined(self) -> Tensor:
        """The window's values [S, 5], with the same bad steps on all ranks."""
        window = torch.stack(self._values)
        if not (self._at_once or self.guard.skips):  # else add_step has asked the others already
            window[:, _BAD] = self.ranks.any(window[:, _BAD])
        return window

    def _judge_all(self, steps: list[_Step], window: list[float]) -> None:
        for i, step in enumerate(steps):
            values = window[5 * i : 5 * i + 5]
            if values[_BAD] and step.step >= self._judged:
                self._judge(step, values)

    def _judge(self, step: _Step, values: list[float]) -> None:
        self._judged = step.step + 1
        sample_ids = torch.cat(step.sample_ids).tolist()
        self.guard.report(step.step, step.epoch, step.lr, values[_LOSS], values[_NORM], sample_ids)
