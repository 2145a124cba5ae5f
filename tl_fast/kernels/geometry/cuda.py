"""The CUDA kernel that shows images through their plans' affines: one launch a batch, a block a tile of an output.

A tile's canvas, axis-aligned and at the crop's scale, is filtered as `tl_fast.kernels.geometry.cpu` does it: columns
first, into float32 in shared memory, then rows, rounded to uint8. Where the affine is along the axes that is the
output; else it stays in shared memory and is warped from there. Whatever does not fit is done in parts: rows and
columns of a canvas, then sub-tiles of a tile. No pixel outside the decoded region is read, whatever the plan says.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32, int32, uint8

from tl_fast.kernels.cuda_device import device, peek, poke, scalar32
from tl_fast.maths import scalar

_filter_range, _filter_weight, _filter_support = scalar32.filter_range, scalar32.filter_weight, scalar32.filter_support
_filter_centre, _cubic_weights = scalar32.filter_centre, scalar32.cubic_weights
BICUBIC = scalar.BICUBIC

REGION = np.dtype(
    [("offset", "<i8"), *((name, "<i4") for name in ("rows", "columns", "top", "left", "height", "width"))], align=True
)
"""One record a sample: where its decoded pixels, uint8 [rows, columns, 3], begin in the bytes of all; which pixel of
the image is their first; the image's size."""

I = np.int32  # numba makes int64 of every sum of int32: casts let the compiler go back  # noqa: E741

TILE = 32  # output pixels, square
BOUNDS = (
    256,
    2,
)  # threads of a block; blocks that a multiprocessor shall have room for: 128 registers each, 80 would spill
# Shared memory of a block.
BOX_TOP, BOX_LEFT, BOX_HEIGHT, BOX_WIDTH, SCALE_X, XU = range(6)
X_STEP, X_SLANT, X_START, Y_SLANT, Y_STEP, Y_START, X_LOW, X_HIGH, Y_LOW, Y_HIGH = range(6, 16)
(
    IMAGE_X0,
    IMAGE_X1,
    IMAGE_Y0,
    IMAGE_Y1,
    TOP,
    LEFT,
    ROWS,
    COLUMNS,
    HEIGHT,
    WIDTH,
    INTERPOLATION,
    WARPED,
    TAPS_Y,
    TAPS_X,
    PART,
) = range(15)
FLOATS, INTEGERS = 16, 15
LINES = 64  # rows and columns of a canvas that one pass makes, at most
ZERO, HALF, ONE, WHITE = np.float32(0.0), np.float32(0.5), np.float32(1.0), np.float32(255.0)


@device
def _fill_line(i, start, extent, size, in_size, low, length, interpolation, weights, first, count, line, taps):
    """The filter of canvas line `i` along one axis, as line `line` of the tables: source pixels inside low .. low +
    length - 1 and normalised weights.

    Lines whose centre is outside the image get none."""
    begin, end = _filter_range(i, start, extent, size, in_size, interpolation)
    centre = _filter_centre(i, start, extent, size)
    begin, end = I(min(max(begin, low), low + length)), I(min(max(end, low), low + length))
    n = I(min(max(end - begin, 0), taps))
    if centre < ZERO or centre >= np.float32(in_size):
        n = I(0)
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
    return np.uint8(np.int32(min(max(value + HALF, ZERO), WHITE)))


