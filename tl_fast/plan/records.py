"""The plan: every random decision about one sample in one epoch, drawn once and handed to all who need it.

A record depends on (seed, epoch, sample id) alone: not on batch size, order, workers, ranks or restarts. The decoder,
the image kernel and the target kernel read the same record, so image and label map cannot drift apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from tl_fast.maths import scalar
from tl_fast.maths.compile import compile_scalar, njit
from tl_fast.plan.augment import INTERPOLATIONS, Augment
from tl_fast.plan.boxes import Sides, both_sides
from tl_fast.plan.rand_augment import MAX_LAYERS, RandAugment

_scalar = compile_scalar(njit)

PLAN = np.dtype(
    [
        ("top", "<i4"),
        ("left", "<i4"),
        ("height", "<i4"),
        ("width", "<i4"),
        ("flip", "?"),
        ("interpolation", "u1"),
        ("affine", "<f4", 6),
        ("ops", "i1", MAX_LAYERS),
        ("arguments", "<f4", MAX_LAYERS),
        ("erase", "<f4", 4),
        ("noise", "<u8"),
    ],
    align=True,
)
"""One record a sample.

top, left, height, width: the crop in pixels of the stored image; flip: whether it is then mirrored left-right;
interpolation: 0 bilinear, 1 bicubic; affine: (xu, xv, x0, yu, yv, y0), crop, flip and the geometric operations in one:
from output coordinates u (along x), v (along y) in 0..1 to source pixels x = xu u + xv v + x0, y = yu u + yv v + y0;
ops: codes of the drawn operations (`tl_fast.plan.rand_augment.OPS`) in their order, -1 for none, and their arguments;
erase: the box to fill with noise (`tl_fast.maths.scalar.erase_box`), height 0 for none; noise: its seed.
"""

ERASE_AREA = 0.02, 1 / 3  # of the output; timm's
ERASE_RATIO = 0.3, 1 / 0.3  # height / width; timm's
_ERASE_LOG_RATIO = math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])
_RANDOM = INTERPOLATIONS.index("random")  # one of the others, which stand before it, for each image
JITTERED = np.array([scalar.BRIGHTNESS, scalar.CONTRAST, scalar.COLOR], np.int8)


def draw(
    seed: int,
    epoch: int,
    sample_ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    augment: Augment,
    aspect: float = 1.0,
) -> np.ndarray:
    """Draw the plans of the samples `sample_ids` [B] with stored sizes `heights`, `widths` [B] in pixels -> PLAN
    records [B].

    `aspect` is the output's width / height, which rotation, shear and the shapes of erased boxes depend on; the crop's
    is drawn from `augment.ratio`, whatever the output's (as in torchvision and timm). `seed` is taken modulo 2**64,
    `epoch` must fit 32 bits. Raises ValueError for negative ids or images without pixels.
    """
    ids, heights, widths = checked_samples(sample_ids, heights, widths)
    plans = np.zeros(ids.shape, PLAN)
    _draw(seed_word(seed), epoch_word(epoch), ids, heights, widths, _settings(augment, aspect), plans)
    return plans


def of_boxes(boxes: np.ndarray, interpolation: int = scalar.BILINEAR) -> np.ndarray:
    """PLAN records [B] that show `boxes` and do nothing else.

    boxes: float [B, 4] = (top, left, height, width) in source pixels.
    """
    boxes = np.asarray(boxes, np.float64)
    plans = np.zeros(len(boxes), PLAN)
    plans["ops"] = scalar.NO_OP
    plans["interpolation"] = interpolation
    for name, column, whole in zip(
        ("top", "left", "height", "width"), boxes.T, (np.floor, np.floor, np.ceil, np.ceil), strict=True
    ):
        plans[name] = whole(column)
    plans["affine"][:, 0], plans["affine"][:, 2] = boxes[:, 3], boxes[:, 1]
    plans["affine"][:, 4], plans["affine"][:, 5] = boxes[:, 2], boxes[:, 0]
    return plans


def erase_boxes(plans: np.ndarray, image_size: Sides) -> np.ndarray:
    """Where to erase in outputs of `image_size` pixels: int32 [B, 4] = (top, left, height, width).

    Height 0: nowhere.
    """
    boxes = np.empty((len(plans), 4), np.int32)
    _erase_boxes(plans["erase"], *both_sides(image_size), boxes)
    return boxes


def mix_box(seed: int, epoch: int, step: int, grid: Sides) -> np.ndarray:
    """MixToken's box of one step -> int32 [4] = (top, left, bottom, right) in tokens, the same on every rank.

    The published draw (CutMix's): lambda ~ Beta(1, 1), sides sqrt(1 - lambda) of the grid, centre uniform, clipped to
    the grid. The box may be empty.
    """
    rows, columns = both_sides(grid)
    words = _scalar.draw4(seed_word(seed), epoch_word(epoch), np.uint64(step), _scalar.DRAW_MIX_BOX)
    side = math.sqrt(1.0 - _scalar.unit(words[0]))
    box = np.empty(4, np.int32)
    for axis, (cells, word) in enumerate(((rows, words[1]), (columns, words[2]))):
        cut = int(cells * side)
        centre = _scalar.below(np.uint64(word), cells)
        box[axis] = min(max(centre - cut // 2, 0), cells)
        box[axis + 2] = min(max(centre + cut // 2, 0), cells)
    return box


def checked_samples(sample_ids, heights, widths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and sizes in pixels as int64 [B], checked."""
    ids = np.ascontiguousarray(sample_ids, dtype=np.int64)
    heights = np.ascontiguousarray(heights, dtype=np.int64)
    widths = np.ascontiguousarray(widths, dtype=np.int64)
    if not ids.shape == heights.shape == widths.shape or ids.ndim != 1:
        raise ValueError(
            f"sample_ids, heights and widths must be [B], got {ids.shape}, {heights.shape}, {widths.shape}"
        )
    if ids.size and (ids.min() < 0 or heights.min() < 1 or widths.min() < 1):
        raise ValueError("sample ids must be >= 0 and image sizes >= 1 pixel")
    return ids, heights, widths


def seed_word(seed: int) -> np.uint64:
    return np.uint64(seed & 0xFFFFFFFFFFFFFFFF)


def epoch_word(epoch: int) -> np.uint64:
    if not 0 <= epoch < 1 << 32:
        raise ValueError(f"epoch must be in [0, 2**32), got {epoch}")
    return np.uint64(epoch)


class _Settings(NamedTuple):
    """What compiled code needs of an `Augment`, its `RandAugment` and the output's shape."""

    smallest: float  # share of the image's area
    largest: float
    log_narrowest: float  # of width / height
    log_widest: float
    flip: float
    interpolation: int  # an index of INTERPOLATIONS
    layers: int
    probability: float  # of each layer
    magnitude: float
    std: float
    ceiling: float
    increasing: bool
    jitter: float
    erase: float
    erase_log_flattest: float  # of height / width, in shares of the output's sides
    erase_log_tallest: float
    aspect: float  # of the output, width / height


def _settings(augment: Augment, aspect: float) -> _Settings:
    policy = augment.rand_augment or RandAugment(probability=0.0)
    return _Settings(
        smallest=float(augment.scale[0]),
        largest=float(augment.scale[1]),
        log_narrowest=math.log(augment.ratio[0]),
        log_widest=math.log(augment.ratio[1]),
        flip=float(augment.flip),
        interpolation=INTERPOLATIONS.index(augment.interpolation),
        layers=policy.layers if augment.auto_augment else 0,
        probability=float(policy.probability),
        magnitude=float(policy.magnitude),
        std=float(policy.std),
        ceiling=float(policy.ceiling),
        increasing=policy.increasing,
        jitter=float(augment.color_jitter),
        erase=float(augment.erase),
        erase_log_flattest=_ERASE_LOG_RATIO[0] + math.log(aspect),
        erase_log_tallest=_ERASE_LOG_RATIO[1] + math.log(aspect),
        aspect=float(aspect),
    )


@njit
def _draw(seed, epoch, ids, heights, widths, settings, plans):
    for b in range(ids.size):
        sample, record = np.uint64(ids[b]), plans[b]
        _draw_crop(seed, epoch, sample, heights[b], widths[b], settings, record)
        _draw_operations(seed, epoch, sample, settings, record)
        if settings.jitter > 0.0:
            _draw_jitter(seed, epoch, sample, settings.jitter, record)
        flattest, tallest = settings.erase_log_flattest, settings.erase_log_tallest
        box = _erase_fractions(seed, epoch, sample, settings.erase, ERASE_AREA[0], ERASE_AREA[1], flattest, tallest)
        for n in range(4):
            record.erase[n] = box[n]
        words = _draw4(seed, epoch, sample, _DRAW_NOISE)
        record.noise = words[0] << np.uint64(32) | words[1]


@njit
def _draw_crop(seed, epoch, sample, height, width, settings, record):
    """The crop, whether it is mirrored, and its interpolation."""
    record.top, record.left, record.height, record.width = _random_resized_crop(
        seed,
        epoch,
        sample,
        height,
        width,
        settings.smallest,
        settings.largest,
        settings.log_narrowest,
        settings.log_widest,
    )
    record.flip = _unit(_draw4(seed, epoch, sample, _DRAW_FLIP)[0]) < settings.flip
    interpolation = settings.interpolation
    if interpolation == _RANDOM:
        interpolation = _below(_draw4(seed, epoch, sample, _DRAW_INTERPOLATION)[0], 2)
    record.interpolation = np.uint8(interpolation)


@njit
def _draw_operations(seed, epoch, sample, settings, record):
    """RandAugment's operations, and the affine of crop, flip and those that move pixels."""
    for n in range(record.ops.size):
        record.ops[n] = _NO_OP
    # In shares of the crop's sides first.
    xu, xv, x0, yu, yv, y0 = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if record.flip:
        xu, x0 = -1.0, 1.0
    for n in range(settings.layers):
        op, argument = _rand_augment_layer(
            seed,
            epoch,
            sample,
            n,
            settings.probability,
            settings.magnitude,
            settings.std,
            settings.ceiling,
            settings.increasing,
        )
        record.ops[n] = op
        record.arguments[n] = argument
        xu, xv, x0, yu, yv, y0 = _compose(xu, xv, x0, yu, yv, y0, op, argument, settings.aspect)
    left, top, width, height = float(record.left), float(record.top), float(record.width), float(record.height)
    record.affine[0], record.affine[1], record.affine[2] = xu * width, xv * width, x0 * width + left
    record.affine[3], record.affine[4], record.affine[5] = yu * height, yv * height, y0 * height + top


@njit
def _draw_jitter(seed, epoch, sample, jitter, record):
    """torchvision's ColorJitter: each factor uniform, in one of the six orders."""
    r0, r1, r2, r3 = _draw4(seed, epoch, sample, _DRAW_JITTER)
    factors = (_unit(r0), _unit(r1), _unit(r2))
    order = _below(r3, 6)
    first, second = order // 2, 1 + order % 2
    second = (first + second) % 3
    third = 3 - first - second
    for n, operation in enumerate((first, second, third)):
        record.ops[n] = _JITTERED[operation]
        record.arguments[n] = 1.0 - jitter + 2.0 * jitter * factors[operation]


@njit
def _erase_boxes(shares, rows, columns, boxes):
    for b in range(len(boxes)):
        top, height = _erase_box(shares[b, 2], shares[b, 0], rows)
        left, width = _erase_box(shares[b, 3], shares[b, 1], columns)
        boxes[b, 0], boxes[b, 1], boxes[b, 2], boxes[b, 3] = top, left, height, width


_random_resized_crop, _draw4, _unit, _below = _scalar.random_resized_crop, _scalar.draw4, _scalar.unit, _scalar.below
_rand_augment_layer, _compose = _scalar.rand_augment_layer, _scalar.compose
_erase_fractions, _erase_box = _scalar.erase_fractions, _scalar.erase_box
_DRAW_FLIP, _DRAW_INTERPOLATION = _scalar.DRAW_FLIP, _scalar.DRAW_INTERPOLATION
_DRAW_NOISE, _DRAW_JITTER, _NO_OP, _JITTERED = _scalar.DRAW_NOISE, _scalar.DRAW_JITTER, _scalar.NO_OP, JITTERED
