"""What annotation is given: every kind of data set, images that cannot be read or lie on their side, stores to go on
with.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conversions import SHAPE, published, run
from PIL import Image
from small_sources import WNIDS, pack_train, pack_val, pack_webdataset, parquet_table, write_parquet
from tiny_runs import torchrun

from tl_fast import annotate
from tl_fast.annotation import run as annotation
from tl_fast.annotation.annotator import AnnotateError
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.labelmaps import store as map_store
from tl_fast.labelmaps.format import LabelMapError
from tl_fast.labelmaps.store import LabelMapStore
from tl_fast.sources.image_folder import ImageFolder
from tl_fast.system import progress

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = "--model efficientnet-lite0 --img-size 32 --device cpu --workers 1".split()


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> ImageFolder:
    """Two classes called like ImageNet's, five photos each."""
    for wnid, name in zip(WNIDS, ("animal", "tool"), strict=False):
        (tmp_path / "images" / wnid).mkdir(parents=True)
        for i, file in enumerate(sorted((photos / "val" / name).glob("*.jpg"))[:5]):
            shutil.copy(file, tmp_path / "images" / wnid / f"{wnid}_{i}.JPEG")
    return ImageFolder(tmp_path / "images")


def make_maps(*arguments: object) -> dict:
    return annotate.main([*map(str, arguments), *QUICK])


