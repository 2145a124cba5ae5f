"""The network of a configuration."""

from __future__ import annotations

from torch import nn

from tl_fast.models.build import build_model
from tl_fast.training.config import TrainConfig


def build_network(config: TrainConfig) -> nn.Module:
    """The config's model, randomly initialised from torch's generator; `num_classes` must be resolved. Raises
    InputError naming what does not fit."""
    return build_model(
        config.model,
        img_size=config.img_size,
        grid=config.grid,
        num_classes=config.num_classes,
        drop_path=config.drop_path,
        options=config.model_kwargs,
    )
