"""Evaluation of a segmentation run's checkpoint: scores, a table of classes, predictions on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from tl_fast.pipeline.segment_loader import SegmentLoader
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import cores_of_this_rank, join
from tl_fast.system.sides import Sides
from tl_fast.training import checkpoint
from tl_fast.training.accuracy import Classifier
from tl_fast.training.confusion import scores
from tl_fast.training.predictions import PredictionWriter, file_names, palette
from tl_fast.training.segment_config import SegmentConfig
from tl_fast.training.segment_task import Segmentation, inference_of
from tl_fast.training.segmentation_accuracy import count_pixels, in_percent, write_table
from tl_fast.training.windows import Inference


@dataclass(frozen=True)
class Look:
    """How evaluation looks at images, see `windows.Inference`; None: as the run's validation does.

    crop: pixels, one number or (height, width). A network that is built for one size is built for this one.
    stride: pixels; None: two thirds of the crop.
    """

    mode: str | None = None
    crop: Sides | None = None
    stride: Sides | None = None
    base_size: tuple[int, int] | None = None
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def inference(self, config: SegmentConfig, multiple: int, batch: int) -> Inference:
        """The settings for a network whose images have sides that are multiples of `multiple`; config: as
        `find_segmentation` gives it. Raises InputError for values that cannot work."""
        stride = config.window_stride if self.stride is None else self.stride
        settings = inference_of(config, multiple)
        return dataclasses.replace(settings, stride=stride, scales=self.scales, flip=self.flip, batch=batch)


@dataclass(frozen=True)
class Outputs:
    """What evaluation writes.

    csv: file of the table of classes (`segmentation_accuracy.write_table`). predictions: folder of one index picture a
    sample (`predictions.PredictionWriter`); with `overlays` also of the classes' colours over the images.
    """

    csv: Path | None = None
    predictions: Path | None = None
    overlays: bool = False

    def __post_init__(self) -> None:
        if self.overlays and self.predictions is None:
            raise InputError("overlays are written beside predictions: give --save-predictions DIR too")


def find_segmentation(weights: Path, look: Look, dtype: str) -> tuple[Path, SegmentConfig, list[str] | None]:
    """The checkpoint that `weights` means (a run's folder: its newest one), the config to evaluate it with, and its
    class names if it has any. Raises CheckpointError or InputError."""
    path = checkpoint.find(weights)
    if not path.is_dir():
        raise InputError(
            f"{path} does not say how its network is built: give the folder of a segmentation run or of a checkpoint"
        )
    meta = checkpoint.read_meta(path)
    task = meta.get("task", "classification")  # checkpoints of earlier versions do not say
    if task != Segmentation.name:
        raise InputError(f"{path} is of a {task} run, which segments nothing: evaluate it with tl-fast evaluate")
    changes = {"eval_mode": look.mode, "crop_size": look.crop, "base_size": look.base_size, "dtype": dtype}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = SegmentConfig.from_dict(meta["config"] | changes | {"drop_path": 0.0, "resume": None})
    return path, config, meta.get("class_names")


def evaluate_segmentation(
    data: str | Sequence[str],
    weights: Path,
    *,
    use_ema: bool = True,
    look: Look | None = None,
    outputs: Outputs | None = None,
    batch_size: int = 8,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> dict[str, Any]:
    """Evaluate `weights` on the beton(s) `data`, every sample exactly once over all ranks.

    weights: a segmentation run's folder (its newest checkpoint) or a checkpoint's folder. use_ema: the moving average,
    else the raw weights. look: None for the run's own validation. outputs: None for nothing. batch_size: windows that
    go through the network at once, per rank. threads: of the loader, and as many that write predictions, per rank.

    Returns `miou`, `mean_accuracy`, `pixel_accuracy` in percent, `samples`, `images_per_second` over all ranks,
    `scores` (SegmentationScores), `checkpoint`, `weights`, `remarks`. Raises CheckpointError, OSError or InputError
    naming what does not fit.
    """
    look, outputs = look or Look(), outputs or Outputs()
    with join(device) as ranks, contextlib.ExitStack() as stack:
        path, config, trained_classes = ranks.on_main(find_segmentation, weights, look, dtype)
        threads = threads or cores_of_this_rank()
        options = dict(threads=threads, device=ranks.device, rank=ranks.rank, world_size=ranks.world_size)
        loader = ranks.agree(lambda: SegmentLoader(data, batch_size, train=False, **options))
        stack.callback(loader.close)
        ranks.agree(_check_classes, loader, config, path, trained_classes)
        names = ranks.agree(_file_names, loader, outputs)
        network = ranks.agree(Segmentation(config, ranks).build_network)
        inference = ranks.agree(look.inference, config, network.multiple, batch_size)
        remarks = ranks.on_main(checkpoint.load_weights, network, path, use_ema)
        ranks.fill_from_main(network.state_dict().values())
        start = time.perf_counter()
        spec, take = loader.mask_spec, None
        if outputs.predictions is not None:
            colours = palette(spec.num_classes, spec.colours)
            writer = PredictionWriter(outputs.predictions, names, colours, outputs.overlays, threads)
            take = stack.enter_context(writer).write
        matrices, visits = count_pixels(
            [Classifier(network.to(ranks.device), config, ranks.device)],
            loader,
            ranks,
            num_classes=spec.num_classes,
            ignore_index=spec.ignore_index,
            samples=len(loader.samples),
            inference=inference,
            take=take,
        )
        _check_visits(loader, visits)
        result = scores(matrices[0])
        if outputs.csv is not None:
            ranks.on_main(write_table, outputs.csv, result, spec.class_names)
        return {
            **in_percent(result),
            "samples": len(loader.samples),
            "images_per_second": len(loader.samples) / (time.perf_counter() - start),
            "scores": result,
            "checkpoint": str(path),
            "weights": "ema" if use_ema else "raw",
            "remarks": remarks,
        }


def in_words(result: dict[str, Any]) -> str:
    """What `evaluate_segmentation` returns, for people: its remarks, then a line of figures."""
    figures = (
        f"{result['checkpoint']} ({result['weights']}): mIoU {result['miou']:.2f} %, mean accuracy "
        f"{result['mean_accuracy']:.2f} %, pixel accuracy {result['pixel_accuracy']:.2f} %, {result['samples']} images,"
        f" {result['images_per_second']:.1f} images/s"
    )
    return "\n".join([*result["remarks"], figures])


def _check_classes(loader: SegmentLoader, config: SegmentConfig, weights: Path, trained: list[str] | None) -> None:
    files = ", ".join(map(str, loader.samples.paths))
    if loader.num_classes != config.num_classes:
        raise InputError(
            f"{files} has masks of {loader.num_classes} classes, {weights} was trained on {config.num_classes}: convert"
            " with the table of classes that the training data have"
        )
    names = list(loader.mask_spec.class_names)
    if trained and names and trained != names:
        raise InputError(
            f"{files} has the classes {names[:5]}..., {weights} was trained on {trained[:5]}...: convert with the"
            " table of classes that the training data have"
        )


def _file_names(loader: SegmentLoader, outputs: Outputs) -> list[str]:
    if outputs.predictions is None:
        return []
    return file_names([sample_id for reader in loader.samples.readers for sample_id in reader.source_ids])


def _check_visits(loader: SegmentLoader, visits: Tensor) -> None:
    """visits: how often each sample was evaluated, int64 [samples]."""
    wrong = (visits != 1).nonzero().flatten().tolist()
    if wrong:
        raise RuntimeError(
            f"{loader.samples.name(wrong[0])} was evaluated {visits[wrong[0]]} times, {len(wrong)} samples were not"
            " evaluated once: the loader's sharding is broken"
        )
