"""Makes the label maps of a data set by a machine annotator: one process or several fill a store, part by part.

The annotator sees each full image squashed to a square, so that its H x W cells span the image. A run keeps the parts
that an earlier run made in the same way, of the same images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm

import tl_fast
from tl_fast.annotation import linear_probe, store
from tl_fast.annotation.annotator import DTYPES, AnnotateError, Annotator
from tl_fast.annotation.classes import class_indices, name_classes
from tl_fast.annotation.image_reader import ImageReader
from tl_fast.annotation.weights import build_annotator
from tl_fast.beton.source import open_images, settled_exif
from tl_fast.labelmaps import store as map_store
from tl_fast.labelmaps.format import LabelMapError, MapSpec, pack, top_k_relative
from tl_fast.sources.image import EXIF, ignored_orientations
from tl_fast.sources.rejects import list_beside, write_rejects
from tl_fast.sources.source import MAX_CLASSES, Source
from tl_fast.system.atomic import write_atomic
from tl_fast.system.mistakes import share
from tl_fast.system.progress import ProgressDisplay
from tl_fast.system.ranks import Ranks, cores_of_this_rank, join
from tl_fast.system.sides import Sides, both_sides

NO_CLASS = MAX_CLASSES  # the pooled class of an image that was left out; the indices of classes are below it


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
    """What to annotate and how.

    images: what `beton.source.open_images` takes, a flat folder of images included; labels, class_names, image_column,
    label_column: its options. out: the store's folder. model, checkpoint, num_classes, img_size (pixels): see
    `build_annotator`. classes: None, "auto" (the data set's class names are wnids, or names that the checkpoint's run
    knows) or a JSON file {class name: class index or wnid} - keep those logits, class i is the data set's class i.
    fit_head: fit a linear probe on `images` for their classes. eval_images: held-out images to test the probe on, of
    the same classes. topk: k, at most C is stored. exif: None (ignore), "ignore" or "apply" (images are turned
    upright). on_error: "stop" at the first image that cannot be read, or "quarantine": leave it out and list it in
    `OUT.rejects.jsonl`. max_rejects: how many may be left out; None: any number. batch_size: images per step and rank;
    None: 64 on GPUs, 2 on the CPU, where larger activations are fresh memory for every layer (efficientnet-lite2 at 288
    px: 53 ms CPU time per image in batches of 1, 75 in 4, 135 in 64). workers: decoding threads per rank; None: the
    rank's share of the cores. device: auto, cpu or cuda. dtype: auto (bfloat16 on GPUs, else float32), float32, float16
    or bfloat16. timeout_minutes: how long a rank waits for the others' shares of the work; one that dies ends the job
    at once. overwrite: start afresh where a store exists.
    """

    images: Path | Sequence[Path]
    out: Path
    model: str | None = None
    labels: Path | None = None
    class_names: Path | None = None
    image_column: str | None = None
    label_column: str | None = None
    checkpoint: Path | None = None
    num_classes: int | None = None
    img_size: Sides | None = None
    classes: str | None = None
    fit_head: bool = False
    eval_images: Path | None = None
    topk: int = 5
    exif: str | None = None
    on_error: str = "stop"
    max_rejects: int | None = None
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    timeout_minutes: float = 180
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("out", "labels", "class_names", "checkpoint", "eval_images"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name, least in (
            ("num_classes", 0),
            ("topk", 1),
            ("batch_size", 1),
            ("workers", 1),
            ("max_rejects", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise AnnotateError(f"{name} must be at least {least}, got {value}")
        if self.img_size is not None and min(both_sides(self.img_size)) < 1:
            raise AnnotateError(f"img_size must be at least 1, got {self.img_size}")
        if not self.timeout_minutes > 0:
            raise AnnotateError(f"timeout_minutes must be above 0, got {self.timeout_minutes}")
        if self.classes is not None and self.fit_head:
            raise AnnotateError(
                "classes keeps the annotator's own logits, fit_head replaces them by a probe: give one of the two"
            )
        if self.eval_images is not None and not self.fit_head:
            raise AnnotateError(
                f"eval_images {self.eval_images} tests the probe of fit_head, which is not asked for: give both or none"
            )
        if self.max_rejects is not None and self.on_error == "stop":
            raise AnnotateError(
                f"max_rejects {self.max_rejects} counts what on_error quarantine leaves out: give both or none"
            )
        for name, allowed in (
            ("device", ("auto", "cpu", "cuda")),
            ("dtype", ("auto", *DTYPES)),
            ("on_error", ("stop", "quarantine")),
            ("exif", (None, *EXIF)),
        ):
            if getattr(self, name) not in allowed:
                raise AnnotateError(
                    f"{name} must be one of {', '.join(filter(None, allowed))}, got {getattr(self, name)!r}"
                )


def annotate(config: AnnotateConfig) -> dict[str, Any]:
    """Annotate as `config` says, resuming what is there; every rank of a torchrun job calls it. Returns the manifest.

    Beside the store's own fields the manifest has model, weights, weights_sha256, preprocessing, dtype, kept_classes,
    probe, exif, ids_sha256, class_counts, rejected (number of images left out), pooled_top1 (percent, where the classes
    are those of the data set), probe_report (percent), versions, created. Raises AnnotateError or SourceError naming
    what is wrong and what to do.
    """
    # Gloo on GPUs, too: ranks exchange next to nothing, but may wait long for one another, beyond NCCL's watchdog.
    with join(config.device, config.timeout_minutes, backend="gloo") as ranks, contextlib.ExitStack() as stack:
        images = stack.enter_context(ranks.agree(_open, config, config.images, config.labels))
        held_out = None
        if config.eval_images is not None:
            held_out = stack.enter_context(ranks.agree(_open, config, config.eval_images))
        return _annotate(config, ranks, images, held_out)


def _open(config: AnnotateConfig, paths: Path | Sequence[Path], labels: Path | None = None) -> Source:
    return open_images(
        paths,
        labels=labels,
        class_names=config.class_names,
        image_column=config.image_column,
        label_column=config.label_column,
        unlabelled=True,
    )


@dataclasses.dataclass
class _Work:
    """What the stages of one run on one rank share."""

    config: AnnotateConfig
    ranks: Ranks
    images: Source
    held_out: Source | None
    annotator: Annotator
    reader: ImageReader
    console: Console

    @property
    def parts(self) -> range:
        return range(-(-len(self.images) // map_store.PART_SIZE))

    def barrier(self) -> None:
        if self.ranks.world_size > 1:
            dist.barrier()


def _annotate(config: AnnotateConfig, ranks: Ranks, images: Source, held_out: Source | None) -> dict[str, Any]:
    console = Console(stderr=True, quiet=not ranks.main)
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)

    # --- the annotator
    exif = ranks.agree(settled_exif, images, config.exif)
    ids_sha256 = hashlib.sha256(json.dumps(images.ids).encode()).hexdigest()
    if len(set(ranks.gather(ids_sha256))) > 1:
        raise share(AnnotateError(f"{images.root}: the ranks list different images; give every node the same files"))
    if held_out is not None and held_out.class_names != images.class_names:
        raise share(
            AnnotateError(
                f"{held_out.root}: its classes {held_out.class_names} differ from those of {images.root}: "
                f"{images.class_names}"
            )
        )
    annotator = ranks.agree(_annotator_for, images, config, ranks.device)
    class_names, labelled = name_classes(images, annotator, config.fit_head or config.classes is not None)
    num_classes = len(class_names) if config.fit_head else annotator.num_classes
    spec = MapSpec(min(config.topk, num_classes), *annotator.grid, num_classes)
    reader = ImageReader(
        images,
        annotator.preprocessing,
        exif,
        config.workers or cores_of_this_rank(),
        config.batch_size or (64 if ranks.device.type == "cuda" else 2),
        stop=config.on_error == "stop",
    )
    work = _Work(config, ranks, images, held_out, annotator, reader, console)

    # --- the store
    labels = images.labels[images.labels >= 0]
    record = dict(
        model=annotator.name,
        weights=annotator.source,
        weights_sha256=annotator.weights_sha256(),
        preprocessing=dataclasses.asdict(annotator.preprocessing),
        dtype=annotator.dtype,
        kept_classes=annotator.kept,
        probe=config.fit_head,
        exif=exif,
        ids_sha256=ids_sha256,
        class_counts=np.bincount(labels, minlength=len(images.class_names)).tolist() if images.class_names else None,
        versions={"tl_fast": tl_fast.__version__, "timm": timm.__version__, "torch": torch.__version__},
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    record = json.loads(json.dumps(record))  # as it will be read back: tuples are lists
    record = ranks.on_main(
        store.prepare, config.out, images, spec, class_names, record, config.overwrite, config.on_error
    )

    # --- the probe
    report = _fit_head(work) if config.fit_head else None
    if report:
        kinds = (
            ("train_top1", "on the training images"),
            ("cv_top1", "5-fold cross-validated"),
            ("eval_top1", "on the held-out images"),
        )
        accuracies = ", ".join(f"{report[key]:.1f} % {text}" for key, text in kinds if key in report)
        say(f"probe for {num_classes} classes: top-1 {accuracies} (penalty {report['penalty']:g})")
        record["probe_report"] = report

    # --- the label maps
    reader.rotated = 0
    _write_maps(work, spec)
    if rotated := int(ranks.sum(torch.tensor([reader.rotated]))):
        if exif == "ignore":
            say(ignored_orientations(rotated))
        else:
            say(f"{rotated:,} images were turned as their EXIF orientation says")
    rejects = ranks.on_main(store.list_rejects, config.out, len(images), config.max_rejects)
    record["rejected"] = len(rejects)
    if rejects:
        say(f"{len(rejects):,} of {len(images):,} images were left out, see {list_beside(config.out)}")
    if labelled:
        pooled = np.concatenate([np.load(store.pooled_path(config.out, part)) for part in work.parts])
        counted = (pooled != NO_CLASS) & (images.labels >= 0)
        record["pooled_top1"] = 100 * float((pooled == images.labels)[counted].mean())
        say(
            f"pooled top-1 of {annotator.name}: {record['pooled_top1']:.2f} % of {counted.sum():,} images, "
            f"{num_classes} classes"
        )
    elif images.class_names:
        say(
            f"the label maps know {num_classes} classes, the data set {len(images.class_names)}: to train on them, "
            "give --classes or --fit-head"
        )
    if ranks.main:
        map_store.write_manifest(config.out, spec, len(images), class_names, complete=True, **record)
    work.barrier()
    return json.loads((config.out / "manifest.json").read_text("utf-8"))


def _annotator_for(images: Source, config: AnnotateConfig, device: torch.device) -> Annotator:
    """The annotator, keeping the images' classes where they are asked for. Raises AnnotateError."""
    if (config.fit_head or config.classes) and not images.class_names:
        raise AnnotateError(
            f"{images.root}: --classes and --fit-head need class folders, this is a flat folder; sort its images into "
            "one folder per class"
        )
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    annotator = build_annotator(
        config.model,
        img_size=config.img_size,
        checkpoint=config.checkpoint,
        num_classes=config.num_classes,
        device=device,
        dtype=dtype,
    )
    if config.classes is not None:
        annotator.keep_classes(class_indices(config.classes, images.class_names, annotator))
    if annotator.num_classes == 0 and not config.fit_head:
        raise AnnotateError(
            f"model {annotator.name} has no classifier; give --fit-head to fit one, or choose another model"
        )
    return annotator


