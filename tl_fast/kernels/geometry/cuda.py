"""The CUDA kernel that shows images through their plans' affines: one launch a batch, a block a tile of an output.

A tile's canvas, axis-aligned and at the crop's scale, is filtered as `tl_fast.kernels.geometry.cpu` does it: along x
first, rounded to uint8 in shared memory, then along y, rounded again. Where the affine is along the axes that is the
output; else the canvas stays in shared memory and is warped from there. Whatever does not fit shared memory is done in
parts: a canvas in bands of rows and columns, a tile in quarters. No pixel outside the decoded region is read, whatever
the plan says.

A sample's pixels are RGB or YUV 4:2:0 planes. Planes are upsampled and converted where the first pass reads them, to
the bit as libjpeg does it; `_filter_plane_rows` says what that costs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import cuda, float32, int32, uint8

from tl_fast.kernels.cuda_device import HALF, ONE, ZERO, I, device, gpu, peek, poke, scalar32
from tl_fast.maths import scalar, ycbcr

_filter_range, _filter_weight, _filter_support = scalar32.filter_range, scalar32.filter_weight, scalar32.filter_support
_filter_centre, _cubic_weights = scalar32.filter_centre, scalar32.cubic_weights
_chroma_range, _chroma_neighbour = scalar32.chroma_range, scalar32.chroma_neighbour
_chroma_mix, _chroma_of, _rgb_of = scalar32.chroma_mix, scalar32.chroma_of, scalar32.rgb_of
BICUBIC = scalar.BICUBIC

_NUMBERS = "rows", "columns", "top", "left", "height", "width", "planes"
REGION = np.dtype([("offset", "<i8"), *((name, "<i4") for name in _NUMBERS)], align=True)
"""One record a sample. Its pixels begin at byte `offset` of all samples'; the first of them is pixel (top, left) of an
image of height x width. Where `planes` is 0 they are RGB, uint8 [rows, columns, 3]. Else they are YUV 4:2:0 planes: Y,
uint8 [rows, columns], then Cb and Cr, each the samples that `tl_fast.maths.scalar.chroma_range` names."""

TILE = 32  # output pixels, square
# Threads of a block, and blocks that a multiprocessor shall have room for: 128 registers a thread; 80 would spill.
BOUNDS = 256, 2
# What the threads of a block share of a sample: float32 `real`, then int32 `whole`.
BOX_TOP, BOX_LEFT, BOX_HEIGHT, BOX_WIDTH, SCALE_Y, XU = range(6)
X_STEP, X_SLANT, X_START, Y_SLANT, Y_STEP, Y_START, X_LOW, X_HIGH, Y_LOW, Y_HIGH = range(6, 16)
IMAGE_X0, IMAGE_X1, IMAGE_Y0, IMAGE_Y1, TOP, LEFT, ROWS, COLUMNS, HEIGHT, WIDTH = range(10)
INTERPOLATION, WARPED, TAPS_Y, TAPS_X, PART = range(10, 15)
PLANES, CHROMA_TOP, CHROMA_LEFT, CHROMA_ROWS, CHROMA_COLUMNS = range(15, 20)
FLOATS, INTEGERS = 16, 20
SMOOTHED = 2 * ycbcr.SMOOTHED - 1  # columns of an image of planes from which on its chroma is smoothed
LINES = 64  # rows and columns of a canvas that one pass makes, at most
WHITE = np.float32(255.0)
PRECISION = scalar.PRECISION
UNIT, HALF_UNIT = np.float32(1 << PRECISION), I(1 << (PRECISION - 1))


class Box(NamedTuple):
    """Rows top .. end - 1, columns left .. right - 1 of the output or of a canvas."""

    top: int
    end: int
    left: int
    right: int


class Output(NamedTuple):
    """uint8 pixels [B 3 H W]; the sample's `first`; its size H x W; the colour of what lies outside its image."""

    pixels: Any
    first: int
    rows: int
    columns: int
    fill: tuple[int, int, int]


