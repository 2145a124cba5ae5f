"""The network of a classification run, the step that trains it, and how any step is compiled and distributed."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tl_fast.models.build import build_model, token_grid
from tl_fast.models.loss import TokenLabelLoss
from tl_fast.models.normalise import Normalise
from tl_fast.models.step import TrainStep, compiled, usable_attention_backends
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import Ranks
from tl_fast.system.sides import Sides
from tl_fast.training.config import TrainConfig
from tl_fast.training.run_config import RunConfig

# What torch before 2.13 calls broadcast_buffers, and later ones warn of.
_DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
_BUFFER_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


def build_network(config: TrainConfig) -> nn.Module:
    """The config's model, randomly initialised from torch's generator; `num_classes` must be resolved. Raises
    InputError naming what does not fit."""
    return build_model(
        config.model,
        img_size=config.img_size,
        num_classes=config.num_classes,
        drop_path=config.drop_path,
        options=config.model_options,
        eval_token_weight=config.eval_token_weight,
    )


def grid_of(config: TrainConfig) -> tuple[int, int]:
    """(rows, columns) of tokens of the config's model, which its label maps are cut to. Raises InputError as
    `build_network` does."""
    return token_grid(config.model, img_size=config.img_size, options=config.model_options)


def silence_token_head(model: nn.Module) -> None:
    """Zero and freeze the token head: untrained, its maximum would be noise in the eval logits, as far as it counts
    there."""
    for parameter in model.get_token_head().parameters():
        nn.init.zeros_(parameter)
        parameter.requires_grad_(False)


def set_train(model: nn.Module, freeze_norms: bool = False) -> None:
    """Train mode, but batch norms stay in eval mode where their scale is frozen, and with freeze_norms all of them
    (their scale and shift still learn)."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            frozen = module.weight is not None and not module.weight.requires_grad
            if freeze_norms or frozen:
                module.eval()


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether the training step is compiled: by default on GPUs."""
    return device.type == "cuda" if config.compile is None else config.compile


def check_attention(model: nn.Module, size: Sides, config: RunConfig, device: torch.device) -> None:
    """Raises InputError where the device lacks the config's attention backend for images of `size` pixels."""
    if config.attention_backend == "default":
        return
    usable = usable_attention_backends(model, size, device, config.dtype)
    if config.attention_backend not in usable:
        raise InputError(
            f"attention_backend {config.attention_backend!r} does not run model {config.model} on {device.type} with"
            f" dtype {config.dtype}: set {', '.join(('default', *usable))}"
        )


def build_step(model: nn.Module, config: TrainConfig, ranks: Ranks) -> nn.Module:
    """The `TrainStep` of a model, which stays the caller's; compiled where the config asks for it, and with several
    ranks in DistributedDataParallel. Every rank calls it; raises InputError where a rank lacks the attention
    backend."""
    ranks.agree(check_attention, model, config.img_size, config, ranks.device)
    criterion = TokenLabelLoss(config.cls_weight, config.dense_weight if config.token_label else 0.0)
    normalise = Normalise(config.mean, config.std).to(ranks.device)
    hard_labels = config.smoothing if config.labels == "argmax" else None
    step = TrainStep(model, criterion, normalise, config.dtype, config.attention_backend, hard_labels)
    return over_ranks(step, config, ranks)


def over_ranks(step: nn.Module, config: RunConfig, ranks: Ranks) -> nn.Module:
    """A step, compiled where the config asks for it, and with several ranks in DistributedDataParallel."""
    if compiles(config, ranks.device):
        step = compiled(step, ranks.device, config.compile_mode)
    if ranks.world_size == 1:
        return step
    # DDP goes around the compiled module: the other way round its own forward breaks the graph. Batch norm's statistics
    # stay local during an epoch; Ranks.average_buffers brings them together at its end.
    return DistributedDataParallel(
        step,
        gradient_as_bucket_view=True,
        static_graph=config.accumulate == 1,
        bucket_cap_mb=config.bucket_mb,
        **{_BUFFER_SYNC: False},
    )
