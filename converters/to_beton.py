"""Image folder → one .beton file, with label maps. Also: what is in such a file, and is it sound?

    python converters/to_beton.py IMAGES OUT.beton --label-maps DIR [--workers N] [--quality 90] [--max-resolution PX]
    python converters/to_beton.py info FILE.beton
    python converters/to_beton.py verify FILE.beton [--decode]

IMAGES has one folder per class (torchvision's layout); labels are the class folders' places in sorted order. DIR is a store that
`python -m tl_fast.annotate IMAGES DIR` made. Exit code 0: done, sound; 1: an error or a damaged file, said on stderr; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tl_fast.beton import BetonError, BetonReader, Sample, WriteSummary, verify, write_beton
from tl_fast.beton_write import PAGE_SIZE
from tl_fast.image_folder import ImageFolderError, ImageList, list_images
from tl_fast.labelmap import LabelMapError, LabelMapStore

MIB = 1 << 20


class FolderSamples:
    """The folder's images as `write_beton` takes them: sized, iterable, each image read when a worker asks for it."""

    def __init__(self, folder: ImageList, store: LabelMapStore | None) -> None:
        self.folder, self.store = folder, store

    def __len__(self) -> int:
        return len(self.folder.ids)

    def __iter__(self) -> Iterator[Sample]:
        for path, label in zip(self.folder.ids, self.folder.labels.tolist(), strict=True):
            file = self.folder.root / path
            label_map = None if self.store is None else functools.partial(self.store.record, path)
            yield Sample(path, label, file.read_bytes, label_map, origin=str(file))


def open_store(path: Path, folder: ImageList) -> LabelMapStore:
    """Open the label maps of `folder`. Raises BetonError unless they are complete and of the folder's classes."""
    store = LabelMapStore(path)
    remedy = (
        "token targets and labels must be of the same classes: annotate this folder with --classes (keep the logits of its classes) "
        "or --fit-head (a head for them)"
    )
    if store.spec.num_classes != len(folder.class_names):
        raise BetonError(
            f"{path}: its label maps know {store.spec.num_classes} classes, {folder.root} has {len(folder.class_names)} class folders; "
            + remedy
        )
    if store.class_names is not None and list(store.class_names) != list(folder.class_names):
        i, (theirs, ours) = next(
            (i, pair) for i, pair in enumerate(zip(store.class_names, folder.class_names, strict=True)) if pair[0] != pair[1]
        )
        raise BetonError(f"{path}: its class {i} is {theirs!r}, that of {folder.root} is {ours!r}; {remedy}")
    if store.missing_parts:
        raise BetonError(
            f"{path}: {len(store.missing_parts)} parts are missing ({store.missing_parts[0]} first); run the same tl_fast.annotate command "
            "again to finish it"
        )
    return store


def annotator_record(store: LabelMapStore | None) -> dict | None:
    """What the store's manifest says about how the maps were made."""
    known_elsewhere = {"class_names", "num_samples", "complete", "spec"}
    return None if store is None else {key: value for key, value in store.manifest.items() if key not in known_elsewhere}


