"""Images and label maps → one .beton file. Also: what is in such a file, and is it sound?

    python converters/to_beton.py IMAGES OUT.beton [--label-maps MAPS [--extent full|center_square]] [options]
    python converters/to_beton.py info FILE.beton ...
    python converters/to_beton.py verify FILE.beton ... [--decode]

IMAGES: a folder with one folder per class (torchvision's layout), the official ImageNet tars as downloaded, Hugging
Face parquet shards, WebDataset shards, or betons; several files, a folder of them, or a pattern in quotes. MAPS: a
store that `python -m tl_fast.annotate` made, or the published label maps (one .pt an image), in a folder or still in
their archive. docs/converting.md has the details.

The file appears when it is whole. Killed runs and runs that failed leave `.OUT.beton.partial`, from which --resume goes
on. Exit code 0: done, sound; 1: an error or a damaged file, said on stderr; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tl_fast.beton.layout import HEADER, VERSION, BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.source import open_images, settled_exif
from tl_fast.beton.verify import verify
from tl_fast.convert.partial_file import partial_paths
from tl_fast.convert.selection import (
    Conversion,
    Estimate,
    Shard,
    annotator_record,
    check_space,
    difference,
    estimate,
    free_space,
    open_maps,
)
from tl_fast.convert.write import PAGE_SIZE, WriteSummary, write_beton
from tl_fast.labelmaps.format import EXTENTS
from tl_fast.sources.image import EXIF, ignored_orientations
from tl_fast.sources.open import add_source_options
from tl_fast.sources.rejects import add_reject_options, list_beside
from tl_fast.sources.source import Source
from tl_fast.system.cores import usable_cores
from tl_fast.system.memory import reuse_memory
from tl_fast.system.mistakes import EXPECTED
from tl_fast.system.progress import ProgressDisplay

MIB = 1 << 20


def convert(
    images: Path | Sequence[Path],
    out: Path,
    label_maps: Path | None = None,
    *,
    extent: str | None = None,
    labels: Path | None = None,
    class_names: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    order: str = "source",
    seed: int = 0,
    shard: Shard | None = None,
    workers: int | None = None,
    quality: int = 90,
    max_resolution: int | None = None,
    decode_check: bool = True,
    row_index: bool = False,
    exif: str | None = None,
    page_size: int = PAGE_SIZE,
    on_error: str = "stop",
    max_rejects: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    space_check: bool = True,
    dry_run: bool = False,
    console: Console | None = None,
) -> WriteSummary | None:
    """Convert a data set, with progress bar and summary on `console`; None when there was nothing to do (`dry_run`, or
    `resume` of a run that had finished). The options are those of the command line. Raises SourceError, LabelMapError
    or BetonError naming the file at fault.
    """
    console = console or Console(stderr=True)
    out = out if shard is None else shard.path(out)
    if overwrite:
        refuse_to_replace(out)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(
            open_images(
                images, labels=labels, class_names=class_names, image_column=image_column, label_column=label_column
            )
        )
        exif = settled_exif(source, exif)
        maps = (
            None
            if label_maps is None
            else stack.enter_context(contextlib.closing(open_maps(label_maps, extent, source, exif)))
        )
        places = source.order(seed if order == "shuffled" else None)
        conversion = Conversion(source, maps, places if shard is None else shard.cut(places))
        if len(conversion) == 0:
            raise BetonError(
                f"{out}: {len(places)} images are too few for {shard.count} shards; give a smaller n in --shard i/n"
            )
        record = {
            "source": source.kind,
            "order": order,
            "seed": seed if order == "shuffled" else None,
            "shard": None if shard is None else f"{shard.index}/{shard.count}",
            "quality": quality,
            "max_resolution": max_resolution,
            "decode_check": decode_check,
            "row_index": row_index,
            "exif": exif,
            "page_size": page_size,
            "inputs": conversion.inputs(),
        }
        if on_error == "stop" and len(without := conversion.without_map):
            raise BetonError(
                f"{source.origin(without[0])}: {conversion.why_without(without[0])}; {len(without) - 1} other images of"
                f" {len(conversion)} have none either. Annotate them, or leave them out with --on-error quarantine"
            )
        if resume and out.exists() and not partial_paths(out)[0].exists():
            allowed = 0 if on_error == "stop" else max_rejects
            found = difference(out, conversion, record=record, annotator=annotator_record(maps), max_rejects=allowed)
            if found is None:
                console.print(
                    f"{out}: is already there, whole and of these images; nothing to do", highlight=False, markup=False
                )
                return None
            if not overwrite:
                raise BetonError(
                    f"{out}: is finished, but not what this command makes: {found}. Give --overwrite to make it anew"
                )
        # No spinner: its thread would be running when the workers are forked.
        console.print("trying some samples (the first run on a machine compiles for half a minute)", highlight=False)
        expected = estimate(
            conversion,
            max_resolution=max_resolution,
            quality=quality,
            decode_check=decode_check,
            row_index=row_index,
            exif=exif,
            tries=256 if dry_run else 32,
        )
        if dry_run:
            print_plan(console, out, conversion, expected)
            return None
        if space_check:
            partial = partial_paths(out)[0]
            check_space(out, expected.size, partial.stat().st_blocks * 512 if partial.exists() else 0)
        with ProgressDisplay("packing", len(conversion), console) as display:

            def progress(taken: int, rejected: int, size: int) -> None:
                display.update(taken, f"{rejected:,} rejected" if rejected else "", size)

            summary = write_beton(
                out,
                conversion,
                class_names=source.class_names,
                spec=None if maps is None else maps.spec,
                annotator=annotator_record(maps),
                conversion=record,
                workers=workers,
                processes=True,
                max_resolution=max_resolution,
                quality=quality,
                decode_check=decode_check,
                row_index=row_index,
                exif=exif,
                page_size=page_size,
                on_error=on_error,
                max_rejects=max_rejects,
                overwrite=overwrite,
                resume=resume,
                progress=progress,
            )
        print_summary(console, out, source, summary, has_maps=maps is not None, row_index=row_index, exif=exif)
        return summary


def refuse_to_replace(out: Path) -> None:
    """--overwrite is for betons: with an argument forgotten, OUT is an input."""
    if out.is_file() and out.stat().st_size > 0:
        with open(out, "rb") as file:
            head = file.read(HEADER.itemsize)
        if len(head) < HEADER.itemsize or np.frombuffer(head, HEADER)[0]["version"] != VERSION:
            raise BetonError(
                f"{out}: is there and is no beton, so --overwrite does not replace it; remove it yourself or choose"
                " another name"
            )


def print_table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title=Text(title), show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))  # class names and paths are no markup
    console.print(table)


def print_plan(console: Console, out: Path, conversion: Conversion, expected: Estimate) -> None:
    """What a run would do."""
    source, maps = conversion.source, conversion.maps
    rows = [
        ("source", f"{source.kind} {source.root}"),
        ("samples", f"{len(conversion):,} of {len(source.ids):,} in {len(source.class_names):,} classes"),
        ("files ignored", f"{source.ignored:,}"),
        (
            "label maps",
            (
                "none"
                if maps is None
                else f"{len(conversion) - len(conversion.without_map):,} found, {len(conversion.without_map):,} missing"
            ),
        ),
        *(
            (f"of {expected.tried} tried, {action}", f"{count:,}")
            for action, count in expected.actions.items()
            if count
        ),
        (f"of {expected.tried} tried, bad", f"{len(expected.problems):,}"),
        ("file", f"about {expected.size / 1e9:,.3g} GB; {free_space(out) / 1e9:,.3g} GB are free"),
        ("time", f"about {expected.seconds / 60:,.1f} minutes on one core, when the disk keeps up"),
    ]
    print_table(console, f"{out}: would be written", rows)
    for problem in expected.problems[:5]:
        console.print(problem, soft_wrap=True, highlight=False, markup=False)


def print_summary(
    console: Console, out: Path, source: Source, summary: WriteSummary, has_maps: bool, row_index: bool, exif: str
) -> None:
    seconds, done = summary.seconds, summary.samples + summary.rejected - summary.resumed
    rows = [
        ("samples", f"{summary.samples:,} in {len(source.class_names):,} classes"),
        ("JPEGs copied", f"{summary.copied:,}"),
        ("transcoded without loss", f"{summary.transcoded:,}"),
        ("re-encoded to RGB JPEG", f"{summary.reencoded:,}"),
        ("shrunk", f"{summary.resized:,}"),
        ("stripped of metadata", f"{summary.stripped:,}"),
        ("EXIF orientation " + ("applied" if exif == "apply" else "ignored"), f"{summary.rotated:,}"),
        *(
            [
                (
                    "with a row index",
                    f"{summary.row_indexed:,}, {summary.samples - summary.row_indexed:,} left as they are",
                )
            ]
            if row_index
            else []
        ),
        ("rejected", f"{summary.rejected:,}" + (f", see {list_beside(out)}" if summary.rejected else "")),
        ("files ignored (no image by name)", f"{source.ignored:,}"),
        ("images", f"{summary.image_bytes / 1e6:,.1f} MB"),
        ("label maps", f"{summary.label_map_bytes / 1e6:,.1f} MB" if has_maps else "none"),
        ("file", f"{summary.file_bytes / 1e6:,.1f} MB"),
        (
            "speed",
            (
                f"{done / seconds:,.0f} images/s,"
                f" {summary.file_bytes * done / max(done + summary.resumed, 1) / seconds / 1e6:,.0f} MB/s,"
                f" {seconds:,.1f} s"
            ),
        ),
        *([("taken from an earlier run", f"{summary.resumed:,} samples")] if summary.resumed else []),
    ]
    print_table(console, str(out), rows)
    if summary.rotated and exif == "ignore":
        console.print(ignored_orientations(summary.rotated), highlight=False, soft_wrap=True)


def info(path: Path, console: Console | None = None) -> None:
    """Print what a beton holds. Raises BetonError when its tables are damaged."""
    with BetonReader(path) as reader:
        pixels = reader.heights.astype(np.int64) * reader.widths
        names = reader.class_names
        rows = [
            ("fields", ", ".join(reader.fields)),
            ("samples", f"{len(reader):,}"),
            (
                "classes",
                (
                    f"{len(names):,}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
                    if names
                    else "names not recorded"
                ),
            ),
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
                (
                    "label maps",
                    (
                        f"top {spec.k} of {spec.num_classes:,} classes in {spec.height}×{spec.width} cells, extent"
                        f" {spec.extent}"
                    ),
                )
            )
        rows += [(f"annotator {key}", str(value)) for key, value in (reader.annotator or {}).items()]
        record = {
            key: value for key, value in (reader.conversion or {}).items() if key != "inputs"
        }  # digests, for --resume
        rows += [(f"conversion {key}", str(value)) for key, value in record.items() if value is not None]
        rows += [("written by", f"tl_fast {reader.tl_fast_version}")] if reader.has_crc else []
        rows += [("first, last id", f"{reader.source_ids[0]}, {reader.source_ids[-1]}")]
        print_table(console or Console(), str(path), rows)


def check(path: Path, decode: bool, workers: int) -> bool:
    """`verify`, with its progress and its findings printed. True when the file is sound."""
    with BetonReader(path) as reader:
        count = len(reader)
    with ProgressDisplay("verifying", count) as display:
        problems = verify(path, decode, workers, display.update)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{path}: {f'{len(problems)} damaged samples' if problems else 'sound'}")
    return not problems


def build_parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"to_beton.py{'' if command == 'convert' else ' ' + command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was met")
    if command != "convert":
        parser.add_argument("files", type=Path, metavar="FILE", nargs="+")
        if command == "verify":
            parser.add_argument("--decode", action="store_true", help="decode every image too")
            parser.add_argument("--workers", type=int, default=usable_cores(), metavar="N")
        return parser
    parser.add_argument("images", type=Path, metavar="IMAGES", nargs="+", help="folder, tars, parquet files or betons")
    parser.add_argument("out", type=Path, metavar="OUT.beton")
    group = parser.add_argument_group("what goes in")
    group.add_argument(
        "--label-maps",
        type=Path,
        metavar="MAPS",
        help="store of tl_fast.annotate, or the published maps; default: none",
    )
    group.add_argument("--extent", choices=EXTENTS, help="what the published maps span; must be said for them")
    add_source_options(group)
    group.add_argument(
        "--order", choices=("source", "shuffled"), default="source", help="of the samples in the file (default source)"
    )
    group.add_argument("--seed", type=int, default=0, help="of --order shuffled (default 0)")
    group.add_argument(
        "--shard", metavar="i/n", help="write part i of n (from 0) to OUT-i-of-n.beton; auto: as torchrun or SLURM says"
    )
    group = parser.add_argument_group("images")
    group.add_argument(
        "--quality",
        type=int,
        default=90,
        metavar="Q",
        help="of images that must be encoded anew, 1 to 100 (default 90)",
    )
    group.add_argument(
        "--max-resolution", type=int, metavar="PX", help="shrink images whose longest side is above this"
    )
    group.add_argument(
        "--no-decode-check", action="store_true", help="look at the structure of JPEGs only, do not decode them"
    )
    group.add_argument(
        "--exif",
        choices=EXIF,
        help=(
            "ignore: leave images as they lie in the file, as ImageNet's training code does "
            "(default); apply: turn them as their EXIF orientation says, JPEGs without loss where possible"
        ),
    )
    group.add_argument(
        "--row-index",
        action="store_true",
        help="restart markers, so that crops are decoded without what is around them",
    )
    group = parser.add_argument_group("bad samples")
    add_reject_options(group)
    group = parser.add_argument_group("the run")
    group.add_argument("--workers", type=int, metavar="N", help="threads (default: the CPU cores this process may use)")
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on from what an unfinished run left; a finished file is compared with the inputs",
    )
    group.add_argument("--overwrite", action="store_true", help="replace OUT.beton if it exists")
    group.add_argument("--dry-run", action="store_true", help="say what would be done; write nothing")
    group.add_argument("--no-space-check", action="store_true", help="begin even if the disk seems too small")
    group.add_argument(
        "--page-size",
        type=int,
        default=PAGE_SIZE,
        metavar="BYTES",
        help="a power of two; no sample may be larger (default 8 MiB, as ffcv's)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    command = argv.pop(0) if argv[:1] in (["info"], ["verify"]) else "convert"
    parser = build_parser(command)
    arguments = vars(parser.parse_args(argv))
    show_traceback = arguments.pop("traceback")
    if command == "verify" and arguments["workers"] < 1:
        parser.error(f"--workers must be at least 1, got {arguments['workers']}")
    try:
        if command == "convert":
            reuse_memory()
            shard = arguments.pop("shard")
            arguments["decode_check"] = not arguments.pop("no_decode_check")
            arguments["space_check"] = not arguments.pop("no_space_check")
            convert(**arguments, shard=None if shard is None else Shard.parse(shard))
        elif command == "info":
            for file in arguments["files"]:
                info(file)
        else:
            return (
                0 if all([check(file, arguments["decode"], arguments["workers"]) for file in arguments["files"]]) else 1
            )
    except EXPECTED as error:
        if show_traceback:
            raise
        print("\n".join((f"to_beton.py: {error}", *getattr(error, "__notes__", ()))), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("to_beton.py: interrupted; the same command with --resume goes on from what is done", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
