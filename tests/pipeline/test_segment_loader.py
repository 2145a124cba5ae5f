"""The loader of segmentation: image and mask aligned, what a batch depends on, whole images in evaluation."""

import dataclasses
import gc
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from small_betons import write

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as joint

from tl_fast.beton.samples import Samples
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.kernels import cpu
from tl_fast.masks.format import MaskSpec
from tl_fast.pipeline import SegmentLoader
from tl_fast.pipeline.cpu_batches import MOST_SHAPES, Buffers
from tl_fast.plan import SegmentAugment

IGNORE = 255
FILL = (0, 0, 255)
STEADY = SegmentAugment(distort=False, fill=FILL)


def jpeg(pixels: np.ndarray) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), "JPEG", quality=100, subsampling=0)
    return file.getvalue()


def write_masked(path, images, masks, num_classes):
    """A beton of these JPEGs and masks; its path."""
    pytest.importorskip("simplejpeg", reason="simplejpeg, which writing a beton needs, is not installed")
    samples = [
        Sample(f"image-{i}.jpg", 0, lambda image=image: image, mask=lambda mask=mask: mask)
        for i, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]
    write_beton(path, samples, class_names=["picture"], masks=MaskSpec(num_classes))
    return path


@pytest.fixture
def photo_beton(photos, tmp_path):
    """12 bundled photos with masks of 5 classes drawn in blocks, and the masks."""
    files = sorted(photos.glob("train/*/*.jpg"))[:12]
    masks = []
    for number, file in enumerate(files):
        with Image.open(file) as image:
            width, height = image.size
        cells = np.random.default_rng(number).choice([0, 1, 2, 3, 4, IGNORE], (-(-height // 40), -(-width // 40)))
        masks.append(np.kron(cells, np.ones((40, 40))).astype(np.uint8)[:height, :width].copy())
    images = [file.read_bytes() for file in files]
    return write_masked(tmp_path / "photos.beton", images, masks, 5), masks, files


def collect(loader) -> tuple[dict[int, tuple[torch.Tensor, torch.Tensor]], list[int]]:
    """{sample id: (image, mask)} of one epoch, and the ids in order."""
    seen, order = {}, []
    for batch in loader:
        assert batch.masks.dtype == torch.uint8 and batch.masks.shape == (len(batch.images), *batch.images.shape[2:])
        for sample, image, mask in zip(batch.sample_ids.tolist(), batch.images, batch.masks, strict=True):
            seen[sample] = image, mask
            order.append(sample)
    return seen, order


# --- alignment: an image that encodes its coordinates, a mask that encodes its cells


CELL = 25  # pixels
ROWS, COLUMNS = 8, 10  # cells
OFFSET = 20  # level of the first row and column; the next ones are a level apart


def coordinates(tmp_path, count: int):
    """`count` times an image whose red is its row and whose green its column, and a mask whose class is the cell."""
    y, x = np.mgrid[: ROWS * CELL, : COLUMNS * CELL]
    pixels = np.stack([y + OFFSET, np.minimum(x + OFFSET, 255), np.full_like(y, 90)], axis=2).astype(np.uint8)
    mask = (y // CELL * COLUMNS + x // CELL).astype(np.uint8)
    path = tmp_path / "coordinates.beton"
    return write_masked(path, [jpeg(pixels)] * count, [mask] * count, ROWS * COLUMNS)


def misplacement(batch) -> tuple[np.ndarray, np.ndarray]:
    """Source pixels from the place that a pixel's colour tells to the cell that its mask names, per axis the larger, 0
    inside the cell; and which pixels are image. Both [B, H, W]."""
    red, green, blue = batch.images.numpy().astype(float).transpose(1, 0, 2, 3)
    masks = batch.masks.numpy().astype(int)
    off_y = np.abs(red - OFFSET + 0.5 - (masks // COLUMNS + 0.5) * CELL)
    off_x = np.abs(green - OFFSET + 0.5 - (masks % COLUMNS + 0.5) * CELL)
    off_x[(green >= 250) & (masks % COLUMNS == COLUMNS - 1)] = 0  # the last columns' green ends at 255
    return np.maximum(np.maximum(off_y, off_x) - CELL / 2, 0), blue < 130


ALIGNED = 1.5  # pixels: levels of a JPEG are off by one or two


@pytest.mark.parametrize(
    "augment, crop, pads",
    [
        (SegmentAugment(scale=(0.5, 2.0), flip=0.0, distort=False, fill=FILL), (96, 120), False),
        (SegmentAugment(scale=(1.0, 1.0), flip=1.0, distort=False, fill=FILL), (96, 120), False),
        (SegmentAugment(scale=(0.6, 2.0), distort=False, fill=FILL), 110, False),
        (SegmentAugment(base_size=(120, 100), distort=False, fill=FILL), (150, 170), True),
    ],
    ids=["scale+crop", "flip", "scale+crop+flip", "padding"],
)
def test_every_pixel_has_the_class_of_its_place(tmp_path, augment, crop, pads):
    path = coordinates(tmp_path, 16)
    padding = 0
    with SegmentLoader(path, 8, crop_size=crop, augment=augment, seed=1, threads=2) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader:
                off, shown = misplacement(batch)
                assert batch.images.shape[2:] == loader.crop_size and off[shown].max() <= ALIGNED
                assert ((batch.masks.numpy() != IGNORE) == shown).all()
                padding += (~shown).sum()
                mirrored = loader.draw(batch.sample_ids.numpy())["flip"]
                edges = batch.images[:, 1, 0].int()
                assert (((edges[:, 0] - edges[:, 40]) > 0).numpy() == mirrored).all()
    assert (padding > 1000) == pads


def test_the_alignment_test_notices_wrong_geometry(tmp_path, monkeypatch):
    path = coordinates(tmp_path, 8)
    show = cpu.show_mask

    def mirrored(mask, plan, ignore_index, out, *padding):
        show(mask, plan, ignore_index, out, *padding)
        out[:] = out[:, ::-1].copy()

    def moved(mask, plan, ignore_index, out, *padding):
        plan = plan.copy()
        plan["affine"][5] += 4
        show(mask, plan, ignore_index, out, *padding)

    for wrong, share in ((mirrored, 0.5), (moved, 0.02)):
        monkeypatch.setattr(cpu, "show_mask", wrong)
        with SegmentLoader(path, 8, crop_size=96, augment=STEADY) as loader:
            off, shown = misplacement(next(iter(loader)))
        assert (off[shown] > ALIGNED).mean() > share


RESIZES = InterpolationMode.BILINEAR, InterpolationMode.NEAREST_EXACT


def test_images_and_masks_are_torchvisions_joint_transforms(photo_beton):
    """Resize, crop, mirror and padding by torchvision v2 with the drawn numbers: the image, which is resized by Pillow,
    within a level or two, the mask but for centres on the edge of two pixels. Its resize of a `Mask` takes pixels under
    corners, not under centres, so the mask goes as an image."""
    path, masks, files = photo_beton
    crop = 352, 400
    with SegmentLoader(path, 12, crop_size=crop, augment=STEADY, seed=3) as loader:
        (batch,) = loader
        plans = loader.draw(batch.sample_ids.numpy())
    assert 0 < plans["flip"].sum() < 12
    padded = 0
    for sample, image, mask, plan in zip(batch.sample_ids, batch.images, batch.masks, plans, strict=True):
        with Image.open(files[sample]) as file:
            pixels = np.array(file.convert("RGB"))
        affine = plan["affine"].astype(float)
        across, down = abs(affine[0]) / crop[1], affine[4] / crop[0]
        rows, columns = round(pixels.shape[0] / down), round(pixels.shape[1] / across)
        height, width = min(rows, crop[0]), min(columns, crop[1])
        left = affine[2] / across - (width if plan["flip"] else 0)
        box = round(affine[5] / down), round(left), height, width
        pair = Image.fromarray(pixels), tv_tensors.Image(masks[sample][None])
        theirs = []
        for part, mode, fill in zip(pair, RESIZES, (list(FILL), [IGNORE]), strict=True):
            # Along x first: Pillow begins with y for some images since version 13.
            part = joint.resize(joint.resize(part, [pixels.shape[0], columns], mode), [rows, columns], mode)
            part = joint.crop(part, *box)
            part = joint.horizontal_flip(part) if plan["flip"] else part
            theirs.append(joint.pad(part, [0, 0, crop[1] - width, crop[0] - height], fill=fill))
        padded += height < crop[0] or width < crop[1]
        off = np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.array(theirs[0]))
        # The plan's box is float32, and both round after each of two passes.
        assert off.max() <= 2 and (off > 1).mean() < 1e-5 and (off > 0).mean() < 0.03, files[sample]
        assert (mask != theirs[1][0]).float().mean() < 1e-3, files[sample]
    assert padded


# --- what a batch depends on


def test_batches_do_not_depend_on_threads_batch_size_ranks_or_restart(photo_beton):
    def epoch(batch_size, start_step=0, **options):
        with SegmentLoader(photo_beton[0], batch_size, crop_size=64, augment=STEADY, seed=9, **options) as loader:
            loader.set_epoch(1, start_step)
            return collect(loader)

    base, order = epoch(4, threads=1)
    assert sorted(order) == list(range(12)) != order
    ranks = [epoch(2, rank=rank, world_size=2) for rank in range(2)]
    assert [r[1][2 * s : 2 * s + 2] for s in range(3) for r in ranks] == [order[2 * t : 2 * t + 2] for t in range(6)]
    resumed = epoch(4, start_step=2)
    assert resumed[1] == order[8:]
    for seen, _ in (epoch(6, threads=3), *ranks, resumed):
        assert all(torch.equal(a, b) for s in seen for a, b in zip(seen[s], base[s], strict=True))


def test_grouped_batches_are_the_same_for_every_number_of_ranks(photo_beton):
    """12 samples in batches of 4, in groups of 3: images and masks, the ranks' parts one behind the other."""

    def steps(world_size, rank):
        options = dict(crop_size=64, augment=STEADY, seed=9, order="grouped", rank=rank, world_size=world_size)
        with SegmentLoader(photo_beton[0], 4 // world_size, **options) as loader:
            loader.set_epoch(2)
            return [(batch.sample_ids, batch.images, batch.masks) for batch in loader]

    whole = steps(1, 0)
    assert len(whole) == 3
    assert [sorted((ids % 4).tolist()) for ids, _, _ in whole] == 3 * [[0, 1, 2, 3]]
    for world_size in (2, 4):
        ranks = [steps(world_size, rank) for rank in range(world_size)]
        for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
            assert all(torch.equal(a, torch.cat(b)) for a, b in zip(step, zip(*parts, strict=True), strict=True))
    with pytest.raises(ValueError, match="got 6 ranks"):
        SegmentLoader(photo_beton[0], 2, order="grouped", world_size=6)


def test_dominated_crops_are_drawn_again(photo_beton):
    unruled = dataclasses.replace(STEADY, max_class_share=1.0)
    with (
        SegmentLoader(photo_beton[0], 12, crop_size=64, augment=STEADY, seed=9) as ruled,
        SegmentLoader(photo_beton[0], 12, crop_size=64, augment=unruled, seed=9) as free,
    ):
        assert ruled.num_classes == 5 and ruled.mask_spec == MaskSpec(5)
        kept = (ruled.draw(np.arange(12)) == free.draw(np.arange(12))).sum()
        assert 0 < kept < 12


def test_distorted_colours_change_no_mask(photo_beton):
    distorted = dataclasses.replace(STEADY, distort=True)
    with (
        SegmentLoader(photo_beton[0], 12, crop_size=64, augment=STEADY, seed=9) as steady,
        SegmentLoader(photo_beton[0], 12, crop_size=64, augment=distorted, seed=9) as changing,
    ):
        (plain,), (batch,) = steady, changing
        operations = (changing.draw(batch.sample_ids.numpy())["ops"] >= 0).any(axis=1)
    assert torch.equal(plain.masks, batch.masks) and operations.sum() > 6
    differs = (plain.images != batch.images).flatten(1).any(dim=1).numpy()
    assert (differs == operations).all()


# --- evaluation


@pytest.fixture
def mixed_beton(photos, tmp_path):
    """Eleven photos of two sizes, in runs of 1 to 4, and what a beton of them holds."""
    images, masks, pixels = [], [], []
    for number, wide in enumerate([1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 1]):
        with Image.open(sorted(photos.glob("val/*/*.jpg"))[number]) as file:
            image = file.convert("RGB").resize((90, 61) if wide else (48, 64))
        images.append(jpeg(np.asarray(image)))
        pixels.append(np.asarray(Image.open(io.BytesIO(images[-1]))))
        masks.append(np.random.default_rng(number).integers(0, 5, pixels[-1].shape[:2], np.uint8))
    return write_masked(tmp_path / "mixed.beton", images, masks, 5), pixels, masks


def test_evaluation_gives_whole_images_once_in_batches_of_equal_sizes(mixed_beton):
    path, pixels, masks = mixed_beton
    for world_size, sizes in ((1, [[3], [2], [1], [3, 1], [1]]), (2, None)):
        order = []
        for rank in range(world_size):
            with SegmentLoader(path, 3, train=False, rank=rank, world_size=world_size, threads=2) as loader:
                batches = list(loader)
                assert len(batches) == len(loader)
                for batch in batches:
                    for sample, image, mask in zip(batch.sample_ids, batch.images, batch.masks, strict=True):
                        assert (image.numpy().transpose(1, 2, 0) == pixels[sample]).all()
                        assert (mask.numpy() == masks[sample]).all()
                order += [sample for batch in batches for sample in batch.sample_ids.tolist()]
                if sizes:
                    assert [len(batch.images) for batch in batches] == sum(sizes, [])
                loader.set_epoch(0, start_step=2)
                assert [b.sample_ids.tolist() for b in loader] == [b.sample_ids.tolist() for b in batches[2:]]
        assert sorted(order) == list(range(11))


def test_single_samples_can_be_looked_at(mixed_beton):
    path, pixels, _ = mixed_beton
    with SegmentLoader(path, 4, train=False) as loader:
        assert loader.batch(np.array([3, 7])).images.shape == (2, 3, 64, 48)
        with pytest.raises(ValueError, match=r"different sizes are no batch: \(61, 90\) and \(64, 48\)"):
            loader.batch(np.array([0, 3]))


def test_memory_is_kept_of_few_shapes():
    buffers = Buffers()
    for size in range(1, 4 * MOST_SHAPES):
        buffers.take((size, 8), np.uint8)
    assert len(buffers._free) == MOST_SHAPES
    allocated = buffers.allocated
    for size in range(3 * MOST_SHAPES, 4 * MOST_SHAPES):
        buffers.take((size, 8), np.uint8)
    assert buffers.allocated == allocated


# --- errors and endings


def test_a_loader_that_is_dropped_ends_its_threads(photo_beton):
    before = set(threading.enumerate())
    loader = SegmentLoader(photo_beton[0], 4, crop_size=64, threads=2)
    next(iter(loader))
    threads = set(threading.enumerate()) - before
    assert any(thread.name.startswith("tl_fast-mask") for thread in threads)
    del loader
    gc.collect()
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


def test_a_damaged_mask_surfaces(photo_beton, monkeypatch):
    def fail(self, sample_id):
        raise ValueError(f"sample {sample_id}: damaged mask")

    with SegmentLoader(photo_beton[0], 4, crop_size=64) as loader:
        monkeypatch.setattr(Samples, "mask", fail)
        with pytest.raises(ValueError, match="damaged mask"):
            collect(loader)


def test_betons_without_masks_are_refused(photos, tmp_path):
    path = write(tmp_path / "plain.beton", [next(photos.glob("train/*/*.jpg")).read_bytes()])
    with pytest.raises(ValueError, match="plain.beton: no masks.*--masks DIR"):
        SegmentLoader(path, 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 13}, "do not fill"),
        ({"crop_size": (0, 64)}, "crop_size must be at least 1 pixel"),
        ({"crop_size": 3.5}, "a whole number or two"),
        ({"prefetch": 0}, "prefetch"),
        ({"device": "cuda:99"}, "CUDA devices that torch can use"),
    ],
)
def test_settings_that_cannot_work_are_refused(photo_beton, options, message):
    with pytest.raises(ValueError, match=message):
        SegmentLoader(**({"paths": photo_beton[0], "batch_size": 4} | options))
