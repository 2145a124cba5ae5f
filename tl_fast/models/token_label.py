"""A token head on any timm model, trained with MixToken.

The class logits are the backbone's own (`forward_head`). Its tokens go through the same head, one by one, up to the
classifier; there the token head takes over. A backbone that has a token head of its own (VOLO's `aux_head`) keeps it.

Shapes: B images, D channels, h x w the token grid, N = h * w tokens, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from tl_fast.models.backbone import OnBackbone
from tl_fast.models.mix_token import MixBox, box_mask
from tl_fast.models.token_layout import (
    TokenLayoutError,
    classify_cells,
    features_of_zeros,
    output_stride,
    token_layout,
    trial,
)
from tl_fast.system.sides import Sides, both_sides


class TokenLabelModel(OnBackbone):
    """A timm model with a head for every token of its last features.

    Args:
        backbone: the network; its classifier stays its own.
        img_size: side, or (height, width), of the input in pixels.
        eval_token_weight: what the maximum of the token logits counts in evaluation, beside the class logits. None: 0.5
            for a backbone with a token head of its own, as published, else 0.
        create: see OnBackbone.

    After construction: `layout` of the features, `grid_size` (h, w), `num_classes` C, `can_mix_tokens`: whether the
    grid divides the image into whole patches, as MixToken needs it, and `has_own_token_head`: whether the tokens' head
    is the backbone's.

    Raises TokenLayoutError for features that are no grid, or are another one in training than in evaluation, and
    ValueError for a backbone without classifier.
    """

    def __init__(
        self,
        backbone: nn.Module,
        img_size: Sides,
        eval_token_weight: float | None = None,
        create: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__(backbone, create)
        self.img_size = height, width = both_sides(img_size)
        self.num_classes: int = backbone.num_classes
        if self.num_classes < 1:
            raise ValueError(f"the backbone classifies {self.num_classes} classes; token labels need at least 1")
        with trial(backbone, training=False):
            features = features_of_zeros(backbone, self.img_size)
            self.layout = token_layout(backbone, features, self.img_size)
            cells = self.layout.cells(self.layout.tokens(features))
            channels = classify_cells(backbone, cells, pre_logits=True).shape[1]
        if math.prod(self.layout.grid) < 2:
            raise TokenLayoutError(f"its features {list(features.shape)} are a single token for the whole image")
        with trial(backbone, training=True):
            in_training = features_of_zeros(backbone, self.img_size)
        if in_training.shape != features.shape:
            raise TokenLayoutError(
                f"its features are {list(in_training.shape)} in training and {list(features.shape)} in evaluation: it"
                " drops tokens"
            )
        self.grid_size = self.layout.grid
        stride = output_stride(backbone)
        self.can_mix_tokens = stride is None or (height, width) == tuple(side * stride for side in self.grid_size)
        self.can_mix_tokens &= height % self.grid_size[0] == 0 and width % self.grid_size[1] == 0

        self.has_own_token_head = token_head(backbone) is not None
        if not self.has_own_token_head:
            self.token_head = nn.Linear(channels, self.num_classes)
            nn.init.trunc_normal_(self.token_head.weight, std=0.02)
            nn.init.zeros_(self.token_head.bias)
        published = 0.5 if self.has_own_token_head else 0.0
        self.eval_token_weight = published if eval_token_weight is None else eval_token_weight

    def get_token_head(self) -> nn.Linear:
        """The tokens' classifier."""
        return self.backbone.aux_head if self.has_own_token_head else self.token_head

    def get_classifier(self) -> nn.Module:
        """The class logits' classifier, the backbone's own."""
        return self.backbone.get_classifier()

    def forward_features(self, x: Tensor) -> Tensor:
        """Normalised images [B,3,H,W] -> the backbone's features, without MixToken."""
        return self.backbone.forward_features(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits [B,C] as evaluation has them, or what the classifier takes, [B,D]."""
        if pre_logits:
            return self.backbone.forward_head(features, pre_logits=True)
        logits = self._class_logits(features)
        if not self.eval_token_weight:
            return logits
        return logits + self.eval_token_weight * self.token_logits(features).amax(1)

    def token_logits(self, features: Tensor, inside: Tensor | None = None) -> Tensor:
        """Features -> logits of the tokens [B,N,C]. inside: boolean [h,w], the tokens that MixToken took from the
        batch-flipped batch, whose logits are put back to the image they came from."""
        tokens = self.layout.tokens(features)
        if inside is not None:
            # The head acts on each token alone: un-mixing its inputs equals un-mixing its outputs.
            tokens = torch.where(inside.view(1, -1, 1), tokens.flip(0), tokens)
        rows = classify_cells(self.backbone, self.layout.cells(tokens), pre_logits=True)
        return self.get_token_head()(rows).unflatten(0, tokens.shape[:2])

    def _class_logits(self, features: Tensor) -> Tensor:
        if self.has_own_token_head:  # whose forward_head adds the tokens' maximum
            return self.get_classifier()(self.backbone.forward_head(features, pre_logits=True))
        return self.backbone.forward_head(features)

    def forward(self, x: Tensor, mix_box: MixBox | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Classify images [B,3,H,W] (float, normalised).

        Eval mode returns logits [B,C]. Train mode returns (class logits [B,C], token logits [B,N,C]), tokens row by
        row. `mix_box` (train mode only) switches MixToken on: inside the box the pixels of the batch-flipped batch
        replace the image's own. It is (top, left, bottom, right) in tokens, ends exclusive; give it as an integer
        tensor [4] on the model's device so that a new box neither recompiles nor synchronises. Where patches overlap,
        or attention is windowed, tokens at the box's border see both images.

        Raises ValueError for a malformed box, a box in eval mode, or where `can_mix_tokens` is false.
        """
        inside = None
        if mix_box is not None:
            if not self.training:
                raise ValueError(
                    "mix_box is given in eval mode, where nothing is mixed; call model.train() or leave it out"
                )
            if not self.can_mix_tokens:
                raise ValueError(
                    f"mix_box is given, but {self.grid_size} tokens do not divide {self.img_size} pixels into patches"
                )
            inside = box_mask(mix_box, self.grid_size, x.device)
            stride = self.img_size[0] // self.grid_size[0], self.img_size[1] // self.grid_size[1]
            x = torch.where(box_mask(mix_box, self.grid_size, x.device, stride), x.flip(0), x)
        features = self.forward_features(x)
        if not self.training:
            return self.forward_head(features)
        return self._class_logits(features), self.token_logits(features, inside)


def backbone_of(model: nn.Module) -> nn.Module:
    """timm's network in a model: the backbone of a model that puts its own parts behind one, else the model."""
    return model.backbone if isinstance(model, OnBackbone) else model


def backbone_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights that stock `timm.create_model(...).load_state_dict` takes strictly: of a TokenLabelModel the
    backbone's, of an LVViT all."""
    return backbone_of(model).state_dict()


def token_head(network: nn.Module) -> nn.Module | None:
    """The head that a network classifies its tokens with; None for one without."""
    if hasattr(network, "get_token_head"):
        return network.get_token_head()
    own = getattr(network, "aux_head", None)
    return own if isinstance(own, nn.Linear) else None
