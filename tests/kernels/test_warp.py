"""Images and label maps through affines: against Pillow, positions computed the long way, and RoIAlign by its
definition."""

import itertools
import math

import numpy as np
import pytest
from PIL import Image

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.data import auto_augment

from tests import reference
from tl_fast.kernels import cpu
from tl_fast.kernels.geometry import cpu as warp
from tl_fast.kernels.geometry import taps
from tl_fast.kernels.targets.crops import affines_of_crops
from tl_fast.maths import scalar
from tl_fast.maths.ycbcr import pixels_of
from tl_fast.plan import records as plan
from tl_fast.plan.rand_augment import OPS
from tl_fast.system.sides import both_sides

THEIRS = {
    "Rotate": auto_augment.rotate,
    "ShearX": auto_augment.shear_x,
    "ShearY": auto_augment.shear_y,
    "TranslateX": auto_augment.translate_x_rel,
    "TranslateY": auto_augment.translate_y_rel,
}
RESAMPLING = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
FILL = np.array([124, 116, 104], np.uint8)
SIZE = 112
RECTANGLE = 80, 144
SHAPES = pytest.mark.parametrize("shape", [(SIZE, SIZE), RECTANGLE, RECTANGLE[::-1]], ids=str)


@pytest.fixture(scope="module")
def images(photos) -> list[Image.Image]:
    """Photos of 4:3, 3:4, square and odd sizes."""
    chosen = []
    for n, file in enumerate(sorted(photos.glob("*/*/*.jpg"))[::13]):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        chosen.append([image, image.crop((0, 0, 301, 173)), image.resize((224, 224)), image.resize((640, 480))][n % 4])
    return chosen


