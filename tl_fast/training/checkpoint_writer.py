"""Writes a run's checkpoints while the run goes on."""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from tl_fast.training import checkpoint
from tl_fast.training.checkpoint import Snapshot


class CheckpointWriter:
    """Saves checkpoints in `folder` by a thread, each from a copy in host memory, one at a time; then deletes old ones
    but the last `keep` and the best.

    A write that fails raises its OSError from the next call of any method, once. Leaving the `with` block waits for the
    write under way. If an exception leaves the block, a write that fails then is a warning.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, "tl_fast-checkpoint")
        self._under_way: Future | None = None

    def save(self, *, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
        """Wait for the write before, copy these as they are now (`checkpoint.snapshot`), and begin to write."""
        self.wait()
        snapshot = checkpoint.snapshot(model=model, ema=ema, optimizer=optimizer, meta=meta)
        self._under_way = self._thread.submit(self._write, snapshot)

    def check(self) -> None:
        """Raise the error of a write that has failed, without waiting for one under way."""
        if self._under_way is not None and self._under_way.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything saved is on disk."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def _write(self, snapshot: Snapshot) -> None:
        checkpoint.prune(checkpoint.save(self.folder, snapshot), self.keep)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._thread.shutdown()  # waits
        try:
            self.wait()
        except OSError as failed:
            if error is None:
                raise
            warnings.warn(str(failed), stacklevel=2)
