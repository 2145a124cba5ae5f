"""Data sets of every kind, made of files in a folder: what the tests of sources, conversion and annotation read."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tl_fast.sources.source import Source

WNIDS = ["n01440764", "n01443537", "n02110341", "n03000684"]


def add(archive: tarfile.TarFile, name: str, data: bytes, **attributes: object) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def pack(path: Path | io.BytesIO, members: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> Path:
    where = {"name": path} if isinstance(path, Path) else {"fileobj": path}
    with tarfile.open(mode="w", format=format, **where) as archive:
        for name, data in members:
            add(archive, name, data)
    return path


def class_tar(members: list[tuple[str, bytes]], **options: int) -> bytes:
    pack(buffer := io.BytesIO(), members, **options)
    return buffer.getvalue()


def pack_train(path: Path, folder: Source, seed: int = 0) -> Path:
    """The training tar as ImageNet's: class tars, here in random order inside and out, to prove that order does not
    matter."""
    classes: dict[str, list[tuple[str, bytes]]] = {}
    for i, name in enumerate(folder.ids):
        classes.setdefault(name.split("/")[0], []).append((name.split("/")[1], folder.read(i)))
    rows = list(classes.items())
    shuffle = random.Random(seed).shuffle
    shuffle(rows)
    for _, members in rows:
        shuffle(members)
    return pack(path, [(f"{name}.tar", class_tar(members)) for name, members in rows])


def pack_webdataset(
    folder: Source, out: Path, shards: int = 2, classes: str = "number", extra: bool = True
) -> list[Path]:
    paths = []
    for shard in range(shards):
        members = []
        for i in range(shard, len(folder.ids), shards):
            key, suffix = Path(folder.ids[i]).stem, Path(folder.ids[i]).suffix[1:].lower()
            label = int(folder.labels[i])
            members.append((f"./{key}.{suffix}", folder.read(i)))
            members.append(
                (f"./{key}.cls", (str(label) if classes == "number" else folder.class_names[label] + "\n").encode())
            )
            members += [(f"./{key}.json", b"{}")] if extra else []
        paths.append(pack(out / f"train-{shard:03d}.tar", members))
    return paths


def parquet_table(folder: Source, rows: list[int], names: list[str] | None = None, hub: bool = True, **changes: object):
    """As `datasets` writes it: image struct of bytes and path, int64 label, features as JSON in the schema."""
    pa = pytest.importorskip("pyarrow")
    images = []
    for i in rows:
        name, path = folder.ids[i].split("/", 1)
        images.append(
            {"bytes": folder.read(i), "path": f"{Path(path).stem}_{name}{Path(path).suffix}" if hub else folder.ids[i]}
        )
    table = pa.table(
        {
            "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "label": pa.array(folder.labels[rows]),
        }
        | changes
    )
    features = {"image": {"_type": "Image"}, "label": {"names": names or folder.class_names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_parquet(path: Path, table, **options: object) -> Path:
    pytest.importorskip("pyarrow.parquet").write_table(table, path, **options)
    return path


def write_devkit(folder: Path, wnids: list[str], truth: list[str]) -> None:
    """data/meta.mat in the layout of the real one: struct array [n, 1], leaf classes first in an order of their own,
    then groups."""
    savemat = pytest.importorskip("scipy.io").savemat
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    shuffled = random.Random(1).sample(wnids, len(wnids))
    synsets = np.zeros((len(wnids) + 2, 1), [(field, object) for field in fields])
    for place, wnid in enumerate([*shuffled, "n00001740", "n00001930"]):
        count, children, height = (
            (0.0, np.zeros((1, 0)), 0.0) if place < len(wnids) else (2.0, np.array([[1.0, 2.0]]), 1.0)
        )
        synsets[place, 0] = (float(place + 1), wnid, f"word {wnid}, other", "gloss", count, children, height, 1300.0)
    (folder / "data").mkdir(parents=True)
    savemat(folder / "data" / "meta.mat", {"synsets": synsets})
    lines = "".join(f"{shuffled.index(wnid) + 1}\n" for wnid in truth)
    (folder / "data" / "ILSVRC2012_validation_ground_truth.txt").write_text(lines)


def pack_val(path: Path, folder: Source) -> tuple[Path, list[str]]:
    """Flat tar of the folder's images under validation names, classes mixed; returns the class of each in order of the
    names."""
    order = random.Random(2).sample(range(len(folder)), len(folder))
    members = [(f"ILSVRC2012_val_{number:08d}.JPEG", folder.read(i)) for number, i in enumerate(order, 1)]
    pack(path, random.Random(3).sample(members, len(members)))
    return path, [folder.class_names[folder.labels[i]] for i in order]


def checksummed(header: bytearray) -> bytes:
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)
