"""Semantic segmentation: UPerNet (arXiv 1807.10221) on the features of LV-ViT, or of any timm model, at four depths.

The decoder is that of segmentation-models-pytorch. Depths, heads, dropout and initialisation follow the published
training (github.com/zihangJiang/TokenLabeling, seg/configs/lvvit) and mmsegmentation, which it uses. One difference:
the deepest features are pooled to stride 32, as other backbones have them and as mmsegmentation does for BEiT; the
published network leaves them at stride 16 with 2,048 channels.

Shapes: B images, C classes, D_i channels of the i-th of four maps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tl_fast.models.backbone import OnBackbone
from tl_fast.models.build import check_name, create_with_drop_path, mistakes_named
from tl_fast.models.token_layout import trial
from tl_fast.system.mistakes import InputError
from tl_fast.system.sides import Sides, both_sides

STRIDES = 4, 8, 16, 32
"""Pixels a side for which a cell of UPerNet's four maps stands; of patches of 16 pixels too, once they are scaled."""
AUXILIARY = 2  # which of the four maps the auxiliary head reads
DROPOUT = 0.1


class Pyramid(nn.ModuleList):
    """Four maps of one stride s to strides s/4, s/2, s and 2s: [B,D,h,w] each -> [B,D,4h,4w], [B,D,2h,2w], [B,D,h,w],
    [B,D,h/2,w/2], rounded up. By transposed convolutions and max pooling, as mmsegmentation scales BEiT's features."""

    def __init__(self, channels: Sequence[int]) -> None:
        quarter, half = channels[0], channels[1]
        super().__init__(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(quarter, quarter, 2, stride=2),
                    nn.BatchNorm2d(quarter),
                    nn.GELU(),
                    nn.ConvTranspose2d(quarter, quarter, 2, stride=2),
                ),
                nn.ConvTranspose2d(half, half, 2, stride=2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [layer(features) for layer, features in zip(self, maps, strict=True)]


class WholeImage(nn.Sequential):
    """The block of UPerNet's pyramid that pools a map [B,D,h,w] to one pixel, and spreads its result [B,D',1,1] over
    [B,D',h,w].

    The decoder spreads it by bilinear interpolation, which from one pixel gives the same. But inductor's code for the
    gradient of that is wrong on CPUs: every gradient of the graph is 0, or inductor fails (docs/decisions.md).
    """

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).expand(-1, -1, *features.shape[2:])


