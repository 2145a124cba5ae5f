"""The CPU's side of the decode pipeline: images, masks and token targets, by loops that numba compiles.

Every loop releases the GIL and writes one sample (or a range of samples), so callers split a batch over their own
threads.
"""

from __future__ import annotations

import numpy as np

from tl_fast.kernels.colour import cpu as colour
from tl_fast.kernels.geometry import cpu as warp
from tl_fast.kernels.masks import cpu as masks
from tl_fast.kernels.targets import cpu as targets
from tl_fast.kernels.targets.crops import affines_of_crops
from tl_fast.maths.compile import njit
from tl_fast.maths.ycbcr import Pixels
from tl_fast.plan.boxes import Sides, both_sides


def augment(pixels: Pixels, height: int, width: int, plan: np.void, fill: np.ndarray, out: np.ndarray) -> None:
    """One sample as its plan, a record of `tl_fast.plan.PLAN`, says: geometry first, then colours, without erasing.

    pixels: of an image of `height` x `width` pixels, at least those of `tl_fast.kernels.geometry.cpu.needed`; made by
    `tl_fast.maths.ycbcr.pixels_of` or `planes_of`, whose array must stay; fill: uint8 [3], RGB of what lies outside the
    image; out: uint8 [3, H, W], contiguous, written. Raises ValueError for an `out` of another kind.
    """
    if out.ndim != 3 or len(out) != 3 or out.dtype != np.uint8 or not out.flags.c_contiguous:
        raise ValueError(f"out must be uint8 [3, height, width], contiguous; got {out.dtype} {out.shape}")
    crop = float(plan["top"]), float(plan["left"]), float(plan["height"]), float(plan["width"])
    geometry = crop, plan["affine"], int(plan["interpolation"])
    _augment(pixels, int(height), int(width), *geometry, plan["ops"], plan["arguments"], _own_type(fill), out)


def _own_type(array: np.ndarray) -> np.ndarray:
    """The array itself if it is contiguous and writable, else a copy that is. The loops are compiled for such arrays
    alone: a second set of types damages numba's tables of the functions that the loops share."""
    return array if array.flags.c_contiguous and array.flags.writeable else array.copy()


@njit
def _augment(pixels, height, width, crop, affine, interpolation, ops, arguments, fill, out):
    warp.show(pixels, height, width, crop, affine, interpolation, fill, out)
    colour.apply(out, ops, arguments)


def show_mask(
    mask: np.ndarray, plan: np.void, ignore_index: int, out: np.ndarray, image: np.ndarray, fill: np.ndarray
) -> None:
    """One sample's mask as its plan, a record of `tl_fast.plan.PLAN`, says: what `augment` does to the image's pixels,
    but without interpolation; and the image's padding, whose colour operations are undone.

    mask: uint8 [h, w], class indices, of the stored image's size; ignore_index: 0..255, the class outside the image;
    out: uint8 [H, W], written: the class of the pixel under each output pixel's centre; image: uint8 [3, H, W] of
    `augment`, written outside the stored image: fill uint8 [3].

    Raises ValueError for arrays of another type or shape.
    """
    for name, array in (("mask", mask), ("out", out)):
        if array.ndim != 2 or array.dtype != np.uint8:
            raise ValueError(f"{name} must be uint8 [height, width], got {array.dtype} {array.shape}")
    if image.shape != (3, *out.shape) or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 {(3, *out.shape)}, got {image.dtype} {image.shape}")
    masks.show(_own_type(mask), _own_type(plan["affine"]), np.uint8(ignore_index), out, image, _own_type(fill))


