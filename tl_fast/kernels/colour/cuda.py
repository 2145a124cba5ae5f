"""The CUDA kernel of the colour operations and of the output's number format: one launch a batch, a block an image.

As `tl_fast.kernels.colour.cpu`: pointwise operations are combined in tables of 256 values a channel, histograms and
means are taken of what image and table make, and only `Color`, `Sharpness` and the end touch every pixel. The last pass
writes the table's values as they are, or normalised as 16-bit floats: then it is a table too. Integers are Pillow's to
the last bit.
"""

from __future__ import annotations

import numpy as np
from numba import cuda, int32, uint8, uint16

from tl_fast.kernels.cuda_device import device, load_word, peek, scalar32, store_word
from tl_fast.maths import scalar

_curve, _stretch, _blend, _luma = scalar32.curve, scalar32.stretch, scalar32.blend, scalar32.luma
_rounded_mean, _smoothed = scalar32.rounded_mean, scalar32.smoothed
AUTO_CONTRAST, EQUALIZE, ROTATE = scalar.AUTO_CONTRAST, scalar.EQUALIZE, scalar.ROTATE
COLOR, CONTRAST, SHARPNESS = scalar.COLOR, scalar.CONTRAST, scalar.SHARPNESS

BOUNDS = (
    512,
    2,
)  # threads of a block; blocks that a multiprocessor shall have room for: then 256 images run at once on 132 of them
BYTES, PLANES, CHANNELS_LAST = 0, 1, 2  # what the last pass writes: uint8 [3, H, W], 16 bits [3, H, W] or [H, W, 3]
COPIES = 8  # of a histogram, so that warps do not wait for each other
VALUES = 768  # 256 of each channel


@device
def _get(image, at, unit):
    """`unit` (1 or 4) pixels of a channel as bytes of a word."""
    if unit == 4:
        return load_word(image, at)
    return np.uint32(peek(image, at))


@device
def _put(image, at, unit, word):
    if unit == 4:
        store_word(image, at, word)
    else:
        image[at] = np.uint8(word)


@device
def _byte(word, n):
    return np.int32(word >> np.uint32(8 * n) & np.uint32(255))


