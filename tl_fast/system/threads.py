"""Maps a function over items on threads, with results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor


def ordered_map(workers: int, function: Callable, items: Iterable, ahead: int = 4) -> Iterator:
    """`map(function, items)` on threads, in order, with at most `ahead * workers` items begun and not yet consumed.

    Threads suffice: file reads, libjpeg, Pillow and zlib all release the GIL. The first exception, in the order of the
    items, is raised and the rest cancelled.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
