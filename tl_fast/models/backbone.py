"""A network of timm's inside a model of ours: its names there, and how the optimiser takes both."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.models import group_parameters

BACKBONE = "backbone."  # in front of the backbone's names in the model's


class OnBackbone(nn.Module):
    """A model that puts parts of its own behind a network of timm's, `backbone`.

    create: makes such a network anew, unpruned, from timm's keyword arguments (`img_size`, `pretrained`, ...), for
    weights from files.
    """

    def __init__(self, backbone: nn.Module, create: Callable[..., nn.Module] | None = None) -> None:
        super().__init__()
        self.backbone, self.create_backbone = backbone, create

    def no_weight_decay(self) -> set[str]:
        """Parameters besides norms and biases that the optimiser must not decay: the backbone's."""
        names = getattr(self.backbone, "no_weight_decay", set)()
        return {BACKBONE + name for name in names}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """timm's layer groups: the backbone's own, and behind them the model's own parts, together with the backbone's
        classifier if it has one. Raises AttributeError for a backbone that states none."""
        layers = group_parameters(self.backbone, self.backbone.group_matcher(coarse=coarse), reverse=True)
        own = max(layers.values()) + (0 if self.backbone.num_classes else 1)
        return lambda name: (layers.get(name.removeprefix(BACKBONE), own),)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass instead of keeping their activations."""
        self.backbone.set_grad_checkpointing(enable)
