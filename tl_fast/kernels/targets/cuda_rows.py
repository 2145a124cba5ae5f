"""Rows of the token targets' kernel: what a block's threads share, how rows go out, and how a warp makes one.

A row of C scores lies in shared memory, NaN where no class of its bin is. Loops of a thread are written with `while`:
`range` with a step divides, and the compiler unrolls it until registers are short.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tl_fast.kernels.cuda_device import (
    ONE,
    ZERO,
    I,
    device,
    in_step,
    load16,
    pack_bfloat16,
    peek,
    poke,
    scalar32,
    store16,
    warp_max,
    warp_sum,
)
from tl_fast.kernels.targets.cuda_bins import (
    FLIPPED,
    KIND,
    SAMPLES_X,
    SAMPLES_Y,
    STEP_M,
    STEP_T,
    WARPED,
    warped_taps,
)

_smooth = scalar32.smooth

LANES = 32  # threads that share a row: a warp
GROUPS = 8  # rows that a block works on at once, where shared memory has room for them
NAN, LOW = np.float32(np.nan), np.float32(-np.inf)
NONE = 65535  # in a list of classes: met before


class Task(NamedTuple):
    """Sizes of maps and targets, the same for all rows of a block; bins_y, bins_x: down and across."""

    k: int
    height: int
    width: int
    num_classes: int
    bins_y: int
    bins_x: int
    smoothing: float
    cut: bool


class Block(NamedTuple):
    """This thread: lane `lane` of the `lanes` in its group, and group `group` of `groups`."""

    lane: int
    lanes: int
    group: int
    groups: int


class Shared(NamedTuple):
    """A block's shared memory: the dynamic part as float32, int32 and uint16, then the crop (`cuda_bins.place_crop`);
    float32 [GROUPS] and [LANES] for sums."""

    rows: Any
    integers: Any
    shorts: Any
    crop: Any
    state: Any
    partial: Any
    scratch: Any


class Places(NamedTuple):
    """First elements in dynamic shared memory. Of a group: its row, values of entries, weights and numbers of cells,
    classes of entries (uint16); `share`: from group to group. Of the block: bins along the
    axes, of up to `reach` cells each; weights of cells."""

    row: int
    values: int
    weights: int
    cells: int
    listed: int
    share: int
    axes: int
    reach: int
    cell_weights: int


# --- out


@device
def write_float32(rows, base, other, num_classes, vector, out, first, lane, lanes):
    """The row that begins at rows[base] to out[first ...], with `other` for NaN. vector: 16 bytes at a time, which rows
    of a whole block and of damaged maps do without."""
    if vector:
        n = I(4 * lane)
        while n < num_classes:
            a, b, c, d = load16(rows, base + n)
            a = other if a != a else a
            b = other if b != b else b
            c = other if c != c else c
            d = other if d != d else d
            store16(out, first + n, a, b, c, d)
            n = I(n + 4 * lanes)
    else:
        n = lane
        while n < num_classes:
            value = peek(rows, base + n)
            poke(out, first + n, other if value != value else value)
            n = I(n + lanes)


@device
def _pair(a, b, other):
    return pack_bfloat16(other if a != a else a, other if b != b else b)


@device
def write_bfloat16(rows, base, other, num_classes, vector, out, first, lane, lanes):
    """As `write_float32`, rounded to bfloat16; out: uint16."""
    if vector:
        n = I(8 * lane)
        while n < num_classes:
            a, b, c, d = load16(rows, base + n)
            word0, word1 = _pair(a, b, other), _pair(c, d, other)
            a, b, c, d = load16(rows, base + n + 4)
            store16(out, first + n, word0, word1, _pair(a, b, other), _pair(c, d, other))
            n = I(n + 8 * lanes)
    else:
        n = lane
        while n < num_classes:
            value = peek(rows, base + n)
            poke(out, first + n, np.uint16(_pair(value, value, other) & 0xFFFF))
            n = I(n + lanes)


# --- rows of a warp. Entry e of a bin is score t of its cell m, e = m k + t.


@device
def _weigh_cell(n, i, j, axis_y, axis_x, task, shared, places, lane):
    """Number and weight of cell `n` of bin (i, j), by this lane; axis_y, axis_x: the bin in the tables of the axes."""
    rows, integers, reach = shared.rows, shared.integers, places.reach
    if shared.state[KIND] == WARPED:
        samples = I(shared.state[SAMPLES_X]), I(shared.state[SAMPLES_Y])
        column, x_low, x_high, line, y_low, y_high = warped_taps(shared.crop, samples, i, j, n >> 2, task)
        weight = (y_high if n & 2 else y_low) * (x_high if n & 1 else x_low) / np.float32(samples[0] * samples[1])
        cell = I((line + (n >> 1 & 1)) * task.width + column + (n & 1)) if weight > ZERO else I(0)
    else:
        across = peek(integers, axis_x + reach + 1)
        line = I(n // across)
        column = I(n - line * across)
        weight = peek(rows, axis_y + line) * peek(rows, axis_x + column)
        cell = I((peek(integers, axis_y + reach) + line) * task.width + peek(integers, axis_x + reach) + column)
    poke(rows, places.weights + lane, weight)
    poke(integers, places.cells + lane, cell)


@device
def _add_entries(first, end, k, shared, places, block):
    """Add the entries of cells first .. end - 1 to the row, cell after cell; those whose class the row has already
    leave the list."""
    rows, shorts, listed = shared.rows, shared.shorts, places.listed
    for m in range(first, end):
        t = block.lane
        while t < k:
            e = I(m * k + t)
            c = I(peek(shorts, listed + e))
            if c != NONE:
                met = peek(rows, places.row + c)
                value = peek(rows, places.values + e)
                if met == met:
                    value += met
                    poke(shorts, listed + e, NONE)
                poke(rows, places.row + c, value)
            t = I(t + block.lanes)
        in_step()


@device
def _softmax(used, task, shared, places, block):
    """Softmax and smoothing of the row's listed classes, those of the first `used` entries -> the others' target."""
    lane, lanes, _, _ = block
    rows, shorts, values, listed = shared.rows, shared.shorts, places.values, places.listed
    highest, mine = LOW, ZERO
    e = lane
    while e < used:
        c = I(peek(shorts, listed + e))
        if c != NONE:
            value = peek(rows, places.row + c)
            poke(rows, values + e, value)
            highest = max(highest, value)
            mine += ONE
        e = I(e + lanes)
    highest = warp_max(highest, shared.scratch, lane, lanes)
    others = np.float32(task.num_classes) - warp_sum(mine, shared.scratch, lane, lanes)
    if others > ZERO:
        highest = max(highest, ZERO)
    rest = math.exp(-highest) if others > ZERO else ZERO
    mass = ZERO
    e = lane
    while e < used:
        if I(peek(shorts, listed + e)) != NONE:
            value = math.exp(peek(rows, values + e) - highest)
            poke(rows, values + e, value)
            mass += value
        e = I(e + lanes)
    scale = ONE / (warp_sum(mass, shared.scratch, lane, lanes) + rest * others)
    e = lane
    while e < used:
        c = I(peek(shorts, listed + e))
        if c != NONE:
            poke(rows, places.row + c, _smooth(peek(rows, values + e) * scale, task.smoothing, task.num_classes))
        e = I(e + lanes)
    in_step()
    return _smooth(rest * scale, task.smoothing, task.num_classes)


@device
def _clear(used, shared, places, block):
    """Make the row's listed classes NaN again."""
    e = block.lane
    while e < used:
        c = I(peek(shared.shorts, places.listed + e))
        if c != NONE:
            poke(shared.rows, places.row + c, NAN)
        e = I(e + block.lanes)
    in_step()