class Filters(NamedTuple):
    """The filters of canvas lines along one axis: `taps` weights a line, its first source pixel, how many it has; all
    int32."""

    weights: Any
    first: Any
    count: Any
    taps: int


@device
def _fill_line(i, shown, size, image, interpolation, filters, line, warped):
    """The filter of canvas line `i` along one axis, as line `line` of the tables: source pixels and weights, whose sum
    is about 2^PRECISION.

    shown: (start, extent) of what `size` canvas lines show; image: (its size, first pixel and number of the decoded
    ones). Lines whose centre is outside the image get no pixels; of a warped sample there are none, even if rounding
    puts a centre that is on the image's edge beyond it."""
    start, extent = shown
    in_size, low, length = image
    weights, first, count, taps = filters
    begin, end = _filter_range(i, start, extent, size, in_size, interpolation)
    centre = _filter_centre(i, start, extent, size)
    begin, end = I(min(max(begin, low), low + length)), I(min(max(end, low), low + length))
    n = I(min(max(end - begin, 0), taps))
    if not warped and (centre < ZERO or centre >= np.float32(in_size)):
        n = I(0)
    first[line] = begin
    count[line] = n
    total = ZERO
    for x in range(begin, begin + n):
        total += _filter_weight(x, i, start, extent, size, interpolation)
    for x in range(begin, begin + n):
        weight = _filter_weight(x, i, start, extent, size, interpolation) / total * UNIT
        weights[line * taps + x - begin] = np.int32(weight + HALF if weight >= ZERO else weight - HALF)


@device
def _clip(total):
    """A sum of weighted bytes as a byte, rounded and clipped as Pillow's `clip8`."""
    return np.uint8(min(max(total >> PRECISION, I(0)), I(255)))


@device
def _round(value):
    return np.uint8(np.int32(min(max(value + HALF, ZERO), WHITE)))


@device
def _place(region, plan, out_rows, out_columns, tile, canvas_size, real, whole):
    """By one thread, to shared memory: the box of the image that the canvas shows, the affine from output pixels to
    the canvas, sizes."""
    affine, interpolation = plan["affine"], I(plan["interpolation"])
    xu, xv, x0, yu, yv, y0 = affine[0], affine[1], affine[2], affine[3], affine[4], affine[5]
    warped = xv != ZERO or yu != ZERO
    # This box fills as many canvas pixels as the output has; the canvas of a warped sample goes on beyond the box.
    if warped:
        top, left = np.float32(plan["top"]), np.float32(plan["left"])
        high, wide = np.float32(plan["height"]), np.float32(plan["width"])
    else:
        top, left, high, wide = y0, x0 + min(xu, ZERO), yv, abs(xu)
    scale_y, scale_x = high / np.float32(out_rows), wide / np.float32(out_columns)
    real[BOX_TOP], real[BOX_LEFT], real[BOX_HEIGHT], real[BOX_WIDTH] = top, left, high, wide
    real[SCALE_Y], real[XU] = scale_y, xu
    x_slant, y_slant = xv / (np.float32(out_rows) * scale_x), yu / (np.float32(out_columns) * scale_y)
    real[X_STEP], real[X_SLANT], real[X_START] = xu / wide, x_slant, (x0 - left) / scale_x
    real[Y_SLANT], real[Y_STEP], real[Y_START] = y_slant, yv / high, (y0 - top) / scale_y
    height, width = I(region["height"]), I(region["width"])
    real[X_LOW], real[X_HIGH] = -left / scale_x, (np.float32(width) - left) / scale_x  # the image
    real[Y_LOW], real[Y_HIGH] = -top / scale_y, (np.float32(height) - top) / scale_y
    whole[IMAGE_X0], whole[IMAGE_X1] = math.ceil(real[X_LOW] - HALF), math.ceil(real[X_HIGH] - HALF)
    whole[IMAGE_Y0], whole[IMAGE_Y1] = math.ceil(real[Y_LOW] - HALF), math.ceil(real[Y_HIGH] - HALF)
    whole[TOP], whole[LEFT] = region["top"], region["left"]
    whole[ROWS], whole[COLUMNS] = region["rows"], region["columns"]
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
    whole[PLANES] = region["planes"]
    first, stop = _chroma_range(whole[TOP], I(whole[TOP] + whole[ROWS]), height)
    whole[CHROMA_TOP], whole[CHROMA_ROWS] = first, stop - first
    first, stop = _chroma_range(whole[LEFT], I(whole[LEFT] + whole[COLUMNS]), width)
    whole[CHROMA_LEFT], whole[CHROMA_COLUMNS] = first, stop - first


