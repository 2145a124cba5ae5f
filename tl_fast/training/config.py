"""Configuration of a training run: one frozen dataclass, filled from YAML recipes and command-line flags, validated
when built."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

from tl_fast.pipeline.ways import check_hybrid_share
from tl_fast.plan.augment import Augment
from tl_fast.plan.mixup import Mixup
from tl_fast.sources.source import MAX_CLASSES
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import one_if_square

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the strings below the fields are what --help prints


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Defaults are the paper's LV-ViT recipe (arXiv 2104.10858 and its published code) unless said
    otherwise."""

    train_data: str | list[str] = ""
    """Beton(s) to train on: a path, a glob, or a list of them. Required."""
    val_data: str | list[str] | None = None
    """Beton(s) for validation, as train_data; null: no validation."""
    output_dir: str = "runs/train"
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/. Rank 0 alone reads and writes it."""

    model: str = "lvvit_s"
    """timm model name: lvvit_t, lvvit_s, lvvit_m or lvvit_l, or any other one whose features are a grid; hf-hub: and
    local-dir: names too."""
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's constructor, e.g. {embed_dim: 32, depth: 2} for a tiny one."""
    img_size: int | tuple[int, int] = 224
    """Side of the square input in pixels, or [height, width]; multiples of the model's patch, 16 in LV-ViT."""
    num_classes: int | None = None
    """Number of classes; null: the train beton's."""
    init_weights: str | None = None
    """Weights to start from: a run's folder (its newest checkpoint), a checkpoint's folder, or a weights file (a
    published .pth.tar, a state dict, safetensors); null: random."""
    init_ema: bool = True
    """Start from the moving average in init_weights, where it has one; false: from its raw weights (published
    fine-tuning)."""
    pretrained: bool = False
    """Start from timm's pretrained weights of the model, out of timm's cache or the hub; rank 0 alone fetches them."""
    eval_token_weight: float | None = None
    """Weight of the token logits' maximum beside the class logits in evaluation; null: 0.5 for LV-ViT and VOLO, as
    published, else 0."""
    drop_path: float = 0.1
    """Drop path rate of the last block, 0..1 (timm's drop_path_rate); 0 for models that have none. Paper: 0.1 T and S,
    0.2 M, 0.3 L."""
    stem_space_to_depth: bool = False
    """The stem's first convolution (7x7, stride 2) as 4x4 with stride 1 over cells of 2x2 pixels: equal sums, the same
    weights. Not yet measured on a GPU."""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the residual stream between blocks under bfloat16 autocast. bfloat16 halves its memory traffic. Not yet
    measured on a GPU."""
    drop_path_batched: bool = False
    """Draw drop path for all blocks in one operation, and skip dropped samples at any rate; false: block by block, on a
    GPU from rate 0.1. Not yet measured on a GPU."""
    gelu: Literal["exact", "tanh"] = "exact"
    """GELU of the blocks; tanh: an approximation, off by at most 4.8e-4. Evaluation uses the one trained with. Not yet
    measured on a GPU."""
    freeze_stem_bn: bool = False
    """Keep the conv stem's batch norms on their running statistics (fine-tuning; comparing world sizes)."""
    freeze: int | None = None
    """Layer groups that keep their weights and batch norm's statistics (fine-tuning), counted from the input: 1 the
    stem, 1 + n also the first n blocks; -1 all but the last group, the heads. Null: none. Groups are timm's."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean RGB of the normalisation on a 0..1 scale. Source: ImageNet, as published."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the normalisation on a 0..1 scale. Source: ImageNet, as published."""

    sync_bn: bool = False
    """Batch norm's statistics over all ranks in every step (GPUs only); false: local, brought together when weights are
    validated or saved."""

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

    batch_size: int = 1024
    """Images per optimiser step over all ranks and accumulation steps."""
    accumulate: int = 1
    """Forward/backward passes per optimiser step."""
    epochs: int = 300
    """Epochs of warm-up and cosine decay."""
    cooldown_epochs: int = 10
    """Further epochs at min_lr."""
    warmup_epochs: float = 5
    """Epochs of linear warm-up from warmup_lr; the cosine runs from epoch 0 (timm's order), so part of epochs."""
    max_steps: int | None = None
    """Stop after this many optimiser steps without changing the schedule (short runs); null: never."""
    lr: float = 1.6e-3
    """Peak learning rate at a batch of lr_base_batch; scaled linearly to batch_size. Paper: 1.6e-3 (L: 1e-3) at 1,024.
    """
    lr_base_batch: int = 1024
    """Batch size lr is stated for, images."""
    schedule_by: Literal["step", "epoch"] = "step"
    """The learning rate follows the schedule from step to step, or stays constant within an epoch (published code)."""
    min_lr: float = 1e-5
    """Learning rate at the cosine's end and in the cooldown, not scaled; equal to the peak: no decay. Source: published
    code."""
    warmup_lr: float = 1e-6
    """Learning rate of step 0, not scaled. Source: published code."""
    weight_decay: float = 0.05
    """AdamW's decay; none on norms, biases, class token and position embeddings."""
    layer_decay: float | None = None
    """Learning rate of a layer group as a share of the next one's, above 0 to 1 (fine-tuning); null: one rate for all.
    The last group, the heads, has lr itself. Source: BEiT (arXiv 2106.08254), groups as in timm."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays. Source: torch default, as published."""
    eps: float = 1e-8
    """AdamW's epsilon. Source: torch default, as published."""
    clip_grad: float | None = 1.0
    """Largest global gradient norm; null: no clipping. Source: ours, a guard (the published recipe does not clip)."""
    ema_decay: float = 0.99992
    """Decay per step of the weights' moving average, 0..1 exclusive; 0: the average is the weights. Source: published
    code."""
    ema_warmup: bool = True
    """The decay at step t is min(ema_decay, (1 + t) / (10 + t)); false: ema_decay from the first step on (published
    code)."""

    seed: int = 0
    """Seed of initialisation, sample order, crops, MixToken's boxes, mixup and drop path."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Autocast type; auto: bfloat16 on cuda, float32 on cpu. Weights stay float32."""
    compile: bool | None = None
    """torch.compile the step, from pixels to the loss; null: on cuda only."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = "default"
    """torch.compile's mode on cuda; reduce-overhead replays CUDA graphs, which needs accumulate 1. Not yet measured on
    a GPU."""
    attention_backend: Literal["default", "flash", "cudnn", "efficient", "math"] = "default"
    """What computes attention in a training step; default: torch's choice. One that the device lacks is refused at the
    start. Not yet measured on a GPU."""
    targets_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the token targets that the loader hands to the step, unused without token_label. The loss adds up in
    float32 either way. Not yet measured on a GPU."""
    deterministic: bool = False
    """Only operations with the same result every time, on GPUs at a price in speed. (On the CPU runs repeat bit for bit
    anyway.)"""
    bucket_mb: float = 25.0
    """Gradients that ranks exchange at a time, MiB. Source: torch's default."""
    timeout_minutes: float = 10.0
    """How long ranks wait for one that lives but does not answer. Above what compiling and writing a checkpoint take.
    """
    threads: int | None = None
    """Loader threads per rank; null: the loader's choice."""
    decode: Literal["auto", "cpu", "mixed", "hybrid"] = "auto"
    """Where JPEGs are decoded: cpu, with device cuda also mixed (nvJPEG) or hybrid (both at once); auto: cpu as long as
    the cores keep up with the step, else the faster of cpu and mixed, measured in the first steps."""
    hybrid_share: float | None = None
    """Share of the samples that nvJPEG decodes with decode hybrid, 0..1; null: measured at the start."""

    resume: str | None = None
    """auto: continue output_dir's newest intact checkpoint, if any; a path: a run's folder (its newest checkpoint) or a
    checkpoint's folder; null: start afresh."""
    checkpoint_every: int = 1
    """Epochs between checkpoints; the last epoch always has one."""
    checkpoint_minutes: float | None = 15.0
    """Minutes between further checkpoints within an epoch, by rank 0's clock: what a crash can cost; null: none."""
    checkpoint_steps: int | None = None
    """Optimiser steps between further checkpoints, counted over the run; null: none."""
    keep: int = 3
    """Checkpoints kept besides the best one."""
    eval_every: int = 1
    """Epochs between validations; the last epoch always has one."""
    crop_pct: float = 0.9
    """Validation's centre crop as a share of the resized image's sides. Source: published code for 224 px."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or skip the step; either way its samples are put on record.
    """
    max_skipped: int = 10
    """Steps that non_finite skip may skip in one run, resumptions included; one more stops it."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""

    def __post_init__(self) -> None:
        if not self.train_data:
            raise InputError(
                "train_data is required: the path of a .beton, a glob, or a list (--train_data FILE.beton)"
            )
        object.__setattr__(self, "img_size", one_if_square(self.img_size))
        for name, low, high in _RANGES:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(low <= number <= high for number in values):
                raise InputError(f"{name} must be in [{low}, {high}], got {value}")
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        for name in ("smoothing", "ema_decay", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3 or not all(0 <= v <= 1 for v in getattr(self, name)):
                raise InputError(f"{name} must be three numbers on a 0..1 scale, got {getattr(self, name)}")
        if min(self.std) == 0:
            raise InputError(f"std must be > 0, got {self.std}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be in [0, 1), got {self.betas}")
        self.augment  # noqa: B018  validates scale, ratio, flip, auto_augment ...
        clash = sorted(set(self.model_kwargs) & set(_MODEL_FIELDS))
        if clash:
            raise InputError(
                f"model_kwargs must not set {', '.join(clash)}: set "
                f"{', '.join(_MODEL_FIELDS[name] for name in clash)} itself"
            )
        if self.accumulate > 1 and self.compile_mode in ("reduce-overhead", "max-autotune"):
            raise InputError(
                f"compile_mode {self.compile_mode!r} uses CUDA graphs, whose next replay overwrites the "
                f"gradients that accumulate {self.accumulate} still adds up: set accumulate 1, or "
                "compile_mode default or max-autotune-no-cudagraphs"
            )
        if self.compile is False and self.compile_mode != "default":
            raise InputError(f"compile_mode {self.compile_mode!r} has no effect with compile false: choose one of them")
        if self.freeze == 0:
            raise InputError("freeze 0 would freeze nothing: set null, or a number of layer groups (1: the stem)")
        if self.sync_bn and self.freeze_stem_bn:
            raise InputError("sync_bn gathers statistics that freeze_stem_bn does not use: choose one of them")
        if self.sync_bn and self.device == "cpu":
            raise InputError("sync_bn needs GPUs (torch's SyncBatchNorm has no CPU version): device is cpu")
        if self.init_weights and self.resume not in (None, "auto"):
            raise InputError(
                f"init_weights {self.init_weights} would be overwritten by resume {self.resume}: choose one of them"
            )
        if not self.init_ema and not self.init_weights:
            raise InputError("init_ema false has no effect without init_weights: set init_weights")
        if self.pretrained and self.init_weights:
            raise InputError(f"pretrained would be overwritten by init_weights {self.init_weights}: choose one of them")
        if self.batch_size % self.accumulate:
            raise InputError(f"batch_size {self.batch_size} must be divisible by accumulate {self.accumulate}")
        if self.cls_weight == 0 and (self.dense_weight == 0 or not self.token_label):
            weights = f"cls_weight {self.cls_weight}, dense_weight {self.dense_weight}, token_label {self.token_label}"
            raise InputError(f"nothing to train on: {weights}")
        if self.ground_truth and not self.token_label:
            raise InputError(
                "ground_truth mixes the image label into the token labels' class target: it needs token_label true"
            )
        if self.labels == "argmax" and not self.token_label:
            raise InputError("labels argmax picks the token labels' strongest class: it needs token_label true")
        self._check_mixing()
        check_hybrid_share(self.hybrid_share, self.decode)
        if self.deterministic and self.decode == "hybrid" and self.hybrid_share is None:
            raise InputError(
                "deterministic needs a hybrid_share with decode hybrid: else it is measured at every start"
            )
        if self.warmup_epochs > self.epochs:
            raise InputError(f"warmup_epochs is part of epochs: {self.warmup_epochs} > {self.epochs}")
        if self.peak_lr < max(self.min_lr, self.warmup_lr):
            raise InputError(
                f"the peak lr {self.peak_lr:.3g} (= lr {self.lr} * batch_size {self.batch_size} / {self.lr_base_batch})"
                f" is below min_lr {self.min_lr} or warmup_lr {self.warmup_lr}: lower those"
            )

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
            fill=tuple(min(255, round(255 * value)) for value in self.mean),
        )

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of the model's constructor besides those of `build_model`: model_kwargs, and the switches that
        differ from their default. A model without a switch is then refused only where the switch is asked for."""
        changed = [name for name in _MODEL_SWITCHES if getattr(self, name) != getattr(TrainConfig, name)]
        return {**self.model_kwargs, **{name: getattr(self, name) for name in changed}}

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: lr scaled linearly to the batch size."""
        return self.lr * self.batch_size / self.lr_base_batch

    @property
    def total_epochs(self) -> int:
        """Epochs of schedule and cooldown together."""
        return self.epochs + self.cooldown_epochs

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as JSON and YAML hold them."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The config of a dict such as to_dict's. Raises ValueError for unknown keys."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise InputError(f"unknown configuration keys {unknown}")
        return cls(**{k: tuple(v) if k in _TUPLES and isinstance(v, list) else v for k, v in values.items()})


def _plain(value: Any) -> Any:
    """Tuples as lists, in whatever holds them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


