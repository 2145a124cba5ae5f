"""The format of a mask: the class of every pixel of an image, and how a beton stores it.

A mask is uint8 [H, W], as large as the stored image: 0..C-1, or `ignore_index` where nothing is labelled. A beton
stores what changes from row to row (`encode`, docs/file_format.md), without loss.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from tl_fast.system.mistakes import InputError

# The functions below import `loops` when they are called: it needs numba, which takes longer to import than everything
# else that opens a beton.


class MaskError(InputError):
    """A mask, or a description of masks, that cannot be used; the message names the value or file and the remedy."""


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """What every mask of a data set looks like.

    num_classes: C, 1 to 255. ignore_index: the value of unlabelled pixels, C to 255. class_names: C names, or none.
    colours: C triples (red, green, blue) of 0 to 255 to show the classes in, or none.
    Raises MaskError naming a value out of range.
    """

    num_classes: int
    ignore_index: int = 255
    class_names: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        if not _is_integer(self.num_classes) or not 1 <= self.num_classes <= 255:
            raise MaskError(f"mask spec: num_classes must be an integer from 1 to 255, got {self.num_classes!r}")
        if not _is_integer(self.ignore_index) or not self.num_classes <= self.ignore_index <= 255:
            raise MaskError(
                f"mask spec: ignore_index must be an integer from num_classes = {self.num_classes} to 255, got"
                f" {self.ignore_index!r}"
            )
        for name in ("class_names", "colours"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or len(values) not in (0, self.num_classes):
                raise MaskError(f"mask spec: {name} must be {self.num_classes} or none, got {values!r:.100}")
        if not all(isinstance(name, str) for name in self.class_names):
            raise MaskError(f"mask spec: class_names must be texts, got {self.class_names!r:.100}")
        for colour in self.colours:
            levels = colour if isinstance(colour, (tuple, list)) else ()
            if len(levels) != 3 or not all(_is_integer(level) and 0 <= level <= 255 for level in levels):
                raise MaskError(f"mask spec: a colour must be three integers from 0 to 255, got {colour!r:.100}")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "colours", tuple(tuple(map(int, colour)) for colour in self.colours))

    @property
    def allowed(self) -> np.ndarray:
        """1 for every value that a pixel may have, else 0: uint8 [256]."""
        values = np.zeros(256, np.uint8)
        values[: self.num_classes] = values[self.ignore_index] = 1
        return values

    def __str__(self) -> str:
        return f"{self.num_classes} classes, {self.ignore_index} = ignored"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        values = dataclasses.asdict(self)
        return {**values, "class_names": list(self.class_names), "colours": [list(colour) for colour in self.colours]}

    @classmethod
    def from_dict(cls, values: Any) -> MaskSpec:
        """Inverse of `to_dict`. Raises MaskError on anything else."""
        keys = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or "num_classes" not in values or not values.keys() <= keys:
            raise MaskError(f"mask spec: must have the keys {sorted(keys)}, got {values!r:.100}")
        return cls(**values)


@functools.cache
def compile_loops() -> None:
    """Compile, or load, what `encode` and `decode` call. To be called before threads call them: numba's tables get
    damaged where two threads call a function for the first time at once."""
    spec = MaskSpec(2)
    decode(encode(np.zeros((1, 400), np.uint8), spec), 1, 400, spec)


def encode(mask: np.ndarray, spec: MaskSpec) -> bytes:
    """A mask, uint8 [H, W], as it goes into a beton.

    Raises MaskError on another dtype or shape, an empty mask, or a value that is neither a class nor `ignore_index`.
    """
    from tl_fast.masks import loops

    mask = np.asarray(mask)
    if mask.dtype != np.uint8 or mask.ndim != 2 or not all(0 < side < 1 << 16 for side in mask.shape):
        raise MaskError(f"a mask must be uint8 [H, W] of 1 to 65,535 pixels a side, got {mask.dtype} {mask.shape}")
    unknown = (np.bincount(mask.ravel(), minlength=256) > 0) & (spec.allowed == 0)
    if unknown.any():
        raise MaskError(
            f"a mask has the value {np.flatnonzero(unknown)[0]}; values are 0..{spec.num_classes - 1}, and"
            f" {spec.ignore_index} for unlabelled pixels"
        )
    out = np.empty(1 + mask.size, np.uint8)
    return out[: loops.encode(np.ascontiguousarray(mask), out)].tobytes()


def decode(data: np.ndarray | bytes | memoryview, height: int, width: int, spec: MaskSpec) -> np.ndarray:
    """Inverse of `encode`: the mask, uint8 [height, width], new. Most of it runs without the GIL.

    data: uint8 [size]. Raises MaskError on bytes that `encode` does not make of a mask of this size and spec; nothing
    is read or written out of bounds.
    """
    from tl_fast.masks import loops

    out = np.empty((height, width), np.uint8)
    data = np.frombuffer(data, np.uint8).view()
    data.flags.writeable = False  # always the same type, so the function is compiled once
    if wrong := loops.decode(data, spec.allowed, out):
        problem = {
            loops.BAD_SIZE: f"its {len(data)} bytes end too early or too late",
            loops.BAD_CLASS: f"it has a value other than 0..{spec.num_classes - 1} and {spec.ignore_index}",
            loops.BAD_CODE: "it has bits that are no code word",
            loops.BAD_RUN: "it has a run that is not within its row",
        }[wrong]
        raise MaskError(f"mask of {width}×{height}: {problem}")
    return out
