"""What the configurations of all tasks have in common: fields, their checks, and how they are read and written."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from tl_fast.pipeline.ways import check_hybrid_share
from tl_fast.sources.source import MAX_CLASSES
from tl_fast.system.mistakes import InputError
from tl_fast.training.milestones import Milestones

# Fields that say how the model computes; its constructor's arguments have the same names.
_MODEL_SWITCHES = ("stem_space_to_depth", "residual_dtype", "drop_path_batched", "gelu")


@dataclass(frozen=True)
class RunConfig:
    """Settings that every run has. Defaults are those of classification."""

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
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean RGB of the normalisation on a 0..1 scale. Source: ImageNet, as published."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of the normalisation on a 0..1 scale. Source: ImageNet, as published."""
    sync_bn: bool = False
    """Batch norm's statistics over all ranks in every step (GPUs only); false: local, brought together when weights are
    validated or saved."""

    batch_size: int = 1024
    """Images per optimiser step over all ranks and accumulation steps."""
    accumulate: int = 1
    """Forward/backward passes per optimiser step."""
    max_steps: int | None = None
    """Stop after this many optimiser steps without changing the schedule (short runs); null: never."""
    min_lr: float = 1e-5
    """Learning rate at the cosine's end and in the cooldown, not scaled; equal to the peak: no decay. Source: published
    code."""
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
    """Seed of initialisation, sample order, crops, drop path, and of everything else that is drawn."""
    order: Literal["shuffled", "grouped"] = "shuffled"
    """Order of the training samples, new every epoch: free, or in groups by sample id of which every batch takes equal
    parts, so that a rank needs the samples of its own groups alone (1, 2, 4, 8, 16, 32 or 64 ranks)."""
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
    checkpoint_minutes: float | None = 15.0
    """Minutes between further checkpoints within an epoch, by rank 0's clock: what a crash can cost; null: none."""
    checkpoint_steps: int | None = None
    """Optimiser steps between further checkpoints, counted over the run; null: none."""
    keep: int = 3
    """Checkpoints kept besides the best one."""
    non_finite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop the run, or skip the step; either way its samples are put on record.
    """
    max_skipped: int = 10
    """Steps that non_finite skip may skip in one run, resumptions included; one more stops it."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""

    fixed_on_resume: ClassVar[tuple[str, ...]] = (
        "model",
        "model_kwargs",
        "num_classes",
        "layer_decay",
        "batch_size",
        "seed",
        "order",
    )
    """Fields without which a run continued would be neither the old run nor a new one."""
    model_fields: ClassVar[dict[str, str]] = {
        "num_classes": "num_classes",
        "drop_path_rate": "drop_path",
        **{name: name for name in _MODEL_SWITCHES},
    }
    """Arguments of the model's constructor that have a field of their own: the constructor's name -> ours."""
    ranges: ClassVar[tuple[tuple[str, float, float], ...]] = (
        ("num_classes", 1, MAX_CLASSES),
        ("batch_size", 1, 1 << 24),
        ("accumulate", 1, 1 << 16),
        ("max_steps", 1, 1 << 40),
        ("min_lr", 0, 1e3),
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
        ("keep", 1, 1 << 20),
        ("log_every", 1, 1 << 30),
    )
    """Fields, and the least and the largest value of their numbers."""

    def __post_init__(self) -> None:
        if not self.train_data:
            raise InputError(
                "train_data is required: the path of a .beton, a glob, or a list (--train_data FILE.beton)"
            )
        self._check_values()
        clash = sorted(set(self.model_kwargs) & set(self.model_fields))
        if clash:
            raise InputError(
                f"model_kwargs must not set {', '.join(clash)}: set "
                f"{', '.join(self.model_fields[name] for name in clash)} itself"
            )
        self._check_compilation()
        if self.sync_bn and self.device == "cpu":
            raise InputError("sync_bn needs GPUs (torch's SyncBatchNorm has no CPU version): device is cpu")
        self._check_weights()
        if self.batch_size % self.accumulate:
            raise InputError(f"batch_size {self.batch_size} must be divisible by accumulate {self.accumulate}")
        check_hybrid_share(self.hybrid_share, self.decode)
        if self.deterministic and self.decode == "hybrid" and self.hybrid_share is None:
            raise InputError(
                "deterministic needs a hybrid_share with decode hybrid: else it is measured at every start"
            )

    def _check_values(self) -> None:
        """Values of single fields."""
        for name, low, high in self.ranges:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else () if value is None else (value,)
            if not all(low <= number <= high for number in values):
                raise InputError(f"{name} must be in [{low}, {high}], got {value}")
        for name, allowed in _choices(type(self)).items():
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        for name in ("ema_decay", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3 or not all(0 <= v <= 1 for v in getattr(self, name)):
                raise InputError(f"{name} must be three numbers on a 0..1 scale, got {getattr(self, name)}")
        if min(self.std) == 0:
            raise InputError(f"std must be > 0, got {self.std}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be in [0, 1), got {self.betas}")

    def _check_compilation(self) -> None:
        if self.accumulate > 1 and self.compile_mode in ("reduce-overhead", "max-autotune"):
            raise InputError(
                f"compile_mode {self.compile_mode!r} uses CUDA graphs, whose next replay overwrites the "
                f"gradients that accumulate {self.accumulate} still adds up: set accumulate 1, or "
                "compile_mode default or max-autotune-no-cudagraphs"
            )
        if self.compile is False and self.compile_mode != "default":
            raise InputError(f"compile_mode {self.compile_mode!r} has no effect with compile false: choose one of them")

    def _check_weights(self) -> None:
        if self.init_weights and self.resume not in (None, "auto"):
            raise InputError(
                f"init_weights {self.init_weights} would be overwritten by resume {self.resume}: choose one of them"
            )
        if not self.init_ema and not self.init_weights:
            raise InputError("init_ema false has no effect without init_weights: set init_weights")
        if self.pretrained and self.init_weights:
            raise InputError(f"pretrained would be overwritten by init_weights {self.init_weights}: choose one of them")

    @property
    def model_options(self) -> dict[str, Any]:
        """Arguments of the model's constructor besides those that every model has: model_kwargs, and the switches that
        differ from their default. A model without a switch is then refused only where the switch is asked for."""
        changed = [name for name in _MODEL_SWITCHES if getattr(self, name) != getattr(RunConfig, name)]
        return {**self.model_kwargs, **{name: getattr(self, name) for name in changed}}

    @property
    def fill(self) -> tuple[int, int, int]:
        """The mean as a colour, RGB 0..255."""
        return tuple(min(255, round(255 * value)) for value in self.mean)

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up, of a whole batch."""
        raise NotImplementedError

    def milestones(self, steps_per_epoch: int) -> Milestones:
        """When the run validates, saves and ends."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as JSON and YAML hold them."""
        return _plain(dataclasses.asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config of a dict such as to_dict's. Raises ValueError for unknown keys."""
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise InputError(f"unknown configuration keys {unknown}")
        tuples = _tuples(cls)
        return cls(**{k: tuple(v) if k in tuples and isinstance(v, list) else v for k, v in values.items()})


def _plain(value: Any) -> Any:
    """Tuples as lists, in whatever holds them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


@functools.cache
def _choices(config: type[RunConfig]) -> dict[str, tuple[Any, ...]]:
    """Fields with a fixed set of values, and these values."""
    return {name: get_args(hint) for name, hint in get_type_hints(config).items() if get_origin(hint) is Literal}


@functools.cache
def _tuples(config: type[RunConfig]) -> set[str]:
    """Fields whose value may be a tuple."""
    hints = get_type_hints(config)
    names = {entry.name for entry in dataclasses.fields(config)}
    return {name for name in names if tuple in map(get_origin, (hints[name], *get_args(hints[name])))}
