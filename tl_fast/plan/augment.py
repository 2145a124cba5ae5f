"""The ranges of a sample's random decisions, as recipes state them. Imports neither numba nor torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tl_fast.plan.rand_augment import RandAugment
from tl_fast.system.mistakes import InputError

INTERPOLATIONS = ("bilinear", "bicubic", "random")


@dataclass(frozen=True)
class Augment:
    """Ranges of the random decisions. The defaults are crop and flip alone; LV-ViT's recipe (arXiv 2104.10858) adds the
    rest.

    scale: (low, high) share of the image's area that a crop takes, 0 < low <= high <= 1.
    ratio: (low, high) aspect ratio width / height of a crop, 0 < low <= high.
    flip: probability of a horizontal mirror, 0..1.
    interpolation: "bilinear", "bicubic", or "random": one of them drawn for each image.
    auto_augment: RandAugment as timm writes it ("rand-m9-mstd0.5-inc1"), or "" for none.
    color_jitter: j in 0..1: brightness, contrast and saturation get factors of 1 - j to 1 + j, in random order; as in
    timm, not together with auto_augment.
    erase: probability of random erasing, 0..1.
    fill: RGB where the output shows what is outside the image, 0..255; ImageNet's mean by default, as timm's.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bilinear"
    auto_augment: str = ""
    color_jitter: float = 0.0
    erase: float = 0.0
    fill: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise InputError(f"augment.scale must satisfy 0 < low <= high <= 1, got {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise InputError(f"augment.ratio must satisfy 0 < low <= high, got {self.ratio}")
        for name in ("flip", "erase", "color_jitter"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augment.{name} must be in [0, 1], got {getattr(self, name)}")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"augment.interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}")
        if len(self.fill) != 3 or not all(0 <= value <= 255 for value in self.fill):
            raise InputError(f"augment.fill must be three numbers in 0..255, got {self.fill}")
        if self.rand_augment is not None and self.color_jitter:
            raise InputError(
                f"augment.color_jitter {self.color_jitter} and auto_augment {self.auto_augment!r}: choose one of them"
            )

    @property
    def rand_augment(self) -> RandAugment | None:
        """`auto_augment`, parsed. Raises ValueError."""
        return RandAugment.parse(self.auto_augment) if self.auto_augment else None
