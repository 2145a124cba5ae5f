"""Pixels as the model takes them, and the number format that it computes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalise(nn.Module):
    """uint8 images [B,3,H,W] -> float32 of zero mean and unit deviation per channel, channels-last on GPUs.

    `mean` and `std` are on a 0..1 scale.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std, strict=False)]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if images.is_cuda else torch.contiguous_format
        return torch.addcmul(self.shift, images.to(torch.float32, memory_format=layout), self.scale)


def resolved_dtype(device: torch.device, dtype: str) -> str:
    """A config's `dtype` on a device; "auto" is bfloat16 on GPUs and float32 on the CPU."""
    return dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The autocast context of a config's `dtype`; none for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=resolved_dtype(device, dtype) == "bfloat16")
