"""What the conversion command prints: what a run would do, what it did, what a beton holds, whether it is sound."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.convert.estimate import Estimate, free_space
from tl_fast.convert.options import EncodeOptions
from tl_fast.convert.selection import Conversion
from tl_fast.convert.write import WriteSummary
from tl_fast.sources.image import ignored_orientations
from tl_fast.sources.rejects import list_beside
from tl_fast.system.progress import ProgressDisplay

MIB = 1 << 20


def print_table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(title=Text(title), show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))  # class names and paths are no markup
    console.print(table)


def in_words(planes: int, jpegs: int) -> str:
    """How many samples are stored which way."""
    return (
        ", ".join(f"{count:,} {kind}" for count, kind in ((planes, "planes"), (jpegs, "JPEGs")) if count) or "nothing"
    )


def print_plan(
    console: Console,
    out: Path,
    conversion: Conversion,
    encoding: EncodeOptions,
    expected: Estimate,
    others: dict[str, int],
) -> None:
    """What a run would do. others: other ways to store the images, and the bytes that the file would take."""
    source = conversion.source
    planes = conversion.num_planes
    if planes is None:
        planes = len(conversion) if encoding.store == "yuv420" else 0

    def counted(has: bool, missing: int) -> str:
        return f"{len(conversion) - missing:,} found, {missing:,} missing" if has else "none"

    tried = f"of {expected.tried} tried"
    actions = [(f"{tried}, {action}", f"{count:,}") for action, count in expected.actions.items() if count]
    rows = [
        ("source", f"{source.kind} {source.root}"),
        ("samples", f"{len(conversion):,} of {len(source.ids):,} in {len(source.class_names):,} classes"),
        ("files ignored", f"{source.ignored:,}"),
        ("label maps", counted(conversion.maps is not None, len(conversion.without_map))),
        ("masks", counted(conversion.masks is not None, len(conversion.without_mask))),
        ("stored as", in_words(planes, len(conversion) - planes)),
        *actions,
        (f"{tried}, bad", f"{len(expected.problems):,}"),
        ("file", f"about {expected.size / 1e9:,.3g} GB; {free_space(out) / 1e9:,.3g} GB are free"),
        ("time", f"about {expected.seconds / 60:,.1f} minutes on one core, when the disk keeps up"),
        *((f"instead as {name}", f"about {size / 1e9:,.3g} GB") for name, size in others.items()),
    ]
    print_table(console, f"{out}: would be written", rows)
    for problem in expected.problems[:5]:
        console.print(problem, soft_wrap=True, highlight=False, markup=False)


def print_summary(
    console: Console, out: Path, conversion: Conversion, encoding: EncodeOptions, summary: WriteSummary
) -> None:
    """What a run has done."""
    source, seconds = conversion.source, summary.seconds
    taken = summary.samples + summary.rejected
    done = taken - summary.resumed
    megabytes = summary.file_bytes / 1e6

    def indexed(count: int) -> str:
        return f"{count:,}, {summary.samples - summary.planes - count:,} JPEGs left as they are"

    speed = f"{done / seconds:,.0f} images/s, {megabytes * done / max(taken, 1) / seconds:,.0f} MB/s, {seconds:,.1f} s"
    rows = [
        ("samples", f"{summary.samples:,} in {len(source.class_names):,} classes"),
        ("stored as", in_words(summary.planes, summary.samples - summary.planes)),
        ("copied", f"{summary.copied:,}"),
        ("transcoded without loss", f"{summary.transcoded:,}"),
        ("re-encoded to RGB JPEG", f"{summary.reencoded:,}"),
        *([("planes decoded from JPEGs", f"{summary.decoded:,}")] if summary.planes else []),
        *([("planes made from RGB", f"{summary.converted:,}")] if summary.planes else []),
        ("shrunk", f"{summary.resized:,}"),
        ("stripped of metadata", f"{summary.stripped:,}"),
        ("EXIF orientation " + ("applied" if encoding.exif == "apply" else "ignored"), f"{summary.rotated:,}"),
        *([("with a row index", indexed(summary.row_indexed))] if encoding.row_index else []),
        *([("with a bit index", indexed(summary.bit_indexed))] if encoding.bit_index else []),
        ("rejected", f"{summary.rejected:,}" + (f", see {list_beside(out)}" if summary.rejected else "")),
        ("files ignored (no image by name)", f"{source.ignored:,}"),
        ("images", f"{summary.image_bytes / 1e6:,.1f} MB"),
        ("label maps", f"{summary.label_map_bytes / 1e6:,.1f} MB" if conversion.maps is not None else "none"),
        ("masks", f"{summary.mask_bytes / 1e6:,.1f} MB" if conversion.masks is not None else "none"),
        ("file", f"{megabytes:,.1f} MB"),
        ("speed", speed),
        *([("taken from an earlier run", f"{summary.resumed:,} samples")] if summary.resumed else []),
    ]
    print_table(console, str(out), rows)
    if summary.rotated and encoding.exif == "ignore":
        console.print(ignored_orientations(summary.rotated), highlight=False, soft_wrap=True)


def print_info(path: Path, console: Console | None = None) -> None:
    """Print what a beton holds. Raises BetonError when its tables are damaged."""
    with BetonReader(path) as reader:
        pixels = reader.heights.astype(np.int64) * reader.widths
        names, spec, planes = reader.class_names, reader.spec, int(reader.stored_as_planes.sum())
        more = " ..." if len(names) > 8 else ""
        rows = [
            ("fields", ", ".join(reader.fields)),
            ("samples", f"{len(reader):,}"),
            ("classes", f"{len(names):,}: {', '.join(names[:8])}{more}" if names else "names not recorded"),
            ("labels", f"{reader.labels.min()}..{reader.labels.max()}, {len(np.unique(reader.labels)):,} different"),
            ("widths", f"{reader.widths.min()}..{reader.widths.max()} px"),
            ("heights", f"{reader.heights.min()}..{reader.heights.max()} px"),
            ("mean size", f"{pixels.mean() / 1e6:.2f} megapixels"),
            ("images", f"{in_words(planes, len(reader) - planes)}; {reader.image_sizes.mean():,.0f} bytes each"),
            ("file, page", f"{path.stat().st_size / 1e6:,.1f} MB, {reader.page_size / MIB:g} MiB"),
            ("CRC-32 per sample", "yes" if reader.has_crc else "no (stock ffcv writer)"),
        ]
        if spec is not None:
            cells = f"{spec.height}×{spec.width} cells, extent {spec.extent}"
            rows.append(("label maps", f"top {spec.k} of {spec.num_classes:,} classes in {cells}"))
        if (masks := reader.mask_spec) is not None:
            names = (
                f": {', '.join(masks.class_names[:8])}{' ...' * (masks.num_classes > 8)}" if masks.class_names else ""
            )
            rows.append(("masks", f"{masks}{names}; {reader.mask_sizes.mean():,.0f} bytes each"))
        if planes == len(reader):
            total = int(reader.image_sizes.sum()) + (0 if spec is None else int(reader.label_map_sizes.sum()))
            parts = ", ".join(f"{total / gpus / 1e9:,.2g}" for gpus in (1, 2, 4, 8))
            rows.append(("resident on 1, 2, 4, 8 GPUs", f"{parts} GB each"))
        rows += [(f"annotator {key}", str(value)) for key, value in (reader.annotator or {}).items()]
        for key, value in (reader.conversion or {}).items():
            if value is not None and key != "inputs":  # those are digests, for --resume
                rows.append((f"conversion {key}", str(value)))
        rows += [("written by", f"tl_fast {reader.tl_fast_version}")] if reader.has_crc else []
        rows += [("first, last id", f"{reader.source_ids[0]}, {reader.source_ids[-1]}")]
        print_table(console or Console(), str(path), rows)


def print_verdict(path: Path, decode: bool, workers: int) -> bool:
    """Verify a beton, showing the progress, and print what is damaged. True when the file is sound."""
    with BetonReader(path) as reader:
        count = len(reader)
    with ProgressDisplay("verifying", count) as display:
        problems = verify(path, decode, workers, display.update)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{path}: {len(problems)} damaged samples" if problems else f"{path}: sound")
    return not problems
