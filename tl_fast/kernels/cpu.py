"""CPU loops of the decode pipeline: images (with `warp` and `colour`) and token targets, compiled by numba from `tl_fast.scalar`.

Every loop releases the GIL and writes one sample (or a range of samples), so callers split a batch over their own threads.
"""
from __future__ import annotations

import math

import numpy as np

from tl_fast import scalar
from tl_fast.jit import compile_scalar, njit
from tl_fast.kernels import colour, warp

_scalar = compile_scalar(njit)
_roi_samples, _roi_point, _roi_tap, _smooth = _scalar.roi_samples, _scalar.roi_point, _scalar.roi_tap, _scalar.smooth
_roi_outside = _scalar.roi_outside


def resample(region: np.ndarray, box: tuple[float, float, float, float], flip: bool, out: np.ndarray) -> None:
    """Antialiased bilinear resize of `box` inside `region`, mirrored left-right when `flip`, written to `out`.

    region: uint8 [h, w, 3], decoded pixels of an image or of a part of it; box: (top, left, height, width) in pixels of `region`;
    out: uint8 [3, H, W]. The result is Pillow's `resize(..., BILINEAR, box=...)` within one level: the filter reads beyond the box where
    `region` has pixels, so a region should reach 1 + max(scale, 1) / 2 pixels beyond its box unless the image ends there.
    """
    if region.ndim != 3 or region.shape[2] != 3 or region.dtype != np.uint8 or out.ndim != 3 or out.dtype != np.uint8:
        raise ValueError(f"region must be uint8 [h, w, 3] and out uint8 [3, H, W], got {region.dtype} {region.shape}, {out.dtype} {out.shape}")
    top, left, height, width = (float(v) for v in box)
    if height <= 0 or width <= 0 or top < 0 or left < 0 or top + height > region.shape[0] + 1e-6 or left + width > region.shape[1] + 1e-6:
        raise ValueError(f"box {box} does not lie inside the decoded region of {region.shape[0]} x {region.shape[1]} pixels")
    rows, columns = region.shape[:2]
    region, fill = _own_type(region), np.zeros(3, np.uint8)
    warp.resample(region, 0, 0, rows, columns, (top, left, height, width), bool(flip), scalar.BILINEAR, fill, out)


def augment(region: np.ndarray, origin_y: int, origin_x: int, height: int, width: int, plan: np.void, fill: np.ndarray, out: np.ndarray) -> None:
    """One sample as its plan says, geometry first, then colours: what `tl_fast.plan.PLAN`'s record describes, but for the erasing.

    region: uint8 [h, w, 3], decoded pixels of an image of `height` x `width` pixels from (origin_y, origin_x) on, at least those of
    `tl_fast.kernels.warp.needed`; fill: uint8 [3], RGB of what lies outside the image; out: uint8 [3, H, W], written.
    """
    crop = float(plan["top"]), float(plan["left"]), float(plan["height"]), float(plan["width"])
    place = int(origin_y), int(origin_x), int(height), int(width)
    _augment(_own_type(region), *place, crop, plan["affine"], int(plan["interpolation"]), plan["ops"], plan["arguments"], _own_type(fill), out)


def _own_type(array: np.ndarray) -> np.ndarray:
    """Contiguous and writable, for which alone the loops are compiled: a second set of types damages numba's tables of functions they share."""
    return array if array.flags.c_contiguous and array.flags.writeable else array.copy()


@njit
def _augment(region, origin_y, origin_x, height, width, crop, affine, interpolation, ops, arguments, fill, out):
    warp.show(region, origin_y, origin_x, height, width, crop, affine, interpolation, fill, out)
    colour.apply(out, ops, arguments)


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
    crops, flips = np.asarray(crops, np.float32), np.asarray(flips, np.bool_)
    if crops.shape != (len(classes), 4) or flips.shape != (len(classes),):
        raise ValueError(f"crops must be [{len(classes)}, 4] and flips [{len(classes)}], got {crops.shape} and {flips.shape}")
    if not np.isfinite(crops).all() or (crops[:, 2:] <= 0).any():
        raise ValueError("crops must be finite with height and width > 0 (fractions of the label map)")
    return warped_targets(classes, scores, affines_of_crops(crops, flips), num_classes, grid, smoothing, out, cut=False)


