"""Semantic segmentation as the training loop's task."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from tl_fast.models.normalise import Normalise
from tl_fast.models.segmentation import build_segmenter
from tl_fast.models.segmentation_loss import SegmentationLoss
from tl_fast.models.segmentation_step import SegmentStep
from tl_fast.pipeline.batch import Batch
from tl_fast.pipeline.segment_loader import SegmentLoader
from tl_fast.system.mistakes import InputError
from tl_fast.training.accuracy import Classifier
from tl_fast.training.data import check_names, check_size, images_a_pass, loader_options
from tl_fast.training.kept_batches import KeptBatches
from tl_fast.training.network import check_attention, compiles, over_ranks, set_train
from tl_fast.training.optimiser import Schedule, build_poly_schedule
from tl_fast.training.progress import Progress
from tl_fast.training.segment_config import SegmentConfig
from tl_fast.training.segmentation_accuracy import segmentation_accuracy
from tl_fast.training.stopping import Agreement
from tl_fast.training.task import Task
from tl_fast.training.windows import Inference


class Segmentation(Task):
    """A run that learns a class for every pixel. Metrics are in percent."""

    config: SegmentConfig
    name: ClassVar[str] = "segmentation"
    loss_terms: ClassVar[tuple[str, str]] = ("decoder_loss", "aux_loss")
    score_metrics: ClassVar[tuple[str, ...]] = ("val_miou_ema", "val_miou_raw")

    def make_loaders(self) -> tuple[SegmentLoader, SegmentLoader | None]:
        config, ranks = self.config, self.ranks
        batch_size = images_a_pass(config, ranks)
        if batch_size == 1 and not (config.sync_bn and ranks.world_size > 1):
            raise InputError(
                f"UPerNet's batch norms need two images in a rank's pass, and batch_size {config.batch_size} over "
                f"{ranks.world_size} ranks x accumulate {config.accumulate} leaves one: raise batch_size"
            )
        common = dict(crop_size=config.crop_size, **loader_options(config, ranks))
        train_loader = SegmentLoader(
            config.train_data, batch_size, order=config.order, augment=config.augment, **common
        )
        if not config.val_data:
            return train_loader, None
        return train_loader, SegmentLoader(config.val_data, batch_size, train=False, **common)

    def check_data(self) -> None:
        for loader in filter(None, (self.train_loader, self.val_loader)):
            if loader.num_classes != self.config.num_classes:
                raise InputError(
                    f"{', '.join(map(str, loader.samples.paths))} has masks of {loader.num_classes} classes, the model "
                    f"{self.config.num_classes}: set num_classes to {loader.num_classes}, or use the data that the "
                    "model was made for"
                )
        check_size(self.config, self.train_loader)
        if self.val_loader is not None:
            check_names(self.class_names, list(self.val_loader.mask_spec.class_names))

    def build_network(self) -> nn.Module:
        config = self.config
        model = build_segmenter(
            config.model,
            crop_size=config.crop_size,
            num_classes=config.num_classes,
            drop_path=config.drop_path,
            options=config.model_options,
            out_indices=config.out_indices,
            decoder_channels=config.decoder_channels,
            aux_channels=config.aux_channels,
        )
        if config.eval_mode == "whole" and model.input_size is not None:
            raise InputError(
                f"eval_mode whole: model {config.model} takes images of crop_size {config.crop_size} alone: set "
                "eval_mode slide"
            )
        return model

    def prepare(self, model: nn.Module) -> list[str]:
        return []

    def build_schedule(self, optimizer: torch.optim.Optimizer, steps_per_epoch: int) -> Schedule:
        return build_poly_schedule(optimizer, self.config)

    def build_step(self, model: nn.Module) -> nn.Module:
        config, device = self.config, self.ranks.device
        self.ranks.agree(check_attention, model, config.crop_size, config, device)
        criterion = SegmentationLoss(self.train_loader.mask_spec.ignore_index, config.aux_weight)
        normalise = Normalise(config.mean, config.std).to(device)
        return over_ranks(
            SegmentStep(model, criterion, normalise, config.dtype, config.attention_backend), config, self.ranks
        )

    def set_train(self, model: nn.Module) -> None:
        set_train(model)

    def draw(self, progress: Progress, model: nn.Module) -> None:
        """Nothing: all that is drawn is in the loader's plans."""

    def arguments(self, batch: Batch, drawn: None) -> tuple[Tensor, Tensor]:
        """As `SegmentStep` takes them: images and masks."""
        images, masks = (tensor.to(self.ranks.device, non_blocking=True) for tensor in (batch.images, batch.masks))
        return images, masks

    def prepare_validation(self, model: nn.Module, ema: nn.Module) -> None:
        if self.val_loader is None:
            return
        config, device = self.config, self.ranks.device
        self._inference = inference_of(config, model.multiple)
        compiled = config.eval_mode == "slide" and compiles(config, device)
        whole = self._inference.batch if compiled else None
        # Without a moving average both are the same weights.
        modules = (model, ema) if config.ema_decay else (model,)
        self._segmenters = [Classifier(module, config, device, whole) for module in modules]
        self._batches = KeptBatches(self.val_loader)

    def validate(self, agreement: Agreement) -> dict[str, float]:
        """val_miou_raw, val_mean_accuracy_raw, val_pixel_accuracy_raw, val_miou_ema, ... in percent."""
        results = segmentation_accuracy(
            self._segmenters,
            agreement.until_stopped(self._batches),
            self.ranks,
            num_classes=self.config.num_classes,
            ignore_index=self.val_loader.mask_spec.ignore_index,
            samples=len(self.val_loader.samples),
            inference=self._inference,
        )
        raw, averaged = results[0], results[-1]
        return {
            f"val_{key}_{name}": values[key]
            for name, values in (("raw", raw), ("ema", averaged))
            for key in ("miou", "mean_accuracy", "pixel_accuracy")
        }

    def in_words(self, metrics: dict[str, float]) -> str:
        return f"val mIoU {metrics['val_miou_ema']:.1f} % (EMA), {metrics['val_miou_raw']:.1f} % (raw)"

    def summary(self, metrics: dict[str, float], best: float | None) -> dict[str, float | None]:
        return {name: metrics.get(name) for name in self.score_metrics} | {"best_miou": best}

    @property
    def class_names(self) -> list[str]:
        return list(self.train_loader.mask_spec.class_names)

    @property
    def network_in_words(self) -> str:
        return f"UPerNet on {self.config.model} at {self.config.crop_size} px"


def inference_of(config: SegmentConfig, multiple: int) -> Inference:
    """How a config's validation looks at images, with a network whose images have sides that are multiples of
    `multiple`."""
    return Inference(
        mode=config.eval_mode,
        crop=config.crop_size,
        stride=config.window_stride,
        base_size=config.base_size,
        multiple=multiple,
        fill=config.fill,
    )
