"""The conversion of a data set from end to end: open, compare, estimate, write, report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from tl_fast.beton.layout import HEADER, VERSION, BetonError
from tl_fast.beton.source import open_images, settled_exif
from tl_fast.convert.estimate import check_space, choices, estimate, planes_within
from tl_fast.convert.options import EncodeOptions, RunOptions
from tl_fast.convert.partial_file import partial_paths
from tl_fast.convert.report import print_plan, print_summary
from tl_fast.convert.selection import Conversion, Shard, annotator_record, difference, open_maps
from tl_fast.convert.write import Description, WriteSummary, write
from tl_fast.masks.classes import IGNORED, read_classes
from tl_fast.masks.folder import MaskFolder
from tl_fast.sources.source import Source, read_class_names
from tl_fast.system.progress import ProgressDisplay


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Which samples go into a beton.

    images, labels, class_names, image_column, label_column: as `tl_fast.beton.source.open_images` takes them.
    label_maps: a store of label maps or the published ones; None: the beton gets none. extent: what the published ones
    span. masks: a folder of masks; None: the beton gets none. mask_classes, ignore_index: as
    `tl_fast.masks.classes.read_classes` takes them. exif: ignore or apply, for the images and their label maps alike;
    None: as the images were converted before, else ignore. order: of the samples in the file. seed: of the order
    `shuffled`. shard: the part to write; None: all.
    """

    images: Path | Sequence[Path]
    label_maps: Path | None = None
    extent: str | None = None
    masks: Path | None = None
    mask_classes: str | None = None
    ignore_index: int = IGNORED
    labels: Path | None = None
    class_names: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    exif: Literal["ignore", "apply"] | None = None
    order: Literal["source", "shuffled"] = "source"
    seed: int = 0
    shard: Shard | None = None

    @contextlib.contextmanager
    def open(self, out: Path) -> Iterator[tuple[Conversion, str]]:
        """The samples, and what is done about EXIF orientations.

        Raises SourceError, LabelMapError, MaskError, BetonError.
        """
        masks = self._open_masks(out)
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(
                open_images(
                    self.images,
                    labels=self.labels,
                    class_names=self.class_names,
                    image_column=self.image_column,
                    label_column=self.label_column,
                    unlabelled=masks is not None,
                )
            )
            if not source.class_names:
                self._label_flat(source)
            exif, maps = settled_exif(source, self.exif), None
            if self.label_maps is not None:
                maps = open_maps(self.label_maps, self.extent, source, exif)
                stack.enter_context(contextlib.closing(maps))
            order = source.order(self.seed if self.order == "shuffled" else None)
            conversion = Conversion(source, maps, order if self.shard is None else self.shard.cut(order), masks)
            if len(conversion) == 0:
                raise BetonError(
                    f"{out}: {len(order)} images are too few for {self.shard.count} shards; give a smaller n in"
                    " --shard i/n"
                )
            yield conversion, exif

    def _open_masks(self, out: Path) -> MaskFolder | None:
        if (self.masks is None) != (self.mask_classes is None):
            given, other = ("--mask-classes", "--masks") if self.masks is None else ("--masks", "--mask-classes")
            raise BetonError(f"{out}: {given} needs {other} too; docs/converting.md says which values it takes")
        if self.masks is None:
            return None
        return MaskFolder(self.masks, read_classes(self.mask_classes, self.ignore_index))

    def _label_flat(self, source: Source) -> None:
        """Images of a flat folder, which only masks make useful, are all of the first class."""
        source.class_names = ["unlabelled"] if self.class_names is None else read_class_names(self.class_names)
        source.labels = np.zeros(len(source.ids), np.int64)


