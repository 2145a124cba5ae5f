"""What a data engineer does with the converter: every kind of source and label maps, shards, order, dry runs,
interruptions, full disks."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from conversions import SHAPE, published, run
from PIL import Image
from rich.console import Console
from small_sources import WNIDS, pack_train, pack_val, pack_webdataset, parquet_table, write_parquet

from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.convert import resumable
from tl_fast.convert.options import EncodeOptions, RunOptions
from tl_fast.convert.partial_file import partial_paths
from tl_fast.convert.processes import Forked
from tl_fast.convert.run import Inputs, convert
from tl_fast.convert.selection import Shard
from tl_fast.labelmaps.format import MapSpec, dequantise, pack, quantise
from tl_fast.labelmaps.published import PublishedMaps
from tl_fast.labelmaps.store import write_manifest, write_store
from tl_fast.pipeline.loader import Loader
from tl_fast.sources.image_folder import ImageFolder
from tl_fast.system import progress

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "converters" / "to_beton.py"


@pytest.fixture(scope="module")
def folder(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """Four classes called like ImageNet's, ten photos each."""
    root = tmp_path_factory.mktemp("images")
    for wnid, name in zip(WNIDS, ("animal", "fish", "monument", "tool"), strict=True):
        (root / wnid).mkdir()
        for i, file in enumerate(sorted((photos / "train" / name).glob("*.jpg"))[:10]):
            shutil.copy(file, root / wnid / f"{wnid}_{i}.JPEG")
    return ImageFolder(root)


@pytest.fixture(scope="module")
def originals(shared: Path) -> ImageFolder:
    root = shared / "data" / "imagenet_sample"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    return ImageFolder(root)


@pytest.fixture(params=["folder", "originals"])
def images(request: pytest.FixtureRequest) -> ImageFolder:
    return request.getfixturevalue(request.param)


def content(path: Path) -> dict[str, tuple]:
    """By id: image bytes, label, class name, label map."""
    with BetonReader(path) as reader:
        maps = reader.label_maps(np.arange(len(reader))) if reader.spec else None
        names, samples = reader.class_names, {}
        for i, sample_id in enumerate(reader.source_ids):
            own = None if maps is None else (maps[0][i].tobytes(), maps[1][i].tobytes())
            samples[sample_id] = bytes(reader.image(i)), names[reader.labels[i]], own
        return samples


def test_every_source_gives_the_same_beton(to_beton: ModuleType, images: ImageFolder, tmp_path: Path) -> None:
    """From folder, ImageNet's train and val tars, parquet and WebDataset: the same images with the same labels and
    published label maps."""
    maps = published(images, tmp_path / "label_top5")
    pack_train(tmp_path / "ILSVRC2012_img_train.tar", images)
    write_parquet(
        tmp_path / "train-00000.parquet", parquet_table(images, list(range(len(images.ids)))), row_group_size=7
    )
    pack_webdataset(images, tmp_path, shards=3)
    names = tmp_path / "names.txt"
    names.write_text("\n".join(images.class_names))
    sources = {
        "folder": [images.root],
        "train tar": [tmp_path / "ILSVRC2012_img_train.tar"],
        "parquet": [tmp_path / "train-00000.parquet"],
        "webdataset": [tmp_path / "train-{000..002}.tar", "--class-names", names],
    }
    packed = {}
    for kind, arguments in sources.items():
        out = tmp_path / f"{kind}.beton"
        assert run(to_beton, arguments[0], out, *arguments[1:], "--label-maps", maps, "--extent", "full") == 0, kind
        assert verify(out, decode=True) == []
        packed[kind] = content(out)
        assert len(packed[kind]) == len(images.ids)
        with BetonReader(out) as reader:
            assert reader.spec == MapSpec(min(5, len(images.class_names)), *SHAPE[1:], len(images.class_names)), kind
    assert (tmp_path / "folder.beton").read_bytes()[-9000:] != b"" and packed["folder"] == packed["train tar"]
    for kind in ("parquet", "webdataset"):  # their ids differ
        assert sorted(packed[kind].values()) == sorted(packed["folder"].values()), kind


