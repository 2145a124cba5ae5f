"""Classification with token labels, or with image labels alone, as the training loop's task."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tl_fast.pipeline.batch import Batch
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.mixup import draw_mix
from tl_fast.plan.records import mix_box
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import Ranks
from tl_fast.training.accuracy import Classifier, accuracy, check_labels
from tl_fast.training.config import TrainConfig
from tl_fast.training.data import check_names, check_size, images_a_pass, loader_options
from tl_fast.training.freeze import freeze_layers
from tl_fast.training.kept_batches import KeptBatches
from tl_fast.training.network import build_network, build_step, compiles, grid_of, set_train, silence_token_head
from tl_fast.training.optimiser import Schedule, build_schedule
from tl_fast.training.progress import Progress
from tl_fast.training.stopping import Agreement
from tl_fast.training.task import Task


class Classification(Task):
    """A run that learns image labels, and token labels where the config has them. Metrics are accuracies in percent and
    losses in nats."""

    config: TrainConfig
    name: ClassVar[str] = "classification"
    loss_terms: ClassVar[tuple[str, str]] = ("class_loss", "token_loss")
    score_metrics: ClassVar[tuple[str, ...]] = ("val_top1_ema", "val_top1_raw")

    def make_loaders(self) -> tuple[Loader, Loader | None]:
        config, ranks = self.config, self.ranks
        batch_size = images_a_pass(config, ranks)
        if batch_size == 1 and (config.mix_token or config.mixing):
            name, off = ("mix_token", "mix_token false") if config.mix_token else ("mixup or cutmix", "both 0")
            raise InputError(
                f"{name} mixes the images of a rank's pass, and batch_size {config.batch_size} over "
                f"{ranks.world_size} ranks x accumulate {config.accumulate} leaves one: raise batch_size, or "
                f"set {off}"
            )
        common = dict(image_size=config.img_size, grid=grid_of(config), **loader_options(config, ranks))
        train_loader = Loader(
            config.train_data,
            batch_size,
            order=config.order,
            augment=config.augment,
            geometry=config.geometry,
            smoothing=config.smoothing,
            targets_dtype=config.targets_dtype,
            token_labels=config.token_label,
            resident=config.resident,
            **common,
        )
        if not config.val_data:
            return train_loader, None
        return train_loader, Loader(config.val_data, batch_size, train=False, crop_pct=config.crop_pct, **common)

    def check_data(self) -> None:
        samples = self.train_loader.samples
        if self.config.token_label and samples.spec is None:
            raise InputError(
                f"{', '.join(map(str, samples.paths))} has no label maps: convert with --label-maps DIR, or train on "
                "image labels alone with --token_label false"
            )
        check_labels(self.train_loader, self.config.num_classes)
        check_size(self.config, self.train_loader)
        if self.val_loader is not None:
            check_labels(self.val_loader, self.config.num_classes)
            check_names(self.class_names, self.val_loader.samples.class_names)

    def build_network(self) -> nn.Module:
        return build_network(self.config)

    def prepare(self, model: nn.Module) -> list[str]:
        config, remarks = self.config, []
        if not config.token_label:
            silence_token_head(model)
        if config.freeze is not None:
            remarks.append(freeze_layers(model, config))
        if config.mix_token and not model.can_mix_tokens:
            tokens = "x".join(map(str, model.grid_size))
            size = config.img_size
            remarks.append(f"mix_token is off: {tokens} tokens do not divide {size} pixels into whole patches")
        return remarks

    def build_schedule(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Schedule:
        return build_schedule(optimizer, self.config, steps_per_epoch)

    def build_step(self, model: nn.Module) -> nn.Module:
        return build_step(model, self.config, self.ranks)

    def set_train(self, model: nn.Module) -> None:
        set_train(model, self.config.freeze_stem_bn)

    def draw(self, progress: Progress, model: nn.Module) -> tuple[Tensor | None, Tensor | None]:
        """MixToken's box [4], and how mixup or CutMix mixes [5], on the device; None for what is off."""
        config, step = self.config, (progress.epoch, progress.step_in_epoch)
        box = mixing = None
        if config.mix_token and model.can_mix_tokens:
            box = mix_box(config.seed, *step, model.grid_size[0])
        if config.mixing is not None:
            mixing = draw_mix(config.seed, *step, config.img_size, config.mixing)
        return self._on_device(box), self._on_device(mixing)

    def arguments(self, batch: Batch, drawn: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, ...]:
        """As `TrainStep` takes them: images, targets, box, ground truth, boxes and noise of erasing, mixing; None for
        what there is not."""
        config, device = self.config, self.ranks.device
        box, mixing = drawn
        images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
        truth = smoothed_one_hot(labels, config) if config.ground_truth or not config.token_label else None
        targets = batch.targets.to(device, non_blocking=True) if config.token_label else truth
        erase, noise = (
            None if tensor is None else tensor.to(device, non_blocking=True) for tensor in (batch.erase, batch.noise)
        )
        return images, targets, box, truth if config.ground_truth else None, erase, noise, mixing

    def prepare_validation(self, model: nn.Module, ema: nn.Module) -> None:
        if self.val_loader is None:
            return
        config, device = self.config, self.ranks.device
        whole = self.val_loader.batch_size if compiles(config, device) else None
        self._raw, self._averaged = (Classifier(module, config, device, whole) for module in (model, ema))
        self._batches = KeptBatches(self.val_loader)

    def validate(self, agreement: Agreement) -> dict[str, float]:
        return validate(self._raw, self._averaged, self._batches, self.ranks, agreement)

    def in_words(self, metrics: dict[str, float]) -> str:
        return f"val top-1 {metrics['val_top1_ema']:.1f} % (EMA), {metrics['val_top1_raw']:.1f} % (raw)"

    def summary(self, metrics: dict[str, float], best: float | None) -> dict[str, float | None]:
        return {name: metrics.get(name) for name in self.score_metrics} | {"best_top1": best}

    @property
    def class_names(self) -> list[str]:
        return self.train_loader.samples.class_names

    @property
    def network_in_words(self) -> str:
        return f"{self.config.model} at {self.config.img_size} px"

    def _on_device(self, drawn: np.ndarray | None) -> Tensor | None:
        return None if drawn is None else torch.from_numpy(drawn).to(self.ranks.device, non_blocking=True)


def smoothed_one_hot(labels: Tensor, config: TrainConfig) -> Tensor:
    """labels int64 [B] -> float32 [B,C]: one-hot * (1 - s) + s / C."""
    return F.one_hot(labels, config.num_classes) * (1 - config.smoothing) + config.smoothing / config.num_classes


def validate(
    raw: Classifier, averaged: Classifier, batches: Iterable[Batch], ranks: Ranks, agreement: Agreement
) -> dict[str, float]:
    """Accuracy of the weights and of their moving average over all ranks: val_top1_raw, val_top5_raw, val_loss_raw,
    val_top1_ema, ... (percent, nats).

    Both run on a batch once it is decoded. Ends early, with figures of no meaning, when a signal arrives.
    """
    results = accuracy((raw, averaged), agreement.until_stopped(batches), ranks)
    return {
        f"val_{key}_{name}": values[key]
        for name, values in zip(("raw", "ema"), results, strict=True)
        for key in ("top1", "top5", "loss")
    }
