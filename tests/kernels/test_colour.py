"""Colour operations against timm and Pillow on photos: equal to the last bit, alone and in chains. mmsegmentation's
against colorsys and OpenCV."""

import colorsys
import importlib.util

import numpy as np
import pytest
from PIL import Image

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.data import auto_augment

from tests.needs import needs
from tl_fast.kernels.colour import cpu as colour
from tl_fast.maths import scalar
from tl_fast.plan.rand_augment import OPS

THEIRS = {
    "AutoContrast": auto_augment.auto_contrast,
    "Equalize": auto_augment.equalize,
    "Invert": auto_augment.invert,
    "Posterize": auto_augment.posterize,
    "Solarize": auto_augment.solarize,
    "SolarizeAdd": auto_augment.solarize_add,
    "Color": auto_augment.color,
    "Contrast": auto_augment.contrast,
    "Brightness": auto_augment.brightness,
    "Sharpness": auto_augment.sharpness,
}
FACTORS = [0.0, 0.1, 0.19, 0.5, 0.8237, 1.0, 1.0001, 1.3, 1.81, 1.9, 3.5]
FACTORS += np.random.default_rng(0).uniform(0.1, 1.9, 8).tolist()
ARGUMENTS = {
    "AutoContrast": [0],
    "Equalize": [0],
    "Invert": [0],
    "Posterize": range(1, 10),
    "Solarize": [0, 1, 25, 128, 129, 231, 255, 256],
    "SolarizeAdd": [0, 1, 11, 99, 110, 127, 128],
    "Color": FACTORS,
    "Contrast": FACTORS,
    "Brightness": FACTORS,
    "Sharpness": FACTORS,
}
SHAPES = [(1, 1), (1, 5), (2, 3), (3, 2), (3, 3), (4, 3), (17, 33), (96, 128)]


@pytest.fixture(scope="module")
def images(photos) -> list[Image.Image]:
    """Photos whole and as cut-outs of all kinds of sizes, and images of few values."""
    rng = np.random.default_rng(0)
    images = []
    for n, file in enumerate(sorted(photos.glob("*/*/*.jpg"))[::8]):
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        images.append(image.resize((224, 224)) if n % 3 else image)
        height, width = SHAPES[n % len(SHAPES)]
        top, left = rng.integers(0, image.height - height), rng.integers(0, image.width - width)
        images.append(image.crop((left, top, left + width, top + height)))
    y, x = np.mgrid[:40, :50]
    arrays = [
        np.full((9, 8, 3), 77),
        np.full((9, 8, 3), (0, 255, 128)),
        np.stack([x, 0 * x + 9, y], 2),
        np.stack([x % 2 * 255, y % 2, 0 * x], 2),
        rng.integers(0, 256, (40, 50, 3)),
        rng.integers(100, 103, (40, 50, 3)),
        rng.choice([0, 255], (5, 7, 3)),
    ]
    images += [Image.fromarray(a.astype(np.uint8)) for a in arrays]
    return [*images, *(image.crop((0, 0, width, height)) for image in images[:3] for height, width in SHAPES)]


def ours(image: Image.Image, *operations: tuple[str, float]) -> np.ndarray:
    pixels = np.array(image).transpose(2, 0, 1).copy()
    ops = np.array([OPS.index(name) for name, _ in operations], np.int8)
    colour.apply(pixels, ops, np.array([argument for _, argument in operations], np.float32))
    return pixels.transpose(1, 2, 0)


def theirs(image: Image.Image, *operations: tuple[str, float]) -> np.ndarray:
    for name, argument in operations:
        # Factors are drawn in double precision and kept as float32, which Pillow works in.
        value = float(np.float32(argument)) if isinstance(argument, float) else argument
        image = THEIRS[name](image, *(() if ARGUMENTS[name] == [0] else (value,)))
    return np.asarray(image)


@pytest.mark.parametrize("name", THEIRS)
def test_each_operation_is_timms_to_the_last_bit(images, name):
    changed = 0
    for image in images:
        for argument in ARGUMENTS[name]:
            result = ours(image, (name, argument))
            np.testing.assert_array_equal(
                result, theirs(image, (name, argument)), err_msg=f"{name} {argument} {image.size}"
            )
            changed += (result != np.asarray(image)).any()
    assert changed > 10


def test_chains_are_timms_to_the_last_bit(images):
    """Tables of successive operations are combined, statistics taken of what they would give."""
    rng = np.random.default_rng(1)
    names, lengths = list(THEIRS), []
    for n in range(600):
        operations = [
            (name, ARGUMENTS[name][rng.integers(len(ARGUMENTS[name]))])
            for name in rng.choice(names, rng.integers(2, 5))
        ]
        image = images[n % len(images)]
        np.testing.assert_array_equal(
            ours(image, *operations), theirs(image, *operations), err_msg=f"{operations} {image.size}"
        )
        lengths.append(len(operations))
    assert set(lengths) == {2, 3, 4}


def test_geometry_and_empty_layers_are_passed_over(images):
    image = images[0]
    operations = [
        ("Rotate", 20.0),
        ("Solarize", 128),
        ("ShearX", 0.2),
        ("Contrast", 1.5),
        ("TranslateX", 0.3),
        ("ShearY", 0.1),
    ]
    np.testing.assert_array_equal(ours(image, *operations), theirs(image, ("Solarize", 128), ("Contrast", 1.5)))
    pixels = np.array(image).transpose(2, 0, 1).copy()
    before = pixels.copy()
    colour.apply(pixels, np.full(8, scalar.NO_OP, np.int8), np.ones(8, np.float32))
    assert (pixels == before).all()


