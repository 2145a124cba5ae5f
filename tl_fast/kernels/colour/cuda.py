"""The CUDA kernel of the colour operations and of the output's number format: one launch a batch, a block an image.

As `tl_fast.kernels.colour.cpu`: pointwise operations are combined in tables of 256 values a channel, histograms and
means are taken of what image and table make, and only `Color`, `Sharpness`, `SATURATE`, `HUE` and the end touch every
pixel. The last pass writes the table's values as they are, or normalised as 16-bit floats: then it is a table too.
Integers are the CPU's to the last bit, as those are Pillow's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import cuda, int32, uint8, uint16

from tl_fast.kernels.cuda_device import device, gpu, load_word, peek, scalar32, store_word
from tl_fast.maths import scalar

_curve, _stretch, _blend, _luma = scalar32.curve, scalar32.stretch, scalar32.blend, scalar32.luma
_rounded_mean, _smoothed = scalar32.rounded_mean, scalar32.smoothed
_changes_colours, _sextants = scalar32.changes_colours, scalar32.sextants
_saturated, _turned = scalar32.saturated, scalar32.turned
AUTO_CONTRAST, EQUALIZE = scalar.AUTO_CONTRAST, scalar.EQUALIZE
COLOR, CONTRAST, SHARPNESS = scalar.COLOR, scalar.CONTRAST, scalar.SHARPNESS
SATURATE, HUE = scalar.SATURATE, scalar.HUE

# Threads of a block, and blocks that a multiprocessor shall have room for: 256 images then run at once on 132 of them.
BOUNDS = 512, 2
BYTES, PLANES, CHANNELS_LAST = 0, 1, 2  # what the last pass writes: uint8 [3, H, W], 16 bits [3, H, W] or [H, W, 3]
VALUES = 768  # 256 of each channel
COPIES = 8  # of a histogram, so that warps do not wait for each other
COUNTERS = COPIES * VALUES
MEAN, ENDS = 6, 8  # lowest value of each channel, highest value of each channel, then a sum of grey values


class Planes(NamedTuple):
    """Where an image's three channels lie in a flat array of all images: `first` element, `plane` elements a channel,
    of which `unit` (1 or 4) are read at once."""

    first: int
    plane: int
    unit: int


@device
def _get(image, index, unit):
    """`unit` (1 or 4) pixels of a channel as bytes of a word."""
    if unit == 4:
        return load_word(image, index)
    return np.uint32(peek(image, index))


@device
def _put(image, index, unit, word):
    if unit == 4:
        store_word(image, index, word)
    else:
        image[index] = np.uint8(word)


@device
def _byte(word, n):
    return np.int32(word >> np.uint32(8 * n) & np.uint32(255))


@device
def _reset(table):
    """Make the table change nothing."""
    for n in range(gpu.threadIdx.x, VALUES, gpu.blockDim.x):
        table[n] = n & 255


@device
def _count(source, planes, table, counts, histogram, ends):
    """Histogram, lowest and highest value of each channel of the image that `source` and `table` make."""
    thread, threads = gpu.threadIdx.x, gpu.blockDim.x
    first, plane, unit = planes
    mine = (thread >> 5) % COPIES * VALUES
    for n in range(thread, COUNTERS, threads):
        counts[n] = 0
    for n in range(thread, VALUES, threads):
        histogram[n] = 0
    if thread < 6:
        ends[thread] = 255 if thread < 3 else 0
    gpu.syncthreads()
    for c in range(3):
        for p in range(thread * unit, plane, threads * unit):
            word = _get(source, first + c * plane + p, unit)
            for n in range(unit):
                gpu.atomic.add(counts, mine + 256 * c + _byte(word, n), 1)
    gpu.syncthreads()
    for n in range(thread, VALUES, threads):
        total = np.int32(0)
        for copy in range(COPIES):
            total += counts[copy * VALUES + n]
        if total:
            c, value = n >> 8, np.int32(table[n])
            gpu.atomic.add(histogram, 256 * c + value, total)
            gpu.atomic.min(ends, c, value)
            gpu.atomic.max(ends, 3 + c, value)
    gpu.syncthreads()


@device
def _fit_histogram(op, plane, table, counts, histogram, ends):
    """Pillow's autocontrast or equalize of the image that `_count` has seen, into `table`; `counts` is used up."""
    thread, threads = gpu.threadIdx.x, gpu.blockDim.x
    if op == EQUALIZE and thread < 3:  # sums of what is below
        step = (plane - histogram[256 * thread + ends[3 + thread]]) // 255
        total = step // 2
        for value in range(256):
            counts[256 * thread + value] = total
            total += histogram[256 * thread + value]
        counts[VALUES + thread] = step
    gpu.syncthreads()
    for n in range(thread, VALUES, threads):
        c, value = n >> 8, np.int32(table[n])
        if op == AUTO_CONTRAST:
            table[n] = _stretch(np.int64(value), np.int64(ends[c]), np.int64(ends[3 + c]))
        else:
            step = counts[VALUES + c]
            if step != 0 and ends[c] != ends[3 + c]:
                table[n] = min(counts[256 * c + value] // step, 255)


@device
def _blend_with_mean(source, planes, factor, table, ends):
    """Pillow's Contrast, into `table`: away from the mean grey value of the image that `source` and `table` make."""
    thread, threads = gpu.threadIdx.x, gpu.blockDim.x
    first, plane, unit = planes
    if thread == 0:
        ends[MEAN] = 0
    gpu.syncthreads()
    total = np.int32(0)
    for p in range(thread * unit, plane, threads * unit):
        red, green = _get(source, first + p, unit), _get(source, first + plane + p, unit)
        blue = _get(source, first + 2 * plane + p, unit)
        for n in range(unit):
            r, g = np.int32(table[_byte(red, n)]), np.int32(table[256 + _byte(green, n)])
            total += np.int32(_luma(r, g, np.int32(table[512 + _byte(blue, n)])))
    gpu.atomic.add(ends, MEAN, total)
    gpu.syncthreads()
    grey = np.int32(_rounded_mean(np.int64(ends[MEAN]), np.int64(plane)))
    for n in range(thread, VALUES, threads):
        table[n] = _blend(grey, np.int32(table[n]), factor)


@device
def _mixed(op, argument, turn, red, green, blue):
    """The pixel, int32, that COLOR, SATURATE or HUE makes of another. turn: the argument of HUE in sextants."""
    if op == COLOR:
        grey = np.int32(_luma(red, green, blue))
        return _blend(grey, red, argument), _blend(grey, green, argument), _blend(grey, blue, argument)
    r, g, b = np.float32(red), np.float32(green), np.float32(blue)
    if op == SATURATE:
        return _saturated(r, g, b, argument)
    return _turned(r, g, b, turn)


@device
def _mix_channels(op, source, planes, argument, table):
    """COLOR, SATURATE or HUE of the image that `source` and `table` make, in place."""
    first, plane, unit = planes
    turn = _sextants(argument)
    for p in range(gpu.threadIdx.x * unit, plane, gpu.blockDim.x * unit):
        red, green = _get(source, first + p, unit), _get(source, first + plane + p, unit)
        blue = _get(source, first + 2 * plane + p, unit)
        new_red, new_green, new_blue = np.uint32(0), np.uint32(0), np.uint32(0)
        for n in range(unit):
            r, g = np.int32(table[_byte(red, n)]), np.int32(table[256 + _byte(green, n)])
            b = np.int32(table[512 + _byte(blue, n)])
            r, g, b = _mixed(op, argument, turn, r, g, b)
            new_red |= np.uint32(r) << np.uint32(8 * n)
            new_green |= np.uint32(g) << np.uint32(8 * n)
            new_blue |= np.uint32(b) << np.uint32(8 * n)
        _put(source, first + p, unit, new_red)
        _put(source, first + plane + p, unit, new_green)
        _put(source, first + 2 * plane + p, unit, new_blue)


@device
def _sharpen(source, target, planes, rows, columns, factor, table):
    """Pillow's Sharpness of the image that `source` and `table` make, to `target`; its border is copied."""
    first, plane, _ = planes
    for p in range(gpu.threadIdx.x, plane, gpu.blockDim.x):
        y = p // columns
        x = p - y * columns
        edge = y == 0 or x == 0 or y == rows - 1 or x == columns - 1
        for c in range(3):
            pixel = first + c * plane + p
            here = np.int32(table[256 * c + np.int32(peek(source, pixel))])
            if not edge:
                around = np.int32(0)
                for line in range(-1, 2):
                    for column in range(-1, 2):
                        neighbour = np.int32(peek(source, pixel + line * columns + column))
                        around += np.int32(table[256 * c + neighbour])
                here = _blend(np.int32(_smoothed(around - here, here)), here, factor)
            target[pixel] = here


@device
def _look_up(source, image, planes, table):
    """Write what `table` makes of `source` to `image`, which may be the same."""
    first, plane, unit = planes
    for c in range(3):
        for p in range(gpu.threadIdx.x * unit, plane, gpu.blockDim.x * unit):
            word = _get(source, first + c * plane + p, unit)
            new = np.uint32(0)
            for n in range(unit):
                new |= np.uint32(table[256 * c + _byte(word, n)]) << np.uint32(8 * n)
            _put(image, first + c * plane + p, unit, new)


@device
def _look_up_planes(source, out, planes, final):
    """Write the 16 bits that `final` has for each value of `source` to `out`, channel after channel."""
    first, plane, unit = planes
    for c in range(3):
        for p in range(gpu.threadIdx.x * unit, plane, gpu.blockDim.x * unit):
            pixel = first + c * plane + p
            word = _get(source, pixel, unit)
            if unit == 4:
                for n in range(0, 4, 2):
                    low = np.uint32(final[256 * c + _byte(word, n)])
                    high = np.uint32(final[256 * c + _byte(word, n + 1)])
                    store_word(out, pixel + n, low | high << np.uint32(16))
            else:
                out[pixel] = final[256 * c + _byte(word, 0)]


@device
def _look_up_pixels(source, out, planes, final):
    """As `_look_up_planes`, the three channels of a pixel side by side."""
    first, plane, _ = planes
    for p in range(gpu.threadIdx.x, plane, gpu.blockDim.x):
        for c in range(3):
            out[first + 3 * p + c] = final[256 * c + np.int32(peek(source, first + c * plane + p))]


def finish(image, spare, plans, rows, columns, unit, layout, normal, out):
    """Block b: the colour operations of plan b on image b, then the last pass. Not compiled yet.

    image: uint8 [B 3 H W], changed; spare: as much to work in, where a plan sharpens; plans: `tl_fast.plan.PLAN` [B];
    unit: pixels read at once, 4 where H W is a multiple of 4, else 1; layout: BYTES (the result is in `image`, `normal`
    and `out` are not used), PLANES or CHANNELS_LAST; normal: uint16 [3 256], the bits of each channel's normalised
    values; out: uint16 [3 B H W], written.
    """
    table = cuda.shared.array(VALUES, uint8)
    final = cuda.shared.array(VALUES, uint16)
    counts = cuda.shared.array(COUNTERS, int32)
    histogram = cuda.shared.array(VALUES, int32)
    ends = cuda.shared.array(ENDS, int32)
    thread, threads, b = cuda.threadIdx.x, cuda.blockDim.x, cuda.blockIdx.x
    plan = plans[b]
    ops, arguments = plan["ops"], plan["arguments"]
    plane = rows * columns
    planes = Planes(np.int64(b) * 3 * plane, plane, unit)
    _reset(table)
    pending, moved = False, False  # does the table change anything; is the image in `spare`
    cuda.syncthreads()
    for n_op in range(len(ops)):
        op, argument = np.int32(ops[n_op]), arguments[n_op]
        if not _changes_colours(op):
            continue
        source = spare if moved else image
        if op == AUTO_CONTRAST or op == EQUALIZE:
            _count(source, planes, table, counts, histogram, ends)
            _fit_histogram(op, plane, table, counts, histogram, ends)
            pending = True
        elif op == CONTRAST:
            _blend_with_mean(source, planes, argument, table, ends)
            pending = True
        elif op == COLOR or op == SATURATE or op == HUE:
            _mix_channels(op, source, planes, argument, table)
            cuda.syncthreads()
            _reset(table)
            pending = False
        elif op == SHARPNESS:
            if rows >= 3 and columns >= 3:
                _sharpen(source, image if moved else spare, planes, rows, columns, argument, table)
                moved = not moved
                cuda.syncthreads()
                _reset(table)
                pending = False
        else:
            for n in range(thread, VALUES, threads):
                table[n] = _curve(op, argument, np.int32(table[n]))
            pending = True
        cuda.syncthreads()

    source = spare if moved else image
    if layout == BYTES:
        if pending or moved:
            _look_up(source, image, planes, table)
        return
    for n in range(thread, VALUES, threads):
        final[n] = normal[(n >> 8 << 8) + np.int32(table[n])]
    cuda.syncthreads()
    if layout == PLANES:
        _look_up_planes(source, out, planes, final)
    else:
        _look_up_pixels(source, out, planes, final)
