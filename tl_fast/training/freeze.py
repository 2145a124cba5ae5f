"""Layers that a run leaves as they are."""

from __future__ import annotations

from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.models import group_parameters

from tl_fast.models.token_label import backbone_of
from tl_fast.system.mistakes import InputError
from tl_fast.training.config import TrainConfig


def freeze_layers(model: nn.Module, config: TrainConfig) -> str:
    """Freeze the parameters of the model's layer groups `[:config.freeze]`; what is frozen, for the user.

    The groups are those of the model's `group_matcher()`, as timm's models have it, from the input to the heads. Raises
    InputError for a model without, and where no group or every group would be frozen.
    """
    count = config.freeze
    if not hasattr(backbone_of(model), "group_matcher"):
        raise InputError(
            f"freeze {count}: model {config.model!r} ({type(backbone_of(model)).__name__}) has no layer groups (no"
            " group_matcher): set freeze null"
        )
    groups = list(group_parameters(model, model.group_matcher(coarse=False)).values())
    last = len(groups) - 1
    if not 1 <= abs(count) <= last:
        raise InputError(
            f"freeze {count}: model {config.model!r} has {len(groups)} layer groups, of which one at least must learn: "
            f"set 1 to {last} for the first ones, or -1 to {-last} for all but the last ones"
        )
    frozen = {name for group in groups[:count] for name in group}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return (
        f"freeze {count}: {len(groups[:count])} of {len(groups)} layer groups keep their weights, "
        f"{sum(sizes[name] for name in frozen) / 1e6:.2f} of {sum(sizes.values()) / 1e6:.2f} M parameters; the first "
        f"layer that learns holds {groups[count][0]}"
    )
