"""The CUDA kernel of the token targets: one launch a batch, a warp a token row, the class token's row by a whole block.

A row of C scores lies in shared memory, NaN where no class of its bin is. The bin's cells are added to it one after the
other, the classes of a cell side by side, so sums have one order and repeat bit for bit; then the few classes met get
their softmax, the rest share one value, and the row is written in 16-byte stores. Rows of many cells (the class
token's) are spread over the block: weights of cells as whole numbers of 2**-30, whose order does not matter, then every
warp adds its share of the cells. docs/kernels.md counts the bytes.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32, int32, uint16

from tl_fast.kernels.cuda_device import (
    ALIGNMENT,
    device,
    gpu,
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
    CROWDED,
    EXTENT_X,
    EXTENT_Y,
    FLIPPED,
    FLOATS,
    INTEGERS,
    KIND,
    LEFT,
    SAMPLES_X,
    SAMPLES_Y,
    STEP_M,
    STEP_T,
    WARPED,
    WRONG,
    fill_axis,
    place_crop,
    roi_point,
    tap,
    warped_point,
)
from tl_fast.kernels.targets.cuda_maps import PALETTE, READERS, open_arrays, open_bytes, read_arrays, read_bytes

_smooth = scalar32.smooth

LANES = 32  # threads that share a row: a warp
GROUPS = 8  # rows that a block works on at once, where shared memory has room for them
BOUNDS = LANES * GROUPS, 3  # threads of a block; blocks that a multiprocessor shall have registers for: 80 each
ZERO, HALF, ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
NAN, LOW = np.float32(np.nan), np.float32(-np.inf)
SHARE, UNSHARE = np.float32(2.0**30), np.float32(2.0**-30)
NONE = 65535  # in a list of classes: met before
I = np.int32  # numba makes int64 of every sum of int32: casts let the compiler go back  # noqa: E741
# Loops of a thread are written with `while`: `range` with a step divides, and the compiler unrolls it until registers
# are short.


@device
def _write_float32(rows, base, other, num_classes, vector, out, first, lane, lanes):
    """Row `base` of shared memory to out[first ...], `other` where it has NaN; vector: 16 bytes at a time, which the
    rare rows leave be."""
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
def _write_bfloat16(rows, base, other, num_classes, vector, out, first, lane, lanes):
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


@device
def _block_sum(value, partial, scratch, lane, lanes, group, groups):
    value = warp_sum(value, scratch, lane, lanes)
    gpu.syncthreads()
    if lane == 0:
        poke(partial, group, value)
    gpu.syncthreads()
    total = ZERO
    for n in range(groups):
        total += peek(partial, n)
    return total


def _build(open_map, read, write):
    """The kernel for one kind of source and one type of output."""

    @device
    def block_row(
        source,
        layout,
        first,
        entries,
        palette,
        k,
        height,
        width,
        num_classes,
        smoothing,
        cut,
        row,
        bins,
        crop,
        state,
        rows,
        integers,
        cell_weights,
        partial,
        scratch,
        lane,
        lanes,
        group,
        groups,
        pitch,
        out,
        out_at,
    ):
        """One row by all threads of a block, whatever its bin covers."""
        thread, threads, cells = I(group * lanes + lane), I(lanes * groups), I(height * width)
        base = I(group * pitch)
        i = I(0) if row == 0 else I((row - 1) // bins)
        j = I(0) if row == 0 else I(row - 1 - i * bins)
        n = thread
        while n < cells:
            poke(integers, cell_weights + n, 0)
            n = I(n + threads)
        gpu.syncthreads()
        samples_x, samples_y = I(state[SAMPLES_X]), I(state[SAMPLES_Y])
        share = SHARE / np.float32(samples_x * samples_y)
        n = thread
        while n < I(samples_x * samples_y):
            sy = I(n // samples_x)
            sx = I(n - sy * samples_x)
            if state[KIND] == WARPED:
                x = warped_point(crop, 0, i, j, sy, sx, bins, samples_x, samples_y)
                y = warped_point(crop, 3, i, j, sy, sx, bins, samples_x, samples_y)
            else:
                x = roi_point(
                    bins - 1 - j if state[KIND] == FLIPPED else j, sx, crop[LEFT], crop[EXTENT_X], bins, samples_x
                )
                y = roi_point(i, sy, crop[5], crop[EXTENT_Y], bins, samples_y)
            column, x_low, x_high = tap(x, width, cut)
            line, y_low, y_high = tap(y, height, cut)
            for corner in range(4):
                weight = (y_high if corner & 2 else y_low) * (x_high if corner & 1 else x_low)
                if weight > ZERO:
                    place = I((line + (corner >> 1)) * width + column + (corner & 1))
                    gpu.atomic.add(integers, cell_weights + place, I(weight * share + HALF))
            n = I(n + threads)
        gpu.syncthreads()
        for n in range(group, cells, groups):
            whole = peek(integers, cell_weights + n)
            if whole:
                weight = np.float32(whole) * UNSHARE
                t = lane
                while t < k:
                    c, score = read(source, layout, first, crop, entries, palette, I(t * cells + n))
                    met = peek(rows, base + c)
                    poke(rows, base + c, weight * score if met != met else met + weight * score)
                    t = I(t + lanes)
                in_step()
        gpu.syncthreads()
        highest, count = LOW, ZERO
        c = thread
        while c < num_classes:
            total = NAN
            for n in range(groups):
                value = peek(rows, n * pitch + c)
                if value == value:
                    total = value if total != total else total + value
                    poke(rows, n * pitch + c, NAN)
            if total == total:
                highest = max(highest, total)
                count += ONE
            poke(rows, c, total)
            c = I(c + threads)
        highest = warp_max(highest, scratch, lane, lanes)
        if lane == 0:
            poke(partial, group, highest)
        gpu.syncthreads()
        for n in range(groups):
            highest = max(highest, peek(partial, n))
        others = np.float32(num_classes) - _block_sum(count, partial, scratch, lane, lanes, group, groups)
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
        scale = ONE / (_block_sum(mass, partial, scratch, lane, lanes, group, groups) + rest * others)
        c = thread
        while c < num_classes:
            value = peek(rows, c)
            if value == value:
                poke(rows, c, _smooth(value * scale, smoothing, num_classes))
            c = I(c + threads)
        gpu.syncthreads()
        write(rows, 0, _smooth(rest * scale, smoothing, num_classes), num_classes, False, out, out_at, thread, threads)
        gpu.syncthreads()
        c = thread
        while c < num_classes:
            poke(rows, c, NAN)
            c = I(c + threads)
        gpu.syncthreads()

    def targets(
        source,
        small,
        large,
        affines,
        k,
        height,
        width,
        num_classes,
        grid,
        smoothing,
        cut,
        slots,
        reach,
        tokens,
        vector,
        out,
        errors,
    ):
        """Block (0, b) makes the class token's row of sample b, the others `tokens` rows each.

        source, small, large: as of `cuda_maps.open_*`; affines: float32 [6 B]; slots: entries of a bin that a group has
        room for, at least k reach**2; reach: cells of a bin along one axis that there is room for; vector: rows of
        `out` begin at multiples of 16 bytes; out: [B (1 + grid**2) C], written; errors: int32 [B], 0 or the code of
        what is wrong with the map, all of whose targets are NaN then. Dynamic shared memory: `shared_bytes`.
        """
        rows = cuda.shared.array(0, float32, ALIGNMENT)
        integers = cuda.shared.array(0, int32, ALIGNMENT)
        shorts = cuda.shared.array(0, uint16, ALIGNMENT)
        palette = cuda.shared.array(PALETTE, uint16)
        counts = cuda.shared.array(READERS, int32)
        crop = cuda.shared.array(FLOATS, float32)
        state = cuda.shared.array(INTEGERS, int32)
        partial = cuda.shared.array(GROUPS, float32)
        scratch = cuda.shared.array(LANES, float32)
        lane, group, lanes, groups = I(cuda.threadIdx.x), I(cuda.threadIdx.y), I(cuda.blockDim.x), I(cuda.blockDim.y)
        thread, threads = I(group * lanes + lane), I(lanes * groups)
        k, height, width, num_classes, grid = I(k), I(height), I(width), I(num_classes), I(grid)
        slots, reach = I(slots), I(reach)
        b, cells, all_rows = I(cuda.blockIdx.y), I(height * width), I(1 + grid * grid)
        entries = I(k * cells)
        stride = I((num_classes + 3) >> 2 << 2)
        share = I(stride + slots + 2 * LANES + (slots >> 1))  # of a group
        base = I(group * share)
        values = I(base + stride)
        weights = I(values + slots)
        places = I(weights + LANES)
        listed = I(2 * (places + LANES))
        axes = I(groups * share)
        cell_weights = I(axes + 2 * grid * (reach + 2))
        begin = I(0) if cuda.blockIdx.x == 0 else I(1 + (cuda.blockIdx.x - 1) * tokens)
        end = I(1) if cuda.blockIdx.x == 0 else I(min(begin + tokens, all_rows))
        bins = I(1) if begin == 0 else grid
        if thread < 2:
            state[thread] = 0  # WRONG and CROWDED
        if thread == threads - 1:
            place_crop(affines, b, height, width, bins, crop, state)
            state[STEP_M] = lanes // k
            state[STEP_T] = lanes % k
        for c in range(lane, stride, lanes):
            poke(rows, base + c, NAN)
        cuda.syncthreads()
        layout, first, _ = open_map(
            source, b, entries, num_classes, small, large, palette, counts, state, crop, thread, threads
        )
        if begin and state[KIND] != WARPED:
            for n in range(thread, I(2 * bins), threads):
                at = I(axes + n * (reach + 2))
                if n < bins:
                    fill_axis(
                        rows,
                        integers,
                        at,
                        n,
                        crop[5],
                        crop[EXTENT_Y],
                        bins,
                        state[SAMPLES_Y],
                        height,
                        cut,
                        reach,
                        state,
                    )
                else:
                    i = I(n - bins)
                    fill_axis(
                        rows,
                        integers,
                        at,
                        i,
                        crop[LEFT],
                        crop[EXTENT_X],
                        bins,
                        state[SAMPLES_X],
                        width,
                        cut,
                        reach,
                        state,
                    )
        cuda.syncthreads()
        if state[WRONG]:
            if thread == 0:
                errors[b] = state[WRONG]
            for row in range(I(begin + group), end, groups):
                write(
                    rows, base, NAN, num_classes, False, out, (np.int64(b) * all_rows + row) * num_classes, lane, lanes
                )
            return
        warped = state[KIND] == WARPED
        if begin == 0 or state[CROWDED] or (warped and 4 * k * state[SAMPLES_X] * state[SAMPLES_Y] > slots):
            for row in range(begin, end):
                block_row(
                    source,
                    layout,
                    first,
                    entries,
                    palette,
                    k,
                    height,
                    width,
                    num_classes,
                    smoothing,
                    cut,
                    row,
                    bins,
                    crop,
                    state,
                    rows,
                    integers,
                    cell_weights,
                    partial,
                    scratch,
                    lane,
                    lanes,
                    group,
                    groups,
                    share,
                    out,
                    (np.int64(b) * all_rows + row) * num_classes,
                )
            return

        # A row a group. Entry e of a bin is score t of its cell m, e = m k + t.
        lane_m = I(lane // k)
        lane_t = I(lane - lane_m * k)
        row = I(begin + group)
        while row < end:
            i = I((row - 1) // grid)
            j = I(row - 1 - i * grid)
            axis_y = I(axes + i * (reach + 2))
            axis_x = I(axes + (grid + (grid - 1 - j if state[KIND] == FLIPPED else j)) * (reach + 2))
            taps = I(4 * state[SAMPLES_X] * state[SAMPLES_Y])
            if not warped:
                taps = I(peek(integers, axis_y + reach + 1) * peek(integers, axis_x + reach + 1))
            chunk = I(0)
            while chunk < taps:
                n = I(chunk + lane)
                if n < taps:
                    if warped:
                        samples_x, samples_y = I(state[SAMPLES_X]), I(state[SAMPLES_Y])
                        sy = I((n >> 2) // samples_x)
                        sx = I((n >> 2) - sy * samples_x)
                        column, x_low, x_high = tap(
                            warped_point(crop, 0, i, j, sy, sx, bins, samples_x, samples_y), width, cut
                        )
                        line, y_low, y_high = tap(
                            warped_point(crop, 3, i, j, sy, sx, bins, samples_x, samples_y), height, cut
                        )
                        weight = (
                            (y_high if n & 2 else y_low)
                            * (x_high if n & 1 else x_low)
                            / np.float32(samples_x * samples_y)
                        )
                        place = I((line + (n >> 1 & 1)) * width + column + (n & 1)) if weight > ZERO else I(0)
                    else:
                        across = peek(integers, axis_x + reach + 1)
                        line = I(n // across)
                        column = I(n - line * across)
                        weight = peek(rows, axis_y + line) * peek(rows, axis_x + column)
                        place = I(
                            (peek(integers, axis_y + reach) + line) * width + peek(integers, axis_x + reach) + column
                        )
                    poke(rows, weights + lane, weight)
                    poke(integers, places + lane, place)
                in_step()
                count = I(min(lanes, taps - chunk))
                m, t, e = lane_m, lane_t, I(chunk * k + lane)
                while m < count:
                    weight = peek(rows, weights + m)
                    c, score = read(
                        source, layout, first, crop, entries, palette, I(t * cells + peek(integers, places + m))
                    )
                    poke(shorts, listed + e, c if weight > ZERO else I(NONE))
                    poke(rows, values + e, weight * score)
                    e = I(e + lanes)
                    m = I(m + state[STEP_M])
                    t = I(t + state[STEP_T])
                    if t >= k:
                        t = I(t - k)
                        m = I(m + 1)
                in_step()
                for m in range(chunk, I(chunk + count)):
                    t = lane
                    while t < k:
                        e = I(m * k + t)
                        c = I(peek(shorts, listed + e))
                        if c != NONE:
                            met = peek(rows, base + c)
                            value = peek(rows, values + e)
                            if met == met:
                                value += met
                                poke(shorts, listed + e, NONE)
                            poke(rows, base + c, value)
                        t = I(t + lanes)
                    in_step()
                chunk = I(chunk + lanes)
            used = I(taps * k)
            highest, mine = LOW, ZERO
            e = lane
            while e < used:
                c = I(peek(shorts, listed + e))
                if c != NONE:
                    value = peek(rows, base + c)
                    poke(rows, values + e, value)
                    highest = max(highest, value)
                    mine += ONE
                e = I(e + lanes)
            highest = warp_max(highest, scratch, lane, lanes)
            others = np.float32(num_classes) - warp_sum(mine, scratch, lane, lanes)
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
            scale = ONE / (warp_sum(mass, scratch, lane, lanes) + rest * others)
            e = lane
            while e < used:
                c = I(peek(shorts, listed + e))
                if c != NONE:
                    poke(rows, base + c, _smooth(peek(rows, values + e) * scale, smoothing, num_classes))
                e = I(e + lanes)
            in_step()
            other = _smooth(rest * scale, smoothing, num_classes)
            write(
                rows, base, other, num_classes, vector, out, (np.int64(b) * all_rows + row) * num_classes, lane, lanes
            )
            in_step()
            e = lane
            while e < used:
                c = I(peek(shorts, listed + e))
                if c != NONE:
                    poke(rows, base + c, NAN)
                e = I(e + lanes)
            in_step()
            row = I(row + groups)

    return targets


def shared_bytes(groups: int, num_classes: int, slots: int, grid: int, reach: int, cells: int) -> int:
    """Dynamic shared memory of the kernel: for each group float32 [C rounded up to 4] a row, float32 [slots] values of
    entries, float32 [LANES] weights and int32 [LANES] places of cells, uint16 [slots] classes; then [2 grid, reach + 2]
    bins along the axes and int32 [H W] weights of cells. slots: a multiple of 8."""
    stride = (num_classes + 3) // 4 * 4
    return 4 * (groups * (stride + slots + 2 * LANES + slots // 2) + 2 * grid * (reach + 2) + cells)


KERNELS = {
    (kind, bfloat16): _build(*reading, _write_bfloat16 if bfloat16 else _write_float32)
    for kind, reading in (("arrays", (open_arrays, read_arrays)), ("bytes", (open_bytes, read_bytes)))
    for bfloat16 in (False, True)
}
"""The kernels, not compiled yet, by the source of the maps and whether `out` is bfloat16."""
