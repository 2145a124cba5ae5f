"""Reading ahead: the bytes that are announced are those that are read, and only while a disk is read."""

import itertools

import numpy as np
import pytest
import torch
from small_betons import masked_beton, write

from tests import yuv_planes
from tl_fast.beton.samples import Samples
from tl_fast.kernels import cpu
from tl_fast.kernels.geometry.cpu import needed
from tl_fast.labelmaps.format import MapSpec
from tl_fast.maths.ycbcr import PADDING, planes_of
from tl_fast.pipeline import read_ahead
from tl_fast.pipeline.loader import Loader
from tl_fast.pipeline.planner import Planner
from tl_fast.pipeline.segment_loader import SegmentLoader
from tl_fast.pipeline.settings import Crops, Share
from tl_fast.plan import records
from tl_fast.plan.augment import Augment

FULL = Augment(interpolation="random", auto_augment="rand-m9-mstd0.5-inc1")
SPEC = MapSpec(k=3, height=9, width=7, num_classes=10)


def as_bytes(spans) -> np.ndarray:
    """The addresses of all bytes in spans, ascending."""
    return np.unique(np.concatenate([np.arange(start, start + size) for start, size in zip(*spans, strict=True)]))


def rows_of(address: int, height: int, width: int, top: int, bottom: int) -> np.ndarray:
    arrays = (np.array([value]) for value in (address, height, width, top, bottom))
    return as_bytes(read_ahead.plane_rows(*arrays))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 5), (24, 18), (19, 33)])
