"""Indices of bit positions in JPEGs (`--bit-index`): regions decoded with them are Pillow's pixels, other decoders pass
over them, and a wrong one is never followed."""

from __future__ import annotations

import io
import mmap
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.decoding import CANARY, GUARD, as_array, check_regions, picture, region_of, walled, with_pillow
from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.convert.image import compile_kernels, prepare
from tl_fast.convert.options import EncodeOptions
from tl_fast.jpeg import bit_index
from tl_fast.jpeg.markers import HEAD_BYTES, INDEX, INDEX_END, MARKERS, OK, SCAN, read_markers
from tl_fast.jpeg.mcus import STREAM_ROOM
from tl_fast.jpeg.memory import PixelMemory, ScanMemory
from tl_fast.jpeg.region_loops import PLANE_ROOM, decode_region
from tl_fast.jpeg.restarts import splice
from tl_fast.maths.ycbcr import ROW_ROOM
from tl_fast.pipeline.loader import Loader
from tl_fast.pipeline.nvjpeg import decode_graph

PHOTOS = sorted((Path(__file__).parents[1] / "photos").rglob("*.jpg"))
compile_kernels(bit_index=True)


def indexed(data: bytes) -> bytes:
    prepared = prepare(data, bit_index=True)
    assert prepared.bit_index
    return prepared.data


def record_of(data: bytes) -> np.ndarray:
    record = np.zeros(MARKERS, np.int64)
    read_markers(as_array(data), record, np.zeros(HEAD_BYTES, np.uint8))
    return record


def segment_of(data: bytes) -> tuple[int, int]:
    """Where the index's segment begins, its marker included, and where it ends."""
    record = record_of(data)
    assert record[INDEX] > 0
    return int(record[INDEX]) - 4, int(record[INDEX_END])


def scan_of(data: bytes) -> int:
    """Where the scan's data begins."""
    return int(record_of(data)[SCAN])


def check_with_index(data: bytes, rng: random.Random, count: int) -> None:
    """Random regions are Pillow's pixels; those below the first row of MCUs also where the scan breaks off at once, so
    that only the index leads to them."""
    check_regions(data, rng, min(count, 6))
    whole, start = with_pillow(data), scan_of(data)
    height, width = whole.shape[:2]
    broken = data[:start] + b"\xff\xd9" + data[start + 2 :]
    assert is_followed(broken)
    for _ in range(count if height > 34 else 0):
        top = rng.randrange(34, height)
        left = min(max(rng.choice([rng.randrange(width), 64 * rng.randrange(4) + rng.randint(-9, 9)]), 0), width - 1)
        bottom, right = rng.randint(top + 1, height), rng.choice([width, rng.randint(left + 1, width)])
        region = region_of(broken, (top, left), (bottom, right))
        np.testing.assert_array_equal(region, whole[top:bottom, left:right], str((top, left, bottom, right)))


def is_followed(data: bytes) -> bool:
    """Whether the decoder takes the file's index for the scan's."""
    return bit_index.find_index(as_array(data), record_of(data)) != (0, 0)


# --- pixels


@pytest.mark.parametrize("path", PHOTOS[::4], ids=lambda path: path.name)
def test_regions_of_photos_are_pillows_pixels(path: Path) -> None:
    check_with_index(indexed(path.read_bytes()), random.Random(path.name), 60)


def test_regions_of_original_files_are_pillows_pixels(shared: Path) -> None:
    for path in sorted((shared / "data" / "imagenet_sample").rglob("*.JPEG"))[::3]:
        check_with_index(indexed(path.read_bytes()), random.Random(path.name), 12)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(40, 130),
    st.integers(40, 130),
    st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    st.sampled_from([5, 60, 95]),
    st.booleans(),
    st.sampled_from(["noise", "extreme", "waves"]),
    st.integers(0, 2**32 - 1),
)
def test_any_size_sampling_quality_and_tables(height, width, sampling, quality, optimize, kind, seed) -> None:
    pixels = picture(np.random.default_rng(seed), height, width, kind)
    options = {"quality": quality, "subsampling": sampling, "optimize": optimize}
    Image.fromarray(pixels).save(out := io.BytesIO(), "JPEG", **options)
    check_with_index(indexed(out.getvalue()), random.Random(seed), 20)


