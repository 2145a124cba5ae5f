"""CPU loops of the decode pipeline: antialiased resample and token targets, compiled by numba from `tl_fast.scalar`.

Every loop releases the GIL and writes one sample (or a range of samples), so callers split a batch over their own threads.
"""
from __future__ import annotations

import numpy as np

from tl_fast.jit import compile_scalar, njit

_scalar = compile_scalar(njit)
_filter_range, _filter_weight, _filter_support = _scalar.filter_range, _scalar.filter_weight, _scalar.filter_support
_roi_samples, _roi_point, _roi_tap, _smooth = _scalar.roi_samples, _scalar.roi_point, _scalar.roi_tap, _scalar.smooth


def resample(region: np.ndarray, box: tuple[float, float, float, float], flip: bool, out: np.ndarray) -> None:
    """Antialiased bilinear resize of `box` inside `region`, mirrored left-right when `flip`, written to `out`.

    region: uint8 [h, w, 3], decoded pixels of an image or of a part of it; box: (top, left, height, width) in pixels of `region`;
    out: uint8 [3, H, W]. The result is Pillow's `resize(..., BILINEAR, box=...)` within one level: the filter reads beyond the box where
    `region` has pixels, so a region should reach `margin()` pixels beyond its box unless the image ends there.
    """
    if region.ndim != 3 or region.shape[2] != 3 or region.dtype != np.uint8 or out.ndim != 3 or out.dtype != np.uint8:
        raise ValueError(f"region must be uint8 [h, w, 3] and out uint8 [3, H, W], got {region.dtype} {region.shape}, {out.dtype} {out.shape}")
    top, left, height, width = (float(v) for v in box)
    if height <= 0 or width <= 0 or top < 0 or left < 0 or top + height > region.shape[0] + 1e-6 or left + width > region.shape[1] + 1e-6:
        raise ValueError(f"box {box} does not lie inside the decoded region of {region.shape[0]} x {region.shape[1]} pixels")
    _resample(region, top, left, height, width, flip, out)


def margin(extent: np.ndarray, out_size: int) -> np.ndarray:
    """Pixels (int64) beyond boxes of `extent` pixels that `resample` to `out_size` pixels can read on each side."""
    return np.ceil(np.maximum(np.asarray(extent) / out_size, 1.0) / 2).astype(np.int64) + 1


