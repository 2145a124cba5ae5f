"""Regions of JPEGs decoded by `tl_fast.jpeg.region_loops`, with the working memory that it needs, and regions of planes
copied."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from tl_fast.jpeg.markers import OK
from tl_fast.jpeg.mcus import STREAM_ROOM
from tl_fast.jpeg.memory import PixelMemory, ScanMemory, at_least
from tl_fast.jpeg.plane_regions import plane_bytes
from tl_fast.jpeg.region_loops import PLANE_ROOM, decode_pixels, decode_region, decode_regions
from tl_fast.maths.ycbcr import ROW_ROOM, Pixels

_compiling = threading.Lock()


def _room(rows: Any, columns: Any) -> tuple[Any, Any]:
    """Bytes of working memory for planes and for rows that a region of `rows` x `columns` pixels needs; integers, or
    arrays of them."""
    return 3 * (rows + PLANE_ROOM) * (columns + PLANE_ROOM), 3 * (2 * columns + ROW_ROOM)


class RegionQueue:
    """Regions of images to decode or copy, by any number of threads: each takes the next one that no thread has taken.

    addresses: uint64 [B], of the images' first bytes, which stay as they are while the queue is in use.
    sizes: int64 [B], of the images in bytes.
    starts, stops: int64 [B, 2], first pixel of each region and the one behind the last, (row, column).
    sides: int64 [B, 2], height and width of the images that are YUV 4:2:0 planes, 0 for JPEGs; None: all are JPEGs.

    plane_bytes: int64 [B], bytes of the regions that are planes (`tl_fast.jpeg.plane_regions`), 0 for RGB pixels.
    offsets: int64 [B], where each region begins in `out`; num_bytes: of all regions.
    """

    def __init__(
        self,
        addresses: np.ndarray,
        sizes: np.ndarray,
        starts: np.ndarray,
        stops: np.ndarray,
        sides: np.ndarray | None = None,
    ):
        self._images = np.stack([addresses, sizes], axis=1).astype(np.uint64)
        self._regions = np.concatenate([starts, stops], axis=1).astype(np.int64)
        self._sides = np.zeros((len(starts), 2), np.int64) if sides is None else sides.astype(np.int64)
        is_jpeg = self._sides[:, 0] == 0
        self.plane_bytes = np.where(is_jpeg, 0, plane_bytes(self._regions[:, :2], self._regions[:, 2:], self._sides))
        rows, columns = (self._regions[:, 2:] - self._regions[:, :2]).T
        bytes_of_each = np.where(is_jpeg, 3 * rows * columns, self.plane_bytes)
        ends = np.cumsum(bytes_of_each)
        self.offsets, self.num_bytes = ends - bytes_of_each, int(ends[-1]) if len(ends) else 0
        self._stream_room = int(sizes[is_jpeg].max(initial=0)) + STREAM_ROOM
        plane_room, row_room = _room(rows[is_jpeg], columns[is_jpeg])
        self._plane_room, self._row_room = int(plane_room.max(initial=0)), int(row_room.max(initial=0))
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
        """Decode or copy regions of a queue until it is empty -> None, or until one is left to other decoders -> its
        number.

        out: uint8 [queue.num_bytes], which gets pixels and planes. After a number the caller sees to that region, and
        calls again for the others.
        """
        self._scan = self._scan.with_stream(queue._stream_room)
        self._pixels = self._pixels.with_room(queue._plane_room, queue._row_room)
        source = queue._images, queue._regions, queue._sides, queue.offsets
        left = decode_regions(queue._taken, *source, self._scan, self._pixels, out)
        return None if left < 0 else left

    def compile(self) -> None:
        """Compile `decode_queued` for all threads. To be called before several threads decode, for numba does not bear
        two threads that compile one function."""
        nothing = np.zeros(0, np.int64)
        with _compiling:
            self.decode_queued(RegionQueue(nothing, nothing, np.zeros((0, 2)), np.zeros((0, 2))), np.zeros(0, np.uint8))