@pytest.mark.parametrize("sampling", ["440", "411", "Gray"])
def test_other_samplings(sampling: str) -> None:
    """Greyscale files get an index too: they are stored with three components."""
    pixels = picture(np.random.default_rng(1), 150, 170, "waves")
    if sampling == "Gray":
        data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[:, :, :1]), 90, "GRAY", "Gray")
    else:
        data = simplejpeg.encode_jpeg(pixels, 90, "RGB", sampling)
    check_with_index(indexed(data), random.Random(sampling), 60)


def test_mcus_that_end_within_a_stuffed_byte() -> None:
    """With every coefficient there is no end-of-block, so the byte that two MCUs share may be 0xFF."""
    data = indexed(simplejpeg.encode_jpeg(picture(np.random.default_rng(2), 400, 300, "extreme"), 100, "RGB", "444"))
    whole, start = with_pillow(data), scan_of(data)
    broken = data[:start] + b"\xff\xd9" + data[start + 2 :]
    for top in range(8, 400, 8):
        for right in range(32, 300, 32):  # where entries are
            region = region_of(broken, (top, right - 9), (top + 1, right))
            np.testing.assert_array_equal(region, whole[top : top + 1, right - 9 : right])


def test_larger_images_have_entries_further_apart() -> None:
    """A segment has 64 KB at most."""
    pixels = picture(np.random.default_rng(0), 2000, 2400, "waves")
    data = indexed(simplejpeg.encode_jpeg(pixels, 90, "RGB", "444"))
    start, stop = segment_of(data)
    spacing = int.from_bytes(data[start + 4 + 6 : start + 4 + 8], "big")
    assert stop - start - 4 <= bit_index.MAX_BODY and spacing == 16
    check_with_index(data, random.Random(0), 30)


