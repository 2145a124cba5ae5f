"""The loader: image and label map aligned, batches that depend on (seed, epoch, step) alone, errors that surface."""

import contextlib
import gc
import io
import math
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_betons import write
from tiny_runs import torchrun

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

from tests import reference
from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.kernels import cpu
from tl_fast.labelmaps.format import MapSpec, pack
from tl_fast.maths import scalar
from tl_fast.pipeline import batch_loader, planner
from tl_fast.pipeline.loader import Loader
from tl_fast.pipeline.regions import DecodeError
from tl_fast.plan import rand_augment
from tl_fast.plan import records as plan
from tl_fast.plan.boxes import center_boxes, crop_fractions
from tl_fast.system.sides import both_sides

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))


def jpeg(pixels: np.ndarray, quality: int = 100) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photo_files(photos):
    return sorted(photos.glob("train/*/*.jpg"))[:24]


@pytest.fixture(scope="module")
def photo_beton(photo_files, tmp_path_factory):
    """24 bundled photos with random label maps of 10 classes, k = 3, 9 x 7 cells."""
    path = tmp_path_factory.mktemp("photos") / "photos.beton"
    images = [file.read_bytes() for file in photo_files]
    return write(path, images, spec=MapSpec(k=3, height=9, width=7, num_classes=10))


def collect(loader):
    """{sample id: (image, targets)} of one epoch, and the ids in order."""
    seen, order = {}, []
    for batch in loader:
        for i, sample in enumerate(batch.sample_ids.tolist()):
            seen[sample] = (batch.images[i], None if batch.targets is None else batch.targets[i])
            order.append(sample)
    return seen, order


# --- alignment: an image that encodes its coordinates, a label map that encodes its cells


ROWS, COLUMNS = 6, 8  # label-map cells
# Pixels. A cell is 80 x 80, larger than any token, so that a token's largest class is the nearest cell.
HEIGHT, WIDTH = 480, 640
SIZE, GRID = 112, 14


def coordinate_image(width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :width]
    return np.stack([y / HEIGHT * 255, x / width * 255, np.full_like(y, 128)], axis=2).round().astype(np.uint8)


def cell_record(spec: MapSpec, rows=ROWS, columns=COLUMNS):
    classes = np.arange(rows * columns, dtype=np.uint16).reshape(1, rows, columns)
    return pack(classes, np.full(classes.shape, 12, np.float32), spec)


