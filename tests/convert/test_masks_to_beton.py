"""The converter with masks as a user runs it: layouts, tables, bad masks, resuming, shards, betons packed anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from small_betons import masked_samples, random_maps

from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.labelmaps.format import MapSpec
from tl_fast.labelmaps.store import write_store

COUNT, CLASSES = 24, 5
SIZES = ((60, 80), (48, 33))


@pytest.fixture(scope="module")
def drawn() -> list[tuple[bytes, np.ndarray]]:
    return masked_samples(COUNT, SIZES, CLASSES)


@pytest.fixture
def folders(drawn: list[tuple[bytes, np.ndarray]], tmp_path: Path) -> tuple[Path, Path]:
    """images/*.jpg and masks/*.png, flat."""
    for i, (image, mask) in enumerate(drawn):
        put(tmp_path / "images" / f"{i:02d}.jpg", image)
        put(tmp_path / "masks" / f"{i:02d}.png", mask)
    return tmp_path / "images", tmp_path / "masks"


def put(path: Path, content: bytes | np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.fromarray(content).save(path)


def run(to_beton: ModuleType, *arguments: object) -> int:
    return to_beton.main([str(argument) for argument in arguments])


def masks_of(path: Path) -> dict[str, np.ndarray]:
    with BetonReader(path) as reader:
        return {name: reader.mask(i) for i, name in enumerate(reader.source_ids)}


def test_a_plain_folder(to_beton: ModuleType, drawn, folders, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images, masks = folders
    out, options = tmp_path / "out.beton", ("--masks", masks, "--mask-classes", CLASSES)
    assert run(to_beton, images, out, *options, "--dry-run") == 0
    said = capsys.readouterr().err
    assert "24 found, 0 missing" in said and not out.exists()
    assert run(to_beton, images, out, *options, "--workers", 2) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "24 in 1 classes" in said and "masks │ 0.0 MB" in said
    assert verify(out, decode=True) == []
    for name, mask in masks_of(out).items():
        np.testing.assert_array_equal(mask, drawn[int(name[:2])][1])
    with BetonReader(out) as reader:
        assert (reader.labels == 0).all() and reader.class_names == ["unlabelled"]
        assert reader.mask_spec.num_classes == CLASSES and reader.spec is None
    assert run(to_beton, images, tmp_path / "one.beton", *options, "--workers", 1) == 0
    assert (tmp_path / "one.beton").read_bytes() == out.read_bytes()
    assert run(to_beton, "info", out) == 0
    assert "masks │ 5 classes, 255 = ignored; " in " ".join(capsys.readouterr().out.split())
    for half in (0, 1):
        assert run(to_beton, images, out, *options, "--shard", f"{half}/2", "--order", "shuffled") == 0
    shards = [masks_of(tmp_path / f"out-00{half}-of-002.beton") for half in (0, 1)]
    assert [len(shard) for shard in shards] == [12, 12] and len(shards[0] | shards[1]) == 24
    assert all((mask == drawn[int(name[:2])][1]).all() for shard in shards for name, mask in shard.items())


def test_resume_sees_other_masks(to_beton: ModuleType, folders, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images, masks = folders
    out, options = tmp_path / "out.beton", ("--masks", masks, "--mask-classes", CLASSES, "--resume")
    broken = (masks / "20.png").read_bytes()
    (masks / "20.png").write_bytes(b"no mask")
    assert run(to_beton, images, out, *options) == 1
    assert "20.jpg: its mask" in capsys.readouterr().err
    (masks / "20.png").write_bytes(broken)
    assert run(to_beton, images, out, *options) == 0
    assert run(to_beton, images, out, *options) == 0
    assert "nothing to do" in capsys.readouterr().err
    for changed, words in (
        (("--mask-classes", CLASSES + 1), "its masks were of 5 classes, 255 = ignored and are now of 6"),
        (("--ignore-index", 255, "--masks", images.parent / "copies"), "the masks, their sizes or times"),
    ):
        if not (images.parent / "copies").exists():
            shutil.copytree(masks, images.parent / "copies", copy_function=shutil.copyfile)
        assert run(to_beton, images, out, *options, *changed) == 1
        assert words in " ".join(capsys.readouterr().err.split())
    table = tmp_path / "table.csv"
    table.write_text("id,train_id,name\n" + "".join(f"{c},{(c + 1) % CLASSES},class {c}\n" for c in range(CLASSES)))
    assert run(to_beton, images, out, *options, "--mask-classes", table) == 1
    assert "or have other names" in " ".join(capsys.readouterr().err.split())
    assert run(to_beton, images, out, *options, "--mask-classes", table, "--overwrite") == 0
    table.write_text(table.read_text() + "200,255,void\n")
    capsys.readouterr()
    assert run(to_beton, images, out, *options, "--mask-classes", table) == 1
    assert "or which values are which classes, have changed" in " ".join(capsys.readouterr().err.split())


def test_ade20k_and_label_maps(to_beton: ModuleType, drawn, tmp_path: Path) -> None:
    """images/training beside annotations/training: 0 is unlabelled there; with label maps in the same file."""
    ids = []
    for i, (image, mask) in enumerate(drawn):
        part = ("training", "validation")[i % 3 == 2]
        ids.append(f"{part}/ADE_{i:08d}.jpg")
        put(tmp_path / "images" / ids[-1], image)
        put(tmp_path / "annotations" / ids[-1].replace(".jpg", ".png"), np.where(mask == 255, 0, mask + 1).astype("u1"))
    spec = MapSpec(k=1, height=2, width=2, num_classes=2)
    write_store(tmp_path / "maps", ids, random_maps(COUNT, spec), spec, ["training", "validation"], model="a test")
    out = tmp_path / "out.beton"
    options = ("--masks", tmp_path / "annotations", "--mask-classes", "ade20k", "--label-maps", tmp_path / "maps")
    assert run(to_beton, tmp_path / "images", out, *options) == 0
    assert verify(out, decode=True) == []
    for name, mask in masks_of(out).items():
        np.testing.assert_array_equal(mask, drawn[int(name[-6:-4])][1])
    with BetonReader(out) as reader:
        assert reader.spec == spec and reader.mask_spec.class_names[0] == "wall" and len(reader.class_names) == 2
    # The beton as a source, with masks of another table: nothing of the masks that are in it is taken over.
    (tmp_path / "table.csv").write_text(
        "id,train_id,name\n0,255,\n" + "".join(f"{c + 1},{c == 2:d},{'ab'[c == 2]}\n" for c in range(5))
    )
    options = ("--masks", tmp_path / "annotations", "--mask-classes", tmp_path / "table.csv")
    assert run(to_beton, out, tmp_path / "again.beton", *options) == 0
    for name, mask in masks_of(tmp_path / "again.beton").items():
        right = drawn[int(name[-6:-4])][1]
        np.testing.assert_array_equal(mask, np.where(right == 255, 255, right == 2))


def test_cityscapes(to_beton: ModuleType, drawn, tmp_path: Path) -> None:
    ids = np.array([7, 8, 11, 12, 13])
    for i, (image, mask) in enumerate(drawn[:6]):
        stem = f"{('aachen', 'ulm')[i % 2]}/x_{i:06d}"
        Image.open(as_file(tmp_path, image)).save(path := tmp_path / "image.png")
        put(tmp_path / "leftImg8bit" / f"{stem}_leftImg8bit.png", path.read_bytes())
        path.unlink()
        values = np.where(mask == 255, 3, ids[np.minimum(mask, 4)]).astype(np.uint8)
        put(tmp_path / "gtFine" / f"{stem}_gtFine_labelIds.png", values)
        put(tmp_path / "gtFine" / f"{stem}_gtFine_color.png", np.zeros((4, 4, 4), np.uint8))
        (tmp_path / "gtFine" / f"{stem}_gtFine_polygons.json").write_text("{}")
    out = tmp_path / "out.beton"
    options = ("--masks", tmp_path / "gtFine", "--mask-classes", "cityscapes")
    assert run(to_beton, tmp_path / "leftImg8bit", out, *options) == 0
    for name, mask in masks_of(out).items():
        np.testing.assert_array_equal(mask, drawn[int(name.split("_")[1])][1])


def as_file(folder: Path, data: bytes) -> Path:
    (folder / "image.jpg").write_bytes(data)
    return folder / "image.jpg"


def test_bad_masks_are_left_out(
    to_beton: ModuleType, drawn, folders, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images, masks = folders
    mask = drawn[0][1]
    (masks / "01.png").unlink()
    put(masks / "02.png", mask[:, :-1])
    put(masks / "04.png", np.full_like(mask, 77))
    Image.fromarray(mask).convert("RGB").save(masks / "06.png")
    Image.fromarray(mask.astype(np.uint16)).save(masks / "08.png")
    (masks / "10.png").write_bytes((masks / "10.png").read_bytes()[:-30])
    (masks / "12.png").unlink()
    (masks / "12.png").symlink_to(masks / "none")
    reasons = {
        "01.jpg": "has no mask",
        "02.jpg": "its mask is 79×60 pixels, the image 80×60",
        "04.jpg": "has the value 77 (at row 0, column 0), which --mask-classes 5 does not know",
        "06.jpg": "a PNG of RGB pixels, 8 bits",
        "08.jpg": "a PNG of grey pixels, 16 bits",
        "10.jpg": "truncated PNG",
        "12.jpg": "No such file",
    }
    out, options = tmp_path / "out.beton", ("--masks", masks, "--mask-classes", CLASSES)
    assert run(to_beton, images, out, *options) == 1
    assert "01.jpg: has no mask in" in capsys.readouterr().err
    assert run(to_beton, images, out, *options, "--on-error", "quarantine", "--max-rejects", 7) == 0
    rejects = {
        reject["id"]: reject["reason"]
        for reject in map(json.loads, (tmp_path / "out.beton.rejects.jsonl").read_text().splitlines())
    }
    assert rejects.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in rejects[name]
    assert len(masks_of(out)) == COUNT - len(reasons) and verify(out, decode=True) == []


def test_options_that_belong_together(
    to_beton: ModuleType, folders, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images, masks = folders
    out = tmp_path / "out.beton"
    for options, words in (
        (("--masks", masks), "--masks needs --mask-classes"),
        (("--mask-classes", 5), "--mask-classes needs --masks"),
        ((), "has no class folders"),
        (("--masks", masks, "--mask-classes", "5", "--ignore-index", "3"), "ignore_index must be an integer from"),
        (("--masks", images, "--mask-classes", "5"), "holds no masks"),
    ):
        assert run(to_beton, images, out, *options) == 1
        assert words in capsys.readouterr().err


def test_turned_and_shrunk_images(to_beton: ModuleType, drawn, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A mask has the size of the image as it is packed: of the upright one with --exif apply; before it is shrunk."""
    image, mask = drawn[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "images").mkdir()
    Image.open(as_file(tmp_path, image)).save(tmp_path / "images" / "0.jpg", exif=exif, quality=95)
    put(tmp_path / "masks" / "0.png", mask)
    out = tmp_path / "out.beton"
    options = ("--masks", tmp_path / "masks", "--mask-classes", CLASSES, "--overwrite")
    assert run(to_beton, tmp_path / "images", out, *options) == 0
    assert run(to_beton, tmp_path / "images", out, *options, "--exif", "apply") == 1
    assert "its mask is 80×60 pixels, the image 60×80" in capsys.readouterr().err
    put(tmp_path / "masks" / "0.png", np.rot90(mask, -1))
    assert run(to_beton, tmp_path / "images", out, *options, "--exif", "apply", "--max-resolution", 40) == 0
    (small,) = masks_of(out).values()
    right = Image.fromarray(np.rot90(mask, -1)).resize((30, 40), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(small, right)