@device
def _place(region, plan, out_rows, out_columns, tile, canvas_size, real, whole):
    """What all threads of a block need of a sample, to shared memory: the canvas' box in the image, the affine from
    output pixels to the canvas, sizes."""
    affine, interpolation = plan["affine"], I(plan["interpolation"])
    xu, xv, x0, yu, yv, y0 = affine[0], affine[1], affine[2], affine[3], affine[4], affine[5]
    warped = xv != ZERO or yu != ZERO
    # The canvas shows this box (top, left, height, width) in as many pixels as the output has; where it is warped it
    # goes on beyond them.
    if warped:
        top, left, high, wide = (
            np.float32(plan["top"]),
            np.float32(plan["left"]),
            np.float32(plan["height"]),
            np.float32(plan["width"]),
        )
    else:
        top, left, high, wide = y0, x0 + min(xu, ZERO), yv, abs(xu)
    scale_y, scale_x = high / np.float32(out_rows), wide / np.float32(out_columns)
    real[BOX_TOP], real[BOX_LEFT], real[BOX_HEIGHT], real[BOX_WIDTH] = top, left, high, wide
    real[SCALE_X], real[XU] = scale_x, xu
    real[X_STEP], real[X_SLANT], real[X_START] = xu / wide, xv / (np.float32(out_rows) * scale_x), (x0 - left) / scale_x
    real[Y_SLANT], real[Y_STEP], real[Y_START] = (
        yu / (np.float32(out_columns) * scale_y),
        yv / high,
        (y0 - top) / scale_y,
    )
    height, width = I(region["height"]), I(region["width"])
    real[X_LOW], real[X_HIGH] = -left / scale_x, (np.float32(width) - left) / scale_x  # the image
    real[Y_LOW], real[Y_HIGH] = -top / scale_y, (np.float32(height) - top) / scale_y
    whole[IMAGE_X0], whole[IMAGE_X1] = math.ceil(real[X_LOW] - HALF), math.ceil(real[X_HIGH] - HALF)
    whole[IMAGE_Y0], whole[IMAGE_Y1] = math.ceil(real[Y_LOW] - HALF), math.ceil(real[Y_HIGH] - HALF)
    whole[TOP], whole[LEFT], whole[ROWS], whole[COLUMNS] = (
        region["top"],
        region["left"],
        region["rows"],
        region["columns"],
    )
    whole[HEIGHT], whole[WIDTH], whole[INTERPOLATION], whole[WARPED] = height, width, interpolation, I(warped)
    whole[TAPS_Y] = I(np.float32(2.0) * _filter_support(high, out_rows, interpolation)) + 2
    whole[TAPS_X] = I(np.float32(2.0) * _filter_support(wide, out_columns, interpolation)) + 2
    part = I(tile)
    while warped and part > 1:
        reach = np.float32(part - 1)
        across = reach * (abs(real[X_STEP]) + abs(real[X_SLANT])) + np.float32(5.0)
        down = reach * (abs(real[Y_STEP]) + abs(real[Y_SLANT])) + np.float32(5.0)
        if across * down <= np.float32(canvas_size):
            break
        part = I(part >> 1)
    whole[PART] = part


@device
def _direct(pixels, offset, y, x, real, whole, out_rows, out_columns, channel):
    """A canvas pixel's channel straight from the pixels, for scales at which not even one column's filter fits."""
    top, left, interpolation = whole[TOP], whole[LEFT], whole[INTERPOLATION]
    begin_y, end_y = _filter_range(y, real[BOX_TOP], real[BOX_HEIGHT], out_rows, whole[HEIGHT], interpolation)
    begin_x, end_x = _filter_range(x, real[BOX_LEFT], real[BOX_WIDTH], out_columns, whole[WIDTH], interpolation)
    begin_y, end_y = I(max(begin_y, top)), I(min(end_y, top + whole[ROWS]))
    begin_x, end_x = I(max(begin_x, left)), I(min(end_x, left + whole[COLUMNS]))
    total, mass = ZERO, ZERO
    for v in range(begin_y, end_y):
        weight_y = _filter_weight(v, y, real[BOX_TOP], real[BOX_HEIGHT], out_rows, interpolation)
        at = offset + 3 * ((v - top) * np.int64(whole[COLUMNS]) + begin_x - left) + channel
        line, share = ZERO, ZERO
        for u in range(begin_x, end_x):
            weight = _filter_weight(u, x, real[BOX_LEFT], real[BOX_WIDTH], out_columns, interpolation)
            line += weight * np.float32(peek(pixels, at))
            share += weight
            at += 3
        total += weight_y * line
        mass += weight_y * share
    return total / mass if mass != ZERO else ZERO


@device
def _clamp(index, low, high):
    return min(max(index, low), high - 1)


