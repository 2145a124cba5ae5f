"""Random erasing on the training device: boxes of normalised images are filled with normal noise, timm's mode "pixel"
(arXiv 1708.04896).

A pixel's noise depends on nothing but the sample's seed and the pixel's position in its box, on every device and in any
batch: two rounds of a 64-bit mixing function (SplitMix64's) give the words of a Box-Muller pair.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# SplitMix64's constants in two's complement, as torch knows no uint64 arithmetic.
_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX1, _MIX2 = -4658895280553007687, -7723592293110705685


def noise(seeds: Tensor, positions: Tensor) -> Tensor:
    """Standard normal float32 for int64 `seeds` and `positions` (broadcast against each other)."""
    word = seeds + (positions + 1) * _GAMMA
    word = (word ^ _shift(word, 30)) * _MIX1
    word = (word ^ _shift(word, 27)) * _MIX2
    word = word ^ _shift(word, 31)
    first = (_shift(word, 40).float() + 0.5) * 2.0**-24  # 24 bits: what float32 holds exactly
    second = ((word & 0xFFFFFF).float() + 0.5) * 2.0**-24
    return torch.sqrt(-2.0 * torch.log(first)) * torch.cos(2.0 * math.pi * second)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Logical shift right; torch's is arithmetic."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def erase(images: Tensor, boxes: Tensor, seeds: Tensor) -> Tensor:
    """Fill the boxes of normalised images [B, C, H, W], in place where they are on the CPU -> the images.

    boxes: int32 [B, 4] = (top, left, height, width) in pixels, height 0 for none; seeds: int64 [B], both of
    `pipeline.Batch`. On a GPU, and compiled, without synchronisation in one pass over all pixels; else on the CPU box
    by box.
    """
    batch, channels, height, width = images.shape
    if boxes.shape != (batch, 4) or seeds.shape != (batch,):
        raise ValueError(
            f"boxes must be [{batch}, 4] and seeds [{batch}], got {tuple(boxes.shape)} and {tuple(seeds.shape)}"
        )
    if images.device.type == "cpu" and not torch.compiler.is_compiling():
        for b, (top, left, rows, columns) in enumerate(boxes.tolist()):
            if rows and columns:
                positions = torch.arange(channels * rows * columns).view(channels, rows, columns)
                images[b, :, top : top + rows, left : left + columns] = noise(seeds[b], positions).to(images.dtype)
        return images
    top, left, rows, columns = boxes.long().view(batch, 4, 1, 1, 1).unbind(1)
    y = torch.arange(height, device=images.device).view(1, 1, height, 1) - top
    x = torch.arange(width, device=images.device).view(1, 1, 1, width) - left
    channel = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    positions = (channel * rows + y) * columns + x  # [B,C,H,W], as the CPU counts them
    return torch.where(inside, noise(seeds.view(batch, 1, 1, 1), positions).to(images.dtype), images)