@device
def _mix_rows(pixels, index, beside, plane):
    """Cb and Cr between two rows of samples: `_chroma_mix` of those at byte `index` and `beside` bytes behind it.
    plane: bytes from Cb to Cr."""
    blue = _chroma_mix(peek(pixels, index), peek(pixels, index + beside))
    index += plane
    return blue, _chroma_mix(peek(pixels, index), peek(pixels, index + beside))


@device
def _plane_pixel(pixels, offset, v, u, whole, channel):
    """A channel of pixel (v, u) of an image whose region is planes."""
    chroma_bytes, row, column = whole[CHROMA_COLUMNS], I(v >> 1), I(u >> 1)
    other_row, other_column = _chroma_neighbour(v, whole[HEIGHT]), _chroma_neighbour(u, whole[WIDTH])
    if whole[WIDTH] < SMOOTHED:
        other_row, other_column = row, column
    chroma = offset + whole[ROWS] * np.int64(whole[COLUMNS]) + I(row - whole[CHROMA_TOP]) * np.int64(chroma_bytes)
    chroma -= whole[CHROMA_LEFT]
    beside, plane = I((other_row - row) * chroma_bytes), I(whole[CHROMA_ROWS] * chroma_bytes)
    blue, red = _mix_rows(pixels, chroma + column, beside, plane)
    other = _mix_rows(pixels, chroma + other_column, beside, plane)
    blue, red = _chroma_of(_chroma_mix(blue, other[0]), u), _chroma_of(_chroma_mix(red, other[1]), u)
    luma = peek(pixels, offset + I(v - whole[TOP]) * np.int64(whole[COLUMNS]) + I(u - whole[LEFT]))
    rgb = _rgb_of(I(luma), blue, red)
    return np.float32(rgb[0] if channel == 0 else rgb[1] if channel == 1 else rgb[2])


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
        index = offset + 3 * ((v - top) * np.int64(whole[COLUMNS]) + begin_x - left) + channel
        line, share = ZERO, ZERO
        for u in range(begin_x, end_x):
            weight = _filter_weight(u, x, real[BOX_LEFT], real[BOX_WIDTH], out_columns, interpolation)
            if whole[PLANES] == 0:
                line += weight * np.float32(peek(pixels, index))
            else:
                line += weight * _plane_pixel(pixels, offset, I(v), I(u), whole, channel)
            share += weight
            index += 3
        total += weight_y * np.float32(_round(line / share if share != ZERO else ZERO))
        mass += weight_y
    return total / mass if mass != ZERO else ZERO


@device
def _clamp(index, low, high):
    return min(max(index, low), high - 1)


@device
def _canvas_of(part, real, whole):
    """The canvas pixels that an output part is made from: of a warped sample those that 4 x 4 taps read, as far as the
    image goes."""
    top, end, left, right = part
    if whole[WARPED] != 0:
        mid_x, mid_y = HALF * np.float32(left + right), HALF * np.float32(top + end)
        half_x, half_y = HALF * np.float32(right - left - 1), HALF * np.float32(end - top - 1)
        middle = real[X_START] + mid_x * real[X_STEP] + mid_y * real[X_SLANT] - HALF
        spread = half_x * abs(real[X_STEP]) + half_y * abs(real[X_SLANT])
        left = I(max(np.int32(math.floor(middle - spread)) - 1, whole[IMAGE_X0]))
        right = I(min(np.int32(math.floor(middle + spread)) + 3, whole[IMAGE_X1]))
        middle = real[Y_START] + mid_x * real[Y_SLANT] + mid_y * real[Y_STEP] - HALF
        spread = half_x * abs(real[Y_SLANT]) + half_y * abs(real[Y_STEP])
        top = I(max(np.int32(math.floor(middle - spread)) - 1, whole[IMAGE_Y0]))
        end = I(min(np.int32(math.floor(middle + spread)) + 3, whole[IMAGE_Y1]))
    return Box(top, end, left, right)


