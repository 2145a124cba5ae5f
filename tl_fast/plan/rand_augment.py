"""RandAugment in timm's notation (`rand-m9-n2-mstd0.5-inc1`): its operations, and what the string says of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from tl_fast.maths import scalar
from tl_fast.system.mistakes import InputError

# fmt: off
OPS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)
# fmt: on
"""The 15 operations in timm's order; an operation's code is its index (`tl_fast.maths.scalar.AUTO_CONTRAST` ...)."""

MAX_LAYERS = 8  # that a plan record has room for

_PART = re.compile(r"(mstd|mmax|inc|m|n|p|t|w)(.*)")


@dataclass(frozen=True)
class RandAugment:
    """Settings of RandAugment (arXiv 1909.13719) as timm has it.

    magnitude: mean level, 0 to `ceiling`; layers: operations an image, each drawn from all 15 and applied with
    `probability`; std: of the normal noise on the level, or inf for a uniform level from 0 to `magnitude`; increasing:
    all operations get stronger with the level (timm's `inc1`); ceiling: largest level after noise.
    """

    magnitude: int = 10
    layers: int = 2
    probability: float = 0.5
    std: float = 0.0
    increasing: bool = False
    ceiling: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= MAX_LAYERS:
            raise InputError(f"n{self.layers}: the number of layers must be 1 to {MAX_LAYERS}")
        if not 0 <= self.probability <= 1:
            raise InputError(f"p{self.probability}: a probability must be in 0..1")
        if self.magnitude < 0 or not self.std >= 0 or not 1 <= self.ceiling <= 100:
            raise InputError(
                f"m{self.magnitude}, mstd{self.std}, mmax{self.ceiling}: m and mstd must be >= 0 and mmax 1 to 100"
            )

    @classmethod
    def parse(cls, text: str) -> RandAugment:
        """Read `rand-m9-n2-p0.5-mstd0.5-mmax10-inc1`; parts but the first may be left out for timm's defaults.

        Raises ValueError naming the part that is wrong.
        """
        name, *parts = text.split("-")
        if name != "rand":
            raise InputError(f"auto_augment {text!r}: only RandAugment is known, as in rand-m9-mstd0.5-inc1")
        kinds = {
            "m": ("magnitude", int),
            "n": ("layers", int),
            "p": ("probability", float),
            "mstd": ("std", float),
            "mmax": ("ceiling", int),
        }
        values: dict[str, float | bool] = {}
        for part in parts:
            match = _PART.fullmatch(part)
            if match is not None and match[1] in "tw":
                raise InputError(
                    f"auto_augment {text!r}: the set of operations cannot be chosen ({part}), all {len(OPS)} are used"
                )
            try:
                if match is None:
                    raise ValueError("unknown part")
                if match[1] == "inc":
                    values["increasing"] = bool(int(match[2]))
                else:
                    field, number = kinds[match[1]]
                    values[field] = number(match[2])
            except ValueError as error:
                raise InputError(
                    f"auto_augment {text!r}: {part!r} is none of m9, n2, p0.5, mstd0.5, mmax10, inc1"
                ) from error
        if values.get("std", 0) > 100:
            values["std"] = math.inf
        try:
            return cls(**values)
        except ValueError as error:
            raise InputError(f"auto_augment {text!r}: {error}") from error


assert len(OPS) == scalar.TRANSLATE_Y + 1
