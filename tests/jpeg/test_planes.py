"""YUV 4:2:0 planes against libjpeg (by Pillow) and against BT.601 in floating point."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tl_fast.jpeg import planes_loops
from tl_fast.jpeg.planes import chroma_size, planes_size, split_planes

SIZES = [(5, 5), (6, 7), (16, 16), (17, 33), (31, 64), (100, 75), (101, 150), (1, 9), (2, 6), (7, 4), (1, 1)]
BLUE, RED = (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411)


@pytest.fixture(scope="module")
def photo(photos: Path) -> np.ndarray:
    return np.asarray(Image.open(photos / "train" / "animal" / "chameleon.jpg").convert("RGB"))


def encode(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", **{"quality": 85, "subsampling": "4:2:0", **options})
    return buffer.getvalue()


def shown(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))


def joined(decoded: planes_loops.Decoded) -> np.ndarray:
    """Its planes, one behind the other."""
    return np.concatenate([plane.reshape(-1) for plane in decoded[:3]])


def test_sizes_of_integers_and_of_arrays():
    assert chroma_size(5, 8) == (3, 4) and planes_size(5, 8) == 40 + 24 and planes_size(1, 1) == 3
    sides = np.array([65_535], np.int32)
    assert planes_size(sides, sides).tolist() == [65_535**2 + 2 * 32_768**2]
    assert planes_size(sides[0], sides[0]) == 65_535**2 + 2 * 32_768**2


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_planes_of_a_jpeg_show_its_pixels_to_the_bit(photo, height: int, width: int):
    for quality in (30, 95):
        jpeg = encode(photo[40 : 40 + height, 60 : 60 + width], quality=quality)
        decoded = planes_loops.decode(jpeg)
        assert decoded.luma.shape == (height, width) and (decoded.across, decoded.down) == (2, 2)
        assert decoded.blue.shape == decoded.red.shape == chroma_size(height, width)
        np.testing.assert_array_equal(planes_loops.to_rgb(joined(decoded), height, width), shown(jpeg))


def test_planes_of_every_photo_show_its_pixels_to_the_bit(photos: Path):
    files = sorted(photos.rglob("*.jpg"))
    decoded = {file: planes_loops.decode(file.read_bytes()) for file in files}
    assert sum(found is not None for found in decoded.values()) > 50
    for file, found in decoded.items():
        if found is not None:
            pixels = planes_loops.to_rgb(joined(found), *found.luma.shape)
            np.testing.assert_array_equal(pixels, shown(file.read_bytes()))


@pytest.mark.parametrize(("name", "across", "down"), [("4:4:4", 1, 1), ("4:2:2", 2, 1)])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 47), (8, 5)])
def test_samples_of_other_samplings_are_libjpegs(photo, name: str, across: int, down: int, height: int, width: int):
    """Pillow gives a JPEG's YCbCr, with chroma upsampled where it is halved."""
    jpeg = encode(photo[40 : 40 + height, 60 : 60 + width], subsampling=name)
    image = Image.open(io.BytesIO(jpeg))
    image.draft("YCbCr", None)
    expected = np.asarray(image)
    assert image.mode == "YCbCr"
    decoded = planes_loops.decode(jpeg)
    assert (decoded.across, decoded.down) == (across, down)
    np.testing.assert_array_equal(decoded.luma, expected[..., 0])
    for plane, c in ((decoded.blue, 1), (decoded.red, 2)):
        assert plane.shape == (height, -(-width // across))
        if across == 1:
            np.testing.assert_array_equal(plane, expected[..., c])
        else:  # libjpeg's triangle filter leaves the outermost samples as they are
            np.testing.assert_array_equal(plane[:, 0], expected[:, 0, c])


@pytest.mark.parametrize("options", [{"progressive": True}, {"keep_rgb": True, "subsampling": "4:4:4"}], ids=str)
def test_other_jpegs_are_left_to_others(photo, options: dict):
    assert planes_loops.decode(encode(photo[:64, :64], **options)) is None


def test_grey_and_damaged_jpegs_are_left_to_others(photo):
    assert planes_loops.decode(encode(photo[:64, :64, 0], subsampling="4:4:4")) is None
    jpeg = encode(photo[:64, :64])
    assert planes_loops.decode(jpeg[: len(jpeg) // 2]) is None and planes_loops.decode(b"") is None


@pytest.mark.parametrize(("height", "width"), [*SIZES, (3, 1), (1, 2), (2, 2)])
def test_rgb_becomes_bt601(photo, height: int, width: int):
    pixels = photo[40 : 40 + height, 60 : 60 + width].astype(float)
    padded = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    means = sum(padded[y::2, x::2] for y in (0, 1) for x in (0, 1)) / 4
    planes = split_planes(planes_loops.from_rgb(pixels.astype(np.uint8)), height, width)
    for plane, expected in zip(
        planes, (pixels @ (0.299, 0.587, 0.114), means @ BLUE + 128, means @ RED + 128), strict=True
    ):
        assert np.abs(plane - expected).max() <= 0.5 + 1e-4
    back = planes_loops.to_rgb(planes_loops.from_rgb(pixels.astype(np.uint8)), height, width)
    assert back.shape == pixels.shape


def test_extreme_colours_stay_in_range():
    cube = np.array([[r, g, b] for r in (0, 255) for g in (0, 255) for b in (0, 255)], np.uint8)
    for colour in cube:
        planes = planes_loops.from_rgb(np.full((4, 4, 3), colour, np.uint8))
        assert np.abs(planes_loops.to_rgb(planes, 4, 4).astype(int) - colour).max() <= 2


def test_grey_is_exact():
    ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    planes = planes_loops.from_rgb(ramp)
    assert (planes[256:] == 128).all()
    np.testing.assert_array_equal(planes_loops.to_rgb(planes, 16, 16), ramp)
