"""The plan for semantic segmentation: records as `records` has them, drawn as mmsegmentation's training draws.

A record depends on (seed, epoch, sample id) alone, and, where a crop is drawn again because one class covers too much
of it, on the sample's mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tl_fast.maths.compile import compile_scalar, njit
from tl_fast.maths.memory import address, leading_zeros, load_big
from tl_fast.plan.boxes import Sides, both_sides
from tl_fast.plan.records import PLAN, checked_samples, epoch_word, seed_word
from tl_fast.plan.segment import SegmentAugment

_scalar = compile_scalar(njit)

ADDEND = 32.0  # levels, and FACTOR, HUE_STEPS: how far mmsegmentation's PhotoMetricDistortion goes
FACTOR = 0.5, 1.5  # of contrast and saturation
HUE_STEPS = 18  # of 2 degrees
_NO_MASK = np.zeros((0, 0), np.uint8)
_EIGHT_TIMES = np.uint64(0x0101010101010101)  # a byte times this: eight of it


def draw_segment(
    seed: int,
    epoch: int,
    sample_ids: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    augment: SegmentAugment,
    crop_size: Sides,
    masks: Sequence[np.ndarray] | None = None,
    ignore_index: int = 255,
) -> np.ndarray:
    """Draw the plans of the samples `sample_ids` [B] with stored sizes `heights`, `widths` [B] in pixels for
    segmentation -> PLAN records [B].

    crop_size: of the output in pixels. Where the scaled image is smaller, the output reaches beyond the image on its
    right and at its bottom, mirrored or not.
    masks: of the samples, uint8 [height, width] each. Crops that one class covers too much of are drawn again
    (`SegmentAugment.max_class_share`). Counted are the mask's pixels whose centres the crop shows; `ignore_index` is no
    class. None: the first crop is taken.

    `seed` and `epoch` as in `draw`. Raises ValueError for negative ids, images without pixels and masks of another
    size than their image's.
    """
    ids, heights, widths = checked_samples(sample_ids, heights, widths)
    ruled = masks is not None and augment.max_class_share < 1
    settings = _segment_settings(augment, both_sides(crop_size), ignore_index)
    plans = np.zeros(ids.shape, PLAN)
    for b in range(ids.size):
        mask = np.ascontiguousarray(masks[b], np.uint8) if ruled else _NO_MASK
        if ruled and mask.shape != (heights[b], widths[b]):
            raise ValueError(f"sample {ids[b]}: mask {mask.shape}, image {heights[b]} x {widths[b]} pixels")
        sample = np.uint64(ids[b])
        _draw_segment(
            seed_word(seed), epoch_word(epoch), sample, heights[b], widths[b], settings, mask, plans[b : b + 1]
        )
    return plans


class _SegmentSettings(NamedTuple):
    """What compiled code needs of a `SegmentAugment` and of the mask."""

    smallest: float  # factor of the sides
    largest: float
    long: float  # pixels that the longer side is fitted into; infinite for the stored size
    short: float
    rows: int  # of the output
    columns: int
    max_class_share: float
    tries: int
    ignore_index: int
    flip: float
    distort: bool


def _segment_settings(augment: SegmentAugment, crop_size: tuple[int, int], ignore_index: int) -> _SegmentSettings:
    long, short = augment.base_size or (math.inf, math.inf)
    return _SegmentSettings(
        smallest=float(augment.scale[0]),
        largest=float(augment.scale[1]),
        long=float(long),
        short=float(short),
        rows=int(crop_size[0]),
        columns=int(crop_size[1]),
        max_class_share=float(augment.max_class_share),
        tries=int(augment.crop_tries),
        ignore_index=int(ignore_index),
        flip=float(augment.flip),
        distort=bool(augment.distort),
    )


@njit
def _draw_segment(seed, epoch, sample, height, width, settings, mask, plans):
    """One sample's plan for segmentation, into `plans` [1]. mask: uint8 [height, width], or empty: any crop will do."""
    record = plans[0]
    factor = settings.smallest
    factor += (settings.largest - settings.smallest) * _unit(_draw4(seed, epoch, sample, _DRAW_SCALE)[0])
    if not math.isinf(settings.long):
        factor *= min(settings.long / max(height, width), settings.short / min(height, width))
    rows = max(np.int64(math.floor(height * factor + 0.5)), 1)
    columns = max(np.int64(math.floor(width * factor + 0.5)), 1)
    shown_rows, shown_columns = min(rows, settings.rows), min(columns, settings.columns)
    # Source pixels a pixel of the scaled image.
    down, across = height / rows, width / columns
    top, left = 0, 0
    for attempt in range(settings.tries + 1):
        r0, r1, _, _ = _draw4(seed, epoch, sample, _DRAW_SEGMENT_CROP + np.uint64(attempt))
        top, left = _below(r0, rows - shown_rows + 1), _below(r1, columns - shown_columns + 1)
        if mask.size == 0 or attempt == settings.tries:
            break
        # The mask's pixels whose centres are inside.
        first_row, end_row = _first_centre(top * down), _first_centre((top + shown_rows) * down)
        first_column, end_column = _first_centre(left * across), _first_centre((left + shown_columns) * across)
        shown = mask[first_row:end_row, first_column:end_column]
        if _largest_share(shown, settings.ignore_index) < settings.max_class_share:
            break
    record.top, record.left = np.int32(top * down), np.int32(left * across)
    record.height = min(np.int64(math.ceil((top + shown_rows) * down)), height) - record.top
    record.width = min(np.int64(math.ceil((left + shown_columns) * across)), width) - record.left
    record.flip = _unit(_draw4(seed, epoch, sample, _DRAW_FLIP)[0]) < settings.flip
    if record.flip:
        record.affine[0], record.affine[2] = -settings.columns * across, (left + shown_columns) * across
    else:
        record.affine[0], record.affine[2] = settings.columns * across, left * across
    record.affine[4], record.affine[5] = settings.rows * down, top * down
    for n in range(record.ops.size):
        record.ops[n] = _NO_OP
    if settings.distort:
        _draw_distortion(seed, epoch, sample, record)


