"""Betons of YUV 4:2:0 planes: what is stored for which image, to the bit where that is promised."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tl_fast
from tl_fast.beton.layout import BetonError, planes_size
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.jpeg.planes_loops import to_rgb
from tl_fast.sources.image import open_rgb

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
    assert (summary.planes, summary.decoded, summary.converted, summary.resized) == (10, 4, 6, 0)
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
            if kind.startswith(("4:2:0", "progressive", "grey")):
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
