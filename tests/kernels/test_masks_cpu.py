"""Masks through a plan's affine: against positions computed the long way, numpy and Pillow."""

import numpy as np
import pytest
from PIL import Image

from tl_fast.kernels import cpu
from tl_fast.maths import scalar
from tl_fast.plan import SegmentAugment
from tl_fast.plan import records as plan
from tl_fast.plan.segment_records import draw_segment

IGNORE, FILL = 255, np.array([1, 2, 3], np.uint8)


def show(mask: np.ndarray, record: np.void, shape: tuple[int, int], ignore_index: int = IGNORE) -> np.ndarray:
    out, image = np.full(shape, 99, np.uint8), np.full((3, *shape), 9, np.uint8)
    cpu.show_mask(mask, record, ignore_index, out, image, FILL)
    padded = (image == FILL[:, None, None]).all(axis=0)
    assert ((image == 9).all(axis=0) == ~padded).all() and (padded == (out == ignore_index)).all()
    return out


def slow(mask: np.ndarray, affine: np.ndarray, shape: tuple[int, int], ignore_index: int = IGNORE):
    """The same in numpy's float64, and where a position is so near a pixel's edge that float32 may decide otherwise."""
    i, j = np.indices(shape) + 0.5
    u, v = j / shape[1], i / shape[0]
    xu, xv, x0, yu, yv, y0 = affine.astype(float)
    x, y = xu * u + xv * v + x0, yu * u + yv * v + y0
    column, row = np.floor(x).astype(int), np.floor(y).astype(int)
    inside = (row >= 0) & (row < mask.shape[0]) & (column >= 0) & (column < mask.shape[1])
    out = np.full(shape, ignore_index, np.uint8)
    out[inside] = mask[row[inside], column[inside]]
    return out, (np.abs(x - x.round()) < 1e-3) | (np.abs(y - y.round()) < 1e-3)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 150, (height, width), np.uint8)


@pytest.mark.parametrize("crop", [(64, 96), (33, 50), (300, 280)])
def test_segmentation_plans_show_the_pixels_under_their_centres(crop):
    mask = noise(150, 201)
    ids = np.arange(60)
    augment = SegmentAugment(scale=(0.3, 2.2))
    plans = draw_segment(1, 0, ids, np.full(60, 150), np.full(60, 201), augment, crop)
    assert 0 < plans["flip"].sum() < 60
    unlabelled = ties = 0
    for record in plans:
        expected, tie = slow(mask, record["affine"], crop, 200)
        assert (show(mask, record, crop, 200) == expected)[~tie].all()
        unlabelled, ties = unlabelled + (expected == 200).sum(), ties + tie.mean() / 60
    assert ties < 0.05 and (unlabelled > 1000) == (crop[0] > 33)


@pytest.mark.parametrize("operations", [[("ROTATE", 20)], [("SHEAR_X", 0.2), ("ROTATE", -70), ("TRANSLATE_Y", 0.3)]])
@pytest.mark.parametrize("flip", [False, True])
def test_rotated_and_sheared_masks_too(operations, flip):
    mask, shape = noise(90, 120), (60, 70)
    (record,) = plan.of_boxes(np.array([[5.0, 10.0, 80.0, 100.0]]))
    affine = (-1.0, 0.0, 1.0, 0.0, 1.0, 0.0) if flip else (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    for name, argument in operations:
        affine = scalar.compose(*affine, getattr(scalar, name), argument, 70 / 60)
    record["affine"] = np.array(affine) * [100, 100, 100, 80, 80, 80] + [0, 0, 10, 0, 0, 5]
    expected, tie = slow(mask, record["affine"], shape)
    assert (show(mask, record, shape) == expected)[~tie].all() and tie.mean() < 0.01
    assert (expected == IGNORE).any() and (expected != IGNORE).mean() > 0.3


def test_both_loops_agree_where_rotation_vanishes():
    mask = noise(40, 50)
    for record in draw_segment(2, 0, np.arange(20), np.full(20, 40), np.full(20, 50), SegmentAugment(), (48, 64)):
        straight = show(mask, record, (48, 64))
        record["affine"][1] = 1e-30
        assert (show(mask, record, (48, 64)) == straight).all()


@pytest.mark.parametrize("shape", [(37, 53), (80, 120), (7, 200)])
def test_whole_masks_are_resized_as_by_pillow(shape):
    """A mask at its own size is itself; at another one it is Pillow's nearest resize."""
    mask = noise(37, 53)
    (record,) = plan.of_boxes(np.array([[0.0, 0.0, 37.0, 53.0]]))
    theirs = np.asarray(Image.fromarray(mask).resize(shape[::-1], Image.Resampling.NEAREST))
    _, tie = slow(mask, record["affine"], shape)
    ours = show(mask, record, shape)
    assert (ours == theirs)[~tie].all() and tie.mean() < 0.05
    if shape == mask.shape:
        assert (ours == mask).all()


def test_masks_that_do_not_fit_are_refused():
    (record,) = plan.of_boxes(np.array([[0.0, 0.0, 4.0, 4.0]]))
    mask, image = np.zeros((4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8)
    with pytest.raises(ValueError, match=r"mask must be uint8 \[height, width\], got int64"):
        cpu.show_mask(mask.astype(int), record, IGNORE, mask, image, FILL)
    with pytest.raises(ValueError, match="out must be uint8"):
        cpu.show_mask(mask, record, IGNORE, mask[None], image, FILL)
    with pytest.raises(ValueError, match=r"image must be uint8 \(3, 4, 4\), got uint8 \(3, 4, 3\)"):
        cpu.show_mask(mask, record, IGNORE, mask, image[:, :, :3], FILL)
