"""The CUDA kernels against their njit twins, Pillow's arithmetic and the golden targets.

tests/kernels/test_cuda.py runs this file in numba's simulator, on small odd shapes, in processes of its own; its tests
marked gpu run these functions on real sizes.
"""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch

from tests import yuv_planes
from tl_fast.kernels import cpu, cuda, cuda_launch
from tl_fast.kernels.colour import cpu as colour
from tl_fast.kernels.cuda_device import SIMULATED, scalar32
from tl_fast.kernels.geometry import cpu as warp
from tl_fast.kernels.geometry import cuda as cuda_geometry
from tl_fast.labelmaps import format as labelmap
from tl_fast.labelmaps import loops as maps
from tl_fast.maths import scalar
from tl_fast.maths.ycbcr import pixels_of
from tl_fast.plan import records as plan
from tl_fast.plan.rand_augment import OPS
from tl_fast.system.sides import both_sides

if SIMULATED:
    # The simulator polls its threads without ever waiting: each barrier would cost them Python's 5 ms a turn.
    sys.setswitchinterval(1e-4)  # seconds

FILL = (124, 116, 104)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of a target: the GPU fuses multiplications with additions, and its exponential is another.
TOLERANCE = 2e-6 if SIMULATED else 1e-5
COLOURS = [op for op in range(scalar.HUE + 1) if scalar.changes_colours(op)]
ARGUMENTS = {
    scalar.POSTERIZE: 3.0,
    scalar.SOLARIZE: 100.0,
    scalar.SOLARIZE_ADD: 60.0,
    scalar.COLOR: 1.63,
    scalar.CONTRAST: 0.37,
    scalar.BRIGHTNESS: 1.44,
    scalar.SHARPNESS: 1.9,
    scalar.ADD: -20.6,
    scalar.SATURATE: 1.37,
    scalar.HUE: -31.3,
}


def put(array):
    """A copy on the device; `get` brings back what is changed there."""
    return array.copy() if SIMULATED else cuda.cuda.to_device(array)


def get(array) -> np.ndarray:
    return array if isinstance(array, np.ndarray) else array.copy_to_host()


# --- token targets


def random_maps(rng, batch, k, rows, columns, num_classes):
    order = np.argsort(rng.random((batch, num_classes, rows, columns)), axis=1)
    classes = np.ascontiguousarray(order[:, :k]).astype(np.uint16)
    return classes, rng.normal(2, 4, classes.shape).astype(np.float32)


def rotated(rng, batch) -> np.ndarray:
    """Affines that turn, shear and mirror, some beyond the map."""
    affines = rng.normal(0, 0.4, (batch, 6)).astype(np.float32)
    affines[:, [2, 5]] += 0.5
    return affines


def check_warped(classes, scores, affines, num_classes, grid, cut):
    expected = cpu.warped_targets(classes, scores, affines, num_classes, grid, 0.1, cut=cut)
    out = put(np.full(expected.shape, 7, np.float32))
    cuda.warped_targets(put(classes), put(scores), affines, num_classes, grid, 0.1, out, cut)
    assert_targets(get(out), expected)


@pytest.mark.parametrize(
    "batch, k, rows, columns, num_classes, grid",
    [
        (2, 3, 5, 7, 37, 3),
        (1, 1, 1, 1, 3, 2),
        (1, 5, 9, 9, 1000, 2),
        (2, 2, 3, 3, 8, 2),
        (1, 3, 2, 2, 3, 2),
        (1, 2, 13, 3, 6, 1),
        (2, 2, 5, 7, 9, (2, 3)),
        (1, 2, 6, 4, 9, (4, 1)),
    ],
)
def test_targets_equal_the_cpus(batch, k, rows, columns, num_classes, grid):
    """Boxes, some thinner than a cell, mirrored ones, rotated ones cut at the edge and not."""
    rng = np.random.default_rng(rows * columns)
    classes, scores = random_maps(rng, batch, k, rows, columns, num_classes)
    size = rng.uniform(0.02, 1, (batch, 2))
    crops = np.concatenate([rng.uniform(0, 1, (batch, 2)) * (1 - size), size], axis=1).astype(np.float32)
    flips = np.arange(batch) % 2 == 0
    expected = cpu.token_targets(classes, scores, crops, flips, num_classes, grid, 0.1)
    out = put(np.full(expected.shape, 7, np.float32))
    assert cuda.token_targets(put(classes), put(scores), put(crops), put(flips), num_classes, grid, 0.1, out) is out
    assert_targets(get(out), expected)
    for cut in (True, False):
        check_warped(classes, scores, rotated(rng, batch), num_classes, grid, cut)


