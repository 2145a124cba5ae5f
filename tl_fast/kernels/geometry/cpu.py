"""CPU loops that show an image through a plan's affine: a separable, antialiased resize, then a warp where the affine
rotates or shears.

Compiled from `tl_fast.maths.scalar`; no loop needs the GIL.
"""

from __future__ import annotations

import numpy as np

from tl_fast.kernels.geometry.taps import (
    BLOCK,
    CHUNK,
    LANES,
    filter_across,
    filter_down,
    interleave,
    merge_channels,
    separate,
    split_channels,
    weigh_2_around,
    weigh_4_around,
)
from tl_fast.maths import scalar
from tl_fast.maths.compile import compile_scalar, njit
from tl_fast.maths.memory import U0, U1, U3, U4, U8, U, address, keep, load_uint8, store_uint8
from tl_fast.maths.ycbcr import row_room, write_row
from tl_fast.plan.boxes import Sides, both_sides

_scalar = compile_scalar(njit)
_filter_range, _filter_weight, _filter_support = _scalar.filter_range, _scalar.filter_weight, _scalar.filter_support
_filter_centre = _scalar.filter_centre
BICUBIC, PRECISION = scalar.BICUBIC, scalar.PRECISION
BORDER = 3  # pixels around the canvas: two that the cubic filter reads beyond the image, and one for rounding
REACH = 2  # canvas pixels that `show` may read beyond what the affine shows


@njit
def _filter_table(box_start, box_extent, out_size, in_size, interpolation, inside):
    """The filters along one axis, as Pillow has them (`precompute_coeffs`, `normalize_coeffs_8bpc`): for each output
    pixel its first source pixel and how many it reads, int32 [out_size], and their weights, int32 [out_size, taps],
    whose sum is 2^PRECISION. taps: of the pixel that reads most; the others' last weights are 0.

    Output pixels whose centre is outside the image read none. inside: there are no such pixels.
    """
    taps_max = int(np.ceil(_filter_support(box_extent, out_size, interpolation))) * 2 + 1
    first = np.zeros(out_size, np.int32)
    count = np.zeros(out_size, np.int32)
    whole = np.zeros((out_size, taps_max), np.int32)
    weights = np.empty(taps_max, np.float64)
    taps = 1
    for i in range(out_size):
        centre = _filter_centre(i, box_start, box_extent, out_size)
        if not inside and (centre < 0.0 or centre >= in_size):
            continue
        start, stop = _filter_range(i, box_start, box_extent, out_size, in_size, interpolation)
        total = 0.0
        for x in range(start, stop):
            weights[x - start] = _filter_weight(x, i, box_start, box_extent, out_size, interpolation)
            total += weights[x - start]
        while stop - start > 1 and weights[stop - start - 1] == 0.0:
            stop -= 1
        first[i], count[i] = start, stop - start
        taps = max(taps, stop - start)
        for n in range(stop - start):
            weight = weights[n] / total * (1 << PRECISION)
            whole[i, n] = np.int32(weight + 0.5 if weight >= 0.0 else weight - 0.5)
    return first, count, whole[:, :taps].copy()