def build(copies: int):
    """The kernel with `copies` of each histogram."""
    counters = copies * VALUES

    def finish(image, spare, plans, rows, columns, unit, layout, normal, out):
        """Block b: the colour operations of plan b on image b, then the last pass.

        image: uint8 [B 3 H W], changed; spare: as much to work in, where a plan sharpens; plans: `tl_fast.plan.PLAN`
        [B]; unit: pixels read at once, 4 where H W is a multiple of 4, else 1; layout: BYTES (the result is in `image`,
        `normal` and `out` are not used), PLANES or CHANNELS_LAST; normal: uint16 [3 256], the bits of each channel's
        normalised values; out: uint16 [3 B H W], written.
        """
        table = cuda.shared.array(VALUES, uint8)
        final = cuda.shared.array(VALUES, uint16)
        counts = cuda.shared.array(counters, int32)
        histogram = cuda.shared.array(VALUES, int32)
        ends = cuda.shared.array(8, int32)  # lowest and highest value of each channel; a sum
        thread, threads, b = cuda.threadIdx.x, cuda.blockDim.x, cuda.blockIdx.x
        plan = plans[b]
        ops, arguments = plan["ops"], plan["arguments"]
        plane = rows * columns
        first = np.int64(b) * 3 * plane
        mine = (thread >> 5) % copies * VALUES
        for n in range(thread, VALUES, threads):
            table[n] = n & 255
        pending, moved = False, False
        cuda.syncthreads()
        for n_op in range(len(ops)):
            op, argument = np.int32(ops[n_op]), arguments[n_op]
            if op < AUTO_CONTRAST or op > SHARPNESS or op == ROTATE:
                continue
            source = spare if moved else image
            if op == AUTO_CONTRAST or op == EQUALIZE:
                for n in range(thread, counters, threads):
                    counts[n] = 0
                for n in range(thread, VALUES, threads):
                    histogram[n] = 0
                if thread < 6:
                    ends[thread] = 255 if thread < 3 else 0
                cuda.syncthreads()
                for c in range(3):
                    for p in range(thread * unit, plane, threads * unit):
                        word = _get(source, first + c * plane + p, unit)
                        for n in range(unit):
                            cuda.atomic.add(counts, mine + 256 * c + _byte(word, n), 1)
                cuda.syncthreads()
                for n in range(thread, VALUES, threads):
                    total = np.int32(0)
                    for copy in range(copies):
                        total += counts[copy * VALUES + n]
                    if total:
                        c, value = n >> 8, np.int32(table[n])
                        cuda.atomic.add(histogram, 256 * c + value, total)
                        cuda.atomic.min(ends, c, value)
                        cuda.atomic.max(ends, 3 + c, value)
                cuda.syncthreads()
                if op == EQUALIZE and thread < 3:  # sums of what is below
                    step = (plane - histogram[256 * thread + ends[3 + thread]]) // 255
                    total = step // 2
                    for value in range(256):
                        counts[256 * thread + value] = total
                        total += histogram[256 * thread + value]
                    counts[VALUES + thread] = step
                cuda.syncthreads()
                for n in range(thread, VALUES, threads):
                    c, value = n >> 8, np.int32(table[n])
                    if op == AUTO_CONTRAST:
                        table[n] = _stretch(np.int64(value), np.int64(ends[c]), np.int64(ends[3 + c]))
                    else:
                        step = counts[VALUES + c]
                        if step != 0 and ends[c] != ends[3 + c]:
                            table[n] = min(counts[256 * c + value] // step, 255)
                pending = True
            elif op == CONTRAST:
                if thread == 0:
                    ends[6] = 0
                cuda.syncthreads()
                total = np.int32(0)
                for p in range(thread * unit, plane, threads * unit):
                    red, green = _get(source, first + p, unit), _get(source, first + plane + p, unit)
                    blue = _get(source, first + 2 * plane + p, unit)
                    for n in range(unit):
                        total += np.int32(
                            _luma(
                                np.int32(table[_byte(red, n)]),
                                np.int32(table[256 + _byte(green, n)]),
                                np.int32(table[512 + _byte(blue, n)]),
                            )
                        )
                cuda.atomic.add(ends, 6, total)
                cuda.syncthreads()
                grey = np.int32(_rounded_mean(np.int64(ends[6]), np.int64(plane)))
                for n in range(thread, VALUES, threads):
                    table[n] = _blend(grey, np.int32(table[n]), argument)
                pending = True
            elif op == COLOR:
                for p in range(thread * unit, plane, threads * unit):
                    red, green = _get(source, first + p, unit), _get(source, first + plane + p, unit)
                    blue = _get(source, first + 2 * plane + p, unit)
                    new_red, new_green, new_blue = np.uint32(0), np.uint32(0), np.uint32(0)
                    for n in range(unit):
                        r, g = np.int32(table[_byte(red, n)]), np.int32(table[256 + _byte(green, n)])
                        b_ = np.int32(table[512 + _byte(blue, n)])
                        grey = np.int32(_luma(r, g, b_))
                        new_red |= np.uint32(_blend(grey, r, argument)) << np.uint32(8 * n)
                        new_green |= np.uint32(_blend(grey, g, argument)) << np.uint32(8 * n)
                        new_blue |= np.uint32(_blend(grey, b_, argument)) << np.uint32(8 * n)
                    _put(source, first + p, unit, new_red)
                    _put(source, first + plane + p, unit, new_green)
                    _put(source, first + 2 * plane + p, unit, new_blue)
                cuda.syncthreads()
                for n in range(thread, VALUES, threads):
                    table[n] = n & 255
                pending = False
            elif op == SHARPNESS:
                if rows >= 3 and columns >= 3:
                    target = image if moved else spare
                    for p in range(thread, plane, threads):
                        y = p // columns
                        x = p - y * columns
                        edge = y == 0 or x == 0 or y == rows - 1 or x == columns - 1
                        for c in range(3):
                            at = first + c * plane + p
                            here = np.int32(table[256 * c + np.int32(peek(source, at))])
                            if not edge:
                                around = np.int32(0)
                                for line in range(-1, 2):
                                    for column in range(-1, 2):
                                        around += np.int32(
                                            table[256 * c + np.int32(peek(source, at + line * columns + column))]
                                        )
                                here = _blend(np.int32(_smoothed(around - here, here)), here, argument)
                            target[at] = here
                    moved = not moved
                    cuda.syncthreads()
                    for n in range(thread, VALUES, threads):
                        table[n] = n & 255
                    pending = False
            else:
                for n in range(thread, VALUES, threads):
                    table[n] = _curve(op, argument, np.int32(table[n]))
                pending = True
            cuda.syncthreads()

        source = spare if moved else image
        if layout == BYTES:
            if pending or moved:
                for c in range(3):
                    for p in range(thread * unit, plane, threads * unit):
                        word = _get(source, first + c * plane + p, unit)
                        new = np.uint32(0)
                        for n in range(unit):
                            new |= np.uint32(table[256 * c + _byte(word, n)]) << np.uint32(8 * n)
                        _put(image, first + c * plane + p, unit, new)
            return
        for n in range(thread, VALUES, threads):
            final[n] = normal[(n >> 8 << 8) + np.int32(table[n])]
        cuda.syncthreads()
        if layout == PLANES:
            for c in range(3):
                for p in range(thread * unit, plane, threads * unit):
                    at = first + c * plane + p
                    word = _get(source, at, unit)
                    if unit == 4:
                        for n in range(0, 4, 2):
                            low, high = (
                                np.uint32(final[256 * c + _byte(word, n)]),
                                np.uint32(final[256 * c + _byte(word, n + 1)]),
                            )
                            store_word(out, at + n, low | high << np.uint32(16))
                    else:
                        out[at] = final[256 * c + _byte(word, 0)]
            return
        for p in range(thread, plane, threads):
            for c in range(3):
                out[first + 3 * p + c] = final[256 * c + np.int32(peek(source, first + c * plane + p))]

    return finish


FINISH = build(COPIES)
