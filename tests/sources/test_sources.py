"""Sources: every kind lists and reads what the image folder it was made from does; damage is said, never passed
over."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from small_sources import (
    WNIDS,
    add,
    checksummed,
    class_tar,
    pack,
    pack_train,
    pack_val,
    pack_webdataset,
    parquet_table,
    write_devkit,
    write_parquet,
)

from tl_fast.beton.layout import BetonError
from tl_fast.convert.selection import Conversion
from tl_fast.convert.write import write_beton
from tl_fast.sources import tar_source as tar_files
from tl_fast.sources.image_folder import ImageFolder, ImageFolderError, list_images
from tl_fast.sources.open import expand_paths, open_source
from tl_fast.sources.source import Source, SourceChanged, SourceError, label_classes, read_class_names


def assert_equal(source: Source, folder: Source, *, names: bool = True, ids: bool = True) -> None:
    """The same samples: ids, labels, names, sizes and bytes, whatever the order when ids are not compared."""
    if ids:
        assert source.ids == folder.ids
    if names:
        assert source.class_names == folder.class_names
    assert source.labels.dtype == source.sizes.dtype == np.int64 and len(source) == len(folder) == len(source.stamps)
    assert np.array_equal(source.labels, folder.labels)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(source.read, range(len(source)))) == [
            Path(folder.root, name).read_bytes() for name in folder.ids
        ]


@pytest.fixture(scope="module")
def folder(photos, tmp_path_factory) -> ImageFolder:
    """24 bundled photos in four folders called as ImageNet's classes are."""
    root = tmp_path_factory.mktemp("images")
    for name, wnid in zip(sorted(os.listdir(photos / "train")), WNIDS, strict=True):
        (root / wnid).mkdir()
        for number, photo in enumerate(sorted((photos / "train" / name).iterdir())[:6]):
            shutil.copy(photo, root / wnid / f"{wnid}_{10026 - number * 997}.JPEG")
    return ImageFolder(root)


@pytest.fixture(scope="module")
def originals(shared) -> ImageFolder:
    if not (shared / "data" / "imagenet_sample").is_dir():
        pytest.skip(f"no data/imagenet_sample in {shared}")
    return ImageFolder(shared / "data" / "imagenet_sample")


@pytest.fixture(params=["folder", "originals"])
def images(request) -> ImageFolder:
    """Bundled photos, then the 133 original ImageNet files where the shared data are."""
    return request.getfixturevalue(request.param)


# image folder