@device
def _filter_rows(pixels, first_byte, line_bytes, left, span, n_across, filters, lines):
    """The first pass: `span` source rows of `n_across` canvas columns, three bytes each, to `lines`. first_byte: of the
    first row's first decoded pixel, which is in column `left` of the image."""
    group, groups, lane, lanes = I(gpu.threadIdx.y), I(gpu.blockDim.y), I(gpu.threadIdx.x), I(gpu.blockDim.x)
    for v in range(group, span, groups):
        start = first_byte + I(v) * np.int64(line_bytes)
        for j in range(lane, n_across, lanes):
            byte = start + I(3 * (peek(filters.first, j) - left))
            red, green, blue = HALF_UNIT, HALF_UNIT, HALF_UNIT
            for t in range(peek(filters.count, j)):
                weight = peek(filters.weights, I(j * filters.taps + t))
                red = I(red + weight * I(peek(pixels, byte)))
                green = I(green + weight * I(peek(pixels, byte + 1)))
                blue = I(blue + weight * I(peek(pixels, byte + 2)))
                byte += 3
            index = I(3 * (v * n_across + j))
            poke(lines, index, _clip(red))
            poke(lines, index + 1, _clip(green))
            poke(lines, index + 2, _clip(blue))


@device
def _filter_plane_rows(pixels, offset, begin, span, n_across, filters, whole, lines):
    """As `_filter_rows` from planes, whose first byte is `offset`, for `span` rows from row `begin` of the image on.

    A thread that goes along a row keeps the two columns of chroma around it. So a pixel takes three bytes on average,
    as RGB does: one of Y, and for every other pixel two of Cb and two of Cr. It is converted each time that a canvas
    column takes it, bilinear twice or more often, for some 60 instructions of PTX where RGB takes 21."""
    group, groups, lane, lanes = I(gpu.threadIdx.y), I(gpu.blockDim.y), I(gpu.threadIdx.x), I(gpu.blockDim.x)
    line_bytes, chroma_bytes = whole[COLUMNS], whole[CHROMA_COLUMNS]
    plane, width = I(whole[CHROMA_ROWS] * chroma_bytes), whole[WIDTH]
    for v in range(group, span, groups):
        row = I(begin + v)
        luma = offset + I(row - whole[TOP]) * np.int64(line_bytes) - whole[LEFT]
        chroma = offset + whole[ROWS] * np.int64(line_bytes) - whole[CHROMA_LEFT]
        chroma += I((row >> 1) - whole[CHROMA_TOP]) * np.int64(chroma_bytes)
        beside = I((_chroma_neighbour(row, whole[HEIGHT]) - (row >> 1)) * chroma_bytes)
        for j in range(lane, n_across, lanes):
            x, n = I(peek(filters.first, j)), I(peek(filters.count, j))
            red, green, blue = HALF_UNIT, HALF_UNIT, HALF_UNIT
            near_blue = near_red = other_blue = other_red = I(0)
            if n > 0:
                near_blue, near_red = _mix_rows(pixels, chroma + (x >> 1), beside, plane)
                other_blue, other_red = _mix_rows(pixels, chroma + _chroma_neighbour(x, width), beside, plane)
            for t in range(n):
                cb, cr = _chroma_mix(near_blue, other_blue), _chroma_mix(near_red, other_red)
                r, g, b = _rgb_of(I(peek(pixels, luma + x)), _chroma_of(cb, x), _chroma_of(cr, x))
                weight = peek(filters.weights, I(j * filters.taps + t))
                red = I(red + weight * r)
                green = I(green + weight * g)
                blue = I(blue + weight * b)
                odd = x & 1 != 0
                x = I(x + 1)
                if odd:  # the chroma nearest to this column was second nearest to the one before
                    near_blue, other_blue = other_blue, near_blue
                    near_red, other_red = other_red, near_red
                else:
                    other_blue, other_red = _mix_rows(pixels, chroma + _chroma_neighbour(x, width), beside, plane)
            index = I(3 * (v * n_across + j))
            poke(lines, index, _clip(red))
            poke(lines, index + 1, _clip(green))
            poke(lines, index + 2, _clip(blue))


