"""Trained models: what a run's folder, a checkpoint or a weights file holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from tl_fast.models.build import without_weights
from tl_fast.models.weights import class_count, heads
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import Sides
from tl_fast.training import checkpoint
from tl_fast.training.config import TrainConfig
from tl_fast.training.network import build_network


def load_model(
    weights: str | Path, *, use_ema: bool = True, model: str | None = None, img_size: Sides | None = None
) -> nn.Module:
    """A trained model on the CPU, in eval mode: normalised images [B,3,H,W] to logits [B,C].

    weights: a run's folder (its newest checkpoint), a checkpoint's folder, or a weights file, which needs `model`, a
    timm name. use_ema: the moving average where there is one. img_size: pixels a side, or (height, width); None: the
    training's (224 for a file). `models.backbone_state_dict` of it is what stock timm takes.

    Raises CheckpointError or InputError naming what does not fit.
    """
    path, config, _ = find_trained(Path(weights), use_ema, {"model": model, "img_size": img_size})
    network = build_network(config)
    checkpoint.load_weights(network, path, use_ema)
    return network.eval()


def find_trained(weights: Path, use_ema: bool, changes: dict[str, Any]) -> tuple[Path, TrainConfig, list[str] | None]:
    """What `weights` means (`load_model`), the config to evaluate it with, and its class names if it has any.

    changes: fields that replace those of the checkpoint's config, where they are not None; `model` among them.
    """
    path = checkpoint.find(weights)
    meta = checkpoint.read_meta(path) if path.is_dir() else {}
    task = meta.get("task", "classification")  # checkpoints of earlier versions do not say
    if task != "classification":
        raise InputError(f"{path} is of a {task} run, and no classifier: evaluate it with tl-fast segment --evaluate")
    if not meta and changes["model"] is None:
        raise InputError(f"{path} does not say which model it is: give --model (lvvit_s, say, or any name of timm's)")
    values = meta["config"] if meta else {"train_data": "unused: evaluation only"}
    values |= {name: value for name, value in changes.items() if value is not None}
    config = TrainConfig.from_dict(values | {"drop_path": 0.0, "resume": None})
    if config.num_classes is None:  # a bare file: its head says
        state, _ = checkpoint.read_weights(path, use_ema)
        names = heads(without_weights(config.model))
        classes = class_count(state, names)
        if classes is None:
            raise InputError(f"{path} has no {names[0]}.weight, so no class count: it is no classifier {config.model}")
        config = dataclasses.replace(config, num_classes=classes)
    return path, config, meta.get("class_names")
