"""Regions of JPEGs decoded by `tl_fast.jpeg.region_loops`, with the working memory that it needs."""

from __future__ import annotations

import threading

import numpy as np

from tl_fast.jpeg.markers import OK
from tl_fast.jpeg.memory import PixelMemory, ScanMemory, at_least
from tl_fast.jpeg.region_loops import PLANE_ROOM, ROW_ROOM, STREAM_ROOM, decode_region


class RegionDecoder(threading.local):
    """Decodes regions of JPEGs. Each thread that uses it gets working memory of its own, and keeps the Huffman tables
    of its last file."""

    def __init__(self) -> None:
        self._scan, self._pixels, self._out = ScanMemory.create(), PixelMemory.create(), np.zeros(1 << 20, np.uint8)

    def decode(
        self, jpeg: np.ndarray, start: np.ndarray, stop: np.ndarray, out: np.ndarray | None = None
    ) -> np.ndarray | None:
        """Pixels `start` to `stop` (row, column; exclusive) of a JPEG: RGB, uint8 [h, w, 3], as libjpeg makes them,
        without the GIL.

        jpeg: uint8 [n], not writeable (which is another type to numba); out: uint8 [h * w * 3] to write to; None:
        memory that this thread's next call writes again. Returns None for a file that is damaged before the region's
        end, or that is not a baseline JPEG of YCbCr or grey.
        """
        top, left, bottom, right = int(start[0]), int(start[1]), int(stop[0]), int(stop[1])
        rows, columns = bottom - top, right - left
        size = rows * columns * 3
        if out is None:
            self._out = out = at_least(self._out, size)
        self._scan = self._scan.with_stream(jpeg.size + STREAM_ROOM)
        planes = 3 * (rows + PLANE_ROOM) * (columns + PLANE_ROOM)
        self._pixels = self._pixels.with_room(planes, 3 * (2 * columns + ROW_ROOM))
        status = decode_region(jpeg, (top, left, bottom, right), self._scan, self._pixels, out)
        return out[:size].reshape(rows, columns, 3) if status == OK else None