def test_val_tar_with_label_list(to_beton: ModuleType, folder: ImageFolder, tmp_path: Path) -> None:
    tar, classes = pack_val(tmp_path / "ILSVRC2012_img_val.tar", folder)
    (tmp_path / "labels.txt").write_text("\n".join(classes))
    assert run(to_beton, tar, tmp_path / "val.beton", "--labels", tmp_path / "labels.txt") == 0
    assert {name: data for data, name, _ in content(tmp_path / "val.beton").values()}.keys() == set(WNIDS)
    assert sorted(sample[:2] for sample in content(tmp_path / "val.beton").values()) == sorted(
        (folder.read(i), folder.class_names[folder.labels[i]]) for i in range(len(folder.ids))
    )
    assert run(to_beton, tar, tmp_path / "none.beton") == 1


@pytest.mark.parametrize("archive", ["folder", "zip", "tar"])
def test_published_label_maps(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture, archive: str
) -> None:
    maps = published(folder, tmp_path / "label_top5_train_nfnet")
    files = {sample_id: torch.load((maps / sample_id).with_suffix(".pt")).float().numpy() for sample_id in folder.ids}
    if archive != "folder":
        maps = Path(shutil.make_archive(str(tmp_path / "maps"), archive, tmp_path, "label_top5_train_nfnet"))
        shutil.rmtree(tmp_path / "label_top5_train_nfnet")
    out = tmp_path / "out.beton"
    assert run(to_beton, folder.root, out, "--label-maps", maps) == 1
    said = capsys.readouterr().err
    assert "--extent" in said and "centre" in said
    assert run(to_beton, folder.root, out, "--label-maps", maps, "--extent", "center_square") == 0
    assert run(to_beton, "info", out) == 0
    assert re.search(r"extent\W+center_square", capsys.readouterr().out)
    with BetonReader(out) as reader:
        classes, scores = reader.label_maps(np.arange(len(reader)))
        for i, sample_id in enumerate(reader.source_ids):
            np.testing.assert_array_equal(classes[i], files[sample_id][1])
            levels, low, step = quantise(files[sample_id][0])
            np.testing.assert_array_equal(scores[i], dequantise(levels, low, step))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda file: file.unlink(), "no label map"),
        (lambda file: torch.save(torch.full((2, 4, 6, 6), float("nan")).half(), file), "got nan"),
        (
            lambda file: torch.save(
                torch.stack(
                    [torch.full((4, 6, 6), float("inf")), torch.arange(4).view(4, 1, 1).expand(4, 6, 6)]
                ).half(),
                file,
            ),
            "finite",
        ),
        (lambda file: torch.save(torch.full((2, 4, 6, 6), 4.0).half(), file), "0..3|class 4"),
        (lambda file: torch.save(torch.zeros(2, 4, 6, 7).half(), file), "shape|6, 7"),
        (lambda file: file.write_bytes(file.read_bytes()[:300]), "checkpoint|damaged|not a"),
    ],
)
def test_bad_label_maps_are_bad_samples(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture, change, words: str
) -> None:
    maps, out, bad = published(folder, tmp_path / "maps"), tmp_path / "out.beton", folder.ids[17]
    change((maps / bad).with_suffix(".pt"))
    arguments = (folder.root, out, "--label-maps", maps, "--extent", "full")
    assert run(to_beton, *arguments) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert bad in said and re.search(words, said)
    assert run(to_beton, *arguments, "--on-error", "quarantine", "--max-rejects", 0) == 1
    assert not out.exists()
    assert run(to_beton, *arguments, "--on-error", "quarantine", "--max-rejects", 1, "--resume") == 0
    summary = capsys.readouterr().err
    assert re.search(r"rejected +│ 1, see", summary) and re.search(r"taken from an earlier run +│ 40 samples", summary)
    (reject,) = [json.loads(line) for line in (tmp_path / "out.beton.rejects.jsonl").read_text().splitlines()]
    assert reject["id"] == bad and re.search(words, reject["reason"])
    with BetonReader(out) as reader:
        assert (
            reader.source_ids == [sample_id for sample_id in folder.ids if sample_id != bad]
            and reader.conversion["rejected"] == 1
        )
    assert verify(out) == []


