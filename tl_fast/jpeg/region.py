"""Regions of JPEGs decoded by `tl_fast.jpeg.region_loops`, with the working memory that it needs."""

from __future__ import annotations

import threading

import numpy as np

from tl_fast.jpeg import blocks
from tl_fast.jpeg import huffman as scans
from tl_fast.jpeg import markers as marks
from tl_fast.jpeg import region_loops as kernels


class RegionDecoder(threading.local):
    """Each thread that uses it gets working memory of its own, and keeps the Huffman tables of its last file."""

    def __init__(self) -> None:
        self._record, self._head = np.zeros(marks.MARKERS, np.int64), np.zeros(marks.HEAD_BYTES, np.uint8)
        keys = 2 * scans.SLOTS * scans.KEY
        self._keys, self._value_keys = np.zeros(keys, np.uint8), np.zeros(keys, np.uint8)
        self._lookup, self._layout = np.zeros(scans.LOOKUP, np.int16), np.zeros(scans.BLOCKS, np.uint64)
        self._values = np.zeros((2 * scans.SLOTS + 1) * blocks.VALUES, np.uint64)
        self._factors, self._coefficients = np.zeros(4 * 64, np.int16), np.zeros(scans.BLOCKS * blocks.BLOCK, np.int16)
        self._stream, self._planes, self._room = (
            np.zeros(1 << 18, np.uint8),
            np.zeros(1 << 20, np.uint8),
            np.zeros(1 << 13, np.uint8),
        )
        self._pixels = np.zeros(1 << 20, np.uint8)

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
        if out is None:
            self._pixels = out = _at_least(self._pixels, rows * columns * 3)
        self._stream = _at_least(self._stream, jpeg.size + kernels.STREAM_ROOM)
        self._planes = _at_least(self._planes, 3 * (rows + kernels.PLANE_ROOM) * (columns + kernels.PLANE_ROOM))
        self._room = _at_least(self._room, 3 * (2 * columns + kernels.ROOM))
        status = kernels.decode_region(
            jpeg,
            (top, left, bottom, right),
            self._record,
            self._head,
            self._stream,
            self._keys,
            self._lookup,
            self._layout,
            self._value_keys,
            self._values,
            self._factors,
            blocks.ZIGZAG,
            self._coefficients,
            self._planes,
            self._room,
            out,
        )
        return out[: rows * columns * 3].reshape(rows, columns, 3) if status == marks.OK else None


def _at_least(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or a larger one where it has fewer elements."""
    return array if array.size >= size else np.zeros(size + size // 4, array.dtype)