def test_the_rows_of_planes_are_those_that_are_copied(height, width):
    rng, chroma = np.random.default_rng(height), (-(-height // 2), -(-width // 2))
    bounds = np.cumsum([height * width, chroma[0] * chroma[1], chroma[0] * chroma[1]])
    offsets = np.split(np.arange(bounds[-1]), bounds[:-1])  # planes of which every sample is its own place
    planes = tuple(part.reshape(shape) for part, shape in zip(offsets, ((height, width), chroma, chroma), strict=True))
    for _ in range(40):
        start = tuple(int(rng.integers(side)) for side in (height, width))
        stop = tuple(int(rng.integers(first + 1, side + 1)) for first, side in zip(start, (height, width), strict=True))
        copied = yuv_planes.cut(planes, start, stop)
        rows = [plane[np.isin(plane, copied).any(axis=1)].ravel() for plane in planes]
        np.testing.assert_array_equal(rows_of(1000, height, width, start[0], stop[0]), 1000 + np.concatenate(rows))


def test_the_kernel_reads_no_other_rows():
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate([(64, 48), (51, 33), (120, 90)] * 8):
        image = np.concatenate([yuv_planes.flat(yuv_planes.random_planes(rng, height, width)), np.zeros(PADDING, "u1")])
        sides = np.array([height]), np.array([width])
        plans = records.draw(number, 0, np.array([number]), *sides, FULL)
        starts, stops = needed(plans, *sides, 32)
        shown = np.empty((2, 3, 32, 32), np.uint8)
        pixels, fill = planes_of(image, height, width), np.zeros(3, np.uint8)
        cpu.augment(pixels, height, width, plans[0], fill, shown[0])
        others = np.delete(np.arange(image.size - PADDING), rows_of(0, height, width, starts[0, 0], stops[0, 0]))
        image[others] = 255 - image[others]
        cpu.augment(pixels, height, width, plans[0], fill, shown[1])
        np.testing.assert_array_equal(shown[0], shown[1])


@pytest.fixture(scope="module")
def shards(photos, tmp_path_factory):
    """Two betons with label maps: one of JPEGs, one of JPEGs and planes."""
    files = [path.read_bytes() for path in sorted(photos.glob("*/*/*.jpg"))[:24]]
    folder = tmp_path_factory.mktemp("read_ahead")
    mixed = [bool(i % 3) for i in range(12)]
    write(folder / "a.beton", files[:12], spec=SPEC)
    write(folder / "b.beton", files[12:], spec=SPEC, store="auto", budget_gb=1, as_planes=mixed)
    return [folder / "a.beton", folder / "b.beton"]


@pytest.fixture
def announced(monkeypatch):
    """The spans that are announced, one list a batch, while a disk seems to be read all the time."""
    batches, reads = [], itertools.count()

    def disk_reads():
        batches.append([])
        return next(reads), 0

    monkeypatch.setattr(read_ahead, "disk_reads", disk_reads)
    monkeypatch.setattr(
        read_ahead, "will_need", lambda *spans: batches[-1].extend(zip(*map(np.ndarray.tolist, spans), strict=True))
    )
    return batches


@pytest.mark.parametrize("check", [False, True])
def test_a_loader_announces_what_its_batches_are_made_from(shards, announced, check):
    loaders = [Loader(shards, 8, image_size=64, grid=4, threads=2, augment=FULL, check=check) for _ in range(2)]
    loaders[1]._plan = loaders[1]._planner.plan  # announces nothing
    samples = loaders[0].samples
    assert 0 < samples.stored_as_planes.sum() < 12
    for batch, plain, spans in zip(*loaders, announced, strict=True):
        for name in ("images", "labels", "targets", "sample_ids"):
            assert torch.equal(getattr(batch, name), getattr(plain, name))
        ids = batch.sample_ids.numpy()
        images, maps = (
            np.stack(of(ids), axis=1).tolist() for of in (samples.image_addresses, samples.label_map_addresses)
        )
        by_rows = samples.stored_as_planes[ids] & (not check)
        whole = {*map(tuple, maps), *(tuple(image) for image, rows in zip(images, by_rows, strict=True) if not rows)}
        assert whole <= set(spans) and len(spans) == len(whole) + 3 * by_rows.sum()
        for start, size in set(spans) - whole:
            assert any(first <= start < start + size <= first + length for first, length in images)
    for loader in loaders:
        loader.close()


def test_a_file_that_is_replaced_while_it_is_open_is_read_to_its_end(shards, tmp_path, monkeypatch):
    reads = itertools.count()
    monkeypatch.setattr(read_ahead, "disk_reads", lambda: (next(reads), 0))
    (path := tmp_path / "replaced.beton").write_bytes(shards[1].read_bytes())
    with Loader(path, 4, image_size=32, grid=2) as loader, Loader(shards[1], 4, image_size=32, grid=2) as other:
        path.unlink()
        path.write_bytes(b"")
        assert all(torch.equal(batch.images, same.images) for batch, same in zip(loader, other, strict=True))


def test_masks_are_announced_whole(tmp_path, announced):
    masked_beton(tmp_path / "masked.beton", count=8, sizes=[(96, 128), (81, 63)], store="yuv420")
    with SegmentLoader(tmp_path / "masked.beton", 4, crop_size=48, threads=2) as loader:
        for batch, spans in zip(loader, announced, strict=True):
            masks = loader.samples.mask_addresses(batch.sample_ids.numpy())
            assert set(zip(*map(np.ndarray.tolist, masks), strict=True)) <= set(spans) and len(spans) == 4 + 3 * 4


def test_announcing_ends_and_begins_with_the_disks_reads(shards, monkeypatch):
    samples, calls, reads = Samples(shards), [], [(5, 7)]
    monkeypatch.setattr(read_ahead, "will_need", lambda *spans: calls.append(spans))
    monkeypatch.setattr(read_ahead, "disk_reads", lambda: reads[0])
    planner = Planner(samples, Share(4), Crops((32, 32)), None, 0, True)
    ahead = read_ahead.ReadAhead(planner, check=False)

    def announced_of(batches: int) -> int:
        count = 0
        for _ in range(batches):
            calls.clear()
            ahead.plan(np.arange(4), 0)
            count += bool(calls)
        return count

    more = read_ahead.GOES_ON + 5
    assert announced_of(more) == read_ahead.GOES_ON  # the first batch is taken for one after a read
    for after in ((6, 7), (6, 8)):  # a fault alone, and blocks alone
        reads[0] = after
        assert announced_of(more) == read_ahead.GOES_ON
    samples.close()
