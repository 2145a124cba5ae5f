"""Restart markers put into JPEGs and regions cut out by them: pixels against Pillow and DALI, converter and loader with
`--row-index`."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.convert import image as jpeg
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.jpeg import markers as marks
from tl_fast.jpeg.restarts import restart_interval, splice
from tl_fast.pipeline.loader import Loader
from tl_fast.pipeline.nvjpeg import decode_graph
from tl_fast.pipeline.regions import DecodeError
from tl_fast.plan.records import Augment

jpeg.compile_kernels(row_index=True)


def encode(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def pixels(data) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB"))


def as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def restarts_in(data: bytes) -> int:
    """Restart markers by the definition: 0xFF and a code of 0xD0..0xD7 behind the scan header."""
    scan = data[data.index(b"\xff\xda") :]
    return sum(scan.count(bytes([0xFF, code])) for code in range(0xD0, 0xD8))


def dali_regions(jpegs: list[np.ndarray], starts: np.ndarray, stops: np.ndarray) -> list[np.ndarray]:
    graph = decode_graph(
        "cpu", batch_size=len(jpegs), num_threads=2, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
    )
    graph.build()
    (regions,) = graph.run(jpegs=jpegs, starts=starts.astype(np.int32), shapes=(stops - starts).astype(np.int32))
    return [np.array(region) for region in map(np.asarray, regions)]


def random_regions(rng: np.random.Generator, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A corner, an edge or anything inside; int64 [n, 2] each, (row, column)."""
    ends = np.sort(rng.integers(0, sizes[:, None] + 1, (len(sizes), 2, 2)), axis=1)
    starts, stops = ends[:, 0], ends[:, 1]
    starts = np.minimum(starts, sizes - 1)
    return starts, np.maximum(stops, starts + 1)


def check_regions(files: list[bytes], rng: np.random.Generator) -> tuple[int, int]:
    """Pixels of random regions, spliced, are DALI's of the unspliced source -> (bytes spliced, bytes of the
    sources)."""
    prepared = [jpeg.prepare(data, row_index=True) for data in files]
    sizes = np.array([(one.height, one.width) for one in prepared])
    starts, stops = random_regions(rng, sizes)
    spliced = [
        splice(as_array(one.data), *region)
        for one, region in zip(prepared, zip(starts, stops, strict=True), strict=True)
    ]
    origins = np.array([origin for _, origin in spliced])
    expected = dali_regions([as_array(jpeg.prepare(data).data) for data in files], starts, stops)
    regions = dali_regions([data for data, _ in spliced], starts - origins, stops - origins)
    for i, (ours, theirs) in enumerate(zip(regions, expected, strict=True)):
        np.testing.assert_array_equal(ours, theirs, f"file {i}, {starts[i]} to {stops[i]} of {sizes[i]}")
    return sum(len(data) for data, _ in spliced), sum(map(len, files))


@pytest.fixture(scope="module")
def files(photos: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]


@pytest.fixture(scope="module")
def scene(files: list[bytes]) -> Image.Image:
    return Image.open(io.BytesIO(files[30])).convert("RGB")


INTERVALS = [(32, 16, 4), (24, 16, 6), (63, 8, 9), (31, 16, 31), (62, 16, 2), (1, 16, 1), (2, 16, 2)]


@pytest.mark.parametrize(("mcus", "pixels", "expected"), INTERVALS)
def test_intervals(mcus: int, pixels: int, expected: int) -> None:
    assert restart_interval(mcus, pixels) == expected