def _write_maps(work: _Work, spec: MapSpec) -> None:
    """Annotate this rank's share of the missing parts. Raises AnnotateError, also when too many images are rejected."""
    out, config, images = work.config.out, work.config, work.images
    rejected = 0

    def compute(batch: Tensor) -> list[np.ndarray]:
        dense, pooled = work.annotator(batch)
        classes, scores = top_k_relative(dense, spec.k)
        packed = [pack(c, s, spec) for c, s in zip(classes.cpu().numpy(), scores.cpu().numpy(), strict=True)]
        return [np.array(packed, spec.dtype), pooled.argmax(1).cpu().numpy().astype("<u2")]

    def blank(count: int) -> list[np.ndarray]:
        return [map_store.blank(spec, count), np.full(count, NO_CLASS, "<u2")]

    def save(part: int, columns: list[np.ndarray], bad: dict[int, str]) -> None:
        nonlocal rejected
        rejects = [{"id": images.ids[i], "origin": images.origin(i), "reason": reason} for i, reason in bad.items()]
        write_rejects(map_store.rejects_path(out, part), rejects)
        records, pooled = columns
        write_atomic(store.pooled_path(out, part), lambda file: np.save(file, pooled))
        map_store.write_part(out, part, records)  # last: a part that exists has its other files too
        rejected += len(rejects)
        store.refuse_too_many(out, rejected, config.max_rejects, f"{out}/rejects-*.jsonl")

    _write_parts(
        work,
        "annotating",
        lambda part: [map_store.part_path(out, part), store.pooled_path(out, part)],
        compute,
        blank,
        save,
    )


