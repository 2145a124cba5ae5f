"""Mixup and CutMix on the training device: images and targets mixed with those of the batch-flipped batch.

One formula does both, so that neither another draw nor a change from one to the other recompiles or synchronises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tl_fast.models.mix_token import box_mask


def mix(images: Tensor, targets: Tensor, mixing: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B,C,H,W] and targets [B,classes], both floating, mixed as `plan.mixup.draw_mix` has drawn -> new ones.

    mixing: [5] = (top, left, bottom, right, share). Inside the box, in pixels, ends exclusive, a pixel is 1 - share of
    the image's own and share of the flipped batch's. Of the targets, the flipped batch has share times the box's part
    of the area.
    """
    height, width = images.shape[-2:]
    top, left, bottom, right, share = mixing.unbind()
    inside = box_mask(mixing[:4], (height, width), images.device)  # [H,W]
    images = torch.lerp(images, images.flip(0), (inside * share).to(images.dtype))
    share = share * (bottom - top) * (right - left) / (height * width)
    return images, torch.lerp(targets, targets.flip(0), share.to(targets.dtype))
