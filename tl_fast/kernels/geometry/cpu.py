"""CPU loops that show an image through a plan's affine: a separable, antialiased resize, then a warp where the affine
rotates or shears.

Compiled from `tl_fast.maths.scalar`; no loop needs the GIL.
"""

from __future__ import annotations

import numpy as np

from tl_fast.kernels.geometry.taps import add_taps
from tl_fast.maths import scalar
from tl_fast.maths.compile import compile_scalar, njit
from tl_fast.plan.boxes import Sides, both_sides

_scalar = compile_scalar(njit)
_filter_range, _filter_weight, _filter_support = _scalar.filter_range, _scalar.filter_weight, _scalar.filter_support
_cubic_weights = _scalar.cubic_weights
BICUBIC = scalar.BICUBIC
BORDER = 3  # pixels around the canvas: two that the cubic filter reads beyond the image, and one for rounding
REACH = 2  # canvas pixels that `show` may read beyond what the affine shows
# Output rows that one pass makes: their values lie side by side, so that the horizontal filter works on vectors.
ROWS = 32


@njit
def _filter_table(box_start, box_extent, out_size, in_size, origin, interpolation, inside):
    """First pixel (counted from `origin`), number of taps and normalised weights of each output pixel along one axis;
    no taps for those whose centre is outside the image. inside: none is."""
    taps_max = int(np.ceil(_filter_support(box_extent, out_size, interpolation))) * 2 + 1
    first = np.zeros(out_size, np.int32)
    count = np.zeros(out_size, np.int32)
    weights = np.zeros((out_size, taps_max), np.float32)
    for i in range(out_size):
        centre = box_start + (i + 0.5) * (box_extent / out_size)
        if not inside and (centre < 0.0 or centre >= in_size):
            continue
        start, stop = _filter_range(i, box_start, box_extent, out_size, in_size, interpolation)
        first[i] = start - origin
        count[i] = stop - start
        total = 0.0
        for x in range(start, stop):
            weight = _filter_weight(x, i, box_start, box_extent, out_size, interpolation)
            weights[i, x - start] = np.float32(weight)
            total += weight
        for x in range(stop - start):
            weights[i, x] *= np.float32(1.0 / total)
    return first, count, weights


@njit
def _filter_rows(pixels, first, count, weights, begin, end, lines):
    """lines float32 [n or more, end - begin or more]: row r = the sum of the count[r] rows of pixels from first[r] on,
    columns begin to end, weighted with weights[r]; not written where count[r] is 0. first, count [n]."""
    # Loops from 0 over views: an index that might be negative keeps LLVM from using vectors.
    for r in range(first.size):
        if count[r] == 0:
            continue
        line, row, weight = lines[r], pixels[first[r], begin:end], weights[r, 0]
        t = 1
        if count[r] & 1:
            for x in range(row.size):
                line[x] = weight * np.float32(row[x])
        else:
            row1, weight1 = pixels[first[r] + 1, begin:end], weights[r, 1]
            for x in range(row.size):
                line[x] = weight * np.float32(row[x]) + weight1 * np.float32(row1[x])
            t = 2
        while t < count[r]:
            row, weight = pixels[first[r] + t, begin:end], weights[r, t]
            row1, weight1 = pixels[first[r] + t + 1, begin:end], weights[r, t + 1]
            for x in range(row.size):
                line[x] += weight * np.float32(row[x]) + weight1 * np.float32(row1[x])
            t += 2


@njit
def _swap(a, b, mask, bits):
    """Exchange the upper halves of a's fields with the lower halves of b's. mask: the lower halves, `bits` bits."""
    return (a & mask) | ((b & mask) << bits), ((a >> bits) & mask) | (b & ~mask)


