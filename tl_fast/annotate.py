"""Label maps for a folder of images, by a machine annotator.

    python -m tl_fast.annotate IMAGES OUT --model efficientnet-lite0 [--img-size 288] [--topk 5]    the annotator's own classes
    python -m tl_fast.annotate IMAGES OUT --model NAME --classes auto                     of them, those of the class folders (wnids)
    python -m tl_fast.annotate IMAGES OUT --model NAME --fit-head [--eval-images VAL]     a linear probe for the class folders
    torchrun --nproc_per_node 8 -m tl_fast.annotate IMAGES OUT --model NAME               the parts shared by 8 processes

The annotator sees each full image squashed to a square, so that its H x W cells span the image. EXIF orientation is ignored, as the
converter and the loader ignore it. The same command run again does what is missing; a store made in another way is refused.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import DataLoader

import tl_fast.compat  # noqa: F401  before timm
import timm
from timm.data import ImageNetInfo, infer_imagenet_subset

import tl_fast
from tl_fast import labelmap, linear_probe
from tl_fast.atomic import write_atomic
from tl_fast.annotator import AnnotateError, Annotator, build_annotator, DTYPES, SquashedImages, stack
from tl_fast.image_folder import ImageList, list_images
from tl_fast.labelmap import LabelMapError, MapSpec, top_k_relative
from tl_fast.ranks import Ranks, cores_of_this_rank, join

# What two runs must share for their parts to belong in one store.
FINGERPRINT = ("spec", "class_names", "num_samples", "model", "weights_sha256", "preprocessing", "dtype", "kept_classes", "probe",
               "ids_sha256")


@dataclasses.dataclass(frozen=True)
class AnnotateConfig:
    """What to annotate and how.

    images: a folder of class folders, or of images (then without labels). out: the store's folder. model, checkpoint, num_classes,
    img_size (pixels): see `build_annotator`. classes: None, "auto" (the class folders are wnids) or a JSON file {folder: class index or
    wnid} - keep those logits, class i is the i-th class folder. fit_head: fit a linear probe on `images` for the class folders.
    eval_images: held-out images to test the probe on, with the same class folders. topk: k, at most C is stored. batch_size: images per
    step and rank; None: 64 on GPUs, 2 on the CPU, where larger activations are fresh memory for every layer (efficientnet-lite2 at
    288 px: 53 ms CPU time per image in batches of 1, 75 in 4, 135 in 64). workers: decoding processes per rank; None: the rank's share of
    the cores. device: auto, cpu or cuda. dtype: auto (bfloat16 on GPUs, else float32), float32, float16 or bfloat16. overwrite: start
    afresh where a store exists.
    """

    images: Path
    out: Path
    model: str
    checkpoint: Path | None = None
    num_classes: int | None = None
    img_size: int | None = None
    classes: str | None = None
    fit_head: bool = False
    eval_images: Path | None = None
    topk: int = 5
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("images", "out", "checkpoint", "eval_images"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        for name, least in (("num_classes", 0), ("img_size", 1), ("topk", 1), ("batch_size", 1), ("workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise AnnotateError(f"{name} must be at least {least}, got {value}")
        if self.classes is not None and self.fit_head:
            raise AnnotateError("classes keeps the annotator's own logits, fit_head replaces them by a probe: give one of the two")
        if self.eval_images is not None and not self.fit_head:
            raise AnnotateError(f"eval_images {self.eval_images} tests the probe of fit_head, which is not asked for: give both or none")
        if self.device not in ("auto", "cpu", "cuda"):
            raise AnnotateError(f"device must be auto, cpu or cuda, got {self.device!r}")
        if self.dtype not in ("auto", *DTYPES):
            raise AnnotateError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {self.dtype!r}")


def _batches(images: ImageList, groups: Sequence[Sequence[int]], annotator: Annotator, config: AnnotateConfig,
             ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
    """(position in `groups`, uint8 images) for all groups in order; no batch crosses a group. Raises AnnotateError at a broken image."""
    size = config.batch_size or (64 if ranks.device.type == "cuda" else 2)
    steps = [(position, group[i:i + size]) for position, group in enumerate(groups) for i in range(0, len(group), size)]
    workers = config.workers if config.workers is not None else cores_of_this_rank()
    loader = DataLoader(SquashedImages(images, annotator.preprocessing), batch_sampler=[step[1] for step in steps], collate_fn=stack,
                        num_workers=workers, pin_memory=ranks.device.type == "cuda")
    for (position, _), batch in zip(steps, loader, strict=True):
        if isinstance(batch, AnnotateError):
            raise batch
        yield position, batch


def _write_parts(todo: str, files: Callable[[int], list[Path]], compute: Callable[[Tensor], list[np.ndarray]],
                 save: Callable[[int, list[np.ndarray]], None], images: ImageList, annotator: Annotator, config: AnnotateConfig,
                 ranks: Ranks) -> None:
    """Compute and save this rank's share of the parts of which one of `files(part)` is missing."""
    size, total = labelmap.PART_SIZE, len(images.ids)
    missing = [part for part in range(-(-total // size)) if not all(path.exists() for path in files(part))]
    _barrier(ranks)  # before any rank writes: all see the same list
    mine = missing[ranks.rank::ranks.world_size]
    groups = [range(part * size, min(total, (part + 1) * size)) for part in mine]
    columns = (TextColumn(todo), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not ranks.main) as progress, torch.inference_mode():
        task = progress.add_task("", total=sum(map(len, groups)), rate="")
        collected: list[list[np.ndarray]] = []
        for position, batch in _batches(images, groups, annotator, config, ranks):
            rows = sum(len(one[0]) for one in collected)
            try:
                collected.append(compute(batch))
            except LabelMapError as error:
                names = [images.ids[i] for i in groups[position][rows : rows + len(batch)]]
                raise AnnotateError(f"{', '.join(names)}: {error}; the annotator overflowed: try --dtype float32") from error
            rows += len(batch)
            if rows == len(groups[position]):
                save(mine[position], [np.concatenate(column) for column in zip(*collected)])
                collected = []
            progress.advance(task, len(batch))
            seconds = max(progress.tasks[0].elapsed or 0, 1e-3)
            progress.update(task, rate=f"{ranks.world_size * progress.tasks[0].completed / seconds:,.0f} images/s")
    _barrier(ranks)


def _barrier(ranks: Ranks) -> None:
    if ranks.world_size > 1:
        dist.barrier()


def annotate(config: AnnotateConfig) -> dict[str, Any]:
    """Annotate as `config` says, resuming what is there; every rank of a torchrun job calls it. Returns the manifest.

    Beside the store's own fields the manifest has model, weights, weights_sha256, preprocessing, dtype, kept_classes, probe, ids_sha256,
    class_counts, pooled_top1 (percent, where the classes are those of the folders), probe_report (percent), versions, created. Raises
    AnnotateError naming what is wrong and what to do.
    """
    with _processes(config.device) as ranks:
        return _annotate(config, ranks)


@contextlib.contextmanager
def _processes(device: str) -> Iterator[Ranks]:
    # Gloo on GPUs, too: ranks exchange next to nothing, but may wait long for one another, beyond NCCL's watchdog.
    own = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))
    try:
        with join(device) as ranks:
            yield ranks
    finally:
        if own:
            dist.destroy_process_group()


def _annotate(config: AnnotateConfig, ranks: Ranks) -> dict[str, Any]:
    console = Console(stderr=True, quiet=not ranks.main)
    images = list_images(config.images)
    if (config.fit_head or config.classes) and images.class_names is None:
        raise AnnotateError(f"{config.images}: --classes and --fit-head need class folders, this is a flat folder; sort its images into "
                            "one folder per class")
    held_out = None if config.eval_images is None else list_images(config.eval_images)
    if held_out is not None and held_out.class_names != images.class_names:
        raise AnnotateError(f"{config.eval_images}: its class folders {held_out.class_names} differ from those of {config.images}: "
                            f"{images.class_names}")
    dtype = config.dtype if config.dtype != "auto" else "bfloat16" if ranks.device.type == "cuda" else "float32"
    annotator = build_annotator(config.model, img_size=config.img_size, checkpoint=config.checkpoint, num_classes=config.num_classes,
                                device=ranks.device, dtype=dtype)
    if config.classes is not None:
        annotator.keep_classes(class_indices(config.classes, images.class_names, annotator))
    if annotator.num_classes == 0 and not config.fit_head:
        raise AnnotateError(f"model {config.model} has no classifier; give --fit-head to fit one, or choose another model")

    class_names, labelled = name_classes(images, annotator, config)
    num_classes = len(class_names) if config.fit_head else annotator.num_classes
    spec = MapSpec(min(config.topk, num_classes), *annotator.grid, num_classes)
    record = dict(
        model=config.model, weights=annotator.source, weights_sha256=annotator.weights_sha256(),
        preprocessing=dataclasses.asdict(annotator.preprocessing), dtype=dtype, kept_classes=annotator.kept, probe=config.fit_head,
        ids_sha256=hashlib.sha256(json.dumps(images.ids).encode()).hexdigest(),
        class_counts=None if images.labels is None else np.bincount(images.labels).tolist(),
        versions={"tl_fast": tl_fast.__version__, "timm": timm.__version__, "torch": torch.__version__},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))
    record = json.loads(json.dumps(record))  # as it will be read back: tuples are lists
    if ranks.main:
        record = prepare_store(config, spec, images, class_names, record)
    _barrier(ranks)

    report = _fit_head(config, ranks, annotator, images, held_out) if config.fit_head else None
    if report:
        told = (("train_top1", "on the training images"), ("cv_top1", "5-fold cross-validated"), ("eval_top1", "on the held-out images"))
        accuracies = ", ".join(f"{report[key]:.1f} % {text}" for key, text in told if key in report)
        console.print(f"probe for {num_classes} classes: top-1 {accuracies} (penalty {report['penalty']:g})", highlight=False,
                      soft_wrap=True)

    def compute(batch: Tensor) -> list[np.ndarray]:
        dense, pooled = annotator(batch)
        classes, scores = top_k_relative(dense, spec.k)
        packed = [labelmap.pack(c, s, spec) for c, s in zip(classes.cpu().numpy(), scores.cpu().numpy(), strict=True)]
        return [np.array(packed, spec.dtype), pooled.argmax(1).cpu().numpy().astype("<u2")]

    def save(part: int, columns: list[np.ndarray]) -> None:
        records, pooled = columns
        write_atomic(_pooled_path(config.out, part), lambda file: np.save(file, pooled))
        labelmap.write_part(config.out, part, records)

    _write_parts("annotating", lambda part: [labelmap.part_path(config.out, part), _pooled_path(config.out, part)], compute, save,
                 images, annotator, config, ranks)
    if labelled:
        parts = range(-(-len(images.ids) // labelmap.PART_SIZE))
        pooled = np.concatenate([np.load(_pooled_path(config.out, part)) for part in parts])
        record["pooled_top1"] = 100 * float((pooled == images.labels).mean())
        console.print(f"pooled top-1 of {config.model}: {record['pooled_top1']:.2f} % of {len(images.ids):,} images, {num_classes} classes",
                      highlight=False, soft_wrap=True)
    elif images.class_names is not None:
        console.print(f"the label maps know {num_classes} classes, the folder {len(images.class_names)}: to train on them, give "
                      "--classes or --fit-head", highlight=False, soft_wrap=True)
    if report:
        record["probe_report"] = report
    if ranks.main:
        labelmap.write_manifest(config.out, spec, len(images.ids), class_names, complete=True, **record)
    _barrier(ranks)
    return json.loads((config.out / "manifest.json").read_text("utf-8"))


def class_indices(classes: str, folders: list[str], annotator: Annotator) -> list[int]:
    """The annotator's class of each class folder. `classes` is "auto" or a JSON file {folder: index or wnid}; see AnnotateConfig."""
    if classes == "auto":
        wanted: dict[str, Any] = {folder: folder for folder in folders}
    else:
        try:
            wanted = json.loads(Path(classes).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise AnnotateError(f"classes {classes!r} is neither auto nor a JSON file {{folder: index or wnid}}: {error}") from error
        if not isinstance(wanted, dict) or (lacking := [folder for folder in folders if folder not in wanted]):
            raise AnnotateError(f"{classes} must map every class folder" + (f"; {lacking} are missing" if isinstance(wanted, dict) else ""))
    wnids = imagenet_wnids(annotator)
    indices = []
    for folder in folders:
        value = wanted[folder]
        if isinstance(value, str):
            if value not in wnids:
                why = "is not a wnid of the annotator's" if wnids else "cannot be looked up: the annotator's classes are no ImageNet list"
                raise AnnotateError(f"class folder {folder!r}: {value!r} {why}; give --classes a JSON file {{folder: index}}, or use "
                                    "--fit-head")
            value = wnids[value]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < annotator.num_classes:
            raise AnnotateError(f"class folder {folder!r}: {value!r} is no class index in 0..{annotator.num_classes - 1}")
        if value in indices:
            raise AnnotateError(f"class folders {folders[indices.index(value)]!r} and {folder!r} are both mapped to class {value}; "
                                "merge the folders or use --fit-head")
        indices.append(value)
    return indices


def imagenet_wnids(annotator: Annotator) -> dict[str, int]:
    """wnid → index for a network with one of timm's ImageNet class lists, else empty."""
    subset = infer_imagenet_subset(annotator.network)
    return {wnid: index for index, wnid in enumerate(ImageNetInfo(subset).label_names())} if subset else {}


def name_classes(images: ImageList, annotator: Annotator, config: AnnotateConfig) -> tuple[list[str] | None, bool]:
    """The label maps' class names, and whether label i of the images is class i of the maps (so that an accuracy makes sense)."""
    wnids = imagenet_wnids(annotator)
    if images.class_names is not None:
        same_count = len(images.class_names) == annotator.num_classes and (not wnids or list(wnids) == images.class_names)
        if config.fit_head or config.classes or same_count:
            return images.class_names, True
    return (list(wnids) if len(wnids) == annotator.num_classes else None), False


def prepare_store(config: AnnotateConfig, spec: MapSpec, images: ImageList, class_names: list[str] | None,
                  record: dict[str, Any]) -> dict[str, Any]:
    """Make the store's folder, or check that the one that exists was made in the same way. Returns the record to finish with."""
    out, path = config.out, config.out / "manifest.json"
    if config.overwrite and path.exists():
        parts = [file for kind in ("maps", "pooled", "features") for file in out.glob(f"{kind}-*.npy")]
        for file in (*parts, _head_path(out), out / "ids.jsonl", path):  # the manifest last: a store without one is nobody's to delete
            file.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    for kind in ("maps-", "pooled-", "features-", "head.", "ids.", "manifest."):
        for leftover in out.glob(f".{kind}*.tmp"):  # of a killed run; this rank works before the others start writing
            leftover.unlink()
    if path.exists():
        try:
            old = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise AnnotateError(f"{path} is damaged ({error}); give --overwrite to start afresh") from error
        new = {"spec": spec.to_dict(), "class_names": class_names, "num_samples": len(images.ids), **record}
        if differing := [key for key in FINGERPRINT if old.get(key) != new[key]]:
            def short(value: Any) -> str:
                return text if len(text := json.dumps(value)) < 80 else text[:77] + "..."

            told = "; ".join(f"{key} was {short(old.get(key))}, is now {short(new[key])}" for key in differing)
            raise AnnotateError(f"{out} holds label maps made in another way: {told}. Give --overwrite to start afresh, or another folder")
        record = {**record, "created": old["created"], "versions": old["versions"]}
    elif any(out.iterdir()):
        raise AnnotateError(f"{out} is not empty and has no manifest.json; give a new folder")
    labelmap.write_manifest(out, spec, len(images.ids), class_names, complete=False, **record)
    labelmap.write_ids(out, images.ids)
    return record


def _fit_head(config: AnnotateConfig, ranks: Ranks, annotator: Annotator, images: ImageList,
              held_out: ImageList | None) -> dict[str, float]:
    """Fit, or read back, the probe and give it to the annotator; its accuracies. Features wait in features-*.npy until it is fitted."""
    head = _head_path(config.out)
    fitted = head.exists()
    _barrier(ranks)
    if not fitted:
        def compute(batch: Tensor) -> list[np.ndarray]:
            return [annotator.pre_logits(annotator.features(batch)).cpu().numpy()]

        def save(part: int, columns: list[np.ndarray]) -> None:
            write_atomic(_features_path(config.out, part), lambda file: np.save(file, columns[0]))

        _write_parts("features for the probe", lambda part: [_features_path(config.out, part)], compute, save, images, annotator, config,
                     ranks)
        if ranks.main:
            files = [_features_path(config.out, part) for part in range(-(-len(images.ids) // labelmap.PART_SIZE))]
            features = torch.from_numpy(np.concatenate([np.load(file) for file in files])).to(ranks.device)
            try:
                probe = linear_probe.fit(features, torch.from_numpy(images.labels).to(ranks.device), len(images.class_names))
            except ValueError as error:
                raise AnnotateError(f"--fit-head on {config.images}: {error}") from error
            metadata = {"probe": json.dumps({**probe.report(), "class_names": images.class_names})}  # one key: their order is random
            blob = safetensors.torch.save({"weight": probe.weight, "bias": probe.bias}, metadata)
            write_atomic(head, lambda file: file.write(blob))
            for file in files:
                file.unlink()
        _barrier(ranks)
    with safe_open(head, "pt") as file:
        annotator.set_probe(file.get_tensor("weight"), file.get_tensor("bias"))
        report = json.loads(file.metadata()["probe"])
    del report["class_names"]
    if held_out is not None:
        mine = range(ranks.rank, len(held_out.ids), ranks.world_size)
        hits = torch.zeros(1, dtype=torch.int64)
        with torch.inference_mode():
            predicted = [annotator(batch)[1].argmax(1).cpu() for _, batch in _batches(held_out, [mine], annotator, config, ranks)]
        if predicted:
            hits += (torch.cat(predicted) == torch.from_numpy(held_out.labels[mine])).sum()
        if ranks.world_size > 1:
            dist.all_reduce(hits)
        report["eval_top1"] = 100 * hits.item() / len(held_out.ids)
    return report


def _pooled_path(out: Path, part: int) -> Path:
    return out / f"pooled-{part:05d}.npy"  # uint16 [n]: the image's top class


def _features_path(out: Path, part: int) -> Path:
    return out / f"features-{part:05d}.npy"  # float32 [n, D]


def _head_path(out: Path) -> Path:
    return out / "head.safetensors"


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line; returns the manifest. Exit code 1 with one line on stderr for what AnnotateError, LabelMapError and OSError say."""
    parser = argparse.ArgumentParser(prog="python -m tl_fast.annotate", description="Make label maps for a folder of images.")
    parser.add_argument("images", type=Path, help="folder of class folders, or of images")
    parser.add_argument("out", type=Path, help="folder of the label maps; continued where it exists")
    parser.add_argument("--model", required=True, help="efficientnet-lite0|1|2 (bundled), or any timm name")
    parser.add_argument("--checkpoint", type=Path, help="weights for --model: safetensors, state dict or training checkpoint; default: the "
                        "model's own")
    parser.add_argument("--num-classes", type=int, help="classes of the checkpoint's head; default: as the head says")
    parser.add_argument("--img-size", type=int, help="side in pixels the full image is squashed to; default: the model's")
    parser.add_argument("--classes", nargs="?", const="auto", metavar="auto|FILE", help="keep the logits of the class folders: auto, "
                        "the default (their names are ImageNet wnids), or a JSON file {folder: class index or wnid}")
    parser.add_argument("--fit-head", action="store_true", help="fit a linear probe for the class folders on IMAGES, apply it to the cells")
    parser.add_argument("--eval-images", type=Path, help="held-out images with the same class folders, to test the probe on")
    parser.add_argument("--topk", type=int, default=5, help="classes stored per cell (default 5, at most all)")
    parser.add_argument("--batch-size", type=int, help="images per step and process; default: 64 on GPUs, 2 on the CPU")
    parser.add_argument("--workers", type=int, help="decoding processes per rank; default: its share of the cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="of the features; auto: bfloat16 on GPUs, else float32")
    parser.add_argument("--overwrite", action="store_true", help="start afresh where a store exists")
    try:
        return annotate(AnnotateConfig(**vars(parser.parse_args(arguments))))
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