@njit
def _first_centre(edge):
    """The first pixel whose centre is not before `edge`, in pixels."""
    return np.int64(math.ceil(edge - 0.5))


@njit
def _largest_share(mask, ignore_index):
    """The largest class's share of the labelled pixels of mask uint8 [h, w], 0..1; 1 where none is labelled."""
    counts = np.zeros(256, np.int64)
    three, eight, last = np.uint64(3), np.uint64(8), mask.shape[1] - 8
    for y in range(mask.shape[0]):
        row = mask[y]
        base, x = address(row), np.uint64(0)
        # A mask's rows are long runs: eight pixels are compared at once.
        while x < row.size:
            start, value = x, row[x]
            run = np.uint64(value) * _EIGHT_TIMES
            while np.int64(x) <= last and load_big(base, x) == run:
                x += eight
            if np.int64(x) <= last:
                x += leading_zeros(load_big(base, x) ^ run) >> three
            else:
                while x < row.size and row[x] == value:
                    x += np.uint64(1)
            counts[value] += np.int64(x - start)
    counts[ignore_index] = 0
    labelled = counts.sum()
    return counts.max() / labelled if labelled else 1.0


@njit
def _draw_distortion(seed, epoch, sample, record):
    """mmsegmentation's PhotoMetricDistortion: four operations, each in half of the images; contrast comes second or
    last."""
    chosen = _draw4(seed, epoch, sample, _DRAW_DISTORT)
    values = _draw4(seed, epoch, sample, _DRAW_DISTORT + np.uint64(1))
    contrast_last = _below(_draw4(seed, epoch, sample, _DRAW_DISTORT + np.uint64(2))[0], 2)
    addend = ADDEND * (2.0 * _unit(values[0]) - 1.0)
    contrast = FACTOR[0] + (FACTOR[1] - FACTOR[0]) * _unit(values[1])
    saturation = FACTOR[0] + (FACTOR[1] - FACTOR[0]) * _unit(values[2])
    degrees = 2.0 * (_below(values[3], 2 * HUE_STEPS) - HUE_STEPS)
    n = _add(record, 0, _ADD, addend, chosen[0])
    if not contrast_last:
        n = _add(record, n, _BRIGHTNESS, contrast, chosen[1])
    n = _add(record, n, _SATURATE, saturation, chosen[2])
    n = _add(record, n, _HUE, degrees, chosen[3])
    if contrast_last:
        _add(record, n, _BRIGHTNESS, contrast, chosen[1])


@njit
def _add(record, n, op, argument, word):
    """Make `op` the record's operation n if the random word says so -> number of the next operation."""
    if not _below(word, 2):
        return n
    record.ops[n], record.arguments[n] = op, argument
    return n + 1


_draw4, _unit, _below = _scalar.draw4, _scalar.unit, _scalar.below
_DRAW_SCALE, _DRAW_SEGMENT_CROP, _DRAW_FLIP = _scalar.DRAW_SCALE, _scalar.DRAW_SEGMENT_CROP, _scalar.DRAW_FLIP
_DRAW_DISTORT, _NO_OP = _scalar.DRAW_DISTORT, _scalar.NO_OP
_ADD, _BRIGHTNESS, _SATURATE, _HUE = _scalar.ADD, _scalar.BRIGHTNESS, _scalar.SATURATE, _scalar.HUE