def build(tile: int, lines: int, buffer: int, table: int, canvas_size: int):
    """The kernel with tiles of `tile` x `tile` pixels; shared memory for `buffer` float32 between the passes, `table`
    weights of each axis and a canvas of `canvas_size` pixels, at least 25; at most `lines` rows and columns a pass."""
    colours = 3 * canvas_size

    def show(pixels, regions, plans, red, green, blue, out_rows, out_columns, out):
        """Block (x, y, b): tile (x, y) of sample b.

        pixels: uint8 [M]; regions: REGION [B]; plans: `tl_fast.plan.PLAN` [B]; red, green, blue: what lies outside the
        images; out: uint8 [B 3 H W], written.
        """
        lines_f = cuda.shared.array(buffer, float32)
        weights_y = cuda.shared.array(table, float32)
        weights_x = cuda.shared.array(table, float32)
        first_y = cuda.shared.array(lines, int32)
        count_y = cuda.shared.array(lines, int32)
        first_x = cuda.shared.array(lines, int32)
        count_x = cuda.shared.array(lines, int32)
        canvas = cuda.shared.array(colours, uint8)
        real = cuda.shared.array(FLOATS, float32)
        whole = cuda.shared.array(INTEGERS, int32)
        lane, group, lanes, groups = I(cuda.threadIdx.x), I(cuda.threadIdx.y), I(cuda.blockDim.x), I(cuda.blockDim.y)
        thread, threads = I(group * lanes + lane), I(lanes * groups)
        out_rows, out_columns = I(out_rows), I(out_columns)
        b = I(cuda.blockIdx.z)
        if thread == 0:
            _place(regions[b], plans[b], out_rows, out_columns, tile, canvas_size, real, whole)
        cuda.syncthreads()
        offset = np.int64(regions[b]["offset"])
        line_bytes = I(3 * whole[COLUMNS])
        interpolation, warped, part = whole[INTERPOLATION], whole[WARPED] != 0, whole[PART]
        tile_y, tile_x = I(cuda.blockIdx.y * tile), I(cuda.blockIdx.x * tile)
        stop_y, stop_x = I(min(tile_y + tile, out_rows)), I(min(tile_x + tile, out_columns))
        plane = I(out_rows * out_columns)
        out_at = np.int64(3 * plane) * b
        # Taps of a line, and from them how many lines fit; none: pixel by pixel.
        taps_y, taps_x = whole[TAPS_Y], whole[TAPS_X]
        fits = taps_y <= table and taps_x <= table and 3 * taps_x <= buffer

        for y_part in range(tile_y, stop_y, part):
            for x_part in range(tile_x, stop_x, part):
                y_end, x_end = I(min(y_part + part, stop_y)), I(min(x_part + part, stop_x))
                top_c, end_c, left_c, right_c = y_part, y_end, x_part, x_end  # the canvas: from, to; across
                if warped:
                    mid_x, mid_y = HALF * np.float32(x_part + x_end), HALF * np.float32(y_part + y_end)
                    half_x, half_y = HALF * np.float32(x_end - x_part - 1), HALF * np.float32(y_end - y_part - 1)
                    middle = real[X_START] + mid_x * real[X_STEP] + mid_y * real[X_SLANT] - HALF
                    spread = half_x * abs(real[X_STEP]) + half_y * abs(real[X_SLANT])
                    left_c = I(max(np.int32(math.floor(middle - spread)) - 1, whole[IMAGE_X0]))
                    right_c = I(min(np.int32(math.floor(middle + spread)) + 3, whole[IMAGE_X1]))
                    middle = real[Y_START] + mid_x * real[Y_SLANT] + mid_y * real[Y_STEP] - HALF
                    spread = half_x * abs(real[Y_SLANT]) + half_y * abs(real[Y_STEP])
                    top_c = I(max(np.int32(math.floor(middle - spread)) - 1, whole[IMAGE_Y0]))
                    end_c = I(min(np.int32(math.floor(middle + spread)) + 3, whole[IMAGE_Y1]))
                down, across = I(end_c - top_c), I(right_c - left_c)
                if fits:
                    down_pass = I(max(min(min(min(down, lines), table // taps_y), buffer // (3 * taps_x)), 1))
                    room = I(buffer // (3 * down_pass))
                    across_pass = I(I(min(np.float32(room - taps_x) / real[SCALE_X], np.float32(lines))) + 1)
                    across_pass = I(min(min(across_pass, lines), table // taps_x))
                    for i0 in range(top_c, end_c, down_pass):
                        n_down = I(min(down_pass, end_c - i0))
                        for j0 in range(left_c, right_c, across_pass):
                            n_across = I(min(across_pass, right_c - j0))
                            if j0 == left_c:
                                for n in range(thread, n_down, threads):
                                    _fill_line(
                                        I(i0 + n),
                                        real[BOX_TOP],
                                        real[BOX_HEIGHT],
                                        out_rows,
                                        whole[HEIGHT],
                                        whole[TOP],
                                        whole[ROWS],
                                        interpolation,
                                        weights_y,
                                        first_y,
                                        count_y,
                                        n,
                                        taps_y,
                                    )
                            for n in range(I(threads - 1 - thread), n_across, threads):
                                _fill_line(
                                    I(j0 + n),
                                    real[BOX_LEFT],
                                    real[BOX_WIDTH],
                                    out_columns,
                                    whole[WIDTH],
                                    whole[LEFT],
                                    whole[COLUMNS],
                                    interpolation,
                                    weights_x,
                                    first_x,
                                    count_x,
                                    n,
                                    taps_x,
                                )
                            cuda.syncthreads()
                            begin = first_x[0]
                            span = I(min(first_x[n_across - 1] + count_x[n_across - 1] - begin, room))
                            for i in range(group, n_down, groups):
                                start = (
                                    offset
                                    + I(peek(first_y, i) - whole[TOP]) * np.int64(line_bytes)
                                    + I(3 * (begin - whole[LEFT]))
                                )
                                n = peek(count_y, i)
                                for x in range(lane, span, lanes):
                                    at = start + I(3 * x)
                                    total_r, total_g, total_b = ZERO, ZERO, ZERO
                                    for t in range(n):
                                        weight = peek(weights_y, I(i * taps_y + t))
                                        total_r += weight * np.float32(peek(pixels, at))
                                        total_g += weight * np.float32(peek(pixels, at + 1))
                                        total_b += weight * np.float32(peek(pixels, at + 2))
                                        at += line_bytes
                                    place = I(3 * (i * span + x))
                                    poke(lines_f, place, total_r)
                                    poke(lines_f, place + 1, total_g)
                                    poke(lines_f, place + 2, total_b)
                            cuda.syncthreads()
                            for i in range(group, n_down, groups):
                                for j in range(lane, n_across, lanes):
                                    place = I(3 * (i * span + peek(first_x, j) - begin))
                                    n = peek(count_x, j)
                                    total_r, total_g, total_b = ZERO, ZERO, ZERO
                                    for t in range(n):
                                        weight = peek(weights_x, I(j * taps_x + t))
                                        total_r += weight * peek(lines_f, place)
                                        total_g += weight * peek(lines_f, place + 1)
                                        total_b += weight * peek(lines_f, place + 2)
                                        place = I(place + 3)
                                    if warped:
                                        place = I((i0 + i - top_c) * across + j0 + j - left_c)
                                        poke(canvas, place, _round(total_r))
                                        poke(canvas, place + canvas_size, _round(total_g))
                                        poke(canvas, place + 2 * canvas_size, _round(total_b))
                                    else:
                                        column = I(out_columns - 1 - (j0 + j)) if real[XU] < ZERO else I(j0 + j)
                                        at = out_at + I((i0 + i) * out_columns + column)
                                        inside = n > 0 and peek(count_y, i) > 0
                                        poke(out, at, _round(total_r) if inside else red)
                                        poke(out, at + plane, _round(total_g) if inside else green)
                                        poke(out, at + I(2 * plane), _round(total_b) if inside else blue)
                            cuda.syncthreads()
                else:
                    for n in range(thread, 3 * max(down, 0) * max(across, 0), threads):
                        c = n // (down * across)
                        place = n - c * (down * across)
                        i, j = place // across, place % across
                        inside = (
                            whole[IMAGE_Y0] <= top_c + i < whole[IMAGE_Y1]
                            and whole[IMAGE_X0] <= left_c + j < whole[IMAGE_X1]
                        )
                        value = _round(
                            _direct(pixels, offset, I(top_c + i), I(left_c + j), real, whole, out_rows, out_columns, c)
                        )
                        if warped:
                            canvas[c * canvas_size + place] = value
                        else:
                            column = out_columns - 1 - (left_c + j) if real[XU] < ZERO else left_c + j
                            fill = red if c == 0 else green if c == 1 else blue
                            out[out_at + c * plane + np.int64(top_c + i) * out_columns + column] = (
                                value if inside else fill
                            )
                    cuda.syncthreads()
                if warped:
                    for i in range(y_part + group, y_end, groups):
                        for j in range(x_part + lane, x_end, lanes):
                            x = (
                                real[X_START]
                                + (np.float32(i) + HALF) * real[X_SLANT]
                                + (np.float32(j) + HALF) * real[X_STEP]
                            )
                            y = (
                                real[Y_START]
                                + (np.float32(i) + HALF) * real[Y_STEP]
                                + (np.float32(j) + HALF) * real[Y_SLANT]
                            )
                            at = out_at + I(i * out_columns + j)
                            if (
                                x < real[X_LOW]
                                or x >= real[X_HIGH]
                                or y < real[Y_LOW]
                                or y >= real[Y_HIGH]
                                or down <= 0
                                or across <= 0
                            ):
                                poke(out, at, red)
                                poke(out, at + plane, green)
                                poke(out, at + I(2 * plane), blue)
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
                            at0, at1 = (
                                I(_clamp(column - 1, left_c, right_c) - left_c),
                                I(_clamp(column, left_c, right_c) - left_c),
                            )
                            at2, at3 = (
                                I(_clamp(column + 1, left_c, right_c) - left_c),
                                I(_clamp(column + 2, left_c, right_c) - left_c),
                            )
                            for c in range(3):
                                total = ZERO
                                for tap in range(4):
                                    wy = wy0 if tap == 0 else wy1 if tap == 1 else wy2 if tap == 2 else wy3
                                    if wy != ZERO:
                                        place = I(
                                            c * canvas_size + (_clamp(line - 1 + tap, top_c, end_c) - top_c) * across
                                        )
                                        total += wy * (
                                            wx0 * np.float32(peek(canvas, place + at0))
                                            + wx1 * np.float32(peek(canvas, place + at1))
                                            + wx2 * np.float32(peek(canvas, place + at2))
                                            + wx3 * np.float32(peek(canvas, place + at3))
                                        )
                                poke(out, at + I(c * plane), _round(total))
                    cuda.syncthreads()

    return show


SHOW = build(tile=TILE, lines=LINES, buffer=6144, table=1024, canvas_size=4096)