# Fields that say how the model computes; its constructor's arguments have the same names.
_MODEL_SWITCHES = ("stem_space_to_depth", "residual_dtype", "drop_path_batched", "gelu")
# Arguments of the model's constructor that have a field of their own: the constructor's name -> ours.
_MODEL_FIELDS = {
    "img_size": "img_size",
    "num_classes": "num_classes",
    "drop_path_rate": "drop_path",
    "eval_token_weight": "eval_token_weight",
    **{name: name for name in _MODEL_SWITCHES},
}
# Fields with a fixed set of values, and these values.
_CHOICES = {name: get_args(hint) for name, hint in get_type_hints(TrainConfig).items() if get_origin(hint) is Literal}
_TUPLES = ("img_size", "mean", "std", "scale", "ratio", "betas")
# Both ends inclusive; Augment checks its own.
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("img_size", 16, 4096),
    ("num_classes", 1, MAX_CLASSES),
    ("eval_token_weight", 0, 1e6),
    ("cls_weight", 0, 1e6),
    ("dense_weight", 0, 1e6),
    ("mixup", 0, 1e3),
    ("cutmix", 0, 1e3),
    ("mixup_prob", 0, 1),
    ("mixup_switch_prob", 0, 1),
    ("batch_size", 1, 1 << 24),
    ("accumulate", 1, 1 << 16),
    ("epochs", 1, 1 << 20),
    ("cooldown_epochs", 0, 1 << 20),
    ("warmup_epochs", 0, 1 << 20),
    ("max_steps", 1, 1 << 40),
    ("lr", 1e-12, 1e3),
    ("lr_base_batch", 1, 1 << 24),
    ("min_lr", 0, 1e3),
    ("warmup_lr", 0, 1e3),
    ("weight_decay", 0, 1e3),
    ("layer_decay", 1e-6, 1),
    ("eps", 1e-30, 1),
    ("clip_grad", 1e-12, math.inf),
    ("seed", 0, (1 << 63) - 1),
    ("threads", 1, 4096),
    ("bucket_mb", 0.01, 1 << 20),
    ("timeout_minutes", 0.05, 1 << 20),
    ("checkpoint_minutes", 0, 1 << 20),
    ("checkpoint_steps", 1, 1 << 40),
    ("max_skipped", 0, 1 << 30),
    ("checkpoint_every", 1, 1 << 20),
    ("keep", 1, 1 << 20),
    ("eval_every", 1, 1 << 20),
    ("crop_pct", 0.05, 1),
    ("log_every", 1, 1 << 30),
)


