"""The CUDA kernel of the token targets: one launch a batch, a warp a token row, the class token's row by a whole block.

A row of C scores lies in shared memory, NaN where no class of its bin is. The bin's cells are added to it one after the other, the classes of a cell
side by side, so sums have one order and repeat bit for bit; then the few classes met get their softmax, the rest share one value, and the row is
written in 16-byte stores. Rows of many cells (the class token's) are spread over the block: weights of cells as whole numbers of 2**-30, whose
order does not matter, then every warp adds its share of the cells. docs/kernels.md counts the bytes.
"""
from __future__ import annotations

import math

import numpy as np
from numba import cuda, float32, int32, uint16

from tl_fast import scalar
from tl_fast.kernels.cuda_device import ALIGNMENT, SIMULATED, device, load16, pack_bfloat16, scalar32, store16
from tl_fast.kernels.maps import BAD_BITMAP, BAD_CLASS, BAD_INDEX, BAD_SIZE

_roi_samples, _roi_point, _roi_tap, _smooth = scalar32.roi_samples, scalar32.roi_point, scalar32.roi_tap, scalar32.smooth
_roi_outside = scalar32.roi_outside

LANES = 32  # threads that share a row: a warp
GROUPS = 8  # rows that a block works on at once, where shared memory has room for them
PALETTE = 512  # classes that a palette may have
PLAIN, PLACES8, PLACES9, ARRAYS = 0, 1, 2, 3  # layouts of a map: docs/file_format.md's, or arrays of classes and scores
SLACK = np.float32(scalar.ROI_SLACK)
ZERO, HALF, ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
NAN, LOW = np.float32(np.nan), np.float32(-np.inf)
SHARE, UNSHARE = np.float32(2.0**30), np.float32(2.0**-30)
NONE = 65535  # in a list of classes: met before

# A warp is in step by itself; in the simulator a block is one group of any number of threads.
if SIMULATED:

    def _in_step():
        cuda.syncthreads()

    def _highest(value, scratch, lane, lanes):
        """The highest value of a group's threads, and their sum below; scratch: float32 in shared memory, one a thread."""
        cuda.syncthreads()
        scratch[lane] = value
        cuda.syncthreads()
        return np.float32(max(scratch[:lanes]))

    def _sum(value, scratch, lane, lanes):
        cuda.syncthreads()
        scratch[lane] = value
        cuda.syncthreads()
        return np.float32(sum(scratch[:lanes]))

else:

    @device
    def _in_step():
        cuda.syncwarp()

    @device
    def _highest(value, scratch, lane, lanes):
        for mask in (16, 8, 4, 2, 1):
            value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, mask))
        return value

    @device
    def _sum(value, scratch, lane, lanes):
        for mask in (16, 8, 4, 2, 1):
            value += cuda.shfl_xor_sync(0xFFFFFFFF, value, mask)
        return value


@device
def _tap(point, cells, cut):
    if cut and _roi_outside(point, cells):
        return 0, ZERO, ZERO
    return _roi_tap(point, cells)


# --- where the label maps come from


@device
def _open_arrays(source, b, cells, num_classes, small, large, palette, counts, flags, thread, threads):
    """What `_read` needs to know of sample b's map: (layout, first element, number of classes in the palette, score_min, score_step)."""
    wrong = 0
    for e in range(thread, cells, threads):
        if source[0][b * cells + e] >= num_classes:
            wrong = BAD_CLASS
    if wrong:
        cuda.atomic.max(flags, 0, wrong)
    return ARRAYS, b * cells, 0, ZERO, ONE


@device
def _read_arrays(source, layout, first, listed, low, step, cells, num_classes, palette, e):
    """Class and score of entry `e`; the class is below num_classes whatever the map says."""
    return min(np.int32(source[0][first + e]), num_classes - 1), source[1][first + e]