def token_targets(
    classes: np.ndarray,
    scores: np.ndarray,
    crops: np.ndarray,
    flips: np.ndarray,
    num_classes: int,
    grid: Sides,
    smoothing: float,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Soft targets of the class token and of h x w patch tokens from sparse label maps -> float32 [B, 1 + h*w, C].

    classes: uint16 [B, k, H, W]; scores: float32 [B, k, H, W], classes not listed in a cell have score 0; crops:
    float32 [B, 4] = (top, left, height, width) as fractions of the label map's extent; flips: bool [B], the crop is
    mirrored left-right after cropping; num_classes: C; grid: (h, w), or a number for both; smoothing: label smoothing s
    in [0, 1); out: where to write, else a new array.

    RoIAlign as torchvision's (`aligned=False` on boxes shifted by -0.5 cells, adaptive sampling, extent at least one
    cell), softmax over all C classes, then p * (1 - s + s / C) + s / C. The class token (1 x 1) comes first, the patch
    tokens follow row by row. Raises ValueError for shapes that do not fit or a class >= C.
    """
    crops, flips = np.asarray(crops, np.float32), np.asarray(flips, np.bool_)
    if crops.shape != (len(classes), 4) or flips.shape != (len(classes),):
        raise ValueError(
            f"crops must be [{len(classes)}, 4] and flips [{len(classes)}], got {crops.shape} and {flips.shape}"
        )
    return warped_targets(classes, scores, affines_of_crops(crops, flips), num_classes, grid, smoothing, out, cut=False)


def warped_targets(
    classes: np.ndarray,
    scores: np.ndarray,
    affines: np.ndarray,
    num_classes: int,
    grid: Sides,
    smoothing: float,
    out: np.ndarray | None = None,
    cut: bool = True,
) -> np.ndarray:
    """`token_targets` of maps seen through affines: RoIAlign's sampling points are laid out in the output and mapped to
    the label map.

    affines: float32 [B, 6] = (xu, xv, x0, yu, yv, y0): output coordinates u (along x), v (along y) in 0..1 -> fractions
    of the label map's extent, x = xu u + xv v + x0, y = yu u + yv v + y0. A bin that covers so many cells along u has
    ceil(cells) sampling points along u, in rotated maps ceil(cells - 1e-4), so that rounding does not decide; the same
    along v. Points outside the map count as 0, so a token outside it gets a uniform target. cut: outside begins at the
    map's edge; else half a cell beyond it, as RoIAlign has it. Raises ValueError as `token_targets`.
    """
    b = _check_targets(classes, scores, num_classes, grid, smoothing)
    affines = np.ascontiguousarray(affines, np.float32)
    if affines.shape != (b, 6) or not np.isfinite(affines).all():
        raise ValueError(f"affines must be finite [{b}, 6], got {affines.shape}")
    grid = both_sides(grid)
    shape = (b, 1 + grid[0] * grid[1], num_classes)
    if out is None:
        out = np.empty(shape, np.float32)
    elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous or not out.flags.writeable:
        raise ValueError(
            f"out must be float32 {shape}, contiguous and writable, got {out.dtype} {out.shape}, strides {out.strides}"
        )
    maps = np.ascontiguousarray(classes), np.ascontiguousarray(scores)
    targets.write(*maps, affines, num_classes, grid, np.float32(smoothing), cut, out)
    return out


def _check_targets(classes, scores, num_classes, grid, smoothing):
    if classes.ndim != 4 or classes.dtype != np.uint16 or scores.shape != classes.shape or scores.dtype != np.float32:
        raise ValueError(
            f"classes must be uint16 and scores float32, both [B, k, H, W]; got {classes.dtype} {classes.shape},"
            f" {scores.dtype} {scores.shape}"
        )
    if not np.isfinite(scores).all():  # the loops mark classes not met yet with NaN
        raise ValueError("label map scores must be finite")
    if min(both_sides(grid)) < 1 or num_classes < 1 or not 0 <= smoothing < 1:
        raise ValueError(
            f"grid and num_classes must be >= 1 and smoothing in [0, 1), got {grid}, {num_classes}, {smoothing}"
        )
    if classes.size and int(classes.max()) >= num_classes:
        raise ValueError(f"label map holds class {int(classes.max())}, but num_classes is {num_classes}")
    return len(classes)
