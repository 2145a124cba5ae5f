"""CPU loops of the colour operations, as Pillow (and, of ADD, SATURATE and HUE, mmsegmentation) computes them:
pointwise ones as tables, the rest in passes over the pixels.

Tables of successive operations are combined, so one pass applies all of them. `Color`, `Sharpness`, `SATURATE` and
`HUE` look at more than one value and have a pass each. Compiled from `tl_fast.maths.scalar`; no loop needs the GIL.
"""

from __future__ import annotations

import numpy as np

from tl_fast.maths import scalar
from tl_fast.maths.compile import compile_scalar, njit

_scalar = compile_scalar(njit)
_curve, _stretch, _blend, _luma = _scalar.curve, _scalar.stretch, _scalar.blend, _scalar.luma
AUTO_CONTRAST, EQUALIZE = scalar.AUTO_CONTRAST, scalar.EQUALIZE
_changes_colours, _sextants = _scalar.changes_colours, _scalar.sextants
_added, _saturated, _turned = _scalar.added, _scalar.saturated, _scalar.turned
COLOR, CONTRAST, SHARPNESS = scalar.COLOR, scalar.CONTRAST, scalar.SHARPNESS
BRIGHTNESS, ADD, SATURATE, HUE = scalar.BRIGHTNESS, scalar.ADD, scalar.SATURATE, scalar.HUE


@njit
def apply(image, ops, arguments):
    """Apply the colour operations among `ops` to image uint8 [3, H, W], in place.

    ops: codes of operations [n], of which geometric ones are passed over; arguments: float32 [n]."""
    table = np.empty((3, 256), np.uint8)
    pending = False
    for n in range(ops.size):
        op, argument = ops[n], arguments[n]
        if not _changes_colours(op):
            continue
        if not pending and (op == ADD or op == BRIGHTNESS):
            # Vectors of pixels take a fifth of the time that looking each up in a table takes.
            if op == ADD:
                _add(image, np.float32(argument))
            else:
                _brighten(image, np.float32(argument))
            continue
        if not pending:
            for c in range(3):
                for value in range(256):
                    table[c, value] = value
        if op == AUTO_CONTRAST or op == EQUALIZE:
            _fit_histogram(image, table, op)
            pending = True
        elif op == CONTRAST:
            grey = _mean_luma(image, table)
            for c in range(3):
                for value in range(256):
                    table[c, value] = _blend(grey, np.int64(table[c, value]), np.float32(argument))
            pending = True
        elif op == COLOR or op == SHARPNESS or op == SATURATE or op == HUE:
            if pending:
                _look_up(image, table)
                pending = False
            if op == COLOR:
                _saturate(image, np.float32(argument))
            elif op == SHARPNESS:
                _sharpen(image, np.float32(argument))
            elif op == SATURATE:
                _saturate_hsv(image, np.float32(argument))
            else:
                _turn_hue(image, _sextants(np.float32(argument)))
        else:
            for c in range(3):
                for value in range(256):
                    table[c, value] = _curve(np.int64(op), argument, np.int64(table[c, value]))
            pending = True
    if pending:
        _look_up(image, table)


@njit
def _look_up(image, table):
    for c in range(3):
        curve = table[c]
        for y in range(image.shape[1]):
            row = image[c, y]
            for x in range(row.size):
                row[x] = curve[row[x]]


@njit
def _add(image, addend):
    for c in range(3):
        for y in range(image.shape[1]):
            row = image[c, y]
            for x in range(row.size):
                row[x] = _added(np.int32(row[x]), addend)


@njit
def _brighten(image, factor):
    """Pillow's Brightness."""
    for c in range(3):
        for y in range(image.shape[1]):
            row = image[c, y]
            for x in range(row.size):
                row[x] = _blend(np.int32(0), np.int32(row[x]), factor)