@device
def _open_bytes(source, b, cells, num_classes, small, large, palette, counts, flags, thread, threads):
    """`_open_arrays` of a map as it lies in a beton: finds its layout, reads the palette and checks every entry, all threads together."""
    maps, starts, ranges = source[0], source[1], source[2]
    first, size = starts[b], starts[b + 1] - starts[b]
    low, step = ranges[2 * b], ranges[2 * b + 1]
    layout, wrong, listed = PLAIN, 0, 0
    if size != 3 * cells:
        layout = PLACES8 if size == small else PLACES9
        if size != small and size != large:
            if thread == 0:
                cuda.atomic.max(flags, 0, BAD_SIZE)
            return PLAIN, np.int64(0), 0, low, step
        width = (num_classes + 7) // 8
        readers = min(threads, LANES)  # each counts the classes in its part of the bitmap, then lists them behind those of the parts before
        part = (width + readers - 1) // readers
        begin, end = min(thread * part, width), min((thread + 1) * part, width)
        if thread < readers:
            count = 0
            for j in range(begin, end):
                count += cuda.popc(np.uint32(maps[first + j]))
            counts[thread] = count
        cuda.syncthreads()
        place = 0
        for n in range(readers):
            if n < thread:
                place += counts[n]
            listed += counts[n]
        if thread < readers and listed <= PALETTE:
            for j in range(begin, end):
                byte = np.int32(maps[first + j])
                while byte:
                    bit = byte & -byte
                    byte ^= bit
                    palette[place] = 8 * j + cuda.popc(np.uint32(bit - 1))
                    place += 1
        cuda.syncthreads()
        if listed > PALETTE or (listed and palette[listed - 1] >= num_classes):
            wrong = BAD_BITMAP
        first += width
    if not wrong:
        for e in range(thread, cells, threads):
            if layout == PLAIN:
                if np.int32(maps[first + 2 * e]) | np.int32(maps[first + 2 * e + 1]) << 8 >= num_classes:
                    wrong = BAD_CLASS
            else:
                index = np.int32(maps[first + e])
                if layout == PLACES9:
                    index |= (np.int32(maps[first + cells + (e >> 3)]) >> (e & 7) & 1) << 8
                if index >= listed:
                    wrong = BAD_INDEX
    if wrong:
        cuda.atomic.max(flags, 0, wrong)
    return layout, first, listed, low, step


@device
def _read_bytes(source, layout, first, listed, low, step, cells, num_classes, palette, e):
    maps = source[0]
    if layout == PLAIN:
        c = np.int32(maps[first + 2 * e]) | np.int32(maps[first + 2 * e + 1]) << 8
        level = np.float32(maps[first + 2 * cells + e])
    else:
        index = np.int32(maps[first + e])
        scores = first + cells + e
        if layout == PLACES9:
            index |= (np.int32(maps[first + cells + (e >> 3)]) >> (e & 7) & 1) << 8
            scores += (cells + 7) >> 3
        c = np.int32(palette[index])
        level = np.float32(maps[scores])
    return c, level * level * step + low


# --- how a row is written


@device
def _write_float32(rows, base, other, num_classes, vector, out, first, lane, lanes):
    """Row `base` of shared memory to out[first ...], `other` where it has NaN."""
    if vector:
        for n in range(lane, num_classes >> 2, lanes):
            a, b, c, d = load16(rows, base + 4 * n)
            a = other if a != a else a
            b = other if b != b else b
            c = other if c != c else c
            d = other if d != d else d
            store16(out, first + 4 * n, a, b, c, d)
    else:
        for n in range(lane, num_classes, lanes):
            value = rows[base + n]
            out[first + n] = other if value != value else value


@device
def _pair(a, b, other):
    return pack_bfloat16(other if a != a else a, other if b != b else b)


@device
def _write_bfloat16(rows, base, other, num_classes, vector, out, first, lane, lanes):
    if vector:
        for n in range(lane, num_classes >> 3, lanes):
            a, b, c, d = load16(rows, base + 8 * n)
            e, f, g, h = load16(rows, base + 8 * n + 4)
            store16(out, first + 8 * n, _pair(a, b, other), _pair(c, d, other), _pair(e, f, other), _pair(g, h, other))
    else:
        for n in range(lane, num_classes, lanes):
            value = rows[base + n]
            out[first + n] = np.uint16(_pair(value, value, other) & 0xFFFF)