class _Parser(ArgumentParser):
    """A parser that answers mistakes with one sentence, not with the usage of seventy options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        message = re.sub(r"\s*\n\s*", " ", message).strip()
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parse_config(arguments: Sequence[str] | None = None) -> TrainConfig:
    """The config of a command line: `--config recipe.yaml` (repeatable, later ones win) then `--field value`; None
    reads sys.argv.

    Unknown keys, wrong types and values out of range end the program with a message that names them.
    """
    return parse_command(arguments)[0]


def parse_command(arguments: Sequence[str] | None = None, prog: str = "train.py") -> tuple[TrainConfig, bool]:
    """The config of a command line, as parse_config has it; and whether `--traceback` is given. It then raises
    InputError for values out of range."""
    parser = _Parser(prog=prog, description="Train a vision transformer with token labeling from .beton files.")
    parser.add_argument("--config", action="config", help="YAML recipe; later flags and files override earlier ones")
    parser.add_argument("--traceback", action="store_true", help="show where in the code a mistake was met")
    parser.add_class_arguments(TrainConfig)
    values = parser.parse_args(arguments).as_dict()
    values.pop("config")
    traceback = values.pop("traceback")
    try:
        return TrainConfig(**values), traceback
    except InputError as error:
        if traceback:
            raise
        parser.error(str(error))


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved config as YAML that `--config` reads back."""
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False))
