"""CPU loops that show a mask through a plan's affine. Compiled from `tl_fast.maths.scalar`; no loop needs the GIL."""

from __future__ import annotations

import numpy as np

from tl_fast.maths.compile import compile_scalar, njit

_scalar = compile_scalar(njit)
_nearest_pixel = _scalar.nearest_pixel


@njit
def show(mask, affine, ignore_index, out, image, fill):
    """Write the class under the centre of every output pixel to out uint8 [H, W], `ignore_index` outside the mask.

    mask: uint8 [h, w]; affine: float32 [6] (`tl_fast.plan.records.PLAN`); image: uint8 [3, H, W], written outside the
    mask: fill uint8 [3].
    """
    xu, xv, x0, yu, yv, y0 = affine[0], affine[1], affine[2], affine[3], affine[4], affine[5]
    height, width = mask.shape
    rows, columns = out.shape
    if xv != 0.0 or yu != 0.0:
        for i in range(rows):
            for j in range(columns):
                x = _nearest_pixel(i, j, rows, columns, xu, xv, x0)
                y = _nearest_pixel(i, j, rows, columns, yu, yv, y0)
                if 0 <= x < width and 0 <= y < height:
                    out[i, j] = mask[y, x]
                else:
                    out[i, j] = ignore_index
                    for c in range(3):
                        image[c, i, j] = fill[c]
        return
    # Along the axes all rows read the same columns, and those that show the mask are in one piece.
    sources = np.empty(columns, np.int64)
    for j in range(columns):
        sources[j] = _nearest_pixel(0, j, rows, columns, xu, xv, x0)
    first, end = 0, columns
    while first < columns and not 0 <= sources[first] < width:
        first += 1
    while end > first and not 0 <= sources[end - 1] < width:
        end -= 1
    shown = sources[first:end].view(np.uint64)  # an index that might be negative takes longer
    previous = np.int64(-1)
    for i in range(rows):
        target, y = out[i], _nearest_pixel(i, 0, rows, columns, yu, yv, y0)
        inside = 0 <= y < height
        for c in range(3):
            image[c, i, : first if inside else columns] = fill[c]
            image[c, i, end:] = fill[c]
        if not inside:
            target[:] = ignore_index
        elif y == previous:
            target[:] = out[i - 1]
        else:
            target[:first] = ignore_index
            target[end:] = ignore_index
            row, line = mask[y], target[first:end]
            for j in range(shown.size):
                line[j] = row[shown[j]]
        previous = y
