"""Configuration of a segmentation run, as `config` has it for classification."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tl_fast.plan.segment import SegmentAugment
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import both_sides, one_if_square
from tl_fast.training.milestones import Milestones
from tl_fast.training.run_config import RunConfig


@dataclass(frozen=True)
class SegmentConfig(RunConfig):
    """Settings of one segmentation run.

    Defaults are those of the published training of UPerNet with LV-ViT-S on ADE20K (arXiv 2104.10858 and its published
    code) unless said otherwise.
    """

    output_dir: str = "runs/segment"
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/. Rank 0 alone reads and writes it."""
    num_classes: int | None = None
    """Number of classes of the masks; null: the train beton's."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean RGB of the normalisation on a 0..1 scale; also the colour beyond an image's edge. Source: ImageNet."""
    batch_size: int = 16
    """Images per optimiser step over all ranks and accumulation steps."""
    min_lr: float = 0.0
    """Learning rate at the schedule's end."""
    weight_decay: float = 0.01
    """AdamW's decay; none on norms, biases, class token and position embeddings."""
    clip_grad: float | None = None
    """Largest global gradient norm; null: no clipping."""
    ema_decay: float = 0.0
    """Decay per step of the weights' moving average, 0..1 exclusive; 0: the average is the weights."""
    checkpoint_steps: int | None = 16_000
    """Optimiser steps between checkpoints, counted over the run; null: by the clock and at the end alone."""

    crop_size: int | tuple[int, int] = 512
    """Side of the square crop in pixels that is trained on, or [height, width]; multiples of the model's patch."""
    base_size: tuple[int, int] | None = None
    """(long, short): the image is first thought of as resized to fit into these sides, its aspect kept, as mmseg's
    img_scale; (2048, 512) is usual for ADE20K. Null: as stored."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Random resize before the crop, (low, high), as a factor of the size above."""
    max_class_share: float = 0.75
    """Largest share of a crop's labelled pixels that one class may have, if one of 10 draws of the crop allows it; 1:
    any."""
    flip: float = 0.5
    """Probability of a horizontal mirror."""
    distort: bool = True
    """Photometric distortion: brightness, contrast, saturation and hue vary, each in half of the images, by mmseg's
    ranges."""

    out_indices: tuple[int, ...] | None = None
    """Blocks or stages whose features the decoder sees, four of them, counted from 0; null: the model's usual ones."""
    decoder_channels: int = 256
    """Channels of the decoder's feature maps. Published: 256 for LV-ViT-S and M, 512 for L."""
    aux_channels: int = 256
    """Channels of the auxiliary head. Published: 256 for LV-ViT-S and M, 512 for L."""
    aux_weight: float = 0.4
    """Weight of the auxiliary head's cross-entropy beside the decoder's; 0: no auxiliary loss."""

    steps: int = 160_000
    """Optimiser steps of the schedule, warm-up included."""
    lr: float = 6e-5
    """Peak learning rate, of a batch of any size: it is not scaled by batch_size."""
    warmup_steps: int = 1_500
    """Optimiser steps of linear warm-up, by which the schedule is multiplied (mmseg's order)."""
    warmup_ratio: float = 1e-6
    """Where warm-up starts, as a share of the schedule."""
    poly_power: float = 1.0
    """Power of the decay from lr to min_lr over `steps`; 1: linear."""

    eval_steps: int | None = 16_000
    """Optimiser steps between validations, counted over the run; null: at the end alone."""
    eval_mode: Literal["slide", "whole"] = "slide"
    """Validation by sliding windows of crop_size, each two thirds of it further than the one before, or of the image as
    a whole, for models that take any size."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (
        *RunConfig.fixed_on_resume,
        "crop_size",
        "out_indices",
        "decoder_channels",
        "aux_channels",
    )
    model_fields: ClassVar[dict[str, str]] = {
        **RunConfig.model_fields,
        "img_size": "crop_size",
        "out_indices": "out_indices",
    }
    ranges: ClassVar[tuple[tuple[str, float, float], ...]] = (
        *RunConfig.ranges,
        ("num_classes", 1, 255),
        ("crop_size", 16, 4096),
        ("base_size", 16, 1 << 16),
        ("decoder_channels", 1, 1 << 16),
        ("aux_channels", 1, 1 << 16),
        ("aux_weight", 0, 1e6),
        ("steps", 1, 1 << 40),
        ("lr", 1e-12, 1e3),
        ("warmup_steps", 0, 1 << 40),
        ("warmup_ratio", 0, 1),
        ("poly_power", 0, 1e3),
        ("eval_steps", 1, 1 << 40),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "crop_size", one_if_square(self.crop_size))
        super().__post_init__()
        self.augment  # noqa: B018  validates scale, base_size, flip ...
        if self.warmup_steps > self.steps:
            raise InputError(f"warmup_steps is part of steps: {self.warmup_steps} > {self.steps}")
        if self.lr < self.min_lr:
            raise InputError(f"the peak lr {self.lr} is below min_lr {self.min_lr}: lower that")

    @property
    def augment(self) -> SegmentAugment:
        """The ranges of the plan's random decisions. Raises InputError naming the one that is wrong."""
        return SegmentAugment(
            scale=self.scale,
            base_size=self.base_size,
            max_class_share=self.max_class_share,
            flip=self.flip,
            distort=self.distort,
            fill=self.fill,
        )

    @property
    def window_stride(self) -> tuple[int, int]:
        """From window to window in validation, (down, right) in pixels: two thirds of the crop, 341 for 512."""
        height, width = both_sides(self.crop_size)
        return 2 * height // 3, 2 * width // 3

    @property
    def peak_lr(self) -> float:
        return self.lr

    def milestones(self, steps_per_epoch: int) -> Milestones:
        return Milestones(
            end=self.steps if self.max_steps is None else min(self.steps, self.max_steps),
            steps_per_epoch=steps_per_epoch,
            eval_steps=self.eval_steps,
            checkpoint_steps=self.checkpoint_steps,
        )