def affines_of_crops(crops: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Crops [B, 4] = (top, left, height, width), mirrored where `flips` [B] -> float32 [B, 6] as `warped_targets` takes them."""
    top, left, height, width = np.asarray(crops, np.float32).T
    nothing = np.zeros_like(top)
    return np.stack([np.where(flips, -width, width), nothing, np.where(flips, left + width, left), nothing, height, top], axis=1)


def warped_targets(
    classes: np.ndarray,
    scores: np.ndarray,
    affines: np.ndarray,
    num_classes: int,
    grid: int,
    smoothing: float,
    out: np.ndarray | None = None,
    cut: bool = True,
) -> np.ndarray:
    """`token_targets` of maps seen through affines: RoIAlign whose sampling points, laid out in the output, are mapped to the label map.

    affines: float32 [B, 6] = (xu, xv, x0, yu, yv, y0): output coordinates u (along x), v (along y) in 0..1 -> fractions of the label map's extent,
    x = xu u + xv v + x0, y = yu u + yv v + y0. Bins have ceil(cells that a bin covers) sampling points along u and v, of rotated maps
    ceil(cells - 1e-4), so that rounding does not decide; points outside the map count as 0, so that a token there knows nothing: its target is
    uniform. cut: at the map's edge; else half a cell beyond it, as RoIAlign.
    Raises ValueError as `token_targets`.
    """
    b = _check_targets(classes, scores, num_classes, grid, smoothing)
    affines = np.ascontiguousarray(affines, np.float32)
    if affines.shape != (b, 6) or not np.isfinite(affines).all():
        raise ValueError(f"affines must be finite [{b}, 6], got {affines.shape}")
    shape = (b, 1 + grid * grid, num_classes)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32:
        raise ValueError(f"out must be float32 {shape}, got {out.dtype} {out.shape}")
    _token_targets(classes, scores, affines, num_classes, grid, np.float32(smoothing), cut, out)
    return out


def _check_targets(classes, scores, num_classes, grid, smoothing):
    if classes.ndim != 4 or classes.dtype != np.uint16 or scores.shape != classes.shape or scores.dtype != np.float32:
        raise ValueError(
            f"classes must be uint16 and scores float32, both [B, k, H, W]; got {classes.dtype} {classes.shape}, {scores.dtype} {scores.shape}"
        )
    if not np.isfinite(scores).all():  # and NaN marks, inside, the classes not met yet
        raise ValueError("label map scores must be finite")
    if grid < 1 or num_classes < 1 or not 0 <= smoothing < 1:
        raise ValueError(f"grid and num_classes must be >= 1 and smoothing in [0, 1), got {grid}, {num_classes}, {smoothing}")
    if classes.size and int(classes.max()) >= num_classes:
        raise ValueError(f"label map holds class {int(classes.max())}, but num_classes is {num_classes}")
    return len(classes)


@njit
def _tap(point, cells, cut):
    """Cell below `point` and the weights of it and the next; none beyond the map's edge where it is `cut` there."""
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
def _add_cell(classes, scores, row, column, weight, total, listed, n):
    """Add a cell's scores to the dense `total` [C]; classes met for the first time go to `listed`, which holds n. Returns how many it holds now."""
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
def _align(classes, scores, y_first, y_count, y_weights, x_first, x_count, x_weights, i, j, total, listed):
    """Add one bin's RoIAlign average to the dense `total` [C]; the classes met go to `listed`. Returns how many."""
    n = 0
    for y in range(y_count[i]):
        for x in range(x_count[j]):
            row, column = np.int64(y_first[i]) + y, np.int64(x_first[j]) + x
            n = _add_cell(classes, scores, row, column, y_weights[i, y] * x_weights[j, x], total, listed, n)
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
def _align_warped(classes, scores, affine, u, v, size, samples_x, samples_y, cut, total, listed):
    """`_align` of the bin that begins at output coordinates (u, v) and is `size` wide and high; affine: to cells, not to fractions."""
    rows, columns = classes.shape[1], classes.shape[2]
    share = 1.0 / (samples_x * samples_y)
    n = 0
    for sy in range(samples_y):
        at_v = v + (sy + 0.5) * size / samples_y
        for sx in range(samples_x):
            at_u = u + (sx + 0.5) * size / samples_x
            x, y = affine[0] * at_u + affine[1] * at_v + affine[2], affine[3] * at_u + affine[4] * at_v + affine[5]
            column, x_low, x_high = _tap(x, columns, cut)
            row, y_low, y_high = _tap(y, rows, cut)
            for corner in range(4):
                weight = np.float32((y_high if corner & 2 else y_low) * (x_high if corner & 1 else x_low) * share)
                if weight > 0.0:
                    n = _add_cell(classes, scores, row + (corner >> 1), column + (corner & 1), weight, total, listed, n)
    return n


@njit
def _warped_sample(classes, scores, affine, num_classes, grid, smoothing, cut, total, listed, out):
    rows, columns = classes.shape[1], classes.shape[2]
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
    for level in range(2):
        bins = grid if level else 1
        samples_x, samples_y = _roi_samples(extents[0], bins, scalar.ROI_SLACK), _roi_samples(extents[1], bins, scalar.ROI_SLACK)
        for i in range(bins):
            for j in range(bins):
                n = _align_warped(classes, scores, cells, j / bins, i / bins, 1.0 / bins, samples_x, samples_y, cut, total, listed)
                _softmax_row(total, listed, n, num_classes, smoothing, out[level + i * bins + j])


@njit
def _token_targets(classes, scores, affines, num_classes, grid, smoothing, cut, out):
    rows, columns = classes.shape[2], classes.shape[3]
    total = np.full(num_classes, np.float32(np.nan), np.float32)
    listed = np.empty(num_classes, np.int32)
    for b in range(classes.shape[0]):
        affine = affines[b]
        if affine[1] != 0.0 or affine[3] != 0.0:
            _warped_sample(classes[b], scores[b], affine, num_classes, grid, smoothing, cut, total, listed, out[b])
            continue
        flip = affine[0] < 0.0
        top = affine[5] * np.float32(rows) - np.float32(0.5)
        left = (affine[2] + min(affine[0], np.float32(0.0))) * np.float32(columns) - np.float32(0.5)
        height = max(affine[4] * np.float32(rows), np.float32(1.0))
        width = max(abs(affine[0]) * np.float32(columns), np.float32(1.0))
        for level in range(2):
            bins = grid if level else 1
            y_first, y_count, y_weights = _roi_table(top, height, bins, rows, cut)
            x_first, x_count, x_weights = _roi_table(left, width, bins, columns, cut)
            for i in range(bins):
                for j in range(bins):
                    column = bins - 1 - j if flip else j
                    n = _align(classes[b], scores[b], y_first, y_count, y_weights, x_first, x_count, x_weights, i, column, total, listed)
                    _softmax_row(total, listed, n, num_classes, smoothing, out[b, level + i * bins + j])
