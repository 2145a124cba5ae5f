"""Where the bins of the token targets lie: a sample's crop in cells of its label map, and RoIAlign's taps, in float32.

`place_crop` is for one thread of a block, what it finds is in shared memory: crop, floats, and state, int32, at the
places named here.
"""

from __future__ import annotations

import math

import numpy as np

from tl_fast.kernels.cuda_device import device, peek, poke, scalar32
from tl_fast.kernels.targets.cuda_maps import RANGE
from tl_fast.maths import scalar

roi_point = scalar32.roi_point
_roi_samples, _roi_tap, _roi_outside = scalar32.roi_samples, scalar32.roi_tap, scalar32.roi_outside

SLACK = np.float32(scalar.ROI_SLACK)
ZERO, HALF, ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
I = np.int32  # numba makes int64 of every sum of int32: casts let the compiler go back  # noqa: E741

# Floats: the affine to cells (xu, xv, x0, yu, yv, y0), left edge, extents, the scores' range.
LEFT, EXTENT_X, EXTENT_Y, FLOATS = 6, 7, 8, RANGE + 2
WRONG, CROWDED, SAMPLES_X, SAMPLES_Y, KIND, STEP_M, STEP_T, INTEGERS = 0, 1, 2, 3, 4, 5, 6, 7
ALONG, FLIPPED, WARPED = 0, 1, 2


@device
def tap(point, cells, cut):
    if cut and _roi_outside(point, cells):
        return 0, ZERO, ZERO
    return _roi_tap(point, cells)


@device
def place_crop(affines, b, height, width, bins, crop, state):
    """The crop of sample b in cells, to shared memory, by one thread: along the axes a box, else the affine itself, a
    side of less than a cell widened to one, about its middle."""
    at = 6 * b
    xu, xv, x0 = (
        affines[at] * np.float32(width),
        affines[at + 1] * np.float32(width),
        affines[at + 2] * np.float32(width) - HALF,
    )
    yu, yv, y0 = (
        affines[at + 3] * np.float32(height),
        affines[at + 4] * np.float32(height),
        affines[at + 5] * np.float32(height) - HALF,
    )
    kind, slack = FLIPPED if xu < ZERO else ALONG, ZERO
    crop[LEFT] = (affines[at + 2] + min(affines[at], ZERO)) * np.float32(width) - HALF
    extent_x, extent_y = abs(xu), yv
    if xv != ZERO or yu != ZERO:
        kind, slack = WARPED, SLACK
        extent_x, extent_y = math.sqrt(xu * xu + yu * yu), math.sqrt(xv * xv + yv * yv)
        if ZERO < extent_x < ONE:
            x0 -= HALF * (xu / extent_x - xu)
            y0 -= HALF * (yu / extent_x - yu)
            xu, yu = xu / extent_x, yu / extent_x
        if ZERO < extent_y < ONE:
            x0 -= HALF * (xv / extent_y - xv)
            y0 -= HALF * (yv / extent_y - yv)
            xv, yv = xv / extent_y, yv / extent_y
    crop[0], crop[1], crop[2], crop[3], crop[4], crop[5] = xu, xv, x0, yu, yv, y0
    crop[EXTENT_X], crop[EXTENT_Y] = max(extent_x, ONE), max(extent_y, ONE)
    state[SAMPLES_X] = _roi_samples(max(extent_x, ONE), bins, slack)
    state[SAMPLES_Y] = _roi_samples(max(extent_y, ONE), bins, slack)
    state[KIND] = kind


@device
def fill_axis(rows, integers, at, i, start, extent, bins, samples, cells, cut, reach, state):
    """Bin `i` of RoIAlign along one axis at rows[at ...]: float32 [reach] weights, then, as int32, its first cell and
    how many it has."""
    lowest, highest = I(cells), I(-1)
    for s in range(samples):
        low, w_low, w_high = tap(roi_point(i, s, start, extent, bins, samples), cells, cut)
        if w_low + w_high > ZERO:
            lowest = I(min(lowest, low))
            highest = I(max(highest, low + 1 if w_high > ZERO else low))
    poke(integers, at + reach, lowest)
    poke(integers, at + reach + 1, max(highest - lowest + 1, 0))
    if highest - lowest + 1 > reach:
        state[CROWDED] = 1
        return
    for n in range(reach):
        poke(rows, at + n, ZERO)
    share = ONE / np.float32(samples)
    for s in range(samples):
        low, w_low, w_high = tap(roi_point(i, s, start, extent, bins, samples), cells, cut)
        place = I(at + low - lowest)
        if w_low + w_high > ZERO:
            poke(rows, place, peek(rows, place) + w_low * share)
            if w_high > ZERO:
                poke(rows, place + 1, peek(rows, place + 1) + w_high * share)


@device
def warped_point(crop, line, i, j, sy, sx, bins, samples_x, samples_y):
    """A coordinate (line 0: x, 3: y) of sampling point (sy, sx) of bin (i, j), in cells."""
    size = ONE / np.float32(bins)
    at_u = np.float32(j) * size + (np.float32(sx) + HALF) * size / np.float32(samples_x)
    at_v = np.float32(i) * size + (np.float32(sy) + HALF) * size / np.float32(samples_y)
    return peek(crop, line) * at_u + peek(crop, line + 1) * at_v + peek(crop, line + 2)