@pytest.mark.parametrize("case", ["small"] if SIMULATED else ["small", "nosmooth", "rect_map", "grid24", "imagenet"])
def test_targets_equal_the_golden_file(golden, case):
    with np.load(golden / "token_targets.npz") as file:
        data = {name.split(".")[1]: file[name] for name in file.files if name.startswith(case + ".")}
    some = slice(2, 3) if SIMULATED else slice(None)  # a crop thinner than a cell
    out = put(np.full(data["target"][some].shape, 7, np.float32))
    cuda.token_targets(
        put(data["index"][some].astype(np.uint16)),
        put(data["scores"][some].astype(np.float32)),
        put(data["boxes"][some]),
        put(data["flip"][some]),
        int(data["num_classes"]),
        int(data["grid"]),
        float(data["smoothing"]),
        out,
    )
    np.testing.assert_allclose(get(out), data["target"][some], rtol=0, atol=1e-5)


def test_targets_of_fully_listed_negative_scores():
    """k = C: nothing is unlisted, so no class at 0 outweighs the rest."""
    classes = np.arange(3, dtype=np.uint16).reshape(1, 3, 1, 1)
    scores = np.array([-200.0, -201.0, -300.0], np.float32).reshape(1, 3, 1, 1)
    out = put(np.full((1, 2, 3), 7, np.float32))
    cuda.warped_targets(put(classes), put(scores), np.array([[1, 0, 0, 0, 1, 0]], np.float32), 3, 1, 0.0, out)
    np.testing.assert_allclose(get(out)[0], [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0]] * 2, rtol=1e-5, atol=1e-7)


def pack_batch(rng, listed, spec) -> tuple[list[bytes], np.ndarray]:
    """One map for each number of different classes in `listed`, encoded, and (score_min, score_step)."""
    encoded, ranges = [], []
    for n in listed:
        chosen = rng.choice(spec.num_classes, n, replace=False)
        ranks = np.argsort(rng.random((spec.height, spec.width, n)), axis=2)[:, :, : spec.k]
        ranks.reshape(-1)[:n] = np.arange(n) if spec.k == 1 else ranks.reshape(-1)[:n]
        record = labelmap.pack(
            chosen[ranks].transpose(2, 0, 1), rng.normal(2, 3, (spec.k, spec.height, spec.width)), spec
        )
        encoded.append(labelmap.encode(record, spec))
        ranges.append((record["score_min"], record["score_step"]))
    return encoded, np.array(ranges, np.float32)


def run_packed(encoded, ranges, affines, spec, grid, dtype=np.float32, cut=True):
    ends = np.cumsum([0] + [len(data) for data in encoded])
    bounds = np.stack([ends[:-1], ends[1:]], axis=1).astype(np.int64)
    out = put(np.full((len(encoded), 1 + math.prod(both_sides(grid)), spec.num_classes), 7, dtype))
    errors = put(np.zeros(len(encoded), np.int32))
    data = put(np.frombuffer(b"".join(encoded), np.uint8))
    cuda.packed_targets(data, put(bounds), put(ranges), put(affines), spec, grid, 0.1, cut, out, errors)
    return get(out), get(errors)


