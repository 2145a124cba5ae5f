"""Regions of YUV 4:2:0 planes, copied row by row: nothing is decoded, upsampled or converted.

A region's planes lie one behind the other: Y of its pixels, then Cb, then Cr, each the samples from which the region's
chroma is upsampled (`tl_fast.maths.scalar.chroma_range`), one more on every side than its pixels have where the image
goes on.
"""

from __future__ import annotations

import numpy as np

from tl_fast.maths import scalar
from tl_fast.maths.compile import compile_scalar, njit
from tl_fast.maths.memory import U, copy_bytes

_chroma_range = compile_scalar(njit).chroma_range


def plane_bytes(starts: np.ndarray, stops: np.ndarray, sides: np.ndarray) -> np.ndarray:
    """Bytes of each region's planes, int64 [B].

    starts, stops: int64 [B, 2], first pixel and the one behind the last, (row, column); sides: int64 [B, 2], height and
    width of the images.
    """
    first, behind = scalar.chroma_range(starts, stops, sides)
    return (stops - starts).prod(axis=1) + 2 * (behind - first).prod(axis=1)


@njit
def copy_planes(source, region, height, width, target):
    """Copy a region's planes between addresses, uint64.

    source: of an image's planes, height x width pixels; region: first row, first column, and the row and column behind
    the last ones, within the image. Writes `plane_bytes` bytes from `target` on.
    """
    top, left, bottom, right = region
    target = copy_rows(source, width, top, left, bottom, right, target)
    source += U(height * width)
    top, bottom = _chroma_range(top, bottom, height)
    left, right = _chroma_range(left, right, width)
    rows, columns = (height + 1) >> 1, (width + 1) >> 1
    target = copy_rows(source, columns, top, left, bottom, right, target)
    copy_rows(source + U(rows * columns), columns, top, left, bottom, right, target)


@njit
def copy_rows(source, stride, top, left, bottom, right, target):
    """Copy rows `top` to `bottom` of columns `left` to `right` (both exclusive) of a plane with rows of `stride` bytes;
    source, target: addresses, uint64 -> the address behind what was written."""
    count = U(right - left)
    source += U(top * stride + left)
    for _ in range(top, bottom):
        copy_bytes(source, target, count)
        source += U(stride)
        target += count
    return target
