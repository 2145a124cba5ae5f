"""What tests of decoders share: files in memory, pictures, regions, and the pixels that samples show."""

from __future__ import annotations

import ctypes
import io
import mmap
import random

import numpy as np
from PIL import Image

from tl_fast.jpeg.region import RegionDecoder
from tl_fast.maths.ycbcr import Pixels, row_room, write_row

CANARY, GUARD = 0xA5, 64
PROT_NONE = 0
decoder = RegionDecoder()


class Files:
    """What a `Decoder` reads: the files as they are, as if a beton held them."""

    def __init__(self, files: list[bytes]):
        self.files = [np.frombuffer(file, np.uint8) for file in files]
        self.heights, self.widths = np.zeros((2, len(files)), np.int64)
        self.stored_as_planes = np.zeros(len(files), bool)

    def image(self, sample_id: int) -> np.ndarray:
        return self.files[sample_id]

    def image_addresses(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        files = [self.files[i] for i in sample_ids]
        return np.array([file.ctypes.data for file in files]), np.array([file.size for file in files])

    def name(self, sample_id: int) -> str:
        return f"sample {sample_id}"


def show(pixels: Pixels, start: tuple[int, int], shape: tuple[int, int], size: int = 3) -> np.ndarray:
    """What `write_row` makes of a region of `pixels`, uint8 [h, w, size]; checks that nothing around each row of it and
    around the room to work in is written."""
    (top, left), (rows, columns) = map(int, start), map(int, shape)
    out = np.full((rows, columns * size + 2 * GUARD), CANARY, np.uint8)
    room = np.full(row_room(columns) + 2 * GUARD, CANARY, np.uint8)
    room_in = np.uint64(room.ctypes.data + GUARD)
    for n in range(rows):
        row = np.uint64(out[n].ctypes.data + GUARD)
        write_row(pixels, top + n, left, left + columns, np.uint64(size), room_in, row)
    for guarded in (out, room[None]):
        assert (guarded[:, :GUARD] == CANARY).all() and (guarded[:, -GUARD:] == CANARY).all()
    return out[:, GUARD:-GUARD].reshape(rows, columns, size)


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def with_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def region_of(data: bytes, start: tuple[int, int], stop: tuple[int, int]) -> np.ndarray | None:
    """The region; checks that nothing is written behind it."""
    size = 3 * (stop[0] - start[0]) * (stop[1] - start[1])
    out = np.full(size + 64, CANARY, np.uint8)
    region = decoder.decode(as_array(data), np.array(start), np.array(stop), out[:size])
    assert (out[size:] == CANARY).all()
    return region


def random_regions(
    rng: random.Random, height: int, width: int, count: int
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    regions = [((0, 0), (height, width)), ((height - 1, width - 1), (height, width)), ((0, 0), (1, 1))]
    for _ in range(count):
        top, left = rng.randrange(height), rng.randrange(width)
        regions.append(((top, left), (rng.randint(top + 1, height), rng.randint(left + 1, width))))
    return regions


def check_regions(data: bytes, rng: random.Random, count: int = 6) -> None:
    """Random regions of a JPEG are Pillow's pixels."""
    whole = with_pillow(data)
    for start, stop in random_regions(rng, *whole.shape[:2], count):
        region = region_of(data, start, stop)
        assert region is not None, (start, stop)
        np.testing.assert_array_equal(region, whole[start[0] : stop[0], start[1] : stop[1]], str((start, stop)))


def picture(rng: np.random.Generator, height: int, width: int, kind: str) -> np.ndarray:
    """uint8 [height, width, 3]: noise, with every coefficient; extreme noise, whose values leave 0..255; waves, with
    few coefficients."""
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "extreme":
        return 255 * rng.integers(0, 2, (height, width, 3), np.uint8)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x * rng.uniform(0.02, 0.5) + y * rng.uniform(0.02, 0.5) + c) for c in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def walled(pages: int) -> np.ndarray:
    """Whole pages of bytes, uint8 [n], before which and behind which nothing can be read: who does ends the process."""
    page = mmap.PAGESIZE
    memory = np.frombuffer(mmap.mmap(-1, (pages + 2) * page), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    for wall in (memory, memory[-page:]):
        assert libc.mprotect(ctypes.c_void_p(wall.ctypes.data), ctypes.c_size_t(page), PROT_NONE) == 0
    return memory[page:-page]
