"""What a run trains, and what trains it: model, moving average, optimiser, learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.utils import ModelEmaV3

from tl_fast.models.normalise import resolved_dtype
from tl_fast.training.optimiser import Schedule, build_optimizer
from tl_fast.training.task import Task


@dataclass(frozen=True)
class Learner:
    """A bare model on its device, its moving average `ema.module`, and what changes them."""

    model: nn.Module
    ema: ModelEmaV3
    optimizer: torch.optim.AdamW
    schedule: Schedule


def build_learner(task: Task, steps_per_epoch: int, *, load_init_weights: bool) -> tuple[Learner, list[str]]:
    """The learner of a task before its first step; remarks for the user: what of the weights it starts from was
    adapted, and which options have no effect. Every rank calls it."""
    config, ranks = task.config, task.ranks
    torch.manual_seed(config.seed)
    model = ranks.agree(task.build_network)
    remarks = _load_weights(task, model) if load_init_weights else []
    remarks += ranks.agree(task.prepare, model)
    on_gpu = ranks.device.type == "cuda"
    model.to(ranks.device, memory_format=torch.channels_last if on_gpu else torch.preserve_format)
    if config.compile_mode != "default" and not on_gpu:
        remarks.append(f"compile_mode {config.compile_mode} has no effect on the CPU")
    if config.residual_dtype != "float32" and resolved_dtype(ranks.device, config.dtype) == "float32":
        remarks.append(f"residual_dtype {config.residual_dtype} has no effect: without autocast all is float32")
    if config.sync_bn and ranks.world_size == 1:
        remarks.append("sync_bn has no effect on one rank, whose statistics are everybody's")
    elif config.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # With this gamma and power, timm's warm-up is min(decay, (1 + t) / (10 + t)) at step t, when told step t + 2.
    ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=config.ema_warmup, warmup_gamma=9, warmup_power=1)
    optimizer = ranks.agree(build_optimizer, model, config)
    return Learner(model, ema, optimizer, task.build_schedule(optimizer, steps_per_epoch)), remarks


def _load_weights(task: Task, model: nn.Module) -> list[str]:
    """Load the weights that the config starts from on rank 0, which passes them on: the others need not see files or
    hub. Remarks on what was adapted."""
    config, ranks = task.config, task.ranks
    if not (config.init_weights or config.pretrained):
        return []
    remarks = ranks.on_main(task.read_weights, model)
    ranks.fill_from_main(model.state_dict().values())
    return remarks
