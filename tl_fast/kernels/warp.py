"""CPU loops that show an image through a plan's affine: separable and antialiased along the axes, then a warp where it is rotated or sheared.

Compiled from `tl_fast.scalar`; no loop needs the GIL.
"""
from __future__ import annotations

import numpy as np

from tl_fast import scalar
from tl_fast.jit import compile_scalar, njit

_scalar = compile_scalar(njit)
_filter_range, _filter_weight, _filter_support = _scalar.filter_range, _scalar.filter_weight, _scalar.filter_support
_cubic_weights = _scalar.cubic_weights
BICUBIC = scalar.BICUBIC
REACH = 2  # canvas pixels that `show` may read beyond what the affine shows
ROWS = 32  # output rows that one pass makes: their values lie side by side, so that the horizontal filter works on vectors


@njit
def _filter_table(box_start, box_extent, out_size, in_size, origin, interpolation):
    """First pixel (counted from `origin`), number of taps and normalised weights of each output pixel along one axis."""
    taps_max = int(np.ceil(_filter_support(box_extent, out_size, interpolation))) * 2 + 1
    first = np.zeros(out_size, np.int32)
    count = np.zeros(out_size, np.int32)
    weights = np.zeros((out_size, taps_max), np.float32)
    for i in range(out_size):
        centre = box_start + (i + 0.5) * (box_extent / out_size)
        if centre < 0.0 or centre >= in_size:
            continue
        start, stop = _filter_range(i, box_start, box_extent, out_size, in_size, interpolation)
        first[i] = start - origin
        count[i] = stop - start
        total = 0.0
        for x in range(start, stop):
            total += _filter_weight(x, i, box_start, box_extent, out_size, interpolation)
        for x in range(start, stop):
            weights[i, x - start] = np.float32(_filter_weight(x, i, box_start, box_extent, out_size, interpolation) / total)
    return first, count, weights


@njit
def _add_rows(row, weight, row1, weight1, line):
    # Loops from 0 over views: an index that might be negative keeps LLVM from using vectors.
    for x in range(line.size):
        line[x] += weight * np.float32(row[x]) + weight1 * np.float32(row1[x])


@njit
def _filter_rows(pixels, first, count, weights, begin, end, line):
    """line = the weighted sum of `count` rows of pixels, columns begin to end."""
    row, weight = pixels[first, begin:end], weights[0]
    t = 1
    if count & 1:
        for x in range(line.size):
            line[x] = weight * np.float32(row[x])
    else:
        row1, weight1 = pixels[first + 1, begin:end], weights[1]
        for x in range(line.size):
            line[x] = weight * np.float32(row[x]) + weight1 * np.float32(row1[x])
        t = 2
    while t < count:
        _add_rows(pixels[first + t, begin:end], weights[t], pixels[first + t + 1, begin:end], weights[t + 1], line)
        t += 2


@njit
def _interleave(lines, block):
    """lines [ROWS, 3 n] -> block [n, 3 ROWS]."""
    for x in range(block.shape[0]):
        row = block[x]
        for c in range(3):
            for r in range(ROWS):
                row[c * ROWS + r] = lines[r, 3 * x + c]


@njit
def _filter_columns(block, first, count, weights, total, out):
    """out uint8 [3 ROWS] = the weighted sum of `count` columns, rounded and clipped; total: float32 of that size, to work in."""
    source, weight = block[first], weights[0]
    for i in range(3 * ROWS):
        total[i] = np.float32(0.5) + weight * source[i]
    for t in range(1, count):
        source, weight = block[first + t], weights[t]
        for i in range(3 * ROWS):
            total[i] += weight * source[i]
    for i in range(3 * ROWS):
        out[i] = np.uint8(min(max(total[i], np.float32(0.0)), np.float32(255.0)))


