"""Mixup and CutMix of whole batches: the ranges of their random decisions, and the draw of one step.

The decisions and their distributions are those of timm's `Mixup` in mode "batch". timm draws from numpy's global
generator; here a step's draw depends on (seed, epoch, step) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tl_fast.maths import scalar
from tl_fast.system.sides import Sides, both_sides


@dataclass(frozen=True)
class Mixup:
    """What may be drawn, as timm's names mean; one of the alphas at least is above 0.

    mixup: alpha of mixup (arXiv 1710.09412), whose lambda is of Beta(alpha, alpha); 0: no mixup.
    cutmix: alpha of CutMix (arXiv 1905.04899); 0: no CutMix.
    probability: that a batch is mixed, 0..1.
    switch_probability: that a mixed batch is mixed by CutMix where both are on, 0..1.
    """

    mixup: float
    cutmix: float
    probability: float = 1.0
    switch_probability: float = 0.5


def draw_mix(seed: int, epoch: int, step: int, image_size: Sides, ranges: Mixup) -> np.ndarray:
    """How one step's batches are mixed with themselves flipped, the same on every rank -> float32 [5] = (top, left,
    bottom, right, share).

    Inside the box, in pixels of images of `image_size`, ends exclusive, the flipped batch has this share of a pixel.
    CutMix: a box of 1 - lambda of the area before it is clipped to the image, and share 1; mixup: the whole image and
    share 1 - lambda; a batch that is not mixed: share 0.
    """
    identity = np.uint64(seed & 0xFFFFFFFFFFFFFFFF), np.uint64(epoch), np.uint64(step)
    words = [int(word) for word in scalar.draw4(*identity, scalar.DRAW_MIXUP)]
    generator = np.random.Generator(np.random.Philox(key=[words[0] << 32 | words[1], words[2] << 32 | words[3]]))
    mixed, switched = generator.random(2) < (ranges.probability, ranges.switch_probability)
    cutmix = ranges.cutmix > 0 and (switched or not ranges.mixup)
    size = both_sides(image_size)
    if not mixed:
        return np.array([0, 0, *size, 0], np.float32)
    alpha = ranges.cutmix if cutmix else ranges.mixup
    flipped = 1 - generator.beta(alpha, alpha)
    if not cutmix:
        return np.array([0, 0, *size, flipped], np.float32)
    cut = (np.array(size) * math.sqrt(flipped)).astype(int)
    centre = generator.integers(0, size)
    start = np.clip(centre - cut // 2, 0, size)
    stop = np.clip(centre + (cut + 1) // 2, 0, size)
    return np.array([*start, *stop, 1], np.float32)
