"""The loss of semantic segmentation: cross-entropy of every labelled pixel, of the logits and of the auxiliary ones.

As mmsegmentation has it: logits are resized to the mask, bilinearly, and the auxiliary head counts 0.4. Unlike there,
the mean is over labelled pixels alone. Nothing here looks at a value on the host, so it compiles and never synchronises
the device.

Shapes: B images, C classes, H x W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SegmentationLoss(nn.Module):
    """CE(logits, masks) + aux_weight * CE(auxiliary logits, masks), each the mean over labelled pixels.

    Args:
        ignore_index: the masks' value of pixels without label, 0..255.
        aux_weight: of the auxiliary head, finite, >= 0.

    Raises ValueError for values outside these ranges.
    """

    def __init__(self, ignore_index: int = 255, aux_weight: float = 0.4) -> None:
        super().__init__()
        if not 0 <= ignore_index <= 255:
            raise ValueError(f"ignore_index {ignore_index} must be in 0..255, as masks are bytes")
        if not 0 <= aux_weight < math.inf:
            raise ValueError(f"aux_weight {aux_weight} must be finite and >= 0")
        self.ignore_index = ignore_index
        self.aux_weight = aux_weight

    def forward(
        self, logits: Tensor, aux_logits: Tensor, masks: Tensor, with_terms: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The loss as a float32 scalar; with_terms: also its two terms [2], unweighted and detached. A batch without a
        labelled pixel has a loss of 0 and gradients of 0.

        Args:
            logits, aux_logits: [B,C,h,w], of any height and width each and any float type; sums are float32.
            masks: uint8 [B,H,W], class indices below C, or ignore_index. Others are undefined behaviour on a GPU.

        Raises ValueError when the shapes do not fit one another.
        """
        if masks.dim() != 3 or logits.dim() != 4 or aux_logits.shape[:2] != logits.shape[:2]:
            raise ValueError(
                f"logits {tuple(logits.shape)}, auxiliary logits {tuple(aux_logits.shape)} and masks"
                f" {tuple(masks.shape)} must be [B,C,h,w], [B,C,h,w] and [B,H,W]"
            )
        if len(masks) != len(logits):
            raise ValueError(f"{len(logits)} images have {len(masks)} masks")
        labels = masks.long()
        labelled = (masks != self.ignore_index).sum().clamp(min=1)
        main, aux = (self._cross_entropy(part, labels) / labelled for part in (logits, aux_logits))
        loss = main + self.aux_weight * aux
        return (loss, torch.stack((main, aux)).detach()) if with_terms else loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The sum over labelled pixels: logits [B,C,h,w], labels int64 [B,H,W] -> float32 scalar."""
        resized = F.interpolate(logits.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(resized, labels, ignore_index=self.ignore_index, reduction="sum")
