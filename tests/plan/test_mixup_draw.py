"""The draw of mixup and CutMix: distributed as timm's, and a function of (seed, epoch, step)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm.data.mixup

from tl_fast.plan.mixup import Mixup, draw_mix

DRAWS = 3000
SIZES = pytest.mark.parametrize("size", [(64, 64), (48, 120)], ids=str)
RANGES = [
    Mixup(0.8, 0.0),
    Mixup(0.2, 0.0, probability=0.7),
    Mixup(0.0, 1.0),
    Mixup(0.0, 0.3, probability=0.4),
    Mixup(0.8, 1.0, probability=0.9, switch_probability=0.3),
]


def ours(ranges: Mixup, size: tuple[int, int] = (64, 64), seed: int = 0, epoch: int = 0) -> np.ndarray:
    return np.array([draw_mix(seed, epoch, step, size, ranges) for step in range(DRAWS)])


def share_of_area(draws: np.ndarray, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """The flipped batch's part in the targets."""
    return draws[:, 4] * (draws[:, 2] - draws[:, 0]) * (draws[:, 3] - draws[:, 1]) / math.prod(size)


def theirs(ranges: Mixup, size: tuple[int, int] = (64, 64)) -> tuple[np.ndarray, np.ndarray]:
    """timm's draws, from numpy's global generator: whether CutMix mixes, and the flipped batch's part."""
    mixup = timm.data.mixup.Mixup(
        ranges.mixup, ranges.cutmix, prob=ranges.probability, switch_prob=ranges.switch_probability
    )
    state = np.random.get_state()
    np.random.seed(1)
    cutmixes, shares = [], []
    for _ in range(DRAWS):
        lam, cutmix = mixup._params_per_batch()
        if cutmix:
            _, lam = timm.data.mixup.cutmix_bbox_and_lam((3, *size), lam)
        cutmixes.append(cutmix), shares.append(1 - lam)
    np.random.set_state(state)
    return np.array(cutmixes), np.array(shares)


def is_cutmix(draws: np.ndarray, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Whether the box is not the whole image, which a lambda above 0 never makes it."""
    return (draws[:, :4] != (0, 0, *size)).any(1)


@SIZES
@pytest.mark.parametrize("ranges", RANGES)
def test_draws_are_distributed_as_timms(ranges, size):
    draws, (cutmixes, shares) = ours(ranges, size), theirs(ranges, size)
    drawn, is_cut = share_of_area(draws, size), is_cutmix(draws, size)
    assert abs(is_cut.mean() - cutmixes.mean()) < 0.05
    assert abs((drawn == 0).mean() - (shares == 0).mean()) < 0.05
    for cutmix in (False, True):
        mine, timms = drawn[is_cut == cutmix], shares[cutmixes == cutmix]
        assert len(mine) == 0 or stats.ks_2samp(mine, timms).pvalue > 1e-3
    assert abs(drawn.mean() - shares.mean()) < 0.02


def test_the_comparison_would_notice_another_alpha():
    draws, (_, shares) = ours(Mixup(1.2, 0.0)), theirs(Mixup(0.8, 0.0))
    assert stats.ks_2samp(share_of_area(draws), shares).pvalue < 1e-3


@SIZES
@pytest.mark.parametrize("ranges", RANGES)
def test_boxes_lie_in_the_image_and_shares_in_the_unit_interval(ranges, size):
    draws = ours(ranges, size)
    assert draws.dtype == np.float32 and draws.shape == (DRAWS, 5)
    top, left, bottom, right, share = draws.T
    assert ((top >= 0) & (left >= 0) & (top <= bottom) & (left <= right)).all()
    assert bottom.max() == size[0] and right.max() == size[1]
    assert ((share >= 0) & (share <= 1)).all() and (draws[:, :4] == draws[:, :4].round()).all()
    assert (share[is_cutmix(draws, size)] == 1).all(), "CutMix replaces pixels"


def test_a_draw_depends_on_seed_epoch_and_step_alone():
    both = RANGES[-1]
    first = ours(both)
    np.random.seed(5)
    assert (ours(both) == first).all()
    for other in (ours(both, seed=1), ours(both, epoch=1), np.roll(first, 1, axis=0)):
        assert (other == first).all(1).mean() < 0.1


def test_batches_are_mixed_by_chance():
    assert not share_of_area(ours(Mixup(0.8, 1.0, probability=0.0))).any()
    assert is_cutmix(ours(Mixup(0.8, 1.0, switch_probability=1.0))).all()
    assert not is_cutmix(ours(Mixup(0.8, 1.0, switch_probability=0.0))).any()