@device
def _filter_column(lines, index, step, n, i, filters):
    """The second pass for one canvas pixel: `n` rows of `lines`, `step` bytes apart from `index` on, with the weights
    of line `i`."""
    red, green, blue = HALF_UNIT, HALF_UNIT, HALF_UNIT
    for t in range(n):
        weight = peek(filters.weights, I(i * filters.taps + t))
        red = I(red + weight * I(peek(lines, index)))
        green = I(green + weight * I(peek(lines, index + 1)))
        blue = I(blue + weight * I(peek(lines, index + 2)))
        index = I(index + step)
    return red, green, blue


@device
def _warp(part, box, canvas, canvas_size, real, whole, output):
    """An output part from its canvas, whose pixels are those of `box`: 2 x 2 or 4 x 4 of them for a pixel."""
    group, groups, lane, lanes = I(gpu.threadIdx.y), I(gpu.blockDim.y), I(gpu.threadIdx.x), I(gpu.blockDim.x)
    plane, across = I(output.rows * output.columns), I(box.right - box.left)
    empty = box.end <= box.top or across <= 0
    for i in range(part.top + group, part.end, groups):
        for j in range(part.left + lane, part.right, lanes):
            x = real[X_START] + (np.float32(i) + HALF) * real[X_SLANT] + (np.float32(j) + HALF) * real[X_STEP]
            y = real[Y_START] + (np.float32(i) + HALF) * real[Y_STEP] + (np.float32(j) + HALF) * real[Y_SLANT]
            pixel = output.first + I(i * output.columns + j)
            outside = x < real[X_LOW] or x >= real[X_HIGH] or y < real[Y_LOW] or y >= real[Y_HIGH]
            if outside or empty:
                poke(output.pixels, pixel, output.fill[0])
                poke(output.pixels, pixel + plane, output.fill[1])
                poke(output.pixels, pixel + I(2 * plane), output.fill[2])
                continue
            x -= HALF
            y -= HALF
            column, line = np.int32(math.floor(x)), np.int32(math.floor(y))
            x -= np.float32(column)
            y -= np.float32(line)
            if whole[INTERPOLATION] == BICUBIC:
                wx0, wx1, wx2, wx3 = _cubic_weights(x)
                wy0, wy1, wy2, wy3 = _cubic_weights(y)
            else:
                wx0, wx1, wx2, wx3 = ZERO, ONE - x, x, ZERO
                wy0, wy1, wy2, wy3 = ZERO, ONE - y, y, ZERO
            left, right = box.left, box.right
            column0, column1 = I(_clamp(column - 1, left, right) - left), I(_clamp(column, left, right) - left)
            column2, column3 = I(_clamp(column + 1, left, right) - left), I(_clamp(column + 2, left, right) - left)
            for c in range(3):
                total = ZERO
                for tap in range(4):
                    wy = wy0 if tap == 0 else wy1 if tap == 1 else wy2 if tap == 2 else wy3
                    if wy != ZERO:
                        row = I(c * canvas_size + (_clamp(line - 1 + tap, box.top, box.end) - box.top) * across)
                        total += wy * (
                            wx0 * np.float32(peek(canvas, row + column0))
                            + wx1 * np.float32(peek(canvas, row + column1))
                            + wx2 * np.float32(peek(canvas, row + column2))
                            + wx3 * np.float32(peek(canvas, row + column3))
                        )
                poke(output.pixels, pixel + I(c * plane), _round(total))