class Segmenter(OnBackbone):
    """A class for every pixel: a backbone's features at four depths, UPerNet's decoder, a classifier, and an auxiliary
    head for training.

    Args:
        backbone: a timm network without classifier; what its four features do not need is removed from it.
        crop_size: side, or (height, width), of the training's images in pixels.
        num_classes: C.
        out_indices: the four features among those that timm lists (blocks of a transformer, stages of a hierarchy),
            from 0, ascending, negative ones from the end. None: `default_indices`.
        decoder_channels: of UPerNet's maps (published: 256 for LV-ViT-S and M, 512 for L).
        aux_channels: of the auxiliary head's hidden layer.
        create: see OnBackbone.

    After construction: `input_size`, the (height, width) that the network is built for, or None for one that takes any
    multiple of `multiple` pixels a side.

    Raises InputError for features that do not fit, and for a crop that is no multiple of `multiple`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        crop_size: Sides,
        num_classes: int,
        out_indices: Sequence[int] | None = None,
        decoder_channels: int = 256,
        aux_channels: int = 256,
        create: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__(backbone, create)
        self.img_size = both_sides(crop_size)
        self.num_classes = num_classes
        indices, strides = _depths(backbone, out_indices)
        self.multiple: int = strides[-1]
        _check_multiple(self.img_size, self.multiple)
        fixed = getattr(backbone, "pretrained_cfg", {}).get("fixed_input_size", False)
        self.input_size = self.img_size if fixed else None
        self.out_indices = backbone.prune_intermediate_layers(indices, prune_norm=True)
        channels = self._channels(strides)
        same_stride = strides[0] == strides[-1]
        self.neck = Pyramid(channels) if same_stride else nn.Identity()

        from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder  # 2 to 3 s

        # The decoder's first two maps would be of strides 1 and 2; it reads neither.
        self.decoder = UPerNetDecoder((0, 0, *channels), decoder_channels=decoder_channels)
        self.decoder.psp.blocks[0] = WholeImage(*self.decoder.psp.blocks[0])
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classifier = nn.Conv2d(decoder_channels, num_classes, 1)
        self.aux_head = nn.Sequential(
            nn.Conv2d(channels[AUXILIARY], aux_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(aux_channels),
            nn.ReLU(inplace=True),
            nn.Dropout2d(DROPOUT),
        )
        self.aux_classifier = nn.Conv2d(aux_channels, num_classes, 1)
        self._init_own_layers()

    def _channels(self, strides: Sequence[int]) -> list[int]:
        """D_i of the backbone's four maps. Raises InputError where they are not what their strides say."""
        with trial(self.backbone, training=False):
            device = next(self.backbone.parameters()).device
            maps = self._backbone_maps(torch.zeros(1, 3, *self.img_size, device=device))
        sizes = [tuple(side // stride for side in self.img_size) for stride in strides]
        if [tuple(features.shape[2:]) for features in maps] != sizes:
            raise InputError(f"its features are {[list(features.shape[1:]) for features in maps]}, not maps of {sizes}")
        return [features.shape[1] for features in maps]

    def _init_own_layers(self) -> None:
        """mmsegmentation's initialisation of its heads."""
        for part in (self.decoder, self.aux_head):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for classifier in (self.classifier, self.aux_classifier):
            nn.init.normal_(classifier.weight, std=0.01)
            nn.init.zeros_(classifier.bias)

    def _backbone_maps(self, images: Tensor) -> list[Tensor]:
        return self.backbone.forward_intermediates(
            images, indices=self.out_indices, output_fmt="NCHW", intermediates_only=True
        )

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """Normalised images [B,3,H,W] -> four maps [B,D_i,h_i,w_i] as the decoder takes them, the finest first."""
        return self.neck(self._backbone_maps(images))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Normalised images [B,3,H,W] -> logits [B,C,H/4,W/4]; in train mode (these, auxiliary logits
        [B,C,H/16,W/16]). For patches of p pixels these are p/4 and p instead of 4 and 16.

        Raises ValueError for images of a size that the network does not take, and in train mode for a single image:
        UPerNet pools it to one pixel, of which batch norm has no statistics (torch's SyncBatchNorm has, over ranks).
        """
        height, width = images.shape[-2:]
        if self.input_size not in (None, (height, width)):
            raise ValueError(f"images are {height}x{width} pixels, the model was built for {self.input_size}")
        _check_multiple((height, width), self.multiple)
        if len(images) == 1 and self._needs_two_images():
            raise ValueError("a batch of one image in training: UPerNet's batch norms need two or more on every rank")
        maps = self.forward_features(images)
        logits = self.classifier(self.dropout(self.decoder([None, None, *maps])))
        return (logits, self.aux_classifier(self.aux_head(maps[AUXILIARY]))) if self.training else logits

    def _needs_two_images(self) -> bool:
        """Whether the norm behind the pooling to one pixel takes its statistics from this rank's batch."""
        _, (_, norm, _) = self.decoder.psp.blocks[0]
        return isinstance(norm, nn.BatchNorm2d) and norm.training


def build_segmenter(
    name: str,
    *,
    crop_size: Sides,
    num_classes: int,
    drop_path: float = 0.0,
    options: dict[str, Any] | None = None,
    out_indices: tuple[int, ...] | None = None,
    decoder_channels: int = 256,
    aux_channels: int = 256,
) -> Segmenter:
    """The Segmenter on the model `name`, LV-ViT or any of timm's, randomly initialised from torch's generator.

    drop_path: rate of the backbone's last block, 0..1; options: further arguments of its constructor; the others: see
    Segmenter. Raises InputError naming a bad argument, or what of the model's features cannot be segmented with.
    """
    check_name(name)
    counts = dict(num_classes=num_classes, decoder_channels=decoder_channels, aux_channels=aux_channels)
    for argument, value in counts.items():
        if value < 1:
            raise InputError(f"{argument} {value} must be 1 or more")
    with mistakes_named(name, crop_size, options, "cannot be segmented with"):
        network, anew = create_with_drop_path(name, crop_size, drop_path, num_classes=0, options=options)
        return Segmenter(network, crop_size, num_classes, out_indices, decoder_channels, aux_channels, anew)


def default_indices(strides: Sequence[int]) -> list[int]:
    """Which four of a network's features are read, by the strides of all: of one stride, the last and every third
    before it, as published (6, 9, 12, 15 of LV-ViT-S's 16), closer in networks of less than 12; of several, the last
    ones of strides 4, 8, 16 and 32. Raises InputError where there are no such four."""
    if len(set(strides)) > 1:
        missing = [stride for stride in STRIDES if stride not in strides]
        if missing:
            raise InputError(
                f"its features have strides {sorted(set(strides))}: there must be 4, 8, 16 and 32 among them, or one"
                " stride for all"
            )
        return [max(index for index, own in enumerate(strides) if own == stride) for stride in STRIDES]
    if len(strides) < 4:
        raise InputError(f"it has {len(strides)} blocks; UPerNet takes the features of four")
    step = min(3, len(strides) // 4)
    return [len(strides) - 1 - step * back for back in (3, 2, 1, 0)]


def _depths(network: nn.Module, out_indices: Sequence[int] | None) -> tuple[list[int], list[int]]:
    """The four features' numbers and their strides. Raises InputError for others than one stride or 4, 8, 16, 32."""
    listed = getattr(network, "feature_info", None)
    listed = getattr(listed, "info", listed)
    if not listed or not hasattr(network, "forward_intermediates"):
        raise InputError(f"{type(network).__name__} gives no features but its last (no forward_intermediates)")
    strides = [feature["reduction"] for feature in listed]
    if out_indices is None:
        indices = default_indices(strides)
    else:
        indices = [index + len(strides) if index < 0 else index for index in out_indices]
        if len(indices) != 4 or indices != sorted(set(indices)) or not 0 <= indices[0] <= indices[-1] < len(strides):
            raise InputError(f"out_indices {list(out_indices)} must be four of 0..{len(strides) - 1}, ascending")
    chosen = [strides[index] for index in indices]
    if len(set(chosen)) > 1 and tuple(chosen) != STRIDES:
        raise InputError(
            f"features {indices} have strides {chosen}: UPerNet takes strides 4, 8, 16 and 32, or one stride for all"
        )
    return indices, chosen


def _check_multiple(size: tuple[int, int], multiple: int) -> None:
    if size[0] % multiple or size[1] % multiple or min(size) < multiple:
        raise InputError(f"{size[0]}x{size[1]} pixels: both sides must be multiples of {multiple}")
