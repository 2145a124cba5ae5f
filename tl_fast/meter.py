"""What a training step measures, summed on the device and read on the host one step late; and the guard against non-finite steps."""
from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from tl_fast.pipeline import Batch
from tl_fast.ranks import Ranks
from tl_fast.runlog import RunLog


class NonFiniteError(RuntimeError):
    """Loss or gradient norm became infinite or NaN; names epoch, step, lr and samples. No weights of that step were saved."""


class Meter:
    """Sums loss and gradient norm over a window of steps without making the host wait for the device.

    Order of calls: `start` once an epoch; in each step `fetch` and `add_loss` per batch, `add_step`, then `report`; `set_parts` and `close`
    in the steps that end a window. `report` writes the row of a window closed in an earlier step, by when its values have long arrived.
    Before weights are saved: `close` and `report`. On the CPU, where looking costs nothing, `add_step` itself raises NonFiniteError, before
    the weights change.
    """

    def __init__(self, ranks: Ranks, batch_size: int, accumulate: int = 1) -> None:
        self.ranks, self.batch_size, self.accumulate = ranks, batch_size, accumulate
        self.row: dict[str, float] = {}  # of the last window reported
        self._sums = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # loss, gradient norm
        self._parts = torch.zeros(2, dtype=torch.float64, device=ranks.device)  # class and token loss of the window's last batch
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=ranks.device)  # step, -1: none
        self._loss = torch.zeros((), device=ranks.device)  # of the step under way
        self._seen: dict[int, tuple[int, float, list[Tensor]]] = {}  # step -> epoch, lr, ids of the batches not yet known to be finite
        self._ids: list[Tensor] = []
        self._pending: tuple[Tensor, torch.cuda.Event | None, dict[str, float], int, int] | None = None
        self._steps, self._waited, self._clock = 0, 0.0, time.perf_counter()
        self._windows: list[tuple[int, float, float]] = []  # images, seconds, seconds waited for data

    def start(self) -> None:
        """Set the clock: what went before (validation, saving) is not training time."""
        self._steps, self._waited, self._clock = 0, 0.0, time.perf_counter()

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """The next batch, its waiting time counted. Raises RuntimeError if the loader ends before the epoch does."""
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            raise RuntimeError("the loader ended before the epoch: its length and its batches disagree")
        self._waited += time.perf_counter() - start
        self._ids.append(batch.sample_ids)
        return batch

    def add_loss(self, loss: Tensor) -> None:
        """Count one batch's detached loss, a scalar."""
        self._loss += loss / self.accumulate

    def set_parts(self, parts: Tensor) -> None:
        """The class and token loss [2] of one batch, to stand in the row of the window that it ends."""
        self._parts = parts.double()

    def add_step(self, step: int, epoch: int, lr: float, norm: Tensor) -> None:
        """Count one step's gradient norm; called before the optimiser changes the weights. `step` counts from 0 over the run."""
        self._sums += torch.stack((self._loss, norm))
        bad = ~torch.isfinite(self._loss + norm)
        self._first_bad = torch.where((self._first_bad < 0) & bad, step, self._first_bad)
        self._seen[step] = epoch, lr, self._ids
        self._ids = []
        self._loss = torch.zeros_like(self._loss)
        self._steps += 1
        if self.ranks.device.type == "cpu":
            self._guard(int(self._first_bad))

    def close(self, step: int) -> None:
        """End the window after `step` steps of the run: start moving its sums (mean over ranks) to the host. Nothing if it has no steps."""
        if not self._steps:
            return
        now = time.perf_counter()
        seconds, images = now - self._clock, self._steps * self.batch_size
        self._windows.append((images, seconds, self._waited))
        epoch, lr, _ = self._seen[step - 1]
        timing = {"lr": lr, "images_per_second": images / seconds, "data_wait": self._waited / seconds}
        means = self.ranks.sum(torch.cat((self._sums / self._steps, self._parts)) / self.ranks.world_size)
        values, event = torch.cat((means, self._first_bad.double()[None])), None
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            host.copy_(values, non_blocking=True)
            values, event = host, torch.cuda.Event()
            event.record()
        self._pending = values, event, timing, step, epoch
        self._sums = torch.zeros_like(self._sums)
        self._steps, self._waited, self._clock = 0, 0.0, now

    def report(self, log: RunLog) -> None:
        """Write the row of the window closed before, if any. Raises NonFiniteError if one of its steps was not finite."""
        if self._pending is None:
            return
        (values, event, timing, step, epoch), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        loss, norm, of_class, of_tokens, first_bad = values.tolist()
        self._guard(int(first_bad))
        self._seen = {known: seen for known, seen in self._seen.items() if known >= step}
        self.row = {"loss": loss, "class_loss": of_class, "token_loss": of_tokens, "grad_norm": norm, **timing}
        log.row("train", step, epoch, self.row,
                f"loss {loss:.4f}, {timing['images_per_second']:.0f} images/s, data wait {timing['data_wait']:.0%}, lr {timing['lr']:.2e}")

    def speed(self) -> tuple[float, float]:
        """Images/s over all ranks, and the share of the time spent waiting for data. The first window (compilation, start-up) is left out
        when there are others; (0, 0) before any."""
        windows = self._windows[1:] or self._windows
        images, seconds, waited = (sum(column) for column in zip(*windows)) if windows else (0, 1, 0)
        return images / seconds, waited / seconds

    def _guard(self, first_bad: int) -> None:
        if first_bad < 0:
            return
        epoch, lr, ids = self._seen[first_bad]
        raise NonFiniteError(
            f"loss or gradient norm is not finite at step {first_bad} (epoch {epoch}, lr {lr:.3e}, rank {self.ranks.rank}); sample ids "
            f"{torch.cat(ids).tolist()}. Weights of this step were not saved: lower lr, set clip_grad, or look at these samples, then "
            "--resume auto"
        )
