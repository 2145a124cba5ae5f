"""MixToken's box (arXiv 2104.10858, section 3.3): which part of a batch comes from the batch-flipped one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MixBox = Tensor | Sequence[int]  # (top, left, bottom, right) in tokens, the end exclusive


def box_mask(mix_box: MixBox, grid: tuple[int, int], device: torch.device, scale: tuple[int, int] = (1, 1)) -> Tensor:
    """Boolean [h,w], true inside the box; with a `scale` of (rows, columns) pixels a token, boolean [h*rows,w*columns].

    A tensor box stays on its device and is not looked at: no host sync, no recompile. Raises ValueError for a box of
    another form, and for one of numbers that leaves the grid of h x w tokens.
    """
    height, width = grid
    if isinstance(mix_box, Tensor):
        if mix_box.shape != (4,):
            raise ValueError(
                f"mix_box has shape {tuple(mix_box.shape)}; expected (4,): top, left, bottom, right in tokens"
            )
        top, left, bottom, right = mix_box.to(device).unbind()
    else:
        if len(mix_box) != 4:
            raise ValueError(f"mix_box has {len(mix_box)} numbers; expected 4: top, left, bottom, right in tokens")
        top, left, bottom, right = mix_box
        if not (0 <= top <= bottom <= height and 0 <= left <= right <= width):
            raise ValueError(
                f"mix_box {tuple(mix_box)} is not (top, left, bottom, right) within the {height}x{width} token grid"
            )
    rows = torch.arange(height * scale[0], device=device)
    columns = torch.arange(width * scale[1], device=device)
    inside_rows = (rows >= top * scale[0]) & (rows < bottom * scale[0])
    inside_columns = (columns >= left * scale[1]) & (columns < right * scale[1])
    return inside_rows.unsqueeze(1) & inside_columns
