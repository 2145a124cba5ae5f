"""Validation's batches, of which those that fit stay in memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from tl_fast.pipeline.loader import Loader
from tl_fast.training.kept_batches import KeptBatches

IMAGE = 3 * 64 * 64  # bytes


@pytest.fixture
def loader(betons):
    """29 images in batches of 8: three and one of 5."""
    with Loader(betons / "val.beton", 8, image_size=64, grid=4, train=False, threads=1) as loader:
        yield loader


def same(passed, expected) -> bool:
    return len(passed) == len(expected) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.sample_ids, b.sample_ids)
        for a, b in zip(passed, expected, strict=True)
    )


@pytest.mark.parametrize("images, kept", [(0, 0), (7, 0), (8, 1), (22, 2), (28, 3), (29, 4), (1000, 4)])
def test_every_pass_has_all_batches_and_decodes_those_that_did_not_fit(loader, monkeypatch, images, kept):
    """Also a last, small batch that would fit where a larger one did not is decoded again: what is kept has no gap."""
    expected, decoded = list(loader), []
    batches = KeptBatches(loader, images * IMAGE)
    produce = loader._produce
    monkeypatch.setattr(loader, "_produce", lambda ids, epoch: decoded.append(ids[0]) or produce(ids, epoch))
    for first in (0, kept, kept):
        assert same(list(batches), expected)
        assert decoded == [0, 8, 16, 24][first:]
        decoded.clear()


def test_a_pass_that_was_left_early_leaves_whole_batches(loader):
    expected, batches = list(loader), KeptBatches(loader)
    for count in (2, 1, 3):
        assert same(list(itertools.islice(batches, count)), expected[:count])
    assert same(list(batches), expected)
