"""`tl_fast.maths.ycbcr.write_row`: samples of every kind become Pillow's pixels, whatever the region, and nothing else
is read or written."""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests.decoding import CANARY, show, walled
from tl_fast.jpeg import planes_loops
from tl_fast.jpeg.region import RegionDecoder
from tl_fast.maths.ycbcr import AS_GREY, AS_PLANES, PADDING, Pixels, pixels_of, planes_of

# Chroma of 1 and 2 columns, which libjpeg does not smooth, then of more; less than a vector of 8 pixels, then more.
SIZES = [(height, width) for height in (1, 2, 3, 5) for width in range(1, 13)] + [(17, 33), (9, 70)]
SIZES_OF_A_PIXEL = pytest.mark.parametrize("size", [3, 4])


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(100 * height + width).integers(0, 256, (height, width, 3), np.uint8)


def encode(pixels: np.ndarray, sampling: str) -> tuple[bytes, np.ndarray]:
    """A JPEG, and what Pillow shows of it, uint8 [h, w, 3]."""
    if sampling == "Gray":
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[:, :, :1]), 90, "GRAY", "Gray")
    else:
        jpeg = simplejpeg.encode_jpeg(pixels, 90, "RGB", sampling)
    with Image.open(io.BytesIO(jpeg)) as image:
        return jpeg, np.asarray(image.convert("RGB"))


def regions(height: int, width: int) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """First pixels and shapes: all columns there may be of a small image, some of a large one; the last rows too."""
    step = 1 if width < 13 else 7
    for left in range(0, width, step):
        for columns in range(1, width - left + 1, step):
            yield (0, left), (height, columns)
    yield (height // 2, width // 2), (height - height // 2, width - width // 2)


def check(pixels: Pixels, start: tuple[int, int], whole: np.ndarray, shape: tuple[int, int], size: int) -> None:
    """The region of `pixels` shows that of `whole`, uint8 [h, w, 3], and a fourth byte is 0."""
    (top, left), (rows, columns) = start, shape
    shown = show(pixels, start, shape, size)
    expected = whole[top : top + rows, left : left + columns]
    np.testing.assert_array_equal(shown[:, :, :3], expected, f"{start} {shape} of {whole.shape}")
    assert (shown[:, :, 3:] == 0).all()


@SIZES_OF_A_PIXEL
def test_stored_planes_show_pillows_pixels(size):
    for height, width in SIZES:
        jpeg, whole = encode(noise(height, width), "420")
        planes = np.concatenate([plane.ravel() for plane in planes_loops.decode(jpeg)[:3]])
        memory = np.concatenate([planes, np.full(PADDING, CANARY, np.uint8)])
        for start, shape in regions(height, width):
            check(planes_of(memory, height, width), start, whole, shape, size)


def test_narrow_chroma_is_repeated_and_wider_chroma_smoothed():
    """libjpeg's rule itself, in numpy: 2x2 pixels of a flat luma have one colour up to 4 columns, not with 5."""
    for width in range(1, 9):
        planes = np.full(4 * width + 4 * ((width + 1) // 2) + PADDING, 128, np.uint8)
        chroma = planes[4 * width : -PADDING]
        chroma[:] = np.random.default_rng(width).permutation(np.linspace(60, 200, chroma.size).astype(np.uint8))
        shown = show(planes_of(planes, 4, width), (0, 0), (4, width))
        alike = (shown[::2] == shown[1::2]).all() and (shown[:, 0 : width - 1 : 2] == shown[:, 1::2]).all()
        assert alike == (width < 5), width


@SIZES_OF_A_PIXEL
@pytest.mark.parametrize("sampling", ["Gray", "444", "440", "422", "420", "411"])
def test_decoded_regions_show_pillows_pixels(sampling, size):
    decoder = RegionDecoder()
    for height, width in SIZES:
        jpeg, whole = encode(noise(height, width), sampling)
        for start, shape in [*regions(height, width)][::3]:
            pixels = decoder.samples(np.frombuffer(jpeg, np.uint8), np.array(start), np.add(start, shape))
            assert pixels.kind == (AS_GREY if sampling == "Gray" else AS_PLANES)
            check(pixels, start, whole, shape, size)


@SIZES_OF_A_PIXEL
def test_pixels_are_shown_as_they_are(size):
    for height, width in SIZES:
        whole = noise(height, width)
        for start, shape in regions(height, width):
            region = np.ascontiguousarray(whole[start[0] :, start[1] :])  # more columns than are shown
            check(pixels_of(region, *start), start, whole, shape, size)


@SIZES_OF_A_PIXEL
@pytest.mark.parametrize("kind", ["planes", "grey", "RGB"])
def test_no_more_than_the_padding_is_read(kind, size):
    memory = walled(2)
    for height, width in SIZES:
        jpeg, whole = encode(noise(height, width), "Gray" if kind == "grey" else "420")
        if kind == "planes":
            samples = np.concatenate([plane.ravel() for plane in planes_loops.decode(jpeg)[:3]])
        else:
            samples = (whole[:, :, 0] if kind == "grey" else whole).reshape(-1)
        for at in (0, memory.size - PADDING - samples.size):
            memory[:] = CANARY
            place = memory[at : at + samples.size]
            place[:] = samples
            if kind == "planes":
                pixels = planes_of(place, height, width)
            elif kind == "grey":
                pixels = Pixels(AS_GREY, place.ctypes.data, width, 0, 0, 0, 1, 1, height, width, 0, 0, height, width)
            else:
                pixels = pixels_of(place.reshape(height, width, 3), 0, 0)
            for start, shape in regions(height, width):
                check(pixels, start, whole, shape, size)