def test_folder(folder):
    assert folder.kind == "image folder" and folder.ids == sorted(folder.ids) and folder.class_names == WNIDS
    files = [Path(folder.root, name) for name in folder.ids]
    assert folder.labels.tolist() == [WNIDS.index(file.parent.name) for file in files]
    assert folder.stamps.tolist() == [[file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    assert folder.origin(5) == str(files[5])
    assert [folder.read(i) for i in range(len(folder))] == [file.read_bytes() for file in files]
    assert type(open_source(folder.root)) is ImageFolder and open_source([folder.root]).ids == folder.ids


def test_order_is_a_permutation_of_the_seed(folder):
    assert folder.order(None).tolist() == list(range(24))
    one, other = folder.order(1), folder.order(2)
    assert sorted(one.tolist()) == list(range(24)) and one.tolist() != other.tolist()
    assert one.tolist() == np.random.Generator(np.random.PCG64(1)).permutation(24).tolist()


def test_folder_with_class_names(folder, tmp_path):
    """Names may be more than the folders, in another order: a part of ImageNet keeps ImageNet's labels."""
    (tmp_path / "names.json").write_text(json.dumps(["n09999999", *reversed(WNIDS)]))
    source = open_source(folder.root, class_names=tmp_path / "names.json")
    assert source.labels.tolist() == (4 - folder.labels).tolist() and len(source.class_names) == 5
    (tmp_path / "names.txt").write_text("\n".join(WNIDS[1:]))
    with pytest.raises(SourceError, match="n01440764.*not among the 3"):
        open_source(folder.root, class_names=tmp_path / "names.txt")


def test_what_cannot_be_read_in_a_folder_is_a_bad_sample_and_not_the_end_of_listing(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.jpg").write_bytes(b"one")
    (tmp_path / "a" / "dangling.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "a" / "itself.jpg").symlink_to(tmp_path / "a" / "itself.jpg")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    source = ImageFolder(tmp_path)
    assert source.ids == ["a/0.jpg", "a/dangling.jpg", "a/itself.jpg", "a/pipe.jpg"] and source.sizes.tolist() == [
        3,
        0,
        0,
        0,
    ]
    assert source.read(0) == b"one"
    for i, message in ((1, "No such file.*dangling"), (2, "symbolic links.*itself"), (3, "pipe.jpg: .*no file")):
        with pytest.raises((OSError, SourceError), match=message):
            source.read(i)


def test_folder_listing_says_what_is_wrong(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(b"one")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "linked").symlink_to(tmp_path / "a", target_is_directory=True)
    source = ImageFolder(tmp_path)
    assert source.ids == ["a/1.jpg", "b/1.jpg", "linked/1.jpg"] and source.ignored == 2
    (tmp_path / "b" / "loop").symlink_to(tmp_path / "b", target_is_directory=True)
    with pytest.raises(ImageFolderError, match="b/loop/loop"):
        list_images(tmp_path)
    (tmp_path / "b" / "loop").unlink()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/b/caf\xe9.jpg")).touch()
    with pytest.raises(ImageFolderError, match=r"caf\\udce9.*UTF-8"):
        list_images(tmp_path)
    with pytest.raises(ImageFolderError, match="no class folders"):
        ImageFolder(tmp_path / "a")


@pytest.mark.parametrize("change", ["longer", "shorter", "gone"])
def test_folder_file_that_changes_is_said(tmp_path, change):
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "1.jpg"
    file.write_bytes(b"12345")
    source = ImageFolder(tmp_path)
    assert source.read(0) == b"12345"
    file.unlink() if change == "gone" else file.write_bytes(b"123456789" if change == "longer" else b"123")
    with pytest.raises((SourceError, FileNotFoundError), match="a/1.jpg"):
        source.read(0)


# ImageNet tars


def test_train_tar(images, tmp_path):
    tar = pack_train(tmp_path / "ILSVRC2012_img_train.tar", images)
    source = open_source(tar)
    assert source.kind == "ImageNet tar"
    assert_equal(source, images)
    name, file = images.ids[3].split("/")
    assert source.origin(3) == f"{tar}:{name}.tar:{file}"
    assert len(np.unique(source.stamps, axis=0)) == len(images)
    source.close()


def test_class_tars_taken_out(folder, tmp_path, monkeypatch):
    tar = pack_train(tmp_path / "train.tar", folder)
    (tmp_path / "classes").mkdir()
    subprocess.run(["tar", "-xf", tar, "-C", tmp_path / "classes"], check=True)  # tarfile's `filter` came with 3.11.4
    assert_equal(open_source(tmp_path / "classes"), folder)
    files = sorted((tmp_path / "classes").iterdir())
    assert_equal(open_source(files[::-1]), folder)
    assert_equal(open_source(str(tmp_path / "classes" / "n*.tar")), folder)
    monkeypatch.setattr(tar_files, "_MAX_OPEN", 2)  # more tars than may stay open
    before = len(os.listdir("/proc/self/fd"))
    source = open_source(tmp_path / "classes")
    assert len(os.listdir("/proc/self/fd")) == before + 2
    assert_equal(source, folder)
    os.utime(files[3], (1, 1))
    with pytest.raises(SourceError, match="has changed"):
        source.read(len(folder) - 1)
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_train_tar_agrees_with_torchvision(folder, tmp_path, monkeypatch):
    """torchvision unpacks the tars and reads the devkit with its own code; what it makes of them is what we read in
    place."""
    import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision
    # isort: split

    imagenet = pytest.importorskip("torchvision.datasets.imagenet")
    monkeypatch.setattr(
        imagenet, "_verify_archive", lambda *_: None
    )  # these are not the originals, so their MD5 differs
    pack_train(tmp_path / "ILSVRC2012_img_train.tar", folder)
    imagenet.parse_train_archive(tmp_path)
    unpacked = ImageFolder(tmp_path / "train")
    assert_equal(open_source(tmp_path / "ILSVRC2012_img_train.tar"), unpacked)

    val, truth = pack_val(tmp_path / "ILSVRC2012_img_val.tar", folder)
    write_devkit(tmp_path / "devkit" / "ILSVRC2012_devkit_t12", WNIDS, truth)
    with tarfile.open(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "devkit" / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    imagenet.parse_devkit_archive(tmp_path)
    assert imagenet.load_meta_file(tmp_path)[1] == truth
    imagenet.parse_val_archive(tmp_path)
    unpacked = ImageFolder(tmp_path / "val")
    for devkit in (
        tmp_path / "ILSVRC2012_devkit_t12.tar.gz",
        tmp_path / "devkit",
        tmp_path / "devkit" / "ILSVRC2012_devkit_t12",
        tmp_path / "devkit" / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt",
    ):
        assert_equal(open_source(val, labels=devkit), unpacked)


def test_val_tar_with_lists(images, tmp_path):
    val, truth = pack_val(tmp_path / "val.tar", images)
    names = [f"ILSVRC2012_val_{number:08d}" for number in range(1, len(truth) + 1)]
    numbers = [images.class_names.index(name) for name in truth]
    (tmp_path / "names.txt").write_text("\n".join(images.class_names))
    lists = {
        "pairs": "".join(f"{name}.JPEG {wnid}\n" for name, wnid in reversed(list(zip(names, truth, strict=True)))),
        "caffe": "".join(f"val/{name}.JPEG {number}\n" for name, number in zip(names, numbers, strict=True)),
        "bare": "".join(f"{wnid}\n" for wnid in truth),
        "numbers": "\n".join(map(str, numbers)),
        "csv": "file,class\n" + "".join(f"{name}.JPEG,{wnid}\n" for name, wnid in zip(names, truth, strict=True)),
        "kaggle": "ImageId,PredictionString\n"
        + "".join(f"{n},{w} 85 1 499 272 {w} 1 2 3 4 \n" for n, w in zip(names, truth, strict=True)),
    }
    for kind, text in lists.items():
        (tmp_path / f"{kind}.txt").write_text(text)
        source = open_source(val, labels=tmp_path / f"{kind}.txt", class_names=tmp_path / "names.txt")
        assert source.ids == sorted(f"{wnid}/{name}.JPEG" for name, wnid in zip(names, truth, strict=True)), kind
        assert [images.class_names[label] for label in source.labels] == [name.split("/")[0] for name in source.ids]
        assert source.class_names == images.class_names
        if kind in ("pairs", "bare", "csv", "kaggle"):
            assert open_source(val, labels=tmp_path / f"{kind}.txt").ids == source.ids
    with tarfile.open(val) as archive:
        for i, name in enumerate(source.ids):
            assert source.read(i) == archive.extractfile(name.split("/")[1]).read()
    numbered = open_source(val, labels=tmp_path / "numbers.txt")
    assert numbered.class_names == [str(number) for number in range(len(images.class_names))]
    assert numbered.origin(0).startswith(f"{val}:ILSVRC2012_val_")


@pytest.mark.parametrize(
    "text, message",
    [
        ("n01440764\n" * 23, "23 labels.*24 images"),
        ("{0} n01440764\n{0} n01443537\n", "line 2: .*has class 'n01443537' here and 'n01440764' above"),
        ("{0} n01440764\n", "no class for .*23 such"),
        ("{0} n01440764\nother.JPEG n01440764\n", "line 2: 'other.JPEG' is no image"),
        ("{0} n01440764\nodd\n", "line 2: 'odd'"),
        ("ImageId,PredictionString\n{0},n01440764 1 2 3 4 n01443537 1 2 3 4\n", "line 2: .*one class"),
        ("", "0 labels"),
        ("-1\n" * 24, "no whole number|class '-1'"),
        ("7\n" * 23 + "x\n", "'x'"),
    ],
)
def test_val_labels_refused(folder, tmp_path, text, message):
    val, _ = pack_val(tmp_path / "val.tar", folder)
    (tmp_path / "labels.txt").write_text(text.replace("{0}", "ILSVRC2012_val_00000001"))
    with pytest.raises(SourceError, match=message):
        source = open_source(val, labels=tmp_path / "labels.txt")
        raise AssertionError(source.class_names)


def test_devkit_refused(folder, tmp_path):
    val, truth = pack_val(tmp_path / "val.tar", folder)
    with pytest.raises(SourceError, match="--labels"):
        open_source(val)
    data = tmp_path / "kit" / "data"
    write_devkit(tmp_path / "kit", WNIDS, truth[:-1])
    with pytest.raises(SourceError, match="knows 23 validation images.*has 24"):
        open_source(val, labels=tmp_path / "kit")
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("5\n" * 24)
    with pytest.raises(SourceError, match="class 5 of its ground truth"):  # a group of classes, not a class
        open_source(val, labels=tmp_path / "kit")
    whole = (data / "meta.mat").read_bytes()
    for damage in (whole[:200], whole[:-40], b"no mat file", whole[:128] + os.urandom(400)):
        (data / "meta.mat").write_bytes(damage)
        with pytest.raises(SourceError, match="kit"):
            open_source(val, labels=tmp_path / "kit")
    (data / "meta.mat").unlink()
    for path in (tmp_path / "kit", data / "ILSVRC2012_validation_ground_truth.txt"):
        with pytest.raises(SourceError, match="meta.mat"):
            open_source(val, labels=path)
    with pytest.raises(SourceError, match="is for ImageNet's validation tar"):
        open_source(pack_train(tmp_path / "train.tar", folder), labels=tmp_path / "kit")


def test_cut_off_tars_name_the_member(folder, tmp_path):
    """Cut anywhere, inside or outside: an error each time, for the last bytes of a tar say that it is whole."""
    whole = pack_train(tmp_path / "train.tar", folder).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for cut in [
        0,
        1,
        511,
        512,
        700,
        1024,
        5000,
        len(whole) // 2 // 512 * 512,
        len(whole) // 2 + 77,
        end - 1,
        end // 512 * 512,
    ]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(SourceError, match="cut.tar"):
            open_source(tmp_path / "cut.tar")
    inner = class_tar([("n01440764_1.JPEG", bytes(2000)), ("n01440764_2.JPEG", b"y" * 3000)])
    other = class_tar([("n01443537_1.JPEG", b"z")])
    cuts = {
        100: "first header",
        2000: "_1.JPEG' is cut off",
        2560: "behind 'n01440764_1.JPEG'",
        3000: "behind 'n01440764_1.JPEG'",
        5200: "_2.JPEG' is cut off",
        6140: "cut off behind 'n01440764_2.JPEG'",
        6144: "cut off after 6144 .*_2.JPEG'",
    }
    for cut, named in cuts.items():
        pack(tmp_path / "inner.tar", [("n01440764.tar", inner[:cut]), ("n01443537.tar", other)])
        with pytest.raises(SourceError, match=f"inner.tar:n01440764.tar: .*{named}"):
            open_source(tmp_path / "inner.tar")


def test_damaged_tar_headers(folder, tmp_path):
    """tarfile ends silently at a damaged header; here it is an error. Random damage gives an error or the right
    bytes."""
    plain = [(f"{wnid}_{n}.JPEG", bytes([n]) * (500 + n)) for wnid in WNIDS[:1] for n in range(5)]
    whole = class_tar(plain)
    damaged = bytearray(whole)
    damaged[2 * 1024 + 5] ^= 1  # the name in the third header
    (tmp_path / "n01440764.tar").write_bytes(damaged)
    with pytest.raises(SourceError, match=r"n01440764_1.JPEG'? \(at byte 2048\) is damaged"):
        open_source(tmp_path / "n01440764.tar")
    (tmp_path / "n01440764.tar").write_bytes(whole + whole)
    with pytest.raises(SourceError, match="more data follow"):
        open_source(tmp_path / "n01440764.tar")
    generator, wanted, sound = random.Random(5), dict(plain), 0
    long = class_tar([("x" * 150 + f"_{n}.jpg", b"a" * 600) for n in range(3)], format=tarfile.PAX_FORMAT)
    for base in (whole, long, class_tar([("y" * 150 + f"_{n}.jpg", b"a" * 600) for n in range(3)])):
        for _ in range(150):
            damaged = bytearray(base)
            for _ in range(generator.randint(1, 3)):
                block = generator.randrange(len(base) // 512) * 512
                place = block + generator.choice((0, 100, 124, 130, 148, 150, 156, 257, 345, 482))
                damaged[place] = generator.choice(b"\0\x80\xff1KLSgx")
            (tmp_path / "n01440764.tar").write_bytes(damaged)
            try:
                with open_source(tmp_path / "n01440764.tar") as source:
                    for i, name in enumerate(source.ids):
                        data = source.read(i)
                        assert (
                            base is not whole
                            or name.split("/")[1] not in wanted
                            or len(data) == len(wanted[name.split("/")[1]])
                        )
                        sound += 1
            except SourceError as error:
                assert "n01440764.tar" in str(error)
    assert sound > 100


SIZES = [b"\x80" + b"\xff" * 11, b"\xff" * 12, b"77777777777\0", b"\x80" + bytes(3) + (1 << 62).to_bytes(8, "big")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [b"0", b"L", b"x", b"g", b"S", b"K", b"7", b"5", b"1"])
def test_claimed_sizes_are_bounded(tmp_path, size, kind):
    """Sizes of exabytes, or below zero: an error at once, whatever kind of member claims them; nothing that large is
    asked for."""
    whole = bytearray(class_tar([("n01440764_1.JPEG", b"a" * 600), ("n01440764_2.JPEG", b"b" * 600)]))
    header = whole[:512]
    header[124:136], header[156:157] = size, kind
    (tmp_path / "n01440764.tar").write_bytes(checksummed(header) + whole[512:])
    with pytest.raises(SourceError, match="n01440764.tar"):
        open_source(tmp_path / "n01440764.tar")


def test_chained_long_names_end(tmp_path):
    header = bytearray(class_tar([("n01440764_1.JPEG", b"")])[:512])
    header[124:136], header[156:157] = b"00000000000\0", b"L"
    (tmp_path / "n01440764.tar").write_bytes(checksummed(header) * 5000 + bytes(1024))
    with pytest.raises(SourceError, match="n01440764.tar"):
        open_source(tmp_path / "n01440764.tar")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_names(tmp_path, format):
    """Names that need tarfile's long-name forms, climb, hold newlines or accents are data like others."""
    prefix = "d" * 90 + "/"
    names = ["a.jpg", "new\nline.jpg", "café.JPEG", "../up.jpg", "/abs.jpg", prefix + "e" * 60 + ".jpg"]
    names += ["x" * 180 + ".jpg"] if format != tarfile.USTAR_FORMAT else []
    pack(tmp_path / "n01440764.tar", [(name, name.encode()) for name in names], format)
    source = open_source(tmp_path / "n01440764.tar")
    assert {name.removeprefix("n01440764/") for name in source.ids} == set(names)
    for i, name in enumerate(source.ids):
        assert source.read(i).decode() == name.removeprefix("n01440764/")
        json.dumps(name, ensure_ascii=False).encode("utf-8")


def test_tar_members_that_cannot_be_used(tmp_path, folder):
    def tar(name: str, *members: tuple[str, bytes, dict]) -> Path:
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, data, attributes in members:
                add(archive, member, data, **attributes)
        return tmp_path / name

    image = ("n01440764_1.JPEG", b"a", {})
    link = ("n01440764_2.JPEG", b"", {"type": tarfile.LNKTYPE, "linkname": "n01440764_1.JPEG"})
    device = ("n01440764_3.JPEG", b"", {"type": tarfile.CHRTYPE})
    note, folder_member = ("notes.txt", b"hello", {}), ("folder", b"", {"type": tarfile.DIRTYPE})
    other_link = ("latest", b"", {"type": tarfile.SYMTYPE, "linkname": "x"})
    for wrong, message in ((link, "n01440764_2.JPEG: is a link"), (device, "n01440764_3.JPEG: is a device")):
        with pytest.raises(SourceError, match=message):
            open_source(tar("n01440764.tar", image, wrong))
    source = open_source(tar("n01440764.tar", folder_member, image, note, other_link))
    assert source.ignored == 2 and source.ids == ["n01440764/n01440764_1.JPEG"]
    with pytest.raises(SourceError, match=r"n01440764_1.JPEG \(at byte 512\) and .*\(at byte 1536\): two samples"):
        open_source(tar("n01440764.tar", image, image))
    latin = class_tar([("n_caf.JPEG", b"a")]).replace(b"n_caf.JPEG", b"n_ca\xe9.JPEG")
    header = bytearray(latin[:512])
    (tmp_path / "n01440764.tar").write_bytes(checksummed(header) + latin[512:])
    with pytest.raises(SourceError, match="not UTF-8"):
        open_source(tmp_path / "n01440764.tar")
    inner = class_tar([("n01440764_1.JPEG", b"a")])
    for members, message in (
        ([("n01440764.tar", inner, {}), ("n01443537.tar.gz", b"x", {})], "n01443537.tar.gz: a compressed class tar"),
        ([("n01440764.tar", inner, {}), ("stray.JPEG", b"x", {})], "stray.JPEG: an image beside"),
        ([("n01440764.tar", inner, {}), ("n01443537.tar", class_tar([]), {})], "n01443537.tar: no images"),
        (
            [
                ("n01440764.tar", inner, {}),
                ("n01443537.tar", b"", {"type": tarfile.SYMTYPE, "linkname": "n01440764.tar"}),
            ],
            "is a link",
        ),
        ([("n01440764.tar", b"\x1f\x8b" + bytes(600), {})], "n01440764.tar: is gzip"),
        ([("n01440764.tar", inner, {}), ("again/n01440764.tar", inner, {})], "two samples with the id"),
        ([("README", b"x", {})], "README"),
        ([], "nothing"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(tar("train.tar", *members))


def test_sparse_member_is_refused(tmp_path):
    header = bytearray(class_tar([("n01440764_1.JPEG", b"a" * 600)]))
    first = header[:512]
    first[156:157] = b"S"  # GNU sparse: one piece of 600 bytes at 0, real size 600
    first[386:410] = b"00000000000\0" + b"%011o\0" % 600
    first[483:495] = b"%011o\0" % 600
    (tmp_path / "n01440764.tar").write_bytes(checksummed(first) + header[512:])
    with pytest.raises(SourceError, match="is a sparse file"):
        open_source(tmp_path / "n01440764.tar")


def test_tar_that_shrinks_is_said(folder, tmp_path):
    tar = pack_train(tmp_path / "train.tar", folder)
    source = open_source(tar)
    os.truncate(tar, 4096)
    with pytest.raises(SourceError, match="shorter than"):
        source.read(len(folder) - 1)
    source.close()


def test_a_tar_that_changes_ends_the_run(folder, tmp_path):
    """Under quarantine too: the samples of a cut-off or replaced tar are not to blame."""
    tar = pack_train(tmp_path / "train.tar", folder)
    with open_source(tar) as source:
        os.truncate(tar, tar.stat().st_size // 2)
        with pytest.raises(BetonError, match="shorter than.*not to blame"):
            conversion = Conversion(source, None, source.order(None))
            write_beton(tmp_path / "out.beton", conversion, class_names=source.class_names, on_error="quarantine")


# WebDataset


@pytest.mark.parametrize("classes", ["number", "name"])
def test_webdataset(images, tmp_path, classes):
    pack_webdataset(images, tmp_path, 3, classes)
    (tmp_path / "class_names.json").write_text(json.dumps(images.class_names))  # beside the shards
    source = open_source(str(tmp_path / "train-{000..002}.tar"))
    assert source.kind == "WebDataset" and source.ignored == len(images)
    rows = np.concatenate([np.arange(shard, len(images), 3) for shard in range(3)])
    assert source.ids == [
        f"train-{i % 3:03d}/{Path(images.ids[i]).stem}.{Path(images.ids[i]).suffix[1:].lower()}" for i in rows
    ]
    assert np.array_equal(source.labels, images.labels[rows]) and source.class_names == images.class_names
    assert [source.read(i) for i in range(len(source))] == [images.read(i) for i in rows.tolist()]
    assert source.origin(0) == f"{tmp_path}/train-000.tar:{source.ids[0].split('/')[1]}"
    assert open_source(str(tmp_path / "train-*.tar")).ids == source.ids == open_source(tmp_path).ids
    (tmp_path / "class_names.json").unlink()
    plain = open_source(tmp_path)
    if classes == "number":
        assert plain.class_names == [str(place) for place in range(len(images.class_names))]
    assert np.array_equal(plain.labels, source.labels)  # the names sort as the labels do


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"1")], "train.tar: sample 'b' has no cls"),
        ([("a.jpg", b"1"), ("a.cls", b"0"), ("b.cls", b"1")], "train.tar: sample 'b' has no image"),
        ([("a.jpg", b"1"), ("a.png", b"1"), ("a.cls", b"0")], "'a' has two images"),
        ([("a.jpg", b"1"), ("a.cls", b"0"), ("a.cls", b"1")], "'a' has two classes"),
        ([("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"1"), ("b.cls", b"0"), ("a.json", b"")], "'a' returns"),
        ([("a.cls", b"x"), ("a.jpg", b"1"), ("b.cls", b"3"), ("b.jpg", b"1")], "a.jpg: class 'x'"),
        ([("a.cls", b"-1"), ("a.jpg", b"1")], "class '-1'"),
        ([("a.cls", b"99999999999999999999999"), ("a.jpg", b"1")], "not below 65535"),
        ([("a.cls", b"9" * 5000), ("a.jpg", b"1")], "no class"),
        ([("a.cls", b" "), ("a.jpg", b"1")], "empty"),
        ([("a.cls", b"\xff"), ("a.jpg", b"1")], "no text"),
        ([("v1.5.cls", b"1"), ("v1.5.jpg", b"1")], "first dot"),
    ],
)
def test_webdataset_refused(tmp_path, members, message):
    with pytest.raises(SourceError, match=message):
        open_source(pack(tmp_path / "train.tar", members))


def test_webdataset_details(tmp_path):
    """Keys with folders, upper-case extensions, other members between; keys that begin anew in each shard; more classes
    than samples."""
    others = [("._0.jpg", b"mac"), ("x/0.seg.png", b""), ("info.json", b"")]
    pack(tmp_path / "s-0.tar", [("README", b""), ("x/0.JPG", b"1"), others[0], ("x/0.cls", b"2"), *others[1:]])
    pack(tmp_path / "s-1.tar", [("x/0.cls", b"1\n"), ("x/0.webp", b"2")])
    source = open_source(tmp_path)
    assert (
        source.ids == ["s-0/x/0.JPG", "s-1/x/0.webp"]
        and source.labels.tolist() == [2, 1]
        and source.class_names == ["0", "1", "2"]
    )
    assert source.ignored == 4 and [source.read(0), source.read(1)] == [b"1", b"2"]
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "s-0.tar", tmp_path / "other" / "s-0.tar")
    with pytest.raises(SourceError, match="shards of one name"):
        open_source([tmp_path / "s-0.tar", tmp_path / "other" / "s-0.tar"])
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    with pytest.raises(SourceError, match="x/0.JPG: class 2 is not below 2"):
        open_source(str(tmp_path / "s-*.tar"), class_names=tmp_path / "two.txt")


# parquet


def test_parquet(images, tmp_path):
    """Shards as on the Hub: paths with the class behind, human names in the schema."""
    human = [f"name of {name}" for name in images.class_names]
    halves = [list(range(len(images)))[: len(images) // 2], list(range(len(images)))[len(images) // 2 :]]
    for part, rows in enumerate(halves):
        write_parquet(
            tmp_path / f"train-0000{part}-of-00002.parquet", parquet_table(images, rows, human), row_group_size=5
        )
    source = open_source(tmp_path)
    assert source.kind == "parquet" and source.class_names == human
    assert_equal(source, images, names=False)
    assert source.origin(len(halves[0]) + 3) == f"{tmp_path}/train-00001-of-00002.parquet row 3"
    assert len(np.unique(source.stamps, axis=0)) == len(images)
    assert source.sizes[:5].sum() == pytest.approx(images.sizes[:5].sum(), rel=0.05, abs=1000)
    (tmp_path / "names.txt").write_text("\n".join(images.class_names))
    assert_equal(open_source(str(tmp_path / "*.parquet"), class_names=tmp_path / "names.txt"), images)
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(SourceError, match="1 of 2 shards"):
        open_source(tmp_path)


def test_parquet_forms(folder, tmp_path):
    """Bytes without a struct, other column names, text labels, dictionaries, large types, no features: all that pyarrow
    users write."""
    pa = pytest.importorskip("pyarrow")
    data = [folder.read(i) for i in range(len(folder))]
    texts = [folder.class_names[label] for label in folder.labels]
    tables = {
        "plain": pa.table({"img": pa.array(data, pa.binary()), "labels": pa.array(folder.labels, pa.uint8())}),
        "large": pa.table({"photo": pa.array(data, pa.large_binary()), "kind": pa.array(texts)}),
        "dictionary": pa.table({"image": data, "label": pa.array(texts).dictionary_encode()}),
        "chunks": pa.concat_tables(
            [pa.table({"image": [item], "label": [text]}) for item, text in zip(data, texts, strict=True)]
        ),
    }
    for name, table in tables.items():
        path = write_parquet(tmp_path / f"{name}.parquet", table, row_group_size=7)
        source = open_source(path, **({"image_column": "photo", "label_column": "kind"} if name == "large" else {}))
        assert source.ids == [f"{name}/{row}" for row in range(len(folder))]
        assert source.class_names == (["0", "1", "2", "3"] if name == "plain" else WNIDS)
        assert_equal(source, folder, names=False, ids=False)
    with pytest.raises(SourceError, match="image-column among photo, kind"):
        open_source(tmp_path / "large.parquet")
    with pytest.raises(SourceError, match="no column 'nope'; it has photo, kind"):
        open_source(tmp_path / "large.parquet", image_column="nope")
    with pytest.raises(SourceError, match="column 'kind' is string"):
        open_source(tmp_path / "large.parquet", image_column="kind", label_column="kind")
    with pytest.raises(SourceError, match="label column is large_binary"):
        open_source(tmp_path / "large.parquet", image_column="photo", label_column="photo")


def test_parquet_ids(folder, tmp_path):
    """Paths where they are there and different; the others get file and row."""
    pa = pytest.importorskip("pyarrow")
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = ["d/a.jpg", None, "b.jpg", "b.jpg", "", "n01440764_1_n01440764.JPEG"]
    images = pa.array([{"bytes": b"1", "path": path} for path in paths], struct)
    write_parquet(tmp_path / "s.parquet", pa.table({"image": images, "label": [0] * 6}))
    assert open_source(tmp_path / "s.parquet").ids == [
        "d/a.jpg",
        "s/1",
        "s/2/b.jpg",
        "s/3/b.jpg",
        "s/4",
        "n01440764_1_n01440764.JPEG",
    ]


def test_parquet_decodes_each_row_group_once(folder, tmp_path, monkeypatch):
    """In the order of `order`, by 8 threads, with a cache of a part of the file; and never more than the cache
    holds."""
    rows = list(range(len(folder))) * 4
    table = parquet_table(folder, rows, hub=False)
    path = write_parquet(tmp_path / "s.parquet", table, row_group_size=4, compression="none", use_dictionary=False)
    from tl_fast.sources.parquet_files import ParquetSource

    for cache, seed in ((1, None), (1, 3), (int(folder.sizes.sum()), None), (int(folder.sizes.sum()), 4), (1 << 40, 5)):
        source = ParquetSource([str(path)], cache_bytes=cache)
        decoded, lock = [], threading.Lock()
        plain = source._decode

        def counted(group, plain=plain, decoded=decoded, lock=lock):
            with lock:
                decoded.append(group.number)
            return plain(group)

        monkeypatch.setattr(source, "_decode", counted)
        order = source.order(seed).tolist()
        assert sorted(order) == list(range(96)) and (order == list(range(96))) == (seed is None)
        if seed is not None:
            assert order == source.order(seed).tolist() != source.order(seed + 1).tolist()
        with ThreadPoolExecutor(8) as threads:  # in steps of 8, as a writer that reads a little ahead
            for start in range(0, 96, 8):
                part = order[start : start + 8]
                assert list(threads.map(source.read, part)) == [folder.read(rows[i]) for i in part]
                kept = [source._groups[place].bytes for place in source._cache]
                assert len(kept) <= 2 or sum(kept) <= cache
        assert len(source._groups) == 24
        assert sorted(decoded) == list(range(24))


def test_parquet_bad_rows(folder, tmp_path):
    pa = pytest.importorskip("pyarrow")
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": b"1"}, None, {"bytes": None, "path": "x.jpg"}, {"bytes": b""}, {"bytes": b"5"}]
    path = write_parquet(
        tmp_path / "s.parquet", pa.table({"image": pa.array(images, struct), "label": pa.array([0, 0, 1, 1, None])})
    )
    source = open_source(path)
    assert source.labels.tolist() == [0, 0, 1, 1, -1] and source.read(0) == b"1" and source.read(3) == b""
    for row, message in ((1, "row 1: has no image"), (2, "row 2: has no image"), (4, "row 4: has no label")):
        with pytest.raises(SourceError, match=f"s.parquet {message}"):
            source.read(row)
    for labels, message in (
        ([0, 9], "row 1: label 9 is not below 4"),
        ([0, -1], "row 1: label -1"),
        ([0.5, 1.0], "double"),
        ([1 << 40, 0], "label 1099511627776"),
    ):
        write_parquet(path, parquet_table(folder, [0, 1], label=pa.array(labels)))
        with pytest.raises(SourceError, match=f"s.parquet.*{message}"):
            open_source(path)
    write_parquet(path, parquet_table(folder, []))
    with pytest.raises(SourceError, match="no rows"):
        open_source(path)


def test_parquet_files_that_disagree(folder, tmp_path):
    write_parquet(tmp_path / "a.parquet", parquet_table(folder, [0, 1]))
    write_parquet(tmp_path / "b.parquet", parquet_table(folder, [2, 3], WNIDS[::-1]))
    with pytest.raises(SourceError, match="a.parquet and .*b.parquet: have different class names"):
        open_source([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    write_parquet(tmp_path / "c.parquet", parquet_table(folder, [2, 3], hub=False).select(["label"]))
    with pytest.raises(SourceError, match="c.parquet: which column holds the images.*label"):
        open_source([tmp_path / "a.parquet", tmp_path / "c.parquet"])
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    with pytest.raises(SourceError, match="has 4 classes, --class-names 2"):
        open_source(tmp_path / "a.parquet", class_names=tmp_path / "names.txt")


def test_damaged_parquet(folder, tmp_path):
    """Cut or flipped anywhere: an error that names the file, or the right bytes (pages carry checksums)."""
    good = write_parquet(
        tmp_path / "good.parquet", parquet_table(folder, list(range(24))), row_group_size=8, write_page_checksum=True
    )
    whole, path, said = good.read_bytes(), tmp_path / "bad.parquet", 0
    for cut in (0, 3, 8, 1000, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(SourceError, match="bad.parquet"):
            open_source(path)
    generator = random.Random(7)
    for trial in range(60):
        damaged = bytearray(whole)
        place = generator.randrange(len(whole)) if trial % 2 else len(whole) - 1 - generator.randrange(3000)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            source = open_source(path)
            for i, name in enumerate(source.ids):
                assert source.read(i) == folder.read(i) or name != folder.ids[i]
        except SourceError as error:
            said += "bad.parquet" in str(error)
    assert said > 20
    source = open_source(good)
    good.write_bytes(whole[:-20])
    with pytest.raises(SourceError, match="good.parquet: has changed"):
        source.read(0)
    good.unlink()
    with pytest.raises(SourceChanged, match="good.parquet: can no longer be opened"):
        source.read(9)


# guesses, paths, names


def test_paths(tmp_path):
    for name in ("a-00.tar", "a-01.tar", "a-02.tar", "b.tar", "b-00.tar", "odd{1}.tar"):
        (tmp_path / name).touch()

    def names(*patterns: str) -> list[str]:
        return [Path(path).name for path in expand_paths([f"{tmp_path}/{pattern}" for pattern in patterns])]

    assert names("a-{00..02}.tar") == names("a-*.tar") == ["a-00.tar", "a-01.tar", "a-02.tar"]
    assert names("{b,a-00}.tar") == ["b.tar", "a-00.tar"] and names("a-{02..01}.tar") == ["a-02.tar", "a-01.tar"]
    assert names("a-0{0..1}.tar", "b.tar") == ["a-00.tar", "a-01.tar", "b.tar"]
    assert names("{b,a}-0{0..0}.tar") == ["b-00.tar", "a-00.tar"]
    assert names("odd{1}.tar") == ["odd{1}.tar"]
    for patterns, message in (
        (["a-{00..03}.tar"], r"a-03.tar \(one of .*no such file"),
        (["c*.tar"], "no file fits"),
        (["c.tar"], "no such file"),
        (["b.tar", "b.tar"], "given twice"),
        (["a-*.tar", "a-01.tar"], "given twice"),
        (["a-{0..99999999}.tar"], "stands for 100,000,000"),
    ):
        with pytest.raises(SourceError, match=message):
            names(*patterns)
    for url in ("https://host/x.tar", "s3://bucket/x.tar", "pipe:curl x"):
        with pytest.raises(SourceError, match="on this machine"):
            expand_paths([url])
    with pytest.raises(SourceError, match="no paths"):
        expand_paths([])


def test_guesses_refuse(folder, tmp_path):
    for name in (
        "x.tar.gz",
        "x.csv",
        "d/train-0.parquet",
        "d/validation-0.parquet",
        "e/ILSVRC2012_img_train.tar",
        "e/train/x.jpg",
        "f/x.tgz",
        "g/a.tar",
        "g/a.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    shutil.copytree(folder.root, tmp_path / "images")
    for paths, message in (
        (["x.tar.gz"], "x.tar.gz: compressed.*gunzip"),
        (["x.csv"], "not a kind of data set"),
        (["d"], "train-0.parquet and validation-0.parquet"),
        (["e"], "ILSVRC2012_img_train.tar and train/"),
        (["f"], "x.tgz: compressed"),
        (["g"], "a.tar and a.parquet"),
        (["g/a.tar", "g/a.parquet"], "different kinds"),
        (["images", "g/a.tar"], "is a folder"),
        (["g/a.tar"], "a.tar"),
        (["g/a.parquet"], "a.parquet"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source([tmp_path / path for path in paths])
    with pytest.raises(SourceError, match="--labels .* is for tar"):
        open_source(folder.root, labels=tmp_path / "x.csv")
    with pytest.raises(SourceError, match="--image-column"):
        open_source(folder.root, image_column="image")


def test_missing_packages_are_named(folder, tmp_path, monkeypatch):
    """pyarrow and scipy are wanted only where a file needs them, and then by name."""
    (tmp_path / "x.parquet").touch()
    val, truth = pack_val(tmp_path / "val.tar", folder)
    write_devkit(tmp_path / "kit", WNIDS, truth)
    monkeypatch.delitem(sys.modules, "tl_fast.sources.parquet_files", raising=False)
    for package in ("pyarrow", "scipy.io"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SourceError, match="x.parquet: reading parquet needs pyarrow"):
        open_source(tmp_path / "x.parquet")
    with pytest.raises(SourceError, match="needs scipy"):
        open_source(val, labels=tmp_path / "kit")


def test_class_names_files(tmp_path):
    file = tmp_path / "names"
    for text, names in (
        ("cat\ndog\n", ["cat", "dog"]),
        ('["cat", "hot dog"]', ["cat", "hot dog"]),
        ("n01440764 tench, Tinca tinca\nn01443537 goldfish\n", ["n01440764", "n01443537"]),
    ):
        file.write_text(text)
        assert read_class_names(file) == names
    for text in (b"", b"a\n\nb", b"a\na", b'["a", 1]', b"[1", b"\xff\xfe"):
        file.write_bytes(text)
        with pytest.raises(SourceError, match="names"):
            read_class_names(file)


def test_text_classes():
    def classes(texts: list[str], names: list[str] | None = None) -> tuple[list[int], list[str]]:
        labels, names = label_classes(texts, names, lambda i: f"sample {i}")
        return labels.tolist(), names

    assert classes(["b", "a", "b"]) == ([1, 0, 1], ["a", "b"])
    assert classes(["2", "0"]) == ([2, 0], ["0", "1", "2"])
    assert classes(["2", "0"], ["x", "y", "z"]) == ([2, 0], ["x", "y", "z"])
    assert classes(["2", "1"], ["2", "1", "0"]) == ([0, 1], ["2", "1", "0"])  # names that look like numbers are names
    for texts, names, message in (
        (["0", "3"], ["x", "y"], "sample 1: class 3 is not below 2"),
        (["1", "x"], None, "sample 1"),
        (["x", "q"], ["x", "y"], "sample 1: class 'q'"),
        (["²"], ["x"], "'²'"),
    ):
        with pytest.raises(SourceError, match=message):
            classes(texts, names)
