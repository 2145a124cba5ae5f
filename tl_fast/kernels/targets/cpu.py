"""CPU loops that make token targets from label maps: rows of C classes, of which a bin's cells name few.

A row takes some hundred operations. Numba counts references to arrays with atomic instructions at each call, which took
as long again; so functions that run once a row take addresses instead (`tl_fast.maths.memory`), all of them uint64.
"""

from __future__ import annotations

import math

import numpy as np

from tl_fast.maths import memory, scalar
from tl_fast.maths.compile import compile_scalar, njit

PAST_CACHES = 256  # classes from which on a row goes past the caches

_scalar = compile_scalar(njit)
_roi_samples, _roi_point, _roi_tap, _smooth = _scalar.roi_samples, _scalar.roi_point, _scalar.roi_tap, _scalar.smooth
_roi_outside = _scalar.roi_outside
U = np.uint64


@njit
def _tap(point, cells, cut):
    """Cell below `point`, its weight and the next one's; cut: both are 0 beyond the map's edge."""
    if cut and _roi_outside(point, cells):
        return 0, 0.0, 0.0
    return _roi_tap(point, cells)


@njit
def _roi_table(start, extent, bins, cells, cut):
    """RoIAlign along one axis as a sparse matrix: first cell, number of cells and weights of each bin."""
    samples = _roi_samples(extent, bins, 0.0)
    first = np.empty(bins, np.int32)
    count = np.empty(bins, np.int32)
    weights = np.zeros((bins, cells), np.float32)
    for i in range(bins):
        lowest = cells
        highest = -1
        for s in range(samples):
            low, w_low, w_high = _tap(_roi_point(i, s, start, extent, bins, samples), cells, cut)
            if w_low + w_high > 0.0:
                lowest = min(lowest, low)
                highest = max(highest, low + 1 if w_high > 0.0 else low)
        first[i] = lowest
        count[i] = max(highest - lowest + 1, 0)
        for s in range(samples):
            low, w_low, w_high = _tap(_roi_point(i, s, start, extent, bins, samples), cells, cut)
            if w_low + w_high > 0.0:
                weights[i, low - lowest] += np.float32(w_low / samples)
                if w_high > 0.0:
                    weights[i, low + 1 - lowest] += np.float32(w_high / samples)
    return first, count, weights


@njit
def _add_cell(classes, scores, cell, cells, k, weight, total, listed, n):
    """Add a cell's scores to the dense `total` [C]; classes met for the first time go to `listed`, which holds n.
    Returns the new n.

    classes: address of uint16 [k, cells]; scores: of float32 [k, cells]; total: of float32; listed: of uint16.
    """
    for _ in range(k):
        c = np.uint64(memory.load_uint16(classes, cell))
        before = memory.load_float32(total, c)
        # NaN marks a class not met yet in this bin (scores are finite), so no second array is needed. Branches would be
        # guessed wrongly, so there are none.
        fresh = before != before
        memory.store_uint16(listed, n, c)
        n += U(fresh)
        before = np.float32(0.0) if fresh else before
        memory.store_float32(total, c, before + weight * memory.load_float32(scores, cell))
        cell += cells
    return n


@njit
def _copy_past_caches(source, target, count):
    """Copy float32 [count], whole cache lines past the caches; source, target: addresses."""
    line = np.uint64(64)
    head = min((line - target % line) % line >> np.uint64(2), count)
    lines = (count - head) >> np.uint64(4)
    for c in range(head):
        memory.store_float32(target, c, memory.load_float32(source, c))
    for n in range(lines):
        step = (head + (n << np.uint64(4))) << np.uint64(2)
        memory.copy_past_caches(source + step, target + step)
    for c in range(head + (lines << np.uint64(4)), count):
        memory.store_float32(target, c, memory.load_float32(source, c))


@njit
def _softmax_row(total, listed, n, num_classes, smoothing, row, out):
    """Softmax over C classes of which all but the `n` listed have score 0, smoothed, to `out` [C]; `total` is cleared.

    total, out: addresses of float32 [C]; listed: of uint16 [n]; row: of float32 [C] to work in, from where `out` is
    written past the caches, or 0 to write `out` at once.
    """
    highest = np.float32(-np.inf) if n == num_classes else np.float32(0.0)
    for t in range(n):
        highest = max(highest, memory.load_float32(total, np.uint64(memory.load_uint16(listed, t))))
    rest = np.float32(0.0) if n == num_classes else np.exp(-highest)
    mass = rest * np.float32(num_classes - n)
    for t in range(n):
        c = np.uint64(memory.load_uint16(listed, t))
        exponential = np.exp(memory.load_float32(total, c) - highest)
        memory.store_float32(total, c, exponential)
        mass += exponential
    off = np.float32(_smooth(rest / mass, smoothing, num_classes))
    values = row if row else out
    for c in range(num_classes):
        memory.store_float32(values, c, off)
    for t in range(n):
        c = np.uint64(memory.load_uint16(listed, t))
        share = memory.load_float32(total, c) / mass
        memory.store_float32(values, c, np.float32(_smooth(share, smoothing, num_classes)))
        memory.store_float32(total, c, np.float32(np.nan))
    if row:
        _copy_past_caches(row, out, num_classes)


