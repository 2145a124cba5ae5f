"""Which layer group a parameter is of, by its name alone: an oracle for timm's `group_matcher`."""

from __future__ import annotations

import re

from tiny_runs import TINY
from torch import nn

import tl_fast.models.lvvit  # noqa: F401  registers lvvit_t with timm

# isort: split
import timm


def numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\.(\d+)", name)]


def layer_of_vit(name: str) -> int:
    """Two blocks; the last one's group has the final norm, too."""
    if name.startswith("blocks."):
        return 1 + numbers(name)[0]
    return {"head": 3, "norm": 2}.get(name.split(".")[0], 0)


def layer_of_lvvit(name: str) -> int:
    """Two blocks; the final norm is in the heads' group."""
    if name.startswith("blocks."):
        return 1 + numbers(name)[0]
    return 0 if name.startswith(("patch_embed.", "cls_token", "pos_embed")) else 3


def layer_of_swin(name: str) -> int:
    """Stages of 1, 1, 2 and 1 blocks; a downsampling is in the group of the first block behind it."""
    if name.startswith("layers."):
        stage, *rest = numbers(name)
        return [1, 2, 3, 5][stage] + (rest[0] if ".blocks." in name else 0)
    return {"head": 6, "norm": 5, "patch_embed": 0}[name.split(".")[0]]


def layer_of_convnext(name: str) -> int:
    """Stages of 1, 1, 2 and 1 blocks, as in Swin; the final norm is in the head."""
    if name.startswith("stages."):
        stage, *rest = numbers(name)
        return [1, 2, 3, 5][stage] + (rest[0] if ".blocks." in name else 0)
    return {"head": 6, "stem": 0}[name.split(".")[0]]


def layer_of_resnet(name: str) -> int:
    """Four stages of one block."""
    stage = re.match(r"layer(\d)\.", name)
    return int(stage[1]) if stage else {"fc": 5, "conv1": 0, "bn1": 0}[name.split(".")[0]]


# A model's name: the arguments that make it small, and its parameters' groups.
MODELS = {
    "lvvit_t": (dict(TINY, img_size=64), layer_of_lvvit),
    "vit_tiny_patch16_224": (dict(depth=2, img_size=64), layer_of_vit),
    "swin_tiny_patch4_window7_224": (
        dict(depths=(1, 1, 2, 1), embed_dim=16, num_heads=(1, 1, 2, 2), img_size=64, window_size=4),
        layer_of_swin,
    ),
    "convnext_atto": (dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32)), layer_of_convnext),
    "test_resnet": ({}, layer_of_resnet),
}


def small_model(name: str) -> nn.Module:
    """A model of MODELS for 4 classes."""
    return timm.create_model(name, num_classes=4, **MODELS[name][0])
