"""The orientation that an EXIF segment states."""

from __future__ import annotations

import numpy as np

from tl_fast.jpeg.bits import starts_with
from tl_fast.maths.compile import njit

EXIF_NAME = np.frombuffer(b"Exif\0\0", np.uint8)
ORIENTATION_TAG, LONG = 0x0112, 4  # TIFF's number of the tag, and of its 4-byte type


@njit
def exif_orientation(data, start, stop):
    """The orientation tag (1..8) of an EXIF segment's payload data[start:stop].

    0 where there is none or the TIFF structure leads outside.
    """
    if not starts_with(data, start, stop, EXIF_NAME) or stop - start < 14:
        return 0
    tiff = start + 6
    little_endian = data[tiff] == 0x49
    if data[tiff] != data[tiff + 1] or not (little_endian or data[tiff] == 0x4D):
        return 0
    directory = tiff + _number(data, tiff + 4, 4, little_endian)
    if directory + 2 > stop:
        return 0
    for i in range(_number(data, directory, 2, little_endian)):
        entry = directory + 2 + 12 * i
        if entry + 12 > stop:
            return 0
        if _number(data, entry, 2, little_endian) == ORIENTATION_TAG:
            kind = _number(data, entry + 2, 2, little_endian)
            value = _number(data, entry + 8, 4 if kind == LONG else 2, little_endian)
            return value if 1 <= value <= 8 else 0
    return 0


@njit
def _number(data, start, size, little_endian):
    value = 0
    for i in range(size):
        value = value << 8 | np.int64(data[start + (size - 1 - i if little_endian else i)])
    return value
