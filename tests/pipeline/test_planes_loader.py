"""Loaders of images that are stored as YUV 4:2:0 planes give the pixels that loaders of their JPEGs give."""

import numpy as np
import pytest
import torch
from small_betons import masked_beton, write

from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.convert.image import prepare
from tl_fast.jpeg import planes_loops
from tl_fast.labelmaps.format import MapSpec
from tl_fast.pipeline.loader import Loader
from tl_fast.pipeline.segment_loader import SegmentLoader
from tl_fast.plan.augment import Augment
from tl_fast.plan.segment import SegmentAugment

FULL = Augment(interpolation="random", auto_augment="rand-m9-mstd0.5-inc1", erase=0.25)


@pytest.fixture(scope="module")
def both(photos, tmp_path_factory):
    """A beton of the photos that are 4:2:0 JPEGs, and one of their planes, with label maps."""
    files = [path.read_bytes() for path in sorted(photos.glob("*/*/*.jpg"))]
    decoded = [planes_loops.decode(prepare(data).data) for data in files]
    files = [file for file, samples in zip(files, decoded, strict=True) if samples and samples[3:] == (2, 2)][:40]
    assert len(files) == 40
    folder, spec = tmp_path_factory.mktemp("planes"), MapSpec(k=3, height=9, width=7, num_classes=10)
    paths = [write(folder / f"{store}.beton", files, spec=spec, store=store) for store in ("jpeg", "yuv420")]
    with BetonReader(paths[0]) as jpegs, BetonReader(paths[1]) as planes:
        assert not jpegs.stored_as_planes.any() and planes.stored_as_planes.all()
    return paths


def batches(path, **options):
    with Loader(path, 8, image_size=64, grid=4, seed=3, check=True, threads=2, **options) as loader:
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            yield from loader


@pytest.mark.parametrize("options", [{}, {"augment": FULL}, {"train": False, "crop_pct": 1.0}], ids=str)
def test_planes_show_what_their_jpegs_show_to_the_bit(both, options):
    count = 0
    for jpeg, planes in zip(*(batches(path, **options) for path in both), strict=True):
        assert torch.equal(jpeg.images, planes.images) and torch.equal(jpeg.sample_ids, planes.sample_ids)
        assert (jpeg.targets is None) == ("train" in options)
        if jpeg.targets is not None:
            assert torch.equal(jpeg.targets, planes.targets)
        count += len(jpeg.images)
    assert count == 80


def test_damaged_planes_are_named(both, tmp_path):
    data = bytearray(both[1].read_bytes())
    with BetonReader(both[1]) as reader:
        start, _ = reader.image_addresses(np.array([5]))
        data[int(start[0] - reader.image_addresses(np.array([0]))[0][0]) + data.find(bytes(reader.image(0)))] ^= 1
    (damaged := tmp_path / "damaged.beton").write_bytes(data)
    with pytest.raises(BetonError, match=r"crc: sample 5 \(image-5.jpg\)"):
        list(batches(damaged))


def test_masks_go_with_planes(tmp_path):
    for store in ("jpeg", "yuv420"):
        masked_beton(tmp_path / f"{store}.beton", count=16, sizes=[(96, 128), (81, 63)], store=store)
    loaders = [
        SegmentLoader(tmp_path / f"{store}.beton", 8, crop_size=48, augment=SegmentAugment(), seed=1, threads=2)
        for store in ("jpeg", "yuv420")
    ]
    for jpeg, planes in zip(*loaders, strict=True):
        assert torch.equal(jpeg.masks, planes.masks)
        # The JPEGs have chroma for every pixel, planes for 2x2.
        off = (jpeg.images.int() - planes.images.int()).abs().float()
        assert 0 < off.mean() < 8
    for loader in loaders:
        loader.close()
