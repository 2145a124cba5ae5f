"""Weights from files of any origin, and how they are fitted to a model."""

from __future__ import annotations

import argparse
import inspect
import pickle
from collections.abc import Iterable
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tl_fast.models.backbone import BACKBONE
from tl_fast.models.lvvit import PATCH, LVViT, resize_pos_embed
from tl_fast.models.segmentation import Segmenter
from tl_fast.models.token_label import TokenLabelModel, backbone_of
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import Sides, both_sides

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


def fit(model: nn.Module, state: dict[str, Tensor], path: Path, trained_size: Sides | None = None) -> list[str]:
    """Load a state dict into a model of `build_model` or `build_segmenter`; remarks on what was adapted, to be shown to
    the user.

    Position embeddings are resized to the model's grid. Heads of another class count are left out, so the model keeps
    its own. A TokenLabelModel takes its own names and those of its backbone alone, as timm knows them. A Segmenter
    takes its own names, and those of a classifier for its backbone, whose heads are left out.
    path: where the weights come from, for messages. trained_size: pixels that they were trained at; None: of a square.
    Raises WeightsError when anything else does not fit.
    """
    if isinstance(model, TokenLabelModel):
        return _fit_token_label_model(model, state, path, trained_size)
    if isinstance(model, Segmenter):
        return _fit_segmenter(model, state, path, trained_size)
    remarks: list[str] = []
    state, own = dict(state), model.state_dict()
    position = state.get("pos_embed")
    grid = None if trained_size is None else tuple(side // PATCH for side in both_sides(trained_size))
    fits = position is None or (position.shape == own["pos_embed"].shape and grid in (None, model.grid_size))
    if not fits and position.ndim == 3:
        try:
            state["pos_embed"] = resize_pos_embed(position, model.grid_size, grid)
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


def _fit_token_label_model(
    model: TokenLabelModel, state: dict[str, Tensor], path: Path, trained_size: Sides | None
) -> list[str]:
    """`fit`, by way of a backbone made for the state's class count."""
    of_token_head = {key.removeprefix("token_head."): state[key] for key in state if key.startswith("token_head.")}
    donor, classes, resized = _loaded_by_timm(model, _of_backbone(state), path, trained_size)
    remarks = _take_backbone(model, donor, classes, str(path)) + resized
    if not model.has_own_token_head:
        if of_token_head and of_token_head["weight"].shape == model.token_head.weight.shape:
            model.token_head.load_state_dict(of_token_head)
        else:
            remarks.append(f"{path}: holds no token head for {model.num_classes} classes, so that one starts anew")
    return remarks


def _of_backbone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's weights under its own names; all of a state dict without a backbone."""
    return {key.removeprefix(BACKBONE): value for key, value in state.items() if key.startswith(BACKBONE)} or state


def _loaded_by_timm(
    model: TokenLabelModel | Segmenter, state: dict[str, Tensor], path: Path, trained_size: Sides | None
) -> tuple[nn.Module, int, list[str]]:
    """A network such as the model's backbone, classifier included, with the weights of a state dict; its class count;
    remarks on what was resized.

    timm's own loader renames what other code saved and resizes what depends on the image size. It takes all weights for
    a square's, so that of those of another rectangle the network is made for that one first. Raises WeightsError.
    """
    classes = class_count(state, heads(model.backbone)) or 0
    overlay = dict(state_dict=dict(state), num_classes=classes, source="", custom_load=False, label_offset=0)
    name, size = type(model.backbone).__name__, both_sides(trained_size or model.img_size)
    if size[0] == size[1]:
        size = model.img_size
    try:
        donor = model.create_backbone(
            img_size=size, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay
        )
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:  # raised where names or shapes differ
        raise WeightsError(f"{path} does not fit {name}: {error}") from error
    if size != model.img_size:
        _resize(donor, model, f"{path} was trained at {size} px, and")
    resized = [
        f"{key} from {list(state[key].shape)} to {list(value.shape)}"
        for key, value in donor.state_dict().items()
        if key in state and state[key].shape != value.shape
    ]
    more = f", and {len(resized) - 1} more" if resized[1:] else ""
    return donor, classes, [f"{path}: resized {resized[0]}{more}"] if resized else []


def _fit_segmenter(model: Segmenter, state: dict[str, Tensor], path: Path, trained_size: Sides | None) -> list[str]:
    """`fit`, by way of a whole network such as the backbone was before it was pruned."""
    own, of_backbone = model.state_dict(), _of_backbone(state)
    is_segmenter = any(key in own and not key.startswith(BACKBONE) for key in state)
    if is_segmenter:
        # What the segmenter pruned, its checkpoint lacks: a new network's weights stand in, and nobody reads them.
        _check_names(own, state, path, type(model).__name__)
        of_backbone = {**model.create_backbone().state_dict(), **of_backbone}
    if isinstance(model.backbone, LVViT):
        donor = model.create_backbone()  # without heads
        without_heads = {key: value for key, value in of_backbone.items() if not key.startswith(_HEADS)}
        remarks = fit(donor, without_heads, path, trained_size)
    else:
        donor, _, remarks = _loaded_by_timm(model, of_backbone, path, trained_size)
    if not is_segmenter:
        return remarks + _take_features(model, donor, str(path))
    _take_features(model, donor, str(path))
    parts = {key: value for key, value in state.items() if not key.startswith(BACKBONE)}
    classes = {key for key in parts if key.startswith(("classifier.", "aux_classifier."))}
    wrong = sorted(key for key in parts if parts[key].shape != own[key].shape)
    if set(wrong) - classes:
        raise WeightsError(f"{path} does not fit {type(model).__name__}: {wrong[:5]} are of other shape")
    if wrong:
        remarks.append(
            f"{path}: left out classifier and aux_classifier ({len(parts['classifier.bias'])} classes), as the model"
            f" has {model.num_classes} classes: these keep their initial weights"
        )
    model.load_state_dict({key: value for key, value in parts.items() if key not in wrong}, strict=False)
    return remarks


def _check_names(own: Iterable[str], given: Iterable[str], path: Path, kind: str) -> None:
    missing, unexpected = sorted(set(own) - set(given)), sorted(set(given) - set(own))
    if missing or unexpected:
        raise WeightsError(f"{path} does not fit {kind}: missing {missing[:5]}, unexpected {unexpected[:5]}")


def _take_features(model: Segmenter, donor: nn.Module, origin: str) -> list[str]:
    """Copy what the backbone has of a whole network of its kind; a remark on the heads. Raises WeightsError."""
    given, own = donor.state_dict(), model.backbone.state_dict()
    wrong = [key for key in own if key not in given or given[key].shape != own[key].shape]
    if wrong:
        raise WeightsError(
            f"{origin} does not fit {type(model.backbone).__name__}: {wrong[:5]} missing, or of other shape"
        )
    model.backbone.load_state_dict({key: given[key] for key in own})
    return [f"{origin}: took the backbone's features without classifiers; the segmentation heads start anew"]


def _resize(donor: nn.Module, model: TokenLabelModel | Segmenter, origin: str) -> None:
    """Resize what depends on the image size of a network of the model's backbone's kind, from a rectangle. Raises
    WeightsError where timm cannot."""
    resize = getattr(donor, "set_input_size", None)
    if resize is not None and "window_size" not in inspect.signature(resize).parameters:
        resize(img_size=model.img_size)
        return
    # Convolutions fit any size; so do windows that are the same ones.
    windows, own_windows = (
        [module.window_size for module in network.modules() if hasattr(module, "window_size")]
        for network in (donor, model.backbone)
    )
    if windows != own_windows or any(name.endswith("pos_embed") for name in donor.state_dict()):
        raise WeightsError(
            f"{origin} timm does not resize the positions of {type(donor).__name__} from rectangles: use that size"
        )


def load_pretrained(model: nn.Module, name: str) -> list[str]:
    """Load timm's pretrained weights into a model of `build_model` or the backbone of one of `build_segmenter`, from
    timm's cache or the hub; remarks for the user.

    Raises InputError where there are none, or none can be had.
    """
    if isinstance(backbone_of(model), LVViT):
        raise InputError(f"model {name}: no hub holds weights for it; set init_weights to a file instead of pretrained")
    try:
        # With as many classes as the weights have: timm then compares all names and shapes.
        classes = model.backbone.pretrained_cfg["num_classes"]
        donor = model.create_backbone(pretrained=True, num_classes=classes)
    except Exception as error:  # downloading raises many types (OSError, httpx, hub errors): there are no weights
        remedy = (
            "Download them where there is a network (timm keeps them in the folder that HF_HOME names), or set"
            " init_weights to a file"
        )
        raise InputError(f"{no_pretrained_weights(name, error)}. {remedy}") from error
    origin = f"{name}'s pretrained weights"
    if isinstance(model, Segmenter):
        return _take_features(model, donor, origin)
    return _take_backbone(model, donor, classes, origin)


def no_pretrained_weights(name: str, error: Exception) -> str:
    """A sentence, without its full stop, that says which model's weights no hub or cache gave, and the first line of
    the error."""
    reason = next(iter(str(error).strip().splitlines()), "")
    return f"model {name}: pretrained weights cannot be had ({type(error).__name__}: {reason})"


def class_count(state: dict[str, Tensor], names: tuple[str, ...]) -> int | None:
    """Classes of the first classifier among `names` (`heads`) that a state dict holds, a TokenLabelModel's too; None
    when it holds none."""
    keys = [f"{prefix}{name}.weight" for name in names for prefix in ("", BACKBONE)]
    return next((state[key].shape[0] for key in keys if key in state), None)


def heads(network: nn.Module) -> tuple[str, ...]:
    """Names of a timm network's classifiers, of class and tokens: those that timm states, else of the class alone."""
    names = getattr(network, "pretrained_cfg", {}).get("classifier")
    if not names:
        names = [name for name, module in network.named_modules() if module is network.get_classifier()]
    return (names,) if isinstance(names, str) else tuple(names)


def _take_backbone(model: TokenLabelModel, donor: nn.Module, classes: int, origin: str) -> list[str]:
    """Copy the weights of a network of the same kind; classifiers only if they are for the same classes."""
    names = heads(model.backbone)
    of_heads = tuple(f"{name}." for name in names)
    given, own = donor.state_dict(), model.backbone.state_dict()
    if classes != model.num_classes:
        given = {key: value for key, value in given.items() if not key.startswith(of_heads)}
    wrong = [
        key for key in own if not key.startswith(of_heads) and (key not in given or given[key].shape != own[key].shape)
    ]
    if wrong:
        raise WeightsError(
            f"{origin} does not fit {type(model.backbone).__name__}: {wrong[:5]} missing, or of other shape"
        )
    model.backbone.load_state_dict(given, strict=classes == model.num_classes)
    if classes == model.num_classes:
        return [f"{origin}: kept {', '.join(names)} ({classes} classes)"]
    left_out = f"{', '.join(names)} ({classes or 'no'} classes)"
    return [
        f"{origin}: left out {left_out}, as the model has {model.num_classes} classes: these heads keep their initial"
        " weights"
    ]