def convert(
    images: Path,
    out: Path,
    label_maps: Path | None = None,
    *,
    workers: int | None = None,
    quality: int = 90,
    max_resolution: int | None = None,
    page_size: int = PAGE_SIZE,
    overwrite: bool = False,
    console: Console | None = None,
) -> WriteSummary:
    """Convert an image folder, with progress bar and summary on `console`. Raises ImageFolderError, LabelMapError or
    BetonError naming the file at fault."""
    console = console or Console(stderr=True)
    folder = list_images(images)
    if folder.class_names is None:
        raise ImageFolderError(f"{images}: has no class folders; put each class's images in a folder of its own")
    store = None if label_maps is None else open_store(label_maps, folder)
    columns = (TextColumn("packing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(folder.ids), rate="")

        def progress(samples: int, size: int) -> None:
            if samples % 16 == 0 or samples == len(folder.ids):
                seconds = max(bar.tasks[task].elapsed or 0, 1e-3)
                bar.update(task, completed=samples, rate=f"{samples / seconds:,.0f} images/s  {size / seconds / 1e6:,.0f} MB/s")

        summary = write_beton(
            out,
            FolderSamples(folder, store),
            class_names=folder.class_names,
            spec=None if store is None else store.spec,
            annotator=annotator_record(store),
            workers=workers,
            max_resolution=max_resolution,
            quality=quality,
            page_size=page_size,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = summary.seconds
    rows = [
        ("samples", f"{summary.samples:,} in {len(folder.class_names):,} classes"),
        ("JPEGs copied untouched", f"{summary.copied:,}"),
        ("re-encoded to RGB JPEG", f"{summary.reencoded:,}"),
        (f"shrunk to {max_resolution} px" if max_resolution else "shrunk", f"{summary.resized:,}"),
        ("files ignored (no image by name)", f"{folder.ignored:,}"),
        ("images", f"{summary.image_bytes / 1e6:,.1f} MB"),
        ("label maps", f"{summary.label_map_bytes / 1e6:,.1f} MB" if store else "none"),
        ("file", f"{summary.file_bytes / 1e6:,.1f} MB"),
        (
            "speed",
            f"{summary.samples / seconds:,.0f} images/s, {summary.file_bytes / seconds / 1e6:,.0f} MB/s, {seconds:,.1f} s",
        ),
    ]
    print_table(console, str(out), rows)
    return summary


def print_table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title=title, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def info(path: Path, console: Console | None = None) -> None:
    """Print what a beton holds. Raises BetonError when its tables are damaged."""
    with BetonReader(path) as reader:
        pixels = reader.heights.astype(np.int64) * reader.widths
        names = reader.class_names
        rows = [
            ("samples", f"{len(reader):,}"),
            ("classes", f"{len(names):,}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "names not recorded"),
            ("labels", f"{reader.labels.min()}..{reader.labels.max()}, {len(np.unique(reader.labels)):,} different"),
            ("widths", f"{reader.widths.min()}..{reader.widths.max()} px"),
            ("heights", f"{reader.heights.min()}..{reader.heights.max()} px"),
            ("mean size", f"{pixels.mean() / 1e6:.2f} megapixels"),
            ("file, page", f"{path.stat().st_size / 1e6:,.1f} MB, {reader.page_size / MIB:g} MiB"),
            ("CRC-32 per sample", "yes" if reader.has_crc else "no (stock ffcv writer)"),
        ]
        if reader.spec is not None:
            spec = reader.spec
            rows.append(
                ("label maps", f"top {spec.k} of {spec.num_classes:,} classes in {spec.height}×{spec.width} cells, extent {spec.extent}")
            )
        rows += [(f"annotator {key}", str(value)) for key, value in (reader.annotator or {}).items()]
        rows += [("written by", f"tl_fast {reader.tl_fast_version}")] if reader.has_crc else []
        rows += [("first, last id", f"{reader.source_ids[0]}, {reader.source_ids[-1]}")]
        print_table(console or Console(), str(path), rows)


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv[:1] in (["info"], ["verify"]) else "convert"
    parser = argparse.ArgumentParser(
        prog=f"to_beton.py{'' if command == 'convert' else ' ' + command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if command == "convert":
        parser.add_argument("images", type=Path, metavar="IMAGES", help="folder with one folder per class")
        parser.add_argument("out", type=Path, metavar="OUT.beton")
        parser.add_argument(
            "--label-maps", type=Path, metavar="DIR", help="store made by tl_fast.annotate; without it the file has no label maps"
        )
        parser.add_argument("--workers", type=int, metavar="N", help="threads (default: the CPU cores this process may use)")
        parser.add_argument(
            "--quality", type=int, default=90, metavar="Q", help="of images that must be encoded anew, 1 to 100 (default 90)"
        )
        parser.add_argument("--max-resolution", type=int, metavar="PX", help="shrink images whose longest side is above this")
        parser.add_argument(
            "--page-size",
            type=int,
            default=PAGE_SIZE,
            metavar="BYTES",
            help="a power of two; no sample may be larger (default 8 MiB, as ffcv's)",
        )
        parser.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    else:
        parser.add_argument("file", type=Path, metavar="FILE")
        if command == "verify":
            parser.add_argument("--decode", action="store_true", help="decode every image too")
            parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    arguments = parser.parse_args(argv)
    if command == "verify" and arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    try:
        if command == "convert":
            convert(
                arguments.images,
                arguments.out,
                arguments.label_maps,
                workers=arguments.workers,
                quality=arguments.quality,
                max_resolution=arguments.max_resolution,
                page_size=arguments.page_size,
                overwrite=arguments.overwrite,
            )
        elif command == "info":
            info(arguments.file)
        else:
            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("verifying", total=None)
                problems = verify(arguments.file, arguments.decode, arguments.workers, lambda done: bar.update(task, completed=done))
            for problem in problems:
                print(problem, file=sys.stderr)
            print(f"{arguments.file}: {f'{len(problems)} damaged samples' if problems else 'sound'}")
            return 1 if problems else 0
    except (BetonError, ImageFolderError, LabelMapError, OSError) as error:
        print(f"to_beton.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
