"""Accuracy of models on a beton's samples, over all ranks; and which data a model can be used with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tl_fast.models.normalise import Normalise, autocast
from tl_fast.models.step import compiled
from tl_fast.pipeline.batch import Batch
from tl_fast.pipeline.loader import Loader
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import Ranks, join
from tl_fast.system.sides import Sides
from tl_fast.training import checkpoint
from tl_fast.training.config import TrainConfig
from tl_fast.training.network import build_network
from tl_fast.training.trained import find_trained


class Classifier:
    """A model as it is evaluated: uint8 images [B,3,H,W] to logits, float32 [B,C], or [B,C,h,w] of a segmenter.

    Args:
        model: a model of `build_model` or `build_segmenter` on `device`; it stays the caller's.
        batch_size: the number of images, in a whole batch, that the way from pixels to logits is compiled for at its
            first use; None: for none. Batches of other sizes, such as the last one, run eagerly: each size would have
            to be compiled by itself.
    """

    def __init__(
        self, model: nn.Module, config: TrainConfig, device: torch.device, batch_size: int | None = None
    ) -> None:
        self.model, self._batch_size = model, batch_size
        self._eager = _Logits(model, Normalise(config.mean, config.std).to(device), config.dtype)
        # Not in the config's compile_mode: CUDA graphs would hold memory of their own between validations.
        self._compiled = None if batch_size is None else compiled(self._eager, device)

    def __call__(self, images: Tensor) -> Tensor:
        return (self._compiled if len(images) == self._batch_size else self._eager)(images)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module, normalise: Normalise, dtype: str) -> None:
        super().__init__()
        self.model, self.normalise, self.dtype = model, normalise, dtype

    def forward(self, images: Tensor) -> Tensor:
        inputs = self.normalise(images)
        with autocast(images.device, self.dtype):
            logits = self.model(inputs)
        return logits.float()


@torch.inference_mode()
def accuracy(classifiers: Sequence[Classifier], batches: Iterable[Batch], ranks: Ranks) -> list[dict[str, float]]:
    """Evaluate classifiers over all ranks, all of them on each batch. Of each one: `top1`, `top5` in percent, `loss`
    (mean cross-entropy in nats), `samples`.

    `batches` are this rank's share; ranks may differ in their number. The last, partial batch counts in full. With
    fewer than 5 classes top5 is 100 by definition. The models are put in eval mode and back. Raises ValueError when
    there are no samples.
    """
    # Of each classifier: top-1 hits, top-5 hits, summed loss, samples.
    totals = torch.zeros(len(classifiers), 4, dtype=torch.float64, device=ranks.device)
    with in_eval_mode([classifier.model for classifier in classifiers]):
        for batch in batches:
            images = batch.images.to(ranks.device, non_blocking=True)
            labels = batch.labels.to(ranks.device, non_blocking=True)
            for classifier, sums in zip(classifiers, totals, strict=True):
                sums += _count(classifier(images), labels)
    return [_shares(*sums) for sums in ranks.sum(totals).tolist()]


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """Top-1 hits, top-5 hits, summed loss and number of a batch, float64 [4]; logits float32 [B,C], labels int64
    [B]."""
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B,5]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.ones_like(labels).sum()]).double()


def _shares(top1: float, top5: float, loss: float, samples: float) -> dict[str, float]:
    if samples == 0:
        raise InputError("no samples to evaluate")
    return {"top1": 100 * top1 / samples, "top5": 100 * top5 / samples, "loss": loss / samples, "samples": int(samples)}


@contextlib.contextmanager
def in_eval_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the models are in eval mode; afterwards each is in its mode again."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def check_labels(loader: Loader, num_classes: int) -> None:
    """Raises ValueError naming the files when their labels do not fit a model of `num_classes`, the sample too where a
    label is below 0."""
    files = ", ".join(map(str, loader.samples.paths))
    declared = loader.num_classes if loader.samples.class_names or loader.samples.spec is not None else None
    if declared is not None and declared != num_classes:
        raise InputError(
            f"{files} has {declared} classes, the model {num_classes}: set num_classes to {declared}, or "
            "use the data that the model was made for"
        )
    lowest = int(loader.samples.labels.argmin())
    if loader.samples.labels[lowest] < 0:
        raise InputError(
            f"{loader.samples.name(lowest)} has label {loader.samples.labels[lowest]}, and labels start "
            "at 0: convert again without such samples"
        )
    highest = int(loader.samples.labels.max())
    if highest >= num_classes:
        raise InputError(
            f"{files} has label {highest}, the model classes 0..{num_classes - 1}: set num_classes to at "
            f"least {highest + 1}"
        )


def evaluate(
    data: str | Sequence[str],
    weights: Path,
    *,
    use_ema: bool = True,
    model: str | None = None,
    img_size: Sides | None = None,
    crop_pct: float | None = None,
    eval_token_weight: float | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    decode: str = "auto",
) -> dict[str, Any]:
    """Evaluate `weights` on the beton(s) `data`: accuracy's dict plus `images_per_second` over all ranks, `checkpoint`,
    `remarks`.

    Args:
        weights: a run's folder, a checkpoint folder, or a weights file (then `model`, a timm name, is needed).
        use_ema: the moving average where the file has one, else the raw weights.
        img_size, crop_pct: pixels a side, or (height, width), and share; None: those of the checkpoint's training (224
            and 0.9 for a bare file).
        eval_token_weight: what the maximum of the token logits counts beside the class logits; None: as in training.
        batch_size: images per step and rank.
        decode: where JPEGs are decoded, as `pipeline.Loader` takes it; nvJPEG's pixels differ a little from the CPU's.

    Raises CheckpointError, FileNotFoundError or ValueError naming what does not fit.
    """
    with join(device) as ranks, contextlib.ExitStack() as stack:
        changes = dict(
            model=model, img_size=img_size, crop_pct=crop_pct, eval_token_weight=eval_token_weight, dtype=dtype
        )
        path, config, trained_classes = ranks.on_main(find_trained, weights, use_ema, changes)
        loader = ranks.agree(
            lambda: Loader(
                data,
                batch_size,
                image_size=config.img_size,
                train=False,
                threads=threads,
                crop_pct=config.crop_pct,
                device=ranks.device,
                decode=decode,
                rank=ranks.rank,
                world_size=ranks.world_size,
            )
        )
        stack.callback(loader.close)
        ranks.agree(_check_classes, loader, config, path, trained_classes)
        network = ranks.agree(build_network, config)
        remarks = ranks.on_main(checkpoint.load_weights, network, path, use_ema)
        ranks.fill_from_main(network.state_dict().values())
        start = time.perf_counter()
        classifier = Classifier(network.to(ranks.device), config, ranks.device)
        (result,) = accuracy([classifier], loader, ranks)
        if result["samples"] != len(loader.samples):
            raise RuntimeError(
                f"evaluated {result['samples']} of {len(loader.samples)} samples: the loader's sharding is broken"
            )
        return {
            **result,
            "images_per_second": result["samples"] / (time.perf_counter() - start),
            "checkpoint": str(path),
            "weights": "ema" if use_ema else "raw",
            "remarks": remarks,
        }


def in_words(result: dict[str, Any]) -> str:
    """What `evaluate` found, for people: its remarks, then a line of figures."""
    figures = (
        f"{result['checkpoint']} ({result['weights']}): "
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, {result['samples']} images, "
        f"{result['images_per_second']:.0f} images/s"
    )
    return "\n".join([*result["remarks"], figures])


def _check_classes(loader: Loader, config: TrainConfig, weights: Path, trained: list[str] | None) -> None:
    check_labels(loader, config.num_classes)
    names = loader.samples.class_names
    if trained and names and trained != names:
        raise InputError(
            f"{', '.join(map(str, loader.samples.paths))} has the classes {names[:5]}..., {weights} was "
            f"trained on {trained[:5]}...: convert the data with the same class list"
        )
