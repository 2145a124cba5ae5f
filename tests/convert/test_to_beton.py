"""The converter as a user runs it: image folders with all kinds of files, label maps, errors, info and verify."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.labelmaps.format import MapSpec, pack, unpack
from tl_fast.labelmaps.store import write_store

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "converters" / "to_beton.py"


def scene(width: int = 97, height: int = 61) -> Image.Image:
    """Smooth, with different channels: JPEG keeps it to a few levels, and a swapped channel or axis shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return Image.fromarray(np.stack([255 * x, 255 * y, 255 * (1 - x) * y], axis=-1).astype(np.uint8))


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def pixels(data: bytes | np.ndarray) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bytes(data))).convert("RGB")).astype(int)


def store_for(
    folder: Path, ids: list[str], num_classes: int, class_names: list[str] | None
) -> tuple[Path, dict[str, np.void], MapSpec]:
    spec = MapSpec(k=2, height=3, width=4, num_classes=num_classes)
    rng = np.random.default_rng(0)
    records = {}
    for sample_id in ids:
        classes = np.stack([rng.permutation(num_classes)[:2] for _ in range(12)], axis=1).reshape(2, 3, 4)
        records[sample_id] = pack(classes, rng.normal(size=(2, 3, 4)).astype(np.float32), spec)
    write_store(folder, ids, records.values(), spec, class_names, model="a test")
    return folder, records, spec


@pytest.fixture(scope="module")
def photo_ids(photos: Path) -> list[str]:
    return sorted(path.relative_to(photos / "train").as_posix() for path in (photos / "train").rglob("*.jpg"))