# --- one row


@device
def _fill_axis(rows, integers, at, i, start, extent, bins, samples, cells, cut, reach, flags):
    """Bin `i` of RoIAlign along one axis at rows[at ...]: float32 [reach] weights, then, as int32, its first cell and how many it has."""
    lowest, highest = cells, -1
    for s in range(samples):
        low, w_low, w_high = _tap(_roi_point(i, s, start, extent, bins, samples), cells, cut)
        if w_low + w_high > ZERO:
            lowest = min(lowest, low)
            highest = max(highest, low + 1 if w_high > ZERO else low)
    integers[at + reach] = lowest
    integers[at + reach + 1] = max(highest - lowest + 1, 0)
    if highest - lowest + 1 > reach:
        flags[1] = 1
        return
    for n in range(reach):
        rows[at + n] = ZERO
    share = ONE / np.float32(samples)
    for s in range(samples):
        low, w_low, w_high = _tap(_roi_point(i, s, start, extent, bins, samples), cells, cut)
        if w_low + w_high > ZERO:
            rows[at + low - lowest] += w_low * share
            if w_high > ZERO:
                rows[at + low - lowest + 1] += w_high * share


@device
def _warped_point(xu, xv, x0, i, j, sy, sx, bins, samples_x, samples_y):
    """A coordinate of sampling point (sy, sx) of bin (i, j), in cells, for the line (xu, xv, x0) of an affine to cells."""
    size = ONE / np.float32(bins)
    at_u = np.float32(j) * size + (np.float32(sx) + HALF) * size / np.float32(samples_x)
    at_v = np.float32(i) * size + (np.float32(sy) + HALF) * size / np.float32(samples_y)
    return xu * at_u + xv * at_v + x0


# --- the kernel