@njit
def resample(region, origin_y, origin_x, height, width, box, flip, interpolation, fill, out):
    """Show `box` = (top, left, height, width) of an image of `height` x `width` pixels, of which `region` uint8 [h, w, 3] holds what begins at
    (origin_y, origin_x), in out uint8 [3, H, W], mirrored left-right when `flip`. Output pixels whose centre is outside the image get `fill`."""
    rows, columns = out.shape[1], out.shape[2]
    y_first, y_count, y_weights = _filter_table(box[0], box[2], rows, height, origin_y, interpolation)
    x_first, x_count, x_weights = _filter_table(box[1], box[3], columns, width, origin_x, interpolation)
    x_low, x_high = 0, columns
    while x_low < columns and x_count[x_low] == 0:
        x_low += 1
    while x_high > x_low and x_count[x_high - 1] == 0:
        x_high -= 1
    for c in range(3):
        for y in range(rows):
            empty = y_count[y] == 0 or x_low == x_high
            for x in range(columns):
                if empty or x < x_low or x >= x_high:
                    out[c, y, columns - 1 - x if flip else x] = fill[c]
    if x_low == x_high:
        return
    begin, end = x_first[x_low], x_first[x_high - 1] + x_count[x_high - 1]
    for x in range(x_low, x_high):  # cubic windows are cut at the image's edges alone, so they only grow; to be sure all the same
        begin, end = min(begin, x_first[x]), max(end, x_first[x] + x_count[x])
    for y in range(rows):
        if y_count[y] and (y_first[y] < 0 or y_first[y] + y_count[y] > region.shape[0]):
            raise ValueError("the decoded region lacks rows that the box needs")
    if begin < 0 or end > region.shape[1]:
        raise ValueError("the decoded region lacks columns that the box needs")
    pixels = region.reshape(region.shape[0], region.shape[1] * 3)
    width_read = end - begin
    lines = np.zeros((ROWS, 3 * width_read), np.float32)
    block = np.empty((width_read, 3 * ROWS), np.float32)
    total = np.empty(3 * ROWS, np.float32)
    done = np.empty((columns, 3 * ROWS), np.uint8)
    shown = done[x_low:x_high]
    for y0 in range(0, rows, ROWS):
        n = min(ROWS, rows - y0)
        for r in range(n):
            if y_count[y0 + r]:
                _filter_rows(pixels, y_first[y0 + r], y_count[y0 + r], y_weights[y0 + r], 3 * begin, 3 * end, lines[r])
        _interleave(lines, block)
        for x in range(x_low, x_high):
            _filter_columns(block, x_first[x] - begin, x_count[x], x_weights[x], total, done[x])
        for r in range(n):
            if y_count[y0 + r]:
                for c in range(3):
                    target = out[c, y0 + r, columns - x_high : columns - x_low] if flip else out[c, y0 + r, x_low:x_high]
                    last = target.size - 1
                    if flip:
                        for x in range(target.size):
                            target[x] = shown[last - x, c * ROWS + r]
                    else:
                        for x in range(target.size):
                            target[x] = shown[x, c * ROWS + r]


@njit
def show(region, origin_y, origin_x, height, width, crop, affine, interpolation, fill, out):
    """Show an image of `height` x `width` pixels through `affine` (`tl_fast.plan.PLAN`) in out uint8 [3, H, W].

    region: uint8 [h, w, 3], the image's pixels from (origin_y, origin_x) on, as far as `needed` says; crop: (top, left, height, width) in pixels,
    which set the scale of a rotated or sheared sample: it is first resampled without rotation at the crop's scale, as Pillow's resize does before
    its transform, then warped. Output pixels whose centre is outside the image get `fill` uint8 [3].
    """
    if affine[1] == 0.0 and affine[3] == 0.0:
        flip = affine[0] < 0.0
        box_left = np.float64(affine[2]) + min(np.float64(affine[0]), 0.0)
        box = (np.float64(affine[5]), box_left, np.float64(affine[4]), abs(np.float64(affine[0])))
        resample(region, origin_y, origin_x, height, width, box, flip, interpolation, fill, out)
        return
    rows, columns = out.shape[1], out.shape[2]
    # The canvas: pixels of the crop's scale, counted from the crop's corner.
    scale_y, scale_x = crop[2] / rows, crop[3] / columns
    x_step, x_slant, x_start = affine[0] / (columns * scale_x), affine[1] / (rows * scale_x), (affine[2] - crop[1]) / scale_x
    y_slant, y_step, y_start = affine[3] / (columns * scale_y), affine[4] / (rows * scale_y), (affine[5] - crop[0]) / scale_y
    x_low, x_high = -crop[1] / scale_x, (width - crop[1]) / scale_x  # the image
    y_low, y_high = -crop[0] / scale_y, (height - crop[0]) / scale_y
    reach_x = min(x_step * columns, 0.0) + min(x_slant * rows, 0.0), max(x_step * columns, 0.0) + max(x_slant * rows, 0.0)
    reach_y = min(y_slant * columns, 0.0) + min(y_step * rows, 0.0), max(y_slant * columns, 0.0) + max(y_step * rows, 0.0)
    x0 = int(np.ceil(max(x_start + reach_x[0] - REACH, x_low) - 0.5))
    x1 = int(np.ceil(min(x_start + reach_x[1] + REACH, x_high) - 0.5))
    y0 = int(np.ceil(max(y_start + reach_y[0] - REACH, y_low) - 0.5))
    y1 = int(np.ceil(min(y_start + reach_y[1] + REACH, y_high) - 0.5))
    if x1 <= x0 or y1 <= y0:
        for c in range(3):
            out[c] = fill[c]
        return
    canvas = np.empty((3, y1 - y0, x1 - x0), np.uint8)
    box = (crop[0] + y0 * scale_y, crop[1] + x0 * scale_x, (y1 - y0) * scale_y, (x1 - x0) * scale_x)
    resample(region, origin_y, origin_x, height, width, box, False, interpolation, fill, canvas)
    for i in range(rows):
        x_row = x_start + (i + 0.5) * x_slant + 0.5 * x_step
        y_row = y_start + (i + 0.5) * y_step + 0.5 * y_slant
        for j in range(columns):
            x, y = x_row + j * x_step, y_row + j * y_slant
            if x < x_low or x >= x_high or y < y_low or y >= y_high:
                for c in range(3):
                    out[c, i, j] = fill[c]
            elif interpolation == BICUBIC:
                _cubic_pixel(canvas, x - x0 - 0.5, y - y0 - 0.5, out, np.uint64(i), np.uint64(j))
            else:
                _linear_pixel(canvas, x - x0 - 0.5, y - y0 - 0.5, out, np.uint64(i), np.uint64(j))


