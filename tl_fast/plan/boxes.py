"""Boxes of evaluation, and where a plan's crop lies in the label map."""

from __future__ import annotations

import numpy as np

from tl_fast.system.mistakes import InputError

GEOMETRIES = ("correct", "published")


def center_boxes(heights: np.ndarray, widths: np.ndarray, image_size: int, crop_pct: float) -> np.ndarray:
    """Boxes of evaluation, float64 [B, 4] = (top, left, height, width) in source pixels: what is left of an image whose
    short side is resized to floor(image_size / crop_pct) and of which the centre square of image_size pixels is cut.

    heights, widths: int64 [B], pixels of the source images.
    """
    side = np.minimum(heights, widths) * image_size / np.floor(image_size / crop_pct)
    side = np.minimum(side, np.minimum(heights, widths))
    return np.stack([(heights - side) / 2, (widths - side) / 2, side, side], axis=1)


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