def build(tile: int, lines: int, buffer: int, table: int, canvas_size: int):
    """The kernel with tiles of `tile` x `tile` pixels; shared memory for `buffer` bytes between the passes, `table`
    weights of each axis and a canvas of `canvas_size` pixels, at least 25; at most `lines` rows and columns a pass."""
    colours = 3 * canvas_size

    @device
    def filter_in_bands(pixels, offset, box, filters_y, filters_x, between, canvas, real, whole, output):
        """The canvas pixels of `box` in two passes, as many rows and columns at a time as shared memory holds."""
        lane, group, lanes, groups = I(gpu.threadIdx.x), I(gpu.threadIdx.y), I(gpu.blockDim.x), I(gpu.blockDim.y)
        thread, threads = I(group * lanes + lane), I(lanes * groups)
        taps_y, taps_x, interpolation, warped = filters_y.taps, filters_x.taps, whole[INTERPOLATION], whole[WARPED] != 0
        across = I(box.right - box.left)
        line_bytes, plane = I(3 * whole[COLUMNS]), I(output.rows * output.columns)
        across_pass = I(max(min(min(min(across, lines), table // taps_x), buffer // (3 * taps_y)), 1))
        room = I(buffer // (3 * across_pass))
        down_pass = I(I(min(np.float32(room - taps_y) / real[SCALE_Y], np.float32(lines))) + 1)
        down_pass = I(min(min(down_pass, lines), table // taps_y))
        for i0 in range(box.top, box.end, down_pass):
            n_down = I(min(down_pass, box.end - i0))
            for j0 in range(box.left, box.right, across_pass):
                n_across = I(min(across_pass, box.right - j0))
                # The tables of weights: the first threads begin with the rows', the last ones with the columns'.
                if j0 == box.left:
                    for n in range(thread, n_down, threads):
                        image, shown = (whole[HEIGHT], whole[TOP], whole[ROWS]), (real[BOX_TOP], real[BOX_HEIGHT])
                        _fill_line(I(i0 + n), shown, output.rows, image, interpolation, filters_y, n, warped)
                for n in range(I(threads - 1 - thread), n_across, threads):
                    image, shown = (whole[WIDTH], whole[LEFT], whole[COLUMNS]), (real[BOX_LEFT], real[BOX_WIDTH])
                    _fill_line(I(j0 + n), shown, output.columns, image, interpolation, filters_x, n, warped)
                gpu.syncthreads()
                begin = filters_y.first[0]
                span = I(min(filters_y.first[n_down - 1] + filters_y.count[n_down - 1] - begin, room))
                if whole[PLANES] == 0:
                    first_byte = offset + I(begin - whole[TOP]) * np.int64(line_bytes)
                    _filter_rows(pixels, first_byte, line_bytes, whole[LEFT], span, n_across, filters_x, between)
                else:
                    _filter_plane_rows(pixels, offset, begin, span, n_across, filters_x, whole, between)
                gpu.syncthreads()
                for i in range(group, n_down, groups):
                    for j in range(lane, n_across, lanes):
                        n = peek(filters_y.count, i)
                        index = I(3 * ((peek(filters_y.first, i) - begin) * n_across + j))
                        red, green, blue = _filter_column(between, index, I(3 * n_across), n, i, filters_y)
                        if warped:
                            index = I((i0 + i - box.top) * across + j0 + j - box.left)
                            poke(canvas, index, _clip(red))
                            poke(canvas, index + canvas_size, _clip(green))
                            poke(canvas, index + 2 * canvas_size, _clip(blue))
                        else:
                            column = I(output.columns - 1 - (j0 + j)) if real[XU] < ZERO else I(j0 + j)
                            pixel = output.first + I((i0 + i) * output.columns + column)
                            inside = n > 0 and peek(filters_x.count, j) > 0
                            poke(output.pixels, pixel, _clip(red) if inside else output.fill[0])
                            poke(output.pixels, pixel + plane, _clip(green) if inside else output.fill[1])
                            poke(output.pixels, pixel + I(2 * plane), _clip(blue) if inside else output.fill[2])
                gpu.syncthreads()

    @device
    def filter_directly(pixels, offset, box, canvas, real, whole, output):
        """The canvas pixels of `box` one by one: where not even one column's filter fits shared memory, and of planes
        too narrow to be smoothed."""
        thread, threads = I(gpu.threadIdx.y * gpu.blockDim.x + gpu.threadIdx.x), I(gpu.blockDim.x * gpu.blockDim.y)
        down, across = I(box.end - box.top), I(box.right - box.left)
        plane = I(output.rows * output.columns)
        for n in range(thread, 3 * max(down, 0) * max(across, 0), threads):
            c = n // (down * across)
            index = n - c * (down * across)
            i, j = index // across, index % across
            inside = (
                whole[IMAGE_Y0] <= box.top + i < whole[IMAGE_Y1] and whole[IMAGE_X0] <= box.left + j < whole[IMAGE_X1]
            )
            y, x = I(box.top + i), I(box.left + j)
            value = _round(_direct(pixels, offset, y, x, real, whole, output.rows, output.columns, c))
            if whole[WARPED] != 0:
                canvas[c * canvas_size + index] = value
            else:
                column = output.columns - 1 - (box.left + j) if real[XU] < ZERO else box.left + j
                fill = output.fill[0] if c == 0 else output.fill[1] if c == 1 else output.fill[2]
                pixel = output.first + c * plane + np.int64(box.top + i) * output.columns + column
                output.pixels[pixel] = value if inside else fill

    def show(pixels, regions, plans, fill, out_rows, out_columns, out):
        """Block (x, y, b): tile (x, y) of sample b.

        pixels: uint8 [M]; regions: REGION [B]; plans: `tl_fast.plan.PLAN` [B]; fill: RGB of what lies outside the
        images; out: uint8 [B 3 H W], written.
        """
        between = cuda.shared.array(buffer, uint8)
        weights_y = cuda.shared.array(table, int32)
        weights_x = cuda.shared.array(table, int32)
        first_y = cuda.shared.array(lines, int32)
        count_y = cuda.shared.array(lines, int32)
        first_x = cuda.shared.array(lines, int32)
        count_x = cuda.shared.array(lines, int32)
        canvas = cuda.shared.array(colours, uint8)
        real = cuda.shared.array(FLOATS, float32)
        whole = cuda.shared.array(INTEGERS, int32)
        out_rows, out_columns = I(out_rows), I(out_columns)
        b = I(cuda.blockIdx.z)
        if cuda.threadIdx.x == 0 and cuda.threadIdx.y == 0:
            _place(regions[b], plans[b], out_rows, out_columns, tile, canvas_size, real, whole)
        cuda.syncthreads()
        offset = np.int64(regions[b]["offset"])
        warped, part_size = whole[WARPED] != 0, whole[PART]
        top, left = I(cuda.blockIdx.y * tile), I(cuda.blockIdx.x * tile)
        end, right = I(min(top + tile, out_rows)), I(min(left + tile, out_columns))
        output = Output(out, np.int64(3 * I(out_rows * out_columns)) * b, out_rows, out_columns, fill)
        filters_y = Filters(weights_y, first_y, count_y, whole[TAPS_Y])
        filters_x = Filters(weights_x, first_x, count_x, whole[TAPS_X])
        fits = filters_y.taps <= table and filters_x.taps <= table and 3 * filters_y.taps <= buffer
        fits = fits and (whole[PLANES] == 0 or whole[WIDTH] >= SMOOTHED)
        for part_top in range(top, end, part_size):
            for part_left in range(left, right, part_size):
                part_end, part_right = I(min(part_top + part_size, end)), I(min(part_left + part_size, right))
                part = Box(part_top, part_end, part_left, part_right)
                box = _canvas_of(part, real, whole)
                if fits:
                    filter_in_bands(pixels, offset, box, filters_y, filters_x, between, canvas, real, whole, output)
                else:
                    filter_directly(pixels, offset, box, canvas, real, whole, output)
                    cuda.syncthreads()
                if warped:
                    _warp(part, box, canvas, canvas_size, real, whole, output)
                    cuda.syncthreads()

    return show


SHOW = build(tile=TILE, lines=LINES, buffer=12288, table=1024, canvas_size=4096)