def test_a_subset_with_the_whole_sets_class_names(to_beton: ModuleType, folder: ImageFolder, tmp_path: Path) -> None:
    """Some classes of ImageNet with label maps of all: their names in order make labels and label maps agree."""
    names = ["n00000001", *WNIDS, "n99999999"]
    (tmp_path / "names.json").write_text(json.dumps(names))
    spec, rng = MapSpec(2, 3, 3, 6), np.random.default_rng(0)
    records = [
        pack(np.stack([np.full((3, 3), i % 6), np.full((3, 3), (i + 1) % 6)]), rng.normal(size=(2, 3, 3)), spec)
        for i in range(40)
    ]
    write_store(tmp_path / "maps", folder.ids, records, spec, names, model="a test")
    assert run(to_beton, folder.root, tmp_path / "out.beton", "--label-maps", tmp_path / "maps") == 1
    assert (
        run(
            to_beton,
            folder.root,
            tmp_path / "out.beton",
            "--label-maps",
            tmp_path / "maps",
            "--class-names",
            tmp_path / "names.json",
        )
        == 0
    )
    with BetonReader(tmp_path / "out.beton") as reader:
        assert reader.class_names == names and set(reader.labels.tolist()) == {1, 2, 3, 4}


def test_order_and_shards(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ids(path: Path) -> list[str]:
        with BetonReader(path) as reader:
            return reader.source_ids

    def convert(name: str, *options: object) -> list[str]:
        assert run(to_beton, folder.root, tmp_path / name, *options) == 0
        return ids(tmp_path / name)

    assert convert("source.beton") == folder.ids
    shuffled = convert("a.beton", "--order", "shuffled", "--seed", 3)
    assert shuffled != folder.ids and sorted(shuffled) == sorted(folder.ids)
    assert convert("b.beton", "--order", "shuffled", "--seed", 3, "--workers", 1) == shuffled
    assert (tmp_path / "a.beton").read_bytes() == (tmp_path / "b.beton").read_bytes()
    assert convert("c.beton", "--order", "shuffled", "--seed", 4) != shuffled
    assert content(tmp_path / "a.beton") == content(tmp_path / "source.beton")

    for i in range(3):
        assert (
            run(to_beton, folder.root, tmp_path / "part.beton", "--order", "shuffled", "--seed", 3, "--shard", f"{i}/3")
            == 0
        )
    parts = sorted(tmp_path.glob("part-*-of-003.beton"))
    assert len(parts) == 3 and [sample_id for part in parts for sample_id in ids(part)] == shuffled
    with Loader(str(tmp_path / "part-*.beton"), 8, image_size=32, train=False) as loader:
        assert sum(len(batch.labels) for batch in loader) == len(folder.ids)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts[1].rename(tmp_path / "by hand.beton")
    assert (
        run(to_beton, folder.root, tmp_path / "part.beton", "--order", "shuffled", "--seed", 3, "--shard", "auto") == 0
    )
    assert parts[1].read_bytes() == (tmp_path / "by hand.beton").read_bytes()
    assert run(to_beton, folder.root, tmp_path / "many.beton", "--shard", "2/100") == 0
    assert len(ids(tmp_path / "many-002-of-100.beton")) == 1
    assert run(to_beton, folder.root, tmp_path / "many.beton", "--shard", "0/100") == 1  # a part without a single image


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/5", {}, (2, 5)),
        ("auto", {"RANK": "3", "WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 4)),
        ("auto", {"SLURM_PROCID": "7", "SLURM_NTASKS": "8"}, (7, 8)),
        (
            "auto",
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_COUNT": "4",
                "SLURM_ARRAY_TASK_MIN": "2",
                "SLURM_PROCID": "0",
                "SLURM_NTASKS": "1",
            },
            (3, 4),
        ),
        *[(text, {}, None) for text in ("auto", "5/5", "1", "a/b", "-1/4", "1/0", "1/2/3")],
    ],
)
def test_shard_is_understood(text: str, environment: dict[str, str], expected: tuple[int, int] | None) -> None:
    if expected is None:
        with pytest.raises(BetonError, match="--shard"):
            Shard.parse(text, environment)
    else:
        shard = Shard.parse(text, environment)
        assert (shard.index, shard.count) == expected


