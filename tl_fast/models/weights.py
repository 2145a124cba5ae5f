"""Weights from files of any origin, and how they are fitted to a model."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tl_fast.models.lvvit import resize_pos_embed
from tl_fast.system.mistakes import InputError

_HEADS = ("head.", "aux_head.")


class WeightsError(InputError):
    """Weights that cannot be used; names the file and what is wrong with it."""


def read_file(path: Path, use_ema: bool = True) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict in a weights file, on the CPU, without wrappers' prefixes; and remarks on what was chosen.

    Takes safetensors, a bare state dict, or a dict with `state_dict_ema`, `state_dict` or `model`, as timm and the
    published `.pth.tar` have. Raises WeightsError naming the file.
    """
    remarks: list[str] = []
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm stores its arguments beside the weights
                content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as weights (torn, or not a weights file): {error}") from error
    if isinstance(content, dict):
        keys = [key for key in ("state_dict_ema", "state_dict", "model") if isinstance(content.get(key), dict)]
        if not use_ema and keys[:1] == ["state_dict_ema"] and len(keys) > 1:
            keys = keys[1:]
        if keys:
            content = content[keys[0]]
            remarks.append(f"{path}: took its {keys[0]}")
        elif use_ema:
            remarks.append(f"{path} holds one set of weights, taken as they are")
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            f"{path} holds no state dict (expected tensors by name, perhaps under state_dict or state_dict_ema)"
        )
    for prefix in ("module.", "_orig_mod."):
        content = {key.removeprefix(prefix): value for key, value in content.items()}
    return content, remarks


def fit(model: nn.Module, state: dict[str, Tensor], path: Path) -> list[str]:
    """Load a state dict into an LV-ViT; remarks on what was adapted, to be shown to the user.

    Position embeddings are resized to the model's grid. Heads of another class count are left out, so the model keeps
    its own. path: where the weights come from, for messages. Raises WeightsError when anything else does not fit.
    """
    remarks: list[str] = []
    state, own = dict(state), model.state_dict()
    position = state.get("pos_embed")
    if position is not None and position.ndim == 3 and position.shape != own["pos_embed"].shape:
        try:
            state["pos_embed"] = resize_pos_embed(position, model.grid_size)
        except ValueError as error:
            raise WeightsError(f"{path} does not fit {type(model).__name__}: {error}") from error
        remarks.append(
            f"{path}: resized pos_embed from {position.shape[1] - 1} to {own['pos_embed'].shape[1] - 1} tokens"
        )
    dropped = {key for key in state if key.startswith(_HEADS) and key in own and state[key].shape != own[key].shape}
    if dropped:
        names = ", ".join(f"{key} ({state[key].shape[0]} classes)" for key in sorted(dropped) if key.endswith("weight"))
        remarks.append(
            f"{path}: left out {names}, as the model has {model.num_classes} classes: these heads keep their initial"
            " weights"
        )
    kept = sorted(key for key in state if key.startswith(_HEADS) and key.endswith("weight") and key not in dropped)
    if kept:
        remarks.append(f"{path}: kept {', '.join(kept)} ({model.num_classes} classes)")
    state = {key: value for key, value in state.items() if key not in dropped}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes that differ
        raise WeightsError(f"{path} does not fit {type(model).__name__}: {error}") from error
    missing = sorted(set(missing) - dropped)
    if missing or unexpected:
        raise WeightsError(
            f"{path} does not fit {type(model).__name__}: missing {missing[:5]}, unexpected {sorted(unexpected)[:5]}"
        )
    return remarks
