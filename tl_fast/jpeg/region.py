"""Regions of JPEGs decoded by `tl_fast.jpeg.region_loops`, with the working memory that it needs."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from tl_fast.jpeg.markers import OK
from tl_fast.jpeg.memory import PixelMemory, ScanMemory, at_least
from tl_fast.jpeg.region_loops import PLANE_ROOM, STREAM_ROOM, decode_pixels, decode_region, decode_regions
from tl_fast.maths.ycbcr import ROW_ROOM, Pixels

_compiling = threading.Lock()


def _room(rows: Any, columns: Any) -> tuple[Any, Any]:
    """Bytes of working memory for planes and for rows that a region of `rows` x `columns` pixels needs; integers, or
    arrays of them."""
    return 3 * (rows + PLANE_ROOM) * (columns + PLANE_ROOM), 3 * (2 * columns + ROW_ROOM)


class RegionQueue:
    """Regions of JPEGs to decode, by any number of threads: each takes the next one that no thread has taken.

    addresses: uint64 [B], of the JPEGs' first bytes, which stay as they are while the queue is in use.
    sizes: int64 [B], of the JPEGs in bytes.
    starts, stops: int64 [B, 2], first pixel of each region and the one behind the last, (row, column).

    offsets: int64 [B], where each region's pixels begin in `out`; num_bytes: of all pixels.
    """

    def __init__(self, addresses: np.ndarray, sizes: np.ndarray, starts: np.ndarray, stops: np.ndarray):
        self._jpegs = np.stack([addresses, sizes], axis=1).astype(np.uint64)
        self._regions = np.concatenate([starts, stops], axis=1).astype(np.int64)
        rows, columns = (self._regions[:, 2:] - self._regions[:, :2]).T
        ends = np.cumsum(3 * rows * columns)
        self.offsets, self.num_bytes = ends - 3 * rows * columns, int(ends[-1]) if len(ends) else 0
        self._stream_room = int(sizes.max(initial=0)) + STREAM_ROOM
        self._plane_room, self._row_room = (int(room.max(initial=0)) for room in _room(rows, columns))
        self._taken = np.zeros(1, np.int64)


class RegionDecoder(threading.local):
    """Decodes regions of JPEGs: RGB, as libjpeg makes them, without the GIL. Each thread that uses it gets working
    memory of its own, and keeps the Huffman tables of its last file.

    Left to other decoders is a file that is damaged before the region's end, or that is not a baseline JPEG of YCbCr or
    grey.
    """

    def __init__(self) -> None:
        self._scan, self._pixels, self._out = ScanMemory.create(), PixelMemory.create(), np.zeros(1 << 20, np.uint8)

    def decode(
        self, jpeg: np.ndarray, start: np.ndarray, stop: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Pixels `start` to `stop` (row, column; exclusive) of a JPEG, uint8 [h, w, 3]; None for a file that is left to
        other decoders.

        jpeg: uint8 [n], not writeable (which is another type to numba); out: uint8 [h * w * 3] to write to; None:
        memory that this thread's next call writes again.
        """
        top, left, bottom, right = int(start[0]), int(start[1]), int(stop[0]), int(stop[1])
        rows, columns = bottom - top, right - left
        size = rows * columns * 3
        if out is None:
            self._out = out = at_least(self._out, size)
        self._scan = self._scan.with_stream(jpeg.size + STREAM_ROOM)
        self._pixels = self._pixels.with_room(*_room(rows, columns))
        status = decode_region(jpeg, (top, left, bottom, right), self._scan, self._pixels, out)
        return out[:size].reshape(rows, columns, 3) if status == OK else None

    def samples(self, jpeg: np.ndarray, start: np.ndarray, stop: np.ndarray) -> Pixels | None:
        """As `decode`, but the samples as they are decoded, not yet RGB, in memory that this thread's next call writes
        again."""
        top, left, bottom, right = int(start[0]), int(start[1]), int(stop[0]), int(stop[1])
        self._scan = self._scan.with_stream(jpeg.size + STREAM_ROOM)
        self._pixels = self._pixels.with_room(*_room(bottom - top, right - left))
        status, pixels = decode_pixels(jpeg, (top, left, bottom, right), self._scan, self._pixels)
        return pixels if status == OK else None

    def decode_queued(self, queue: RegionQueue, out: np.ndarray) -> int | None:
        """Decode regions of a queue until it is empty -> None, or until one is left to other decoders -> its number.

        out: uint8 [queue.num_bytes], which gets the pixels. After a number the caller sees to that region, and calls
        again for the others.
        """
        self._scan = self._scan.with_stream(queue._stream_room)
        self._pixels = self._pixels.with_room(queue._plane_room, queue._row_room)
        left = decode_regions(queue._taken, queue._jpegs, queue._regions, queue.offsets, self._scan, self._pixels, out)
        return None if left < 0 else left

    def compile(self) -> None:
        """Compile `decode_queued` for all threads. To be called before several threads decode, for numba does not bear
        two threads that compile one function."""
        nothing = np.zeros(0, np.int64)
        with _compiling:
            self.decode_queued(RegionQueue(nothing, nothing, np.zeros((0, 2)), np.zeros((0, 2))), np.zeros(0, np.uint8))
