"""The machine annotator: a pretrained classifier that gives logits for every cell of its last feature map.

It can be any timm model whose features are a grid: CNNs, transformers with or without prefix tokens, channels-last
hierarchies. Each cell goes through the model's own head as if it were the whole image. So whatever the head does after
pooling (norms, hidden layers) is done to the cell, too. For a head that pools and then is linear, the mean of the
cells' logits is the image's logits. A network with a token head (LV-ViT, VOLO, any model trained with token labels)
classifies the cells with that one.

Shapes: B images, D channels, H x W cells, P prefix tokens, C classes, h x w pixels of the input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib

import numpy as np
import torch
from torch import Tensor, nn

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from timm.data.transforms import str_to_pil_interp

import tl_fast.models.lvvit  # noqa: F401  registers lvvit_* with timm
from tl_fast.models.token_label import backbone_of, token_head
from tl_fast.models.token_layout import classify_cells, token_layout
from tl_fast.sources.image import open_rgb
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import Sides, both_sides

DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


class AnnotateError(InputError):
    """Annotation cannot start or go on; the message names the model, file or value and the remedy."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the annotator's input.

    The full image is squashed to `img_size` pixels, a side or (height, width); then each channel is (x/255 − mean) /
    std.
    """

    img_size: Sides
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Annotator(nn.Module):
    """A frozen classifier that also classifies every cell.

    network: a timm model. preprocessing: how its input is made. name, source: the model's name and where its weights
    come from, for the record. class_names: of the network's classes, where its weights came with them. device, dtype:
    where and in what type the features are computed; the head always runs in float32.

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
        class_names: list[str] | None = None,
        device: torch.device,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        # Channels last: tensor cores of GPUs need it, and efficientnet-lite2 took half the time on the CPU (see
        # AnnotateConfig.batch_size).
        self.network = network.eval().requires_grad_(False).to(device, memory_format=torch.channels_last)
        self.preprocessing, self.name, self.source, self.device, self.dtype = preprocessing, name, source, device, dtype
        self.class_names = class_names
        self.register_buffer(
            "mean", torch.tensor(preprocessing.mean, device=device).view(1, -1, 1, 1), persistent=False
        )
        self.register_buffer("std", torch.tensor(preprocessing.std, device=device).view(1, -1, 1, 1), persistent=False)
        self.kept: list[int] | None = None
        self.probe: nn.Linear | None = None
        self.num_classes: int = network.num_classes
        size = both_sides(preprocessing.img_size)
        try:
            with torch.inference_mode():
                features = self.features(torch.zeros(2, 3, *size, dtype=torch.uint8, device=device))
                self._layout = token_layout(backbone_of(network), features, size)
                self.grid = self._layout.grid
                dense = self._on_tokens(features, pre_logits=self.num_classes == 0)
                self.feature_size = self.pre_logits(features).shape[-1]
        except AnnotateError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, IndexError) as error:
            raise AnnotateError(
                f"model {name} at {preprocessing.img_size} px cannot be applied to every cell ({type(error).__name__}:"
                f" {error}); try another --img-size (a multiple of 32 suits most models) or another model"
            ) from error
        if self.num_classes and dense.shape[1] != self.num_classes:
            raise AnnotateError(
                f"model {name}: its head gives {dense.shape[1]} values per cell for {self.num_classes} classes; "
                "choose another model"
            )

    def features(self, images: Tensor) -> Tensor:
        """uint8 RGB `[B, 3, h, w]` → the network's features, float32, in the network's own layout. Raises AnnotateError
        for a network with several maps or sequences of features."""
        x = images.to(self.device, torch.float32, memory_format=torch.channels_last, non_blocking=True)
        x = (x / 255 - self.mean) / self.std
        low = DTYPES[self.dtype]
        with torch.autocast(self.device.type, dtype=low) if low else contextlib.nullcontext():
            features = self.network.forward_features(x)
        if not isinstance(features, Tensor):
            raise AnnotateError(
                f"model {self.name}: its features are a {type(features).__name__}, no single map or sequence of tokens;"
                " choose another model"
            )
        return features.float()

    def pre_logits(self, features: Tensor) -> Tensor:
        """Features → what the classifier sees of the whole image, `[B, D]`."""
        return self.network.forward_head(features, pre_logits=True)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 RGB `[B, 3, h, w]` → logits of the cells `[B, C, H, W]` and of the image `[B, C]`, float32."""
        features = self.features(images)
        if self.probe is not None:
            dense = self._on_tokens(features, pre_logits=True).movedim(1, -1)  # [B, H, W, D]
            return self.probe(dense).movedim(-1, 1), self.probe(self.pre_logits(features))
        dense, pooled = self._on_tokens(features, pre_logits=False), self.network.forward_head(features)
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

    def _on_tokens(self, features: Tensor, pre_logits: bool) -> Tensor:
        """The token head on every token, or else the classifier; with pre_logits what either takes: `[B, C or D, H,
        W]`."""
        head = None if pre_logits else token_head(self.network)
        cells = self._layout.cells(self._layout.tokens(features))
        rows = classify_cells(self.network, cells, pre_logits=pre_logits or head is not None)
        rows = rows if head is None else head(rows)
        return rows.reshape(-1, *self.grid, rows.shape[1]).movedim(-1, 1)


def squash(data: bytes, preprocessing: Preprocessing, exif: str = "ignore") -> tuple[np.ndarray, int]:
    """Open an image file's bytes and squash the image to the annotator's input size.

    Returns uint8 RGB `[3, h, w]` and the EXIF orientation that the file states, 1..8. exif: see
    `tl_fast.sources.image.open_rgb`, whose ValueError says what is wrong with the file.
    """
    image, orientation = open_rgb(data, exif)
    height, width = both_sides(preprocessing.img_size)
    squashed = image.resize((width, height), str_to_pil_interp(preprocessing.interpolation))
    return np.ascontiguousarray(np.asarray(squashed).transpose(2, 0, 1)), orientation