def record(crop, flip, operations, interpolation, shape=(SIZE, SIZE)) -> np.ndarray:
    """One plan for outputs of `shape`: crop = (top, left, height, width), `operations` = [(name, argument)] after crop
    and flip."""
    plans = plan.of_boxes(np.array([crop], float), interpolation)
    affine = (-1.0, 0.0, 1.0, 0.0, 1.0, 0.0) if flip else (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
    for n, (name, argument) in enumerate(operations):
        affine = scalar.compose(*affine, OPS.index(name), argument, shape[1] / shape[0])
        plans["ops"][0, n], plans["arguments"][0, n] = OPS.index(name), argument
    top, left, height, width = crop
    plans["flip"] = flip
    plans["affine"][0] = np.array(affine) * [width, width, width, height, height, height] + [0, 0, left, 0, 0, top]
    return plans


def show(pixels: np.ndarray, plans: np.ndarray, size=SIZE, fill=FILL, decoded="needed") -> np.ndarray:
    """uint8 [h, w, 3] through the one plan -> [3, *size]. decoded: "needed", as the loader does, "all", or
    "garbage" around it."""
    height, width = pixels.shape[:2]
    (start,), (stop,) = warp.needed(plans, np.array([height]), np.array([width]), size)
    assert (start >= 0).all() and (start < stop).all() and (stop <= [height, width]).all()
    origin = 0, 0
    if decoded == "needed":
        pixels, origin = pixels[start[0] : stop[0], start[1] : stop[1]], start
    elif decoded == "garbage":
        inside = pixels[start[0] : stop[0], start[1] : stop[1]].copy()
        pixels = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
        pixels[start[0] : stop[0], start[1] : stop[1]] = inside
    out = np.full((3, *both_sides(size)), 99, np.uint8)
    region = np.ascontiguousarray(pixels)
    cpu.augment(pixels_of(region, *origin), height, width, plans[0], np.asarray(fill, np.uint8), out)
    return out


def whole(image: Image.Image) -> tuple[int, int, int, int]:
    return 0, 0, image.height, image.width


# --- single operations


@pytest.mark.parametrize("interpolation", [0, 1], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "name, pixels", [("TranslateX", 30), ("TranslateX", -13), ("TranslateY", 7), ("TranslateY", -50)]
)
def test_whole_pixel_translations_are_pillows_within_one_level(images, name, pixels, interpolation):
    for image, flip in itertools.product(images, (False, True)):
        resized = image.resize((SIZE, SIZE), RESAMPLING[interpolation])
        resized = resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else resized
        theirs = THEIRS[name](resized, pixels / SIZE, fillcolor=tuple(FILL), resample=RESAMPLING[interpolation])
        ours = show(np.asarray(image), record(whole(image), flip, [(name, pixels / SIZE)], interpolation))
        assert np.abs(ours.transpose(1, 2, 0) - np.asarray(theirs, int)).max() <= 1


@pytest.mark.parametrize("interpolation", [0, 1], ids=["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "name, argument",
    [
        ("Rotate", 27.0),
        ("Rotate", -13.3),
        ("Rotate", 90.0),
        ("Rotate", 200.0),
        ("ShearX", 0.3),
        ("ShearX", -0.11),
        ("ShearY", 0.27),
        ("ShearY", -0.3),
    ],
)
@SHAPES
def test_rotation_and_shear_are_pillows(images, name, argument, interpolation, shape):
    """A whole image, resized and then transformed as by Pillow. Both round in between; Pillow's bilinear transform then
    cuts fractions off, ours rounds them. 2 levels, 3 bicubic; at the edge of the fill fixed point and floating point
    may disagree about a pixel."""
    for image in images:
        resized = image.resize(shape[::-1], RESAMPLING[interpolation])
        theirs = np.asarray(
            THEIRS[name](resized, argument, fillcolor=tuple(FILL), resample=RESAMPLING[interpolation]), int
        )
        plans = record(whole(image), False, [(name, argument)], interpolation, shape)
        ours = show(np.asarray(image), plans, shape).transpose(1, 2, 0)
        off = np.abs(ours - theirs).max(axis=2)
        limit = 3 if interpolation else 2
        assert (off > limit).mean() < 1e-3 and off[off <= limit].mean() < 1, (off > limit).sum()


@pytest.mark.parametrize("interpolation", [0, 1], ids=["bilinear", "bicubic"])
def test_any_translation_is_pillows_resize_of_the_moved_box(images, interpolation):
    """Resampled once, and what lies beyond the crop is shown: no fill inside the image."""
    rng = np.random.default_rng(0)
    for image in images * 2:
        height, width = rng.integers(40, 120, 2)
        top, left = rng.integers(0, image.height - height + 1), rng.integers(0, image.width - width + 1)
        moved = rng.uniform([0, 0], [image.height - height, image.width - width])
        operations = [("TranslateY", (moved[0] - top) / height), ("TranslateX", (moved[1] - left) / width)]
        ours = show(np.asarray(image), record((top, left, height, width), False, operations, interpolation)).transpose(
            1, 2, 0
        )
        box = (moved[1], moved[0], moved[1] + width, moved[0] + height)
        theirs = np.asarray(image.resize((SIZE, SIZE), RESAMPLING[interpolation], box=box), int)
        assert np.abs(ours - theirs).max() <= 1


# --- all together


def random_operations(rng, strength: float = 1.0) -> list[tuple[str, float]]:
    ranges = {"Rotate": 30, "ShearX": 0.3, "ShearY": 0.3, "TranslateX": 0.45, "TranslateY": 0.45}
    return [
        (name, float(strength * rng.uniform(-ranges[name], ranges[name])))
        for name in rng.choice(list(ranges), rng.integers(1, 4))
    ]


def random_crop(rng, height, width) -> tuple[int, int, int, int]:
    h, w = rng.integers(1, height + 1), rng.integers(1, width + 1)
    return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), int(h), int(w)


def output_to_source(crop, flip, operations, shape) -> np.ndarray:
    """3 x 3 matrix from output pixels, `shape` (rows, columns) of them, to source pixels: each operation's matrix as
    timm hands it to Pillow, multiplied the long way."""
    (top, left, height, width), (rows, columns) = crop, shape
    matrix = np.array([[width / columns, 0, left], [0, height / rows, top], [0, 0, 1.0]])
    if flip:
        matrix = matrix @ [[-1, 0, columns], [0, 1, 0], [0, 0, 1.0]]
    for name, argument in operations:
        step = np.eye(3)
        if name == "Rotate":
            angle = -math.radians(argument)
            step[:2, :2] = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
            centre = np.array([columns, rows]) / 2
            step[:2, 2] = centre - step[:2, :2] @ centre
        else:
            element = {"ShearX": (0, 1), "ShearY": (1, 0), "TranslateX": (0, 2), "TranslateY": (1, 2)}[name]
            step[element] = argument * {"TranslateX": columns, "TranslateY": rows}.get(name, 1)
        matrix = matrix @ step
    return matrix


def positions(matrix: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Source (y, x) of the output pixels' centres, float64 [rows, columns] each."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    x, y, _ = np.einsum("ij,jkl->ikl", matrix, np.stack([x, y, np.ones_like(x)]))
    return y, x


@SHAPES
@pytest.mark.parametrize("interpolation", [0, 1], ids=["bilinear", "bicubic"])
def test_composed_operations_are_pillows_transform_of_pillows_resize(images, interpolation, shape):
    """The image resized by Pillow at the crop's scale, then one transform with the matrix of crop, flip and all
    operations."""
    rng = np.random.default_rng(1)
    compared = 0
    for n, image in enumerate(images * 4):
        height, width = (int(rng.integers(side // 3, side + 1)) for side in (image.height, image.width))
        crop = (
            int(rng.integers(0, image.height - height + 1)),
            int(rng.integers(0, image.width - width + 1)),
            height,
            width,
        )
        operations, flip = [*random_operations(rng), ("Rotate", 5.0)], n % 2 == 0
        ours = show(np.asarray(image), record(crop, flip, operations, interpolation, shape), shape).transpose(1, 2, 0)
        # A canvas of whole pixels around the crop, as far as the image goes.
        scale_y, scale_x = height / shape[0], width / shape[1]
        above, before = int(crop[0] / scale_y), int(crop[1] / scale_x)
        rows = shape[0] + above + int((image.height - crop[0] - height) / scale_y)
        columns = shape[1] + before + int((image.width - crop[1] - width) / scale_x)
        top, left = crop[0] - above * scale_y, crop[1] - before * scale_x
        box = (left, top, min(left + columns * scale_x, image.width), min(top + rows * scale_y, image.height))
        canvas = image.resize((columns, rows), RESAMPLING[interpolation], box=box)
        matrix = output_to_source(crop, flip, operations, shape)
        to_canvas = np.diag([1 / scale_x, 1 / scale_y, 1]) @ np.array([[1, 0, -left], [0, 1, -top], [0, 0, 1]]) @ matrix
        data = tuple(to_canvas[:2].ravel())
        theirs = np.asarray(canvas.transform(shape[::-1], Image.Transform.AFFINE, data, RESAMPLING[interpolation]), int)
        y, x = positions(to_canvas, shape)
        inside = (y > 3) & (y < rows - 3) & (x > 3) & (x < columns - 3)  # where the canvas is not cut
        assert np.abs(ours - theirs)[inside].max(initial=0) <= (3 if interpolation else 2)
        compared += inside.sum()
    assert compared > 0.4 * len(images) * 4 * math.prod(shape)


@SHAPES
def test_positions_are_those_of_the_drawn_operations(shape):
    """Images that encode their coordinates: each pixel of the full recipe's geometry shows its own place, or fill where
    that is outside."""
    n, height, width = 60, 180, 240
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([y, x, 0 * y], axis=2).astype(np.uint8)
    augment = plan.Augment(scale=(0.2, 1.0), interpolation="random", auto_augment="rand-n4-m9-mstd0.5-inc1")
    plans = plan.draw(7, 0, np.arange(n), np.full(n, height), np.full(n, width), augment, shape[1] / shape[0])
    geometric = [OPS.index(name) for name in THEIRS]
    outside_seen, means = 0, []
    for b in range(n):
        p = plans[b : b + 1].copy()
        operations = [
            (OPS[op], float(a)) for op, a in zip(p["ops"][0], p["arguments"][0], strict=True) if op in geometric
        ]
        p["ops"] = scalar.NO_OP  # the colours are not for this test
        crop = tuple(int(p[name][0]) for name in ("top", "left", "height", "width"))
        y, x = positions(output_to_source(crop, bool(p["flip"][0]), operations, shape), shape)
        out = show(ramp, p, shape, fill=(0, 0, 255)).astype(int)
        # Pixels of the output to the image's edge, negative outside.
        border = np.minimum(
            np.minimum(y, height - y) / crop[2] * shape[0], np.minimum(x, width - x) / crop[3] * shape[1]
        )
        assert (out[2][border < -0.01] == 255).all() and (out[2][border > 0.01] == 0).all()
        inside = border > 3
        for channel, expected in enumerate((y - 0.5, x - 0.5)):
            off = (out[channel] - expected)[inside]
            # Rounded twice where rotated or sheared, and Pillow's cubic there (a = -1) bends a ramp by a tenth of its
            # step.
            assert np.abs(off).max(initial=0) <= 1.5
            if off.size > 1000:
                means.append(off.mean())
        outside_seen += (border < -0.01).sum()
    assert outside_seen > 0.01 * n * math.prod(shape)
    # Half a pixel of the output is 0.3 to 1.1 levels, in every sample. Where a crop is a whole number of times as large
    # as the output, all integers are at one and the same distance and round one and the same way: by half a level.
    assert len(means) > 100 and np.max(np.abs(means)) <= 0.5 and np.mean(np.abs(means)) < 0.03


def test_fill_is_where_the_image_is_not():
    """Flat images of any size: each pixel is the image's grey or fill, by where its centre falls."""
    rng = np.random.default_rng(2)
    seen = np.zeros(2, int)
    for height, width in [(1, 1), (1, 9), (13, 2), (3, 3), (30, 40), (61, 47)]:
        for n in range(60):
            crop, operations, flip = random_crop(rng, height, width), random_operations(rng, 1 + n % 3), bool(n % 2)
            size = tuple(rng.integers(1, 40, 2).tolist())
            y, x = positions(output_to_source(crop, flip, operations, size), size)
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            nearest = np.minimum(np.minimum(np.abs(y), np.abs(height - y)), np.minimum(np.abs(x), np.abs(width - x)))
            sure = nearest > 1e-4 * max(height, width)
            out = show(
                np.full((height, width, 3), 10, np.uint8),
                record(crop, flip, operations, n % 4 // 2, size),
                size,
                (200, 201, 202),
            )
            for c in range(3):
                assert (out[c][sure] == np.where(inside, 10, 200 + c)[sure]).all(), (
                    height,
                    width,
                    crop,
                    flip,
                    operations,
                    size,
                )
            seen += np.bincount(inside.ravel(), minlength=2)
    assert seen.min() > 10_000


def test_the_image_reaches_to_its_edge_where_a_canvas_pixels_centre_lies_on_it():
    """A crop 2 pixels wide, 1 from the edge, shown 13 wide: the edge is at -6.5 of its pixels, and rounding may put it
    on either side of their centres."""
    crop, operation, size = (2, 1, 1, 2), ("ShearX", -0.57), (13, 13)
    y, x = positions(output_to_source(crop, False, [operation], size), size)
    inside = (y >= 0) & (y < 3) & (x >= 0) & (x < 3)
    out = show(np.full((3, 3, 3), 10, np.uint8), record(crop, False, [operation], 0, size), size, (200, 200, 200))
    assert 0 < inside.sum() < inside.size and (out == np.where(inside, 10, 200)).all()


@pytest.mark.parametrize(
    "operations", [[("TranslateX", 3.0)], [("TranslateY", -2.5)], [("Rotate", 20.0), ("TranslateX", -4.5)]], ids=str
)
@pytest.mark.parametrize("interpolation", [0, 1])
def test_an_image_moved_out_of_sight_is_all_fill(images, operations, interpolation):
    for pixels in (np.asarray(images[0]), np.zeros((1, 1, 3), np.uint8)):
        out = show(pixels, record((0, 0, *pixels.shape[:2]), False, operations, interpolation))
        assert (out == FILL[:, None, None]).all()


def test_what_is_decoded_is_all_that_is_read():
    """Only the needed region, the whole image, or the whole with garbage outside of the region: the same output."""
    rng = np.random.default_rng(3)
    regions = []
    for height, width in [(1, 1), (1, 30), (25, 2), (5, 4), (40, 30), (75, 100), (224, 160)]:
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        n = 60
        text = "rand-n3-m9-mstd3-p0.7-inc1" if height % 2 else "rand-n2-m20-mmax30-mstd101-p0.8-inc1"
        augment = plan.Augment(scale=(0.01, 1.0), ratio=(0.3, 3.0), interpolation="random", auto_augment=text)
        plans = plan.draw(1, 0, np.arange(n), np.full(n, height), np.full(n, width), augment)
        plans["ops"] = scalar.NO_OP
        for b in range(n):
            p, size = plans[b : b + 1], (1, (7, 3), 16, (9, 33), (64, 40))[b % 5]
            alone = show(pixels, p, size)
            for decoded in ("all", "garbage"):
                assert (show(pixels, p, size, decoded=decoded) == alone).all(), (height, width, size, p)
            (start,), (stop,) = warp.needed(p, np.array([height]), np.array([width]), size)
            regions.append((stop - start).prod() / (height * width))
    assert np.mean(regions) < 0.9  # or nothing is shown by this


def test_evaluation_boxes_with_bicubic_are_pillows(images):
    for image in images:
        side = min(image.size) * 0.875
        top, left = (image.height - side) / 2, (image.width - side) / 2
        out = show(np.asarray(image), plan.of_boxes(np.array([[top, left, side, side]]), scalar.BICUBIC)).transpose(
            1, 2, 0
        )
        theirs = np.asarray(image.resize((SIZE, SIZE), RESAMPLING[1], box=(left, top, left + side, top + side)), int)
        assert np.abs(out - theirs).max() <= 1


def test_the_vectors_weights_are_the_scalar_ones():
    for d in np.linspace(0, 1, 33):
        for weights, expected in ((taps.CUBIC, scalar.cubic_weights(d)), (taps.LINEAR, (1 - d, d))):
            ours = [sum(factor * d**power for power, factor in enumerate(factors)) for factors in weights]
            np.testing.assert_allclose(ours, expected, atol=1e-12)


# --- label maps


def random_maps(rng, k, rows, columns, num_classes):
    """Label maps [2, k, rows, columns] with k distinct classes a cell."""
    order = np.argsort(rng.random((2, num_classes, rows, columns)), axis=1)
    classes = np.ascontiguousarray(order[:, :k]).astype(np.uint16)
    return classes, rng.normal(2, 4, classes.shape).astype(np.float32)


def softmax(logits: np.ndarray, smoothing: float) -> np.ndarray:
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p * (1 - smoothing + smoothing / logits.shape[1]) + smoothing / logits.shape[1]


def slow_targets(classes, scores, affine, num_classes, grid, smoothing, cut) -> np.ndarray:
    """One map's targets [1 + h*w, C] of grid (h, w): RoIAlign's points of each bin of the output, mapped to the map,
    averaged."""
    rows, columns = classes.shape[1:]
    dense = reference.dense_map(classes, scores, num_classes)
    matrix = np.asarray(affine, float).reshape(2, 3) * [[columns], [rows]]
    start = matrix[:, 2] - 0.5
    sides = []
    for side in matrix[:, :2].T:
        length = np.hypot(*side)
        if length < 1:  # RoIAlign's least extent, here about the middle
            start, side = start - side * (1 / length - 1) / 2, side / length
        sides.append(side)
    logits = []
    for bins_y, bins_x in ((1, 1), grid):
        counts = [math.ceil(max(np.hypot(*sides[n]), 1) / bins) for n, bins in enumerate((bins_x, bins_y))]
        for i, j in np.ndindex(bins_y, bins_x):
            total = np.zeros(num_classes)
            for sy, sx in np.ndindex(counts[1], counts[0]):
                x, y = (
                    start
                    + sides[0] * (j + (sx + 0.5) / counts[0]) / bins_x
                    + sides[1] * (i + (sy + 0.5) / counts[1]) / bins_y
                )
                if not cut or (-0.5 <= y <= rows - 0.5 and -0.5 <= x <= columns - 0.5):
                    total += reference._interpolate(dense, y, x)
            logits.append(total / (counts[0] * counts[1]))
    return softmax(np.array(logits), smoothing)


def map_affine(rng, strength=1.0, thin=False) -> np.ndarray:
    """A crop of the unit square, mirrored half the time, rotated and sheared."""
    height, width = rng.uniform(0.02, 0.1, 2) if thin else rng.uniform(0.3, 1, 2)
    top, left = rng.uniform(0, 1 - height), rng.uniform(0, 1 - width)
    crop, flip = (top, left, height, width), rng.random() < 0.5
    matrix = output_to_source(crop, flip, random_operations(rng, strength), (1.0, 1.0))
    return matrix[:2].reshape(6).astype(np.float32)


@pytest.mark.parametrize(
    "rows, columns, grid, thin",
    [
        (18, 18, 5, False),
        (7, 11, 3, False),
        (4, 3, 4, False),
        (1, 1, 2, False),
        (9, 14, 2, True),
        (18, 13, (3, 5), False),
        (9, 14, (4, 1), True),
    ],
)
@pytest.mark.parametrize("cut", [False, True])
def test_warped_targets_are_roi_align_by_its_definition(rows, columns, grid, thin, cut):
    rng = np.random.default_rng(rows)
    sides = (grid, grid) if isinstance(grid, int) else grid
    off, nothing = [], 0
    for _ in range(8):
        classes, scores = random_maps(rng, 3, rows, columns, 7)
        affines = np.stack([map_affine(rng, thin=thin), map_affine(rng, 2.5, thin)])
        if not affines[:, [1, 3]].any(axis=1).all():
            continue
        targets = cpu.warped_targets(classes, scores, affines, 7, grid, 0.1, cut=cut)
        for b in range(2):
            expected = slow_targets(classes[b], scores[b], affines[b], 7, sides, 0.1, cut)
            off.append(np.abs(targets[b] - expected).max(axis=1))
            nothing += (np.ptp(expected, axis=1) == 0).sum()
    off = np.concatenate(off)
    # A point within rounding of RoIAlign's cut-off a cell outside may fall on either side of it.
    assert (off > 2e-5).mean() <= 0.01 and off.size >= 8 * (1 + math.prod(sides))
    assert thin or rows == 1 or nothing > 0


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_quarter_turns_are_the_turned_maps_targets(turns, flip):
    """The way of rotated maps against the way along the axes, of a map turned by numpy. The crop is 9.2 cells wide: at
    whole numbers the number of sampling points hangs on rounding."""
    rng = np.random.default_rng(turns)
    classes, scores = random_maps(rng, 3, 10, 10, 9)
    turned = [np.ascontiguousarray(np.rot90(part, turns, axes=(2, 3))) for part in (classes, scores)]
    expected = cpu.token_targets(
        *turned, np.array([[0.04, 0.04, 0.92, 0.92]] * 2, np.float32), np.array([flip] * 2), 9, 4, 0.1
    )
    x, y = (
        np.array({1: [0, -1, 1], 2: [-1, 1e-7, 1], 3: [0, 1, 0]}[turns]),
        np.array({1: [1, 0, 0], 2: [0, -1, 1], 3: [-1, 0, 1]}[turns]),
    )
    if flip:
        x, y = (np.array([-row[0], row[1], row[2] + row[0]]) for row in (x, y))
    affine = np.concatenate([row * 0.92 + [0, 0, 0.04] for row in (x, y)])
    targets = cpu.warped_targets(classes, scores, np.stack([affine.astype(np.float32)] * 2), 9, 4, 0.1)
    np.testing.assert_allclose(targets, expected, atol=1e-4)


def test_both_ways_agree_where_rotation_vanishes():
    rng = np.random.default_rng(5)
    for _ in range(20):
        classes, scores = random_maps(rng, 3, 10, 12, 7)
        # 2.4 cells a bin and more: far from where the number of points changes.
        crops = np.array([[0.1, 0.15, 0.74, 0.62], [0.0, 0.3, 0.93, 0.7]], np.float32) * rng.uniform(0.99, 1.0)
        flips = rng.random(2) < 0.5
        affines = affines_of_crops(crops, flips)
        straight = cpu.warped_targets(classes, scores, affines, 7, 3, 0.1)
        affines[:, 1] = affines[:, 3] = 1e-7
        np.testing.assert_allclose(cpu.warped_targets(classes, scores, affines, 7, 3, 0.1), straight, atol=1e-4)


@pytest.mark.parametrize("case", ["small", "rect_map", "imagenet"])
def test_affines_along_the_axes_give_the_golden_targets(golden, case):
    with np.load(golden / "token_targets.npz") as file:
        data = {name.split(".")[1]: file[name] for name in file.files if name.startswith(case + ".")}
    affines = []
    for (top, left, height, width), flip in zip(data["boxes"], data["flip"], strict=True):
        affines.append([-width, 0, left + width, 0, height, top] if flip else [width, 0, left, 0, height, top])
    targets = cpu.warped_targets(
        data["index"].astype(np.uint16),
        data["scores"].astype(np.float32),
        np.array(affines, np.float32),
        int(data["num_classes"]),
        int(data["grid"]),
        float(data["smoothing"]),
        cut=False,
    )
    np.testing.assert_allclose(targets, data["target"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("slant", [0.0, 0.1])
def test_tokens_outside_the_map_know_nothing(slant):
    rng = np.random.default_rng(6)
    classes, scores = random_maps(rng, 3, 6, 6, 5)
    affine = np.array([[1, slant, 1.3, slant, 1, 0.0], [1, slant, 0.0, slant, 1, -2.5]], np.float32)
    uniform = 1 / 5 * (1 - 0.1 + 0.1 / 5) + 0.1 / 5
    np.testing.assert_allclose(cpu.warped_targets(classes, scores, affine, 5, 4, 0.1), uniform, atol=1e-7)


@pytest.mark.parametrize(
    "affines", [np.zeros((2, 5), np.float32), np.zeros((1, 6), np.float32), np.full((2, 6), np.nan, np.float32)]
)
def test_affines_that_do_not_fit_are_refused(affines):
    with pytest.raises(ValueError, match="affines must be finite"):
        cpu.warped_targets(np.zeros((2, 1, 3, 3), np.uint16), np.zeros((2, 1, 3, 3), np.float32), affines, 2, 2, 0.1)
