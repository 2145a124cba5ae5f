"""Appending to a large file: a thread writes aligned blocks, past the page cache where the file system can.

Through the page cache every byte is copied into fresh pages and waits for the sync at the end. Measured, that took more
CPU time a sample than checking the sample's image. A file of this size would not stay in the cache anyway.
"""

from __future__ import annotations

import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

ALIGNMENT = 4096  # bytes, of memory, offset and length; enough for every block device
BLOCK = 4 << 20  # bytes


def write_all(handle: int, data: bytes | memoryview, offset: int) -> None:
    """`os.pwrite` until everything is written: a disk that fills up takes only a part at first. Raises OSError."""
    rest = memoryview(data).cast("B")
    while rest:
        written = os.pwrite(handle, rest, offset)
        rest, offset = rest[written:], offset + written


class BlockWriter:
    """Appends to the open file `handle`, which lies at `path`, from `begin(offset)` on. Bytes are in the file after
    `flush`, not before.

    Once a write has failed, every later call raises its OSError: nothing behind a gap counts as written.
    """

    def __init__(self, handle: int, path: Path) -> None:
        self.handle = handle
        try:
            self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        except (OSError, AttributeError):  # tmpfs and some network file systems; systems without the flag
            self._direct = -1
        self._buffers = [mmap.mmap(-1, BLOCK) for _ in range(2)]
        self._views = [memoryview(buffer) for buffer in self._buffers]
        self._pending: list[Future | None] = [None, None]
        self._pool = ThreadPoolExecutor(1)
        self._failure: OSError | None = None
        self.begin(0)

    def begin(self, offset: int) -> None:
        """Go on at `offset`; what the file has before it stays."""
        # One buffer is filled, for the block at `_start`, while the other is being written.
        self._current, self._start, self._filled = 0, offset - offset % ALIGNMENT, offset % ALIGNMENT
        before = os.pread(self.handle, self._filled, self._start)
        self._views[0][: self._filled] = before + bytes(self._filled - len(before))

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which may be reused at once. Raises the OSError of an earlier block."""
        rest = memoryview(data).cast("B")
        while rest:
            taken = min(len(rest), BLOCK - self._filled)
            self._views[self._current][self._filled : self._filled + taken] = rest[:taken]
            rest, self._filled = rest[taken:], self._filled + taken
            if self._filled == BLOCK:
                self._pending[self._current] = self._pool.submit(
                    self._write_block, self._views[self._current], self._start
                )
                self._current, self._start, self._filled = 1 - self._current, self._start + BLOCK, 0
                self._wait(self._current)

    def _write_block(self, block: memoryview, start: int) -> None:
        written = 0
        if self._direct >= 0:
            try:
                written = os.pwrite(self._direct, block, start)
            except OSError as error:
                if error.errno != errno.EINVAL:  # the file system takes the flag, but not the write
                    raise
        if written < len(block):
            write_all(self.handle, block[written:], start + written)

    def _wait(self, buffer: int) -> None:
        """Until the block in that buffer is written."""
        pending, self._pending[buffer] = self._pending[buffer], None
        try:
            if pending is not None:
                pending.result()
        except OSError as error:
            self._failure = self._failure or error
        if self._failure is not None:
            raise self._failure

    def flush(self) -> None:
        """Everything appended is in the file now (not yet on the disk: that takes a sync). Raises OSError."""
        for buffer in (1 - self._current, self._current):
            self._wait(buffer)
        try:
            write_all(self.handle, self._views[self._current][: self._filled], self._start)
        except OSError as error:
            self._failure = error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._direct >= 0:
            os.close(self._direct)
