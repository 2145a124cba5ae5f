"""How fast does a folder of JPEGs become a beton: ours with and without decoding every image, ours with images shrunk
to JPEGs and to planes, stock FFCV's writer, and `cp` of the folder?

    python benchmarks/convert.py [--images FOLDER] [--samples 6144] [--rounds 5] [--workers 2]
    python benchmarks/convert.py --table

All read the same files, which lie in the page cache; ours also packs label maps (top 5 of 1,000 classes in 18x18
cells), and has its file on the disk when it ends, as `cp -r; sync` has and the others have not. Rounds are interleaved,
after one that is not counted. Then the published label maps, one .pt an image: torch.load alone beside the whole
import. Prints median and spread and appends one row a contender to benchmarks/results/convert.jsonl. --table prints the
newest rows as docs/benchmarks.md has them, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rows import ROOT, measure, stock_ffcv_is_here, write_rows

from tl_fast.beton.reader import BetonReader
from tl_fast.convert.selection import Conversion
from tl_fast.convert.write import write_beton
from tl_fast.labelmaps.format import MapSpec, pack
from tl_fast.labelmaps.format import encode as encode_map
from tl_fast.labelmaps.published import open_label_maps
from tl_fast.labelmaps.store import LabelMapStore, write_store
from tl_fast.sources.open import open_source
from tl_fast.sources.source import Source
from tl_fast.system.memory import reuse_memory

CLASSES, SHAPE = 1000, (5, 18, 18)


def lay_out(images: Path, folder: Path, samples: int) -> None:
    """`samples` files in class folders: the JPEGs below `images`, repeated under other names."""
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise SystemExit(f"convert.py: no .jpg or .jpeg below {images}; name another folder with --images")
    for i, file in enumerate(itertools.islice(itertools.cycle(found), samples)):
        target = folder / f"class {i % 10}" / f"{file.stem} {i}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def random_maps(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Classes uint16 and scores float32 [k, H, W] of maps that list some 90 classes each, as an annotator's do."""
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(count):
        classes = rng.choice(CLASSES, 90, replace=False)[np.argsort(rng.random((90, *SHAPE[1:])), axis=0)[:5]]
        maps.append((classes.astype(np.uint16), np.sort(rng.gamma(2, 3, SHAPE), axis=0)[::-1].astype(np.float32)))
    return maps


def annotate(source: Source, folder: Path) -> LabelMapStore:
    spec = MapSpec(*SHAPE, CLASSES)
    records = [pack(*values, spec) for values in random_maps(64)]
    write_store(folder, source.ids, (records[i % len(records)] for i in range(len(source.ids))), spec)
    return LabelMapStore(folder)


