"""Planes in the file: what the reader gives, in several betons as one data set too, and how it names damage."""

from __future__ import annotations

import io
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tl_fast.beton import layout
from tl_fast.beton.layout import BetonError, planes_size
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.samples import Samples
from tl_fast.beton.verify import verify
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.jpeg.planes_loops import from_rgb

SIZES = [(7, 9), (8, 16), (5, 1), (33, 12)]


def pixels_of(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (*SIZES[i], 3), np.uint8)


def png(i: int) -> bytes:
    Image.fromarray(pixels_of(i)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Four images, the second as a JPEG."""
    samples = [Sample(f"{i}.png", i, lambda i=i: png(i), as_planes=i != 1) for i in range(4)]
    write_beton(tmp_path / "planes.beton", samples, class_names=list("abcd"), workers=1)
    return tmp_path / "planes.beton"


def test_the_reader_gives_what_was_written(path: Path):
    with BetonReader(path) as reader:
        again = pickle.loads(pickle.dumps(reader))
        assert reader.stored_as_planes.tolist() == [True, False, True, True]
        for i in (0, 2, 3):
            expected = from_rgb(pixels_of(i))
            for found in (reader.image(i), again.image(i), np.concatenate([p.reshape(-1) for p in reader.planes(i)])):
                np.testing.assert_array_equal(found, expected)
            assert reader.crc(i) == zlib.crc32(expected) and reader.image_sizes[i] == planes_size(*SIZES[i])
            with pytest.raises(ValueError, match="read-only"):
                reader.planes(i)[0][0, 0] = 1
        addresses, sizes = reader.image_addresses(np.array([3, 0]))
        assert addresses.tolist() == [reader.image(i).ctypes.data for i in (3, 0)]
        assert sizes.tolist() == [planes_size(33, 12), planes_size(7, 9)]
        with pytest.raises(BetonError, match=r"planes.beton: image: sample 1 \(1.png\) is a JPEG; .*--store yuv420"):
            reader.planes(1)
        with pytest.raises(IndexError):
            reader.planes(4)
    assert verify(path, decode=True) == []


def test_several_files_as_one_data_set(path: Path, tmp_path: Path):
    jpegs = [Sample(f"{i}.jpg", i, lambda i=i: png(i)) for i in range(2)]
    write_beton(tmp_path / "jpegs.beton", jpegs, class_names=list("abcd"), workers=1)
    samples = Samples([tmp_path / "jpegs.beton", path])
    assert samples.stored_as_planes.tolist() == [False, False, True, False, True, True]
    assert samples.image(5).tobytes() == from_rgb(pixels_of(3)).tobytes()
    assert [plane.shape for plane in samples.planes(4)] == [(5, 1), (3, 1), (3, 1)]
    addresses, sizes = samples.image_addresses(np.array([5, 0, 2]))
    assert addresses.tolist() == [samples.image(i).ctypes.data for i in (5, 0, 2)]
    assert sizes.tolist() == [samples.image(i).size for i in (5, 0, 2)]
    with pytest.raises(BetonError, match="jpegs.beton: image: sample 0"):
        samples.planes(0)
    samples.close()


def rewrite(path: Path, sample: int, *, size: int | None = None, mode: int | None = None) -> None:
    """Change what the tables say of an image, and put their CRCs right."""
    from fuzz_beton import seal

    data = bytearray(path.read_bytes())
    with BetonReader(path) as reader:
        table, rows, row = reader._alloc_ptr, reader._head_size, reader._metadata.dtype
    if size is not None:
        place = table + sample * layout.ALLOCATION.itemsize + layout.ALLOCATION.fields["size"][1]
        data[place : place + 8] = size.to_bytes(8, "little")
    if mode is not None:
        data[rows + sample * row.itemsize] = mode
    seal(data, samples=True)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"sample": 0, "size": 102}, "image: sample 0 has 102 bytes; planes of 9×7 pixels have 103; "),
        ({"sample": 1, "mode": 2}, r"image: sample 1 has \d+ bytes; planes of 16×8 pixels have 192; "),
        ({"sample": 2, "mode": 1}, "image: sample 2 and 0 others are stored as raw pixels; "),
        ({"sample": 3, "mode": 9}, "image: sample 3 has mode 9, unknown in a file of JPEGs and planes; "),
    ],
)
def test_wrong_tables_are_named_when_the_file_is_opened(path: Path, change: dict, problem: str):
    rewrite(path, **change)
    with pytest.raises(BetonError, match=rf"^{path}: {problem}"):
        BetonReader(path)


def test_planes_taken_for_a_jpeg_are_found(path: Path):
    rewrite(path, 3, mode=0)
    assert [problem.split(": ")[1:3] for problem in verify(path)] == [
        ["image", "sample 3 (3.png) is no JPEG"],
    ]


def test_a_flipped_bit_anywhere_in_planes_is_named(path: Path):
    right = path.read_bytes()
    with BetonReader(path) as reader:
        start, size = int(reader._image_ptr[3]), int(reader.image_sizes[3])
    for offset in range(0, size, 61):
        data = bytearray(right)
        data[start + offset] ^= 1 << offset % 8
        path.write_bytes(data)
        assert [problem.split("; ")[0] for problem in verify(path, decode=True)] == [
            f"{path}: crc: sample 3 (3.png): CRC-32 is {zlib.crc32(bytes(data[start : start + size])):08x},"
            f" the file says {zlib.crc32(right[start : start + size]):08x}"
        ]
        with BetonReader(path) as reader, pytest.raises(BetonError, match="crc: sample 3"):
            reader.check(3)


def test_a_file_cut_off_is_named(path: Path):
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(BetonError, match="planes.beton: alloc"):
        BetonReader(path)
