"""One batch's way from uint8 pixels and masks to the loss of segmentation, as one module. It is what gets compiled
(`step.compiled`), and what DistributedDataParallel wraps.

Shapes: B images of H x W pixels.
"""

from __future__ import annotations

from torch import Tensor, nn

from tl_fast.models.normalise import Normalise, autocast
from tl_fast.models.segmentation_loss import SegmentationLoss
from tl_fast.models.step import attention


class SegmentStep(nn.Module):
    """Forward pass and loss of one batch.

    Args:
        model: a Segmenter in train mode; it stays the caller's, for the optimiser, the moving average and checkpoints.
        criterion: the loss.
        normalise: uint8 images to float32.
        dtype: autocast type of the model: "float32", "bfloat16", or "auto" (see `normalise.autocast`).
        attention_backend: see `step.attention`. Not for a model with gradient checkpointing.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: SegmentationLoss,
        normalise: Normalise,
        dtype: str = "auto",
        attention_backend: str = "default",
    ) -> None:
        super().__init__()
        self.model, self.criterion, self.normalise, self.dtype = model, criterion, normalise, dtype
        self.attention_backend = attention_backend

    def forward(self, images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
        """images uint8 [B,3,H,W] and masks uint8 [B,H,W] -> (loss: float32 scalar, terms: cross-entropy of the logits
        and of the auxiliary ones [2], unweighted and detached). Raises ValueError for shapes that do not fit."""
        inputs = self.normalise(images)
        with autocast(images.device, self.dtype), attention(self.attention_backend):
            logits, aux_logits = self.model(inputs)
        return self.criterion(logits, aux_logits, masks, with_terms=True)
