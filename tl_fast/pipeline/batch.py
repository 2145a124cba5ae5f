"""What a batch is, and the memory of batches that nobody holds any more."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class Batch:
    """One step's samples, owned by the receiver, on the loader's device.

    images: uint8 [B, 3, H, W], RGB, not normalised; labels: int64 [B]; targets: float32 [B, 1+N, C], class-token target
    first, tokens row by row, or None (no label maps, or evaluation); sample_ids: int64 [B], position in the
    concatenation of the betons. With random erasing, which is left to the training device (`tl_fast.models.erase`):
    erase: int32 [B, 4] = (top, left, height, width) in pixels, height 0 for none; noise: int64 [B], seeds of what to
    fill the boxes with. None without.
    """

    images: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor | None
    sample_ids: torch.Tensor
    erase: torch.Tensor | None = None
    noise: torch.Tensor | None = None


class _Buffers:
    """Memory of batches that nobody holds any more, to be written again: new memory costs a page fault every 4 KB, for
    token targets of 1,000 classes several times what computing them takes."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], type], list[np.ndarray]] = {}
        self.allocated = 0  # arrays made so far

    def take(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An array with any content; it is in use as long as it, or a view or tensor made from it, is referred to."""
        free = self._free.setdefault((shape, dtype), [])
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(shape, dtype)
            self.allocated += 1
        # Over a memoryview numpy cannot see `memory`: views of the new array refer to it, and it lives as long as they
        # do.
        array = np.asarray(memoryview(memory))
        weakref.finalize(array, free.append, memory).atexit = False
        return array