def unpacked(encoded, ranges, spec) -> tuple[np.ndarray, np.ndarray]:
    """Classes and scores of encoded maps, [B, k, H, W], as the CPU's loader reads them."""
    batch, sizes = len(encoded), labelmap.encoded_sizes(spec)
    lengths = np.array([len(part) for part in encoded], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
    classes, scores = np.empty((batch, spec.cells), np.uint16), np.empty((batch, spec.cells), np.float32)
    data, low, step = np.frombuffer(b"".join(encoded), np.uint8).copy(), ranges[:, 0].copy(), ranges[:, 1].copy()
    assert maps.read_maps(
        data, starts, lengths, low, step, labelmap.LEVELS, spec.num_classes, sizes, classes, scores
    ) == (batch, 0)
    return classes.reshape(batch, *spec.shape), scores.reshape(batch, *spec.shape)


def assert_targets(out, expected):
    """float32 within `TOLERANCE`; bfloat16, as uint16, the same numbers rounded once more: neighbours where float32
    differs in its last bit."""
    if out.dtype == np.uint16:
        rounded = torch.from_numpy(expected).bfloat16().float().numpy()
        out = torch.from_numpy(out.view(np.int16)).view(torch.bfloat16).float().numpy()
        np.testing.assert_allclose(out, rounded, rtol=2**-7, atol=1e-9)
        assert (out != rounded).sum() <= max(1, 0.01 * out.size)
    else:
        np.testing.assert_allclose(out, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "num_classes, listed, dtype",
    [
        (640, [40, 200, 300, 600], np.float32),
        (37, [20, 37, 9, 5], np.float32),
        (37, [20, 9], np.uint16),
        (40, [20, 37, 5], np.uint16),
    ],
)
def test_targets_from_a_betons_bytes(num_classes, listed, dtype):
    """All three layouts; bfloat16 (uint16) rounds the same numbers once more, and has rows of 40 classes written 16
    bytes at a time."""
    rng = np.random.default_rng(num_classes)
    side = 25 if num_classes > 600 else 5
    spec = labelmap.MapSpec(k=1 if num_classes > 600 else 3, height=side, width=side, num_classes=num_classes)
    encoded, ranges = pack_batch(rng, listed, spec)
    if num_classes > 600:
        assert {len(data) for data in encoded} == set(labelmap.encoded_sizes(spec))
    classes, scores = unpacked(encoded, ranges, spec)
    batch = len(encoded)
    affines = rotated(rng, batch)
    affines[::2] = [[0.6, 0, 0.3, 0, 0.4, 0.1]]
    if num_classes > 600:
        affines[:, [0, 1, 3, 4]] *= 0.3  # the simulator takes its time over every cell
    grid = 1 if num_classes > 600 else 2
    expected = cpu.warped_targets(classes, scores, affines, num_classes, grid, 0.1)
    out, errors = run_packed(encoded, ranges, affines, spec, grid, dtype)
    assert not errors.any()
    assert_targets(out, expected)


@pytest.mark.parametrize("kind", ["arrays", "bytes"])
@pytest.mark.parametrize("dtype", [np.float32, np.uint16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "num_classes, rows, columns, grid",
    [
        (3, 1, 1, 2),
        (37, 3, 2, 2),
        (9, 4, 5, (2, 3)),
        (9, 5, 2, (3, 1)),
        (1000, 1, 1, 1),
        (1000, 2, 3, 2),
        (21841, 2, 1, 1),
    ],
)
def test_targets_of_every_source_and_number(kind, dtype, num_classes, rows, columns, grid):
    """One sample; few and many classes, whole vectors a row and not; mirrored, then rotated."""
    rng = np.random.default_rng(num_classes)
    spec = labelmap.MapSpec(k=2, height=rows, width=columns, num_classes=num_classes)
    encoded, ranges = pack_batch(rng, [min(num_classes, 7)], spec)
    classes, scores = unpacked(encoded, ranges, spec)
    for affines in (np.array([[-0.7, 0, 0.8, 0, 0.9, 0.05]], np.float32), rotated(rng, 1)):
        expected = cpu.warped_targets(classes, scores, affines, num_classes, grid, 0.1)
        if kind == "bytes":
            out, errors = run_packed(encoded, ranges, affines, spec, grid, dtype)
            assert not errors.any()
        else:
            out = put(np.full(expected.shape, 7, dtype))
            cuda.warped_targets(put(classes), put(scores), affines, num_classes, grid, 0.1, out)
        assert_targets(get(out), expected)


def test_damaged_maps_are_found_and_touch_nothing_else():
    """Codes as `maps.expand` has them; the sample's targets are NaN, its neighbours' are right."""
    rng = np.random.default_rng(0)
    spec = labelmap.MapSpec(k=2, height=6, width=6, num_classes=203)
    encoded, ranges = pack_batch(rng, [12] * 6, spec)
    plain, sizes = 3 * spec.cells, labelmap.encoded_sizes(spec)
    assert len(encoded[0]) == sizes[1] < plain
    damaged = list(encoded)
    damaged[1] = encoded[1] + b"\0"  # no layout is so long
    bitmap = bytearray(encoded[2])
    bitmap[25] |= 1 << 7  # class 207 of 203
    damaged[2] = bytes(bitmap)
    place = bytearray(encoded[3])
    place[26 + 5] = 250
    damaged[3] = bytes(place)
    damaged[4] = b"\xff" * plain
    affines = np.tile(np.array([[0.9, 0, 0.05, 0, 0.8, 0.1]], np.float32), (6, 1))
    out, errors = run_packed(damaged, ranges, affines, spec, 2)
    ends = [0, 5]
    right, none = run_packed([encoded[b] for b in ends], ranges[ends], affines[ends], spec, 2)
    assert not none.any() and errors.tolist() == [0, maps.BAD_SIZE, maps.BAD_BITMAP, maps.BAD_INDEX, maps.BAD_CLASS, 0]
    for b, data in enumerate(damaged):
        assert (
            maps.expand(np.frombuffer(data, np.uint8).copy(), spec.num_classes, sizes, np.empty(spec.cells, np.uint16))
            == errors[b]
        )
        assert np.isnan(out[b]).all() if errors[b] else (out[b] == right[ends.index(b)]).all()


def test_a_class_beyond_the_last_is_refused():
    classes, scores = np.full((1, 1, 1, 1), 5, np.uint16), np.zeros((1, 1, 1, 1), np.float32)
    with pytest.raises(ValueError, match="num_classes 5"):
        cuda.warped_targets(put(classes), put(scores), np.array([[1, 0, 0, 0, 1, 0]], np.float32), 5, 1, 0.0)


@pytest.mark.parametrize(
    "change", [{"scores": np.zeros((1, 1, 1, 1))}, {"out": np.zeros((1, 2, 5), np.float16)}], ids=["float64", "float16"]
)
def test_targets_refuse_other_numbers(change):
    """Their bits would be taken for float32's."""
    arrays = {
        "classes": np.zeros((1, 1, 1, 1), np.uint16),
        "scores": np.zeros((1, 1, 1, 1), np.float32),
        "out": np.zeros((1, 2, 5), np.float32),
    }
    classes, scores, out = (put(array) for array in (arrays | change).values())
    with pytest.raises(ValueError, match="must be float32, got float"):
        cuda.warped_targets(classes, scores, np.array([[1, 0, 0, 0, 1, 0]], np.float32), 5, 1, 0.0, out)


# --- images


def picture(rng, height, width) -> np.ndarray:
    """Smooth with edges: where every pixel is another, one pixel's difference in a position is many levels."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / rng.uniform(3, 9) + y / rng.uniform(3, 9) + n) for n in range(3)], 2)
    blocks = rng.integers(-60, 60, (height // 6 + 1, width // 6 + 1, 3)).repeat(6, 0).repeat(6, 1)[:height, :width]
    return np.clip(128 + 70 * waves + blocks, 0, 255).astype(np.uint8)


def make_batch(images, plans, size) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Decoded regions one after the other from an odd address on, REGION records, and the CPU's output."""
    heights, widths = (np.array([image.shape[n] for image in images]) for n in (0, 1))
    starts, stops = warp.needed(plans, heights, widths, size)
    regions, parts, offset = np.zeros(len(images), cuda.REGION), [np.zeros(3, np.uint8)], 3
    expected = np.full((len(images), 3, *both_sides(size)), 99, np.uint8)
    for b, image in enumerate(images):
        part = np.ascontiguousarray(image[starts[b, 0] : stops[b, 0], starts[b, 1] : stops[b, 1]])
        regions[b] = (offset, *part.shape[:2], *starts[b], *image.shape[:2], 0)
        parts.append(part.ravel())
        offset += part.size
        pixels, fill = pixels_of(part, *starts[b].tolist()), np.array(FILL, np.uint8)
        cpu.augment(pixels, *image.shape[:2], plans[b], fill, expected[b])
    return np.concatenate(parts), regions, expected


def augmented(pixels, regions, plans, size, out=None, **options) -> np.ndarray | torch.Tensor:
    """out: a host array to put on the device first, or a tensor there, which is written and returned as it is."""
    batch = len(plans)
    if not isinstance(out, torch.Tensor):
        out = put(np.full((batch, 3, *both_sides(size)), 99, np.uint8) if out is None else out)
    scratch = put(np.full(cuda.scratch_bytes(batch, *both_sides(size), bool(options)), 77, np.uint8))
    cuda.augment(put(pixels), put(regions), put(plans), FILL, out, scratch=scratch, **options)
    return out if isinstance(out, torch.Tensor) else get(out)


def affine_plans(count, crop, interpolation, operations=(), aspect=1.0) -> np.ndarray:
    plans = plan.of_boxes(np.array([crop] * count, float), interpolation)
    affine = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    for n, (name, argument) in enumerate(operations):
        affine = scalar.compose(*affine, OPS.index(name), argument, aspect)
        plans["ops"][:, n], plans["arguments"][:, n] = OPS.index(name), argument
    top, left, height, width = crop
    plans["affine"] = np.array(affine) * [width, width, width, height, height, height] + [0, 0, left, 0, 0, top]
    return plans


def assert_close(out, expected, share=2e-3):
    """Within a level; at the edge of the fill float32 and float64 may disagree about a pixel."""
    off = np.abs(out.astype(int) - expected)
    assert (off > 1).mean() <= share and off[off <= 1].mean() < 0.1, ((off > 1).mean(), off.max())


@pytest.mark.parametrize("interpolation", [0, 1], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "crop, operations",
    [
        ((3, 5, 30, 40), []),
        ((0, 0, 1, 1), []),
        ((7, 2, 1, 33), []),
        ((0, 0, 41, 57), [("TranslateX", 0.4)]),
        ((2, 3, 33, 41), [("TranslateY", -0.31)]),
        ((4, 4, 30, 44), [("Rotate", 27.0)]),
        ((0, 0, 41, 57), [("Rotate", -80.0), ("ShearX", 0.3)]),
        ((9, 9, 20, 20), [("ShearY", -0.3), ("ShearX", 0.3)]),
        ((6, 6, 20, 20), [("ShearX", -0.6)]),
    ],
)
def test_geometry_is_the_cpus_within_a_level(crop, operations, interpolation):
    """Small and large scales, thin crops, beyond the image, a canvas pixel's centre on the image's edge; 35 pixels are
    more than a tile."""
    size = 13 if operations and operations[0][0] in ("TranslateX", "TranslateY", "ShearY") else 35
    plans = affine_plans(1, crop, interpolation, operations)
    pixels, regions, expected = make_batch([picture(np.random.default_rng(1), 41, 57)], plans, size)
    assert_close(augmented(pixels, regions, plans, size), expected)


@pytest.mark.parametrize("size", [(19, 35), (35, 11)], ids=str)
@pytest.mark.parametrize("operations", [[], [("Rotate", 27.0), ("ShearY", 0.2)]], ids=["axes", "rotated"])
def test_geometry_of_rectangles_is_the_cpus_within_a_level(size, operations):
    plans = affine_plans(1, (4, 4, 30, 44), 1, operations, size[1] / size[0])
    pixels, regions, expected = make_batch([picture(np.random.default_rng(4), 41, 57)], plans, size)
    assert_close(augmented(pixels, regions, plans, size), expected)


def test_flipped_crops():
    rng = np.random.default_rng(2)
    plans = plan.draw(0, 0, np.arange(3), np.full(3, 40), np.full(3, 31), plan.Augment(flip=1.0))
    pixels, regions, expected = make_batch([picture(rng, 40, 31) for _ in range(3)], plans, 17)
    assert_close(augmented(pixels, regions, plans, 17), expected)


# Settings of `cuda_geometry.build` with room for so little that images are made in parts.
SMALL_KERNELS = {
    "small": dict(buffer=36, table=8, canvas_size=25),
    "bands": dict(buffer=90, table=16, canvas_size=60),
    "pixel by pixel": dict(buffer=3, table=1, canvas_size=25),
}


def use_kernel(monkeypatch, **settings):
    function = cuda_geometry.build(tile=8, lines=6, **settings)
    show = dataclasses.replace(cuda_launch.KERNELS["images: geometry"], function=function)
    monkeypatch.setitem(cuda_launch.KERNELS, "images: geometry", show)
    monkeypatch.setattr(cuda_geometry, "TILE", 8)


@pytest.mark.parametrize("settings", SMALL_KERNELS.values(), ids=SMALL_KERNELS)
@pytest.mark.parametrize("operations", [[], [("Rotate", 30.0)]], ids=["axes", "rotated"])
def test_what_does_not_fit_is_done_in_parts(monkeypatch, settings, operations):
    use_kernel(monkeypatch, **settings)
    plans = affine_plans(1, (1, 2, 33, 30), 1, operations)
    pixels, regions, expected = make_batch([picture(np.random.default_rng(3), 36, 35)], plans, 9)
    assert_close(augmented(pixels, regions, plans, 9), expected)


def as_planes(pixels, regions, planes) -> tuple[np.ndarray, np.ndarray]:
    """`make_batch`'s pixels and regions, with the planes of each image in place of its RGB where `planes` has some."""
    regions, parts, offset = regions.copy(), [np.zeros(5, np.uint8)], 5
    for region, image in zip(regions, planes, strict=True):
        start, shape = (region["top"], region["left"]), (region["rows"], region["columns"])
        if image is None:
            part = pixels[region["offset"] :][: 3 * shape[0] * shape[1]]
        else:
            part = yuv_planes.cut(image, start, (start[0] + shape[0], start[1] + shape[1]))
        region["offset"], region["planes"] = offset, image is not None
        parts.append(part)
        offset += part.size
    return np.concatenate(parts), regions


def check_planes(planes, plans, size):
    """The kernel's images from planes are those from the RGB that libjpeg shows, to the bit; every third is RGB."""
    shown = [yuv_planes.shown(image) for image in planes]
    pixels, regions, expected = make_batch(shown, plans, size)
    from_rgb = augmented(pixels, regions, plans, size)
    assert_close(from_rgb, expected)
    mixed = [None if b % 3 == 2 else image for b, image in enumerate(planes)]
    from_planes = augmented(*as_planes(pixels, regions, mixed), plans, size)
    narrow = np.array([image.shape[1] < 5 for image in shown])  # which are filtered pixel by pixel, and so rounded
    np.testing.assert_array_equal(from_planes[~narrow], from_rgb[~narrow])
    assert (np.abs(from_planes[narrow].astype(int) - from_rgb[narrow]) <= 1).all()


def test_planes_are_shown_as_libjpegs_pixels():
    """Crops at every corner and edge of images with odd and even sides, some of one or two pixels; mirrored, rotated,
    bilinear and bicubic, smaller and larger than the output; all in one batch, with RGB between them."""
    rng, size = np.random.default_rng(7), (9, 12)
    sides = [(21, 15), (20, 16), (21, 16), (1, 5), (2, 6), (2, 3), (1, 1), (5, 4)]
    crops = [(0, 0, 8, 7), (12.5, 8.5, 8.5, 6.5), (0, 9, 15, 6), (13, 0, 8, 15), (3.3, 4.7, 4.1, 3.2), (0, 0, 21, 15)]
    plans, planes = [], []
    for n, (height, width) in enumerate(sides):
        inside = [crop for crop in crops if crop[0] + crop[2] <= height and crop[1] + crop[3] <= width]
        for m, crop in enumerate(inside or [(0, 0, height, width)]):
            operations = [("Rotate", 31.0), ("ShearX", 0.2)] if (n + m) % 4 == 3 else []
            plans.append(affine_plans(1, crop, (n + m) % 2, operations, size[1] / size[0]))
            planes.append(
                yuv_planes.random_planes(rng, height, width)
                if m % 2
                else yuv_planes.planes_of(picture(rng, height, width))
            )
    augment = plan.Augment(flip=1.0, interpolation="random")
    plans.append(plan.draw(0, 0, np.arange(3), np.full(3, 21), np.full(3, 16), augment))
    planes += [yuv_planes.random_planes(rng, 21, 16) for _ in range(3)]
    check_planes(planes, np.concatenate(plans), size)


@pytest.mark.parametrize("settings", SMALL_KERNELS.values(), ids=SMALL_KERNELS)
def test_planes_that_do_not_fit_are_done_in_parts(monkeypatch, settings):
    use_kernel(monkeypatch, **settings)
    plans = np.concatenate([affine_plans(1, (1, 2, 12, 8), 1), affine_plans(1, (1, 2, 12, 8), 1, [("Rotate", 30.0)])])
    check_planes([yuv_planes.random_planes(np.random.default_rng(n), 14, 11) for n in range(2)], plans, 7)


def finished(images, plans, **options) -> np.ndarray | torch.Tensor:
    """The colours' kernel on outputs as they are: plans whose box is the image at its own size."""
    size = images.shape[2]
    pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).ravel()
    regions = np.zeros(len(images), cuda.REGION)
    for b in range(len(images)):
        regions[b] = (b * 3 * size * size, size, size, 0, 0, size, size, 0)
    return augmented(pixels, regions, plans, size, **options)


def colour_plans(chains, size) -> np.ndarray:
    plans = plan.of_boxes(np.array([[0, 0, size, size]] * len(chains), float))
    for b, chain in enumerate(chains):
        for n, op in enumerate(chain):
            plans["ops"][b, n], plans["arguments"][b, n] = op, ARGUMENTS.get(op, 0.0)
    return plans


@pytest.mark.parametrize("size", [2, 9, 12])
def test_colours_are_the_cpus_to_the_last_bit(size):
    """Every operation, and chains with sharpness once and twice; 12 x 12 pixels are read four at a time, 9 x 9 one at a
    time."""
    rng = np.random.default_rng(size)
    chains = [[op] for op in COLOURS]
    chains += [
        [scalar.SHARPNESS, scalar.ROTATE, scalar.SHARPNESS, scalar.EQUALIZE],
        [scalar.SOLARIZE, scalar.COLOR, scalar.AUTO_CONTRAST, scalar.CONTRAST],
        [scalar.BRIGHTNESS, scalar.SHARPNESS],
        [scalar.EQUALIZE, scalar.CONTRAST, scalar.POSTERIZE],
        [scalar.ADD, scalar.BRIGHTNESS, scalar.SATURATE, scalar.HUE, scalar.ROTATE, scalar.ADD],
        [scalar.SHARPNESS, scalar.HUE, scalar.SATURATE],
        [],
    ]
    images = np.stack([picture(rng, size, size).transpose(2, 0, 1) for _ in chains])
    images[2] = 77  # one value: nothing to stretch
    plans = colour_plans(chains, size)
    out = finished(images, plans)
    expected = images.copy()
    for image, record in zip(expected, plans, strict=True):
        colour.apply(image, record["ops"], record["arguments"])
    np.testing.assert_array_equal(out, expected)
    assert size == 2 or (out != images).any(axis=(1, 2, 3)).sum() > 8


@pytest.mark.parametrize("size", [6, 5])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "channels last"])
def test_normalised_output(size, kind, last):
    """(x / 255 - mean) / std of the uint8 output, rounded once."""
    rng = np.random.default_rng(size)
    images = np.stack([picture(rng, size, size).transpose(2, 0, 1) for _ in range(3)])
    plans = colour_plans([[], [scalar.SHARPNESS, scalar.CONTRAST], [scalar.INVERT]], size)
    whole = finished(images, plans)
    shape = (3, size, size, 3) if last else (3, 3, size, size)
    out = finished(
        images, plans, out=np.full(shape, 7, np.float16 if kind == torch.float16 else np.uint16), mean=MEAN, std=STD
    )
    got = torch.from_numpy(out.view(np.int16)).view(kind)
    got = got.permute(0, 3, 1, 2) if last else got
    mean, std = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (MEAN, STD))
    expected = ((torch.from_numpy(whole).double() / 255 - mean) / std).float().to(kind)
    assert torch.equal(got, expected)
    tensor = torch.full(whole.shape, 7, dtype=kind, device="cpu" if SIMULATED else "cuda")  # as training has it
    tensor = tensor.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert finished(images, plans, out=tensor, mean=MEAN, std=STD) is tensor
    assert torch.equal(tensor.cpu(), expected) and tensor.is_contiguous(memory_format=torch.channels_last) == last