@njit
def _aligned_sample(source, affine, grid, cut, work, target):
    """The rows of a sample whose crop is along the map's axes.

    source: addresses of classes and scores [k, rows, columns], then k, rows, columns; work: addresses `total`, `listed`
    and `row` as of `_softmax_row`; grid: (h, w); target: C, the smoothing, the address of the sample's float32 [1 +
    h*w, C]."""
    classes, scores, k, rows, columns = source
    total, listed, row = work
    num_classes, smoothing, out = target
    flip = affine[0] < 0.0
    top = affine[5] * np.float32(rows) - np.float32(0.5)
    left = (affine[2] + min(affine[0], np.float32(0.0))) * np.float32(columns) - np.float32(0.5)
    height = max(affine[4] * np.float32(rows), np.float32(1.0))
    width = max(abs(affine[0]) * np.float32(columns), np.float32(1.0))
    for level in range(2):
        bins_y, bins_x = grid if level else (1, 1)
        y_first, y_count, y_weights = _roi_table(top, height, bins_y, rows, cut)
        x_first, x_count, x_weights = _roi_table(left, width, bins_x, columns, cut)
        for i in range(bins_y):
            for column in range(bins_x):
                j = bins_x - 1 - column if flip else column
                n = U(0)
                for y in range(y_count[i]):
                    for x in range(x_count[j]):
                        cell = U((np.int64(y_first[i]) + y) * columns + np.int64(x_first[j]) + x)
                        weight = y_weights[i, y] * x_weights[j, x]
                        n = _add_cell(classes, scores, cell, U(rows * columns), k, weight, total, listed, n)
                row_out = out + U(4 * (level + i * bins_x + column)) * num_classes
                _softmax_row(total, listed, n, num_classes, smoothing, row, row_out)


@njit
def _warped_sample(source, affine, grid, cut, work, target):
    """The rows of a sample that is rotated or sheared; arguments as of `_aligned_sample`."""
    classes, scores, k, rows, columns = source
    total, listed, row = work
    num_classes, smoothing, out = target
    cells = np.empty(6, np.float64)
    for n in range(3):
        cells[n], cells[3 + n] = affine[n] * np.float64(columns), affine[3 + n] * np.float64(rows)
    cells[2] -= 0.5
    cells[5] -= 0.5
    extents = np.empty(2, np.float64)
    for n in range(2):  # a side of less than a cell is widened to one, about its middle
        extent = math.sqrt(cells[n] * cells[n] + cells[3 + n] * cells[3 + n])
        extents[n] = max(extent, 1.0)
        if 0.0 < extent < 1.0:
            for axis in (0, 3):
                wider = cells[axis + n] / extent
                cells[axis + 2] -= 0.5 * (wider - cells[axis + n])
                cells[axis + n] = wider
    xu, xv, x0, yu, yv, y0 = cells[0], cells[1], cells[2], cells[3], cells[4], cells[5]
    for level in range(2):
        bins_y, bins_x = grid if level else (1, 1)
        samples_x = _roi_samples(extents[0], bins_x, scalar.ROI_SLACK)
        samples_y = _roi_samples(extents[1], bins_y, scalar.ROI_SLACK)
        share = 1.0 / (samples_x * samples_y)
        for i in range(bins_y):
            for j in range(bins_x):
                n = U(0)
                for sy in range(samples_y):
                    v = i / bins_y + (sy + 0.5) * (1.0 / bins_y) / samples_y
                    for sx in range(samples_x):
                        u = j / bins_x + (sx + 0.5) * (1.0 / bins_x) / samples_x
                        column, x_low, x_high = _tap(xu * u + xv * v + x0, columns, cut)
                        line, y_low, y_high = _tap(yu * u + yv * v + y0, rows, cut)
                        for corner in range(4):
                            weight = np.float32(
                                (y_high if corner & 2 else y_low) * (x_high if corner & 1 else x_low) * share
                            )
                            if weight > 0.0:
                                cell = U((line + (corner >> 1)) * columns + column + (corner & 1))
                                n = _add_cell(classes, scores, cell, U(rows * columns), k, weight, total, listed, n)
                row_out = out + U(4 * (level + i * bins_x + j)) * num_classes
                _softmax_row(total, listed, n, num_classes, smoothing, row, row_out)


@njit
def write(classes, scores, affines, num_classes, grid, smoothing, cut, out):
    """`cpu.warped_targets` with its arguments checked and contiguous; grid: (h, w); out: float32 [B, 1 + h*w, C],
    written."""
    k, rows, columns = classes.shape[1], classes.shape[2], classes.shape[3]
    total = np.full(num_classes, np.float32(np.nan), np.float32)
    listed = np.empty(num_classes + 1, np.uint16)  # `_add_cell` writes an entry before it knows that its class is new
    row = np.empty(num_classes, np.float32)
    work = memory.address(total), memory.address(listed), memory.address(row) if num_classes >= PAST_CACHES else U(0)
    sample_bytes = U(4 * (1 + grid[0] * grid[1]) * num_classes)
    for b in range(classes.shape[0]):
        entry = U(b * k * rows * columns)
        source = memory.address(classes) + U(2) * entry, memory.address(scores) + U(4) * entry, U(k), rows, columns
        target = U(num_classes), smoothing, memory.address(out) + U(b) * sample_bytes
        if affines[b, 1] != 0.0 or affines[b, 3] != 0.0:
            _warped_sample(source, affines[b], grid, cut, work, target)
        else:
            _aligned_sample(source, affines[b], grid, cut, work, target)
    memory.publish()
    # Uses the arrays, so that they live until here: the loops have their addresses only.
    return total.size + listed.size + row.size
