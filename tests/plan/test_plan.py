"""The plan: known answers, independence of everything but (seed, epoch, sample), and torchvision's distribution."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from torchvision.transforms import RandomResizedCrop

from tests import reference
from tl_fast.maths import scalar
from tl_fast.plan import records as plan

# Random123's kat_vectors for philox4x32 with 10 rounds.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, answer", KNOWN_ANSWERS)
@pytest.mark.parametrize("philox", [scalar.philox4x32, plan._scalar.philox4x32], ids=["python", "njit"])
def test_philox_known_answers(philox, counter, key, answer):
    words = philox(*(np.uint64(c) for c in counter), *(np.uint64(k) for k in key))
    assert tuple(int(w) for w in words) == answer
    assert reference.philox4x32_10(counter, key) == answer


def _draw(ids, seed=3, epoch=5, height=375, width=500, augment=plan.Augment()):
    ids = np.asarray(ids)
    return plan.draw(seed, epoch, ids, np.full(ids.shape, height), np.full(ids.shape, width), augment)


def test_a_plan_depends_on_its_sample_alone():
    together = _draw(np.arange(1000))
    shuffled = np.random.default_rng(0).permutation(1000)
    assert (_draw(shuffled) == together[shuffled]).all()
    assert all((_draw(part) == together[part]).all() for part in np.array_split(np.arange(1000), 7))
    big = np.array([2**31, 2**40 + 7])
    assert (_draw(big)[1] == _draw(big[1:])[0]).all()


def test_plans_differ_across_epochs_samples_and_seeds():
    ids = np.arange(2000)
    base = _draw(ids)
    for other in (_draw(ids, epoch=6), _draw(ids, seed=4), _draw(ids, seed=3 + 2**32), _draw(ids + 1)):
        assert (base == other).mean() < 0.01
    assert len(np.unique(base)) > 1950


def test_the_same_plan_in_python_and_compiled():
    plans = _draw(np.arange(50))
    for i, record in enumerate(plans):
        crop = scalar.random_resized_crop(
            np.uint64(3), np.uint64(5), np.uint64(i), 375, 500, 0.08, 1.0, math.log(3 / 4), math.log(4 / 3)
        )
        assert tuple(crop) == (record["top"], record["left"], record["height"], record["width"])
        word = reference.philox4x32_10((i, 0, 5, 0), (3, 0))[0]
        assert record["flip"] == ((word + 0.5) / 2**32 < 0.5)


@pytest.mark.parametrize("height, width", [(375, 500), (500, 333), (224, 224), (60, 900)])
def test_crops_are_distributed_as_torchvisions(height, width):
    n = 4000
    torch.manual_seed(0)
    image = torch.empty(1, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)])
    ours = _draw(np.arange(n), height=height, width=width)
    for column, name in enumerate(("top", "left", "height", "width")):
        result = stats.ks_2samp(theirs[:, column], ours[name])
        assert result.pvalue > 1e-3, (name, result)
    assert stats.binomtest(int(ours["flip"].sum()), n, 0.5).pvalue > 1e-3


def test_ks_would_notice_a_wrong_range():
    theirs = _draw(np.arange(4000))
    ours = _draw(np.arange(4000, 8000), augment=plan.Augment(scale=(0.14, 1.0)))
    assert stats.ks_2samp(theirs["height"], ours["height"]).pvalue < 1e-3


@pytest.mark.parametrize("height, width", [(1, 1), (1, 700), (900, 2), (3, 3), (8000, 5)])
def test_crops_stay_inside_extreme_images(height, width):
    plans = _draw(np.arange(3000), height=height, width=width)
    assert (plans["height"] >= 1).all() and (plans["width"] >= 1).all()
    assert (plans["top"] >= 0).all() and (plans["top"] + plans["height"] <= height).all()
    assert (plans["left"] >= 0).all() and (plans["left"] + plans["width"] <= width).all()


def test_mix_box_covers_the_published_share():
    boxes = np.array([plan.mix_box(0, 0, step, (14, 14)) for step in range(5000)])
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= 14).all() and (boxes[:, 2:] >= boxes[:, :2]).all()
    # The published draw, by numpy: its mean area is what ours must have.
    rng = np.random.default_rng(0)
    cut = (14 * np.sqrt(1 - rng.beta(1, 1, 50000))).astype(int)
    centres = rng.integers(0, 14, (2, 50000))
    sides = [np.clip(c + cut // 2, 0, 14) - np.clip(c - cut // 2, 0, 14) for c in centres]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert abs(area.mean() - (sides[0] * sides[1]).mean()) < 1.5
    assert (plan.mix_box(0, 0, 3, 14) == boxes[3]).all()
    assert any((plan.mix_box(0, 1, step, 14) != boxes[step]).any() for step in range(5))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"scale": (0.0, 1.0)},
        {"scale": (0.5, 0.2)},
        {"scale": (0.5, 1.1)},
        {"ratio": (0.0, 1.0)},
        {"ratio": (2.0, 1.0)},
        {"flip": 1.5},
    ],
)
def test_bad_ranges_are_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        plan.Augment(**kwargs)


def test_bad_samples_are_refused():
    with pytest.raises(ValueError, match=">= 0"):
        _draw([-1])
    with pytest.raises(ValueError, match=">= 1 pixel"):
        _draw([0], height=0)
    with pytest.raises(ValueError, match="epoch"):
        _draw([0], epoch=-1)