@njit
def resample(pixels, height, width, box, flip, interpolation, fill, out, inside=False):
    """Show `box` = (top, left, height, width) of an image of `height` x `width` pixels in out uint8 [3, H, W], mirrored
    left-right when `flip`: to the bit as Pillow's `resize(box=...)`, which filters along x, rounds, filters along y
    and rounds.

    pixels: `tl_fast.maths.ycbcr.Pixels`, with those that the filters read. Output pixels whose centre is outside the
    image get `fill`. inside: there are none, even if rounding puts a centre that is on the image's edge beyond it.

    Rows of pixels become RGB four at a time, are filtered along x, and stay in a ring as long as output rows need them.
    """
    rows, columns = out.shape[1], out.shape[2]
    y_first, y_count, y_weights = _filter_table(box[0], box[2], rows, height, interpolation, inside)
    x_first, x_count, x_weights = _filter_table(box[1], box[3], columns, width, interpolation, inside)
    x_low, x_high = _shown(x_count)
    y_low, y_high = _shown(y_count)
    shown = x_high - x_low
    start = columns - x_high if flip else x_low
    _fill_around(out, fill, y_low, y_high, start, start + shown)
    if shown <= 0 or y_low >= y_high:
        return
    left, right = x_first[x_low], 0
    for x in range(x_low, x_high):  # which need not be the outermost ones where windows are cut at the image's edges
        left, right = min(left, x_first[x]), max(right, x_first[x] + x_count[x])
    top, bottom, longest = y_first[y_low], 0, 0
    for y in range(y_low, y_high):
        bottom, longest = max(bottom, y_first[y] + y_count[y]), max(longest, y_count[y])
    if top < pixels.top or bottom > pixels.bottom:
        raise ValueError("the decoded region lacks rows that the box needs")
    if left < pixels.left or right > pixels.right:
        raise ValueError("the decoded region lacks columns that the box needs")

    count, x_taps, y_taps = right - left, x_weights.shape[1], y_weights.shape[1]
    line = (4 * count + 63) // 32 * 32  # bytes of a row of pixels
    plane = (shown + CHUNK - 1) // CHUNK * CHUNK  # bytes of a channel in a row of the ring
    slots = 2 * BLOCK
    while slots < longest + 2 * BLOCK:
        slots *= 2
    lines, room = np.empty(BLOCK * line, np.uint8), np.empty(row_room(count), np.uint8)
    block = np.zeros((line // 4 + x_taps) * 4 * BLOCK, np.uint8)
    filtered = np.empty(plane * 4 * BLOCK, np.uint8)
    ring, short = np.zeros(slots * 3 * plane, np.uint8), np.empty(CHUNK, np.uint8)
    for x in range(columns):
        x_first[x] -= left
    step, mask = U(3 * plane), U(slots - 1)
    lines_in, room_in, block_in, filtered_in = address(lines), address(room), address(block), address(filtered)
    ring_in, short_in, out_in = address(ring), address(short), address(out) + U(start)
    first_in, across_in = address(x_first) + U(4 * x_low), address(x_weights) + U(4 * x_low * x_taps)
    down_in = address(y_weights)
    y = y_low
    for row in range(top, bottom, BLOCK):
        for n in range(min(BLOCK, bottom - row)):
            write_row(pixels, row + n, left, right, U4, room_in, lines_in + U(n * line))
        for x in range(U0, U(count), U8):
            interleave(lines_in + U4 * x, U(line), block_in + U(4 * BLOCK) * x)
        filter_across(block_in, first_in, across_in, U(x_taps), U(shown), flip, filtered_in)
        slot = ring_in + (U(row - top) & mask) * step
        for x in range(U0, U(shown), U(LANES)):
            separate(filtered_in + U(4 * BLOCK) * x, slot + x, step, U(plane))
        while y < y_high and (row + BLOCK >= bottom or y_first[y] + y_count[y] <= row + BLOCK):
            weights, first = down_in + U(4 * y * y_taps), U(y_first[y] - top)
            for c in range(3):
                target = out_in + U((c * rows + y) * columns)
                source = ring_in + U(c * plane)
                if shown >= CHUNK:
                    filter_down(source, first, mask, step, weights, U(y_taps), U(shown), target)
                else:
                    filter_down(source, first, mask, step, weights, U(y_taps), U(CHUNK), short_in)
                    for x in range(U(shown)):
                        store_uint8(target, x, U(load_uint8(short_in, x)))
            y += 1
    keep((lines, room, block, filtered, ring, short, x_first, x_weights, y_weights, out))


@njit
def _shown(count):
    """The first output line that reads pixels, and the one behind the last."""
    low, high = 0, count.size
    while low < high and count[low] == 0:
        low += 1
    while high > low and count[high - 1] == 0:
        high -= 1
    return low, high


@njit
def _fill_around(out, fill, top, bottom, left, right):
    """Fill what is outside rows `top` to `bottom` and columns `left` to `right` of out uint8 [3, H, W]."""
    if right <= left:
        bottom = top
    for c in range(3):
        out[c, :top], out[c, bottom:] = fill[c], fill[c]
        if right - left < out.shape[2]:
            for y in range(top, bottom):
                out[c, y, :left], out[c, y, right:] = fill[c], fill[c]


@njit
def _with_border(canvas, pixels, line):
    """canvas uint8 [3, h, w] -> pixels uint8 [h + 2 BORDER, line], from the first byte of each row on w + 2 BORDER
    pixels of four bytes, the fourth 0; the outermost pixels are repeated all around. line: bytes, with room for LANES
    pixels more."""
    rows, columns = canvas.shape[1], canvas.shape[2]
    plane, source, words = U(rows * columns), address(canvas), pixels.view(np.uint32)
    for y in range(rows):
        target = address(pixels) + U((y + BORDER) * line + 4 * BORDER)
        x = U0
        while x + U(LANES) <= U(columns):
            merge_channels(source + x, plane, target + U4 * x)
            x += U(LANES)
        while x < U(columns):
            for c in range(U3):
                store_uint8(target, U4 * x + c, U(load_uint8(source + c * plane, x)))
            store_uint8(target, U4 * x + U3, U0)
            x += U1
        source += U(columns)
        row = words[y + BORDER]
        row[:BORDER], row[BORDER + columns : 2 * BORDER + columns] = row[BORDER], row[BORDER + columns - 1]
    for y in range(BORDER):
        words[y], words[BORDER + rows + y] = words[BORDER], words[BORDER + rows - 1]


@njit
def show(pixels, height, width, crop, affine, interpolation, fill, out):
    """Show an image of `height` x `width` pixels through `affine` (`tl_fast.plan.PLAN`) in out uint8 [3, H, W].

    pixels: `tl_fast.maths.ycbcr.Pixels`, those that `needed` says; crop: (top, left, height, width) in pixels, which
    set the scale of a rotated or sheared sample: it is first resampled without rotation at the crop's scale, as
    Pillow's resize does before its transform, then warped. Output pixels whose centre is outside the image get `fill`
    uint8 [3].
    """
    if affine[1] == 0.0 and affine[3] == 0.0:
        flip = affine[0] < 0.0
        box_left = np.float64(affine[2]) + min(np.float64(affine[0]), 0.0)
        box = (np.float64(affine[5]), box_left, np.float64(affine[4]), abs(np.float64(affine[0])))
        resample(pixels, height, width, box, flip, interpolation, fill, out)
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
    resample(pixels, height, width, box, False, interpolation, fill, canvas, True)
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
    across = 4 * (canvas.shape[2] + 2 * BORDER + LANES)
    pixels = np.empty((canvas.shape[1] + 2 * BORDER, across), np.uint8)
    _with_border(canvas, pixels, across)
    line = np.empty(4 * (columns + LANES), np.uint8)
    before = 1 if interpolation == BICUBIC else 0  # of the pixels around a point
    starts, xs, ys = np.empty(columns, np.int64), np.empty(columns, np.float32), np.empty(columns, np.float32)
    memory, stride, plane = address(pixels), U(across), U(rows * columns)
    line_in, target = address(line), address(out)
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
        n = last - first
        x_row += first * x_step - x0 + (BORDER - 0.5)
        y_row += first * y_slant - y0 + (BORDER - 0.5)
        for j in range(n):
            x, y = x_row + j * x_step, y_row + j * y_slant
            column, row = np.int32(x), np.int32(y)
            xs[j], ys[j] = x - column, y - row
            starts[j] = (row - before) * across + 4 * (column - before)
        for j in range(U(n)):
            start, pixel = memory + U(starts[j]), line_in + U4 * (U(first) + j)
            if interpolation == BICUBIC:
                weigh_4_around(start, stride, xs[j], ys[j], pixel)
            else:
                weigh_2_around(start, stride, xs[j], ys[j], pixel)
        for begin, end in ((0, first), (last, columns)):
            for j in range(begin, end):
                for c in range(3):
                    line[4 * j + c] = fill[c]
        if columns < LANES:
            for c in range(3):
                for j in range(columns):
                    out[c, i, j] = line[4 * j + c]
        else:
            x = U0
            while x < U(columns):
                x = min(x, U(columns - LANES))  # the last ones overlap those before
                split_channels(line_in + U4 * x, plane, target + x)
                x += U(LANES)
        target += U(columns)
    keep((pixels, line, out))


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
