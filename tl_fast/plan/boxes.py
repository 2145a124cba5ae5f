"""Boxes of evaluation, and where a plan's crop lies in the label map."""

from __future__ import annotations

import numpy as np

from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import Sides, both_sides

GEOMETRIES = ("correct", "published")


def center_boxes(heights: np.ndarray, widths: np.ndarray, image_size: Sides, crop_pct: float) -> np.ndarray:
    """Boxes of evaluation, float64 [B, 4] = (top, left, height, width) in source pixels: what is left of an image that
    is resized, its aspect kept, until it just covers floor(side / crop_pct) of both sides of image_size, and of which
    the centre of image_size is cut. Of a square that is the short side's resize. Source: timm's transforms.

    heights, widths: int64 [B], pixels of the source images. image_size: pixels.
    """
    sides = both_sides(image_size)
    covered = [np.floor(side / crop_pct) for side in sides]
    by_height = heights * covered[1] <= widths * covered[0]  # the images that the covered height limits
    limit, resized = np.where(by_height, heights, widths), np.where(by_height, *covered)
    height = np.minimum(limit * sides[0] / resized, heights)
    width = np.minimum(limit * sides[1] / resized, widths)
    return np.stack([(heights - height) / 2, (widths - width) / 2, height, width], axis=1)


def crop_fractions(boxes: np.ndarray, heights: np.ndarray, widths: np.ndarray, extent: str) -> np.ndarray:
    """Boxes [B, 4] in source pixels -> float32 [B, 4], the same boxes as fractions of what the label map covers.

    boxes: (top, left, height, width).
    heights, widths: [B], pixels of the source images.
    extent: "full", the whole image, or "center_square", the largest centred square. Fractions of a square may lie
        outside 0..1.

    Raises ValueError for another extent.
    """
    size = np.stack([heights, widths], axis=1).astype(np.float64)
    if extent == "center_square":
        covered = np.repeat(size.min(axis=1, keepdims=True), 2, axis=1)
    elif extent == "full":
        covered = size
    else:
        raise InputError(f"label map extent must be 'full' or 'center_square', got {extent!r}")
    start = (size - covered) / 2
    return np.concatenate([(boxes[:, :2] - start) / covered, boxes[:, 2:] / covered], axis=1).astype(np.float32)


def map_affines(plans: np.ndarray, heights: np.ndarray, widths: np.ndarray, extent: str, geometry: str) -> np.ndarray:
    """The plans' affines, but from output coordinates to fractions of the label map's extent: float32 [B, 6] as
    `cpu.warped_targets` takes them.

    plans: PLAN records [B].
    heights, widths: [B], pixels of the source images.
    extent: as for `crop_fractions`.
    geometry: "correct", or "published": the published code hands the crop's (top, left, height, width) to RoIAlign as
        (x1, y1, ...), so its labels are mirrored across the diagonal.
    """
    boxes = np.stack([plans[name] for name in ("top", "left", "height", "width")], axis=1).astype(np.float64)
    crops = crop_fractions(boxes, heights, widths, extent).astype(np.float64)
    if geometry == "published":
        crops = crops[:, [1, 0, 3, 2]]
    affines = plans["affine"].astype(np.float64)
    affines[:, [2, 5]] -= boxes[:, [1, 0]]
    affines /= boxes[:, [3, 3, 3, 2, 2, 2]]  # to coordinates of the crop
    affines *= crops[:, [3, 3, 3, 2, 2, 2]]
    affines[:, [2, 5]] += crops[:, [1, 0]]
    return affines.astype(np.float32)
