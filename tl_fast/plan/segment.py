"""The ranges of a sample's random decisions in semantic segmentation. Imports neither numba nor torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tl_fast.system.mistakes import InputError

MOST_TRIES = 1000  # crops of one image


@dataclass(frozen=True)
class SegmentAugment:
    """Ranges of the random decisions about image and mask. The defaults are those of mmsegmentation's training on
    ADE20K: Resize, RandomCrop, RandomFlip, PhotoMetricDistortion, Pad.

    scale: (low, high) factor of both sides, 0 < low <= high, drawn uniformly.
    base_size: (long, short) pixels that an image's longer and shorter side are fitted into, its aspect kept, before
        the factor is applied; (2048, 512) for ADE20K. None: the stored size.
    max_class_share: a crop is taken where the largest class has less than this share of its labelled pixels, 0..1;
        1: any crop is.
    crop_tries: crops that are looked at, 1..1000; where none is taken, one more is drawn and taken as it is.
    flip: probability of a horizontal mirror, 0..1.
    distort: whether colours are distorted: brightness by -32 to 32 levels, contrast and saturation by a factor of 0.5
        to 1.5, hue by -36 to 34 degrees, each in half of the images.
    fill: RGB where the output shows what is outside the image, 0..255; ImageNet's mean by default.

    Raises InputError naming the field.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    base_size: tuple[int, int] | None = None
    max_class_share: float = 0.75
    crop_tries: int = 10
    flip: float = 0.5
    distort: bool = True
    fill: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] < math.inf:
            raise InputError(f"augment.scale must satisfy 0 < low <= high, got {self.scale}")
        if self.base_size is not None and not (len(self.base_size) == 2 and self.base_size[0] >= self.base_size[1] > 0):
            raise InputError(f"augment.base_size must be (long, short), long >= short >= 1, got {self.base_size}")
        for name in ("max_class_share", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augment.{name} must be in [0, 1], got {getattr(self, name)}")
        if not 1 <= self.crop_tries <= MOST_TRIES:
            raise InputError(f"augment.crop_tries must be in 1..{MOST_TRIES}, got {self.crop_tries}")
        if len(self.fill) != 3 or not all(0 <= value <= 255 for value in self.fill):
            raise InputError(f"augment.fill must be three numbers in 0..255, got {self.fill}")