def _write_parts(
    work: _Work,
    label: str,
    files: Callable[[int], list[Path]],
    compute: Callable[[Tensor], list[np.ndarray]],
    blank: Callable[[int], list[np.ndarray]],
    save: Callable[[int, list[np.ndarray], dict[int, str]], None],
) -> None:
    """Compute and save this rank's share of the parts that lack one of `files(part)`.

    compute: uint8 images `[B, 3, S, S]` -> columns of B rows. blank: the columns' rows for images that cannot be read.
    save: called with a part, its columns, and {image that could not be read: why}.
    """
    images, ranks, size = work.images, work.ranks, map_store.PART_SIZE
    missing = [part for part in work.parts if not all(path.exists() for path in files(part))]
    work.barrier()  # before any rank writes: all see the same list
    mine = missing[ranks.rank :: ranks.world_size]
    groups = [range(part * size, min(len(images), (part + 1) * size)) for part in mine]
    label += f" (the first of {ranks.world_size} shares)" if ranks.world_size > 1 else ""
    stamps = images.stamps  # made when asked for
    done, rejected, total = 0, 0, sum(map(len, groups))
    with ProgressDisplay(label, total, work.console, enabled=ranks.main) as display, torch.inference_mode():
        display.update(0)
        rows: list[list[np.ndarray]] = []
        bad: dict[int, str] = {}  # of the part at hand
        for position, piece, batch, problems in work.reader.batches(groups):
            columns = blank(len(piece))
            if batch is not None:
                good = np.array([i not in problems for i in piece])
                try:
                    computed = compute(batch)
                except LabelMapError as error:
                    names = ", ".join(images.ids[i] for i in piece if i not in problems)
                    raise AnnotateError(f"{names}: {error}; the annotator overflowed: try --dtype float32") from error
                for column, values in zip(columns, computed, strict=True):
                    column[good] = values
            rows.append(columns)
            bad |= problems
            if piece[-1] == groups[position][-1]:
                store.write_stamps(work.config.out, mine[position], stamps)
                save(mine[position], [np.concatenate(column) for column in zip(*rows, strict=True)], bad)
                rows, bad = [], {}
            done, rejected = done + len(piece), rejected + len(problems)
            display.update(done, f"{rejected:,} rejected" if rejected else "")
    work.barrier()


