"""Crops of label maps as the affines that the token targets are made from, on the CPU and on the GPU."""

from __future__ import annotations

import numpy as np


def affines_of_crops(crops: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Crops, mirrored left-right where `flips` says so -> affines float32 [B, 6], as `cpu.warped_targets` takes them.

    crops: [B, 4] = (top, left, height, width), fractions of the label map's extent; flips: bool [B]. Raises ValueError
    for a crop that is not finite or without height or width.
    """
    crops = np.asarray(crops, np.float32)
    if not np.isfinite(crops).all() or (crops[:, 2:] <= 0).any():
        raise ValueError("crops must be finite with height and width > 0 (fractions of the label map)")
    top, left, height, width = crops.T
    zero = np.zeros_like(top)
    x_u, x_0 = np.where(flips, -width, width), np.where(flips, left + width, left)
    return np.stack([x_u, zero, x_0, zero, height, top], axis=1)