@njit
def _clamp(index, size):
    """An index inside 0..size - 1; unsigned, for numba counts negative ones from the end."""
    return np.uint64(min(max(index, 0), size - 1))


@njit
def _linear_pixel(canvas, x, y, out, i, j):
    column, row = int(np.floor(x)), int(np.floor(y))
    wx, wy = np.float32(x - column), np.float32(y - row)
    left, right = _clamp(column, canvas.shape[2]), _clamp(column + 1, canvas.shape[2])
    above, below = _clamp(row, canvas.shape[1]), _clamp(row + 1, canvas.shape[1])
    for c in range(3):
        upper = np.float32(canvas[c, above, left]) * (np.float32(1.0) - wx) + np.float32(canvas[c, above, right]) * wx
        lower = np.float32(canvas[c, below, left]) * (np.float32(1.0) - wx) + np.float32(canvas[c, below, right]) * wx
        out[c, i, j] = np.uint8(upper * (np.float32(1.0) - wy) + lower * wy + np.float32(0.5))


@njit
def _cubic_pixel(canvas, x, y, out, i, j):
    column, row = int(np.floor(x)), int(np.floor(y))
    w0, w1, w2, w3 = _cubic_weights(x - column)
    wx0, wx1, wx2, wx3 = np.float32(w0), np.float32(w1), np.float32(w2), np.float32(w3)
    v0, v1, v2, v3 = _cubic_weights(y - row)
    size = canvas.shape[2]
    at0, at1, at2, at3 = _clamp(column - 1, size), _clamp(column, size), _clamp(column + 1, size), _clamp(column + 2, size)
    size = canvas.shape[1]
    row0, row1, row2, row3 = _clamp(row - 1, size), _clamp(row, size), _clamp(row + 1, size), _clamp(row + 2, size)
    for c in range(3):
        total = np.float32(0.5)
        for line, wy in ((row0, np.float32(v0)), (row1, np.float32(v1)), (row2, np.float32(v2)), (row3, np.float32(v3))):
            total += wy * (
                wx0 * np.float32(canvas[c, line, at0]) + wx1 * np.float32(canvas[c, line, at1])
                + wx2 * np.float32(canvas[c, line, at2]) + wx3 * np.float32(canvas[c, line, at3])
            )  # fmt: skip
        out[c, i, j] = np.uint8(min(max(total, np.float32(0.0)), np.float32(255.0)))


def needed(plans: np.ndarray, heights: np.ndarray, widths: np.ndarray, out_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that `show` reads of images of `heights`, `widths` [B] -> first and behind last (row, column), int64 [B, 2], never empty."""
    affine = plans["affine"].astype(np.float64)
    rotated = (affine[:, 1] != 0) | (affine[:, 3] != 0)
    starts, stops = np.empty((len(plans), 2), np.int64), np.empty((len(plans), 2), np.int64)
    for axis, (extent, size) in enumerate((("height", heights), ("width", widths))):
        along, across, start = affine[:, (3, 4, 5) if axis == 0 else (0, 1, 2)].T
        scale = np.where(rotated, plans[extent], np.abs(across if axis == 0 else along)) / out_size
        support = np.maximum(scale, 1.0) * np.where(plans["interpolation"] == BICUBIC, 2, 1)
        margin = support + np.where(rotated, (REACH + 1) * scale, 0) + 1
        low = start + np.minimum(along, 0) + np.minimum(across, 0) - margin
        high = start + np.maximum(along, 0) + np.maximum(across, 0) + margin
        starts[:, axis] = np.clip(np.floor(low), 0, size - 1)
        stops[:, axis] = np.clip(np.ceil(high), starts[:, axis] + 1, size)
    return starts, stops