@njit
def _fit_histogram(image, table, op):
    """Pillow's autocontrast or equalize of the image that `image` and `table` make, into `table`."""
    for c in range(3):
        counts = np.zeros((4, 256), np.int64)  # four, so that equal neighbours do not wait for each other
        for y in range(image.shape[1]):
            row = image[c, y]
            for x in range(row.size):
                counts[x & 3, row[x]] += 1
        histogram = np.zeros(256, np.int64)
        for value in range(256):
            histogram[table[c, value]] += counts[0, value] + counts[1, value] + counts[2, value] + counts[3, value]
        low, high = 0, 255
        while low < 255 and histogram[low] == 0:
            low += 1
        while high > 0 and histogram[high] == 0:
            high -= 1
        fitted = np.empty(256, np.int64)
        if op == AUTO_CONTRAST:
            for value in range(256):
                fitted[value] = _stretch(value, low, high)
        else:
            step = (image.shape[1] * image.shape[2] - histogram[high]) // 255
            total = step // 2
            for value in range(256):
                fitted[value] = value if step == 0 or low == high else min(total // step, 255)
                total += histogram[value]
        for value in range(256):
            table[c, value] = fitted[table[c, value]]


@njit
def _mean_luma(image, table):
    """Pillow's mean grey value, rounded, of the image that `image` and `table` make."""
    total = 0
    for y in range(image.shape[1]):
        red, green, blue = image[0, y], image[1, y], image[2, y]
        for x in range(red.size):
            total += _luma(np.int64(table[0, red[x]]), np.int64(table[1, green[x]]), np.int64(table[2, blue[x]]))
    return np.int64(float(total) / (image.shape[1] * image.shape[2]) + 0.5)


@njit
def _saturate(image, factor):
    """Pillow's Color."""
    for y in range(image.shape[1]):
        red, green, blue = image[0, y], image[1, y], image[2, y]
        for x in range(red.size):
            grey = _luma(np.int32(red[x]), np.int32(green[x]), np.int32(blue[x]))
            red[x] = _blend(grey, np.int32(red[x]), factor)
            green[x] = _blend(grey, np.int32(green[x]), factor)
            blue[x] = _blend(grey, np.int32(blue[x]), factor)


@njit
def _saturate_hsv(image, factor):
    for y in range(image.shape[1]):
        red, green, blue = image[0, y], image[1, y], image[2, y]
        for x in range(red.size):
            r, g, b = np.float32(red[x]), np.float32(green[x]), np.float32(blue[x])
            red[x], green[x], blue[x] = _saturated(r, g, b, factor)


@njit
def _turn_hue(image, turn):
    for y in range(image.shape[1]):
        red, green, blue = image[0, y], image[1, y], image[2, y]
        for x in range(red.size):
            r, g, b = np.float32(red[x]), np.float32(green[x]), np.float32(blue[x])
            red[x], green[x], blue[x] = _turned(r, g, b, turn)


@njit
def _sharpen(image, factor):
    """Blend with Pillow's SMOOTH filter (3 x 3, weights 1 around 5, the border kept)."""
    rows, columns = image.shape[1], image.shape[2]
    if rows < 3 or columns < 3:
        return
    above, here = np.empty(columns, np.uint8), np.empty(columns, np.uint8)
    for c in range(3):
        here[:] = image[c, 0]
        for y in range(1, rows - 1):
            above, here = here, above
            target, below = image[c, y], image[c, y + 1]
            here[:] = target
            for x in range(columns - 2):
                around = (
                    np.int32(above[x])
                    + np.int32(above[x + 1])
                    + np.int32(above[x + 2])
                    + np.int32(here[x])
                    + np.int32(here[x + 2])
                    + np.int32(below[x])
                    + np.int32(below[x + 1])
                    + np.int32(below[x + 2])
                )
                smooth = np.int32((around + 5 * np.int32(here[x + 1])) / np.float32(13.0) + np.float32(0.5))
                target[x + 1] = _blend(smooth, np.int32(here[x + 1]), factor)