def records(store: Path) -> list[bytes]:
    found = LabelMapStore(store)
    return [found.record(i).tobytes() for i in range(len(found))]


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """What the command says when it ends with exit code 1."""
    with pytest.raises(SystemExit) as stopped:
        make_maps(*arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 1 and "Traceback" not in said
    return " ".join(said.split())


# --- every kind of data set


def test_every_source_gives_the_same_label_maps(folder: ImageFolder, to_beton, tmp_path: Path) -> None:
    root = Path(folder.root)
    (tmp_path / "packed").mkdir()
    pack_train(tmp_path / "train.tar", folder)
    val, classes = pack_val(tmp_path / "val.tar", folder)
    (tmp_path / "labels.txt").write_text("\n".join(classes))
    write_parquet(
        tmp_path / "train-00000.parquet", parquet_table(folder, list(range(len(folder.ids)))), row_group_size=3
    )
    pack_webdataset(folder, tmp_path / "packed", shards=2)
    (tmp_path / "names.txt").write_text("\n".join(folder.class_names))
    assert run(to_beton, root, tmp_path / "train.beton") == 0
    make_maps(root, tmp_path / "folder", "--classes")
    by_bytes = {folder.read(i): record for i, record in enumerate(records(tmp_path / "folder"))}
    for kind, arguments in (
        ("train tar", [tmp_path / "train.tar"]),
        ("val tar", [val, "--labels", tmp_path / "labels.txt"]),
        ("parquet", [tmp_path / "train-00000.parquet"]),
        ("webdataset", [tmp_path / "packed" / "train-{000..001}.tar", "--class-names", tmp_path / "names.txt"]),
        ("beton", [tmp_path / "train.beton"]),
    ):
        manifest = make_maps(arguments[0], tmp_path / kind, *arguments[1:], "--classes")
        store = LabelMapStore(tmp_path / kind)
        assert (
            manifest["class_names"] == folder.class_names
            and manifest["class_counts"] == [5, 5]
            and "pooled_top1" in manifest
        ), kind
        source = annotation.open_images(
            arguments[0],
            labels=arguments[2] if kind == "val tar" else None,
            class_names=arguments[2] if kind == "webdataset" else None,
        )
        assert store.ids == source.ids, kind
        assert records(tmp_path / kind) == [by_bytes[source.read(i)] for i in range(len(source))], kind


def test_original_tar_is_annotated_and_packed_without_unpacking(shared: Path, to_beton, tmp_path: Path, capsys) -> None:
    """ImageNet's training tar as downloaded → annotate → to_beton.py → verify: README's commands, on original files."""
    root = shared / "data" / "imagenet_sample"
    if not root.is_dir():
        pytest.skip(f"no {root}")
    originals = ImageFolder(root)
    tar = tmp_path / "ILSVRC2012_img_train.tar"
    pack_train(tar, originals)
    make_maps(tar, tmp_path / "maps", "--classes", "auto")
    assert run(to_beton, tar, tmp_path / "train.beton", "--label-maps", tmp_path / "maps") == 0
    assert run(to_beton, "verify", tmp_path / "train.beton", "--decode") == 0 and "sound" in capsys.readouterr().out
    assert not [path for path in tmp_path.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg")]
    store = LabelMapStore(tmp_path / "maps")
    with BetonReader(tmp_path / "train.beton") as reader:
        assert reader.source_ids == originals.ids and reader.class_names == originals.class_names
        classes, _ = reader.label_maps(np.arange(len(reader)))
        assert all(
            (classes[i] == store.record(sample_id)["classes"]).all() for i, sample_id in enumerate(reader.source_ids)
        )


def test_a_beton_is_packed_anew_with_label_maps(folder: ImageFolder, to_beton, tmp_path: Path, capsys) -> None:
    assert run(to_beton, folder.root, tmp_path / "plain.beton") == 0
    make_maps(tmp_path / "plain.beton", tmp_path / "maps", "--classes")
    assert run(to_beton, tmp_path / "plain.beton", tmp_path / "with_maps.beton", "--label-maps", tmp_path / "maps") == 0
    assert verify(tmp_path / "with_maps.beton", decode=True) == []
    with BetonReader(tmp_path / "plain.beton") as plain, BetonReader(tmp_path / "with_maps.beton") as reader:
        assert reader.source_ids == plain.source_ids and reader.spec is not None
        assert all((reader.image(i) == plain.image(i)).all() for i in range(len(plain)))
    capsys.readouterr()
    assert run(to_beton, tmp_path / "plain.beton", tmp_path / "turned.beton", "--exif", "apply") == 1
    assert "was converted with --exif ignore" in capsys.readouterr().err
    assert run(to_beton, tmp_path / "plain.beton", folder.root, tmp_path / "x.beton") == 1
    assert run(to_beton, tmp_path / "plain.beton", tmp_path / "x.beton", "--labels", "list.txt") == 1
    assert "a beton has its labels inside" in capsys.readouterr().err


# --- images that cannot be read


@pytest.fixture
def damaged(folder: ImageFolder) -> tuple[ImageFolder, dict[str, str]]:
    """The folder with a cut-off photo, a dangling link and one that is no image; {id: what is said of it}."""
    bad = {folder.ids[1]: "damaged image", folder.ids[4]: "No such file", folder.ids[7]: "not an image"}
    cut, link, text = (Path(folder.root) / sample_id for sample_id in bad)
    cut.write_bytes(cut.read_bytes()[:3000])
    link.unlink()
    link.symlink_to("nowhere.JPEG")
    text.write_text("no image")
    return ImageFolder(Path(folder.root)), bad


@pytest.mark.parametrize("fit_head", [False, True])
def test_what_cannot_be_read_is_left_out_and_conversion_says_why(
    damaged, to_beton, tmp_path: Path, capsys, monkeypatch, fit_head
) -> None:
    monkeypatch.setattr(map_store, "PART_SIZE", 4)
    folder, bad = damaged
    options = ["--fit-head", "--eval-images", folder.root] if fit_head else ["--classes"]
    maps, out = tmp_path / "maps", tmp_path / "out.beton"
    if fit_head:  # it needs ten images that can be read
        for i in range(4):
            for label, wnid in enumerate(WNIDS[:2]):
                Image.new("RGB", (40, 40), (200 * label, 30 * i, 0)).save(Path(folder.root) / wnid / f"more_{i}.png")
    said = refused(capsys, folder.root, maps, *options)
    assert "--on-error quarantine" in said and next(iter(bad)) in said
    manifest = make_maps(folder.root, maps, *options, "--on-error", "quarantine")
    said = capsys.readouterr().err
    assert manifest["rejected"] == 3 and "3 of" in said and f"{maps}.rejects.jsonl" in "".join(said.split("\n"))
    listed = {
        reject["id"]: reject for reject in map(json.loads, Path(f"{maps}.rejects.jsonl").read_text().splitlines())
    }
    assert listed.keys() == bad.keys() and all(
        re.search(bad[name], reject["reason"]) for name, reject in listed.items()
    )
    assert all(folder.root in reject["origin"] for reject in listed.values())
    store = LabelMapStore(maps)
    assert store.complete and {store.ids[i] for i in store.rejects} == bad.keys()
    with pytest.raises(LabelMapError, match="annotation rejected it: .*not an image"):
        store.record(list(bad)[2])

    # Conversion: the same samples with annotation's reasons, also where the image is whole by now.
    healed = Path(folder.root) / list(bad)[2]
    shutil.copy(Path(folder.root) / folder.ids[0], healed)
    assert run(to_beton, folder.root, out, "--label-maps", maps) == 1
    assert "annotation rejected it" in " ".join(capsys.readouterr().err.split())
    assert run(to_beton, folder.root, out, "--label-maps", maps, "--on-error", "quarantine") == 0
    rejects = [json.loads(line) for line in Path(f"{out}.rejects.jsonl").read_text().splitlines()]
    assert {reject["id"]: reject["reason"] for reject in rejects} == {
        name: f"annotation rejected it: {reject['reason']}" for name, reject in listed.items()
    }
    with BetonReader(out) as reader:
        assert set(reader.source_ids) == set(store.ids) - bad.keys()


def test_rejects_are_limited_and_remembered(damaged, tmp_path: Path, capsys) -> None:
    folder, bad = damaged
    maps = tmp_path / "maps"
    said = refused(capsys, folder.root, maps, "--on-error", "quarantine", "--max-rejects", 2)
    assert "3 images cannot be read and --max-rejects allows 2" in said and not LabelMapStore(maps).complete
    assert make_maps(folder.root, maps, "--on-error", "quarantine", "--max-rejects", 3)["complete"]
    assert "an earlier run left out" in refused(capsys, folder.root, maps)
    assert "--max-rejects allows 1" in refused(
        capsys, folder.root, maps, "--on-error", "quarantine", "--max-rejects", 1
    )
    assert "counts what on_error quarantine leaves out" in refused(capsys, folder.root, maps, "--max-rejects", 1)


def test_a_held_out_image_that_cannot_be_read_is_named(damaged, photos: Path, tmp_path: Path, capsys) -> None:
    """By its own path, not by that of the training image in its place; other classes are refused before any work."""
    folder, bad = damaged
    train = tmp_path / "train"
    shutil.copytree(photos / "val" / "animal", train / WNIDS[0])
    shutil.copytree(photos / "val" / "tool", train / WNIDS[1])
    said = refused(capsys, train, tmp_path / "maps", "--fit-head", "--eval-images", folder.root)
    assert f"{folder.root}/{next(iter(bad))}" in said and "--on-error quarantine" in said
    said = refused(capsys, train, tmp_path / "other", "--fit-head", "--eval-images", photos / "val")
    assert "its classes ['animal'" in said and not (tmp_path / "other").exists()


def test_a_data_set_that_cannot_be_read_at_all_is_an_error(damaged, tmp_path: Path, capsys) -> None:
    folder, _ = damaged
    for sample_id in folder.ids:
        path = Path(folder.root) / sample_id
        path.unlink()
        path.write_text("no image")
    said = refused(capsys, folder.root, tmp_path / "maps", "--on-error", "quarantine")
    assert "none of the 10 images can be read" in said and not LabelMapStore(tmp_path / "maps").complete


def test_errors_of_the_machine_are_no_images_fault(folder: ImageFolder, tmp_path: Path, monkeypatch, capsys) -> None:
    def full(self, i):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(ImageFolder, "read", full)
    assert "the image is not to blame" in refused(capsys, folder.root, tmp_path / "maps", "--on-error", "quarantine")


# --- stores to go on with


def test_a_replaced_image_is_not_given_its_old_label_map(
    folder: ImageFolder, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(map_store, "PART_SIZE", 4)
    maps = tmp_path / "maps"
    make_maps(folder.root, maps)
    before = records(maps)
    make_maps(folder.root, maps)  # nothing has changed
    image = Path(folder.root) / folder.ids[5]
    shutil.copy(Path(folder.root) / folder.ids[0], image)
    said = refused(capsys, folder.root, maps)
    assert (
        f"{image}: has changed since its label map was made" in said
        and "delete maps-00001.npy" in said
        and "--overwrite" in said
    )
    (maps / "maps-00001.npy").unlink()
    make_maps(folder.root, maps)
    after = records(maps)
    assert [i for i in range(10) if after[i] != before[i]] == [5] and after[5] == after[0]


def test_an_image_replaced_before_its_part_is_made_does_no_harm(
    folder: ImageFolder, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(map_store, "PART_SIZE", 4)
    maps = tmp_path / "maps"
    make_maps(folder.root, maps)
    (maps / "maps-00002.npy").unlink()
    shutil.copy(Path(folder.root) / folder.ids[0], Path(folder.root) / folder.ids[9])
    make_maps(folder.root, maps)
    assert records(maps)[9] == records(maps)[0]


@pytest.mark.parametrize("manifest", [{"name": "my thesis"}, [1, 2], "{torn"])
def test_overwrite_replaces_nothing_but_a_store_of_ours(folder: ImageFolder, tmp_path: Path, capsys, manifest) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    for name in (
        "head.safetensors",
        "features-1.npy",
        "maps-00000.npy",
        "ids.jsonl",
        ".maps-00000.npy.x.tmp",
        "stamps-0.npy",
    ):
        (precious / name).write_text("precious")
    before = {path.name: path.read_bytes() for path in precious.iterdir()}
    for options in ([], ["--overwrite"]):
        said = refused(capsys, folder.root, precious, *options)
        assert f"{precious}/manifest.json" in said and "nothing in" in said
        assert {path.name: path.read_bytes() for path in precious.iterdir()} == before


def test_a_store_that_does_not_say_which_images_it_is_of_is_refused(
    folder: ImageFolder, tmp_path: Path, capsys
) -> None:
    """Earlier versions recorded names only."""
    make_maps(folder.root, tmp_path / "maps")
    (tmp_path / "maps" / "stamps-00000.npy").unlink()
    assert "stamps-00000.npy is missing" in refused(capsys, folder.root, tmp_path / "maps")


# --- EXIF orientation


@pytest.fixture
def turned(folder: ImageFolder) -> ImageFolder:
    """The folder with two photos that lie on their side, as phones store them, sides a multiple of 16."""
    for sample_id in (folder.ids[2], folder.ids[6]):
        path = Path(folder.root) / sample_id
        image = Image.open(path).convert("RGB").resize((96, 64))
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(path, "JPEG", quality=95, exif=exif)
    return ImageFolder(Path(folder.root))


def test_exif_is_ignored_with_a_word_or_applied_to_image_and_map_alike(
    turned: ImageFolder, to_beton, tmp_path: Path, capsys
) -> None:
    for way in ("ignore", "apply"):
        make_maps(turned.root, tmp_path / way, "--classes", *(["--exif", "apply"] if way == "apply" else []))
        said = " ".join(capsys.readouterr().err.split())
        assert (
            "2 images say by EXIF that they are to be turned, which was ignored" in said and "--exif apply" in said
        ) == (way == "ignore")
        assert LabelMapStore(tmp_path / way).manifest["exif"] == way
    changed = [
        i
        for i, (a, b) in enumerate(zip(records(tmp_path / "ignore"), records(tmp_path / "apply"), strict=True))
        if a != b
    ]
    assert changed == [2, 6]

    for way, other in (("ignore", "apply"), ("apply", "ignore")):
        out = tmp_path / f"{way}.beton"
        assert run(to_beton, turned.root, out, "--label-maps", tmp_path / other, "--exif", way) == 1
        assert f"made with --exif {other}" in " ".join(capsys.readouterr().err.split()) and not out.exists()
        assert run(to_beton, turned.root, out, "--label-maps", tmp_path / way, "--exif", way) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("2 images say by EXIF that they are to be turned" in said) == (way == "ignore")
        with BetonReader(out) as reader:
            assert reader.conversion["exif"] == way
            size = int(reader.widths[2]), int(reader.heights[2])
            assert size == ((96, 64) if way == "ignore" else (64, 96))
            pixels = np.asarray(Image.open(io.BytesIO(bytes(reader.image(2)))).convert("RGB"), int)
            stored = np.asarray(Image.open(Path(turned.root) / turned.ids[2]).convert("RGB"), int)
            expected = stored if way == "ignore" else np.rot90(stored, -1)
            assert np.abs(pixels - expected).mean() < 2
    maps = published(turned, tmp_path / "published")
    assert (
        run(to_beton, turned.root, tmp_path / "p.beton", "--label-maps", maps, "--extent", "full", "--exif", "apply")
        == 1
    )
    assert SHAPE and "made with --exif ignore" in " ".join(capsys.readouterr().err.split())
    assert "exif was" in refused(capsys, turned.root, tmp_path / "ignore", "--classes", "--exif", "apply")


# --- the run


def test_long_annotations_say_how_far_they_are_without_a_terminal(
    folder: ImageFolder, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    make_maps(folder.root, tmp_path / "maps")
    assert re.search(r"^annotating: [24] of 10, [\d.]+ images/s, \d+ s left$", capsys.readouterr().err, re.MULTILINE)


RESTARTED = """
import os, sys
import torch.distributed as dist
from tl_fast import annotate
from tl_fast.annotation import run as annotation
write_maps = annotation._write_maps

def dies_once(*arguments):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
        os._exit(7)
    write_maps(*arguments)

annotation._write_maps = dies_once
annotate.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_ranks_that_torchrun_restarts_go_on(folder: ImageFolder, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(RESTARTED)
    script = [str(tmp_path / "job.py"), str(folder.root), str(tmp_path / "maps"), *QUICK]
    done = torchrun(script, 2, "--standalone", "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert LabelMapStore(tmp_path / "maps").complete


def test_the_wait_for_other_ranks_is_an_option(folder: ImageFolder, tmp_path: Path, monkeypatch) -> None:
    given = []
    join = annotation.join
    monkeypatch.setattr(
        annotation,
        "join",
        lambda *arguments, **options: (given.append((arguments, options)), join(*arguments, **options))[1],
    )
    make_maps(folder.root, tmp_path / "maps", "--timeout-minutes", 7)
    assert given == [(("cpu", 7.0), {"backend": "gloo"})]
    with pytest.raises(AnnotateError, match="timeout_minutes"):
        annotation.AnnotateConfig("i", "o", "m", timeout_minutes=0)
