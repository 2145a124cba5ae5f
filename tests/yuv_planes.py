"""YUV 4:2:0 planes for tests: made from RGB, cut to a region, and shown as libjpeg shows them. Slow and obvious.

Imports nothing from tl_fast.
"""

from __future__ import annotations

import numpy as np

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]  # Y [h, w], Cb and Cr [ceil(h / 2), ceil(w / 2)], uint8


def planes_of(rgb: np.ndarray) -> Planes:
    """Planes of an image, uint8 [h, w, 3]: chroma is the mean of 2 x 2 pixels, those at an odd side's end repeated."""
    red, green, blue = rgb.astype(float).transpose(2, 0, 1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    odd = [(0, side % 2) for side in luma.shape]
    planes = [luma]
    for difference in ((blue - luma) / 1.772, (red - luma) / 1.402):
        even = np.pad(128 + difference, odd, mode="edge")
        planes.append(even.reshape(even.shape[0] // 2, 2, even.shape[1] // 2, 2).mean(axis=(1, 3)))
    return tuple(np.clip(np.round(plane), 0, 255).astype(np.uint8) for plane in planes)


def random_planes(rng: np.random.Generator, height: int, width: int) -> Planes:
    """Every sample another: many of the colours lie outside RGB."""
    chroma = -(-height // 2), -(-width // 2)
    return tuple(rng.integers(0, 256, shape).astype(np.uint8) for shape in ((height, width), chroma, chroma))


def _upsampled(chroma: np.ndarray, height: int, width: int) -> np.ndarray:
    """The triangle filter of jdsample.c (h2v2_fancy_upsample): 3/4 of the nearest sample, 1/4 of the second nearest. Of
    fewer than three columns the nearest sample (h2v2_upsample)."""
    if chroma.shape[1] < 3:
        return chroma.repeat(2, 0).repeat(2, 1)[:height, :width].astype(int)
    total = chroma.astype(int)
    for axis, size in enumerate((height, width)):
        pixels = np.arange(size)
        second = np.clip(pixels // 2 + np.where(pixels % 2, 1, -1), 0, chroma.shape[axis] - 1)
        total = 3 * total.take(pixels // 2, axis) + total.take(second, axis)
    return (total + np.where(np.arange(width) % 2, 7, 8)) // 16


def shown(planes: Planes) -> np.ndarray:
    """The pixels that libjpeg makes of planes, uint8 [h, w, 3] (jdcolor.c: ycc_rgb_convert)."""

    def fix(number: float) -> int:
        return int(number * 65536 + 0.5)

    luma = planes[0].astype(int)
    blue, red = (_upsampled(plane, *luma.shape) - 128 for plane in planes[1:])
    differences = fix(1.402) * red, -fix(0.34414) * blue - fix(0.71414) * red, fix(1.772) * blue
    channels = [luma + (difference + 32768 >> 16) for difference in differences]
    return np.clip(np.stack(channels, axis=2), 0, 255).astype(np.uint8)


def cut(planes: Planes, start: tuple[int, int], stop: tuple[int, int]) -> np.ndarray:
    """A region as it goes to the GPU, uint8 [bytes]: Y of pixels start to stop (row, column; exclusive), then Cb and Cr
    with a sample more on every side, as far as there are any."""
    (top, left), (bottom, right) = start, stop
    parts = [planes[0][top:bottom, left:right]]
    for chroma in planes[1:]:
        rows = slice(max(top // 2 - 1, 0), (bottom + 1) // 2 + 1)
        parts.append(chroma[rows, max(left // 2 - 1, 0) : (right + 1) // 2 + 1])
    return np.concatenate([part.ravel() for part in parts])


def flat(planes: Planes) -> np.ndarray:
    """Planes as a beton holds them, uint8 [bytes]."""
    return np.concatenate([plane.ravel() for plane in planes])