def build_warp_row(read: Callable, write: Callable) -> Callable:
    """The device function that makes one row with the threads of a warp, where the bin's entries have room."""

    @device
    def list_entries(label_map, chunk, count, start, task, shared, places, block):
        """Classes and weighted scores of the entries of `count` cells from cell `chunk` on; start: the cell and score
        that this lane begins with."""
        cells = I(task.height * task.width)
        m, t = start
        e = I(chunk * task.k + block.lane)
        while m < count:
            weight = peek(shared.rows, places.weights + m)
            c, score = read(label_map, I(t * cells + peek(shared.integers, places.cells + m)))
            poke(shared.shorts, places.listed + e, c if weight > ZERO else I(NONE))
            poke(shared.rows, places.values + e, weight * score)
            e = I(e + block.lanes)
            m = I(m + shared.state[STEP_M])
            t = I(t + shared.state[STEP_T])
            if t >= task.k:
                t = I(t - task.k)
                m = I(m + 1)
        in_step()

    @device
    def warp_row(label_map, task, row, start, shared, places, block, vector, out, first):
        """Row `row` >= 1 to out[first ...]; start: as of `list_entries`. The group's row holds NaN before and after."""
        lane, lanes, _, _ = block
        state, reach, bins_x = shared.state, places.reach, task.bins_x
        i = I((row - 1) // bins_x)
        j = I(row - 1 - i * bins_x)
        axis_y = I(places.axes + i * (reach + 2))
        axis_x = I(places.axes + (task.bins_y + (bins_x - 1 - j if state[KIND] == FLIPPED else j)) * (reach + 2))
        cells = I(4 * state[SAMPLES_X] * state[SAMPLES_Y])
        if state[KIND] != WARPED:
            cells = I(peek(shared.integers, axis_y + reach + 1) * peek(shared.integers, axis_x + reach + 1))
        chunk = I(0)
        while chunk < cells:
            n = I(chunk + lane)
            if n < cells:
                _weigh_cell(n, i, j, axis_y, axis_x, task, shared, places, lane)
            in_step()
            count = I(min(lanes, cells - chunk))
            list_entries(label_map, chunk, count, start, task, shared, places, block)
            _add_entries(chunk, I(chunk + count), task.k, shared, places, block)
            chunk = I(chunk + lanes)
        used = I(cells * task.k)
        other = _softmax(used, task, shared, places, block)
        write(shared.rows, places.row, other, task.num_classes, vector, out, first, lane, lanes)
        in_step()
        _clear(used, shared, places, block)

    return warp_row