def test_what_is_above_and_below_the_crop_is_not_read() -> None:
    plain = prepare(PHOTOS[0].read_bytes()).data
    data = indexed(plain)
    height, width = with_pillow(plain).shape[:2]
    expected = with_pillow(plain)[height // 2 : height // 2 + 20, width // 2 : width // 2 + 20]
    for name, file in (("plain", plain), ("indexed", data)):
        damaged, start = bytearray(file), scan_of(file) + 200
        damaged[start : start + 1000] = bytes(1000)
        region = region_of(bytes(damaged), (height // 2, width // 2), (height // 2 + 20, width // 2 + 20))
        assert (region is not None and np.array_equal(region, expected)) == (name == "indexed")


# --- files


def test_the_scan_stays_as_it_is_and_an_index_is_made_anew() -> None:
    for path in PHOTOS[::8]:
        plain = prepare(path.read_bytes())
        data = indexed(plain.data)
        start, stop = segment_of(data)
        assert data[:start] + data[stop:] == plain.data
        assert prepare(data).data == plain.data, "a conversion without the option leaves an index out"
        assert indexed(data) == data
        assert prepare(data, bit_index=True).stripped == prepare(data).stripped == 0, "an index is no metadata"


def test_files_that_get_none_stay_as_they_are() -> None:
    pixels = picture(np.random.default_rng(0), 100, 120, "waves")
    Image.fromarray(pixels).save(restarts := io.BytesIO(), "JPEG", restart_marker_rows=1)
    small = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels[:16, :60]), 90, "RGB", "420")
    for data in (restarts.getvalue(), small):
        prepared = prepare(data, bit_index=True)
        assert not prepared.bit_index and prepared.data == prepare(data).data


def test_other_decoders_pass_over_it() -> None:
    files = [(prepare(path.read_bytes()).data, indexed(path.read_bytes())) for path in PHOTOS[:8]]
    starts, shapes = np.full((8, 2), 30), np.full((8, 2), 50)
    graph = decode_graph("cpu", batch_size=8, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_dynamic=True)
    graph.build()
    with_dali = [
        graph.run(
            jpegs=[as_array(data) for data in group], starts=starts.astype(np.int32), shapes=shapes.astype(np.int32)
        )[0]
        for group in zip(*files, strict=True)
    ]
    for n, (plain, data) in enumerate(files):
        np.testing.assert_array_equal(np.asarray(with_dali[1][n]), np.asarray(with_dali[0][n]))
        np.testing.assert_array_equal(with_pillow(data), with_pillow(plain))
        np.testing.assert_array_equal(simplejpeg.decode_jpeg(data), simplejpeg.decode_jpeg(plain))
        whole, origin = splice(as_array(data), starts[n], starts[n] + shapes[n])
        assert whole.tobytes() == data and origin == (0, 0)


# --- indices that are wrong


def crops(height: int, width: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    return [
        ((height // 2, width // 2), (height - 3, width - 2)),
        ((height // 3, 0), (height // 2, width // 2)),
        ((height - 9, width - 9), (height, width)),
    ]


def test_a_changed_byte_of_the_index_changes_no_pixel() -> None:
    pixels = picture(np.random.default_rng(3), 100, 130, "waves")
    data = indexed(simplejpeg.encode_jpeg(pixels, 80, "RGB", "420"))
    start, stop = segment_of(data)
    whole, rng = with_pillow(data), random.Random(0)
    for place in range(start + 4, stop):
        changed = bytearray(data)
        changed[place] ^= rng.randrange(1, 256)
        assert not is_followed(bytes(changed)), place
        np.testing.assert_array_equal(region_of(bytes(changed), (50, 65), (97, 128)), whole[50:97, 65:128])


def test_another_files_index_is_not_followed() -> None:
    """Of the same size, of which also the scan has as many bytes; one whose scan was made anew; one cut off."""
    pixels = picture(np.random.default_rng(4), 120, 140, "waves")
    one, other = (indexed(simplejpeg.encode_jpeg(image, 80, "RGB", "420")) for image in (pixels, pixels[::-1].copy()))
    (start, stop), (first, behind) = segment_of(one), segment_of(other)
    swapped = one[:start] + other[first:behind] + one[stop:]
    changed = bytearray(one)
    changed[-10] ^= 1
    for data in (swapped, bytes(changed), one[:-2], one[:-30], one[: scan_of(one)]):
        assert not is_followed(data)
    for (top, left), (bottom, right) in crops(120, 140):
        region = region_of(swapped, (top, left), (bottom, right))
        np.testing.assert_array_equal(region, with_pillow(one)[top:bottom, left:right])


class Guarded:
    """A decoder whose memory is as large as it must be and no larger: behind the data nothing can be read, and behind
    stream, planes and pixels are bytes that must not change."""

    def __init__(self, room: int, rows: int, columns: int) -> None:
        self.mapped = walled(-(-room // mmap.PAGESIZE))
        planes, row_bytes = 3 * (rows + PLANE_ROOM) * (columns + PLANE_ROOM), 3 * (2 * columns + ROW_ROOM)
        self.sizes = {"stream": room + STREAM_ROOM, "planes": planes, "rows": row_bytes, "out": 3 * rows * columns}
        self.memory = {name: np.full(size + GUARD, CANARY, np.uint8) for name, size in self.sizes.items()}
        views = {name: self.memory[name][:size] for name, size in self.sizes.items()}
        self.out = views.pop("out")
        self.scan = ScanMemory.create()._replace(stream=views.pop("stream"))
        self.pixels = PixelMemory.create()._replace(**views)

    def region(self, data: bytes, start: tuple[int, int], stop: tuple[int, int]) -> np.ndarray | None:
        jpeg = self.mapped[-len(data) :]
        jpeg[:] = as_array(data)
        jpeg.flags.writeable = False
        status = decode_region(jpeg, (*start, *stop), self.scan, self.pixels, self.out)
        assert all((self.memory[name][size:] == CANARY).all() for name, size in self.sizes.items())
        rows, columns = stop[0] - start[0], stop[1] - start[1]
        return self.out[: 3 * rows * columns].reshape(rows, columns, 3) if status == OK else None


def test_damaged_files_never_lead_outside() -> None:
    """Entries of any value, numbers before them too, with a checksum that fits, and damaged scans. Where the scan is
    whole there are pixels: it is read from its beginning where the index leads nowhere."""
    pixels = picture(np.random.default_rng(5), 90, 110, "noise")
    data = indexed(simplejpeg.encode_jpeg(pixels, 60, "RGB", "420"))
    start, stop = segment_of(data)
    body, end = start + 4, stop - bit_index.CHECKSUM
    scan, rng, none, followed = scan_of(data), random.Random(6), 0, 0
    decoder = Guarded(len(data), 90, 110)
    for trial in range(1500):
        changed = bytearray(data)
        first = body + (bit_index.HEAD if trial % 10 else 6)
        for _ in range(rng.randint(1, 30)):
            changed[rng.randrange(first, end)] = rng.choice([0, 255, rng.randrange(256)])
        for _ in range(trial % 3):
            changed[rng.randrange(scan, len(data) - 80)] = rng.randrange(256)
        checked = as_array(bytes(changed))
        value = bit_index.checksum(checked, body, end, checked, scan, len(data) - 2)
        changed[end:stop] = int(value).to_bytes(8, "big")
        followed += is_followed(bytes(changed))
        missing = sum(decoder.region(bytes(changed), *crop) is None for crop in crops(90, 110))
        assert trial % 3 or not missing
        none += missing
    assert none > 300 and followed >= 1350


# --- the converter and the loader


@pytest.fixture(scope="module")
def betons(to_beton: ModuleType, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The training photos without and with a bit index."""
    folder = tmp_path_factory.mktemp("betons")
    paths = folder / "plain.beton", folder / "indexed.beton"
    for path, options in zip(paths, ([], ["--bit-index"]), strict=True):
        assert to_beton.main([str(photos / "train"), str(path), *options]) == 0
    return paths


def test_to_beton(
    to_beton: ModuleType, betons: tuple[Path, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain, with_index = betons
    assert verify(with_index, decode=True) == []
    with BetonReader(plain) as first, BetonReader(with_index) as second:
        assert second.conversion["bit_index"] is True and "bit_index" not in first.conversion
        assert first.source_ids == second.source_ids
        for i in range(len(first)):
            start, stop = segment_of(data := second.image(i).tobytes())
            assert data[:start] + data[stop:] == first.image(i).tobytes()
    again = tmp_path / "again.beton"
    assert to_beton.main([str(photos / "train"), str(again), "--bit-index", "--workers", "1"]) == 0
    assert again.read_bytes() == with_index.read_bytes()
    text = " ".join(capsys.readouterr().err.split())
    assert "with a bit index" in text and "0 JPEGs left as they are" in text
    assert to_beton.main([str(photos / "train"), str(again), "--bit-index", "--resume"]) == 0
    assert "nothing to do" in " ".join(capsys.readouterr().err.split())
    assert to_beton.main([str(photos / "train"), str(again), "--resume"]) == 1  # of other options


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"row_index": True}, "a file has one or the other"), ({"store": "yuv420"}, "bit_index is for JPEGs")],
)
def test_options_that_exclude_each_other(options: dict, problem: str) -> None:
    with pytest.raises(BetonError, match=problem):
        EncodeOptions(bit_index=True, **options)


def test_loader_makes_the_same_batches(betons: tuple[Path, Path]) -> None:
    for train in (True, False):
        with (
            Loader(betons[0], 8, image_size=64, train=train, threads=2, seed=3) as plain,
            Loader(betons[1], 8, image_size=64, train=train, threads=2, seed=3) as with_index,
        ):
            for one, other in zip(plain, with_index, strict=True):
                assert torch.equal(one.images, other.images)