def convert(
    inputs: Inputs,
    out: Path,
    encoding: EncodeOptions,
    options: RunOptions,
    *,
    space_check: bool = True,
    dry_run: bool = False,
    console: Console | None = None,
) -> WriteSummary | None:
    """Convert a data set, with progress bar and summary on `console` (by default standard error); None when there was
    nothing to do (`dry_run`, or `resume` of a run that had finished).

    encoding: but for `exif`, which `inputs` settles. space_check: refuse to begin when the disk seems too small. Raises
    SourceError, LabelMapError or BetonError naming the file at fault.
    """
    console = console or Console(stderr=True)
    out = out if inputs.shard is None else inputs.shard.path(out)
    if options.overwrite:
        _refuse_to_replace(out)
    with inputs.open(out) as (conversion, exif):
        encoding = dataclasses.replace(encoding, exif=exif)
        source, maps, masks = conversion.source, conversion.maps, conversion.masks
        record = _record(inputs, conversion, encoding, options)
        if options.on_error == "stop":
            _refuse_missing(conversion)
        if options.resume and out.exists() and not partial_paths(out)[0].exists():
            if _is_finished(out, conversion, record, options):
                words = f"{out}: is already there, whole and of these images; nothing to do"
                console.print(words, highlight=False, markup=False)
                return None
        # No spinner: its thread would be running when the workers are forked.
        console.print("trying some samples (the first run on a machine compiles for half a minute)", highlight=False)
        others = choices(conversion, encoding) if dry_run else {}
        if encoding.store == "auto":
            shards = 1 if inputs.shard is None else inputs.shard.count
            conversion.num_planes = planes_within(encoding.budget_gb * 1e9 / shards, conversion, encoding)
            record["planes"] = conversion.num_planes
        expected = estimate(conversion, encoding, tries=256 if dry_run else 32)
        if dry_run:
            print_plan(console, out, conversion, encoding, expected, others)
            return None
        if space_check:
            partial = partial_paths(out)[0]
            check_space(out, expected.size, partial.stat().st_blocks * 512 if partial.exists() else 0)
        spec = None if maps is None else maps.spec
        mask_spec = None if masks is None else masks.spec
        description = Description(source.class_names, spec, annotator_record(maps), record, mask_spec)
        with ProgressDisplay("packing", len(conversion), console) as display:

            def progress(taken: int, rejected: int, size: int) -> None:
                display.update(taken, f"{rejected:,} rejected" if rejected else "", size)

            summary = write(out, conversion, description, encoding, options, progress)
        print_summary(console, out, conversion, encoding, summary)
        return summary


def _refuse_to_replace(out: Path) -> None:
    """--overwrite is for betons: with an argument forgotten, OUT is an input."""
    if out.is_file() and out.stat().st_size > 0:
        with open(out, "rb") as file:
            head = file.read(HEADER.itemsize)
        if len(head) < HEADER.itemsize or np.frombuffer(head, HEADER)[0]["version"] != VERSION:
            raise BetonError(
                f"{out}: is there and is no beton, so --overwrite does not replace it; remove it yourself or choose"
                " another name"
            )


def _refuse_missing(conversion: Conversion) -> None:
    if len(without := conversion.without_map):
        raise BetonError(
            f"{conversion.source.origin(without[0])}: {conversion.why_without(without[0])}; {len(without) - 1} other"
            f" images of {len(conversion)} have none either. Annotate them, or leave them out with --on-error"
            " quarantine"
        )
    if len(without := conversion.without_mask):
        raise BetonError(
            f"{conversion.source.origin(without[0])}: has no mask in {conversion.masks.root}; {len(without) - 1} other"
            f" images of {len(conversion)} have none either. Add them, or leave the images out with --on-error"
            " quarantine"
        )


def _record(inputs: Inputs, conversion: Conversion, encoding: EncodeOptions, options: RunOptions) -> dict[str, Any]:
    """How the file is made, as it is kept in the file for --resume to compare."""
    shard = inputs.shard
    return {
        "source": conversion.source.kind,
        "order": inputs.order,
        "seed": inputs.seed if inputs.order == "shuffled" else None,
        "shard": None if shard is None else f"{shard.index}/{shard.count}",
        **encoding.record(),
        "page_size": options.page_size,
        "inputs": conversion.inputs(),
    }


def _is_finished(out: Path, conversion: Conversion, record: dict[str, Any], options: RunOptions) -> bool:
    """Whether `out` is what this conversion would make. Raises BetonError where it is not and may not be replaced."""
    changed = difference(
        out,
        conversion,
        record=record,
        annotator=annotator_record(conversion.maps),
        max_rejects=0 if options.on_error == "stop" else options.max_rejects,
    )
    if changed is not None and not options.overwrite:
        raise BetonError(
            f"{out}: is finished, but not what this command makes: {changed}. Give --overwrite to make it anew"
        )
    return changed is None
