"""Published label maps: what is in the .pt files, where they lie, and which image each one belongs to."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tl_fast.labelmaps import pt_file as pt_map
from tl_fast.labelmaps.format import LabelMapError, MapSpec, pack, unpack
from tl_fast.labelmaps.matching import match_maps, split_name
from tl_fast.labelmaps.pt_file import PtReader
from tl_fast.labelmaps.published import PublishedMaps, open_label_maps
from tl_fast.labelmaps.store import LabelMapStore, write_store

SHAPE = (3, 4, 6)
CLASSES = [f"n{i:08d}" for i in range(3)]


def values_of(seed: int, num_classes: int = 1000, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """float16 `[2, k, H, W]`: falling logits and k different classes in every cell."""
    rng = np.random.default_rng(seed)
    classes = np.stack(
        [rng.choice(num_classes, shape[0], replace=False) for _ in range(shape[1] * shape[2])], 1
    ).reshape(shape)
    return np.stack([-np.sort(-rng.normal(8, 4, shape), axis=0), classes]).astype(np.float16)


def pt_bytes(value: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(value) if isinstance(value, np.ndarray) else value, buffer, **options)
    return buffer.getvalue()


NAMES = [f"label_top5/{folder}/{folder}_{i * 37}.pt" for folder in CLASSES for i in range(12)]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("published")
    for seed, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(values_of(seed)), root / name)
    (root / "label_top5/readme.txt").write_text("by the authors")
    (root / "label_top5/n00000000/.hidden.pt").write_text("of macOS")
    return root


@pytest.fixture(scope="module", params=["folder", "stored zip", "deflated zip", "tar", "pax tar"])
def place(request, tree, tmp_path_factory) -> Path:
    if request.param == "folder":
        return tree
    path = tmp_path_factory.mktemp("archive") / f"{request.param.split()[-1]}.bin"
    if request.param.endswith("zip"):
        with zipfile.ZipFile(
            path, "w", zipfile.ZIP_STORED if "stored" in request.param else zipfile.ZIP_DEFLATED
        ) as archive:
            for file in sorted(tree.rglob("*")):
                archive.write(file, file.relative_to(tree))
            archive.writestr("__MACOSX/label_top5/n00000000/n00000000_0.pt", "of macOS")
    else:
        with tarfile.open(
            path, "w", format=tarfile.PAX_FORMAT if "pax" in request.param else tarfile.GNU_FORMAT
        ) as archive:
            archive.add(tree, "./")
    return path


def test_maps_are_read_from_trees_and_archives(place):
    with PublishedMaps(place, extent="center_square", num_classes=1000) as maps:
        assert (
            maps.spec == MapSpec(*SHAPE, 1000, "center_square")
            and len(maps) == len(NAMES)
            and sorted(maps.names) == sorted(NAMES)
        )
        assert maps.class_names is None and maps.ignored == (3 if place.name == "zip.bin" else 2)
        assert maps.manifest["model"] == "published maps" and maps.manifest["source"] == place.name
        assert str(place.parent) not in repr(maps.manifest)
        assert len(maps.stamps) == len(maps) and maps.stamps.dtype == np.int64
        with ThreadPoolExecutor(4) as pool:
            records = list(pool.map(maps.record, range(len(maps))))
        for name, record in zip(maps.names, records, strict=True):
            logits, classes = values_of(NAMES.index(name))
            expected = pack(classes.astype(int), logits.astype(np.float32), maps.spec)
            for found, right in zip(unpack(record, maps.spec), unpack(expected, maps.spec), strict=True):
                np.testing.assert_array_equal(found, right)
            np.testing.assert_allclose(
                unpack(record, maps.spec)[1], logits.astype(float), atol=0.2
            )  # stored as they are, not relative


def test_torch_loads_one_file_of_a_kind(tree, monkeypatch):
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: calls.append(options) or load(*args, **options))
    maps = PublishedMaps(tree, extent="full", num_classes=1000)
    for j in range(len(maps)):
        maps.record(j)
    assert len(calls) == 1 and calls[0]["weights_only"] is True


@pytest.mark.parametrize(
    "dtype, num_classes",
    [(torch.float16, 2049), (torch.bfloat16, 257), (torch.float32, 65_535), (torch.float64, 65_535)],
)
def test_dtypes_that_hold_the_classes(dtype, num_classes):
    values = np.stack([np.full((1, 1, 2), 2.5), [[[num_classes - 1, 0]]]])
    reader = PtReader(num_classes)
    for _ in range(2):  # by torch.load, then without it
        np.testing.assert_array_equal(reader.read(pt_bytes(torch.from_numpy(values).to(dtype))), values)
    if dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(LabelMapError, match=f"holds class indices exactly only of up to {num_classes} classes"):
            PtReader(num_classes + 1).read(pt_bytes(torch.from_numpy(values).to(dtype)))
        assert torch.tensor(float(num_classes), dtype=dtype).item() != num_classes


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_runs_code_is_refused_and_runs_none(tmp_path):
    target = tmp_path / "ran"
    for data in (
        pickle.dumps(Evil(target)),
        pt_bytes(Evil(target)),
        pt_bytes(Evil(target), _use_new_zipfile_serialization=False),
        pt_bytes([torch.from_numpy(values_of(0)), Evil(target)]),
    ):
        with pytest.raises(LabelMapError, match="torch.load refuses it"):
            PtReader(1000).read(data)
    assert not target.exists()
    pickle.loads(pickle.dumps(Evil(target)))
    assert target.exists()  # so they would have


@pytest.mark.parametrize(
    "value, message",
    [
        ({"a": torch.zeros(2, 3, 4, 6)}, "holds dict"),
        ([torch.zeros(2, 3, 4, 6)], "holds list"),
        (torch.zeros(2, 3, 4, 6).to_sparse(), "plain"),
        (torch.zeros(2, 3, 4, 6, dtype=torch.int64), "torch.int64"),
        (torch.zeros(3, 4, 6), r"shape \(3, 4, 6\)"),
        (torch.zeros(3, 3, 4, 6), r"shape \(3, 3"),
        (torch.zeros(2, 3, 0, 6), "shape"),
        (torch.zeros(1).expand(2, 5, 1 << 14, 1 << 14), "shape"),
        (torch.zeros(2, 3, 4, 6, device="meta"), "plain"),
    ],
)
def test_what_is_no_label_map_is_refused(value, message):
    with pytest.raises(LabelMapError, match=message):
        PtReader(1000).read(pt_bytes(value))


def test_tensors_with_another_layout_don_t_mislead_later_files():
    """A transposed tensor, a part of a larger one: their pickles must not be taken for the plain layout, zeros or
    not."""
    base = torch.from_numpy(values_of(0, shape=(5, 4, 4)))
    layouts = [
        lambda t: t.transpose(2, 3),
        lambda t: t.flip(0)[:, :, 1:],
        lambda t: torch.cat([t, t], 3)[..., :4],
        lambda t: t[:, :, :1],
        lambda t: t._neg_view(),
        lambda t: torch.stack([t, t])[1],
        torch.nn.Parameter,
    ]
    for make in layouts:
        reader = PtReader(1000)
        for tensor in (make(torch.zeros_like(base)), make(base), make(base + 1)):
            try:
                values = reader.read(pt_bytes(tensor))
            except LabelMapError:
                assert tensor.is_neg()
                continue
            np.testing.assert_array_equal(
                values, torch.load(io.BytesIO(pt_bytes(tensor)), weights_only=False).detach().numpy()
            )
    for options in ({"_use_new_zipfile_serialization": False}, {}):
        reader = PtReader(1000)
        for seed in range(3):
            np.testing.assert_array_equal(reader.read(pt_bytes(values_of(seed), **options)), values_of(seed))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_gives_an_error_or_what_torch_reads():
    """Every byte changed in turn, and every length, read by one that knows the layout: never other numbers than
    torch.load's."""
    data = pt_bytes(values_of(1, shape=(1, 2, 2)))
    reader, outcomes = PtReader(1000), {"refused": 0, "read": 0}
    reader.read(pt_bytes(values_of(0, shape=(1, 2, 2))))
    assert len(reader._known) == 1
    damaged = [data[:at] + bytes([data[at] ^ 0x41]) + data[at + 1 :] for at in range(0, len(data))]
    damaged += [data[:length] for length in range(0, len(data), 7)]
    for bad in damaged:
        try:
            values = reader.read(bad)
        except LabelMapError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        try:
            right = torch.load(io.BytesIO(bad), weights_only=True).numpy()
        except (
            Exception
        ):  # torch.load is stricter in what it does not need: the names of parts, the directory's other entries
            right = values_of(1, shape=(1, 2, 2))
        np.testing.assert_array_equal(values, right)
    assert min(outcomes.values()) > 50, outcomes


