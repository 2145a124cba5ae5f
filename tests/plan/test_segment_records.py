"""The plan of segmentation: mmsegmentation's distributions, the rule about a class's share, one record per sample."""

import itertools

import numpy as np
import pytest
from scipy import stats

from tests import reference
from tl_fast.maths import scalar
from tl_fast.plan import SegmentAugment
from tl_fast.plan.segment_records import draw_segment

IGNORE = 255


def blocks(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A mask uint8 [height, width] with a class of 80 % and five smaller ones, unlabelled at the right."""
    random = np.random.default_rng(seed)
    cells = random.choice(6, (-(-height // 8), -(-width // 8)), p=[0.8] + [0.04] * 5)
    mask = np.kron(cells, np.ones((8, 8))).astype(np.uint8)[:height, :width]
    mask[:, width * 7 // 8 :] = IGNORE
    return mask


def draw(mask, ids, crop, augment=SegmentAugment(), seed=3, epoch=5, ruled=True):
    ids = np.asarray(ids)
    sizes = np.full(ids.shape, mask.shape[0]), np.full(ids.shape, mask.shape[1])
    return draw_segment(seed, epoch, ids, *sizes, augment, crop, [mask] * len(ids) if ruled else None, IGNORE)


def scaled_boxes(plans: np.ndarray, shape: tuple[int, int], crop: tuple[int, int]) -> np.ndarray:
    """The scaled image's size and the crop's corner in it: float64 [B, 4] = (rows, columns, top, left)."""
    affine = plans["affine"].astype(float)
    across, down = np.abs(affine[:, 0]) / crop[1], affine[:, 4] / crop[0]
    rows, columns = shape[0] / down, shape[1] / across
    shown = np.minimum(columns, crop[1])
    left = np.where(plans["flip"], affine[:, 2] / across - shown, affine[:, 2] / across)
    return np.stack([rows, columns, affine[:, 5] / down, left], axis=1)


CASES = [((60, 80), (24, 24), None), ((90, 40), (48, 64), (100, 60)), ((40, 40), (200, 100), None)]


@pytest.mark.parametrize("shape, crop, base_size", CASES)
def test_crops_are_distributed_as_mmsegmentations(shape, crop, base_size):
    mask, n, random = blocks(*shape), 3000, np.random.default_rng(1)
    scale = SegmentAugment().scale
    theirs = np.array([reference.segment_crop(random, mask, scale, base_size, crop) for _ in range(n)])
    plans = draw(mask, np.arange(n), crop, SegmentAugment(base_size=base_size))
    boxes = scaled_boxes(plans, shape, crop)
    assert np.abs(boxes - boxes.round()).max() < 0.01
    boxes = boxes.round()
    for column, name in enumerate(("rows", "columns", "top", "left")):
        result = stats.ks_2samp(theirs[:, column], boxes[:, column])
        assert result.pvalue > 1e-3, (name, result)
    assert stats.binomtest(int(plans["flip"].sum()), n, 0.5).pvalue > 1e-3
    assert (plans["interpolation"] == scalar.BILINEAR).all() and not plans["erase"].any()


def test_the_comparison_would_notice_that_the_rule_is_missing():
    mask, random = blocks(60, 80), np.random.default_rng(1)
    scale, crop = SegmentAugment().scale, (24, 24)
    theirs = np.array([reference.segment_crop(random, mask, scale, None, crop) for _ in range(3000)])
    ours = scaled_boxes(draw(mask, np.arange(3000), crop, ruled=False), mask.shape, crop)
    assert min(stats.ks_2samp(theirs[:, column], ours[:, column].round()).pvalue for column in (2, 3)) < 1e-6


def largest_share(mask, top, left, down, across, rows, columns) -> float:
    """Of the pixels whose centres are in the box, given in scaled pixels; 1 where none is labelled."""
    y, x = (np.arange(size) + 0.5 for size in mask.shape)
    inside_y = (y >= top * down) & (y < (top + rows) * down)
    inside_x = (x >= left * across) & (x < (left + columns) * across)
    classes, counts = np.unique(mask[inside_y][:, inside_x], return_counts=True)
    counts = counts[classes != IGNORE]
    return counts.max() / counts.sum() if counts.size else 1.0


@pytest.mark.parametrize("mask", [blocks(60, 80), np.zeros((60, 80), np.uint8), np.full((60, 80), IGNORE, np.uint8)])
def test_the_first_crop_without_a_dominant_class_is_taken(mask):
    """Every draw again by the slow Philox; where ten crops fail, the eleventh is taken as it is."""
    crop, seed, epoch, taken = (20, 28), 3, 5, []
    for sample, plan in enumerate(draw(mask, np.arange(300), crop)):
        unit = (reference.philox4x32_10((sample, 0, epoch, 128), (seed, 0))[0] + 0.5) / 2**32
        rows, columns = (int(size * (0.5 + 1.5 * unit) + 0.5) for size in mask.shape)
        down, across = mask.shape[0] / rows, mask.shape[1] / columns
        for attempt in itertools.count():
            words = reference.philox4x32_10((sample, 0, epoch, 256 + attempt), (seed, 0))
            top, left = (
                word * (size - side + 1) >> 32 for word, size, side in zip(words, (rows, columns), crop, strict=False)
            )
            if attempt == 10 or largest_share(mask, top, left, down, across, *crop) < 0.75:
                break
        taken.append(attempt)
        edge = left + crop[1] if plan["flip"] else left
        expected = [across * crop[1] * (-1 if plan["flip"] else 1), 0, edge * across, 0, down * crop[0], top * down]
        np.testing.assert_allclose(plan["affine"], expected, rtol=1e-6)
        box = [top * down, left * across, (top + crop[0]) * down, (left + crop[1]) * across]
        bottom_right = plan["top"] + plan["height"], plan["left"] + plan["width"]
        assert np.abs(np.array([plan["top"], plan["left"], *bottom_right]) - box).max() < 1
        assert plan["top"] >= 0 and plan["left"] >= 0 and (np.array(bottom_right) <= mask.shape).all()
    assert set(taken) == set(range(11)) if len(np.unique(mask)) > 1 else set(taken) == {10}


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_an_image_smaller_than_the_crop_lies_at_the_top_left(flip):
    """Its pixels come first and what is beyond it on the right and below, also where it is mirrored."""
    mask = blocks(30, 50)
    for plan in draw(mask, np.arange(50), (100, 120), SegmentAugment(flip=flip)):
        xu, _, x0, _, yv, y0 = plan["affine"].astype(float)
        assert y0 == 0 and yv > 30 and abs(xu) > 50 and plan["flip"] == flip
        assert x0 == (50 if flip else 0) and (xu < 0) == flip
        assert [plan[name] for name in ("top", "left", "height", "width")] == [0, 0, 30, 50]


def test_a_record_depends_on_its_sample_alone():
    masks = [blocks(30 + 7 * i, 90 - 5 * i, i) for i in range(12)]
    heights, widths = np.array([mask.shape for mask in masks]).T
    ids = np.arange(12) * 5

    def drawn(order, seed=3, epoch=5):
        chosen = [masks[i] for i in order]
        return draw_segment(
            seed, epoch, ids[order], heights[order], widths[order], SegmentAugment(), 32, chosen, IGNORE
        )

    together, shuffled = drawn(np.arange(12)), np.random.default_rng(0).permutation(12)
    assert (drawn(shuffled) == together[shuffled]).all()
    assert all((drawn(np.array([i])) == together[i]).all() for i in range(12))
    assert (drawn(np.arange(12), epoch=6) != together).all() and (drawn(np.arange(12), seed=4) != together).all()


def test_colours_are_distorted_as_mmsegmentations():
    n, random = 5000, np.random.default_rng(2)
    codes = {"brightness": scalar.ADD, "contrast": scalar.BRIGHTNESS, "saturation": scalar.SATURATE, "hue": scalar.HUE}
    theirs = [
        [
            (codes[name], 2 * value if name == "hue" else value)
            for name, value in reference.photometric_distortion(random)
        ]
        for _ in range(n)
    ]
    plans = draw(blocks(30, 50), np.arange(n), (32, 32), ruled=False)
    ours = [
        [(op, argument) for op, argument in zip(plan["ops"], plan["arguments"], strict=True) if op != scalar.NO_OP]
        for plan in plans
    ]
    orders = sorted({tuple(op for op, _ in operations) for operations in theirs + ours})
    counts = np.zeros((2, len(orders)))
    for side, drawn in enumerate((theirs, ours)):
        for operations in drawn:
            counts[side, orders.index(tuple(op for op, _ in operations))] += 1
    assert len(orders) == 22 and stats.chi2_contingency(counts).pvalue > 1e-3
    for code in codes.values():
        values = [
            [argument for operations in side for op, argument in operations if op == code] for side in (theirs, ours)
        ]
        assert stats.ks_2samp(*values).pvalue > 1e-3, code
    assert (draw(blocks(30, 50), [0, 1], 32, SegmentAugment(distort=False))["ops"] == scalar.NO_OP).all()


@pytest.mark.parametrize(
    "field, value",
    [
        ("scale", (0.0, 1.0)),
        ("scale", (2.0, 1.0)),
        ("base_size", (512, 2048)),
        ("base_size", (512, 0)),
        ("max_class_share", 1.1),
        ("crop_tries", 0),
        ("flip", -0.1),
        ("fill", (0, 0, 256)),
    ],
)
def test_bad_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"augment.{field}"):
        SegmentAugment(**{field: value})


def test_a_mask_of_another_size_than_its_image_is_refused():
    with pytest.raises(ValueError, match=r"sample 7: mask \(30, 50\), image 30 x 51 pixels"):
        draw_segment(0, 0, [7], [30], [51], SegmentAugment(), 32, [blocks(30, 50)], IGNORE)