def _build(open_map, read, write):
    """The kernel for one kind of source and one type of output."""

    def targets(source, small, large, affines, k, height, width, num_classes, grid, smoothing, cut, slots, reach, tokens, vector, out, errors):
        """Block (0, b) makes the class token's row of sample b, the others `tokens` rows each.

        source: (classes uint16 [B k H W], scores float32 [B k H W]) or (maps uint8 [M], starts int64 [B+1], ranges float32 [B, 2]); small, large: bytes
        of the layouts with a palette; affines: float32 [B, 6]; slots: entries of a bin that a group has room for, at least k reach**2; reach: cells of
        a bin along one axis that there is room for; vector: rows of `out` begin at multiples of 16 bytes; out: [B (1 + grid**2) C], written;
        errors: int32 [B], 0 or the code of what is wrong with the map, all of whose targets are NaN then. Dynamic shared memory: `shared_bytes`.
        """
        rows = cuda.shared.array(0, float32, ALIGNMENT)
        integers = cuda.shared.array(0, int32, ALIGNMENT)
        shorts = cuda.shared.array(0, uint16, ALIGNMENT)
        palette = cuda.shared.array(PALETTE, uint16)
        counts = cuda.shared.array(LANES, int32)
        flags = cuda.shared.array(2, int32)  # what is wrong with the map; whether a bin has more cells than there is room for
        partial = cuda.shared.array(GROUPS, float32)
        scratch = cuda.shared.array(LANES, float32)  # the simulator's
        lane, group, lanes, groups = cuda.threadIdx.x, cuda.threadIdx.y, cuda.blockDim.x, cuda.blockDim.y
        thread, threads = group * lanes + lane, lanes * groups
        b, cells, all_rows = cuda.blockIdx.y, height * width, 1 + grid * grid
        stride = (num_classes + 3) >> 2 << 2
        base = group * stride
        values = groups * stride + group * slots
        weights = groups * (stride + slots) + group * LANES
        places = groups * (stride + slots + LANES) + group * LANES
        axes = groups * (stride + slots + 2 * LANES)
        cell_weights = axes + 2 * grid * (reach + 2)
        listed = 2 * (cell_weights + cells) + group * slots
        one_row = cuda.blockIdx.x == 0
        begin = 0 if one_row else 1 + (cuda.blockIdx.x - 1) * tokens
        end = 1 if one_row else min(begin + tokens, all_rows)
        bins = 1 if one_row else grid
        if thread < 2:
            flags[thread] = 0
        for c in range(thread, groups * stride, threads):
            rows[c] = NAN
        cuda.syncthreads()
        layout, first, known, low, step = open_map(source, b, k * cells, num_classes, small, large, palette, counts, flags, thread, threads)

        # The crop in cells. Along the axes: the box; else: the affine itself, a side of less than a cell widened to one, about its middle.
        xu, xv, x0 = affines[6 * b + 0] * np.float32(width), affines[6 * b + 1] * np.float32(width), affines[6 * b + 2] * np.float32(width) - HALF
        yu, yv, y0 = affines[6 * b + 3] * np.float32(height), affines[6 * b + 4] * np.float32(height), affines[6 * b + 5] * np.float32(height) - HALF
        warped = affines[6 * b + 1] != ZERO or affines[6 * b + 3] != ZERO
        flip = affines[6 * b + 0] < ZERO
        left = (affines[6 * b + 2] + min(affines[6 * b + 0], ZERO)) * np.float32(width) - HALF
        extent_x, extent_y = max(abs(xu), ONE), max(yv, ONE)
        slack = ZERO
        if warped:
            slack = SLACK
            extent = math.sqrt(xu * xu + yu * yu)
            extent_x = max(extent, ONE)
            if ZERO < extent < ONE:
                x0 -= HALF * (xu / extent - xu)
                y0 -= HALF * (yu / extent - yu)
                xu, yu = xu / extent, yu / extent
            extent = math.sqrt(xv * xv + yv * yv)
            extent_y = max(extent, ONE)
            if ZERO < extent < ONE:
                x0 -= HALF * (xv / extent - xv)
                y0 -= HALF * (yv / extent - yv)
                xv, yv = xv / extent, yv / extent
        samples_x, samples_y = _roi_samples(extent_x, bins, slack), _roi_samples(extent_y, bins, slack)
        if not one_row and not warped:
            for n in range(thread, 2 * bins, threads):
                at = axes + n * (reach + 2)
                if n < bins:
                    _fill_axis(rows, integers, at, n, y0, extent_y, bins, samples_y, height, cut, reach, flags)
                else:
                    _fill_axis(rows, integers, at, n - bins, left, extent_x, bins, samples_x, width, cut, reach, flags)
        cuda.syncthreads()
        if flags[0]:
            if thread == 0:
                errors[b] = flags[0]
            for row in range(begin + group, end, groups):
                write(rows, base, NAN, num_classes, vector, out, (np.int64(b) * all_rows + row) * num_classes, lane, lanes)
            return

        if one_row or flags[1] or (warped and 4 * k * samples_x * samples_y > slots):
            # All threads make one row after the other.
            share = SHARE / np.float32(samples_x * samples_y)
            for row in range(begin, end):
                i = 0 if one_row else (row - 1) // grid
                j = 0 if one_row else row - 1 - i * grid
                for n in range(thread, cells, threads):
                    integers[cell_weights + n] = 0
                cuda.syncthreads()
                for n in range(thread, samples_x * samples_y, threads):
                    sy = n // samples_x
                    sx = n - sy * samples_x
                    if warped:
                        x = _warped_point(xu, xv, x0, i, j, sy, sx, bins, samples_x, samples_y)
                        y = _warped_point(yu, yv, y0, i, j, sy, sx, bins, samples_x, samples_y)
                    else:
                        x = _roi_point(bins - 1 - j if flip else j, sx, left, extent_x, bins, samples_x)
                        y = _roi_point(i, sy, y0, extent_y, bins, samples_y)
                    column, x_low, x_high = _tap(x, width, cut)
                    line, y_low, y_high = _tap(y, height, cut)
                    for corner in range(4):
                        weight = (y_high if corner & 2 else y_low) * (x_high if corner & 1 else x_low)
                        if weight > ZERO:
                            place = (line + (corner >> 1)) * width + column + (corner & 1)
                            cuda.atomic.add(integers, cell_weights + place, np.int32(weight * share + HALF))
                cuda.syncthreads()
                for n in range(group, cells, groups):
                    whole = integers[cell_weights + n]
                    if whole:
                        weight = np.float32(whole) * UNSHARE
                        for t in range(lane, k, lanes):
                            c, score = read(source, layout, first, known, low, step, k * cells, num_classes, palette, t * cells + n)
                            met = rows[base + c]
                            rows[base + c] = weight * score if met != met else met + weight * score
                        _in_step()
                cuda.syncthreads()
                highest, count = LOW, ZERO
                for c in range(thread, num_classes, threads):
                    total = NAN
                    for n in range(groups):
                        value = rows[n * stride + c]
                        if value == value:
                            total = value if total != total else total + value
                            rows[n * stride + c] = NAN
                    if total == total:
                        highest = max(highest, total)
                        count += ONE
                    rows[c] = total
                highest = _highest(highest, scratch, lane, lanes)
                if lane == 0:
                    partial[group] = highest
                cuda.syncthreads()
                for n in range(groups):
                    highest = max(highest, partial[n])
                cuda.syncthreads()
                count = _sum(count, scratch, lane, lanes)
                if lane == 0:
                    partial[group] = count
                cuda.syncthreads()
                count = ZERO
                for n in range(groups):
                    count += partial[n]
                others = np.float32(num_classes) - count
                if others > ZERO:
                    highest = max(highest, ZERO)
                rest = math.exp(-highest) if others > ZERO else ZERO
                mass = ZERO
                for c in range(thread, num_classes, threads):
                    value = rows[c]
                    if value == value:
                        value = math.exp(value - highest)
                        rows[c] = value
                        mass += value
                mass = _sum(mass, scratch, lane, lanes)
                cuda.syncthreads()
                if lane == 0:
                    partial[group] = mass
                cuda.syncthreads()
                mass = rest * others
                for n in range(groups):
                    mass += partial[n]
                scale = ONE / mass
                for c in range(thread, num_classes, threads):
                    if rows[c] == rows[c]:
                        rows[c] = _smooth(rows[c] * scale, smoothing, num_classes)
                cuda.syncthreads()
                other = _smooth(rest * scale, smoothing, num_classes)
                write(rows, 0, other, num_classes, vector, out, (np.int64(b) * all_rows + row) * num_classes, thread, threads)
                cuda.syncthreads()
                for c in range(thread, num_classes, threads):
                    rows[c] = NAN
                cuda.syncthreads()
            return

        # A row a group. Entry e of a bin is score t of its cell m, e = m k + t.
        lane_m = lane // k
        lane_t = lane - lane_m * k
        step_m = lanes // k
        step_t = lanes - step_m * k
        for row in range(begin + group, end, groups):
            i = (row - 1) // grid
            j = row - 1 - i * grid
            axis_y = axes + i * (reach + 2)
            axis_x = axes + (grid + (grid - 1 - j if flip else j)) * (reach + 2)
            across = integers[axis_x + reach + 1]
            taps = 4 * samples_x * samples_y if warped else integers[axis_y + reach + 1] * across
            for chunk in range(0, taps, lanes):
                n = chunk + lane
                if n < taps:
                    if warped:
                        sy = (n >> 2) // samples_x
                        sx = (n >> 2) - sy * samples_x
                        column, x_low, x_high = _tap(_warped_point(xu, xv, x0, i, j, sy, sx, bins, samples_x, samples_y), width, cut)
                        line, y_low, y_high = _tap(_warped_point(yu, yv, y0, i, j, sy, sx, bins, samples_x, samples_y), height, cut)
                        weight = (y_high if n & 2 else y_low) * (x_high if n & 1 else x_low) / np.float32(samples_x * samples_y)
                        place = (line + (n >> 1 & 1)) * width + column + (n & 1) if weight > ZERO else 0
                    else:
                        line = n // across
                        column = n - line * across
                        weight = rows[axis_y + line] * rows[axis_x + column]
                        place = (integers[axis_y + reach] + line) * width + integers[axis_x + reach] + column
                    rows[weights + lane] = weight
                    integers[places + lane] = place
                _in_step()
                count = min(lanes, taps - chunk)
                m, t, e = lane_m, lane_t, chunk * k + lane
                while m < count:
                    weight = rows[weights + m]
                    c, score = read(source, layout, first, known, low, step, k * cells, num_classes, palette, t * cells + integers[places + m])
                    shorts[listed + e] = c if weight > ZERO else NONE
                    rows[values + e] = weight * score
                    e += lanes
                    m += step_m
                    t += step_t
                    if t >= k:
                        t -= k
                        m += 1
                _in_step()
                for m in range(chunk, chunk + count):
                    for t in range(lane, k, lanes):
                        e = m * k + t
                        c = np.int32(shorts[listed + e])
                        if c != NONE:
                            met = rows[base + c]
                            if met != met:
                                rows[base + c] = rows[values + e]
                            else:
                                rows[base + c] = met + rows[values + e]
                                shorts[listed + e] = NONE
                    _in_step()
            highest, mine = LOW, ZERO
            for e in range(lane, taps * k, lanes):
                c = np.int32(shorts[listed + e])
                if c != NONE:
                    value = rows[base + c]
                    rows[values + e] = value
                    highest = max(highest, value)
                    mine += ONE
            highest = _highest(highest, scratch, lane, lanes)
            others = np.float32(num_classes) - _sum(mine, scratch, lane, lanes)
            if others > ZERO:
                highest = max(highest, ZERO)
            rest = math.exp(-highest) if others > ZERO else ZERO
            mass = ZERO
            for e in range(lane, taps * k, lanes):
                if shorts[listed + e] != NONE:
                    value = math.exp(rows[values + e] - highest)
                    rows[values + e] = value
                    mass += value
            scale = ONE / (_sum(mass, scratch, lane, lanes) + rest * others)
            for e in range(lane, taps * k, lanes):
                c = np.int32(shorts[listed + e])
                if c != NONE:
                    rows[base + c] = _smooth(rows[values + e] * scale, smoothing, num_classes)
            _in_step()
            other = _smooth(rest * scale, smoothing, num_classes)
            write(rows, base, other, num_classes, vector, out, (np.int64(b) * all_rows + row) * num_classes, lane, lanes)
            _in_step()
            for e in range(lane, taps * k, lanes):
                c = np.int32(shorts[listed + e])
                if c != NONE:
                    rows[base + c] = NAN
            _in_step()

    return targets


def shared_bytes(groups: int, num_classes: int, slots: int, grid: int, reach: int, cells: int) -> int:
    """Dynamic shared memory of the kernel: float32 [groups, C rounded up to 4] rows, float32 [groups, slots] values of entries, float32 [groups, LANES]
    weights, int32 [groups, LANES] cells, [2 grid, reach + 2] bins along the axes, int32 [H W] weights of cells, uint16 [groups, slots] classes."""
    stride = (num_classes + 3) // 4 * 4
    return 4 * (groups * (stride + slots + 2 * LANES) + 2 * grid * (reach + 2) + cells) + 2 * groups * slots


KERNELS = {
    (kind, bfloat16): _build(*reading, _write_bfloat16 if bfloat16 else _write_float32)
    for kind, reading in (("arrays", (_open_arrays, _read_arrays)), ("bytes", (_open_bytes, _read_bytes)))
    for bfloat16 in (False, True)
}
"""The kernels, not compiled yet, by the source of the maps and whether `out` is bfloat16."""
