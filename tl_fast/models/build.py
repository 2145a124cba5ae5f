"""A model by its name."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm

from tl_fast.models.lvvit import LVViT
from tl_fast.models.token_label import TokenLabelModel
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import Sides

ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")  # how timm's names of models outside its registry begin


def build_model(
    name: str,
    *,
    img_size: Sides,
    num_classes: int,
    drop_path: float = 0.0,
    options: dict[str, Any] | None = None,
    eval_token_weight: float | None = None,
) -> LVViT | TokenLabelModel:
    """The model `name`, randomly initialised from torch's generator: an LVViT, or any other timm model with a token
    head.

    img_size: pixels a side, or (height, width); num_classes: C; drop_path: rate of the last block, 0..1 (timm's
    drop_path_rate); options: further arguments of the model's constructor; eval_token_weight: of the token logits'
    maximum in evaluation; None: 0.5 for LV-ViT and VOLO, as published, else 0.
    Raises InputError naming a bad argument, or what of the model's features gives no token for each cell of a grid.
    """
    check_name(name)
    with mistakes_named(name, img_size, options, "takes no token labels"):
        network, anew = create_with_drop_path(name, img_size, drop_path, num_classes=num_classes, options=options)
        if isinstance(network, LVViT):
            network.eval_token_weight = 0.5 if eval_token_weight is None else eval_token_weight
            return network
        return TokenLabelModel(network, img_size, eval_token_weight, anew)


def create_with_drop_path(
    name: str, img_size: Sides, drop_path: float, *, num_classes: int, options: dict[str, Any] | None
) -> tuple[nn.Module, Callable[..., nn.Module]]:
    """`create` with a drop path rate, which not every model takes: the network, and what makes such a one anew from
    further arguments. Raises what timm raises."""
    arguments = {**(options or {}), "num_classes": num_classes, "drop_path_rate": drop_path}
    anew = functools.partial(create, name, img_size=img_size, **arguments)
    try:
        return anew(), anew
    except TypeError as error:  # timm's only sign that a model has no drop path
        if drop_path or "'drop_path_rate'" not in str(error):
            raise
    del arguments["drop_path_rate"]
    anew = functools.partial(create, name, img_size=img_size, **arguments)
    return anew(), anew


@contextlib.contextmanager
def mistakes_named(name: str, img_size: Sides, options: dict[str, Any] | None, unfit: str) -> Iterator[None]:
    """Inside, mistakes in building a model become InputErrors that name it. unfit: the predicate of a sentence about a
    model whose features do not fit."""
    try:
        yield
    except InputError as error:
        raise InputError(f"model {name} at {img_size} px {unfit}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError, AttributeError, OSError) as error:
        hint = ": set drop_path 0, this model has none" if "'drop_path_rate'" in str(error) else ""
        given = f" with model_kwargs {options}" if options else ""
        raise InputError(f"model {name} at {img_size} px{given}: {error}{hint}") from error


def token_grid(name: str, *, img_size: Sides, options: dict[str, Any] | None = None) -> tuple[int, int]:
    """Tokens (high, wide) of the model at an image size. No weights are made. Raises InputError as build_model does."""
    with torch.device("meta"):
        return build_model(name, img_size=img_size, num_classes=1, options=options).grid_size


def without_weights(name: str) -> nn.Module:
    """timm's model at its own size on the meta device: to ask for names and shapes. Raises InputError for an unknown
    name."""
    check_name(name)
    with torch.device("meta"):
        return timm.create_model(name)


def create(name: str, img_size: Sides | None, **arguments: Any) -> nn.Module:
    """timm.create_model, with img_size (pixels a side, or (height, width)) for those models that are built for one."""
    if img_size is not None:
        try:
            return timm.create_model(name, img_size=img_size, **arguments)
        except TypeError as error:  # timm's only sign that a model, such as a CNN, takes any size
            if "img_size" not in str(error):
                raise
    return timm.create_model(name, **arguments)


def check_name(name: str, others: tuple[str, ...] = ()) -> None:
    """Raises InputError for a name that timm does not know, nor is among `others`, with the names that are near it."""
    if name.startswith(ELSEWHERE) or timm.is_model(name) or name in others:
        return
    near = difflib.get_close_matches(name, [*others, *timm.list_models()], n=4, cutoff=0.5)
    hint = f"; near it: {', '.join(near)}" if near else ""
    beside = f" neither among {', '.join(others)} nor" if others else " not"
    raise InputError(f"model {name!r} is{beside} known to timm{hint}")
