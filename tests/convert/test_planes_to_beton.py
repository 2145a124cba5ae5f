"""Betons of YUV 4:2:0 planes: what is stored for which image, to the bit where that is promised."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
from conversions import run
from PIL import Image
from small_betons import masked_samples, random_maps

import tl_fast
from tl_fast.beton.layout import BetonError, planes_size
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.source import BetonSource
from tl_fast.beton.verify import verify
from tl_fast.convert import partial_file, resumable
from tl_fast.convert.encode import Sample
from tl_fast.convert.options import EncodeOptions
from tl_fast.convert.planes import prepare_planes
from tl_fast.convert.write import write_beton
from tl_fast.jpeg.planes import split_planes
from tl_fast.jpeg.planes_loops import from_rgb, to_rgb
from tl_fast.labelmaps.format import MapSpec, unpack
from tl_fast.masks.format import MaskSpec
from tl_fast.sources.image import open_rgb
from tl_fast.sources.planes_file import pack

PLANES = {"store": "yuv420", "class_names": ["class"], "workers": 1}


def encode(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **{"quality": 85, "subsampling": "4:2:0", **options} if form == "JPEG" else options)
    return buffer.getvalue()


def with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def shown(reader: BetonReader, i: int) -> np.ndarray:
    """The pixels of sample i, planes or JPEG."""
    if not reader.stored_as_planes[i]:
        return with_pillow(bytes(reader.image(i)))
    return to_rgb(reader.image(i), int(reader.heights[i]), int(reader.widths[i]))


def samples_of(images: list[bytes], **fields) -> list[Sample]:
    return [Sample(f"{i}.jpg", 0, lambda data=data: data, **fields) for i, data in enumerate(images)]


@pytest.fixture(scope="module")
def photo(photos: Path) -> Image.Image:
    return Image.open(photos / "train" / "animal" / "chameleon.jpg").convert("RGB")


@pytest.fixture(scope="module")
def kinds(photo: Image.Image) -> dict[str, bytes]:
    """Images of 4:2:0 and others, with odd and even sides."""
    scene = photo.resize((150, 101))
    return {
        "4:2:0": encode(scene),
        "4:2:0, even": encode(scene.crop((0, 0, 128, 64))),
        "4:2:0, odd": encode(scene.crop((3, 5, 52, 62))),
        "progressive": encode(scene, progressive=True),
        "grey": encode(scene.convert("L")),
        "narrow": encode(scene.crop((0, 0, 3, 40))),
        "4:4:4": encode(scene, subsampling="4:4:4"),
        "4:2:2": encode(scene, subsampling="4:2:2"),
        "CMYK": encode(scene.convert("CMYK")),
        "png": encode(scene, "PNG"),
    }


@pytest.mark.usefixtures("turbojpeg")
def test_planes_of_420_show_the_jpegs_pixels_and_others_come_close(kinds, tmp_path: Path):
    summary = write_beton(tmp_path / "out.beton", samples_of(list(kinds.values())), **PLANES)
    assert (summary.planes, summary.decoded, summary.converted, summary.resized) == (10, 8, 2, 0)
    assert verify(tmp_path / "out.beton", decode=True) == []
    with BetonReader(tmp_path / "out.beton") as reader:
        assert reader.stored_as_planes.all() and reader.stored_as_planes.dtype == bool
        for i, (kind, data) in enumerate(kinds.items()):
            expected = open_rgb(data)[0]
            assert (reader.heights[i], reader.widths[i]) == (expected.height, expected.width)
            assert len(reader.image(i)) == reader.image_sizes[i] == planes_size(expected.height, expected.width)
            reader.check(i)
            reader.check_decode(i)
            difference = np.abs(shown(reader, i).astype(int) - np.asarray(expected))
            if kind.startswith(("4:2:0", "progressive", "grey", "narrow")):
                assert difference.max() == 0, kind
            else:  # chroma is halved: colours change at edges, brightness does not
                assert difference.mean() < 5, kind
            luma, *chroma = reader.planes(i)
            assert luma.shape == (expected.height, expected.width) and not luma.flags.writeable
            assert [plane.shape for plane in chroma] == [((luma.shape[0] + 1) // 2, (luma.shape[1] + 1) // 2)] * 2
            if kind == "grey":
                assert all((plane == 128).all() for plane in chroma)


def test_mixed_files_and_samples_that_say_how_they_are_stored(kinds, tmp_path: Path):
    images = [kinds["4:2:0"], kinds["png"]] * 3
    samples = [Sample(str(i), 0, lambda data=data: data, as_planes=i % 3 == 0) for i, data in enumerate(images)]
    summary = write_beton(tmp_path / "out.beton", samples, class_names=["class"], workers=1)
    assert (summary.planes, summary.copied, summary.reencoded) == (2, 2, 2) and summary.samples == 6
    with BetonReader(tmp_path / "out.beton") as reader:
        assert reader.stored_as_planes.tolist() == [True, False, False, True, False, False]
        with pytest.raises(BetonError, match=r"out.beton: image: sample 1 \(1\) is a JPEG"):
            reader.planes(1)
    assert verify(tmp_path / "out.beton", decode=True) == []


def test_a_file_of_jpegs_is_what_it_was_before_there_were_planes(photos: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tl_fast, "__version__", "0")
    files = sorted((photos / "val").rglob("*.jpg"))
    samples = [Sample(file.name, i % 4, file.read_bytes) for i, file in enumerate(files)]
    write_beton(tmp_path / "x.beton", samples, class_names=list("abcd"), conversion={"source": "test"}, workers=1)
    digest = hashlib.sha256((tmp_path / "x.beton").read_bytes()).hexdigest()
    assert digest == "f1be164acb55454dd1800f2745efe57e0baf718dffe1220c9eeecd222559b6bf"  # of commit 9b2a78e


@pytest.mark.parametrize(
    ("options", "size", "stored"),
    [
        ({"short_side": 256}, (375, 500), (256, 342)),  # 341.3
        ({"short_side": 256}, (500, 375), (342, 256)),
        ({"short_side": 256}, (256, 301), (256, 301)),  # never larger, and no side changed for its own sake
        ({"short_side": 300}, (256, 301), (256, 301)),
        ({"short_side": 99}, (300, 301), (100, 100)),  # to even numbers
        ({"max_pixels": 10_000}, (300, 300), (100, 100)),
        ({"max_pixels": 10_000}, (301, 203), (120, 82)),
        ({"short_side": 256, "max_pixels": 65_536}, (256, 1024), (128, 512)),
        ({"short_side": 64, "max_resolution": 128}, (100, 400), (32, 128)),
        ({"short_side": 2}, (300, 1), (300, 1)),
        ({"max_pixels": 4}, (3000, 1), (4, 1)),
    ],
)
def test_sizes(options: dict, size: tuple[int, int], stored: tuple[int, int]):
    limits = EncodeOptions(store="yuv420", **options)
    assert limits.stored_size(*size, even=True) == stored
    assert limits.fits(*size) == (stored == size)
    plain = limits.stored_size(*size)  # as JPEGs, without the even numbers
    assert all(abs(a - b) <= 1 or max(a, b) <= 4 for a, b in zip(plain, stored, strict=True))


@pytest.mark.parametrize("side", range(1, 400, 7))
def test_sizes_keep_their_limits(side: int):
    for other in (1, 2, 3, 37, 256, 1001):
        for options in ({"short_side": 32}, {"max_pixels": 999}, {"max_resolution": 50}, {"max_pixels": 4}):
            limits = EncodeOptions(store="yuv420", **options)
            height, width = limits.stored_size(side, other, even=True)
            assert 1 <= height <= side and 1 <= width <= other
            assert (height % 2 == 0 or height in (side, 1)) and (width % 2 == 0 or width in (other, 1))
            assert height * width <= options.get("max_pixels", 1 << 30)
            assert max(height, width) <= options.get("max_resolution", 1 << 30)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"budget_gb": 1.0}, "auto needs a budget"),
        ({"store": "auto"}, "auto needs a budget"),
        ({"store": "auto", "budget_gb": 0.0}, "budget_gb 0.0: must be more than 0"),
        ({"store": "auto", "budget_gb": float("nan")}, "budget_gb nan: must be more than 0"),
        ({"store": "rgb"}, "store 'rgb': must be jpeg, yuv420 or auto"),
        ({"short_side": 0}, "short_side 0: must be at least 1 pixel"),
        ({"max_pixels": 3}, "max_pixels 3: must be at least 4 pixels"),
        ({"store": "yuv420", "row_index": True}, "row_index is for JPEGs"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, problem: str):
    with pytest.raises(BetonError, match=problem):
        EncodeOptions(**options)


def halved(pixels: np.ndarray) -> np.ndarray:
    """What pixels look like with half their chroma."""
    return to_rgb(from_rgb(pixels), *pixels.shape[:2]).astype(int)


def test_shrunk_images_are_pillows_to_a_few_levels(photo: Image.Image):
    """Each plane was resized on its own, where Pillow resizes RGB. Through RGB nothing differs."""
    for scene in (photo, photo.crop((0, 0, photo.width - 1, photo.height - 1))):
        options = EncodeOptions(store="yuv420", short_side=96)
        for data, bound in ((encode(scene, quality=95), 1.2), (encode(scene, "PNG"), 0)):
            prepared = prepare_planes(data, options)
            assert prepared.action == "resized" and prepared.shrunk_from == (scene.height, scene.width)
            size = prepared.width, prepared.height
            assert min(size) == 96 and not size[0] % 2 and not size[1] % 2
            expected = np.asarray(Image.fromarray(with_pillow(data)).resize(size, Image.Resampling.LANCZOS))
            pixels = to_rgb(np.frombuffer(prepared.data, np.uint8), *size[::-1])
            assert np.abs(pixels - halved(expected)).mean() <= bound
            luma = split_planes(np.frombuffer(prepared.data, np.uint8), *size[::-1])[0]
            difference = np.abs(luma - expected @ np.array((0.299, 0.587, 0.114)))
            assert difference.mean() < 0.6 and difference.max() < 8  # more than a level where RGB was clipped


@pytest.mark.parametrize("width", [400, 401])
def test_chroma_stays_where_it_is_when_planes_shrink(width: int):
    """A ramp of colour along a row: a shift by half a sample of chroma would be more than a level."""
    ramp = np.linspace(60, 200, width)
    pixels = np.stack([ramp, np.full(width, 128.0), 260 - ramp], axis=1)
    scene = Image.fromarray(np.repeat(np.rint(pixels)[None].astype(np.uint8), 200, axis=0))
    for data in (encode(scene, quality=100), encode(scene, "PNG")):
        prepared = prepare_planes(data, EncodeOptions(store="yuv420", short_side=50))
        found = to_rgb(np.frombuffer(prepared.data, np.uint8), prepared.height, prepared.width)
        positions = (np.arange(prepared.width) + 0.5) * width / prepared.width - 0.5
        expected = np.stack([np.interp(positions, np.arange(width), column) for column in pixels.T], axis=1)
        difference = (found - expected)[5:-5, 3:-3]
        assert np.abs(difference).max() < 2.5 and np.abs(difference.mean(axis=(0, 1))).max() < 0.3


def test_exif_orientations_are_applied(photo: Image.Image):
    for size in ((160, 96), (150, 101)):  # turned without loss, and through RGB
        scene = photo.resize(size)
        exif = Image.Exif()
        exif[0x0112] = 6
        data = encode(scene, quality=95, exif=exif)
        for options in ({}, {"short_side": 48}):
            prepared = prepare_planes(data, EncodeOptions(store="yuv420", exif="apply", **options))
            assert prepared.rotated and prepared.height > prepared.width
            expected = open_rgb(data, "apply")[0].resize((prepared.width, prepared.height), Image.Resampling.LANCZOS)
            pixels = to_rgb(np.frombuffer(prepared.data, np.uint8), prepared.height, prepared.width)
            assert np.abs(pixels - halved(np.asarray(expected))).mean() < 1.2
        ignored = prepare_planes(data, EncodeOptions(store="yuv420"))
        assert ignored.rotated and (ignored.width, ignored.height) == size


def test_bad_images_are_refused_as_for_jpegs(photo: Image.Image):
    data = encode(photo)
    for bad in (data[: len(data) // 2], b"no image", data[:-2] + b"\0\0", pack(np.zeros(9, np.uint8), 2, 3)):
        with pytest.raises(ValueError):
            prepare_planes(bad, EncodeOptions(store="yuv420"))


def test_a_beton_of_planes_is_a_source(kinds, photo: Image.Image, tmp_path: Path, to_beton):
    first, images = tmp_path / "first.beton", [kinds["4:2:0"], kinds["png"], encode(photo)]
    write_beton(first, samples_of(images), **PLANES)
    assert run(to_beton, first, tmp_path / "again.beton", "--store", "yuv420") == 0
    assert run(to_beton, first, tmp_path / "small.beton", "--store", "yuv420", "--short-side", "40") == 0
    assert run(to_beton, first, tmp_path / "jpeg.beton", "--quality", "100") == 0
    with BetonReader(first) as old, BetonSource([str(first)]) as source, contextlib.ExitStack() as stack:
        again, small, jpeg = (
            stack.enter_context(BetonReader(tmp_path / f"{name}.beton")) for name in ("again", "small", "jpeg")
        )
        for i in range(3):
            np.testing.assert_array_equal(again.image(i), old.image(i))
            np.testing.assert_array_equal(np.asarray(open_rgb(source.read(i))[0]), shown(old, i))
            assert min(small.heights[i], small.widths[i]) == 40 and small.stored_as_planes[i]
            assert not jpeg.stored_as_planes[i]
            assert np.abs(shown(jpeg, i).astype(int) - shown(old, i)).mean() < 2
        assert again.crcs.tolist() == old.crcs.tolist()


def test_auto_shares_out_planes_evenly_within_the_budget(photos: Path, tmp_path: Path, to_beton, capsys):
    images = photos / "val"
    options = ("--store", "auto", "--short-side", "96")
    sizes = {}
    for store in ("jpeg", "yuv420"):
        assert run(to_beton, images, tmp_path / f"{store}.beton", "--store", store, "--short-side", "96") == 0
        sizes[store] = (tmp_path / f"{store}.beton").stat().st_size
    budget = (sizes["jpeg"] + sizes["yuv420"]) / 2 * 1e-9
    capsys.readouterr()
    assert run(to_beton, images, tmp_path / "x.beton", *options, "--budget-gb", budget, "--dry-run") == 0
    said = capsys.readouterr().err
    count = int(re.search(r"stored as +│ (\d+) planes, (\d+) JPEGs", said)[1])
    assert 7 <= count <= 15
    assert all(
        f"instead as {way}" in said for way in ("JPEGs", "planes", "JPEGs, short side 256", "planes, short side")
    )
    files = []
    for workers in (1, 3):
        files.append(tmp_path / f"{workers}.beton")
        assert run(to_beton, images, files[-1], *options, "--budget-gb", budget, "--workers", workers) == 0
        assert f"{count} planes, {29 - count} JPEGs" in capsys.readouterr().err
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size < budget * 1e9
    with BetonReader(files[0]) as reader:
        assert reader.stored_as_planes.sum() == count and reader.conversion["planes"] == count
        assert np.abs(np.cumsum(reader.stored_as_planes) - (np.arange(29) + 1) * count / 29).max() <= 1
    assert run(to_beton, images, files[0], *options, "--budget-gb", budget, "--resume") == 0
    assert "nothing to do" in capsys.readouterr().err
    assert run(to_beton, images, tmp_path / "all.beton", *options, "--budget-gb", 1) == 0
    assert "29 planes" in capsys.readouterr().err
    assert run(to_beton, images, tmp_path / "none.beton", *options, "--budget-gb", sizes["jpeg"] * 0.5e-9) == 1
    assert "as JPEGs alone the file takes about" in capsys.readouterr().err
    assert run(to_beton, "verify", files[0], "--decode") == 0
    assert run(to_beton, "info", files[0]) == 0 and "resident" not in capsys.readouterr().out
    assert run(to_beton, "info", tmp_path / "all.beton") == 0
    assert "resident on 1, 2, 4, 8 GPUs" in capsys.readouterr().out


def test_the_budget_is_of_all_shards(photos: Path, tmp_path: Path, to_beton):
    options = ("--store", "auto", "--short-side", "96", "--budget-gb", "0.00045")
    assert run(to_beton, photos / "val", tmp_path / "whole.beton", *options) == 0
    with BetonReader(tmp_path / "whole.beton") as reader:
        whole = int(reader.stored_as_planes.sum())
    shared = []
    for i in range(2):
        assert run(to_beton, photos / "val", tmp_path / "x.beton", *options, "--shard", f"{i}/2") == 0
        with BetonReader(tmp_path / f"x-00{i}-of-002.beton") as reader:
            shared.append(int(reader.stored_as_planes.sum()))
    assert min(shared) > 0 and abs(sum(shared) - whole) <= 4
    assert sum(file.stat().st_size for file in tmp_path.glob("x-*.beton")) < 450_000


def test_an_interrupted_conversion_of_both_kinds_goes_on(kinds, tmp_path: Path):
    images = [kinds["4:2:0"], kinds["png"], kinds["4:4:4"]] * 12
    samples = [Sample(f"{i}.jpg", 0, lambda data=data: data, as_planes=i % 2 == 0) for i, data in enumerate(images)]
    whole = write_beton(tmp_path / "whole.beton", samples, class_names=["class"], workers=2)
    broken = [*samples[:30], Sample("30.jpg", 0, lambda: b"broken", as_planes=True), *samples[31:]]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(BetonError, match="30.jpg: not an image"):
        patch.setattr(resumable, "COMMIT_SECONDS", 0.0)
        patch.setattr(partial_file.PartialFile, "committing", property(lambda self: self.wait() is not None))
        write_beton(tmp_path / "out.beton", broken, class_names=["class"], workers=1)
    summary = write_beton(tmp_path / "out.beton", samples, class_names=["class"], workers=1, resume=True)
    assert summary.resumed >= 16 and summary.planes == whole.planes == 18
    assert (tmp_path / "out.beton").read_bytes() == (tmp_path / "whole.beton").read_bytes()
    with pytest.raises(BetonError, match="exists"):
        write_beton(tmp_path / "out.beton", samples, class_names=["class"], workers=1, resume=True)


def test_label_maps_and_masks_beside_planes(tmp_path: Path):
    spec, masks = MapSpec(2, 3, 4, 5), MaskSpec(5)
    records = random_maps(12, spec)
    samples = [
        Sample(f"{i}.jpg", i % 5, lambda data=data: data, lambda i=i: records[i], "", "", lambda mask=mask: mask)
        for i, (data, mask) in enumerate(masked_samples(12, ((60, 80), (48, 33)), 5))
    ]
    names = list("abcde")
    summary = write_beton(
        tmp_path / "out.beton", samples, class_names=names, spec=spec, masks=masks, store="yuv420", short_side=32
    )
    assert summary.planes == summary.resized == 12
    assert verify(tmp_path / "out.beton", decode=True) == []
    with BetonReader(tmp_path / "out.beton") as reader:
        classes, scores = reader.label_maps(np.arange(12))
        for i, sample in enumerate(samples):
            for found, expected in zip((classes[i], scores[i]), unpack(records[i], spec), strict=True):
                np.testing.assert_array_equal(found, expected)
            mask, original = reader.mask(i), sample.mask()
            assert mask.shape == (reader.heights[i], reader.widths[i]) and min(mask.shape) == 32
            rows, columns = (
                (2 * np.arange(n) + 1) * side // (2 * n) for n, side in zip(mask.shape, original.shape, strict=True)
            )
            np.testing.assert_array_equal(mask, original[rows[:, None], columns])


def test_planes_larger_than_a_page_name_the_remedy(tmp_path: Path):
    data = encode(Image.new("RGB", (1500, 1200)))
    with pytest.raises(
        BetonError, match="do not fit in a page of 2097152; set --page-size 4194304 or limit .*short-side"
    ):
        write_beton(tmp_path / "out.beton", samples_of([data]), page_size=1 << 21, **PLANES)
    assert write_beton(tmp_path / "out.beton", samples_of([data]), page_size=1 << 21, short_side=800, **PLANES).planes
