"""The CUDA kernel that shows images through their plans' affines: one launch a batch, a block a tile of an output.

A tile's canvas, axis-aligned and at the crop's scale, is filtered as `tl_fast.kernels.warp` does it: columns first, into float32 in shared memory, then
rows, rounded to uint8. Where the affine is along the axes that is the output; else it stays in shared memory and is warped from there. Whatever does not
fit is done in parts: rows and columns of a canvas, then sub-tiles of a tile. No pixel outside the decoded region is read, whatever the plan says.
"""
from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32, int32, uint8

from tl_fast import scalar
from tl_fast.kernels.cuda_device import device, peek, scalar32

_filter_range, _filter_weight, _filter_support = scalar32.filter_range, scalar32.filter_weight, scalar32.filter_support
_filter_centre, _cubic_weights = scalar32.filter_centre, scalar32.cubic_weights
BICUBIC = scalar.BICUBIC

REGION = np.dtype([("offset", "<i8"), ("rows", "<i4"), ("columns", "<i4"), ("top", "<i4"), ("left", "<i4"), ("height", "<i4"), ("width", "<i4")])
"""One record a sample: where its decoded pixels, uint8 [rows, columns, 3], begin in the bytes of all; which pixel of the image is their first;
the image's size."""

TILE = 32  # output pixels, square
LINES = 64  # rows and columns of a canvas that one pass makes, at most
ZERO, HALF, ONE, TOP = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(255.0)


@device
def _fill_line(i, start, extent, size, in_size, low, high, interpolation, weights, first, count, line, taps):
    """The filter of canvas line `i` along one axis, as line `line` of the tables: source pixels inside low .. high - 1 and normalised weights.

    Lines whose centre is outside the image get none."""
    begin, end = _filter_range(i, start, extent, size, in_size, interpolation)
    centre = _filter_centre(i, start, extent, size)
    begin, end = min(max(begin, low), high), min(max(end, low), high)
    n = min(max(end - begin, 0), taps)
    if centre < ZERO or centre >= np.float32(in_size):
        n = 0
    first[line] = begin
    count[line] = n
    total = ZERO
    for x in range(begin, begin + n):
        weight = _filter_weight(x, i, start, extent, size, interpolation)
        weights[line * taps + x - begin] = weight
        total += weight
    scale = ONE / total if total != ZERO else ZERO
    for t in range(n):
        weights[line * taps + t] *= scale


@device
def _round(value):
    return np.uint8(np.int32(min(max(value + HALF, ZERO), TOP)))


@device
def _direct(pixels, offset, line_bytes, top, left, rows, columns, y, x, box, size_y, size_x, height, width, interpolation, channel):
    """A canvas pixel's channel straight from the pixels, for scales at which not even one column's filter fits."""
    begin_y, end_y = _filter_range(y, box[0], box[2], size_y, height, interpolation)
    begin_x, end_x = _filter_range(x, box[1], box[3], size_x, width, interpolation)
    begin_y, end_y = max(begin_y, top), min(end_y, top + rows)
    begin_x, end_x = max(begin_x, left), min(end_x, left + columns)
    total, mass = ZERO, ZERO
    for v in range(begin_y, end_y):
        weight_y = _filter_weight(v, y, box[0], box[2], size_y, interpolation)
        line, share = ZERO, ZERO
        for u in range(begin_x, end_x):
            weight = _filter_weight(u, x, box[1], box[3], size_x, interpolation)
            line += weight * np.float32(peek(pixels, offset + (v - top) * line_bytes + 3 * (u - left) + channel))
            share += weight
        total += weight_y * line
        mass += weight_y * share
    return total / mass if mass != ZERO else ZERO


@device
def _clamp(index, low, high):
    return min(max(index, low), high - 1)