def _fit_head(work: _Work) -> dict[str, float]:
    """Fit the probe, or read it back, and give it to the annotator; returns its accuracies.

    Features are kept in features-*.npy until the probe is fitted.
    """
    config, ranks, annotator = work.config, work.ranks, work.annotator
    head = store.head_path(config.out)
    fitted = head.exists()
    work.barrier()
    if not fitted:

        def compute(batch: Tensor) -> list[np.ndarray]:
            return [annotator.pre_logits(annotator.features(batch)).cpu().numpy()]

        def blank(count: int) -> list[np.ndarray]:
            return [np.full((count, annotator.feature_size), np.nan, np.float32)]

        def save(part: int, columns: list[np.ndarray], bad: dict[int, str]) -> None:
            write_atomic(store.features_path(config.out, part), lambda file: np.save(file, columns[0]))

        _write_parts(
            work, "features for the probe", lambda part: [store.features_path(config.out, part)], compute, blank, save
        )
        ranks.on_main(_fit_and_save, work)
    with safe_open(head, "pt") as file:
        annotator.set_probe(file.get_tensor("weight"), file.get_tensor("bias"))
        report = json.loads(file.metadata()["probe"])
    del report["class_names"]
    if work.held_out is not None:
        report["eval_top1"] = _held_out_top1(work)
    return report


def _fit_and_save(work: _Work) -> None:
    """Fit the probe on the stored features, save it and remove them."""
    config, images, device = work.config, work.images, work.ranks.device
    files = [store.features_path(config.out, part) for part in work.parts]
    features = np.concatenate([np.load(file) for file in files])
    usable = ~np.isnan(features[:, 0]) & (images.labels >= 0)
    try:
        probe = linear_probe.fit(
            torch.from_numpy(features[usable]).to(device),
            torch.from_numpy(images.labels[usable]).to(device),
            len(images.class_names),
        )
    except ValueError as error:
        raise AnnotateError(f"--fit-head on {images.root}: {error}") from error
    # One key, because safetensors writes several in random order.
    metadata = {"probe": json.dumps({**probe.report(), "class_names": images.class_names})}
    blob = safetensors.torch.save({"weight": probe.weight, "bias": probe.bias}, metadata)
    write_atomic(store.head_path(config.out), lambda file: file.write(blob))
    for file in files:
        file.unlink()


def _held_out_top1(work: _Work) -> float:
    """The probe's accuracy on the held-out images that can be read, in percent."""
    ranks, held_out = work.ranks, work.held_out
    reader = dataclasses.replace(work.reader, source=held_out)
    totals = torch.zeros(2, dtype=torch.int64)  # hits, images
    with torch.inference_mode():
        for _, piece, batch, bad in reader.batches([range(ranks.rank, len(held_out), ranks.world_size)]):
            if batch is not None:
                labels = torch.from_numpy(held_out.labels[[i for i in piece if i not in bad]])
                hits = work.annotator(batch)[1].argmax(1).cpu() == labels
                totals += torch.stack([hits.sum(), (labels >= 0).sum()])
    hits, count = ranks.sum(totals).tolist()
    if not count:
        raise share(AnnotateError(f"{held_out.root}: none of its images can be read"))
    return 100 * hits / count