@pytest.mark.usefixtures("turbojpeg")
def test_dry_run_says_what_would_be_done(
    to_beton: ModuleType, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "images"
    shutil.copytree(photos / "val", root)
    image = Image.open(next((root / "tool").glob("*.jpg")))
    image.save(root / "tool" / "progressive.jpg", progressive=True)
    image.save(root / "tool" / "lossless.png")
    (root / "fish" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    assert run(to_beton, root, tmp_path / "out.beton", "--dry-run") == 0
    said = " ".join(capsys.readouterr().err.split())
    for words in (
        "image folder",
        "32 of 32 in 4 classes",
        "copied │ 29",
        "transcoded │ 1",
        "re-encoded │ 1",
        "bad │ 1",
        "fish/broken.jpg",
        "are free",
    ):
        assert words in said, (words, said)
    assert list(tmp_path.iterdir()) == [root]


def test_space_is_checked_first(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    size = sum(folder.sizes)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, int(size * 0.9)))
    out = tmp_path / "new" / "out.beton"
    assert run(to_beton, folder.root, out) == 1
    assert (
        re.search(r"out\.beton: needs about .* GB and .* GB are free", capsys.readouterr().err)
        and not out.parent.exists()
    )
    assert run(to_beton, folder.root, out, "--max-resolution", 64) == 0  # that takes less
    assert run(to_beton, folder.root, out, "--overwrite", "--no-space-check") == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, int(out.stat().st_size * 1.05)))
    assert run(to_beton, folder.root, out, "--overwrite") == 0  # the estimate is no more than 5 % above


