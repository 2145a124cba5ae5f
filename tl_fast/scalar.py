"""Scalar maths of the decode pipeline, written once for every backend.

Plain functions of scalars: `numba.njit` compiles them for the CPU and `numba.cuda` as device functions (see
`tl_fast.jit.compile_scalar`); called undecorated they are their own slow reference. Nothing here allocates, loops over pixels or
knows a backend.
"""
from __future__ import annotations

import math

import numpy as np

_MASK = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_PHILOX_M0 = np.uint64(0xD2511F53)
_PHILOX_M1 = np.uint64(0xCD9E8D57)
_PHILOX_W0 = np.uint64(0x9E3779B9)
_PHILOX_W1 = np.uint64(0xBB67AE85)

# The last counter word says what a draw is for, so that no two uses share random numbers.
DRAW_FLIP = np.uint64(0)
DRAW_CROP = np.uint64(1)  # tries 0..9 use words 1..10
DRAW_ORDER = np.uint64(1 << 16)
DRAW_MIX_BOX = np.uint64(1 << 17)

CROP_TRIES = 10


def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011, Random123): counter words `c0..c3`, key words `k0, k1` -> four random words.

    All arguments and results are uint64 that hold 32-bit words.
    """
    for _ in range(10):
        p0 = _PHILOX_M0 * c0
        p1 = _PHILOX_M1 * c2
        c0 = (p1 >> _HALF) ^ c1 ^ k0
        c1 = p1 & _MASK
        c2 = (p0 >> _HALF) ^ c3 ^ k1
        c3 = p0 & _MASK
        k0 = (k0 + _PHILOX_W0) & _MASK
        k1 = (k1 + _PHILOX_W1) & _MASK
    return c0, c1, c2, c3


def draw4(seed, epoch, identity, draw):
    """Four random words of one draw: key = seed (64 bits), counter = (identity low, identity high, epoch, draw).

    `identity` (uint64) is the sample id, or the step for batch-level draws; all arguments uint64.
    """
    return philox4x32(identity & _MASK, identity >> _HALF, epoch & _MASK, draw, seed & _MASK, seed >> _HALF)


def unit(word):
    """A 32-bit word -> float64 in the open interval (0, 1)."""
    return (float(word) + 0.5) * (1.0 / 4294967296.0)


def below(word, n):
    """A 32-bit word -> int64 in [0, n), n >= 1 (Lemire's multiply-shift; the bias is below n / 2**32)."""
    return np.int64((word * np.uint64(n)) >> _HALF)


def random_resized_crop(seed, epoch, sample_id, height, width, scale_low, scale_high, log_ratio_low, log_ratio_high):
    """Random resized crop of an image of `height` x `width` pixels -> int64 (top, left, crop height, crop width) in pixels.

    The same distribution as torchvision's `RandomResizedCrop.get_params`: area uniform in [scale_low, scale_high], aspect ratio
    log-uniform, ten tries, then the central crop with the nearest allowed ratio. Ratios are given as natural logarithms.
    """
    area = float(height) * float(width)
    for attempt in range(CROP_TRIES):
        r0, r1, r2, r3 = draw4(seed, epoch, sample_id, DRAW_CROP + np.uint64(attempt))
        target_area = area * (scale_low + (scale_high - scale_low) * unit(r0))
        ratio = math.exp(log_ratio_low + (log_ratio_high - log_ratio_low) * unit(r1))
        w = np.int64(math.floor(math.sqrt(target_area * ratio) + 0.5))
        h = np.int64(math.floor(math.sqrt(target_area / ratio) + 0.5))
        if 0 < w <= width and 0 < h <= height:
            return below(r2, height - h + 1), below(r3, width - w + 1), h, w
    low = math.exp(log_ratio_low)
    high = math.exp(log_ratio_high)
    w = np.int64(width)
    h = np.int64(height)
    if float(width) < low * float(height):
        h = np.int64(math.floor(float(width) / low + 0.5))
    elif float(width) > high * float(height):
        w = np.int64(math.floor(float(height) * high + 0.5))
    return (np.int64(height) - h) // 2, (np.int64(width) - w) // 2, h, w


def filter_support(box_extent, out_size):
    """Half-width in source pixels of the antialiased bilinear (triangle) filter, Pillow's `BILINEAR`: max(scale, 1)."""
    return max(float(box_extent) / float(out_size), 1.0)


def filter_range(i, box_start, box_extent, out_size, in_size):
    """Source pixels [first, last) that output pixel `i` reads when `box_start .. box_start + box_extent` maps to `out_size` pixels.

    Pillow's rule (`precompute_coeffs`): the window is clipped to the image, not to the box.
    """
    support = filter_support(box_extent, out_size)
    centre = box_start + (i + 0.5) * (box_extent / out_size)
    first = max(int(centre - support + 0.5), 0)
    last = min(int(centre + support + 0.5), in_size)
    return first, last


def filter_weight(x, i, box_start, box_extent, out_size):
    """Unnormalised triangle weight of source pixel `x` for output pixel `i` (arguments as in `filter_range`)."""
    centre = box_start + (i + 0.5) * (box_extent / out_size)
    distance = abs((x - centre + 0.5) / filter_support(box_extent, out_size))
    return max(1.0 - distance, 0.0)


def roi_samples(extent, bins):
    """RoIAlign's adaptive number of sampling points per bin along one axis; `extent` in cells (at least 1), `bins` output bins."""
    return int(math.ceil(extent / bins))


def roi_point(i, s, start, extent, bins, samples):
    """Coordinate in cells of sampling point `s` of bin `i` along one axis (torchvision's `roi_align`)."""
    size = extent / bins
    return start + i * size + (s + 0.5) * size / samples


def roi_tap(point, cells):
    """Linear interpolation at `point` along an axis of `cells` cells -> (low cell, weight of low, weight of low + 1).

    torchvision's `roi_align`: zero beyond one cell outside, clamped to the border cells inside that.
    """
    if point < -1.0 or point > cells:
        return 0, 0.0, 0.0
    point = max(point, 0.0)
    low = int(point)
    if low >= cells - 1:
        return cells - 1, 1.0, 0.0
    return low, 1.0 - (point - low), point - low


def smooth(p, smoothing, num_classes):
    """Label smoothing of the published code: p * (1 - s + s / C) + s / C."""
    off = smoothing / num_classes
    return p * (1.0 - smoothing + off) + off
