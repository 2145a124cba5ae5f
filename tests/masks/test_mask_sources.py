"""Masks' files: which values are which classes, which files can be read, which mask belongs to which image."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_betons import polygon_mask

from tl_fast.masks.classes import read_classes
from tl_fast.masks.folder import MaskFolder
from tl_fast.masks.format import MaskError
from tl_fast.masks.image import palette_of, read_mask_file

MASK = polygon_mask(40, 60, 4)
MASK[MASK == 255] = 0


def png(image: Image.Image, **options) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG", **options)
    return buffer.getvalue()


def palette_png(mask: np.ndarray, colours: list[int], **options) -> bytes:
    image = Image.fromarray(mask)
    image.putpalette(colours)
    return png(image, **options)


# ---------------------------------------------------------------- classes


def test_ade20k() -> None:
    classes = read_classes("ade20k")
    spec = classes.spec
    assert (spec.num_classes, spec.ignore_index) == (150, 255)
    assert spec.class_names[:3] == ("wall", "building", "sky") and spec.class_names[-1] == "flag"
    assert len(set(spec.class_names)) == 150 and spec.colours[2] == (6, 230, 230) and spec.colours[149] == (92, 0, 255)
    assert classes.values[:152].tolist() == [255, *range(150), -1] and classes.values[255] == 255


def test_cityscapes() -> None:
    classes = read_classes("cityscapes")
    assert classes.spec.num_classes == 19 and classes.spec.class_names[::9] == ("road", "terrain", "bicycle")
    assert classes.spec.colours[13] == (0, 0, 142) and len(set(classes.spec.colours)) == 19
    ids = [7, 8, 11, 12, 13, 17, *range(19, 29), 31, 32, 33]
    assert classes.values[ids].tolist() == list(range(19))
    others = [value for value in range(34) if value not in ids]
    assert (classes.values[others] == 255).all() and (classes.values[34:255] == -1).all()


def test_camvid() -> None:
    classes = read_classes("camvid")
    assert classes.spec.num_classes == 11 and classes.spec.class_names[::5] == ("sky", "tree", "bicyclist")
    assert classes.spec.colours[3] == (128, 64, 128) and len(set(classes.spec.colours)) == 11
    assert classes.values[:13].tolist() == [*range(11), 255, -1]


def test_numbers_and_tables(tmp_path: Path) -> None:
    classes = read_classes("11", ignore_index=11)
    assert (classes.spec.num_classes, classes.spec.ignore_index, classes.spec.class_names) == (11, 11, ())
    assert classes.values[:13].tolist() == [*range(12), -1] and classes.values[255] == -1
    table = tmp_path / "table.csv"
    table.write_text("\ufeffid, train_id, name\n4, 1, road\n0, 0, sky\n9, 0, cloud\n7, 255, void\n8, , other\n2,-1,a\n")
    classes = read_classes(str(table), ignore_index=200)
    assert classes.spec.class_names == ("sky", "road") and classes.spec.colours == ()
    assert np.flatnonzero(classes.values >= 0).tolist() == [0, 2, 4, 7, 8, 9, 200]
    assert classes.translate(np.array([[4, 9, 7, 8, 2, 200]], np.uint8)).tolist() == [[1, 0, 200, 200, 200, 200]]
    with pytest.raises(MaskError, match=r"value 3 \(at row 1, column 0\), which --mask-classes .*table.csv does not"):
        classes.translate(np.array([[4, 4], [3, 4]], np.uint8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,name\n1,a\n", r"line 1: its first line names \['id', 'name'\]"),
        ("", "line 1: its first line names"),
        ("id,train_id,name\n1,0,a\n300,1,b\n", "line 3: id 300, train_id 1 is out of range"),
        ("id,train_id,name\n1,x,a\n", "line 2: invalid literal"),
        ("id,train_id,name\n1,0\n", "line 2: has more or fewer values"),
        ("id,train_id,name\n1,0,a,4\n", "line 2: has more or fewer values"),
        ("id,train_id,name\n1,0,a\n1,1,b\n", "the id 1 is there twice"),
        ("id,train_id,name\n1,0,a\n2,2,b\n", "no line has the train_id 1"),
        ("id,train_id,name\n1,255,a\n", "no line has the train_id 0"),
    ],
)
def test_tables_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "table.csv"
    table.write_text(text)
    with pytest.raises(MaskError, match=f"table.csv: {message}"):
        read_classes(str(table))


def test_classes_that_are_not_there() -> None:
    with pytest.raises(MaskError, match="give ade20k, cityscapes, camvid, a number of classes, or a CSV file"):
        read_classes("ade")
    for number in ("0", "256"):
        with pytest.raises(MaskError, match="num_classes must be"):
            read_classes(number)


# ---------------------------------------------------------------- files


def test_files_that_can_be_read() -> None:
    colours = list(range(0, 240, 10)) * 32
    for data in (
        png(Image.fromarray(MASK)),
        palette_png(MASK, colours),
        palette_png(MASK, colours[:12], optimize=True, bits=2),
        palette_png(MASK, colours, transparency=b"\0\1\2\3"),
    ):
        values = read_mask_file(data)
        assert values.dtype == np.uint8
        np.testing.assert_array_equal(values, MASK)
    assert palette_of(palette_png(MASK, colours))[1].tolist() == [30, 40, 50]
    assert palette_of(png(Image.fromarray(MASK))) is None and palette_of(b"no image") is None


def damaged(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :]


GOOD = png(Image.fromarray(MASK))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a PNG"),
        (b"\xff\xd8\xff", "not a PNG"),
        (png(Image.fromarray(MASK).convert("RGB")), "RGB pixels, 8 bits; masks must be"),
        (png(Image.fromarray(MASK).convert("LA")), "grey with alpha pixels"),
        (png(Image.fromarray(MASK).convert("1")), "grey pixels, 1 bits"),
        (png(Image.fromarray(MASK.astype(np.uint16))), "grey pixels, 16 bits"),
        (GOOD[:-20], "truncated PNG"),
        (GOOD[:60], "truncated PNG"),
        (damaged(GOOD, 60), "damaged PNG: the CRC of the chunk at byte 33"),
        (damaged(GOOD, 33), "truncated PNG"),
    ],
)
def test_files_that_cannot(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_mask_file(data)


def test_every_damaged_bit_is_seen() -> None:
    for place in range(len(GOOD)):
        with pytest.raises(ValueError, match="PNG|image"):
            read_mask_file(damaged(GOOD, place))


# ---------------------------------------------------------------- which mask belongs to which image


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(GOOD)


def test_masks_are_found_by_their_paths(tmp_path: Path) -> None:
    put(tmp_path, "a/1.png", "a/2.PNG", "b/1.png", "b/deep/er.1.png")
    (tmp_path / "b" / "notes.txt").write_text("no mask")
    masks = MaskFolder(tmp_path, read_classes("4"))
    ids = ["b/1.jpg", "a/2.jpeg", "a/3.jpg", "b/deep/er.1.png", "a/1.jpg", "1.jpg"]
    indices = masks.locate(ids)
    assert [None if j < 0 else masks.names[j] for j in indices.tolist()] == [
        "b/1.png",
        "a/2.PNG",
        None,
        "b/deep/er.1.png",
        "a/1.png",
        None,
    ]
    np.testing.assert_array_equal(masks.read(int(indices[0])), MASK)


def test_cityscapes_names(tmp_path: Path) -> None:
    of = "aachen/aachen_000000_000019_"
    put(tmp_path, *(f"{of}gtFine_{kind}.png" for kind in ("color", "instanceIds", "labelIds", "labelTrainIds")))
    masks = MaskFolder(tmp_path, read_classes("cityscapes"))
    (j,) = masks.locate([f"{of}leftImg8bit.png"])
    assert masks.names[j] == f"{of}gtFine_labelIds.png"


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    classes = read_classes("4")
    with pytest.raises(MaskError, match="no such folder"):
        MaskFolder(tmp_path / "none", classes)
    with pytest.raises(MaskError, match="holds no masks"):
        MaskFolder(tmp_path, classes)
    put(tmp_path, "train/1.png")
    masks = MaskFolder(tmp_path, classes)
    with pytest.raises(MaskError, match=r"none of its 1 masks .* train/1.png is the first mask, 1.jpg the first image"):
        masks.locate(["1.jpg", "2.jpg"])
    with pytest.raises(MaskError, match=r"train/1.png: is the mask of train/1.jpg and of train/1.gif"):
        masks.locate(["train/1.jpg", "train/1.gif"])
    put(tmp_path, "train/1.PNG")
    with pytest.raises(MaskError, match="two masks of one image"):
        MaskFolder(tmp_path, classes).locate(["train/1.jpg"])


def test_a_palette_gives_colours_where_the_table_has_none(tmp_path: Path) -> None:
    colours = [200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9]
    (tmp_path / "1.png").write_bytes(palette_png(MASK, colours))
    assert MaskFolder(tmp_path, read_classes("4")).spec.colours == ((200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9))
    assert MaskFolder(tmp_path, read_classes("9")).spec.colours == ()  # the palette has no colour of class 8
    assert MaskFolder(tmp_path, read_classes("cityscapes")).spec.colours[0] == (128, 64, 128)


def test_files_that_change_or_are_gone(tmp_path: Path) -> None:
    put(tmp_path, "1.png", "2.png")
    (tmp_path / "3.png").symlink_to(tmp_path / "none")
    masks = MaskFolder(tmp_path, read_classes("4"))
    (tmp_path / "1.png").write_bytes(GOOD + b"more")
    (tmp_path / "2.png").write_bytes(damaged(GOOD, 60))
    with pytest.raises(ValueError, match="1.png: has more than"):
        masks.read(0)
    with pytest.raises(ValueError, match="its mask .*2.png: damaged PNG"):
        masks.read(1)
    with pytest.raises(OSError, match="3.png"):
        masks.read(2)