def token_targets(
    classes: np.ndarray,
    scores: np.ndarray,
    crops: np.ndarray,
    flips: np.ndarray,
    num_classes: int,
    grid: int,
    smoothing: float,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Soft targets of the class token and of grid x grid patch tokens from sparse label maps -> float32 [B, 1 + grid*grid, C].

    classes: uint16 [B, k, H, W]; scores: float32 [B, k, H, W], classes not listed in a cell have score 0; crops: float32 [B, 4] =
    (top, left, height, width) as fractions of the label map's extent; flips: bool [B], the crop is mirrored left-right after cropping;
    num_classes: C; smoothing: label smoothing in [0, 1); out: where to write, else a new array.
    RoIAlign as torchvision's (`aligned=False` on boxes shifted by -0.5 cells, adaptive sampling, extent at least one cell), softmax over
    all C classes, then p * (1 - s + s / C) + s / C. The class token (1 x 1) comes first, tokens follow row by row.
    Raises ValueError for shapes that do not fit or a class >= C.
    """
    b, k, rows, columns = _check_targets(classes, scores, crops, flips, num_classes, grid, smoothing)
    shape = (b, 1 + grid * grid, num_classes)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32:
        raise ValueError(f"out must be float32 {shape}, got {out.dtype} {out.shape}")
    crops = np.ascontiguousarray(crops, np.float32)
    _token_targets(classes, scores, crops, np.asarray(flips, np.bool_), num_classes, grid, np.float32(smoothing), out)
    return out


def _check_targets(classes, scores, crops, flips, num_classes, grid, smoothing):
    if classes.ndim != 4 or classes.dtype != np.uint16 or scores.shape != classes.shape or scores.dtype != np.float32:
        raise ValueError(
            f"classes must be uint16 and scores float32, both [B, k, H, W]; got {classes.dtype} {classes.shape}, {scores.dtype} {scores.shape}"
        )
    b = classes.shape[0]
    if np.shape(crops) != (b, 4) or np.shape(flips) != (b,):
        raise ValueError(f"crops must be [{b}, 4] and flips [{b}], got {np.shape(crops)} and {np.shape(flips)}")
    if not np.isfinite(scores).all():  # and NaN marks, inside, the classes not met yet
        raise ValueError("label map scores must be finite")
    if not np.isfinite(crops).all() or (np.asarray(crops)[:, 2:] <= 0).any():
        raise ValueError("crops must be finite with height and width > 0 (fractions of the label map)")
    if grid < 1 or num_classes < 1 or not 0 <= smoothing < 1:
        raise ValueError(f"grid and num_classes must be >= 1 and smoothing in [0, 1), got {grid}, {num_classes}, {smoothing}")
    if classes.size and int(classes.max()) >= num_classes:
        raise ValueError(f"label map holds class {int(classes.max())}, but num_classes is {num_classes}")
    return classes.shape


@njit
def _filter_table(box_start, box_extent, out_size, in_size):
    """First source pixel, number of taps and normalised weights of each output pixel along one axis."""
    taps_max = int(np.ceil(_filter_support(box_extent, out_size))) * 2 + 1
    first = np.empty(out_size, np.int32)
    count = np.empty(out_size, np.int32)
    weights = np.zeros((out_size, taps_max), np.float32)
    for i in range(out_size):
        start, stop = _filter_range(i, box_start, box_extent, out_size, in_size)
        first[i] = start
        count[i] = stop - start
        total = 0.0
        for x in range(start, stop):
            total += _filter_weight(x, i, box_start, box_extent, out_size)
        for x in range(start, stop):
            weights[i, x - start] = np.float32(_filter_weight(x, i, box_start, box_extent, out_size) / total)
    return first, count, weights


@njit
def _resample(region, top, left, height, width, flip, out):
    rows, columns = out.shape[1], out.shape[2]
    y_first, y_count, y_weights = _filter_table(top, height, rows, region.shape[0])
    x_first, x_count, x_weights = _filter_table(left, width, columns, region.shape[1])
    # Columns outside [begin, end) are never read by the horizontal pass, so the vertical pass leaves them out.
    begin = 3 * x_first[0]
    end = 3 * (x_first[columns - 1] + x_count[columns - 1])
    pixels = region.reshape(region.shape[0], region.shape[1] * 3)
    line = np.empty(region.shape[1] * 3, np.float32)
    for y in range(rows):
        # Vertical first: it runs along contiguous bytes and leaves `rows` lines for the horizontal gather.
        weight = y_weights[y, 0]
        source = pixels[y_first[y]]
        for x in range(begin, end):
            line[x] = weight * np.float32(source[x])
        for t in range(1, y_count[y]):
            weight = y_weights[y, t]
            source = pixels[y_first[y] + t]
            for x in range(begin, end):
                line[x] += weight * np.float32(source[x])
        for x in range(columns):
            red = np.float32(0.5)
            green = np.float32(0.5)
            blue = np.float32(0.5)
            at = 3 * x_first[x]
            for t in range(x_count[x]):
                weight = x_weights[x, t]
                red += weight * line[at]
                green += weight * line[at + 1]
                blue += weight * line[at + 2]
                at += 3
            column = columns - 1 - x if flip else x
            # Weights are >= 0 and sum to 1, so the sums stay inside 0.5 .. 255.5 but for rounding.
            out[0, y, column] = np.uint8(min(red, np.float32(255.0)))
            out[1, y, column] = np.uint8(min(green, np.float32(255.0)))
            out[2, y, column] = np.uint8(min(blue, np.float32(255.0)))


@njit
def _roi_table(start, extent, bins, cells):
    """RoIAlign along one axis as a sparse matrix: first cell, number of cells and weights of each bin."""
    samples = _roi_samples(extent, bins)
    first = np.empty(bins, np.int32)
    count = np.empty(bins, np.int32)
    weights = np.zeros((bins, cells), np.float32)
    for i in range(bins):
        lowest = cells
        highest = -1
        for s in range(samples):
            low, w_low, w_high = _roi_tap(_roi_point(i, s, start, extent, bins, samples), cells)
            if w_low + w_high > 0.0:
                lowest = min(lowest, low)
                highest = max(highest, low + 1 if w_high > 0.0 else low)
        first[i] = lowest
        count[i] = max(highest - lowest + 1, 0)
        for s in range(samples):
            low, w_low, w_high = _roi_tap(_roi_point(i, s, start, extent, bins, samples), cells)
            if w_low + w_high > 0.0:
                weights[i, low - lowest] += np.float32(w_low / samples)
                if w_high > 0.0:
                    weights[i, low + 1 - lowest] += np.float32(w_high / samples)
    return first, count, weights


@njit
def _align(classes, scores, y_first, y_count, y_weights, x_first, x_count, x_weights, i, j, total, listed):
    """Add one bin's RoIAlign average to the dense `total` [C]; the classes met go to `listed`. Returns how many."""
    n = 0
    for y in range(y_count[i]):
        for x in range(x_count[j]):
            weight = y_weights[i, y] * x_weights[j, x]
            row = y_first[i] + y
            column = x_first[j] + x
            for t in range(classes.shape[0]):
                c = classes[t, row, column]
                # NaN marks a class not met yet in this bin (scores are finite), so no second array is needed.
                if total[c] != total[c]:
                    total[c] = np.float32(0.0)
                    listed[n] = c
                    n += 1
                total[c] += weight * scores[t, row, column]
    return n


@njit
def _softmax_row(total, listed, n, num_classes, smoothing, out):
    """Softmax over C classes of which all but the `n` listed have score 0, smoothed, to `out` [C]; `total` is cleared."""
    unlisted = num_classes - n
    highest = np.float32(0.0) if unlisted else total[listed[0]]
    for t in range(n):
        highest = max(highest, total[listed[t]])
    rest = np.exp(-highest) if unlisted else np.float32(0.0)
    mass = rest * np.float32(unlisted)
    for t in range(n):
        mass += np.exp(total[listed[t]] - highest)
    off = _smooth(rest / mass, smoothing, num_classes)
    for c in range(num_classes):
        out[c] = off
    for t in range(n):
        c = listed[t]
        out[c] = _smooth(np.exp(total[c] - highest) / mass, smoothing, num_classes)
        total[c] = np.float32(np.nan)


@njit
def _token_targets(classes, scores, crops, flips, num_classes, grid, smoothing, out):
    rows, columns = classes.shape[2], classes.shape[3]
    total = np.full(num_classes, np.float32(np.nan), np.float32)
    listed = np.empty(num_classes, np.int32)
    for b in range(classes.shape[0]):
        top = crops[b, 0] * np.float32(rows) - np.float32(0.5)
        left = crops[b, 1] * np.float32(columns) - np.float32(0.5)
        height = max(crops[b, 2] * np.float32(rows), np.float32(1.0))
        width = max(crops[b, 3] * np.float32(columns), np.float32(1.0))
        for level in range(2):
            bins = grid if level else 1
            y_first, y_count, y_weights = _roi_table(top, height, bins, rows)
            x_first, x_count, x_weights = _roi_table(left, width, bins, columns)
            for i in range(bins):
                for j in range(bins):
                    column = bins - 1 - j if flips[b] else j
                    n = _align(classes[b], scores[b], y_first, y_count, y_weights, x_first, x_count, x_weights, i, column, total, listed)
                    _softmax_row(total, listed, n, num_classes, smoothing, out[b, level + i * bins + j])