def with_maps(root: Path, changes: dict[int, bytes], count: int = 40) -> Path:
    for i in range(count):
        folder = root / CLASSES[i % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.pt").write_bytes(changes[i] if i in changes else pt_bytes(values_of(i)))
    return root


def changed(at: tuple[int, ...], value: float) -> bytes:
    values = values_of(0).astype(np.float32)
    values[at] = value
    return pt_bytes(values)


BAD = {
    5: (pt_bytes(values_of(5, shape=(3, 4, 5))), r"has \(k, H, W\) = \(3, 4, 5\), most others \(3, 4, 6\)"),
    6: (b"", "torch.load refuses it"),
    7: (pt_bytes(values_of(7))[:-100], "torch.load refuses it"),
    8: (changed((0, 1, 1, 1), np.nan), "1 non-finite"),
    9: (changed((0, 0, 0, 0), -np.inf), "1 non-finite"),
    10: (changed((1, 2, 3, 5), np.nan), "integers, got nan"),
    11: (changed((1, 2, 3, 5), 7.5), "integers, got 7.5"),
    12: (changed((1, 2, 3, 5), 1000), r"must lie in 0\.\.999, got \d+\.\.1000$"),
    13: (changed((1, 2, 3, 5), -1), r"must lie in 0\.\.999, got -1\.\.\d+$"),
    14: (changed((1, 2, 3, 5), values_of(0)[1, 0, 3, 5]), r"twice in cell .row 3, column 5"),
    15: (changed((1, 2, 3, 5), 1e30), "must lie in"),
}


def test_a_bad_map_is_named_with_its_reason(tmp_path):
    maps = PublishedMaps(
        with_maps(tmp_path, {i: data for i, (data, _) in BAD.items()}), extent="full", num_classes=1000
    )
    for j, name in enumerate(maps.names):
        number = int(name[-5:-3])
        if number in BAD:
            with pytest.raises(
                LabelMapError, match=rf"^{tmp_path}/{CLASSES[number % 3]}/{number:02d}\.pt: .*{BAD[number][1]}"
            ):
                maps.record(j)
        else:
            np.testing.assert_array_equal(maps.record(j)["classes"], values_of(number)[1])
    (tmp_path / "n00000001/01.pt").write_bytes(b"more" * 2000)
    with pytest.raises(LabelMapError, match="01.pt: has more than .* when it was listed"):
        maps.record(maps.names.index("n00000001/01.pt"))
    gone = maps.names.index("n00000000/00.pt")
    (tmp_path / "n00000000/00.pt").unlink()
    with pytest.raises(LabelMapError, match="00.pt.*No such file"):
        maps.record(gone)


def test_reads_that_come_in_pieces_are_put_together(place, monkeypatch):
    """As network file systems may answer."""
    whole = PublishedMaps(place, extent="full", num_classes=1000)
    read, pread = os.read, os.pread
    monkeypatch.setattr(os, "read", lambda file, size: read(file, min(size, 1000)))
    monkeypatch.setattr(os, "pread", lambda file, size, offset: pread(file, min(size, 1000), offset))
    maps = PublishedMaps(place, extent="full", num_classes=1000)
    assert maps.names == whole.names and maps.record(0) == whole.record(0)


def test_places_without_maps_are_refused(tmp_path):
    options = {"extent": "full", "num_classes": 1000}
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("x" * 2000)
    with tarfile.open(tmp_path / "maps.tar.gz", "w:gz") as archive:
        archive.add(__file__, "a/b.pt")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a/b.txt"))
    with zipfile.ZipFile(tmp_path / "cut.zip", "w") as archive:
        archive.writestr("a/b.pt", pt_bytes(values_of(0)))
    (tmp_path / "cut.zip").write_bytes((tmp_path / "cut.zip").read_bytes()[:-30])
    (tmp_path / "model").mkdir()
    torch.save({"state_dict": {}}, tmp_path / "model/checkpoint.pt")
    torch.save(torch.zeros(2, 5, 18, 18), tmp_path / "one.pt")
    for name, message in (
        ("empty", "no .pt files in it"),
        ("nowhere", "nowhere"),
        ("text", "text: "),
        ("maps.tar.gz", "gzip.*decompress"),
        ("other.tar", "no .pt files in it .1 others"),
        ("cut.zip", "cut.zip: cannot be read.*cut off"),
        ("model", "none of 1 maps.*checkpoint.pt: holds dict"),
        ("one.pt", "no .pt files in it"),
    ):
        with pytest.raises(LabelMapError, match=message):
            open_label_maps(tmp_path / name, **options)


def test_the_extent_must_be_said(tree, tmp_path):
    with pytest.raises(
        LabelMapError, match=r"not a label-map store.*full or center_square.*generator script crops.*not documented"
    ):
        open_label_maps(tree, extent=None, num_classes=1000)
    with pytest.raises(LabelMapError, match=r"extent is 'half'; must be one of \('full', 'center_square'\)"):
        open_label_maps(tree, extent="half", num_classes=1000)
    with pytest.raises(LabelMapError, match="k must be at most num_classes = 2"):
        open_label_maps(tree, extent="full", num_classes=2)
    with pytest.raises(LabelMapError, match="none of 32 maps.*up to 2049 classes, here are 2050"):
        open_label_maps(tree, extent="full", num_classes=2050)
    spec = MapSpec(1, 1, 1, 2, "center_square")
    write_store(tmp_path, ["a.jpg"], [pack(np.zeros((1, 1, 1), int), np.zeros((1, 1, 1)), spec)], spec)
    for extent in (None, "center_square"):
        assert isinstance(open_label_maps(tmp_path, extent=extent, num_classes=9), LabelMapStore)
    (tmp_path / "manifest.json").rename(tmp_path / "old")
    with pytest.raises(LabelMapError, match="manifest.json is missing"):
        open_label_maps(tmp_path, extent="full", num_classes=2)
    (tmp_path / "old").rename(tmp_path / "manifest.json")
    with pytest.raises(LabelMapError, match="'full' was given, the store says.*'center_square'"):
        open_label_maps(tmp_path, extent="full", num_classes=2)


def test_the_shape_is_that_of_most_maps(tmp_path):
    root = with_maps(tmp_path, {i: pt_bytes(values_of(i, shape=(3, 4, 5))) for i in (0, 1, 20, 39)} | {2: b"no map"})
    assert PublishedMaps(root, extent="full", num_classes=1000).spec.shape == SHAPE


def test_damaged_and_unreadable_archive_members_are_named(tmp_path):
    datas = {f"a/{i}.pt": pt_bytes(values_of(i)) for i in range(4)}
    path = tmp_path / "maps.zip"
    problems = {
        zipfile.ZIP_STORED: "damaged",
        zipfile.ZIP_DEFLATED: "damaged",
        zipfile.ZIP_BZIP2: "compressed by method 12",
    }
    for method, message in problems.items():
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in datas.items():
                archive.writestr(name, data, method if name == "a/2.pt" else zipfile.ZIP_STORED)
            start = archive.infolist()[2].header_offset
        if method != zipfile.ZIP_BZIP2:
            data = bytearray(path.read_bytes())
            data[start + 300] ^= 1
            path.write_bytes(data)
        maps = PublishedMaps(path, extent="full", num_classes=1000)
        np.testing.assert_array_equal(maps.record(3)["classes"], values_of(3)[1])
        with pytest.raises(LabelMapError, match=rf"maps\.zip:a/2\.pt: is {message}"):
            maps.record(2)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in datas.items():
            archive.writestr(name, data)
    maps = PublishedMaps(path, extent="full", num_classes=1000)
    os.truncate(path, 5000)
    with pytest.raises(LabelMapError, match=r"maps\.zip:a/3\.pt: is damaged"):
        maps.record(3)


def test_stamps_change_with_the_input(tmp_path):
    root = with_maps(tmp_path / "tree", {}, 4)
    maps = PublishedMaps(root, extent="full", num_classes=1000)
    before = maps.stamps
    os.utime(root / maps.names[2], ns=(5, 5))
    assert (PublishedMaps(root, extent="full", num_classes=1000).stamps != before).any(1).tolist() == [
        False,
        False,
        True,
        False,
    ]


MAPS = [
    "m/n01440764/n01440764_10026.pt",
    "m/n01440764/ILSVRC2012_val_00000293.v2.pt",
    "m/n01443537/n01443537_7.pt",
    "m/dog/1.pt",
    "m/cat/1.pt",
    "m/misc/unique.pt",
    "m/misc/n01443537_8.pt",
    "flat.pt",
    "m/train/twin/x.pt",
    "m/val/twin/x.pt",
    "other/cat/2.pt",
]


@pytest.mark.parametrize(
    "sample, own, expected",
    [
        ("n01440764/n01440764_10026.JPEG", "n01440764", 0),  # its folder and stem
        ("train/n01440764/n01440764_10026.jpg", "tench", 0),  # only the last folder counts
        ("n01440764/ILSVRC2012_val_00000293.v2.JPEG", "n01440764", 1),  # one suffix is taken off, not two
        ("n01440764/ILSVRC2012_val_00000293.JPEG", "n01440764", -1),
        ("n01440764/ILSVRC2012_val_00000293.v2", "n01440764", 1),  # no suffix of an image: nothing is taken off
        ("shard-0001/n01443537_7.jpg", "n01443537", 2),  # its class's folder
        ("shard/1.jpg", "cat", 4),
        ("cat/1.jpg", "dog", 4),
        ("shard/1.jpg", "dog", 3),
        ("bird/1.jpg", "bird", -1),  # 1.pt is there twice, but for other classes
        ("anywhere/unique.png", "bird", 5),
        ("flat.png", "cat", 7),
        ("2.jpg", "cat", 10),
        ("2.jpg", "dog", -1),
        ("n01440764_10026_n01440764.JPEG", "tench", 0),
        ("train/0/n01443537_7_n01443537.JPEG", "goldfish", 2),  # Hugging Face's names
        ("n01443537_8_n01443537.JPEG", "goldfish", 6),
        ("n01443537_9_n01443537.JPEG", "goldfish", -1),
    ],
)
def test_which_map_a_sample_has(sample, own, expected):
    classes = ["bird", "cat", "dog", "goldfish", "n01440764", "n01443537", "tench"]
    found = match_maps(MAPS, [sample], classes, np.array([classes.index(own)]), MAPS.__getitem__)
    assert found.tolist() == [expected]
    assert match_maps([], [sample], classes, np.array([0]), str).tolist() == [-1]


@pytest.mark.parametrize(
    "samples, message",
    [
        (["twin/x.jpg"], "twin/x.jpg: two label maps fit it, m/train/twin/x.pt and m/val/twin/x.pt"),
        (["x.jpg"], "x.jpg: two label maps fit it"),
        (["1.jpg"], "1.jpg: two label maps fit it, m/dog/1.pt and m/cat/1.pt"),
        (["flat.jpg", "dog/flat.png"], "flat.jpg and dog/flat.png: the label map flat.pt fits both"),
    ],
)
def test_ambiguous_names_are_errors(samples, message):
    with pytest.raises(LabelMapError, match=message):
        match_maps(MAPS, samples, ["a", "b"], np.arange(len(samples)), MAPS.__getitem__)


def test_names_are_split_at_the_last_known_suffix():
    assert (
        split_name("a/b/c.d.JPEG") == ("b", "c.d")
        and split_name("c.v2") == ("", "c.v2")
        and split_name("b/.pt") == ("b", ".pt")
    )
    assert split_name("x.tar/k.jpg") == ("x.tar", "k")


def test_published_maps_find_their_images(tree):
    maps = PublishedMaps(tree, extent="full", num_classes=1000)
    ids = [f"{name.split('/')[1]}/{Path(name).stem}.JPEG" for name in NAMES] + ["n00000001/none.JPEG"]
    labels = np.array([CLASSES.index(i.split("/")[0]) for i in ids])
    found = maps.locate(ids, CLASSES, labels)
    assert found[-1] == -1 and [maps.names[j] for j in found[:-1]] == NAMES


def test_the_sampled_pickles_are_not_without_limit():
    reader = PtReader(1000)
    for width in range(1, pt_map._MAX_KNOWN + 10):
        values = values_of(width, shape=(1, 1, width))
        for _ in range(2):
            np.testing.assert_array_equal(reader.read(pt_bytes(values)), values)
    assert len(reader._known) == pt_map._MAX_KNOWN
