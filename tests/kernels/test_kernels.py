"""CPU kernels against the golden targets, torchvision's RoIAlign, a slow oracle and Pillow."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.ops import roi_align

from tests import reference
from tl_fast.kernels import cpu
from tl_fast.kernels.geometry import cpu as warp
from tl_fast.maths import compile as jit
from tl_fast.maths import scalar
from tl_fast.maths.ycbcr import pixels_of

CASES = ["small", "nosmooth", "rect_map", "grid24", "imagenet"]


@pytest.mark.parametrize("case", CASES)
def test_token_targets_equal_the_golden_file(golden, case):
    with np.load(golden / "token_targets.npz") as file:
        data = {name.split(".")[1]: file[name] for name in file.files if name.startswith(case + ".")}
    targets = cpu.token_targets(
        data["index"].astype(np.uint16),
        data["scores"].astype(np.float32),
        data["boxes"],
        data["flip"],
        int(data["num_classes"]),
        int(data["grid"]),
        float(data["smoothing"]),
    )
    assert targets.dtype == np.float32
    np.testing.assert_allclose(targets, data["target"], rtol=0, atol=1e-5)


def random_maps(rng, batch, k, rows, columns, num_classes):
    """Label maps with k distinct classes a cell, some scores negative."""
    order = np.argsort(rng.random((batch, num_classes, rows, columns)), axis=1)
    classes = np.ascontiguousarray(order[:, :k]).astype(np.uint16)
    return classes, rng.normal(2, 4, classes.shape).astype(np.float32)


def random_crops(rng, batch):
    size = rng.uniform(0.02, 1, (batch, 2))
    return np.concatenate([rng.uniform(0, 1, (batch, 2)) * (1 - size), size], axis=1).astype(np.float32)


@pytest.mark.parametrize(
    "rows, columns, grid",
    [(18, 18, 14), (7, 11, 5), (30, 5, 3), (2, 2, 4), (40, 40, 2), (18, 18, (6, 8)), (9, 5, (7, 2))],
)
def test_token_targets_equal_torchvision_roi_align(eager, rows, columns, grid):
    rng = np.random.default_rng(rows * 100 + columns)
    batch, k, num_classes, smoothing = 12, 4, 21, 0.1
    classes, scores = random_maps(rng, batch, k, rows, columns, num_classes)
    # Crops of at least a cell: torchvision's Python fallback, used where its C++ operators are missing, does not zero
    # the sampling points that the minimum extent pushes outside the map. (At exactly one cell the number of points
    # would hang on rounding.) The golden file and the oracle cover the thin ones.
    size = np.maximum(rng.uniform(0.02, 1, (batch, 2)), [1.05 / rows, 1.05 / columns])
    crops = np.concatenate([rng.uniform(0, 1, (batch, 2)) * (1 - size), size], axis=1).astype(np.float32)
    flips = rng.random(batch) < 0.5
    dense = torch.zeros(batch, num_classes, rows, columns).scatter_(
        1, torch.from_numpy(classes.astype(np.int64)), torch.from_numpy(scores)
    )
    top, left, height, width = (torch.from_numpy(crops[:, i]) for i in range(4))
    boxes = torch.stack([left * columns, top * rows, (left + width) * columns, (top + height) * rows], 1) - 0.5
    boxes = torch.cat([torch.arange(batch)[:, None].float(), boxes], 1)
    expected = []
    for bins in (1, grid):
        values = roi_align(dense, boxes, bins, aligned=False)
        values[torch.from_numpy(flips)] = values[torch.from_numpy(flips)].flip(3)
        expected.append(values.flatten(2).transpose(1, 2))
    probabilities = torch.cat(expected, 1).softmax(-1)
    off = smoothing / num_classes
    expected = (probabilities * (1 - smoothing + off) + off).numpy()
    targets = cpu.token_targets(classes, scores, crops, flips, num_classes, grid, smoothing)
    np.testing.assert_allclose(targets, expected, rtol=0, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    k=st.integers(1, 4),
    extra=st.integers(0, 5),
    grid=st.integers(1, 5) | st.tuples(st.integers(1, 5), st.integers(1, 5)),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    outside=st.booleans(),
)
def test_token_targets_equal_the_slow_oracle(seed, rows, columns, k, extra, grid, smoothing, outside):
    rng = np.random.default_rng(seed)
    classes, scores = random_maps(rng, 2, k, rows, columns, k + extra)
    crops, flips = random_crops(rng, 2), np.array([False, True])
    if outside:  # maps that cover the centre square only are asked for boxes beyond them
        crops[:, :2] -= 0.4
    expected = reference.token_targets(classes, scores, crops, flips, k + extra, grid, smoothing)
    targets = cpu.token_targets(classes, scores, crops, flips, k + extra, grid, smoothing)
    # A sampling point within rounding of RoIAlign's -1 cell cut-off may fall on either side of it.
    assert np.quantile(np.abs(targets - expected), 0.9 if outside else 1.0) <= 2e-5


def test_token_targets_survive_many_classes_and_large_scores():
    classes = np.array([65534, 0], np.uint16).reshape(1, 2, 1, 1)
    scores = np.array([120.0, -120.0], np.float32).reshape(1, 2, 1, 1)
    targets = cpu.token_targets(classes, scores, np.array([[0, 0, 1, 1]], np.float32), np.array([False]), 65535, 1, 0.0)
    assert np.isfinite(targets).all() and targets[0, 0, 65534] == pytest.approx(1.0) and targets[0, 1, 0] == 0.0


def test_token_targets_of_fully_listed_negative_scores():
    """k = C, as imported maps may have it: nothing is unlisted, so no class at 0 outweighs the rest."""
    classes = np.arange(3, dtype=np.uint16).reshape(1, 3, 1, 1)
    scores = np.array([-200.0, -201.0, -300.0], np.float32).reshape(1, 3, 1, 1)
    targets = cpu.token_targets(classes, scores, np.array([[0, 0, 1, 1]], np.float32), np.array([False]), 3, 1, 0.0)
    np.testing.assert_allclose(targets[0, 0], [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0], rtol=1e-5, atol=1e-7)


def test_a_number_is_the_grid_of_a_square():
    rng = np.random.default_rng(0)
    classes, scores = random_maps(rng, 4, 3, 7, 9, 12)
    affines = np.concatenate([rng.normal(0.4, 0.3, (2, 6)), [[0.7, 0, 0.1, 0, 0.6, 0.2], [-0.5, 0, 0.9, 0, 1, 0]]])
    square, pair = (cpu.warped_targets(classes, scores, affines, 12, grid, 0.1) for grid in (3, (3, 3)))
    np.testing.assert_array_equal(square, pair)


@pytest.mark.parametrize("num_classes", [255, 256, 257, 271])
def test_rows_written_past_the_caches_end_where_they_should(num_classes):
    rng = np.random.default_rng(num_classes)
    classes, scores = random_maps(rng, 2, 3, 4, 4, num_classes)
    crops, flips = random_crops(rng, 2), np.array([False, True])
    expected = reference.token_targets(classes, scores, crops, flips, num_classes, 2, 0.1)
    for before in range(17):  # floats between the array's beginning and a cache line's
        memory = np.full(before + expected.size + 20, 7, np.float32)
        out = memory[before : before + expected.size].reshape(expected.shape)
        cpu.token_targets(classes, scores, crops, flips, num_classes, 2, 0.1, out)
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)
        assert (memory[:before] == 7).all() and (memory[before + expected.size :] == 7).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"classes": np.zeros((1, 2, 3, 3), np.int64)}, "uint16"),
        ({"scores": np.zeros((1, 2, 3, 4), np.float32)}, "scores"),
        ({"classes": np.full((1, 2, 3, 3), 5, np.uint16)}, "class 5"),
        ({"scores": np.full((1, 2, 3, 3), np.nan, np.float32)}, "finite"),
        ({"crops": np.array([[0, 0, 0, 1]], np.float32)}, "height and width > 0"),
        ({"crops": np.array([[0, np.nan, 1, 1]], np.float32)}, "finite"),
        ({"flips": np.zeros(2, bool)}, "flips"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"grid": 0}, "grid"),
        ({"grid": (2, 0)}, "grid"),
        ({"grid": (2, 3), "out": np.empty((1, 5, 5), np.float32)}, "out must be"),
        ({"out": np.empty((1, 5, 4), np.float32)}, "out must be"),
        ({"out": np.empty((1, 5, 10), np.float32)[:, :, ::2]}, "contiguous"),
    ],
)
def test_token_targets_refuse_what_does_not_fit(change, message):
    arguments = {
        "classes": np.zeros((1, 2, 3, 3), np.uint16),
        "scores": np.zeros((1, 2, 3, 3), np.float32),
        "crops": np.array([[0, 0, 1, 1]], np.float32),
        "flips": np.zeros(1, bool),
        "num_classes": 5,
        "grid": 2,
        "smoothing": 0.1,
    }
    with pytest.raises(ValueError, match=message):
        cpu.token_targets(**(arguments | change))


def margin(extent: float, size: int) -> int:
    """Pixels beyond a box that the filters read, and one."""
    return int(np.ceil(2 * max(extent / size, 1))) + 1


def resample(region, origin, image_size, box, flip, size, interpolation=scalar.BILINEAR):
    """Of the decoded region whose first pixel is `origin` of an image of `image_size` (height, width)."""
    out = np.empty((3, *size), np.uint8)
    box = tuple(float(side) for side in box)
    pixels = pixels_of(region, *origin)
    warp.resample(pixels, *image_size, box, flip, interpolation, np.zeros(3, np.uint8), out)
    return out


def resampled(image: Image.Image, box, flip, size, interpolation):
    """The decoded region alone, as the loader has it. box: (top, left, height, width)."""
    pixels = np.array(image)
    top, left, height, width = box
    y0, x0 = max(int(top) - margin(height, size[0]), 0), max(int(left) - margin(width, size[1]), 0)
    y1, x1 = int(np.ceil(top + height)) + margin(height, size[0]), int(np.ceil(left + width)) + margin(width, size[1])
    region = np.ascontiguousarray(pixels[y0:y1, x0:x1])
    return resample(region, (y0, x0), pixels.shape[:2], box, flip, size, interpolation)


def pillows(image: Image.Image, box, size, interpolation) -> np.ndarray:
    """Pillow's `resize(box=...)`, uint8 [3, H, W]. box: (top, left, height, width). In two steps: filtered along x
    first, as by any Pillow; since version 13 it filters some images along y first."""
    top, left, height, width = box
    kind = Image.Resampling.BICUBIC if interpolation == scalar.BICUBIC else Image.Resampling.BILINEAR
    image = image.resize((size[1], image.height), kind, box=(left, 0, left + width, image.height))
    return np.asarray(image.resize((size[1], size[0]), kind, box=(0, top, size[1], top + height))).transpose(2, 0, 1)


@pytest.mark.parametrize("interpolation", [scalar.BILINEAR, scalar.BICUBIC])
@pytest.mark.parametrize("size", [(224, 224), (96, 160), (31, 7)])
def test_resample_is_pillows_to_the_bit(photos, size, interpolation):
    rng = np.random.default_rng(0)
    files = sorted(photos.glob("*/*/*.jpg"))
    assert len(files) == 116
    for n, file in enumerate(files[::3]):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        height, width = rng.uniform(8, image.height), rng.uniform(8, image.width)
        if n % 2:  # training crops are whole pixels, evaluation boxes are not
            height, width = round(height), round(width)
        top, left = rng.uniform(0, image.height - height), rng.uniform(0, image.width - width)
        if n % 2:
            top, left = int(top), int(left)
        ours = resampled(image, (top, left, height, width), n % 3 == 0, size, interpolation)
        theirs = pillows(image, (top, left, height, width), size, interpolation)
        if n % 3 == 0:
            theirs = theirs[:, :, ::-1]
        if n % 2:
            np.testing.assert_array_equal(ours, theirs, file.name)
        else:  # Pillow takes the box as float32
            assert np.abs(ours - theirs.astype(int)).max() <= 1, file.name


def test_resample_keeps_extreme_values_and_single_pixels():
    for value in (0, 255):
        out = resample(np.full((1, 1, 3), value, np.uint8), (0, 0), (1, 1), (0, 0, 1, 1), False, (5, 7))
        assert (out == value).all()
        pixels = np.full((333, 77, 3), value, np.uint8)
        assert (resample(pixels, (0, 0), (333, 77), (0.3, 0.7, 300.2, 70.1), True, (5, 7)) == value).all()


@pytest.mark.parametrize(
    "origin, sides", [((1, 0), "rows"), ((0, 1), "columns"), ((-11, 0), "rows"), ((0, -11), "columns")]
)
def test_resample_refuses_a_region_that_lacks_pixels_of_the_box(origin, sides):
    with pytest.raises(ValueError, match=f"lacks {sides}"):
        resample(np.zeros((10, 10, 3), np.uint8), origin, (20, 20), (0, 0, 9, 9), False, (4, 4))


@pytest.mark.slow
def test_kernels_are_kept_on_disk_under_their_sources_content(tmp_path):
    """A second process loads what the first compiled; changed scalar maths would get a folder of its own."""
    script = (
        "import numpy as np, numba; before = numba.config.CACHE_DIR\n"
        "from tl_fast.kernels import cpu\n"
        "from tl_fast.maths.ycbcr import pixels_of\n"
        "assert numba.config.CACHE_DIR == before\n"
        "image, out, fill = np.zeros((4, 4, 3), np.uint8), np.empty((3, 2, 2), np.uint8), np.zeros(3, np.uint8)\n"
        "cpu.warp.resample(pixels_of(image, 0, 0), 4, 4, (0.0, 0.0, 4.0, 4.0), False, 0, fill, out)\n"
        "print(sum(cpu.warp.resample.stats.cache_hits.values()), sum(cpu.warp.resample.stats.cache_misses.values()))"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [run.stdout.split() for run in runs] == [["0", "1"], ["1", "0"]]
    (folder,) = (tmp_path / "tl_fast").iterdir()
    assert folder.name == Path(jit._cache_folder()).name
