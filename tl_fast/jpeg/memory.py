"""Working memory of the compiled functions: one of each a thread, kept from file to file."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tl_fast.jpeg.blocks import BLOCK, VALUES
from tl_fast.jpeg.huffman import KEY, LOOKUP, SLOTS
from tl_fast.jpeg.markers import HEAD_BYTES, MARKERS, MAX_BLOCKS, MAX_COMPONENTS


class ScanMemory(NamedTuple):
    """What reading a file's header and its scan takes.

    record: int64 [MARKERS], head: uint8 [HEAD_BYTES], as `tl_fast.jpeg.markers.read_markers` fills them; stream: uint8,
    the scan's data without stuffing. The others keep the Huffman tables of the last file, for most files use the same
    ones. keys: uint8 [2 SLOTS KEY], the tables as their segments say them; lookup: int16 [LOOKUP], as the decoder wants
    them; layout: uint64 [MAX_BLOCKS], for each block of an MCU where its AC table is in `lookup` (16 bits), that xor
    the next block's DC table (16 bits) and the next block.
    """

    record: np.ndarray
    head: np.ndarray
    stream: np.ndarray
    keys: np.ndarray
    lookup: np.ndarray
    layout: np.ndarray

    @classmethod
    def create(cls) -> ScanMemory:
        return cls(
            record=np.zeros(MARKERS, np.int64),
            head=np.zeros(HEAD_BYTES, np.uint8),
            stream=np.zeros(1 << 18, np.uint8),
            keys=np.zeros(2 * SLOTS * KEY, np.uint8),
            lookup=np.zeros(LOOKUP, np.int16),
            layout=np.zeros(MAX_BLOCKS, np.uint64),
        )

    def with_stream(self, size: int) -> ScanMemory:
        """The same with a stream of `size` bytes or more."""
        return self if self.stream.size >= size else self._replace(stream=at_least(self.stream, size))


class PixelMemory(NamedTuple):
    """What making a region's pixels takes beside `ScanMemory`.

    keys: as `ScanMemory` has them, of the tables of values; values: uint64 [(2 SLOTS + 1) VALUES]; factors: int16
    [MAX_COMPONENTS * 64], quantisation tables row by row; coefficients: int16 [MAX_BLOCKS * BLOCK]; planes: uint8, the
    samples of each component; rows: uint8, chroma of one row of pixels.
    """

    keys: np.ndarray
    values: np.ndarray
    factors: np.ndarray
    coefficients: np.ndarray
    planes: np.ndarray
    rows: np.ndarray

    @classmethod
    def create(cls) -> PixelMemory:
        return cls(
            keys=np.zeros(2 * SLOTS * KEY, np.uint8),
            values=np.zeros((2 * SLOTS + 1) * VALUES, np.uint64),
            factors=np.zeros(MAX_COMPONENTS * 64, np.int16),
            coefficients=np.zeros(MAX_BLOCKS * BLOCK, np.int16),
            planes=np.zeros(1 << 20, np.uint8),
            rows=np.zeros(1 << 13, np.uint8),
        )

    def with_room(self, planes: int, rows: int) -> PixelMemory:
        """The same with so many bytes or more in `planes` and `rows`."""
        if self.planes.size >= planes and self.rows.size >= rows:
            return self
        return self._replace(planes=at_least(self.planes, planes), rows=at_least(self.rows, rows))


def at_least(array: np.ndarray, size: int) -> np.ndarray:
    """The array, or a larger one where it has fewer elements."""
    return array if array.size >= size else np.zeros(size + size // 4, array.dtype)
