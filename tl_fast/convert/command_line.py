"""Images with label maps or masks → one .beton file. Also: what is in such a file, and is it sound?

    python converters/to_beton.py IMAGES OUT.beton [--label-maps MAPS [--extent full|center_square]] [options]
    python converters/to_beton.py IMAGES OUT.beton --masks DIR --mask-classes TABLE [options]
    python converters/to_beton.py info FILE.beton ...
    python converters/to_beton.py verify FILE.beton ... [--decode]

`tl-fast convert` is the same command.

IMAGES: a folder with one folder per class (torchvision's layout), the official ImageNet tars as downloaded, Hugging
Face parquet shards, WebDataset shards, or betons; several files, a folder of them, or a pattern in quotes. MAPS: a
store that `python -m tl_fast.annotate` made, or the published label maps (one .pt an image), in a folder or still in
their archive. DIR: a folder of PNGs laid out as the images are, with the class of every pixel. docs/converting.md has
the details.

The file appears when it is whole. Killed runs and runs that failed leave `.OUT.beton.partial`, from which --resume goes
on. Exit code 0: done, sound; 1: an error or a damaged file, said on stderr; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_fast.convert.options import PAGE_SIZE, EncodeOptions, RunOptions, take_options
from tl_fast.labelmaps.format import EXTENTS
from tl_fast.masks.classes import IGNORED, TABLES
from tl_fast.sources.image import EXIF
from tl_fast.sources.open import add_source_options
from tl_fast.sources.rejects import add_reject_options
from tl_fast.system.cores import usable_cores
from tl_fast.system.mistakes import EXPECTED

PROG = "to_beton.py"


def build_parser(command: str, prog: str = PROG) -> argparse.ArgumentParser:
    """The parser of `command`: convert, info or verify."""
    parser = argparse.ArgumentParser(
        prog=prog if command == "convert" else f"{prog} {command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was met")
    if command == "convert":
        _add_convert_options(parser)
        return parser
    parser.add_argument("files", type=Path, metavar="FILE", nargs="+")
    if command == "verify":
        parser.add_argument("--decode", action="store_true", help="decode every image too")
        parser.add_argument("--workers", type=int, default=usable_cores(), metavar="N")
    return parser


def _add_convert_options(parser: argparse.ArgumentParser) -> None:
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
    group.add_argument("--masks", type=Path, metavar="DIR", help="of segmentation: a PNG of classes an image")
    group.add_argument(
        "--mask-classes",
        metavar="TABLE",
        help=f"what their values mean: {', '.join(TABLES)}, a CSV file (id, train_id, name), or a number of classes",
    )
    group.add_argument(
        "--ignore-index", type=int, default=IGNORED, metavar="N", help=f"value of unlabelled pixels (default {IGNORED})"
    )
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
        "--store",
        choices=("jpeg", "yuv420", "auto"),
        default="jpeg",
        help=(
            "jpeg: small, decoded at every reading (default); yuv420: planes of 1.5 bytes a pixel, read without "
            "decoding; auto: as many planes as --budget-gb allows, JPEGs besides"
        ),
    )
    group.add_argument(
        "--budget-gb", type=float, metavar="GB", help="of --store auto: what the file (with --shard: all) may take"
    )
    group.add_argument("--short-side", type=int, metavar="PX", help="shrink images whose shorter side is above this")
    group.add_argument("--max-pixels", type=int, metavar="N", help="shrink images of more pixels than this")
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
    group.add_argument(
        "--bit-index",
        action="store_true",
        help="an index of bit positions beside the JPEGs' data, so that tl_fast decodes crops without what is around"
        " them; for training on the CPU's decoder, 1.2 times as fast from large files",
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


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> int:
    """The command line -> its exit code. prog: what messages call the command."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words.pop(0) if words[:1] in (["info"], ["verify"]) else "convert"
    parser = build_parser(command, prog)
    options = vars(parser.parse_args(words))
    show_traceback = options.pop("traceback")
    if command == "verify" and options["workers"] < 1:
        parser.error(f"--workers must be at least 1, got {options['workers']}")
    try:
        if command == "convert":
            _convert(options)
            return 0
        # Imported when the command line is in order: rich takes a while.
        from tl_fast.convert.report import print_info, print_verdict

        if command == "info":
            for file in options["files"]:
                print_info(file)
            return 0
        sound = [print_verdict(file, options["decode"], options["workers"]) for file in options["files"]]
        return 0 if all(sound) else 1
    except EXPECTED as error:
        if show_traceback:
            raise
        print("\n".join((f"{prog}: {error}", *getattr(error, "__notes__", ()))), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command with --resume goes on from what is done", file=sys.stderr)
        return 130


def _convert(options: dict[str, Any]) -> None:
    # Imported when the command line is in order: they take a while.
    from tl_fast.convert.run import Inputs, convert
    from tl_fast.convert.selection import Shard
    from tl_fast.system.memory import reuse_memory

    reuse_memory()
    options["shard"] = None if options["shard"] is None else Shard.parse(options["shard"])
    options |= {"decode_check": not options["no_decode_check"], "processes": True}
    inputs = take_options(Inputs, options)  # --exif among them: betons settle it themselves
    encoding, run = take_options(EncodeOptions, options), take_options(RunOptions, options)
    space_check, dry_run = not options["no_space_check"], options["dry_run"]
    convert(inputs, options["out"], encoding, run, space_check=space_check, dry_run=dry_run)