def token_means(images: torch.Tensor) -> torch.Tensor:
    """Mean level (0..1) of the pixels under each token: uint8 [B, c, SIZE, SIZE] -> [B, c, GRID, GRID]."""
    return torch.nn.functional.avg_pool2d(images.float(), SIZE // GRID) / 255


def misplacement(batch, cells_y, cells_x) -> np.ndarray:
    """Distance in cells, per axis the larger, from the pixels under each token to the cell its target names: [B, N], 0
    inside the cell.

    cells_y, cells_x: red and green level (0..1 of the image's extent) -> cell coordinate.
    """
    means = token_means(batch.images[:, :2])
    y, x = cells_y(means[:, 0].flatten(1).numpy()), cells_x(means[:, 1].flatten(1).numpy())
    named = batch.targets[:, 1:].argmax(2).numpy()
    return np.maximum(np.maximum(np.abs(y - named // COLUMNS - 0.5), np.abs(x - named % COLUMNS - 0.5)) - 0.5, 0)


CROP_ONLY = plan.Augment(flip=0.0)
FLIP_ONLY = plan.Augment(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), flip=1.0)
BOTH = plan.Augment(flip=1.0)


# (pixels, tokens), of which all are SIZE // GRID pixels large.
SHAPES = pytest.mark.parametrize("size, grid", [(SIZE, GRID), ((80, 144), (10, 18)), ((144, 80), (18, 10))], ids=str)


@SHAPES
@pytest.mark.parametrize("augment", [CROP_ONLY, FLIP_ONLY, BOTH], ids=["crop", "flip", "crop+flip"])
def test_every_token_names_the_cell_under_its_pixels(tmp_path, augment, size, grid):
    spec = MapSpec(k=1, height=ROWS, width=COLUMNS, num_classes=ROWS * COLUMNS)
    n = 16
    path = write(tmp_path / "coordinates.beton", [jpeg(coordinate_image())] * n, [cell_record(spec)] * n, spec)
    tokens = 0
    with Loader(path, 8, image_size=size, grid=grid, augment=augment, seed=1, smoothing=0.0) as loader:
        for epoch in range(3):
            loader.set_epoch(epoch)
            flips = []
            for batch in loader:
                off = misplacement(batch, lambda y: y * ROWS, lambda x: x * COLUMNS)
                # A grey level is 0.03 cells; JPEG and the resample move a token's mean by no more than two or three.
                assert off.max() <= 0.12, off.max()
                tokens += off.size
                flips += (batch.images[:, 1, 0, 0] > batch.images[:, 1, 0, -1]).tolist()
            assert all(flips) if augment.flip else not any(flips)
    assert tokens == 3 * n * math.prod(both_sides(grid))


def test_the_alignment_test_notices_wrong_geometry(tmp_path, monkeypatch):
    """Boxes fed as (left, top, ...), as the published code does, or flips left out: most tokens name the wrong cell."""
    spec = MapSpec(k=1, height=ROWS, width=COLUMNS, num_classes=ROWS * COLUMNS)
    path = write(tmp_path / "coordinates.beton", [jpeg(coordinate_image())] * 8, [cell_record(spec)] * 8, spec)
    right = planner.map_affines
    swapped = lambda *arguments: right(*arguments[:-1], "published")  # noqa: E731
    unflipped = lambda plans, *rest: right(mirrored(plans), *rest)  # noqa: E731
    for wrong in (swapped, unflipped):
        monkeypatch.setattr(planner, "map_affines", wrong)
        with Loader(path, 8, image_size=SIZE, grid=GRID, augment=BOTH, smoothing=0.0) as loader:
            off = misplacement(next(iter(loader)), lambda y: y * ROWS, lambda x: x * COLUMNS)
        assert (off > 0.12).mean() > 0.5


def mirrored(plans: np.ndarray) -> np.ndarray:
    """The plans with left and right of the output exchanged."""
    plans = plans.copy()
    plans["affine"][:, 2] += plans["affine"][:, 0]
    plans["affine"][:, 5] += plans["affine"][:, 3]
    plans["affine"][:, [0, 3]] *= -1
    return plans


GEOMETRY = [
    ("Rotate", 25),
    ("Rotate", -11),
    ("ShearX", 0.27),
    ("ShearY", -0.27),
    ("TranslateX", 0.4),
    ("TranslateY", -0.31),
]


@pytest.mark.parametrize("operations", [*([op] for op in GEOMETRY), GEOMETRY[:3], GEOMETRY[3:]], ids=str)
@pytest.mark.parametrize(
    "interpolation, size, grid", [("bilinear", SIZE, GRID), ("bicubic", SIZE, GRID), ("bicubic", (80, 144), (10, 18))]
)
def test_geometric_operations_move_labels_with_the_pixels(tmp_path, monkeypatch, operations, interpolation, size, grid):
    """On a 4:3 image: tokens of pixels name the cell under them; tokens of fill know nothing."""
    spec = MapSpec(k=1, height=ROWS, width=COLUMNS, num_classes=ROWS * COLUMNS)
    path = write(tmp_path / "coordinates.beton", [jpeg(coordinate_image())] * 16, [cell_record(spec)] * 16, spec)
    drawn = plan.draw

    def draw(*arguments):
        plans, aspect = drawn(*arguments), arguments[-1]
        for record in plans:
            affine = tuple(record["affine"].astype(float))
            for name, value in operations:
                affine = scalar.compose(*affine, rand_augment.OPS.index(name), value, aspect)
            record["affine"] = affine
        return plans

    monkeypatch.setattr(plan, "draw", draw)
    seen = filled = 0
    augment = plan.Augment(interpolation=interpolation, fill=(0, 0, 255))
    with Loader(path, 16, image_size=size, grid=grid, augment=augment, seed=1, smoothing=0.0) as loader:
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader:
                off = misplacement(batch, lambda y: y * ROWS, lambda x: x * COLUMNS)
                blue = batch.images[:, 2].float()
                is_image = (
                    torch.nn.functional.avg_pool2d((blue < 140).float()[:, None], SIZE // GRID).flatten(1).numpy()
                )
                whole = is_image == 1
                assert off[whole].max() <= 0.15, off[whole].max()
                seen += whole.sum()
                nothing = batch.targets[:, 1:].amax(2).numpy() < 1.001 / spec.num_classes
                assert not nothing[whole].any()
                # The sampling points decide: a token has at least one, in its middle.
                filled += nothing.sum()
                assert nothing[is_image == 0].all() and is_image[nothing].max(initial=0) < 0.6
    assert seen > 1500
    if len(operations) > 1:
        assert filled > 10


def test_center_square_maps_are_aligned_too(tmp_path):
    """A map of the centred square only: tokens inside it name their cell, tokens beyond it nothing."""
    spec = MapSpec(k=1, height=ROWS, width=COLUMNS, num_classes=ROWS * COLUMNS, extent="center_square")
    path = write(tmp_path / "square.beton", [jpeg(coordinate_image(960))] * 8, [cell_record(spec)] * 8, spec)
    inside = outside = 0
    with Loader(path, 8, image_size=SIZE, grid=GRID, augment=BOTH, smoothing=0.0) as loader:
        for epoch in range(4):
            loader.set_epoch(epoch)
            batch = next(iter(loader))
            # The square is the middle half of this image; a cell is 1/16 of its width.
            off = misplacement(batch, lambda y: y * ROWS, lambda x: (x - 0.25) * 2 * COLUMNS)
            x = token_means(batch.images[:, 1:2]).flatten(1).numpy()
            peak = batch.targets[:, 1:].max(2).values.numpy()
            # RoIAlign holds the border for one cell.
            within, beyond = np.abs(x - 0.5) < 0.25, np.abs(x - 0.5) > 0.25 + 1.2 / 16
            assert off[within].max() <= 0.15 and (peak[within] > 0.1).all()
            np.testing.assert_allclose(peak[beyond], 1 / (ROWS * COLUMNS), rtol=1e-5)
            inside, outside = inside + within.sum(), outside + beyond.sum()
    assert inside > 1000 and outside > 200


def test_crops_leave_the_square_by_the_right_amount():
    fractions = crop_fractions(np.array([[0.0, 0.0, 480.0, 640.0]]), np.array([480]), np.array([640]), "center_square")
    np.testing.assert_allclose(fractions, [[0, -80 / 480, 1, 640 / 480]], rtol=1e-6)
    with pytest.raises(ValueError, match="extent"):
        crop_fractions(np.zeros((1, 4)), np.ones(1), np.ones(1), "left_half")


# --- what a batch holds


def test_images_and_targets_are_those_of_the_plan(photo_beton, photo_files):
    """Pixels: Pillow's decode and BILINEAR with box=, within one level. Targets: the slow oracle on the stored maps."""
    with (
        Loader(photo_beton, 8, image_size=96, grid=3, seed=5, smoothing=0.1) as loader,
        BetonReader(photo_beton) as reader,
    ):
        loader.set_epoch(2)
        seen, order = collect(loader)
        assert sorted(order) == list(range(24)) and order != sorted(order)
        ids = np.array(order)
        plans = loader.draw(ids)
        assert 0 < plans["flip"].sum() < 24
        classes, scores = reader.label_maps(ids)
        for i, sample in enumerate(order):
            p = plans[i]
            with Image.open(photo_files[sample]) as file:
                image = file.convert("RGB")
            box = (p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"])
            pixels = np.asarray(
                image.resize((96, 96), Image.Resampling.BILINEAR, box=tuple(map(float, box)))
            ).transpose(2, 0, 1)
            if p["flip"]:
                pixels = pixels[:, :, ::-1]
            assert np.abs(seen[sample][0].numpy().astype(int) - pixels).max() <= 1, photo_files[sample]
            crop = np.array(
                [p["top"] / image.height, p["left"] / image.width, p["height"] / image.height, p["width"] / image.width]
            )
            expected = reference.token_targets(classes[i : i + 1], scores[i : i + 1], [crop], [p["flip"]], 10, 3, 0.1)[
                0
            ]
            np.testing.assert_allclose(seen[sample][1].numpy(), expected, atol=2e-5)


def test_bfloat16_targets_are_the_float32_ones_rounded(photo_beton):
    settings = dict(image_size=32, grid=3, seed=5, threads=2)
    with (
        Loader(photo_beton, 24, **settings) as loader,
        Loader(photo_beton, 24, **settings, targets_dtype="bfloat16") as rounding,
    ):
        for batch, rounded in zip(loader, rounding, strict=True):
            assert rounded.targets.dtype == torch.bfloat16 and batch.targets.dtype == torch.float32
            assert torch.equal(rounded.targets, batch.targets.bfloat16()) and torch.equal(rounded.images, batch.images)


def test_published_geometry_crops_the_labels_across_the_diagonal(photo_beton):
    """The same pixels; the label map cropped at (left, top) of its own extent, as the published code does."""
    with (
        Loader(photo_beton, 24, image_size=32, grid=3) as ours,
        Loader(photo_beton, 24, image_size=32, grid=3, geometry="published") as theirs,
    ):
        batch, other = next(iter(ours)), next(iter(theirs))
        plans = ours.draw(batch.sample_ids.numpy())
        classes, scores = ours.samples.label_maps(batch.sample_ids.numpy())
        height, width = (getattr(ours.samples, name)[batch.sample_ids.numpy()] for name in ("heights", "widths"))
    assert torch.equal(batch.images, other.images) and not torch.allclose(batch.targets, other.targets, atol=0.05)
    crops = np.stack(
        [plans["left"] / width, plans["top"] / height, plans["width"] / width, plans["height"] / height], axis=1
    )
    expected = reference.token_targets(classes, scores, crops, plans["flip"], 10, 3, 0.1)
    np.testing.assert_allclose(other.targets.numpy(), expected, atol=2e-5)


def test_batches_do_not_depend_on_threads_batch_size_ranks_or_restart(photo_beton):
    def epoch(batch_size, **options):
        with Loader(photo_beton, batch_size, image_size=64, grid=4, seed=9, **options) as loader:
            loader.set_epoch(1)
            return collect(loader)

    base, order = epoch(8, threads=1)
    for other, other_order in (epoch(8, threads=3), epoch(12, threads=2), epoch(4, prefetch=5)):
        assert other_order == order
        assert all(torch.equal(base[s][0], other[s][0]) and torch.equal(base[s][1], other[s][1]) for s in order)
    ranks = [epoch(4, rank=rank, world_size=2) for rank in range(2)]
    assert all(torch.equal(base[s][0], seen[s][0]) for seen, _ in ranks for s in seen)
    # Global batch by global batch the ranks hold what one rank of twice the batch holds.
    assert [r[1][4 * s : 4 * s + 4] for s in range(3) for r in ranks] == [order[4 * t : 4 * t + 4] for t in range(6)]
    with Loader(photo_beton, 8, image_size=64, grid=4, seed=9) as loader:
        loader.set_epoch(1, start_step=2)
        assert collect(loader)[1] == order[16:]
        loader.set_epoch(2)
        assert collect(loader)[1] != order


@pytest.fixture(scope="module")
def grouped_beton(photo_files, tmp_path_factory):
    """45 samples of the bundled photos with label maps."""
    path = tmp_path_factory.mktemp("grouped") / "grouped.beton"
    images = [file.read_bytes() for file in (2 * photo_files)[:45]]
    return write(path, images, spec=MapSpec(k=3, height=9, width=7, num_classes=10))


def test_grouped_batches_are_the_same_for_every_number_of_ranks(grouped_beton):
    """Bit for bit, images and targets, the ranks' parts laid one behind the other; a rank keeps to its groups in every
    epoch. 45 samples in batches of 8: five steps."""

    def steps(world_size, rank, epoch=1, **options):
        options |= dict(image_size=48, grid=3, seed=9, order="grouped", rank=rank, world_size=world_size)
        with Loader(grouped_beton, 8 // world_size, **options) as loader:
            assert (len(loader), loader.order, loader.groups) == (5, "grouped", 8)
            loader.set_epoch(epoch)
            return [(batch.sample_ids, batch.images, batch.targets) for batch in loader]

    whole = steps(1, 0, threads=1)
    assert [ids.tolist() for ids, _, _ in whole] == np.reshape(reference.grouped_order(9, 1, 45, 8), (5, 8)).tolist()
    for world_size in (2, 4):
        ranks = [steps(world_size, rank, threads=2) for rank in range(world_size)]
        for step, parts in zip(whole, zip(*ranks, strict=True), strict=True):
            for ours, theirs in zip(step, map(torch.cat, zip(*parts, strict=True)), strict=True):
                assert torch.equal(ours, theirs)
        for rank in range(world_size):
            seen = torch.cat([ids for epoch in (0, 1) for ids, _, _ in steps(world_size, rank, epoch)])
            assert set((seen % 8 * world_size // 8).tolist()) == {rank}
    with Loader(grouped_beton, 8, image_size=48, grid=3, seed=9) as loader:  # the free order's length is the same
        loader.set_epoch(1)
        assert (len(loader), loader.order, loader.groups) == (5, "shuffled", 1)
        assert [batch.sample_ids.tolist() for batch in loader] != [ids.tolist() for ids, _, _ in whole]


def test_a_grouped_epoch_may_begin_and_end_within_it(grouped_beton):
    with Loader(grouped_beton, 8, image_size=32, grid=2, order="grouped") as loader:
        epochs = []
        for epoch in (0, 1):
            loader.set_epoch(epoch, next_epoch=epoch + 1)
            epochs.append(collect(loader)[1])
        assert sorted(epochs[0]) != sorted(epochs[1]) and len(epochs[0]) == len(set(epochs[0])) == 40
        loader.set_epoch(0, start_step=3, next_epoch=1)
        assert collect(loader)[1] == epochs[0][24:]
        loader.set_epoch(1, stop_step=2)
        assert collect(loader)[1] == epochs[1][:16]


def test_numbers_of_ranks_that_cannot_share_groups_are_refused(grouped_beton):
    message = "order 'grouped' .* got 3 ranks: use 1, 2, 4, 8, 16, 32 or 64 ranks, or order 'shuffled'"
    with pytest.raises(ValueError, match=message):
        Loader(grouped_beton, 4, order="grouped", world_size=3)
    # Evaluation is in file order.
    with Loader(grouped_beton, 4, image_size=32, train=False, order="grouped", rank=1, world_size=3) as loader:
        assert collect(loader)[1] == list(range(1, 45, 3))


def test_choosing_the_next_epoch_leaves_the_running_one_alone(photo_beton):
    with Loader(photo_beton, 4, image_size=32, grid=2, prefetch=1) as loader:
        whole, order = collect(loader)
        seen = {}
        for batch in loader:
            loader.set_epoch(7)
            seen |= {s: image for s, image in zip(batch.sample_ids.tolist(), batch.images, strict=True)}
        assert list(seen) == order and all(torch.equal(seen[s], whole[s][0]) for s in order)


def whole_of(loader):
    """As many batches as the loader has; it is not asked for the end."""
    with contextlib.closing(iter(loader)) as batches:
        for _ in range(len(loader)):
            yield next(batches)


def test_the_next_epoch_is_begun_while_this_one_ends(photo_beton):
    options = dict(image_size=32, grid=2, seed=3)
    with Loader(photo_beton, 4, **options) as loader:
        expected = []
        for epoch in range(3):
            loader.set_epoch(epoch)
            expected.append(collect(loader))
    with Loader(photo_beton, 4, prefetch=2, **options) as loader:
        produced, produce = [], loader._produce
        loader._produce = lambda ids, epoch: produced.append((epoch, ids.tolist())) or produce(ids, epoch)
        for epoch in range(3):
            loader.set_epoch(epoch, next_epoch=epoch + 1 if epoch < 2 else None)
            seen, order = collect(whole_of(loader) if epoch else loader)
            assert order == expected[epoch][1]
            assert all(torch.equal(seen[s][0], expected[epoch][0][s][0]) for s in order)
            begun = len(loader._prepared.pending) if loader._prepared else 0
            assert begun == (3, 2, 0)[epoch]  # one more where the end was asked for
        # Nothing is made twice.
        assert produced == [
            (epoch, expected[epoch][1][4 * step : 4 * step + 4]) for epoch in range(3) for step in range(len(loader))
        ]


def test_an_epoch_may_end_before_all_its_steps(photo_beton):
    with Loader(photo_beton, 4, image_size=32, grid=2, seed=3) as loader:
        whole = collect(loader)[1]
        loader.set_epoch(1)
        next_whole = collect(loader)[1]
        loader.set_epoch(0, 1, stop_step=5, next_epoch=1)
        assert collect(loader)[1] == whole[4:20]
        assert loader._prepared.choice == (1, 0, 5)
        loader.set_epoch(1, stop_step=5)
        assert collect(loader)[1] == next_whole[:20]
        with pytest.raises(ValueError, match="start_step <= stop_step <= 6, got epoch=0, start_step=3, stop_step=2"):
            loader.set_epoch(0, 3, stop_step=2)


def test_a_begun_epoch_that_is_not_wanted_costs_nothing_but_time(photo_beton):
    before = set(threading.enumerate())
    with Loader(photo_beton, 4, image_size=32, grid=2) as loader:
        whole = collect(loader)[1]
        for chosen, next_epoch, start_step in ((0, 1, 0), (0, 0, 2), (0, 5, 0)):
            loader.set_epoch(chosen, start_step, next_epoch=next_epoch)
            assert collect(loader)[1] == whole[4 * start_step :]
        for _ in loader:  # left early with the next epoch open
            break
        assert collect(loader)[1] == whole
        with pytest.raises(ValueError, match="epoch and next_epoch must be >= 0"):
            loader.set_epoch(0, next_epoch=-1)
    assert set(threading.enumerate()) <= before


def test_batches_under_way_are_bounded_in_bytes(photo_beton, monkeypatch):
    def prefetch(**options):
        with Loader(photo_beton, 4, image_size=32, grid=2, **options) as loader:
            return loader.prefetch, loader._planner.batch_bytes()

    assert prefetch() == (2, prefetch()[1]) and prefetch(prefetch=7)[0] == 7
    monkeypatch.setattr(batch_loader, "PREFETCH_BYTES", 2 * prefetch()[1] - 1)
    assert prefetch()[0] == 1
    monkeypatch.setattr(batch_loader, "PREFETCH_BYTES", 1)
    assert prefetch()[0] == 1
    with BetonReader(photo_beton) as reader:
        pixels = 3 * float((reader.heights.astype(float) * reader.widths).mean()) + 3 * 32 * 32
    assert prefetch()[1] == pytest.approx(4 * (pixels + 4 * 5 * 10), abs=1)


def test_shards_are_disjoint_equal_and_cover_the_epoch(photo_beton):
    for world_size, batch_size in ((2, 4), (3, 2), (5, 2)):
        shards, lengths = [], set()
        for rank in range(world_size):
            with Loader(photo_beton, batch_size, image_size=32, grid=2, rank=rank, world_size=world_size) as loader:
                lengths.add(len(loader))
                shards.append(collect(loader)[1])
        together = [s for shard in shards for s in shard]
        whole = 24 // (batch_size * world_size) * batch_size * world_size
        assert len(lengths) == 1 and len({len(shard) for shard in shards}) == 1
        assert len(together) == len(set(together)) == whole


RANK_SCRIPT = """
import sys, torch.distributed as dist
from tl_fast.pipeline import Loader
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
with Loader(sys.argv[1], 4, image_size=32, grid=2, rank=rank, world_size=world_size) as loader:
    mine = [batch.sample_ids.tolist() for batch in loader]
everyone = [None] * world_size
dist.all_gather_object(everyone, mine)
if rank == 0:
    print("SHARDS", everyone)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_gloo_ranks_see_disjoint_shards_that_cover_the_epoch(photo_beton, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    done = torchrun([str(script), str(photo_beton)], 2)
    assert done.returncode == 0, done.stderr
    first, second = eval(
        next(line for line in done.stdout.splitlines() if line.startswith("SHARDS")).removeprefix("SHARDS")
    )
    assert len(first) == len(second) == 3
    flat = [sample for batch in first + second for sample in batch]
    assert sorted(flat) == list(range(24))
    with Loader(photo_beton, 8, image_size=32, grid=2) as loader:
        assert [a + b for a, b in zip(first, second, strict=True)] == [batch.sample_ids.tolist() for batch in loader]


def test_what_a_short_epoch_leaves_out_changes(photo_beton):
    with Loader(photo_beton, 10, image_size=32, grid=2) as loader:
        left_out = []
        for epoch in range(6):
            loader.set_epoch(epoch)
            left_out.append(frozenset(range(24)) - set(collect(loader)[1]))
    assert all(len(out) == 4 for out in left_out) and len(set(left_out)) > 3


def test_evaluation_is_resize_and_centre_crop(photo_beton, photo_files):
    seen, order = {}, []
    for rank in range(2):
        with Loader(photo_beton, 5, image_size=96, train=False, rank=rank, world_size=2, crop_pct=0.875) as loader:
            part, ids = collect(loader)
            assert len(ids) == 12 and all(targets is None for _, targets in part.values())
            seen, order = seen | part, order + ids
    assert sorted(order) == list(range(24))
    for sample, file in enumerate(photo_files):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        # Short side to floor(96 / 0.875) = 109 pixels, then the centre 96: in source pixels a square of 96 / 109 of the
        # short side.
        side = min(image.size) * 96 / 109
        left, top = (image.width - side) / 2, (image.height - side) / 2
        theirs = image.resize((96, 96), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        off = np.abs(seen[sample][0].numpy().astype(int) - np.asarray(theirs).transpose(2, 0, 1))
        # Pillow clips between its two passes, which shows beside the strongest edges.
        assert off.max() <= 8 and np.percentile(off, 99) <= 1 and off.mean() < 0.25, file


@pytest.mark.parametrize("size", [(96, 160), (160, 96)])
def test_evaluation_of_rectangles_is_timms(photo_beton, photo_files, size):
    """timm resizes to whole pixels first, so its crop may lie half a pixel beside ours: means of 8 x 8 pixels are
    compared."""
    theirs = create_transform((3, *size), is_training=False, interpolation="bicubic", crop_pct=0.875)
    with Loader(photo_beton, 24, image_size=size, train=False, crop_pct=0.875) as loader:
        (batch,) = loader
        assert loader.image_size == size and batch.images.shape == (24, 3, *size)
    resize = theirs.transforms[0]
    for file, ours in zip(photo_files, batch.images, strict=True):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        (box,) = center_boxes(np.array([image.height]), np.array([image.width]), size, 0.875)
        resized = resize.get_params(image, resize.size, resize.longest)
        for side, extent, shown, resized_side in zip(image.size[::-1], box[2:], size, resized, strict=True):
            assert abs(side * shown / extent - resized_side) <= 0.51, "pixels of the resized image"
        means = torch.nn.functional.avg_pool2d(torch.stack([ours, (theirs(image) * STD + MEAN) * 255]), 8)
        assert (means[0] - means[1]).abs().mean() < 4, file
        moved = means[:, :, :, 1:]  # by 8 pixels
        assert (means[0, :, :, :-1] - moved[1]).abs().mean() > 8, "the comparison would notice"


@pytest.mark.parametrize("size", [224, (224, 96), (96, 224)])
def test_centre_boxes_never_leave_the_image(size):
    heights, widths = np.array([5, 300, 224, 1]), np.array([900, 300, 10, 1])
    boxes = center_boxes(heights, widths, size, 1.0)
    assert (
        (boxes[:, :2] >= 0).all()
        and (boxes[:, 0] + boxes[:, 2] <= heights).all()
        and (boxes[:, 1] + boxes[:, 3] <= widths).all()
    )
    height, width = both_sides(size)
    np.testing.assert_allclose(boxes[1, 2:], [300 * min(height / width, 1), 300 * min(width / height, 1)])
    np.testing.assert_allclose(boxes[:, 2] * width, boxes[:, 3] * height)


def test_several_betons_are_one_data_set(photo_beton, photo_files, tmp_path):
    with BetonReader(photo_beton) as reader:
        spec = reader.spec
        classes, scores = reader.label_maps(np.arange(24))
    records = [pack(c, s, spec) for c, s in zip(classes, scores, strict=True)]
    images = [file.read_bytes() for file in photo_files]
    for name, part in (("a", slice(0, 7)), ("b", slice(7, 24))):
        write(tmp_path / f"part-{name}.beton", images[part], records[part], spec)
    with Loader(photo_beton, 8, image_size=48, grid=3) as one:
        base, order = collect(one)
    for paths in (tmp_path / "part-*.beton", [tmp_path / "part-a.beton", tmp_path / "part-b.beton"]):
        with Loader(paths, 8, image_size=48, grid=3) as several:
            seen, ids = collect(several)
            assert "image-0.jpg" in several.samples.name(7) and "part-b" in several.samples.name(7)
        assert ids == order
        # Packing dequantised scores again moves them by less than one step of 255.
        assert all(torch.equal(seen[s][0], base[s][0]) and (seen[s][1] - base[s][1]).abs().max() < 0.02 for s in order)
    other = write(
        tmp_path / "other.beton", images[:2], [cell_record(MapSpec(1, 2, 2, 4), 2, 2)] * 2, MapSpec(1, 2, 2, 4)
    )
    with pytest.raises(ValueError, match="other.beton"):
        Loader([photo_beton, other], 2)


def test_without_label_maps_there_are_no_targets(photo_files, photo_beton, tmp_path):
    path = write(tmp_path / "plain.beton", [file.read_bytes() for file in photo_files[:4]])
    with Loader(path, 2, image_size=32) as loader:
        batch = next(iter(loader))
        assert batch.targets is None and loader.num_classes == 4 and set(batch.labels.tolist()) <= set(range(4))
    with Loader(photo_beton, 2, image_size=32, token_labels=False) as loader:
        assert next(iter(loader)).targets is None


# --- errors and endings


def damaged(source, target, sample, share):
    """A copy of the beton with 64 bytes of one JPEG overwritten, beginning at `share` of its length."""
    data = bytearray(source.read_bytes())
    with BetonReader(source) as reader:
        picture = bytes(reader.image(sample))
    offset = bytes(data).index(picture) + int(len(picture) * share)
    data[offset : offset + 64] = bytes(64)
    target.write_bytes(data)
    return target


def test_an_image_that_cannot_be_decoded_names_its_sample_within_five_seconds(photo_beton, tmp_path):
    path = damaged(photo_beton, tmp_path / "damaged.beton", 11, 0.0)
    with Loader(path, 4, image_size=32, grid=2) as loader:
        for _ in range(2):  # DALI's pipeline is rebuilt, so the second epoch behaves the same
            start = time.monotonic()
            with pytest.raises(DecodeError, match=r"sample 11 \(image-11.jpg\) of .*damaged.beton"):
                collect(loader)
            assert time.monotonic() - start < 5
        assert loader.batch(np.array([0, 1, 2, 3])).images.shape == (4, 3, 32, 32)


def test_changed_bytes_are_found_by_their_crc(photo_beton, tmp_path):
    """No JPEG decoder notices bytes changed among the pixels; the CRC does."""
    path = damaged(photo_beton, tmp_path / "damaged.beton", 11, 0.5)
    with (
        Loader(path, 4, image_size=32, grid=2, check=True) as loader,
        pytest.raises(BetonError, match=r"damaged.beton.*11"),
    ):
        collect(loader)
    with Loader(photo_beton, 4, image_size=32, grid=2, check=True) as loader:
        assert len(collect(loader)[1]) == 24


def test_an_error_in_a_kernel_or_the_reader_surfaces(photo_beton, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("broken kernel")

    for owner, name in ((cpu, "augment"), (cpu, "warped_targets"), (BetonReader, "label_maps"), (BetonReader, "image")):
        with monkeypatch.context() as patch, Loader(photo_beton, 4, image_size=32, grid=2) as loader:
            patch.setattr(owner, name, fail)
            start = time.monotonic()
            with pytest.raises(ZeroDivisionError, match="broken kernel"):
                collect(loader)
            assert time.monotonic() - start < 5


def test_leaving_the_loop_early_leaks_nothing(photo_beton, tmp_path, monkeypatch):
    path = tmp_path / "copy.beton"
    path.write_bytes(photo_beton.read_bytes())
    before = set(threading.enumerate())
    with Loader(path, 4, image_size=32, grid=2, threads=2) as loader:
        whole = collect(loader)[1]
        working = len(threading.enumerate())
        for _ in range(20):
            for batch in loader:
                break
        produced, produce = [], loader._produce
        with monkeypatch.context() as patch:
            patch.setattr(loader, "_produce", lambda *arguments: produced.append(arguments) or produce(*arguments))
            for batch in loader:
                break
            started = len(produced)
            time.sleep(0.2)
        # The first batch and at most the `prefetch` after it were begun; nothing goes on once the loop is left.
        assert len(produced) == started <= 3 and len(threading.enumerate()) == working
        assert collect(loader)[1] == whole  # nothing of the abandoned epochs is left in DALI's queues
        held, copies = [], []
        for batch in loader:  # what was handed out is never written again, within the epoch or after it
            held.append(batch)
            copies.append(batch.images.clone())
        collect(loader)
        assert all(torch.equal(batch.images, copy) for batch, copy in zip(held, copies, strict=True))
    del loader, batch, held
    gc.collect()
    assert set(threading.enumerate()) <= before
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert str(path) not in [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()]


def test_a_loader_that_is_dropped_ends_its_threads(photo_beton):
    before = set(threading.enumerate())
    loader = Loader(photo_beton, 4, image_size=32, grid=2, threads=2)
    next(iter(loader))
    threads = set(threading.enumerate()) - before
    assert threads
    del loader
    gc.collect()
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 25}, "do not fill"),
        ({"batch_size": 0}, "batch_size"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"order": "random"}, "order must be one of .'shuffled', 'grouped'., got 'random'"),
        ({"order": "grouped", "batch_size": 25}, "do not fill"),
        ({"device": "mps"}, "device must be"),
        ({"device": "cuda:99"}, "CUDA devices that torch can use"),
        ({"geometry": "diagonal"}, "geometry"),
        ({"targets_dtype": "float16"}, "targets_dtype must be float32 or bfloat16, got 'float16'"),
        ({"decode": "mixed"}, "with device='cuda' alone"),
        ({"decode": "gpu"}, "decode must be one of"),
        ({"crop_pct": 0.0}, "crop_pct"),
        ({"image_size": (224, 0)}, "image_size must be at least 1 pixel"),
        ({"image_size": 3 * (224,)}, r"a whole number or two, \(height, width\), got \(224, 224, 224\)"),
        ({"grid": (14.0, 14)}, r"a whole number or two.*got \(14.0, 14\)"),
        ({"grid": 0}, "grid must be at least 1 token"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"paths": "nothing-*.beton"}, "to_beton.py"),
    ],
)
def test_settings_that_cannot_work_are_refused(photo_beton, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Loader(**({"paths": photo_beton, "batch_size": 4} | options))


def test_epochs_and_steps_outside_their_range_are_refused(photo_beton):
    with Loader(photo_beton, 4, image_size=32) as loader:
        for epoch, step in ((-1, 0), (0, 7), (0, -1)):
            with pytest.raises(ValueError, match="start_step <= stop_step <= 6"):
                loader.set_epoch(epoch, step)
        with pytest.raises(ValueError, match="sample ids"):
            loader.batch(np.array([24]))


def test_batches_stay_whole_as_long_as_they_are_held(photo_beton):
    """Memory of batches is written again once nobody refers to it, and not before: also a view keeps it."""
    with Loader(photo_beton, 4, image_size=32, grid=2) as loader:
        held = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            for batch in loader:
                view = batch.images[1:, 0], batch.targets[-1]
                held.append((view, tuple(part.clone() for part in view)))
                del batch
        assert all(torch.equal(part, copy) for view, copies in held for part, copy in zip(view, copies, strict=True))
        arrays = loader._maker.buffers.allocated
        held.clear()
        del view
        for batch in loader:
            pass
        assert loader._maker.buffers.allocated == arrays  # those of the first epochs were enough