def test_resume_from_the_command_line(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, monkeypatch, capsys
) -> None:
    root, out = tmp_path / "images", tmp_path / "out.beton"
    shutil.copytree(folder.root, root)
    bad = sorted(root.rglob("*.JPEG"))[35]
    good = bad.read_bytes()
    bad.write_bytes(good[:-3000])
    monkeypatch.setattr(resumable, "COMMIT_SECONDS", 0)
    assert run(to_beton, root, out) == 1
    said = capsys.readouterr().err
    assert str(bad) in said and "35 samples are done; the same command with --resume" in said
    assert all(path.exists() for path in partial_paths(out))
    assert run(to_beton, root, out, "--resume", "--quality", 50) == 1 and "quality" in capsys.readouterr().err
    bad.write_bytes(good)
    assert run(to_beton, root, tmp_path / "expected.beton") == 0
    assert run(to_beton, root, out, "--resume") == 0
    assert out.read_bytes() == (tmp_path / "expected.beton").read_bytes() and not any(
        path.exists() for path in partial_paths(out)
    )
    capsys.readouterr()
    before = out.stat().st_mtime_ns
    assert (
        run(to_beton, root, out, "--resume") == 0
        and "nothing to do" in capsys.readouterr().err
        and out.stat().st_mtime_ns == before
    )
    assert run(to_beton, root, out, "--resume", "--quality", 50) == 1
    assert re.search("quality was 90 and is now 50. .*--overwrite", " ".join(capsys.readouterr().err.split()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("maps added", "made without label maps"),
        ("maps swapped", "the label maps, their sizes or times have changed"),
        (
            "maps annotated anew",
            (
                "the label maps' created was 'monday' and is now 'tuesday'|the label maps' created was monday and is"
                " now tuesday"
            ),
        ),
        ("class order", "class 0 was 'n01440764' and is now"),
        ("an image replaced", "the images' sizes or times have changed"),
        ("an image touched up, of the same size", "the images' sizes or times have changed"),
        ("a new image", "the images' names or their order have changed since it was made: n01440764/new.JPEG is new"),
        ("an image gone", "names or their order have changed since it was made: .* is no longer there"),
        ("a page size", "page_size was 8388608 and is now 16777216"),
        ("no check of images", "decode_check was True and is now False"),
        ("a row index", "row_index was False and is now True"),
        ("turned photos", "exif was ignore and is now apply"),
        ("no more rejects", "1 samples were left out of it, 0 may be"),
    ],
)
def test_resume_refuses_a_finished_file_that_the_command_would_not_make(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture, change: str, words: str
) -> None:
    root, out, names = tmp_path / "images", tmp_path / "out.beton", tmp_path / "names.txt"
    shutil.copytree(folder.root, root)
    image = sorted((root / "n01440764").iterdir())[0]
    names.write_text("\n".join(folder.class_names))
    maps: list[object] = []
    if change == "maps swapped":
        maps = ["--label-maps", published(folder, tmp_path / "maps"), "--extent", "full"]
    elif change == "maps annotated anew":
        spec = MapSpec(2, 2, 2, 4)
        records = [pack(np.indices((2, 2, 2))[0], np.zeros((2, 2, 2)), spec)] * len(folder.ids)
        write_store(tmp_path / "store", folder.ids, records, spec, folder.class_names, created="monday")
        maps = ["--label-maps", tmp_path / "store"]
    elif change == "no more rejects":
        image.write_bytes(b"no image")
    arguments = [
        root,
        out,
        "--class-names",
        names,
        *maps,
        *(["--on-error", "quarantine"] if change == "no more rejects" else []),
    ]
    assert run(to_beton, *arguments) == 0
    before = out.stat().st_mtime_ns
    assert run(to_beton, *arguments, "--resume") == 0 and "nothing to do" in capsys.readouterr().err

    if change == "maps added":
        arguments += ["--label-maps", published(folder, tmp_path / "maps"), "--extent", "full"]
    elif change == "maps swapped":
        shutil.rmtree(tmp_path / "maps")
        published(folder, tmp_path / "maps", seed=1)
    elif change == "maps annotated anew":
        write_manifest(tmp_path / "store", spec, len(folder.ids), folder.class_names, complete=True, created="tuesday")
    elif change == "class order":
        names.write_text("\n".join(reversed(folder.class_names)))
    elif change == "an image replaced":
        shutil.copy(sorted((root / "n01440764").iterdir())[1], image)
    elif change == "an image touched up, of the same size":
        image.write_bytes(image.read_bytes())
    elif change == "a new image":
        shutil.copy(image, image.with_name("new.JPEG"))
    elif change == "an image gone":
        image.unlink()
    elif change == "no more rejects":
        arguments = arguments[:-2]
    arguments += {
        "a page size": ["--page-size", 16 << 20],
        "no check of images": ["--no-decode-check"],
        "a row index": ["--row-index"],
        "turned photos": ["--exif", "apply"],
    }.get(change, [])
    assert run(to_beton, *arguments, "--resume") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(words, said) and "--overwrite" in said and out.stat().st_mtime_ns == before
    if change not in ("a new image", "no more rejects"):
        assert run(to_beton, *arguments, "--overwrite", "--resume") == 0 and out.stat().st_mtime_ns != before
        before = out.stat().st_mtime_ns
        assert run(to_beton, *arguments, "--overwrite", "--resume") == 0 and out.stat().st_mtime_ns == before
        assert run(to_beton, *arguments, "--resume") == 0 and "nothing to do" in capsys.readouterr().err


def test_the_converter_closes_what_it_opens(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, monkeypatch
) -> None:
    maps, closed = published(folder, tmp_path / "maps"), []
    monkeypatch.setattr(PublishedMaps, "close", lambda self: closed.append(self.path))
    assert (
        run(to_beton, folder.root, tmp_path / "out.beton", "--label-maps", maps, "--extent", "full", "--dry-run") == 0
    )
    assert closed == [maps]


