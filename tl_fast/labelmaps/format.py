"""The format of a label map: what the machine annotator saw in every cell of an image, k classes with their scores.

A cell lists its k best classes; a class that it does not list has score 0. Scores are logits relative to the cell's
tail (`top_k_relative`), so that a softmax over all C classes gives the listed classes their true probability and
spreads the rest evenly. They are stored as uint8 levels with one float32 minimum and step per sample (`quantise`).
`tl_fast.labelmaps.store` keeps the maps of a data set in a folder, `encode` makes the bytes that go into a beton.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tl_fast.sources.source import MAX_CLASSES
from tl_fast.system.mistakes import InputError

# The functions below import `loops` when they are called: it needs numba, which takes longer to import than everything
# else that opens a beton.
if TYPE_CHECKING:  # opening a beton takes 0.2 s without torch, 2.5 s with it
    import torch

EXTENTS = ("full", "center_square")


class LabelMapError(InputError):
    """A label map, or a store of them, that cannot be used; the message names the value or file and the remedy."""


@dataclasses.dataclass(frozen=True)
class MapSpec:
    """What every label map of a store looks like.

    k: classes listed per cell. height, width: H and W, in cells. num_classes: C. extent: which part of the image the
    map spans, `full` or `center_square` (for maps of images that were cropped to their centre square first).
    Raises LabelMapError naming a value out of range.
    """

    k: int
    height: int
    width: int
    num_classes: int
    extent: str = "full"

    def __post_init__(self) -> None:
        for name in ("k", "height", "width", "num_classes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise LabelMapError(f"label map spec: {name} must be an integer >= 1, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.num_classes > MAX_CLASSES:
            raise LabelMapError(
                f"label map spec: num_classes must be at most {MAX_CLASSES} (classes are uint16), "
                f"got {self.num_classes}"
            )
        if self.k > self.num_classes:
            raise LabelMapError(f"label map spec: k must be at most num_classes = {self.num_classes}, got {self.k}")
        if self.extent not in EXTENTS:
            raise LabelMapError(f"label map spec: extent must be one of {EXTENTS}, got {self.extent!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(k, H, W)."""
        return self.k, self.height, self.width

    @property
    def cells(self) -> int:
        """k·H·W, the listed classes of a map."""
        return self.k * self.height * self.width

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """One packed record: 8 + 3·k·H·W bytes, no padding."""
        return np.dtype(
            [("score_min", "<f4"), ("score_step", "<f4"), ("classes", "<u2", self.shape), ("scores", "u1", self.shape)]
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MapSpec:
        """Raises LabelMapError on unknown or missing keys."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
        )
        if unknown or missing:
            raise LabelMapError(
                f"label map spec: unknown keys {unknown}, missing keys {missing}; the keys are {sorted(fields)}"
            )
        return cls(**values)


def top_k_relative(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best classes of every cell, and their logits relative to the cell's tail.

    logits: float `[B, C, H, W]`. Returns classes int64 `[B, k, H, W]`, best first, and scores float32 `[B, k, H, W]` =
    v − t with t = logsumexp(the C − k others) − log(C − k): the logit every unlisted class would have if they shared
    their probability evenly. A softmax over the scores, unlisted classes at 0, then gives each listed class its true
    probability. With k = C nothing is unlisted and t is the cell's smallest logit. Scores are never negative. Raises
    LabelMapError unless 1 <= k <= C.
    """
    if logits.ndim != 4 or not 1 <= k <= logits.shape[1]:
        raise LabelMapError(
            f"top_k_relative: needs logits [B, C, H, W] and 1 <= k <= C, got shape {tuple(logits.shape)} and k = {k}"
        )
    logits = logits.float()
    num_classes = logits.shape[1]
    values, classes = logits.topk(k, dim=1)
    if k == num_classes:
        tail = values[:, -1:]
    else:
        # The sum leaves the listed classes out. "All minus listed" would cancel where the annotator is sure.
        rest = logits.scatter(1, classes, float("-inf"))
        tail = rest.logsumexp(dim=1, keepdim=True) - float(np.log(num_classes - k))
    return classes, values - tail


def quantise(scores: np.ndarray) -> tuple[np.ndarray, np.float32, np.float32]:
    """Quantise float32 scores `[k, H, W]`: (uint8 levels `[k, H, W]`, score_min, score_step).

    A score is about score_min + score_step · level². Squared levels lie close together where scores are small: there
    the annotator is unsure, and small differences decide a token's top class. (On efficientnet-lite0's maps evenly
    spaced levels change the top class of 1.4 % of the token targets, squared ones of 0.7 %.) For the same reason the
    best two classes of a cell stay apart when their nearest levels coincide. The error is at most half a level, one
    level where classes were kept apart. Equal scores give step 0. Raises LabelMapError on a non-finite score.
    """
    from tl_fast.labelmaps import loops

    wide = np.ascontiguousarray(scores, np.float64)
    if wide.ndim != 3 or wide.size == 0:
        raise LabelMapError(f"label map scores must be finite and [k, H, W], got shape {wide.shape}")
    levels = np.empty(wide.shape, np.uint8)
    wrong, score_min, score_step = loops.quantise(wide.reshape(len(wide), -1), levels.reshape(len(wide), -1))
    if wrong:
        _refuse_scores(wide)
    return levels, np.float32(score_min), np.float32(score_step)


def _refuse_scores(scores: np.ndarray) -> NoReturn:
    """Raise LabelMapError saying what is wrong with the scores of a map."""
    if count := int((~np.isfinite(scores)).sum()):
        raise LabelMapError(
            f"label map scores must be finite and [k, H, W], got shape {scores.shape} with {count} non-finite values"
        )
    raise LabelMapError(f"label map scores {scores.min()}..{scores.max()} span more than float32 holds")


def dequantise(levels: np.ndarray, score_min: np.ndarray | float, score_step: np.ndarray | float) -> np.ndarray:
    """Scores, float32 `[..., k, H, W]`, from uint8 levels of that shape: score_min + score_step · level².

    score_min, score_step: `[...]`.
    """
    low = np.asarray(score_min, np.float32)[..., None, None, None]
    step = np.asarray(score_step, np.float32)[..., None, None, None]
    return np.square(levels, dtype=np.float32) * step + low


# The score of each of the 256 levels, float32, before score_min and score_step are applied.
LEVELS = dequantise(np.arange(256, dtype=np.uint8).reshape(1, 1, 256), 0, 1).reshape(256)


def pack(classes: np.ndarray, scores: np.ndarray, spec: MapSpec) -> np.void:
    """One label map as a record of `spec.dtype`.

    classes: whole numbers `[k, H, W]`, which may have a float dtype, as in published maps. scores: float `[k, H, W]`.
    Raises LabelMapError on a wrong shape, a class that is not an integer in 0..C−1, a class listed twice in one cell
    (its mass would count twice), or a non-finite score.
    """
    from tl_fast.labelmaps import loops

    classes, scores = np.asarray(classes), np.asarray(scores)
    for name, array in (("classes", classes), ("scores", scores)):
        if array.shape != spec.shape:
            raise LabelMapError(f"label map {name} must have shape (k, H, W) = {spec.shape}, got {array.shape}")
    if classes.dtype.kind not in "iuf":
        raise LabelMapError(f"label map classes must be integers, got dtype {classes.dtype}")
    record = np.empty((), spec.dtype)
    flat = (spec.k, -1)
    wrong, record["score_min"], record["score_step"] = loops.pack(
        np.ascontiguousarray(classes, np.float64 if classes.dtype.kind == "f" else np.int64).reshape(flat),
        np.ascontiguousarray(scores, np.float64).reshape(flat),
        spec.num_classes,
        record["classes"].reshape(flat),
        record["scores"].reshape(flat),
    )
    if wrong == loops.BAD_SCORE:
        _refuse_scores(scores)
    if wrong:
        _refuse_classes(classes, spec)
    return record[()]


def _refuse_classes(classes: np.ndarray, spec: MapSpec) -> NoReturn:
    """Raise LabelMapError saying what is wrong with the classes of a map."""
    if classes.dtype.kind == "f" and (bad := classes[~np.isfinite(classes) | (classes != np.floor(classes))]).size:
        raise LabelMapError(f"label map classes must be integers, got {bad[0]}")
    if classes.min() < 0 or classes.max() >= spec.num_classes:
        raise LabelMapError(
            f"label map classes must lie in 0..{spec.num_classes - 1}, got {int(classes.min())}..{int(classes.max())}"
        )
    ordered = np.sort(classes, axis=0)
    j, row, column = np.argwhere(ordered[1:] == ordered[:-1])[0]
    raise LabelMapError(
        f"label map lists class {int(ordered[j, row, column])} twice in cell (row {row}, column {column})"
    )


def unpack(record: np.void, spec: MapSpec) -> tuple[np.ndarray, np.ndarray]:
    """Classes uint16 `[k, H, W]` and scores float32 `[k, H, W]` of a record of `spec.dtype`.

    Raises LabelMapError on a record of another spec.
    """
    if record.dtype != spec.dtype:
        raise LabelMapError(f"label map record has dtype {record.dtype}, its spec {spec} says {spec.dtype}")
    return record["classes"], dequantise(record["scores"], record["score_min"], record["score_step"])


def encoded_sizes(spec: MapSpec) -> tuple[int, int, int]:
    """Bytes of a map in a beton: plain, with a palette of at most 256 classes, with a palette of 257 to 512.

    A palette that saves nothing is not used: its size is then that of the plain map.
    """
    plain = 3 * spec.cells
    palette = -(-spec.num_classes // 8) + 2 * spec.cells
    return plain, min(palette, plain), min(palette + -(-spec.cells // 8), plain)


def encode(record: np.void, spec: MapSpec) -> bytes:
    """A record's classes and scores as they go into a beton, with a palette where that is smaller.

    docs/file_format.md describes the layouts. Raises LabelMapError on a record of another spec, a class outside 0..C−1,
    a score_min or score_step that is not finite, or a negative step.
    """
    from tl_fast.labelmaps import loops

    if record.dtype is not spec.dtype and record.dtype != spec.dtype:
        raise LabelMapError(f"label map record has dtype {record.dtype}, its spec {spec} says {spec.dtype}")
    out = np.empty(3 * spec.cells, np.uint8)
    size = loops.encode(np.frombuffer(record.tobytes(), np.uint8), spec.num_classes, encoded_sizes(spec), out)
    if size == loops.NOT_FINITE:
        raise LabelMapError(
            f"label map has score_min {record['score_min']} and score_step {record['score_step']}; both must be finite,"
            " the step not negative"
        )
    if size < 0:
        raise LabelMapError(f"label map lists class {-1 - size} of {spec.num_classes}")
    return out[:size].tobytes()
