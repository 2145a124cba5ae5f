"""The optimiser and learning-rate schedule of a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler

from tl_fast.models.token_label import backbone_of
from tl_fast.system.mistakes import InputError
from tl_fast.training.config import TrainConfig
from tl_fast.training.run_config import RunConfig
from tl_fast.training.segment_config import SegmentConfig


def build_optimizer(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no decay on norms, biases, class token and position embeddings.

    With layer_decay every parameter group has an `lr_scale`, by which the schedule multiplies its rates. The model's
    layer groups are those of its `group_matcher()`, as timm's models have it. Raises InputError for a model without.
    """
    # timm's models without such parameters have no such method.
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    if config.layer_decay is None:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=spared)
    elif hasattr(backbone_of(model), "group_matcher"):
        groups = param_groups_layer_decay(model, config.weight_decay, spared, layer_decay=config.layer_decay)
    else:
        raise InputError(
            f"layer_decay {config.layer_decay}: model {config.model!r} ({type(backbone_of(model)).__name__}) has no"
            " layer groups (no group_matcher): set layer_decay null"
        )
    return torch.optim.AdamW(groups, lr=config.peak_lr, betas=config.betas, eps=config.eps, fused=True)


def highest_lr(optimizer: torch.optim.Optimizer) -> float:
    """The largest learning rate of all parameter groups: the schedule's own, as the last layers have it."""
    return max(group["lr"] for group in optimizer.param_groups)


class Schedule(Protocol):
    """The learning rate, a function of the global step alone. A parameter group with an `lr_scale` gets that share of
    it."""

    def step_update(self, step: int) -> None:
        """Set the optimiser's learning rate for the step that comes after `step` others."""


@dataclass(frozen=True)
class CosineSchedule:
    """timm's cosine with warm-up."""

    cosine: CosineLRScheduler  # over steps, or over epochs
    steps: int  # for which a learning rate holds

    def step_update(self, step: int) -> None:
        self.cosine.step_update(step // self.steps)


def build_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> CosineSchedule:
    """Linear warm-up, cosine to min_lr over `epochs`, min_lr after: at every step or, by epoch, the same within
    one."""
    by_step = config.schedule_by == "step"
    length = steps_per_epoch if by_step else 1  # of an epoch, in the scheduler's units
    cosine = CosineLRScheduler(
        optimizer,
        t_initial=config.epochs * length,
        lr_min=config.min_lr,
        t_in_epochs=False,
        warmup_t=round(config.warmup_epochs * steps_per_epoch) if by_step else config.warmup_epochs,
        warmup_lr_init=config.warmup_lr,
    )
    return CosineSchedule(cosine, 1 if by_step else steps_per_epoch)


@dataclass(frozen=True)
class PolySchedule:
    """mmsegmentation's: a polynomial from `lr` to `min_lr` over `steps`, and during the first `warmup_steps` a share of
    it that rises linearly from `warmup_ratio` to 1. (timm's PolyLRScheduler rises to `lr` itself instead, from which it
    then drops onto the polynomial.)"""

    optimizer: torch.optim.Optimizer
    lr: float
    min_lr: float
    steps: int
    power: float
    warmup_steps: int
    warmup_ratio: float

    def step_update(self, step: int) -> None:
        lr = self.rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def rate(self, step: int) -> float:
        """The learning rate of the step that comes after `step` others."""
        left = max(1 - step / self.steps, 0.0)
        lr = self.min_lr + (self.lr - self.min_lr) * left**self.power
        if step < self.warmup_steps:
            lr *= 1 - (1 - step / self.warmup_steps) * (1 - self.warmup_ratio)
        return lr


def build_poly_schedule(optimizer: torch.optim.Optimizer, config: SegmentConfig) -> PolySchedule:
    """The schedule of a segmentation run."""
    return PolySchedule(
        optimizer,
        lr=config.peak_lr,
        min_lr=config.min_lr,
        steps=config.steps,
        power=config.poly_power,
        warmup_steps=config.warmup_steps,
        warmup_ratio=config.warmup_ratio,
    )
