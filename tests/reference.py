"""Slow, obvious answers to compare with. Imports nothing from tl_fast."""

from __future__ import annotations

import math

import numpy as np

_MASK = 0xFFFFFFFF


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python integers, after Salmon et al. 2011."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def epoch_order(seed: int, epoch: int, samples: int) -> list[int]:
    """Sample ids sorted by 64 random bits each: words 0 and 1 of the draw 2**16."""

    def bits(sample: int) -> int:
        key = (seed & _MASK, seed >> 32)
        high, low, _, _ = philox4x32_10((sample & _MASK, sample >> 32, epoch, 1 << 16), key)
        return high << 32 | low

    return sorted(range(samples), key=bits)


def order_groups(global_batch: int) -> int:
    """The largest power of two up to 64 that divides the global batch."""
    return max(power for power in (1, 2, 4, 8, 16, 32, 64) if global_batch % power == 0)


def grouped_order(seed: int, epoch: int, samples: int, global_batch: int) -> list[int]:
    """Dealt like cards: the samples of each group lie on a pile of its own, in the order of all; every step takes
    equally many of each pile, pile by pile, until one has too few."""
    groups = order_groups(global_batch)
    share = global_batch // groups
    piles = [[sample for sample in epoch_order(seed, epoch, samples) if sample % groups == g] for g in range(groups)]
    order = []
    while all(len(pile) >= share for pile in piles):
        for pile in piles:
            order += pile[:share]
            del pile[:share]
    return order


def dense_map(classes: np.ndarray, scores: np.ndarray, num_classes: int) -> np.ndarray:
    """Sparse [k, H, W] -> dense float32 [C, H, W], classes not listed 0."""
    dense = np.zeros((num_classes, *classes.shape[1:]), np.float32)
    for t, row, column in np.ndindex(classes.shape):
        dense[classes[t, row, column], row, column] += scores[t, row, column]
    return dense


def _interpolate(plane: np.ndarray, y: float, x: float) -> np.ndarray:
    rows, columns = plane.shape[1:]
    if y < -1 or y > rows or x < -1 or x > columns:
        return np.zeros(plane.shape[0])
    y, x = min(max(y, 0.0), rows - 1), min(max(x, 0.0), columns - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
    fy, fx = y - y0, x - x0
    top = plane[:, y0, x0] * (1 - fx) + plane[:, y0, x1] * fx
    bottom = plane[:, y1, x0] * (1 - fx) + plane[:, y1, x1] * fx
    return top * (1 - fy) + bottom * fy


def roi_align(dense: np.ndarray, crop: tuple[float, float, float, float], bins: tuple[int, int]) -> np.ndarray:
    """RoIAlign of one crop (top, left, height, width as fractions) -> [C, *bins]; torchvision's `aligned=False` on
    shifted boxes."""
    rows, columns = dense.shape[1:]
    top, left = crop[0] * rows - 0.5, crop[1] * columns - 0.5
    height, width = max(crop[2] * rows, 1.0), max(crop[3] * columns, 1.0)
    ny, nx = math.ceil(height / bins[0]), math.ceil(width / bins[1])
    out = np.zeros((dense.shape[0], *bins))
    for i, j, sy, sx in np.ndindex(*bins, ny, nx):
        y = top + height / bins[0] * (i + (sy + 0.5) / ny)
        x = left + width / bins[1] * (j + (sx + 0.5) / nx)
        out[:, i, j] += _interpolate(dense, y, x) / (ny * nx)
    return out


def token_targets(classes, scores, crops, flips, num_classes, grid, smoothing) -> np.ndarray:
    """Token-label targets [B, 1 + h*w, C] the long way: dense map, RoIAlign, softmax, smoothing.

    grid: (h, w), or a number for both."""
    targets = []
    for b in range(len(classes)):
        dense = dense_map(classes[b], scores[b], num_classes)
        rows = []
        for bins in ((1, 1), (grid, grid) if isinstance(grid, int) else grid):
            values = roi_align(dense, crops[b], bins)
            if flips[b]:
                values = values[:, :, ::-1]
            rows.append(values.reshape(num_classes, -1).T)
        logits = np.concatenate(rows)
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        off = smoothing / num_classes
        targets.append(p * (1 - smoothing + off) + off)
    return np.stack(targets)


def segment_crop(random, mask, scale, base_size, crop_size, max_class_share=0.75, ignore_index=255):
    """mmsegmentation's Resize (ratio_range), RandomCrop (cat_max_ratio, ten tries and one more) and RandomFlip.

    random: numpy Generator; mask: uint8 [h, w]; base_size: (long, short) or None; crop_size: (height, width).
    Returns (height and width of the scaled image, top, left, flipped).
    """
    height, width = mask.shape
    factor = random.uniform(*scale)
    if base_size is not None:
        factor *= min(max(base_size) / max(height, width), min(base_size) / min(height, width))
    rows, columns = int(height * factor + 0.5), int(width * factor + 0.5)
    scaled = mask[((np.arange(rows) + 0.5) * height / rows).astype(int)]
    scaled = scaled[:, ((np.arange(columns) + 0.5) * width / columns).astype(int)]

    def box():
        return [random.integers(0, max(size - side, 0) + 1) for size, side in zip(scaled.shape, crop_size, strict=True)]

    top, left = box()
    for _ in range(10):
        shown = scaled[top : top + crop_size[0], left : left + crop_size[1]]
        classes, counts = np.unique(shown, return_counts=True)
        counts = counts[classes != ignore_index]
        if len(counts) > 1 and counts.max() / counts.sum() < max_class_share:
            break
        top, left = box()
    return rows, columns, top, left, random.random() < 0.5


def photometric_distortion(random) -> list[tuple[str, float]]:
    """mmsegmentation's PhotoMetricDistortion: the operations applied to one image, in order, with their arguments.

    random: numpy Generator. Hue in OpenCV's units of 2 degrees.
    """
    operations = []
    if random.integers(2):
        operations.append(("brightness", random.uniform(-32, 32)))
    contrast_first = random.integers(2)
    contrast = [("contrast", random.uniform(0.5, 1.5))] if random.integers(2) else []
    operations += contrast if contrast_first else []
    if random.integers(2):
        operations.append(("saturation", random.uniform(0.5, 1.5)))
    if random.integers(2):
        operations.append(("hue", float(random.integers(-18, 18))))
    return operations + ([] if contrast_first else contrast)
