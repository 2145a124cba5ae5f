"""The plan: every random decision about one sample in one epoch, drawn once and handed to all who need it.

A record depends on (seed, epoch, sample id) alone: not on batch size, order, workers, ranks or restarts. The decoder, the image kernel
and the target kernel read the same record, so image and label map cannot drift apart.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tl_fast.jit import compile_scalar, njit

_scalar = compile_scalar(njit)

PLAN = np.dtype([("top", "<i4"), ("left", "<i4"), ("height", "<i4"), ("width", "<i4"), ("flip", "?")])
"""One record a sample: the crop in pixels of the stored image, and whether the crop is then mirrored left-right."""


@dataclass(frozen=True)
class Augment:
    """Ranges of the random decisions. Defaults: LV-ViT (arXiv 2104.10858), which takes them from timm.

    scale: (low, high) share of the image's area that a crop takes, 0 < low <= high <= 1.
    ratio: (low, high) aspect ratio width / height of a crop, 0 < low <= high.
    flip: probability of a horizontal mirror, 0..1.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"augment.scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"augment.ratio must satisfy 0 < low <= high, got {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"augment.flip is a probability in [0, 1], got {self.flip}")


def draw(seed: int, epoch: int, sample_ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, augment: Augment) -> np.ndarray:
    """Draw the plans of the samples `sample_ids` [B] with stored sizes `heights`, `widths` [B] in pixels -> PLAN records [B].

    `seed` is taken modulo 2**64, `epoch` must fit 32 bits. Raises ValueError for negative ids or images without pixels.
    """
    ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
    heights = np.ascontiguousarray(heights, dtype=np.int64)
    widths = np.ascontiguousarray(widths, dtype=np.int64)
    if not ids.shape == heights.shape == widths.shape or ids.ndim != 1:
        raise ValueError(f"sample_ids, heights and widths must be [B], got {ids.shape}, {heights.shape}, {widths.shape}")
    if ids.size and (ids.min() < 0 or heights.min() < 1 or widths.min() < 1):
        raise ValueError("sample ids must be >= 0 and image sizes >= 1 pixel")
    plans = np.empty(ids.shape, PLAN)
    low, high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    _draw(_seed(seed), _epoch(epoch), ids, heights, widths, augment.scale[0], augment.scale[1], low, high, augment.flip, plans)
    return plans


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """The epoch's random order: a permutation of 0..num_samples-1, int64 [n], by sorting one 64-bit draw per sample."""
    keys = np.empty(num_samples, np.uint64)
    _order_keys(_seed(seed), _epoch(epoch), keys)
    return np.argsort(keys, kind="stable")


def mix_box(seed: int, epoch: int, step: int, grid: int | tuple[int, int]) -> np.ndarray:
    """MixToken's box of one step -> int32 [4] = (top, left, bottom, right) in tokens, the same on every rank.

    The published draw (CutMix's): lambda ~ Beta(1, 1), sides sqrt(1 - lambda) of the grid, centre uniform, clipped to the grid. The box may
    be empty.
    """
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    words = _scalar.draw4(_seed(seed), _epoch(epoch), np.uint64(step), _scalar.DRAW_MIX_BOX)
    side = math.sqrt(1.0 - _scalar.unit(words[0]))
    box = np.empty(4, np.int32)
    for axis, (cells, word) in enumerate(((rows, words[1]), (columns, words[2]))):
        cut = int(cells * side)
        centre = _scalar.below(np.uint64(word), cells)
        box[axis] = min(max(centre - cut // 2, 0), cells)
        box[axis + 2] = min(max(centre + cut // 2, 0), cells)
    return box


def _seed(seed: int) -> np.uint64:
    return np.uint64(seed & 0xFFFFFFFFFFFFFFFF)


def _epoch(epoch: int) -> np.uint64:
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"epoch must be in [0, 2**32), got {epoch}")
    return np.uint64(epoch)


@njit
def _draw(seed, epoch, ids, heights, widths, scale_low, scale_high, log_ratio_low, log_ratio_high, flip, plans):
    for b in range(ids.size):
        sample = np.uint64(ids[b])
        top, left, height, width = _random_resized_crop(
            seed, epoch, sample, heights[b], widths[b], scale_low, scale_high, log_ratio_low, log_ratio_high
        )
        plans[b].top = top
        plans[b].left = left
        plans[b].height = height
        plans[b].width = width
        plans[b].flip = _unit(_draw4(seed, epoch, sample, _DRAW_FLIP)[0]) < flip


@njit
def _order_keys(seed, epoch, keys):
    for i in range(keys.size):
        words = _draw4(seed, epoch, np.uint64(i), _DRAW_ORDER)
        keys[i] = (words[0] << np.uint64(32)) | words[1]


_random_resized_crop, _draw4, _unit = _scalar.random_resized_crop, _scalar.draw4, _scalar.unit
_DRAW_FLIP, _DRAW_ORDER = _scalar.DRAW_FLIP, _scalar.DRAW_ORDER