class StockDataset:
    """What stock FFCV's writer takes: decoded images by index."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.ids)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(self.source.read(i))).convert("RGB"), int(self.source.labels[i])


def contenders(folder: Path, work: Path, workers: int) -> dict[str, Callable[[int], int]]:
    """Name -> a function that converts the folder once and returns how many images it has."""
    source = open_source(folder)
    maps = annotate(source, work / "maps")
    names = [f"class {i}" for i in range(CLASSES)]

    def ours(name: str, **options: Any) -> Callable[[int], int]:
        def run(number: int) -> int:
            listed = open_source(folder)  # listing the folder is part of the work
            conversion = Conversion(listed, maps, listed.order(None))
            out = work / f"ours {name} {number}.beton"
            write_beton(
                out,
                conversion,
                class_names=names,
                spec=maps.spec,
                workers=workers,
                processes=True,
                **options,
            )
            return len(conversion)

        return run

    def stock(number: int) -> int:
        from ffcv.fields import IntField, RGBImageField  # here, since it may not be installed
        from ffcv.writer import DatasetWriter

        writer = DatasetWriter(
            str(work / f"stock {number}.beton"),
            {"image": RGBImageField(write_mode="jpg"), "label": IntField()},
            num_workers=workers,
        )
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its progress bar
            writer.from_indexed_dataset(StockDataset(source))
        return len(source.ids)

    def copy(sync: bool) -> Callable[[int], int]:
        def run(number: int) -> int:
            target = work / f"copy {sync} {number}"
            subprocess.run(["cp", "-r", folder, target], check=True)
            if sync:
                subprocess.run(["sync", "-f", target], check=True)
            return len(source.ids)

        return run

    return {
        "tl_fast: every image decoded": ours("checked"),
        "tl_fast: structure checked": ours("copied", decode_check=False),
        "tl_fast: JPEGs, short side 256": ours("small", short_side=256),
        "tl_fast: planes, short side 256": ours("planes", store="yuv420", short_side=256),
        **({"stock FFCV writer": stock} if stock_ffcv_is_here() else {}),
        "cp -r": copy(False),
        "cp -r; sync": copy(True),
    }


def importers(folder: Path, count: int) -> dict[str, Callable[[int], int]]:
    """The published format: `count` files of float16 [2, 5, 18, 18]; name -> a function that reads all of them."""
    (folder / "class").mkdir(parents=True)
    for i, (classes, scores) in zip(range(count), itertools.cycle(random_maps(64)), strict=False):
        torch.save(
            torch.from_numpy(np.stack([scores, classes.astype(np.float32)])).half(), folder / "class" / f"{i}.pt"
        )
    maps = open_label_maps(folder, extent="full", num_classes=CLASSES)
    files = [folder / "class" / f"{i}.pt" for i in range(count)]

    def load(_: int) -> int:
        for file in files:
            torch.load(file, weights_only=True)
        return count

    def whole(_: int) -> int:
        for i in range(count):
            encode_map(maps.record(i), maps.spec)
        return count

    return {"torch.load alone": load, "tl_fast: load, check, quantise, encode": whole}


def table(results: Path) -> str:
    """The newest row of every contender and data set as a Markdown table: median and range of images/s."""
    rows = [row for row in map(json.loads, results.read_text().splitlines()) if row["benchmark"] == "convert"]
    newest = {(row["contender"], row["images"]): row for row in rows}
    data_sets = {row["images"]: f"{row['images']}: {row['mean_bytes'] / 1000:.0f} KB a file" for row in rows}
    lines = ["| images/s | " + " | ".join(data_sets.values()) + " |", "|---" * (1 + len(data_sets)) + "|"]
    for contender in dict.fromkeys(contender for contender, _ in newest):
        measured = [newest.get((contender, images)) for images in data_sets]
        cells = [f"{row['median']:,.0f} ({row['min']:,.0f}–{row['max']:,.0f})" if row else "" for row in measured]
        lines.append(f"| {contender} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs (default: the bundled photos)"
    )
    parser.add_argument(
        "--samples", type=int, default=6144, help="files in the folder; the images are repeated to fill it"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted conversions by each contender")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "convert.jsonl")
    parser.add_argument(
        "--table", action="store_true", help="print the table of docs/benchmarks.md from the stored rows"
    )
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.results))
        return
    reuse_memory()  # as converters/to_beton.py does
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        lay_out(arguments.images, work / "images", arguments.samples)
        sizes = [file.stat().st_size for file in (work / "images").rglob("*.jpg")]
        rates = measure(contenders(work / "images", work, arguments.workers), arguments.rounds)
        with BetonReader(work / "ours checked 0.beton") as reader:
            print(f"label maps: {np.mean(reader.label_map_sizes):,.0f} bytes each")
        imports = measure(importers(work / "published", 1000), arguments.rounds)
    facts = {
        "images": arguments.images.name,
        "samples": arguments.samples,
        "mean_bytes": round(float(np.mean(sizes))),
        "workers": arguments.workers,
    }
    write_rows(arguments.results, "convert", rates, "images/s", ("ffcv", "simplejpeg", "Pillow", "numba"), **facts)
    write_rows(arguments.results, "published maps", imports, "maps/s", ("torch", "numba"), samples=1000, workers=1)


if __name__ == "__main__":
    main()