def test_full_recipe():
    rng = np.random.default_rng(5)
    count, size = 5, 24
    images = [picture(rng, *rng.integers(20, 60, 2)) for _ in range(count)]
    augment = plan.Augment(auto_augment="rand-m9-mstd0.5-inc1", interpolation="random", erase=0.25)
    plans = plan.draw(
        11, 3, np.arange(count), np.array([i.shape[0] for i in images]), np.array([i.shape[1] for i in images]), augment
    )
    # Equalize and AutoContrast make many levels of one.
    plans["ops"][np.isin(plans["ops"], (scalar.EQUALIZE, scalar.AUTO_CONTRAST))] = scalar.INVERT
    pixels, regions, expected = make_batch(images, plans, size)
    off = np.abs(augmented(pixels, regions, plans, size).astype(int) - expected)
    assert (off > 3).mean() < 5e-3 and (off > 0).mean() < 0.1


@pytest.mark.parametrize("planes", [False, True], ids=["RGB", "planes"])
@pytest.mark.parametrize("operations", [[], [("Rotate", 20.0)]], ids=["axes", "rotated"])
def test_regions_that_lack_pixels_are_not_overrun(planes, operations):
    """A wrong region gives a wrong image, not a read beyond it: its bytes are 50, those around it other samples'."""
    plans = affine_plans(1, (0, 0, 40, 50), 1, operations)
    size = 10 * 12 + 2 * 8 * 8 if planes else 3 * 10 * 12
    pixels = np.full(200 + size, 255, np.uint8)
    pixels[200:] = 50
    regions = np.array([(200, 10, 12, 15, 20, 40, 50, planes)], cuda.REGION)
    out = augmented(pixels, regions, plans, 9)  # numpy raises for an index outside; on a GPU compute-sanitizer looks
    inside = yuv_planes.shown(tuple(np.full((1, 1), 50, np.uint8) for _ in range(3)))[0, 0] if planes else [50] * 3
    for channel, value, fill in zip(out[0], inside, FILL, strict=True):
        assert channel.max() <= 1.25 * max(value, fill)  # bicubic overshoots


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mean": MEAN}, "mean and std"),
        ({"mean": MEAN, "std": (1, 0, 1)}, "std > 0"),
        ({"fill": (1, 2, 300)}, "fill"),
        ({"out": np.zeros((1, 3, 4, 4), np.float32)}, "out must be uint8"),
        ({"out": np.zeros((1, 4, 4), np.uint8)}, "out must be"),
        ({"scratch": np.zeros(3, np.uint8)}, "scratch"),
        ({"plans": np.zeros(1, np.float32)}, "records"),
    ],
)
def test_augment_refuses_what_does_not_fit(change, message):
    arguments = {
        "pixels": np.zeros(48, np.uint8),
        "regions": np.array([(0, 4, 4, 0, 0, 4, 4, 0)], cuda.REGION),
        "plans": affine_plans(1, (0, 0, 4, 4), 0),
        "fill": FILL,
        "out": np.zeros((1, 3, 4, 4), np.uint8),
        "scratch": np.zeros(48, np.uint8),
    } | change
    arguments = {name: put(value) if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        cuda.augment(**arguments)


# --- masks


FILL = 1, 2, 3


def make_masks(masks, plans, size, ignore_index) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """As `make_batch`: regions of masks one after the other, and the CPU's outputs of the whole masks: classes, and
    images that were of 9s."""
    heights, widths = (np.array([mask.shape[n] for mask in masks]) for n in (0, 1))
    starts, stops = warp.needed(plans, heights, widths, size)
    regions, parts, offset = np.zeros(len(masks), cuda.REGION), [np.zeros(3, np.uint8)], 3
    expected = np.full((len(masks), *both_sides(size)), 99, np.uint8)
    images = np.full((len(masks), 3, *both_sides(size)), 9, np.uint8)
    for b, mask in enumerate(masks):
        part = mask[starts[b, 0] : stops[b, 0], starts[b, 1] : stops[b, 1]]
        regions[b] = (offset, *part.shape, *starts[b], *mask.shape, 0)
        parts.append(part.ravel())
        offset += part.size
        cpu.show_mask(mask, plans[b], ignore_index, expected[b], images[b], np.array(FILL, np.uint8))
    return np.concatenate(parts), regions, expected, images


@pytest.mark.parametrize("size", [(12, 20), (9, 7), (40, 24)], ids=str)
def test_masks_are_the_cpus_to_the_last_bit(size):
    """Crops smaller and larger than the output and beyond the mask, mirrored, rotated, and scales of exactly 1, 2 and
    1/2, at which centres lie on pixels' edges; 20 pixels a row are written four at a time, 63 in all one at a time."""
    rng = np.random.default_rng(0)
    rows, columns = size
    crops = [(0, 0, rows, columns), (1, 2, 2 * rows, 2 * columns), (4, 4, rows / 2, columns / 2), (3, 1, 33, 47)]
    plans = np.concatenate(
        [affine_plans(1, crop, 0) for crop in crops]
        + [
            affine_plans(1, (4, 4, 30, 44), 0, [("Rotate", angle), ("ShearX", 0.2)], columns / rows)
            for angle in (27, -80)
        ]
        + [plan.draw(0, 0, np.arange(3), np.full(3, 40), np.full(3, 50), plan.Augment(flip=1.0))]
    )
    plans["affine"][3] *= 1.7  # beyond the mask on the right and below
    masks = [rng.integers(0, 150, (40, 50)).astype(np.uint8) for _ in plans]
    bytes_of_regions, regions, expected, expected_images = make_masks(masks, plans, size, 200)
    out, images = put(np.full(expected.shape, 77, np.uint8)), put(np.full_like(expected_images, 9))
    cuda.show_masks(put(bytes_of_regions), put(regions), put(plans), 200, FILL, out, images)
    np.testing.assert_array_equal(get(out), expected)
    np.testing.assert_array_equal(get(images), expected_images)
    assert (expected[3] == 200).mean() > 0.3 and (expected[4] == 200).any() and (expected[-1] != 200).all()


def test_regions_of_masks_that_lack_pixels_are_not_overrun():
    plans = affine_plans(1, (0, 0, 40, 50), 1, [("Rotate", 20.0)])
    regions = np.array([(0, 10, 12, 15, 20, 40, 50, 0)], cuda.REGION)
    out, images = put(np.full((1, 9, 9), 77, np.uint8)), put(np.zeros((1, 3, 9, 9), np.uint8))
    cuda.show_masks(put(np.full(120, 50, np.uint8)), put(regions), put(plans), 255, FILL, out, images)
    assert set(np.unique(get(out))) == {50, 255}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"out": np.zeros((1, 3, 4, 4), np.uint8)}, "out must be uint8"),
        ({"out": np.zeros((1, 4, 4), np.int16)}, "out must be uint8"),
        (
            {"out": np.zeros((2, 4, 4), np.uint8), "images": np.zeros((2, 3, 4, 4), np.uint8)},
            "as many regions",
        ),
        ({"images": np.zeros((1, 3, 4, 5), np.uint8)}, "images must be uint8"),
        ({"fill": (0, 0, 256)}, "fill must be three numbers"),
        ({"ignore_index": 256}, "ignore_index in 0..255"),
        ({"regions": np.zeros(1, np.float32)}, "records"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change, message):
    arguments = {
        "masks": np.zeros(16, np.uint8),
        "regions": np.array([(0, 4, 4, 0, 0, 4, 4, 0)], cuda.REGION),
        "plans": affine_plans(1, (0, 0, 4, 4), 0),
        "ignore_index": 255,
        "fill": FILL,
        "out": np.zeros((1, 4, 4), np.uint8),
        "images": np.zeros((1, 3, 4, 4), np.uint8),
    } | change
    arguments = {name: put(value) if isinstance(value, np.ndarray) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        cuda.show_masks(**arguments)


# --- scalar maths


def test_float32_copies_of_scalar_hold_no_double():
    if not SIMULATED:
        pytest.skip(
            "compiled functions have no Python results to look at; tests/kernels/test_ptx.py looks at their code"
        )
    one = np.float32(1.3)
    results = [
        scalar32.filter_support(one, 5, 1),
        scalar32.filter_centre(3, one, one, 5),
        scalar32.filter_weight(2, 3, one, one, 5, 1),
        *scalar32.cubic_weights(np.float32(0.3)),
        scalar32.roi_point(1, 0, one, one, 14, 2),
        *scalar32.roi_tap(one, 5)[1:],
        scalar32.smooth(one, np.float32(0.1), 1000),
    ]
    assert {type(result) for result in results} == {np.float32}