def test_no_thread_runs_when_the_workers_are_forked(folder: ImageFolder, tmp_path: Path, monkeypatch) -> None:
    """A child has the parent's locks as they were, and none of its threads to release them."""
    threads, enter = [], Forked.__enter__
    monkeypatch.setattr(Forked, "__enter__", lambda self: (threads.append(threading.enumerate()), enter(self))[1])
    before = threading.enumerate()
    terminal = Console(file=io.StringIO(), force_terminal=True)
    options = RunOptions(workers=2, processes=True)
    convert(Inputs(folder.root), tmp_path / "out.beton", EncodeOptions(), options, console=terminal)
    assert threads == [before] and "images/s" in terminal.file.getvalue()


def test_long_conversions_say_how_far_they_are_without_a_terminal(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    assert run(to_beton, folder.root, tmp_path / "out.beton", "--workers", 1) == 0
    assert re.search(
        r"^packing: \d+ of 40, [\d.,]+ images/s, \d+ MB/s, \d+ s left$", capsys.readouterr().err, re.MULTILINE
    )
    assert run(to_beton, "verify", tmp_path / "out.beton") == 0


SLURM = {
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "14",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "8",
}


def test_shards_of_slurm_arrays() -> None:
    shards = [Shard.parse("auto", {**SLURM, "SLURM_ARRAY_TASK_ID": str(task)}) for task in range(0, 15, 2)]
    assert shards == [Shard(i, 8) for i in range(8)]  # --array=0-14:2
    plain = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "6", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert Shard.parse("auto", {**plain, "SLURM_ARRAY_TASK_ID": "5"}) == Shard(2, 4)
    for environment in (
        {**SLURM, "SLURM_ARRAY_TASK_ID": "3"},  # of another step
        {
            "SLURM_ARRAY_TASK_ID": "1",
            "SLURM_ARRAY_TASK_MIN": "1",
            "SLURM_ARRAY_TASK_MAX": "7",
            "SLURM_ARRAY_TASK_COUNT": "3",
        },  # --array=1,5,7
        {**SLURM, "SLURM_ARRAY_TASK_ID": "x"},
        {"RANK": "8", "WORLD_SIZE": "8"},
        {"SLURM_PROCID": "-1", "SLURM_NTASKS": "4"},
    ):
        with pytest.raises(BetonError, match="--shard auto: .*give i/n"):
            Shard.parse("auto", environment)


def test_interrupt_from_the_keyboard(folder: ImageFolder, tmp_path: Path) -> None:
    root = tmp_path / "images" / "a"
    root.mkdir(parents=True)
    for i in range(3000):
        (root / f"{i}.jpg").symlink_to(Path(folder.root) / folder.ids[i % len(folder.ids)])
    # Whatever started the tests may ignore the signal (nohup, a job in the background), which would be inherited.
    process = subprocess.Popen(
        [sys.executable, SCRIPT, root.parent, tmp_path / "out.beton"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and not partial_paths(tmp_path / "out.beton")[0].exists():
        time.sleep(0.02)
    process.send_signal(2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said and "Traceback" not in said
    assert not (tmp_path / "out.beton").exists()


def test_overwrite_replaces_betons_only(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tars = [pack_train(tmp_path / f"{name}.tar", folder) for name in ("a", "b")]
    before = tars[1].read_bytes()
    assert run(to_beton, *tars, "--overwrite") == 1  # OUT was forgotten: the last input would be it
    assert "is no beton" in capsys.readouterr().err and tars[1].read_bytes() == before
    out = tmp_path / "out.beton"
    for _ in range(2):
        assert run(to_beton, folder.root, out, "--overwrite") == 0
    assert run(to_beton, folder.root, out) == 1
    assert run(to_beton, folder.root, tmp_path, "--overwrite") == 1


def test_info_and_verify_take_several_files(to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, capsys) -> None:
    files = [tmp_path / f"{name}.beton" for name in ("a", "b")]
    for file in files:
        assert run(to_beton, folder.root, file, "--order", "shuffled", "--seed", 9) == 0
    capsys.readouterr()
    assert run(to_beton, "verify", *files, "--decode") == 0 and capsys.readouterr().out.count("sound") == 2
    assert run(to_beton, "info", *files) == 0
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "image, label, crc",
        "conversion source │ image folder",
        "conversion order │ shuffled",
        "conversion seed │ 9",
        "n01440764, n01443537",
    ):
        assert said.count(words) == 2, words
    data = bytearray(files[0].read_bytes())
    data[len(data) // 2] ^= 1
    files[0].write_bytes(data)
    assert run(to_beton, "verify", *files) == 1
    said = capsys.readouterr().out
    assert "a.beton: 1 damaged" in said and "b.beton: sound" in said


def test_names_are_no_markup(
    to_beton: ModuleType, folder: ImageFolder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Rich would swallow [red], and take [/a] for the end of a style that was never begun."""
    for name in ("[red]", "b"):
        (tmp_path / "[images]" / name).mkdir(parents=True)
        shutil.copy(Path(folder.root) / folder.ids[0], tmp_path / "[images]" / name / "[blue].jpg")
    (tmp_path / "names.json").write_text(json.dumps(["[/a]", "[red]", "b"]))
    out, names = tmp_path / "[bold].beton", ("--class-names", tmp_path / "names.json")
    assert (
        run(to_beton, tmp_path / "[images]", out, *names, "--dry-run") == 0
        and run(to_beton, tmp_path / "[images]", out, *names) == 0
    )
    assert run(to_beton, "info", out) == 0
    said = capsys.readouterr().out
    assert "3: [/a], [red], b" in said and "[red]/[blue].jpg" in said
    assert run(to_beton, "verify", out) == 0


def test_pixels_are_those_of_the_source(originals: ImageFolder, tmp_path: Path) -> None:
    """133 original ImageNet files, greys and 2,400 px ones among them: Pillow shows the same pixels before and after,
    bit for bit."""
    out = tmp_path / "out.beton"
    inputs, options = Inputs(originals.root), RunOptions(workers=2, processes=True)
    summary = convert(inputs, out, EncodeOptions(), options)
    assert summary.samples == 133 and summary.copied + summary.transcoded == 133 and summary.stripped > 30
    with BetonReader(out) as reader:
        for i, sample_id in enumerate(reader.source_ids):
            before, after = (
                np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
                for data in (originals.read(i), bytes(reader.image(i)))
            )
            assert sample_id == originals.ids[i] and (before == after).all(), sample_id
    unchecked = convert(inputs, tmp_path / "fast.beton", EncodeOptions(decode_check=False), options)
    assert unchecked.copied == summary.copied and content(tmp_path / "fast.beton") == content(out)


@pytest.mark.slow  # every time: beton/test_beton.py's, of one file
@pytest.mark.usefixtures("stock_ffcv")
def test_stock_ffcv_opens_what_is_written(to_beton: ModuleType, folder: ImageFolder, tmp_path: Path) -> None:
    """Any source, label maps with a palette and without, in shards: ffcv's own loader delivers all of it."""
    maps = published(folder, tmp_path / "maps")
    pack_train(tmp_path / "train.tar", folder)
    code = """
import sys, numpy as np
from ffcv.loader import Loader, OrderOption
from ffcv.fields.rgb_image import CenterCropRGBImageDecoder
from ffcv.fields.basics import IntDecoder
from tl_fast.beton.ffcv_field import LabelMapField
total = 0
for file in sys.argv[1:]:
    loader = Loader(file, batch_size=8, num_workers=1, order=OrderOption.SEQUENTIAL, drop_last=False,
                    custom_fields={"label_map": LabelMapField},
                    pipelines={"image": [CenterCropRGBImageDecoder((32, 32), 1)], "label": [IntDecoder()], "crc": None})
    for image, label, label_map in loader:
        assert image.shape[1:] == (32, 32, 3) and image.any() and label_map.shape[1:] == (2, 4, 6, 6)
        total += len(label)
print(total)
"""
    for i in range(2):
        assert (
            run(
                to_beton,
                tmp_path / "train.tar",
                tmp_path / "out.beton",
                "--label-maps",
                maps,
                "--extent",
                "full",
                "--shard",
                f"{i}/2",
            )
            == 0
        )
    files = sorted(map(str, tmp_path.glob("out-*.beton")))
    result = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert result.stdout.split() == [str(len(folder.ids))], result.stderr