def test_photos_with_label_maps(
    to_beton: ModuleType, photos: Path, photo_ids: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ["animal", "fish", "monument", "tool"]
    store, records, spec = store_for(tmp_path / "maps", photo_ids[::-1], 4, names)  # found by id, not by place
    out = tmp_path / "out.beton"
    assert to_beton.main([str(photos / "train"), str(out), "--label-maps", str(store), "--workers", "2"]) == 0
    summary = capsys.readouterr().err
    assert re.search(rf"copied .* {len(photo_ids)} ", summary) and "images/s" in summary
    reader = BetonReader(out)
    assert (
        reader.source_ids == photo_ids
        and reader.class_names == names
        and reader.spec == spec
        and reader.annotator["model"] == "a test"
    )
    classes, scores = reader.label_maps(np.arange(len(reader)))
    for i, sample_id in enumerate(photo_ids):
        assert bytes(reader.image(i)) == (photos / "train" / sample_id).read_bytes()
        assert (reader.widths[i], reader.heights[i]) == Image.open(photos / "train" / sample_id).size
        assert names[reader.labels[i]] == sample_id.split("/")[0]
        for stored, expected in zip((classes[i], scores[i]), unpack(records[sample_id], spec), strict=True):
            np.testing.assert_array_equal(stored, expected)

    assert to_beton.main(["info", str(out)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert (
        "animal, fish, monument, tool" in text
        and "top 2 of 4 classes in 3×4 cells, extent full" in text
        and "a test" in text
    )

    assert to_beton.main([str(photos / "train"), str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert to_beton.main([str(photos / "train"), str(out), "--overwrite"]) == 0
    assert BetonReader(out).spec is None


def test_verify_command(to_beton: ModuleType, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.beton"
    assert to_beton.main([str(photos / "val"), str(out)]) == 0
    assert to_beton.main(["verify", str(out), "--decode"]) == 0
    assert "sound" in capsys.readouterr().out
    reader = BetonReader(out)
    data = bytearray(out.read_bytes())
    data[bytes(data).index(bytes(reader.image(5))) + 2000] ^= 16
    out.write_bytes(data)
    assert to_beton.main(["verify", str(out)]) == 1
    said = capsys.readouterr()
    assert "1 damaged" in said.out and reader.source_ids[5] in said.err
    out.write_bytes(data[:-1])
    assert to_beton.main(["verify", str(out)]) == 1 and to_beton.main(["info", str(out)]) == 1
    assert "out.beton: alloc_table_ptr" in capsys.readouterr().err


@pytest.mark.usefixtures("turbojpeg")
def test_every_kind_of_image(to_beton: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = tmp_path / "images"
    rgb = scene()
    alpha = rgb.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(rgb.size))
    grey16 = np.linspace(0, 65_535, 97 * 61).reshape(61, 97).astype(np.uint16)
    copied = {  # less their metadata
        save(rgb, root / "a" / "baseline.jpg", quality=92),
        save(rgb, root / "a" / "deep" / "4 4 4.JPEG", subsampling=0),
        save(rgb, root / "b" / "named.png", format="JPEG"),
        save(
            rgb,
            root / "a" / "rotated.jpg",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
        ),
    }  # orientation 6 is ignored
    transcoded = {
        save(rgb, root / "b" / "progressive.jpg", progressive=True),
        save(rgb.convert("L"), root / "b" / "grey.jpg"),
    }
    encoded = {
        save(rgb.convert("CMYK"), root / "b" / "cmyk.jpg"): None,
        save(rgb, root / "b" / "adobe rgb.jpg", keep_rgb=True): None,
        save(rgb, root / "b" / "plain.png"): None,
        save(alpha, root / "b" / "alpha.png"): np.asarray(rgb),
        save(rgb.quantize(64), root / "b" / "palette.png"): None,
        save(rgb, root / "b" / "lossless.webp", lossless=True): None,
        save(rgb, root / "b" / "plain.bmp"): None,
        save(rgb, root / "b" / "plain.tif"): None,
        save(rgb, root / "b" / "plain.ppm"): None,
        save(rgb.quantize(64), root / "b" / "plain.gif"): None,
        save(rgb.convert("1"), root / "b" / "bits.png"): None,
        save(Image.fromarray(grey16), root / "b" / "deep grey.png"): np.repeat((grey16 >> 8)[..., None], 3, axis=-1),
    }
    (root / "b" / "notes.txt").write_text("not an image by name")
    out = tmp_path / "out.beton"
    assert to_beton.main([str(root), str(out), "--quality", "95"]) == 0
    summary = capsys.readouterr().err
    for line, count in (
        ("copied", len(copied)),
        ("transcoded", len(transcoded)),
        ("re-encoded", len(encoded)),
        ("shrunk", 0),
        ("stripped", 1),
        ("orientation ignored", 1),
        ("no image by name", 1),
    ):
        assert re.search(rf"{line}.*│ +{count} ", summary)
    assert verify(out, decode=True) == []
    reader = BetonReader(out)
    assert len(reader) == len(copied) + len(transcoded) + len(encoded)
    for i, sample_id in enumerate(reader.source_ids):
        data, file = bytes(reader.image(i)), root / sample_id
        stored = Image.open(io.BytesIO(data))
        assert (
            stored.mode == "RGB"
            and stored.format == "JPEG"
            and stored.size == (97, 61) == (reader.widths[i], reader.heights[i])
        )
        if file in copied | transcoded:
            assert (pixels(data) == pixels(file.read_bytes())).all() and stored.getexif() == {}
            assert data == file.read_bytes() or file.name in ("rotated.jpg", "progressive.jpg", "grey.jpg")
        else:
            expected = encoded[file] if encoded[file] is not None else pixels(file.read_bytes())
            # The dithered ones have more noise than 4:2:0 at quality 95 keeps; a wrong conversion is off by dozens of
            # levels everywhere.
            limit = 12 if file.name in ("palette.png", "plain.gif", "bits.png") else 2.5
            assert np.abs(pixels(data) - expected).mean() < limit, sample_id


def test_max_resolution(to_beton: ModuleType, tmp_path: Path) -> None:
    wide, small = (
        save(scene(300, 120), tmp_path / "images" / "a" / "wide.jpg"),
        save(scene(100, 99), tmp_path / "images" / "a" / "small.jpg"),
    )
    tall = save(scene(31, 3001), tmp_path / "images" / "a" / "tall.png")
    out = tmp_path / "out.beton"
    assert to_beton.main([str(tmp_path / "images"), str(out), "--max-resolution", "100"]) == 0
    reader = BetonReader(out)
    assert list(zip(reader.source_ids, reader.widths, reader.heights, strict=True)) == [
        ("a/small.jpg", 100, 99),
        ("a/tall.png", 1, 100),
        ("a/wide.jpg", 100, 40),
    ]
    assert bytes(reader.image(0)) == small.read_bytes()
    expected = np.asarray(Image.open(wide).reduce(3)).astype(int)
    assert np.abs(pixels(reader.image(2)) - expected).mean() < 4
    assert tall.exists()


def test_antialiasing(to_beton: ModuleType, tmp_path: Path) -> None:
    """A one-pixel checkerboard shrinks to even grey; without antialiasing it would alias."""
    board = np.indices((400, 400)).sum(axis=0) % 2 * 255
    save(Image.fromarray(board.astype(np.uint8)), tmp_path / "images" / "a" / "board.png")
    assert to_beton.main([str(tmp_path / "images"), str(tmp_path / "out.beton"), "--max-resolution", "90"]) == 0
    assert np.abs(pixels(BetonReader(tmp_path / "out.beton").image(0)) - 127.5)[5:-5, 5:-5].max() < 8


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "restart_marker_rows": 1}])
def test_truncated_and_damaged_jpegs_end_the_run_by_name(
    to_beton: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture, request: pytest.FixtureRequest, options: dict
) -> None:
    if "progressive" in options:
        request.getfixturevalue("turbojpeg")
    folder = tmp_path / "images" / "a"
    save(scene(), folder / "good.jpg")
    whole = save(scene(200, 150), folder / "x.jpg", quality=95, **options).read_bytes()
    for cut in (1, 10, 150, 400, len(whole) // 2, len(whole) - 300, len(whole) - 20, len(whole) - 2, 0):
        (folder / "x.jpg").write_bytes(whole[:cut])
        assert to_beton.main([str(tmp_path / "images"), str(tmp_path / "out.beton")]) == 1
        said = capsys.readouterr().err
        assert str(folder / "x.jpg") in said and re.search("truncated|damaged|not an image", said), (cut, said)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    (folder / "x.jpg").write_bytes(whole)
    assert to_beton.main([str(tmp_path / "images"), str(tmp_path / "out.beton")]) == 0


def test_unusable_inputs(
    to_beton: ModuleType, photos: Path, photo_ids: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    names = ["animal", "fish", "monument", "tool"]
    out, images = str(tmp_path / "out.beton"), str(photos / "train")
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    cases = [
        (str(tmp_path / "nowhere"), None, "no such file or folder"),
        (str(tmp_path / "empty"), None, "no class folders"),
        (str(tmp_path / "hollow"), None, "hollow/a: no images"),
        (images, tmp_path / "empty", "not a label-map store"),
        (
            images,
            store_for(tmp_path / "imagenet", photo_ids, 1000, None)[0],
            "1000 classes.* has 4.*--classes.*--fit-head",
        ),
        (images, store_for(tmp_path / "other", photo_ids, 4, names[::-1])[0], "class 0 is 'tool'.*'animal'"),
        (
            images,
            store_for(tmp_path / "short", photo_ids[:-1], 4, names)[0],
            re.escape(f"{images}/{photo_ids[-1]}") + ".*no label map",
        ),
    ]
    for folder, maps, message in cases:
        assert to_beton.main([folder, out, *(["--label-maps", str(maps)] if maps else [])]) == 1
        assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.beton").exists() and not list(tmp_path.glob(".*"))


def test_runs_as_a_script(photos: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(photos / "val"), str(tmp_path / "val.beton")],
        capture_output=True,
        check=False,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    assert len(BetonReader(tmp_path / "val.beton")) == len(list((photos / "val").rglob("*.jpg")))
