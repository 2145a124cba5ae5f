"""Regions of YUV 4:2:0 planes: copied to the byte, beside JPEGs that are decoded, by several threads; and what the
tests take for the pixels of planes against libjpeg."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from tests import yuv_planes
from tl_fast.jpeg.region import RegionDecoder, RegionQueue
from tl_fast.maths import scalar
from tl_fast.maths.compile import compile_scalar, njit

PHOTOS = sorted((Path(__file__).parents[1] / "photos").rglob("*.jpg"))


@pytest.mark.parametrize(("height", "width"), [(48, 64), (34, 46), (8, 6)])
def test_the_oracle_shows_libjpegs_pixels(height, width):
    """Planes of one value a block of 8 x 8 go through a JPEG unchanged."""
    rng = np.random.default_rng(height)
    blocks = yuv_planes.random_planes(rng, -(-height // 8), -(-width // 8))
    chroma = -(-height // 2), -(-width // 2)
    planes = tuple(
        np.ascontiguousarray(block.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]])
        for block, size in zip(blocks, ((height, width), chroma, chroma), strict=True)
    )
    with Image.open(io.BytesIO(simplejpeg.encode_jpeg_yuv_planes(*planes, quality=100))) as image:
        np.testing.assert_array_equal(yuv_planes.shown(planes), np.asarray(image))


def test_every_colour_is_libjpegs():
    """The scalar formulas, compiled, for chroma over its whole range; Y black, grey and white."""
    to_rgb = compile_scalar(njit).rgb_of
    for luma in (0, 100, 255):
        for blue in range(0, 256, 15):
            for red in range(0, 256, 3):
                pixel = tuple(np.full((1, 1), value, np.uint8) for value in (luma, blue, red))
                assert to_rgb(*map(np.int32, (luma, blue, red))) == tuple(yuv_planes.shown(pixel)[0, 0])


@pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
def test_a_range_of_chroma_is_what_its_pixels_need(size):
    """And at most one sample more on a side, which those next to the range need."""
    for start in range(size):
        for stop in range(start + 1, size + 1):
            pixels = np.arange(start, stop)
            second = [scalar.chroma_neighbour(int(pixel), size) for pixel in pixels]
            needed = {*(pixels // 2).tolist(), *map(int, second)}
            first, behind = scalar.chroma_range(start, stop, size)
            assert needed <= set(range(first, behind)) and 0 <= first < behind <= -(-size // 2)
            assert first >= start // 2 - 1 and behind <= (stop - 1) // 2 + 2


def queue_of(planes: list, jpegs: list[bytes], rng) -> tuple[RegionQueue, list[np.ndarray]]:
    """A queue of random regions, of planes and JPEGs in turn, and the bytes expected of each."""
    expected, images, starts, stops, sides = [], [], [], [], []
    for n in range(2 * max(len(planes), len(jpegs))):
        if n % 2:
            image = np.frombuffer(jpegs[n // 2 % len(jpegs)], np.uint8)
            shown = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        else:
            part = planes[n // 2 % len(planes)]
            image, shown = yuv_planes.flat(part), part[0]
        start = np.array([rng.integers(side) for side in shown.shape[:2]])
        stop = np.array([rng.integers(first + 1, side + 1) for first, side in zip(start, shown.shape, strict=False)])
        if n % 2:
            expected.append(shown[start[0] : stop[0], start[1] : stop[1]].ravel())
        else:
            expected.append(yuv_planes.cut(part, tuple(start), tuple(stop)))
        sides.append((0, 0) if n % 2 else shown.shape)
        images.append(image)
        starts.append(start)
        stops.append(stop)
    addresses = np.array([image.ctypes.data for image in images])
    sizes = np.array([image.size for image in images])
    queue = RegionQueue(addresses, sizes, np.array(starts), np.array(stops), np.array(sides))
    queue.images = images  # which must stay
    return queue, expected


@pytest.mark.parametrize("threads", [1, 3])
def test_a_queue_copies_planes_and_decodes_jpegs(threads):
    rng, decoder = np.random.default_rng(threads), RegionDecoder()
    decoder.compile()
    sides = [(1, 1), (2, 3), (7, 5), (64, 48), (51, 33), (5, 200)] * 8
    planes = [yuv_planes.random_planes(rng, *side) for side in sides]
    queue, expected = queue_of(planes, [path.read_bytes() for path in PHOTOS[:4]], rng)
    out = np.full(queue.num_bytes + 64, 99, np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(decoder.decode_queued, queue, out[:-64]) for _ in range(threads)]:
            assert done.result() is None
    assert queue.num_bytes == sum(part.size for part in expected) and (out[-64:] == 99).all()
    for offset, size, part in zip(queue.offsets, queue.plane_bytes, expected, strict=True):
        np.testing.assert_array_equal(out[offset : offset + part.size], part)
        assert size in (0, part.size)
    assert (queue.plane_bytes > 0).tolist() == [True, False] * len(planes)
