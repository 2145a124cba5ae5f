"""The batches of a stock ffcv loader."""

from __future__ import annotations

import threading

import numpy as np


def collect(make_loader, seconds: float = 120) -> list[tuple[np.ndarray, ...]]:
    """All batches of a stock ffcv loader; its thread dies silently on an error and leaves the caller waiting, so wait
    with a limit."""
    batches: list[tuple[np.ndarray, ...]] = []
    ended = threading.Event()

    def run() -> None:
        for batch in make_loader():
            batches.append(tuple(part.numpy().copy() for part in batch))
        ended.set()

    threading.Thread(target=run, daemon=True).start()
    assert ended.wait(seconds), "stock ffcv.Loader did not finish"
    return batches
