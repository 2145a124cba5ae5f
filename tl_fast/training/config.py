"""Configuration of a classification run: one frozen dataclass, filled from YAML recipes and command-line flags,
validated when built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tl_fast.plan.augment import Augment
from tl_fast.plan.mixup import Mixup
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import one_if_square
from tl_fast.training.milestones import Milestones
from tl_fast.training.read_config import parse_command
from tl_fast.training.run_config import RunConfig

DESCRIPTION = "Train a vision transformer with token labeling from .beton files."


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Settings of one run. Defaults are the paper's LV-ViT recipe (arXiv 2104.10858 and its published code) unless said
    otherwise."""

    img_size: int | tuple[int, int] = 224
    """Side of the square input in pixels, or [height, width]; multiples of the model's patch, 16 in LV-ViT."""
    eval_token_weight: float | None = None
    """Weight of the token logits' maximum beside the class logits in evaluation; null: 0.5 for LV-ViT and VOLO, as
    published, else 0."""
    freeze_stem_bn: bool = False
    """Keep the conv stem's batch norms on their running statistics (fine-tuning; comparing world sizes)."""
    freeze: int | None = None
    """Layer groups that keep their weights and batch norm's statistics (fine-tuning), counted from the input: 1 the
    stem, 1 + n also the first n blocks; -1 all but the last group, the heads. Null: none. Groups are timm's."""

    token_label: bool = True
    """Train with token labels; false: cross-entropy on the image label alone, the control."""
    cls_weight: float = 1.0
    """Weight of the class token's cross-entropy."""
    dense_weight: float = 0.5
    """Weight of the tokens' cross-entropy: beta in the paper, unused without token_label. (The published code's flag
    defaults to 1.)"""
    smoothing: float = 0.1
    """Label smoothing, 0..1 exclusive, of targets of either kind."""
    ground_truth: bool = False
    """Mix the image label into the class token's target, as the published code does for its relabelled runs."""
    labels: Literal["soft", "argmax"] = "soft"
    """The label map's targets as they are, or the strongest class of each alone, smoothed: hard labels, as in
    self-emerging token labeling (arXiv 2401.03844)."""
    targets_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the token targets that the loader hands to the step, unused without token_label. The loss adds up in
    float32 either way. Not yet measured on a GPU."""
    mix_token: bool = True
    """MixToken (from the paper): mix patch embeddings of two images inside one box."""
    mixup: float = 0.0
    """Alpha of mixup, whose lambda is of Beta(alpha, alpha); 0: off. Without token labels and MixToken only. 0.8 is
    usual (DeiT, arXiv 2012.12877)."""
    cutmix: float = 0.0
    """Alpha of CutMix, as mixup's. 1.0 is usual (DeiT)."""
    mixup_prob: float = 1.0
    """Probability that a batch is mixed by mixup or CutMix. Source: timm's default."""
    mixup_switch_prob: float = 0.5
    """With both on: probability that a mixed batch is mixed by CutMix. Source: timm's default."""

    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a random crop as a share of the image, (low, high)."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio width/height of a random crop, (low, high)."""
    flip: float = 0.5
    """Probability of a horizontal mirror."""
    interpolation: Literal["bilinear", "bicubic", "random"] = "random"
    """Filter of the resize; random: either, an image. Source: published code."""
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment in timm's notation, its geometry applied to labels too; null: none. Paper: this one, L with
    rand-n3-m9-mstd0.5-inc1."""
    color_jitter: float = 0.0
    """Without auto_augment: brightness, contrast and saturation vary by this share, 0..1."""
    erase: float = 0.25
    """Probability of random erasing with noise. Source: published code."""
    geometry: Literal["correct", "published"] = "correct"
    """Where label maps are cropped, unused without token_label; published: mirrored across the diagonal, as the
    published code does, to reproduce its runs."""
    resident: bool | Literal["auto"] = False
    """Keep a rank's training images, which must be stored as planes, and label maps in its GPU's memory, uploaded at
    the start; several ranks want order grouped for it, so that each needs its part alone. auto: where they take at most
    30 % of the memory. Not yet run on a GPU."""
    crop_pct: float = 0.9
    """Validation's centre crop as a share of the resized image's sides. Source: published code for 224 px."""

    epochs: int = 300
    """Epochs of warm-up and cosine decay."""
    cooldown_epochs: int = 10
    """Further epochs at min_lr."""
    warmup_epochs: float = 5
    """Epochs of linear warm-up from warmup_lr; the cosine runs from epoch 0 (timm's order), so part of epochs."""
    lr: float = 1.6e-3
    """Peak learning rate at a batch of lr_base_batch; scaled linearly to batch_size. Paper: 1.6e-3 (L: 1e-3) at 1,024.
    """
    lr_base_batch: int = 1024
    """Batch size lr is stated for, images."""
    schedule_by: Literal["step", "epoch"] = "step"
    """The learning rate follows the schedule from step to step, or stays constant within an epoch (published code)."""
    warmup_lr: float = 1e-6
    """Learning rate of step 0, not scaled. Source: published code."""

    checkpoint_every: int = 1
    """Epochs between checkpoints; the last epoch always has one."""
    eval_every: int = 1
    """Epochs between validations; the last epoch always has one."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (*RunConfig.fixed_on_resume, "img_size", "token_label", "freeze")
    model_fields: ClassVar[dict[str, str]] = {
        **RunConfig.model_fields,
        "img_size": "img_size",
        "eval_token_weight": "eval_token_weight",
    }
    ranges: ClassVar[tuple[tuple[str, float, float], ...]] = (
        *RunConfig.ranges,
        ("img_size", 16, 4096),
        ("eval_token_weight", 0, 1e6),
        ("cls_weight", 0, 1e6),
        ("dense_weight", 0, 1e6),
        ("mixup", 0, 1e3),
        ("cutmix", 0, 1e3),
        ("mixup_prob", 0, 1),
        ("mixup_switch_prob", 0, 1),
        ("epochs", 1, 1 << 20),
        ("cooldown_epochs", 0, 1 << 20),
        ("warmup_epochs", 0, 1 << 20),
        ("lr", 1e-12, 1e3),
        ("lr_base_batch", 1, 1 << 24),
        ("warmup_lr", 0, 1e3),
        ("checkpoint_every", 1, 1 << 20),
        ("eval_every", 1, 1 << 20),
        ("crop_pct", 0.05, 1),
    )  # Augment checks its own

    def __post_init__(self) -> None:
        object.__setattr__(self, "img_size", one_if_square(self.img_size))
        super().__post_init__()
        if not 0 <= self.smoothing < 1:
            raise InputError(f"smoothing must be in [0, 1), got {self.smoothing}")
        self.augment  # noqa: B018  validates scale, ratio, flip, auto_augment ...
        if self.freeze == 0:
            raise InputError("freeze 0 would freeze nothing: set null, or a number of layer groups (1: the stem)")
        if self.sync_bn and self.freeze_stem_bn:
            raise InputError("sync_bn gathers statistics that freeze_stem_bn does not use: choose one of them")
        self._check_targets()
        self._check_mixing()
        if self.warmup_epochs > self.epochs:
            raise InputError(f"warmup_epochs is part of epochs: {self.warmup_epochs} > {self.epochs}")
        if self.peak_lr < max(self.min_lr, self.warmup_lr):
            raise InputError(
                f"the peak lr {self.peak_lr:.3g} (= lr {self.lr} * batch_size {self.batch_size} / {self.lr_base_batch})"
                f" is below min_lr {self.min_lr} or warmup_lr {self.warmup_lr}: lower those"
            )

    def _check_targets(self) -> None:
        if self.cls_weight == 0 and (self.dense_weight == 0 or not self.token_label):
            weights = f"cls_weight {self.cls_weight}, dense_weight {self.dense_weight}, token_label {self.token_label}"
            raise InputError(f"nothing to train on: {weights}")
        if self.ground_truth and not self.token_label:
            raise InputError(
                "ground_truth mixes the image label into the token labels' class target: it needs token_label true"
            )
        if self.labels == "argmax" and not self.token_label:
            raise InputError("labels argmax picks the token labels' strongest class: it needs token_label true")

    def _check_mixing(self) -> None:
        if self.mixing is None:
            for name in ("mixup_prob", "mixup_switch_prob"):
                if getattr(self, name) != getattr(TrainConfig, name):
                    raise InputError(f"{name} {getattr(self, name)} has no effect: set mixup or cutmix above 0, too")
            return
        asked = f"mixup {self.mixup}, cutmix {self.cutmix}"
        if self.token_label:
            raise InputError(
                f"{asked}: they mix image labels and no token labels (those are MixToken's): set both 0, or token_label"
                " false"
            )
        if self.mix_token:
            raise InputError(f"{asked}: mix_token true mixes the same images: set mix_token false, or both 0")
        if not (self.mixup and self.cutmix) and self.mixup_switch_prob != TrainConfig.mixup_switch_prob:
            raise InputError(f"mixup_switch_prob {self.mixup_switch_prob} has no effect with {asked}: set both above 0")

    @property
    def mixing(self) -> Mixup | None:
        """What mixup and CutMix may draw; None where both are off."""
        if not self.mixup and not self.cutmix:
            return None
        return Mixup(self.mixup, self.cutmix, self.mixup_prob, self.mixup_switch_prob)

    @property
    def augment(self) -> Augment:
        """The ranges of the plan's random decisions. Raises ValueError naming the one that is wrong."""
        return Augment(
            scale=self.scale,
            ratio=self.ratio,
            flip=self.flip,
            interpolation=self.interpolation,
            auto_augment=self.auto_augment or "",
            color_jitter=self.color_jitter,
            erase=self.erase,
            fill=self.fill,
        )

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: lr scaled linearly to the batch size."""
        return self.lr * self.batch_size / self.lr_base_batch

    @property
    def total_epochs(self) -> int:
        """Epochs of schedule and cooldown together."""
        return self.epochs + self.cooldown_epochs

    def milestones(self, steps_per_epoch: int) -> Milestones:
        steps = self.total_epochs * steps_per_epoch
        return Milestones(
            end=steps if self.max_steps is None else min(steps, self.max_steps),
            steps_per_epoch=steps_per_epoch,
            eval_epochs=self.eval_every,
            checkpoint_epochs=self.checkpoint_every,
            checkpoint_steps=self.checkpoint_steps,
        )


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The config of a command line: `--config recipe.yaml` (repeatable, later ones win) then `--field value`; None
    reads sys.argv.

    Unknown keys, wrong types and values out of range end the program with a message that names them.
    """
    return parse_command(TrainConfig, arguments, "train.py", DESCRIPTION)[0]
