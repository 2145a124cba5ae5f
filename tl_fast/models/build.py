"""A model by its name."""

from __future__ import annotations

from typing import Any

from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm

from tl_fast.models.lvvit import LVViT
from tl_fast.system.mistakes import InputError

_MODELS = "lvvit_t, lvvit_s, lvvit_m and lvvit_l exist"


def build_model(
    name: str,
    *,
    img_size: int,
    grid: int,
    num_classes: int,
    drop_path: float = 0.0,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """The model `name`, randomly initialised from torch's generator.

    img_size: pixels a side; grid: tokens a side that its labels are made for; num_classes: C; drop_path: rate of the
    last block, 0..1; options: further arguments of the model's constructor.
    Raises InputError naming a bad argument, or a model without a token head for each of grid x grid tokens.
    """
    options = options or {}
    try:
        model = timm.create_model(name, img_size=img_size, num_classes=num_classes, drop_path_rate=drop_path, **options)
    except (TypeError, ValueError, ArithmeticError) as error:  # the constructor does not have such arguments, or values
        raise InputError(f"model {name} with model_kwargs {options}: {error}") from error
    except RuntimeError as error:  # timm's "Unknown model"
        raise InputError(f"model {name!r}: {error}; {_MODELS}") from error
    if not isinstance(model, LVViT):
        raise InputError(
            f"model {name!r} is a {type(model).__name__}, which has no token labeling (a head "
            f"for patch tokens, MixToken): {_MODELS}"
        )
    if model.grid_size != (grid, grid):
        raise InputError(
            f"model {name!r} has a grid of {model.grid_size} tokens, the label maps are cut to "
            f"{grid}x{grid} for img_size {img_size}: {_MODELS}"
        )
    return model