def test_photos_keep_their_pixels(files: list[bytes]) -> None:
    before = after = 0
    for data in files:
        plain, cut = jpeg.prepare(data), jpeg.prepare(data, row_index=True)
        assert cut.row_index and not plain.row_index and cut.action == plain.action
        np.testing.assert_array_equal(pixels(cut.data), pixels(data))
        record = jpeg._workspace.inspect(cut.data, True)
        assert record[marks.STATUS] == marks.OK and record[marks.METADATA] == 0
        mcus = -(-cut.width // (8 * record[marks.COMPONENT + 1])) * -(-cut.height // (8 * record[marks.COMPONENT + 2]))
        assert restarts_in(cut.data) == mcus // record[marks.RESTART] - 1
        assert jpeg.prepare(cut.data, row_index=True).data == cut.data  # found, not made again
        before, after = before + len(plain.data), after + len(cut.data)
    assert 1 < after / before < 1.03


@pytest.mark.parametrize(
    "options", [{}, {"optimize": True}, {"quality": 100}, {"quality": 5, "optimize": True}, {"progressive": True}]
)
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_samplings_sizes_tables(
    request: pytest.FixtureRequest, scene: Image.Image, subsampling: int, options: dict
) -> None:
    if "progressive" in options:
        request.getfixturevalue("turbojpeg")
    rng = np.random.default_rng(subsampling)
    cut = []
    for size in ((1, 1), (8, 8), (16, 16), (17, 9), (33, 31), (64, 64), (65, 200), (211, 97), (496, 50), (320, 240)):
        data = encode(scene.resize(size), subsampling=subsampling, **options)
        prepared = jpeg.prepare(data, row_index=True)
        np.testing.assert_array_equal(pixels(prepared.data), pixels(data))
        assert prepared.row_index == (restarts_in(prepared.data) > 0)
        assert prepared.row_index or max(size) <= 33, "optimised tables get the codes they lack"
        cut.append(data)
    check_regions(cut * 6, rng)


def test_grey_ones(scene: Image.Image) -> None:
    data = encode(scene.convert("L").resize((200, 150)))
    assert jpeg.prepare(data, row_index=True).row_index
    check_regions([data] * 8, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("options", "fit"),
    [({"restart_marker_blocks": 5}, True), ({"restart_marker_blocks": 6}, False), ({"restart_marker_rows": 2}, True)],
)
def test_restarts_of_its_own(scene: Image.Image, options: dict, fit: bool) -> None:
    data = encode(scene.resize((320, 240)), subsampling=2, **options)
    prepared = jpeg.prepare(data, row_index=True)
    assert prepared.parts[0] is data and prepared.row_index == fit
    short, origin = splice(as_array(data), (200, 10), (220, 60))
    assert (len(short) < len(data)) == fit and (origin[0] > 0) == fit
    check_regions([data] * 8, np.random.default_rng(0))


@pytest.mark.parametrize("seed", range(4))
def test_regions_of_photos(files: list[bytes], seed: int) -> None:
    spliced, whole = check_regions(files, np.random.default_rng(seed))
    assert spliced < 0.5 * whole


def test_regions_of_original_imagenet_files(shared: Path) -> None:
    paths = sorted((shared / "data" / "imagenet_sample").rglob("*.JPEG"))
    if not paths:
        pytest.skip(f"no imagenet_sample in {shared}")
    originals = [path.read_bytes() for path in paths]
    assert all(jpeg.prepare(data, row_index=True).row_index for data in originals)
    for seed in range(2):
        check_regions(originals, np.random.default_rng(seed))


def test_what_is_not_spliced(files: list[bytes]) -> None:
    plain, cut = as_array(files[0]), as_array(jpeg.prepare(files[0], row_index=True).data)
    height, width = pixels(files[0]).shape[:2]
    for data, start, stop in (
        (plain, (50, 50), (60, 60)),
        (cut, (0, 0), (height, width)),
        (cut, (-1, 0), (20, 20)),
        (cut, (5, 5), (5, 9)),
        (cut, (height - 5, 0), (height + 1, 9)),
        (cut[: cut.size // 2], (height - 5, 0), (height, 9)),  # ends before the region
        (as_array(b""), (0, 0), (1, 1)),
        (as_array(b"\xff\xd8\xff"), (0, 0), (1, 1)),
    ):
        spliced, origin = splice(data, start, stop)
        assert spliced is data and origin == (0, 0)
    assert splice(cut, (50, 50), (60, 60))[0].size < cut.size / 2


@pytest.mark.usefixtures("turbojpeg")
def test_damaged_ones_do_no_harm(files: list[bytes]) -> None:
    """Any bytes in, at most as many out, and the source where a marker is missing. What `prepare` takes all the same
    keeps its pixels, with the markers that it puts in or found."""
    rng = random.Random(0)
    plain, cut = (jpeg.prepare(files[5], row_index=row_index).data for row_index in (False, True))
    height, width = pixels(cut).shape[:2]
    shorter = refused = unreadable = kept = 0
    for number in range(1000):
        whole = cut if number % 2 else plain
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data) if rng.random() < 0.5 else 700)] = rng.choice(
                (0, 0xFF, 0xD0, rng.randrange(256))
            )
        data = bytes(data[: rng.randint(len(data) // 2, len(data))]) if rng.random() < 0.3 else bytes(data)
        top, left = rng.randrange(height - 1), rng.randrange(width - 1)
        spliced, _ = splice(as_array(data), (top, left), (rng.randint(top + 1, height), rng.randint(left + 1, width)))
        assert len(spliced) <= len(data) and spliced[:2].tobytes() == data[:2]
        assert whole is cut or spliced.tobytes() == data
        shorter += len(spliced) < len(data)
        try:
            prepared = jpeg.prepare(data, decode_check=False, row_index=True)
        except ValueError:
            refused += 1
            continue
        try:
            expected = pixels(data)
        except OSError:  # Pillow refuses what the check of the decoder, which is off here, would have
            unreadable += 1
            continue
        np.testing.assert_array_equal(pixels(prepared.data), expected)
        kept += prepared.data != data
    assert 80 < shorter < 480 and 500 < refused < 740 and unreadable < 20 and kept > 60


# --- the converter and the loader


@pytest.fixture(scope="module")
def betons(to_beton: ModuleType, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The training photos without and with a row index."""
    folder = tmp_path_factory.mktemp("betons")
    paths = folder / "plain.beton", folder / "cut.beton"
    for path, options in zip(paths, ([], ["--row-index"]), strict=True):
        assert to_beton.main([str(photos / "train"), str(path), *options]) == 0
    return paths


def test_to_beton(
    to_beton: ModuleType, betons: tuple[Path, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plain, cut = betons
    assert verify(cut, decode=True) == []
    assert to_beton.main(["verify", "--decode", str(cut)]) == 0
    with BetonReader(plain) as first, BetonReader(cut) as second:
        assert second.conversion["row_index"] is True and first.conversion["row_index"] is False
        assert first.source_ids == second.source_ids
        for i in range(len(first)):
            assert second.image(i).size > first.image(i).size
            np.testing.assert_array_equal(pixels(second.image(i)), pixels(first.image(i)))
            second.check(i)
    capsys.readouterr()
    again = tmp_path / "again.beton"
    assert to_beton.main([str(photos / "train"), str(again), "--row-index", "--workers", "1"]) == 0
    assert again.read_bytes() == cut.read_bytes()
    text = " ".join(capsys.readouterr().err.split())
    assert "with a row index" in text and "0 JPEGs left as they are" in text
    assert to_beton.main([str(photos / "train"), str(again), "--row-index", "--resume"]) == 0
    assert "nothing to do" in " ".join(capsys.readouterr().err.split())
    assert to_beton.main([str(photos / "train"), str(again), "--resume"]) == 1  # of other options


def test_resumed_runs_need_the_same_setting(files: list[bytes], tmp_path: Path) -> None:
    def samples(bad: int) -> list[Sample]:
        return [Sample(f"{i}", 0, lambda i=i: b"no image" if i == bad else files[i]) for i in range(40)]

    path, options = (
        tmp_path / "out.beton",
        {"class_names": ["one"], "workers": 1, "on_error": "quarantine", "max_rejects": 0},
    )
    with pytest.raises(ValueError, match="are bad"):
        write_beton(path, samples(39), row_index=True, **options)
    with pytest.raises(ValueError, match="row_index"):
        write_beton(path, samples(39), row_index=False, resume=True, **options)


def test_loader_makes_the_same_batches(betons: tuple[Path, Path]) -> None:
    for train in (True, False):
        images = []
        for path, threads in ((betons[0], 2), (betons[1], 1), (betons[1], 2)):
            with Loader(path, 8, image_size=64, train=train, threads=threads, seed=3) as loader:
                images.append(np.concatenate([batch.images.numpy().copy() for batch in loader]))
        np.testing.assert_array_equal(images[1], images[0])
        np.testing.assert_array_equal(images[2], images[0])


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_loader_names_damaged_ones(betons: tuple[Path, Path], tmp_path: Path, share: float) -> None:
    """Zeros from somewhere in a JPEG on: an error that names it, wherever the crop needs what they replaced. A crop
    above them is that of the whole file."""
    path = tmp_path / "damaged.beton"
    shutil.copy(betons[1], path)
    with BetonReader(path) as reader:
        data = reader.image(5).tobytes()
        name, height = reader.source_ids[5], int(reader.heights[5])
    content = bytearray(path.read_bytes())
    start, intact = content.index(data), int(share * len(data))
    content[start + intact : start + len(data)] = bytes(len(data) - intact)
    path.write_bytes(content)
    assert any(json.dumps(name)[1:-1] in problem for problem in verify(path, decode=True))
    samples, above, below = np.array([3, 5, 7]), 0, 0
    with Loader(path, 8, image_size=32, threads=2, train=False) as loader:
        with pytest.raises(DecodeError, match=f"sample 5 .{name}"):
            loader.batch(samples)
    for seed in range(20):
        options = {"image_size": 32, "threads": 2, "augment": Augment(scale=(0.05, 0.1)), "seed": seed}
        with Loader(path, 8, **options) as loader, Loader(betons[1], 8, **options) as whole:
            plans = whole.draw(samples)
            top, bottom = plans["top"][1] / height, (plans["top"][1] + plans["height"][1]) / height
            if bottom < share - 0.1:
                above += 1
                assert torch.equal(loader.batch(samples).images, whole.batch(samples).images)
            elif top > share + 0.1:
                below += 1
                with pytest.raises(DecodeError, match=f"sample 5 .{name}"):
                    loader.batch(samples)
    assert below > 0 and (above > 0) == (share == 0.5)
