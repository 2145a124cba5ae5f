"""CPU loops of the decode pipeline: images (with `warp` and `colour`) and token targets, compiled by numba from
`tl_fast.maths.scalar`.

Every loop releases the GIL and writes one sample (or a range of samples), so callers split a batch over their own
threads.
"""

from __future__ import annotations

import numpy as np

from tl_fast.kernels.colour import cpu as colour
from tl_fast.kernels.geometry import cpu as warp
from tl_fast.kernels.targets import cpu as targets
from tl_fast.maths import scalar
from tl_fast.maths.compile import njit


def resample(region: np.ndarray, box: tuple[float, float, float, float], flip: bool, out: np.ndarray) -> None:
    """Antialiased bilinear resize of `box` inside `region`, mirrored left-right when `flip`, written to `out`.

    region: uint8 [h, w, 3], decoded pixels of an image or of a part of it; box: (top, left, height, width) in pixels of
    `region`;
    out: uint8 [3, H, W]. The result is Pillow's `resize(..., BILINEAR, box=...)` within one level: the filter reads
    beyond the box where `region` has pixels, so a region should reach 1 + max(scale, 1) / 2 pixels beyond its box
    unless the image ends there.
    """
    if region.ndim != 3 or region.shape[2] != 3 or region.dtype != np.uint8 or out.ndim != 3 or out.dtype != np.uint8:
        raise ValueError(
            f"region must be uint8 [h, w, 3] and out uint8 [3, H, W], got {region.dtype} {region.shape}, {out.dtype}"
            f" {out.shape}"
        )
    top, left, height, width = (float(v) for v in box)
    if (
        height <= 0
        or width <= 0
        or top < 0
        or left < 0
        or top + height > region.shape[0] + 1e-6
        or left + width > region.shape[1] + 1e-6
    ):
        raise ValueError(
            f"box {box} does not lie inside the decoded region of {region.shape[0]} x {region.shape[1]} pixels"
        )
    rows, columns = region.shape[:2]
    region, fill = _own_type(region), np.zeros(3, np.uint8)
    warp.resample(region, 0, 0, rows, columns, (top, left, height, width), bool(flip), scalar.BILINEAR, fill, out)


def augment(
    region: np.ndarray,
    origin_y: int,
    origin_x: int,
    height: int,
    width: int,
    plan: np.void,
    fill: np.ndarray,
    out: np.ndarray,
) -> None:
    """One sample as its plan says, geometry first, then colours: what `tl_fast.plan.PLAN`'s record describes, but for
    the erasing.

    region: uint8 [h, w, 3], decoded pixels of an image of `height` x `width` pixels from (origin_y, origin_x) on, at
    least those of `tl_fast.kernels.geometry.cpu.needed`; fill: uint8 [3], RGB of what lies outside the image; out:
    uint8 [3, H, W], written.
    """
    crop = float(plan["top"]), float(plan["left"]), float(plan["height"]), float(plan["width"])
    place = int(origin_y), int(origin_x), int(height), int(width)
    _augment(
        _own_type(region),
        *place,
        crop,
        plan["affine"],
        int(plan["interpolation"]),
        plan["ops"],
        plan["arguments"],
        _own_type(fill),
        out,
    )


def _own_type(array: np.ndarray) -> np.ndarray:
    """Contiguous and writable, for which alone the loops are compiled: a second set of types damages numba's tables of
    functions they share."""
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
    """Soft targets of the class token and of grid x grid patch tokens from sparse label maps -> float32 [B, 1 +
    grid*grid, C].

    classes: uint16 [B, k, H, W]; scores: float32 [B, k, H, W], classes not listed in a cell have score 0; crops:
    float32 [B, 4] = (top, left, height, width) as fractions of the label map's extent; flips: bool [B], the crop is
    mirrored left-right after cropping;
    num_classes: C; smoothing: label smoothing in [0, 1); out: where to write, else a new array. RoIAlign as
    torchvision's (`aligned=False` on boxes shifted by -0.5 cells, adaptive sampling, extent at least one cell), softmax
    over all C classes, then p * (1 - s + s / C) + s / C. The class token (1 x 1) comes first, tokens follow row by row.
    Raises ValueError for shapes that do not fit or a class >= C.
    """
    crops, flips = np.asarray(crops, np.float32), np.asarray(flips, np.bool_)
    if crops.shape != (len(classes), 4) or flips.shape != (len(classes),):
        raise ValueError(
            f"crops must be [{len(classes)}, 4] and flips [{len(classes)}], got {crops.shape} and {flips.shape}"
        )
    if not np.isfinite(crops).all() or (crops[:, 2:] <= 0).any():
        raise ValueError("crops must be finite with height and width > 0 (fractions of the label map)")
    return warped_targets(classes, scores, affines_of_crops(crops, flips), num_classes, grid, smoothing, out, cut=False)


def affines_of_crops(crops: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Crops [B, 4] = (top, left, height, width), mirrored where `flips` [B] -> float32 [B, 6] as `warped_targets` takes
    them."""
    top, left, height, width = np.asarray(crops, np.float32).T
    nothing = np.zeros_like(top)
    return np.stack(
        [np.where(flips, -width, width), nothing, np.where(flips, left + width, left), nothing, height, top], axis=1
    )


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
    """`token_targets` of maps seen through affines: RoIAlign whose sampling points, laid out in the output, are mapped
    to the label map.

    affines: float32 [B, 6] = (xu, xv, x0, yu, yv, y0): output coordinates u (along x), v (along y) in 0..1 -> fractions
    of the label map's extent, x = xu u + xv v + x0, y = yu u + yv v + y0. Bins have ceil(cells that a bin covers)
    sampling points along u and v, of rotated maps ceil(cells - 1e-4), so that rounding does not decide; points outside
    the map count as 0, so that a token there knows nothing: its target is uniform. cut: at the map's edge; else half a
    cell beyond it, as RoIAlign.
    Raises ValueError as `token_targets`.
    """
    b = _check_targets(classes, scores, num_classes, grid, smoothing)
    affines = np.ascontiguousarray(affines, np.float32)
    if affines.shape != (b, 6) or not np.isfinite(affines).all():
        raise ValueError(f"affines must be finite [{b}, 6], got {affines.shape}")
    shape = (b, 1 + grid * grid, num_classes)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(
            f"out must be float32 {shape}, contiguous and writable, got {out.dtype} {out.shape}, strides {out.strides}"
        )
    targets.write(
        np.ascontiguousarray(classes),
        np.ascontiguousarray(scores),
        affines,
        num_classes,
        grid,
        np.float32(smoothing),
        cut,
        out,
    )
    return out


def _check_targets(classes, scores, num_classes, grid, smoothing):
    if classes.ndim != 4 or classes.dtype != np.uint16 or scores.shape != classes.shape or scores.dtype != np.float32:
        raise ValueError(
            f"classes must be uint16 and scores float32, both [B, k, H, W]; got {classes.dtype} {classes.shape},"
            f" {scores.dtype} {scores.shape}"
        )
    if not np.isfinite(scores).all():  # and NaN marks, inside, the classes not met yet
        raise ValueError("label map scores must be finite")
    if grid < 1 or num_classes < 1 or not 0 <= smoothing < 1:
        raise ValueError(
            f"grid and num_classes must be >= 1 and smoothing in [0, 1), got {grid}, {num_classes}, {smoothing}"
        )
    if classes.size and int(classes.max()) >= num_classes:
        raise ValueError(f"label map holds class {int(classes.max())}, but num_classes is {num_classes}")
    return len(classes)
