"""Where the bins of the token targets lie: a sample's crop in cells of its label map, and RoIAlign's taps, in float32.

One thread of a block runs `place_crop`, which leaves its results in shared memory: `crop`, float32, and `state`, int32,
with the indices named here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from tl_fast.kernels.cuda_device import HALF, ONE, ZERO, I, block_thread, device, peek, poke, scalar32
from tl_fast.kernels.targets.cuda_maps import RANGE
from tl_fast.maths import scalar

roi_point = scalar32.roi_point
_roi_samples, _roi_tap, _roi_outside = scalar32.roi_samples, scalar32.roi_tap, scalar32.roi_outside

SLACK = np.float32(scalar.ROI_SLACK)

# Of `crop`: the affine to cells (xu, xv, x0, yu, yv, y0) is 0..5, then the left edge, extents, the scores' range.
LEFT, EXTENT_X, EXTENT_Y, FLOATS = 6, 7, 8, RANGE + 2
# Of `state`: what is wrong with the map; has a bin too many cells for its table; points a bin; one of the kinds below;
# cells and scores from one entry of a lane to its next.
WRONG, CROWDED, SAMPLES_X, SAMPLES_Y, KIND, STEP_M, STEP_T, INTEGERS = 0, 1, 2, 3, 4, 5, 6, 7
ALONG, FLIPPED, WARPED = 0, 1, 2  # kinds: along the map's axes, mirrored along them, rotated or sheared


@device
def tap(point, cells, cut):
    """Cell below `point`, its weight and the next one's; cut: both are 0 beyond the map's edge."""
    if cut and _roi_outside(point, cells):
        return 0, ZERO, ZERO
    return _roi_tap(point, cells)


@device
def place_crop(affines, b, height, width, bins_y, bins_x, crop, state):
    """The crop of sample b in cells, by one thread, to shared memory: a box if it is along the axes, else the affine
    itself, whose sides of less than a cell are widened to one about their middle."""
    n = 6 * b
    xu, xv = affines[n] * np.float32(width), affines[n + 1] * np.float32(width)
    x0 = affines[n + 2] * np.float32(width) - HALF
    yu, yv = affines[n + 3] * np.float32(height), affines[n + 4] * np.float32(height)
    y0 = affines[n + 5] * np.float32(height) - HALF
    kind, slack = FLIPPED if xu < ZERO else ALONG, ZERO
    crop[LEFT] = (affines[n + 2] + min(affines[n], ZERO)) * np.float32(width) - HALF
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
    state[SAMPLES_X] = _roi_samples(max(extent_x, ONE), bins_x, slack)
    state[SAMPLES_Y] = _roi_samples(max(extent_y, ONE), bins_y, slack)
    state[KIND] = kind


class Axis(NamedTuple):
    """RoIAlign along one axis: `bins` of `samples` points each on start .. start + extent, in a map of `cells`."""

    start: float
    extent: float
    bins: int
    samples: int
    cells: int


class Tables(NamedTuple):
    """Bins along both axes in shared memory, seen as float32 and as int32: [h + w, reach + 2] from `first` on, of
    each bin the weights of `reach` cells, then, as int32, its first cell and how many it has."""

    rows: Any
    integers: Any
    first: int
    reach: int


@device
def _fill_bin(tables, index, i, axis, cut, state):
    """Bin `i` of an axis, at element `index` of the tables; CROWDED where it has more cells than there is room for."""
    start, extent, bins, samples, cells = axis
    rows, integers, _, reach = tables
    lowest, highest = I(cells), I(-1)
    for s in range(samples):
        low, w_low, w_high = tap(roi_point(i, s, start, extent, bins, samples), cells, cut)
        if w_low + w_high > ZERO:
            lowest = I(min(lowest, low))
            highest = I(max(highest, low + 1 if w_high > ZERO else low))
    poke(integers, index + reach, lowest)
    poke(integers, index + reach + 1, max(highest - lowest + 1, 0))
    if highest - lowest + 1 > reach:
        state[CROWDED] = 1
        return
    for n in range(reach):
        poke(rows, index + n, ZERO)
    share = ONE / np.float32(samples)
    for s in range(samples):
        low, w_low, w_high = tap(roi_point(i, s, start, extent, bins, samples), cells, cut)
        weight_index = I(index + low - lowest)
        if w_low + w_high > ZERO:
            poke(rows, weight_index, peek(rows, weight_index) + w_low * share)
            if w_high > ZERO:
                poke(rows, weight_index + 1, peek(rows, weight_index + 1) + w_high * share)


@device
def fill_axes(tables, crop, state, task):
    """All bins along both axes, a thread each."""
    thread, threads = block_thread()
    for n in range(thread, I(task.bins_y + task.bins_x), threads):
        index = I(tables.first + n * (tables.reach + 2))
        if n < task.bins_y:
            down = Axis(crop[5], crop[EXTENT_Y], task.bins_y, state[SAMPLES_Y], task.height)
            _fill_bin(tables, index, n, down, task.cut, state)
        else:
            across = Axis(crop[LEFT], crop[EXTENT_X], task.bins_x, state[SAMPLES_X], task.width)
            _fill_bin(tables, index, I(n - task.bins_y), across, task.cut, state)


@device
def warped_point(crop, line, i, j, sy, sx, task, samples_x, samples_y):
    """A coordinate (line 0: x, 3: y) of sampling point (sy, sx) of bin (i, j), in cells."""
    width, height = ONE / np.float32(task.bins_x), ONE / np.float32(task.bins_y)
    u = np.float32(j) * width + (np.float32(sx) + HALF) * width / np.float32(samples_x)
    v = np.float32(i) * height + (np.float32(sy) + HALF) * height / np.float32(samples_y)
    return peek(crop, line) * u + peek(crop, line + 1) * v + peek(crop, line + 2)


@device
def warped_taps(crop, samples, i, j, n, task):
    """Sampling point `n` of bin (i, j) -> column, its weight, the next column's; line, its weight, the next line's.

    samples: points along x and along y."""
    samples_x, samples_y = samples
    sy = I(n // samples_x)
    sx = I(n - sy * samples_x)
    x = warped_point(crop, 0, i, j, sy, sx, task, samples_x, samples_y)
    y = warped_point(crop, 3, i, j, sy, sx, task, samples_x, samples_y)
    column, x_low, x_high = tap(x, task.width, task.cut)
    line, y_low, y_high = tap(y, task.height, task.cut)
    return column, x_low, x_high, line, y_low, y_high
