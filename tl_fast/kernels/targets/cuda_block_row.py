"""A row of the token targets' kernel that a whole block makes: the class token's, and others whose bin has many cells.

The threads share the bin's sampling points and sum them up as weights of cells; then every group of threads adds up the
scores of its share of the cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tl_fast.kernels.cuda_device import (
    HALF,
    ONE,
    ZERO,
    I,
    device,
    gpu,
    in_step,
    peek,
    poke,
    scalar32,
    warp_max,
    warp_sum,
)
from tl_fast.kernels.targets.cuda_bins import (
    EXTENT_X,
    EXTENT_Y,
    FLIPPED,
    KIND,
    LEFT,
    SAMPLES_X,
    SAMPLES_Y,
    WARPED,
    roi_point,
    tap,
    warped_taps,
)
from tl_fast.kernels.targets.cuda_rows import LOW, NAN

_smooth = scalar32.smooth

SHARE, UNSHARE = np.float32(2.0**30), np.float32(2.0**-30)


@device
def _block_sum(value, shared, block):
    """The sum of the values of all threads of a block."""
    lane, lanes, group, groups = block
    partial, scratch = shared.partial, shared.scratch
    value = warp_sum(value, scratch, lane, lanes)
    gpu.syncthreads()
    if lane == 0:
        poke(partial, group, value)
    gpu.syncthreads()
    total = ZERO
    for n in range(groups):
        total += peek(partial, n)
    return total


@device
def _spread(task, shared, cell_weights, i, j, block):
    """Weights of all cells in bin (i, j), whole numbers of 2**-30, whose sums do not depend on the order."""
    thread, threads = I(block.group * block.lanes + block.lane), I(block.lanes * block.groups)
    crop, state = shared.crop, shared.state
    n = thread
    while n < I(task.height * task.width):
        poke(shared.integers, cell_weights + n, 0)
        n = I(n + threads)
    gpu.syncthreads()
    samples_x, samples_y = I(state[SAMPLES_X]), I(state[SAMPLES_Y])
    share = SHARE / np.float32(samples_x * samples_y)
    n = thread
    while n < I(samples_x * samples_y):
        if state[KIND] == WARPED:
            column, x_low, x_high, line, y_low, y_high = warped_taps(crop, (samples_x, samples_y), i, j, n, task)
        else:
            sy = I(n // samples_x)
            sx = I(n - sy * samples_x)
            bin_x = task.bins_x - 1 - j if state[KIND] == FLIPPED else j
            x = roi_point(bin_x, sx, crop[LEFT], crop[EXTENT_X], task.bins_x, samples_x)
            y = roi_point(i, sy, crop[5], crop[EXTENT_Y], task.bins_y, samples_y)
            column, x_low, x_high = tap(x, task.width, task.cut)
            line, y_low, y_high = tap(y, task.height, task.cut)
        for corner in range(4):
            weight = (y_high if corner & 2 else y_low) * (x_high if corner & 1 else x_low)
            if weight > ZERO:
                cell = I((line + (corner >> 1)) * task.width + column + (corner & 1))
                gpu.atomic.add(shared.integers, cell_weights + cell, I(weight * share + HALF))
        n = I(n + threads)
    gpu.syncthreads()


@device
def _gather(num_classes, shared, share, block):
    """Add up the groups' rows, `share` elements apart, into the first and clear the others -> (highest score, number of
    classes) among those of this thread."""
    thread, threads = I(block.group * block.lanes + block.lane), I(block.lanes * block.groups)
    rows = shared.rows
    highest, count = LOW, ZERO
    c = thread
    while c < num_classes:
        total = NAN
        for n in range(block.groups):
            value = peek(rows, n * share + c)
            if value == value:
                total = value if total != total else total + value
                poke(rows, n * share + c, NAN)
        if total == total:
            highest = max(highest, total)
            count += ONE
        poke(rows, c, total)
        c = I(c + threads)
    return highest, count


@device
def _block_softmax(highest, count, num_classes, smoothing, shared, block):
    """Softmax and smoothing of the first row, by all threads -> the target of the classes that it lacks. highest,
    count: `_gather`'s."""
    lane, lanes, group, groups = block
    thread, threads = I(group * lanes + lane), I(lanes * groups)
    rows = shared.rows
    highest = warp_max(highest, shared.scratch, lane, lanes)
    if lane == 0:
        poke(shared.partial, group, highest)
    gpu.syncthreads()
    for n in range(groups):
        highest = max(highest, peek(shared.partial, n))
    others = np.float32(num_classes) - _block_sum(count, shared, block)
    if others > ZERO:
        highest = max(highest, ZERO)
    rest = math.exp(-highest) if others > ZERO else ZERO
    mass = ZERO
    c = thread
    while c < num_classes:
        value = peek(rows, c)
        if value == value:
            value = math.exp(value - highest)
            poke(rows, c, value)
            mass += value
        c = I(c + threads)
    scale = ONE / (_block_sum(mass, shared, block) + rest * others)
    c = thread
    while c < num_classes:
        value = peek(rows, c)
        if value == value:
            poke(rows, c, _smooth(value * scale, smoothing, num_classes))
        c = I(c + threads)
    gpu.syncthreads()
    return _smooth(rest * scale, smoothing, num_classes)


def build_block_row(read: Callable, write: Callable) -> Callable:
    """The device function that makes one row with all threads of a block, whatever its bin covers."""

    @device
    def add_cells(label_map, task, shared, places, block):
        """Every group adds its share of the cells to its row."""
        cells = I(task.height * task.width)
        for n in range(block.group, cells, block.groups):
            whole = peek(shared.integers, places.cell_weights + n)
            if whole:
                weight = np.float32(whole) * UNSHARE
                t = block.lane
                while t < task.k:
                    c, score = read(label_map, I(t * cells + n))
                    met = peek(shared.rows, places.row + c)
                    poke(shared.rows, places.row + c, weight * score if met != met else met + weight * score)
                    t = I(t + block.lanes)
                in_step()
        gpu.syncthreads()

    @device
    def block_row(label_map, task, row, shared, places, block, out, first):
        """Row `row` to out[first ...]. All groups' rows hold NaN before and after."""
        thread, threads = I(block.group * block.lanes + block.lane), I(block.lanes * block.groups)
        i = I(0) if row == 0 else I((row - 1) // task.bins_x)
        j = I(0) if row == 0 else I(row - 1 - i * task.bins_x)
        _spread(task, shared, places.cell_weights, i, j, block)
        add_cells(label_map, task, shared, places, block)
        highest, count = _gather(task.num_classes, shared, places.share, block)
        other = _block_softmax(highest, count, task.num_classes, task.smoothing, shared, block)
        write(shared.rows, 0, other, task.num_classes, False, out, first, thread, threads)
        gpu.syncthreads()
        c = thread
        while c < task.num_classes:
            poke(shared.rows, c, NAN)
            c = I(c + threads)
        gpu.syncthreads()

    return block_row
