"""The model of a config."""

from __future__ import annotations

from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm

from tl_fast.models.lvvit import LVViT
from tl_fast.system.mistakes import InputError
from tl_fast.training.config import TrainConfig


def build_model(config: TrainConfig) -> nn.Module:
    """The config's model, randomly initialised from torch's generator; `num_classes` must be resolved.

    Raises ValueError naming a bad argument, or a model without a token head for each of the config's tokens.
    """
    try:
        model = timm.create_model(
            config.model,
            img_size=config.img_size,
            num_classes=config.num_classes,
            drop_path_rate=config.drop_path,
            **config.model_kwargs,
        )
    except (TypeError, ValueError, ArithmeticError) as error:  # the constructor does not have such arguments, or values
        raise InputError(f"model {config.model} with model_kwargs {config.model_kwargs}: {error}") from error
    except RuntimeError as error:  # timm's "Unknown model"
        raise InputError(f"model {config.model!r}: {error}; {_MODELS}") from error
    if not isinstance(model, LVViT):
        raise InputError(
            f"model {config.model!r} is a {type(model).__name__}, which has no token labeling (a head "
            f"for patch tokens, MixToken): {_MODELS}"
        )
    if model.grid_size != (config.grid, config.grid):
        raise InputError(
            f"model {config.model!r} has a grid of {model.grid_size} tokens, the label maps are cut to "
            f"{config.grid}x{config.grid} for img_size {config.img_size}: {_MODELS}"
        )
    return model


_MODELS = "lvvit_t, lvvit_s, lvvit_m and lvvit_l exist"
