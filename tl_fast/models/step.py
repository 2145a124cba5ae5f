"""One batch's way from uint8 pixels to the loss, as one module. It is what gets compiled, and what
DistributedDataParallel wraps.

Normalisation and random erasing belong to the same graph as the stem, and the loss to the same graph as the heads: a
compiler then fuses across these borders, and CUDA graphs hold the whole step. Nothing in it looks at a value on the
host: a new box, plan or learning rate neither recompiles nor synchronises.

Shapes: B images, N patch tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tl_fast.models.erase import erase
from tl_fast.models.loss import TokenLabelLoss
from tl_fast.models.normalise import Normalise, autocast


class TrainStep(nn.Module):
    """Forward pass and loss of one batch.

    Args:
        model: an LVViT; it stays the caller's, for the optimiser, the moving average and checkpoints.
        criterion: the loss.
        normalise: uint8 images to float32.
        dtype: autocast type of the model: "float32", "bfloat16", or "auto" (see `normalise.autocast`).
    """

    def __init__(self, model: nn.Module, criterion: TokenLabelLoss, normalise: Normalise, dtype: str = "auto") -> None:
        super().__init__()
        self.model, self.criterion, self.normalise, self.dtype = model, criterion, normalise, dtype

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        mix_box: Tensor | None = None,
        ground_truth: Tensor | None = None,
        erase_boxes: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss: float32 scalar, terms: the class and the token loss [2], unweighted and detached).

        Args:
            images: uint8 [B,3,H,W].
            targets: [B,1+N,C] or [B,C]; mix_box: integer [4]; ground_truth: [B,C] - see `TokenLabelLoss`.
            erase_boxes, noise: int32 [B,4] and int64 [B], see `erase.erase`; both or neither.

        Raises ValueError for shapes that do not fit.
        """
        inputs = self.normalise(images)
        if erase_boxes is not None:
            inputs = erase(inputs, erase_boxes, noise)
        with autocast(images.device, self.dtype):
            cls_logits, token_logits = self.model(inputs, mix_box)
        return self.criterion(cls_logits, token_logits, targets, mix_box, ground_truth, with_terms=True)


def compiled(step: nn.Module, device: torch.device, mode: str = "default") -> Callable:
    """`step` compiled as one graph for static shapes. A break in the graph is an error, except with SyncBatchNorm,
    whose collectives break it.

    `mode` is torch.compile's, for GPUs: "reduce-overhead" replays CUDA graphs. On the CPU inductor's default makes
    convolutions channels-last, which slows this stem's backward pass down by 1.4 (docs/decisions.md), so that is
    switched off there.
    """
    whole = not any(isinstance(module, nn.SyncBatchNorm) for module in step.modules())
    if device.type == "cpu":
        return torch.compile(step, fullgraph=whole, dynamic=False, options={"layout_optimization": False})
    return torch.compile(step, fullgraph=whole, dynamic=False, mode=mode)
