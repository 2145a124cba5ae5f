"""One batch's way from uint8 pixels to the loss, as one module. It is what gets compiled, and what
DistributedDataParallel wraps.

Normalisation and random erasing belong to the same graph as the stem, and the loss to the same graph as the heads: a
compiler then fuses across these borders, and CUDA graphs hold the whole step. Nothing in it looks at a value on the
host: a new box, plan or learning rate neither recompiles nor synchronises.

Shapes: B images, N patch tokens, C classes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tl_fast.models.erase import erase
from tl_fast.models.loss import TokenLabelLoss, strongest_class
from tl_fast.models.mixup import mix
from tl_fast.models.normalise import Normalise, autocast
from tl_fast.system.sides import Sides, both_sides

# What may compute attention, by the names of the config's attention_backend; besides "default", torch's own choice.
ATTENTION_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(backend: str) -> contextlib.AbstractContextManager:
    """Inside, `backend` computes attention: "default", or one of ATTENTION_BACKENDS, without which torch then raises
    RuntimeError."""
    return contextlib.nullcontext() if backend == "default" else sdpa_kernel(ATTENTION_BACKENDS[backend])


def usable_attention_backends(model: nn.Module, img_size: Sides, device: torch.device, dtype: str) -> list[str]:
    """The ATTENTION_BACKENDS with which `model` runs forward and backward on `device`, on images of `img_size` pixels
    in the type that the config's `dtype` means there."""
    images = torch.zeros((2, 3, *both_sides(img_size)), device=device, requires_grad=True)
    was_training, usable = model.training, []
    model.eval()  # batch norm's statistics stay as they are
    for name, backend in ATTENTION_BACKENDS.items():
        with contextlib.suppress(RuntimeError), warnings.catch_warnings(action="ignore"):  # torch warns of its reasons
            with sdpa_kernel(backend), autocast(device, dtype):
                torch.autograd.grad(model(images).sum(), images)
            usable.append(name)
    model.train(was_training)
    return usable


class TrainStep(nn.Module):
    """Forward pass and loss of one batch.

    Args:
        model: a model of `build_model`; it stays the caller's, for the optimiser, the moving average and checkpoints.
        criterion: the loss.
        normalise: uint8 images to float32.
        dtype: autocast type of the model: "float32", "bfloat16", or "auto" (see `normalise.autocast`).
        attention_backend: see `attention`. Not for a model with gradient checkpointing, which computes attention again
            outside this module.
        hard_labels: label smoothing 0..1 of targets that are their strongest class alone; None: targets as they come.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: TokenLabelLoss,
        normalise: Normalise,
        dtype: str = "auto",
        attention_backend: str = "default",
        hard_labels: float | None = None,
    ) -> None:
        super().__init__()
        self.model, self.criterion, self.normalise, self.dtype = model, criterion, normalise, dtype
        self.hard_labels = hard_labels
        self.attention_backend = attention_backend

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        mix_box: Tensor | None = None,
        ground_truth: Tensor | None = None,
        erase_boxes: Tensor | None = None,
        noise: Tensor | None = None,
        mixing: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss: float32 scalar, terms: the class and the token loss [2], unweighted and detached).

        Args:
            images: uint8 [B,3,H,W].
            targets: [B,1+N,C] or [B,C], float32 or bfloat16; mix_box: integer [4]; ground_truth: [B,C] - see
                `TokenLabelLoss`.
            erase_boxes, noise: int32 [B,4] and int64 [B], see `erase.erase`; both or neither.
            mixing: float32 [5], see `mixup.mix`; for targets [B,C].

        Raises ValueError for shapes that do not fit.
        """
        inputs = self.normalise(images)
        if erase_boxes is not None:
            inputs = erase(inputs, erase_boxes, noise)
        if mixing is not None:
            inputs, targets = mix(inputs, targets, mixing)
        if self.hard_labels is not None:
            targets = strongest_class(targets, self.hard_labels)
        with autocast(images.device, self.dtype), attention(self.attention_backend):
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