@pytest.mark.parametrize("bits", [0, -4, -36])
def test_posterize_with_no_bits_is_black(images, bits):
    """timm's increasing posterize draws 0 bits at level 10 (fewer with mmax), which Pillow 13 refuses; before, it was
    black."""
    assert np.asarray(images[0]).max() > 200 and (ours(images[0], ("Posterize", bits)) == 0).all()


def distorted(pixels: np.ndarray, *operations: tuple[int, float]) -> np.ndarray:
    """Operations by their codes on a copy of uint8 [3, H, W]."""
    pixels = pixels.copy()
    ops, arguments = np.array([op for op, _ in operations], np.int8), np.array([a for _, a in operations], np.float32)
    colour.apply(pixels, ops, arguments)
    return pixels


@pytest.fixture(scope="module")
def colours() -> np.ndarray:
    """All greys, colours with two equal channels and colours of all kinds: uint8 [3, 64, 64]."""
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (4096, 3))
    pixels[:256] = np.arange(256)[:, None]
    pixels[256:1024, 1] = pixels[256:1024, 0]
    pixels[1024:2048] = rng.permuted(pixels[:1024], axis=1)
    pixels[2048:2400] = rng.choice([0, 1, 254, 255], (352, 3))
    return np.ascontiguousarray(pixels.T.reshape(3, 64, 64)).astype(np.uint8)


def in_hsv(pixels: np.ndarray, turn: float, factor: float) -> np.ndarray:
    """colorsys in double precision: float64 [3, H, W], not rounded. turn: of the hue in degrees."""

    def change(red: int, green: int, blue: int) -> tuple[float, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)
        return colorsys.hsv_to_rgb((hue + turn / 360) % 1, min(saturation * factor, 1.0), value)

    columns = pixels.reshape(3, -1).T.tolist()
    return 255 * np.array([change(*pixel) for pixel in columns]).T.reshape(pixels.shape)


@pytest.mark.parametrize(
    "op, argument",
    [(scalar.SATURATE, factor) for factor in (0.0, 0.5, 0.83, 1.0, 1.37, 1.5, 9.0)]
    + [(scalar.HUE, degrees) for degrees in (-36.0, -11.4, 0.0, 27.3, 36.0, 60.0, 180.0, -250.0, 1000.0)],
)
def test_saturation_and_hue_are_colorsyss_rounded(colours, op, argument):
    turn, factor = (argument, 1.0) if op == scalar.HUE else (0.0, float(np.float32(argument)))
    exact = in_hsv(colours, turn, factor)
    ours = distorted(colours, (op, argument))
    assert np.abs(ours - exact).max() < 0.5005  # what is nearly half way may go up or down
    assert (ours != colours).any() == (argument != (1.0 if op == scalar.SATURATE else 0.0))
    np.testing.assert_array_equal(ours.max(axis=0), colours.max(axis=0))


@pytest.mark.parametrize("op, argument", [(scalar.SATURATE, a) for a in (0.5, 1.0, 1.5)] + [(17, a) for a in (-36, 26)])
def test_saturation_and_hue_against_opencvs_8_bits(colours, images, op, argument):
    """mmsegmentation's way. OpenCV keeps the hue in steps of 2 degrees and the saturation in 256: over all 16.8 million
    colours and these arguments its pixels are up to 6 levels from ours, 0.6 in the mean."""
    if importlib.util.find_spec("cv2") is None:
        needs("OpenCV is not installed (the extra interop has it)")
    import cv2

    for pixels in (colours, *(np.asarray(image).transpose(2, 0, 1).copy() for image in images[:3])):
        hsv = cv2.cvtColor(pixels.transpose(1, 2, 0).copy(), cv2.COLOR_RGB2HSV)
        if op == scalar.SATURATE:
            hsv[:, :, 1] = np.clip(hsv[:, :, 1].astype(np.float32) * argument, 0, 255).astype(np.uint8)
        else:
            hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + argument // 2) % 180
        theirs = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB).transpose(2, 0, 1)
        off = np.abs(distorted(pixels, (op, argument)).astype(int) - theirs)
        assert off.max() <= 6 and off.mean() < 0.7


@pytest.mark.parametrize("argument", [-32.0, -7.4, 0.0, 0.6, 31.99, 300.0, -300.0])
def test_adding_is_numpys_clip_and_cast(colours, argument):
    expected = np.clip(colours.astype(np.float32) + np.float32(argument), 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(distorted(colours, (scalar.ADD, argument)), expected)


def test_a_chain_of_distortions_is_one_after_the_other(colours):
    operations = [(scalar.ADD, 20.3), (scalar.BRIGHTNESS, 1.2), (scalar.SATURATE, 1.4), (scalar.HUE, -21.0)]
    operations += [(scalar.ROTATE, 5.0), (scalar.ADD, -9.0)]
    expected = colours
    for operation in operations:
        expected = distorted(expected, operation)
    np.testing.assert_array_equal(distorted(colours, *operations), expected)


def test_python_and_compiled_curves_agree():
    compiled = colour._scalar
    operations = [
        (scalar.INVERT, 0),
        (scalar.POSTERIZE, 3),
        (scalar.SOLARIZE, 100),
        (scalar.SOLARIZE_ADD, 90),
        (scalar.BRIGHTNESS, 1.37),
        (scalar.ADD, -20.7),
    ]
    for op, argument in operations:
        values = [scalar.curve(op, argument, np.int64(value)) for value in range(256)]
        assert values == [compiled.curve(op, argument, value) for value in range(256)]