def build(tile: int, lines: int, buffer: int, table: int, canvas_size: int):
    """The kernel with tiles of `tile` x `tile` pixels; shared memory for `buffer` float32 between the passes, `table` weights of each axis and a canvas of
    `canvas_size` pixels, at least 25; at most `lines` rows and columns a pass."""
    colours = 3 * canvas_size

    def show(pixels, regions, plans, red, green, blue, out_rows, out_columns, out):
        """Block (x, y, b): tile (x, y) of sample b.

        pixels: uint8 [M]; regions: REGION [B]; plans: `tl_fast.plan.PLAN` [B]; red, green, blue: what lies outside the images; out: uint8
        [B 3 H W], written.
        """
        lines_f = cuda.shared.array(buffer, float32)
        weights_y = cuda.shared.array(table, float32)
        weights_x = cuda.shared.array(table, float32)
        first_y = cuda.shared.array(lines, int32)
        count_y = cuda.shared.array(lines, int32)
        first_x = cuda.shared.array(lines, int32)
        count_x = cuda.shared.array(lines, int32)
        canvas = cuda.shared.array(colours, uint8)
        lane, group, lanes, groups = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.x, cuda.blockDim.y
        thread, threads = group * lanes + lane, lanes * groups
        b = cuda.blockIdx.z
        region, plan = regions[b], plans[b]
        offset, rows, columns = region["offset"], region["rows"], region["columns"]
        top, left, height, width = region["top"], region["left"], region["height"], region["width"]
        affine, interpolation = plan["affine"], plan["interpolation"]
        xu, xv, x0, yu, yv, y0 = affine[0], affine[1], affine[2], affine[3], affine[4], affine[5]
        warped = xv != ZERO or yu != ZERO
        line_bytes = np.int64(columns) * 3
        tile_y, tile_x = cuda.blockIdx.y * tile, cuda.blockIdx.x * tile
        stop_y, stop_x = min(tile_y + tile, out_rows), min(tile_x + tile, out_columns)
        plane = np.int64(out_rows) * out_columns
        out_at = 3 * plane * b

        # What the canvas shows: `box` (top, left, height, width) becomes as many pixels as the output has; it goes on beyond them where it is warped.
        if warped:
            box = (np.float32(plan["top"]), np.float32(plan["left"]), np.float32(plan["height"]), np.float32(plan["width"]))
        else:
            box = (y0, x0 + min(xu, ZERO), yv, abs(xu))
        scale_y, scale_x = box[2] / np.float32(out_rows), box[3] / np.float32(out_columns)
        x_step, x_slant, x_start = xu / box[3], xv / (np.float32(out_rows) * scale_x), (x0 - box[1]) / scale_x
        y_slant, y_step, y_start = yu / (np.float32(out_columns) * scale_y), yv / box[2], (y0 - box[0]) / scale_y
        x_low, x_high = -box[1] / scale_x, (np.float32(width) - box[1]) / scale_x  # the image
        y_low, y_high = -box[0] / scale_y, (np.float32(height) - box[0]) / scale_y
        image_x0, image_x1 = np.int32(math.ceil(x_low - HALF)), np.int32(math.ceil(x_high - HALF))
        image_y0, image_y1 = np.int32(math.ceil(y_low - HALF)), np.int32(math.ceil(y_high - HALF))
        part = np.int32(tile)
        if warped:
            while part > 1:
                reach = np.float32(part - 1)
                across = reach * (abs(x_step) + abs(x_slant)) + np.float32(5.0)
                down = reach * (abs(y_step) + abs(y_slant)) + np.float32(5.0)
                if across * down <= np.float32(canvas_size):
                    break
                part = part >> 1
        # Taps of a line, and from them how many lines fit; none: pixel by pixel.
        taps_y = np.int32(np.float32(2.0) * _filter_support(box[2], out_rows, interpolation)) + 2
        taps_x = np.int32(np.float32(2.0) * _filter_support(box[3], out_columns, interpolation)) + 2
        fits = taps_y <= table and taps_x <= table and 3 * taps_x <= buffer

        for y_part in range(tile_y, stop_y, part):
            for x_part in range(tile_x, stop_x, part):
                y_end, x_end = min(y_part + part, stop_y), min(x_part + part, stop_x)
                top_c, end_c, left_c, right_c = y_part, y_end, x_part, x_end  # the canvas: from, to; across
                if warped:
                    mid_x, mid_y = HALF * np.float32(x_part + x_end), HALF * np.float32(y_part + y_end)
                    half_x, half_y = HALF * np.float32(x_end - x_part - 1), HALF * np.float32(y_end - y_part - 1)
                    middle = x_start + mid_x * x_step + mid_y * x_slant - HALF
                    spread = half_x * abs(x_step) + half_y * abs(x_slant)
                    left_c = max(np.int32(math.floor(middle - spread)) - 1, image_x0)
                    right_c = min(np.int32(math.floor(middle + spread)) + 3, image_x1)
                    middle = y_start + mid_x * y_slant + mid_y * y_step - HALF
                    spread = half_x * abs(y_slant) + half_y * abs(y_step)
                    top_c = max(np.int32(math.floor(middle - spread)) - 1, image_y0)
                    end_c = min(np.int32(math.floor(middle + spread)) + 3, image_y1)
                down, across = end_c - top_c, right_c - left_c
                if fits:
                    down_pass = max(min(min(min(down, lines), table // taps_y), buffer // (3 * taps_x)), 1)
                    room = buffer // (3 * down_pass)
                    across_pass = np.int32(min(np.float32(room - taps_x) / scale_x, np.float32(lines))) + 1
                    across_pass = min(min(across_pass, lines), table // taps_x)
                    for i0 in range(top_c, end_c, down_pass):
                        n_down = min(down_pass, end_c - i0)
                        for j0 in range(left_c, right_c, across_pass):
                            n_across = min(across_pass, right_c - j0)
                            if j0 == left_c:
                                for n in range(thread, n_down, threads):
                                    _fill_line(i0 + n, box[0], box[2], out_rows, height, top, top + rows, interpolation, weights_y, first_y, count_y, n, taps_y)
                            for n in range(threads - 1 - thread, n_across, threads):
                                _fill_line(j0 + n, box[1], box[3], out_columns, width, left, left + columns, interpolation, weights_x, first_x, count_x, n,
                                           taps_x)
                            cuda.syncthreads()
                            begin = first_x[0]
                            span = min(first_x[n_across - 1] + count_x[n_across - 1] - begin, room)
                            for i in range(group, n_down, groups):
                                start = offset + (first_y[i] - top) * line_bytes + 3 * (begin - left)
                                n = count_y[i]
                                for x in range(lane, span, lanes):
                                    at = start + 3 * x
                                    total_r, total_g, total_b = ZERO, ZERO, ZERO
                                    for t in range(n):
                                        weight = peek(weights_y, i * taps_y + t)
                                        total_r += weight * np.float32(peek(pixels, at))
                                        total_g += weight * np.float32(peek(pixels, at + 1))
                                        total_b += weight * np.float32(peek(pixels, at + 2))
                                        at += line_bytes
                                    place = 3 * (i * span + x)
                                    lines_f[place] = total_r
                                    lines_f[place + 1] = total_g
                                    lines_f[place + 2] = total_b
                            cuda.syncthreads()
                            for i in range(group, n_down, groups):
                                for j in range(lane, n_across, lanes):
                                    place = 3 * (i * span + first_x[j] - begin)
                                    n = count_x[j]
                                    total_r, total_g, total_b = ZERO, ZERO, ZERO
                                    for t in range(n):
                                        weight = peek(weights_x, j * taps_x + t)
                                        total_r += weight * peek(lines_f, place)
                                        total_g += weight * peek(lines_f, place + 1)
                                        total_b += weight * peek(lines_f, place + 2)
                                        place += 3
                                    if warped:
                                        place = (i0 + i - top_c) * across + j0 + j - left_c
                                        canvas[place] = _round(total_r)
                                        canvas[place + canvas_size] = _round(total_g)
                                        canvas[place + 2 * canvas_size] = _round(total_b)
                                    else:
                                        column = out_columns - 1 - (j0 + j) if xu < ZERO else j0 + j
                                        at = out_at + np.int64(i0 + i) * out_columns + column
                                        inside = n > 0 and count_y[i] > 0
                                        out[at] = _round(total_r) if inside else red
                                        out[at + plane] = _round(total_g) if inside else green
                                        out[at + 2 * plane] = _round(total_b) if inside else blue
                            cuda.syncthreads()
                else:
                    for n in range(thread, 3 * max(down, 0) * max(across, 0), threads):
                        c = n // (down * across)
                        place = n - c * (down * across)
                        i, j = place // across, place % across
                        inside = image_y0 <= top_c + i < image_y1 and image_x0 <= left_c + j < image_x1
                        value = _round(_direct(pixels, offset, line_bytes, top, left, rows, columns, top_c + i, left_c + j, box, out_rows, out_columns,
                                               height, width, interpolation, c))
                        if warped:
                            canvas[c * canvas_size + place] = value
                        else:
                            column = out_columns - 1 - (left_c + j) if xu < ZERO else left_c + j
                            fill = red if c == 0 else green if c == 1 else blue
                            out[out_at + c * plane + np.int64(top_c + i) * out_columns + column] = value if inside else fill
                    cuda.syncthreads()
                if warped:
                    for i in range(y_part + group, y_end, groups):
                        for j in range(x_part + lane, x_end, lanes):
                            x = x_start + (np.float32(i) + HALF) * x_slant + (np.float32(j) + HALF) * x_step
                            y = y_start + (np.float32(i) + HALF) * y_step + (np.float32(j) + HALF) * y_slant
                            at = out_at + np.int64(i) * out_columns + j
                            if x < x_low or x >= x_high or y < y_low or y >= y_high or down <= 0 or across <= 0:
                                out[at], out[at + plane], out[at + 2 * plane] = red, green, blue
                                continue
                            x -= HALF
                            y -= HALF
                            column, line = np.int32(math.floor(x)), np.int32(math.floor(y))
                            x -= np.float32(column)
                            y -= np.float32(line)
                            if interpolation == BICUBIC:
                                wx0, wx1, wx2, wx3 = _cubic_weights(x)
                                wy0, wy1, wy2, wy3 = _cubic_weights(y)
                            else:
                                wx0, wx1, wx2, wx3 = ZERO, ONE - x, x, ZERO
                                wy0, wy1, wy2, wy3 = ZERO, ONE - y, y, ZERO
                            at0, at1 = _clamp(column - 1, left_c, right_c) - left_c, _clamp(column, left_c, right_c) - left_c
                            at2, at3 = _clamp(column + 1, left_c, right_c) - left_c, _clamp(column + 2, left_c, right_c) - left_c
                            for c in range(3):
                                total = ZERO
                                for tap in range(4):
                                    wy = wy0 if tap == 0 else wy1 if tap == 1 else wy2 if tap == 2 else wy3
                                    if wy != ZERO:
                                        place = c * canvas_size + (_clamp(line - 1 + tap, top_c, end_c) - top_c) * across
                                        total += wy * (
                                            wx0 * np.float32(peek(canvas, place + at0)) + wx1 * np.float32(peek(canvas, place + at1))
                                            + wx2 * np.float32(peek(canvas, place + at2)) + wx3 * np.float32(peek(canvas, place + at3))
                                        )  # fmt: skip
                                out[at + c * plane] = _round(total)
                    cuda.syncthreads()

    return show


SHOW = build(tile=TILE, lines=LINES, buffer=6144, table=1024, canvas_size=4096)