@njit
def _interleave(lines, block):
    """lines float32 [ROWS, 3 n] -> block float32 [n, 3 ROWS], n even, by squares of 2 x 2 values."""
    source, target = lines.view(np.uint64), block.reshape(3 * block.shape[0], ROWS).view(np.uint64)
    one, mask, bits = np.uint64(1), np.uint64(0x00000000FFFFFFFF), np.uint64(32)
    for x in range(np.uint64(source.shape[1])):
        for r in range(np.uint64(ROWS // 2)):
            target[x + x, r], target[x + x + one, r] = _swap(source[r + r, x], source[r + r + one, x], mask, bits)


@njit
def _filter_columns(block, first, count, weights, flip, total, out):
    """out uint8 [n or more, 3 ROWS]: row x, counted from the other end when `flip`, = the sum of the count[x] columns
    of the block from first[x] on, weighted with weights[x], rounded and clipped. first, count [n].

    total: float32 [3 ROWS] to work in. One call makes all rows: the references that a call counts to its arrays take
    as long as the sums of a row. All indices are uint64: views cost more here than the sum, and LLVM would have to
    reckon with negative signed indices."""
    size, one, two, three = np.uint64(3 * ROWS), np.uint64(1), np.uint64(2), np.uint64(3)
    half, low, high = np.float32(0.5), np.float32(0.0), np.float32(255.0)
    for x in range(np.uint64(first.size)):
        row = np.uint64(first.size) - one - x if flip else x
        column, taps = np.uint64(first[x]), np.uint64(count[x])
        w0, w1, second = weights[x, 0], np.float32(0.0), column
        if taps >= two:
            w1, second = weights[x, one], column + one
        if taps <= two:
            for i in range(size):
                out[row, i] = np.uint8(min(max(half + w0 * block[column, i] + w1 * block[second, i], low), high))
            continue
        w2, third = weights[x, two], column + two
        if taps == three:
            for i in range(size):
                value = half + w0 * block[column, i] + w1 * block[second, i] + w2 * block[third, i]
                out[row, i] = np.uint8(min(max(value, low), high))
            continue
        for i in range(size):
            total[i] = half + w0 * block[column, i] + w1 * block[second, i] + w2 * block[third, i]
        t = three
        while t < taps:
            w0, w1, second = weights[x, t], np.float32(0.0), column + t
            third = second
            if t + one < taps:
                w1, third = weights[x, t + one], second + one
            for i in range(size):
                total[i] += w0 * block[second, i] + w1 * block[third, i]
            t += two
        for i in range(size):
            out[row, i] = np.uint8(min(max(total[i], low), high))


@njit
def _transpose(source, turned, target):
    """source uint8 [8 n, 3 ROWS] -> target uint8 [3 ROWS, 8 n], by squares of 8 x 8 bytes; turned: uint64 [8, 3 ROWS /
    8], to work in.

    Rows of a square are 64-bit words, which LLVM puts side by side in vectors: half the time of moving single bytes.
    """
    words, result = source.view(np.uint64), target.view(np.uint64)
    m8, m16, m32 = np.uint64(0x00FF00FF00FF00FF), np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00000000FFFFFFFF)
    b8, b16, b32 = np.uint64(8), np.uint64(16), np.uint64(32)
    for x in range(np.uint64(result.shape[1])):
        y = x * b8
        for g in range(np.uint64(3 * ROWS // 8)):
            a0, a1 = _swap(words[y, g], words[y + np.uint64(1), g], m8, b8)
            a2, a3 = _swap(words[y + np.uint64(2), g], words[y + np.uint64(3), g], m8, b8)
            a4, a5 = _swap(words[y + np.uint64(4), g], words[y + np.uint64(5), g], m8, b8)
            a6, a7 = _swap(words[y + np.uint64(6), g], words[y + np.uint64(7), g], m8, b8)
            a0, a2 = _swap(a0, a2, m16, b16)
            a1, a3 = _swap(a1, a3, m16, b16)
            a4, a6 = _swap(a4, a6, m16, b16)
            a5, a7 = _swap(a5, a7, m16, b16)
            turned[0, g], turned[4, g] = _swap(a0, a4, m32, b32)
            turned[1, g], turned[5, g] = _swap(a1, a5, m32, b32)
            turned[2, g], turned[6, g] = _swap(a2, a6, m32, b32)
            turned[3, g], turned[7, g] = _swap(a3, a7, m32, b32)
        for g in range(3 * ROWS // 8):
            for j in range(8):
                result[8 * g + j, x] = turned[j, g]


@njit
def resample(region, origin_y, origin_x, height, width, box, flip, interpolation, fill, out, inside=False):
    """Show `box` = (top, left, height, width) of an image of `height` x `width` pixels, of which `region` uint8 [h, w,
    3] holds what begins at (origin_y, origin_x), in out uint8 [3, H, W], mirrored left-right when `flip`. Output pixels
    whose centre is outside the image get `fill`. inside: there are none, even if rounding puts a centre that is on the
    image's edge beyond it."""
    rows, columns = out.shape[1], out.shape[2]
    y_first, y_count, y_weights = _filter_table(box[0], box[2], rows, height, origin_y, interpolation, inside)
    x_first, x_count, x_weights = _filter_table(box[1], box[3], columns, width, origin_x, interpolation, inside)
    x_low, x_high = 0, columns
    while x_low < columns and x_count[x_low] == 0:
        x_low += 1
    while x_high > x_low and x_count[x_high - 1] == 0:
        x_high -= 1
    shown = x_high - x_low
    start = columns - x_high if flip else x_low
    for y in range(rows):
        if y_count[y] == 0 or shown == 0:
            for c in range(3):
                out[c, y] = fill[c]
        elif shown < columns:
            for c in range(3):
                out[c, y, :start] = fill[c]
                out[c, y, start + shown :] = fill[c]
    if shown == 0:
        return
    begin, end = x_first[x_low], x_first[x_high - 1] + x_count[x_high - 1]
    # Windows are cut at the image's edges alone, so first and last ones should be the outermost; this makes sure.
    for x in range(x_low, x_high):
        begin, end = min(begin, x_first[x]), max(end, x_first[x] + x_count[x])
    for y in range(rows):
        if y_count[y] and (y_first[y] < 0 or y_first[y] + y_count[y] > region.shape[0]):
            raise ValueError("the decoded region lacks rows that the box needs")
    if begin < 0 or end > region.shape[1]:
        raise ValueError("the decoded region lacks columns that the box needs")
    first, count, shown_weights = x_first[x_low:x_high] - begin, x_count[x_low:x_high], x_weights[x_low:x_high]
    pixels = region.reshape(region.shape[0], region.shape[1] * 3)
    width_read = (end - begin + 1) // 2 * 2
    lines = np.zeros((ROWS, 3 * width_read), np.float32)
    block = np.empty((width_read, 3 * ROWS), np.float32)
    total = np.empty(3 * ROWS, np.float32)
    columns_done = np.zeros(((shown + 7) // 8 * 8, 3 * ROWS), np.uint8)
    turned = np.empty((8, 3 * ROWS // 8), np.uint64)
    rows_done = np.empty((3 * ROWS, columns_done.shape[0]), np.uint8)
    for y0 in range(0, rows, ROWS):
        n = min(ROWS, rows - y0)
        _filter_rows(
            pixels, y_first[y0 : y0 + n], y_count[y0 : y0 + n], y_weights[y0 : y0 + n], 3 * begin, 3 * end, lines
        )
        _interleave(lines, block)
        _filter_columns(block, first, count, shown_weights, flip, total, columns_done)
        _transpose(columns_done, turned, rows_done)
        for r in range(n):
            if y_count[y0 + r]:
                for c in range(3):
                    source, target = rows_done[c * ROWS + r], out[c, y0 + r, start : start + shown]
                    for x in range(target.size):
                        target[x] = source[x]


@njit
def _spread(canvas, pixels):
    """canvas uint8 [3, h, w] -> pixels float32 [h + 2 BORDER, w + 2 BORDER, 4], flat: RGB and a 0; the outermost pixels
    are repeated all around."""
    rows, columns = canvas.shape[1], canvas.shape[2]
    stride = (columns + 2 * BORDER) * 4
    one, two, three, four = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
    for y in range(rows + 2 * BORDER):
        row = min(max(y - BORDER, 0), rows - 1)
        red, green, blue = canvas[0, row], canvas[1, row], canvas[2, row]
        line = pixels[y * stride : (y + 1) * stride]
        inner = line[4 * BORDER : stride - 4 * BORDER]
        for x in range(np.uint64(columns)):
            pixel = x * four
            inner[pixel], inner[pixel + one] = np.float32(red[x]), np.float32(green[x])
            inner[pixel + two], inner[pixel + three] = np.float32(blue[x]), np.float32(0.0)
        for c in range(4):
            for x in range(BORDER):
                line[4 * x + c] = inner[c]
                line[stride - 4 * (x + 1) + c] = inner[4 * (columns - 1) + c]


@njit
def show(region, origin_y, origin_x, height, width, crop, affine, interpolation, fill, out):
    """Show an image of `height` x `width` pixels through `affine` (`tl_fast.plan.PLAN`) in out uint8 [3, H, W].

    region: uint8 [h, w, 3], the image's pixels from (origin_y, origin_x) on, as far as `needed` says; crop: (top, left,
    height, width) in pixels, which set the scale of a rotated or sheared sample: it is first resampled without rotation
    at the crop's scale, as Pillow's resize does before its transform, then warped. Output pixels whose centre is
    outside the image get `fill` uint8 [3].
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
    x_step, x_slant = affine[0] / (columns * scale_x), affine[1] / (rows * scale_x)
    y_slant, y_step = affine[3] / (columns * scale_y), affine[4] / (rows * scale_y)
    x_start, y_start = (affine[2] - crop[1]) / scale_x, (affine[5] - crop[0]) / scale_y
    # The image's edges on it, then the part of it that the output may read.
    x_low, x_high = -crop[1] / scale_x, (width - crop[1]) / scale_x
    y_low, y_high = -crop[0] / scale_y, (height - crop[0]) / scale_y
    x_least = x_start + (min(x_step * columns, 0.0) + min(x_slant * rows, 0.0))
    x_most = x_start + (max(x_step * columns, 0.0) + max(x_slant * rows, 0.0))
    y_least = y_start + (min(y_slant * columns, 0.0) + min(y_step * rows, 0.0))
    y_most = y_start + (max(y_slant * columns, 0.0) + max(y_step * rows, 0.0))
    x0, x1 = int(np.ceil(max(x_least - REACH, x_low) - 0.5)), int(np.ceil(min(x_most + REACH, x_high) - 0.5))
    y0, y1 = int(np.ceil(max(y_least - REACH, y_low) - 0.5)), int(np.ceil(min(y_most + REACH, y_high) - 0.5))
    if x1 <= x0 or y1 <= y0:
        for c in range(3):
            out[c] = fill[c]
        return
    canvas = np.empty((3, y1 - y0, x1 - x0), np.uint8)
    box = (crop[0] + y0 * scale_y, crop[1] + x0 * scale_x, (y1 - y0) * scale_y, (x1 - x0) * scale_x)
    resample(region, origin_y, origin_x, height, width, box, False, interpolation, fill, canvas, True)
    across, down = (x_start, x_step, x_slant, x_low, x_high, x0), (y_start, y_slant, y_step, y_low, y_high, y0)
    _warp(canvas, across, down, interpolation, fill, out)


@njit
def _warp(canvas, across, down, interpolation, fill, out):
    """Show a canvas uint8 [3, h, w] in out uint8 [3, H, W], with `fill` outside the image.

    across: the canvas column of the output's corner, what an output column and an output row add to it, the image's
    edges (left, right), the canvas' first column; down: the same of the canvas row, edges (top, bottom).
    """
    x_start, x_step, x_slant, x_low, x_high, x0 = across
    y_start, y_slant, y_step, y_low, y_high, y0 = down
    rows, columns = out.shape[1], out.shape[2]
    pixels = np.empty((canvas.shape[1] + 2 * BORDER) * (canvas.shape[2] + 2 * BORDER) * 4, np.float32)
    _spread(canvas, pixels)
    line = np.empty(columns * 4, np.float32)
    stride = np.uint64((canvas.shape[2] + 2 * BORDER) * 4)
    for i in range(rows):
        x_row = x_start + (i + 0.5) * x_slant + 0.5 * x_step
        y_row = y_start + (i + 0.5) * y_step + 0.5 * y_slant
        first, last = 0, columns  # of a row, what shows the image is in one piece
        while first < columns and not (
            x_low <= x_row + first * x_step < x_high and y_low <= y_row + first * y_slant < y_high
        ):
            first += 1
        while last > first and not (
            x_low <= x_row + (last - 1) * x_step < x_high and y_low <= y_row + (last - 1) * y_slant < y_high
        ):
            last -= 1
        for j in range(np.uint64(first), np.uint64(last)):
            x = x_row + np.float64(j) * x_step - x0 + (BORDER - 0.5)
            y = y_row + np.float64(j) * y_slant - y0 + (BORDER - 0.5)
            column, row = np.int64(x), np.int64(y)
            if interpolation == BICUBIC:
                tap = np.uint64(row - 1) * stride + np.uint64(column - 1) * np.uint64(4)
                w0, w1, w2, w3 = _cubic_weights(x - column)
                weights_x = np.float32(w0), np.float32(w1), np.float32(w2), np.float32(w3)
                w0, w1, w2, w3 = _cubic_weights(y - row)
                weights_y = np.float32(w0), np.float32(w1), np.float32(w2), np.float32(w3)
                add_taps(pixels, tap, stride, weights_x, weights_y, line, j * np.uint64(4))
            else:
                tap = np.uint64(row) * stride + np.uint64(column) * np.uint64(4)
                wx, wy, one = np.float32(x - column), np.float32(y - row), np.float32(1.0)
                add_taps(pixels, tap, stride, (one - wx, wx), (one - wy, wy), line, j * np.uint64(4))
        for c in range(3):
            target = out[c, i]
            for j in range(first):
                target[j] = fill[c]
            for j in range(last, columns):
                target[j] = fill[c]
            for j in range(np.uint64(first), np.uint64(last)):
                value = line[j * np.uint64(4) + np.uint64(c)] + np.float32(0.5)
                target[j] = np.uint8(min(max(value, np.float32(0.0)), np.float32(255.0)))


def needed(
    plans: np.ndarray, heights: np.ndarray, widths: np.ndarray, image_size: Sides
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels that `show` reads of images of `heights`, `widths` [B] for outputs of `image_size` -> first and behind
    last (row, column), int64 [B, 2], never empty."""
    affine = plans["affine"].astype(np.float64)
    rotated = (affine[:, 1] != 0) | (affine[:, 3] != 0)
    starts, stops = np.empty((len(plans), 2), np.int64), np.empty((len(plans), 2), np.int64)
    shown = both_sides(image_size)
    for axis, (extent, size) in enumerate((("height", heights), ("width", widths))):
        along, across, start = affine[:, (3, 4, 5) if axis == 0 else (0, 1, 2)].T
        scale = np.where(rotated, plans[extent], np.abs(across if axis == 0 else along)) / shown[axis]
        support = np.maximum(scale, 1.0) * np.where(plans["interpolation"] == BICUBIC, 2, 1)
        margin = support + np.where(rotated, (REACH + 1) * scale, 0) + 1
        low = start + np.minimum(along, 0) + np.minimum(across, 0) - margin
        high = start + np.maximum(along, 0) + np.maximum(across, 0) + margin
        starts[:, axis] = np.clip(np.floor(low), 0, size - 1)
        stops[:, axis] = np.clip(np.ceil(high), starts[:, axis] + 1, size)
    return starts, stops
