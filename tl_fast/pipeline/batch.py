"""What a batch is, what it is made from, and what a maker of batches does."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tl_fast.pipeline.regions import RegionsDecoder


@dataclass
class Batch:
    """One step's samples, owned by the receiver, on the loader's device.

    images: uint8 [B, 3, H, W], RGB, not normalised.
    labels: int64 [B].
    targets: float32 or bfloat16 [B, 1+N, C], the class token's first, then the tokens' row by row; None in evaluation
        and without label maps.
    sample_ids: int64 [B], position in the concatenation of the betons.
    erase: int32 [B, 4] = (top, left, height, width) in pixels, the boxes of random erasing, height 0 for none. Erasing
        is left to the training device (`tl_fast.models.erase`). None without random erasing.
    noise: int64 [B], seeds of what the boxes are filled with; None without random erasing.
    masks: uint8 [B, H, W], class indices, `ignore_index` outside the image; None but in segmentation.
    """

    images: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor | None
    sample_ids: torch.Tensor
    erase: torch.Tensor | None = None
    noise: torch.Tensor | None = None
    masks: torch.Tensor | None = None


@dataclass(frozen=True)
class BatchPlan:
    """All that is decided about a batch before its JPEGs are decoded.

    ids: int64 [B], the samples.
    heights, widths: int64 [B], sizes of the stored images in pixels.
    plans: PLAN records [B] (`tl_fast.plan.records`).
    starts, shapes: int64 [B, 2], first pixel (row, column) and size of the regions to decode.
    image_size: (height, width) of the batch's images in pixels.
    affines: float32 [B, 6], as `cpu.warped_targets` takes them; None for no targets.
    extras: further arrays for the batch, by field of `Batch`.
    masks: uint8 [h, w] each, the samples' decoded masks; None where the batch has none.
    """

    ids: np.ndarray
    heights: np.ndarray
    widths: np.ndarray
    plans: np.ndarray
    starts: np.ndarray
    shapes: np.ndarray
    image_size: tuple[int, int]
    affines: np.ndarray | None
    extras: dict[str, np.ndarray]
    masks: list[np.ndarray] | None = None


@dataclass(frozen=True)
class UnderWay:
    """A batch that is being made.

    futures: of the threads at work on it.
    batch: the one that they fill; None where the first future's result says what it is.
    """

    futures: list[Future]
    batch: Batch | None = None


class BatchMaker(Protocol):
    """Makes batches of a device's memory: `cpu_batches.CpuBatches` and `gpu_batches.GpuBatches`.

    A batch goes through `start` in the loader's thread and `finish` in the consumer's. What goes wrong on the way is
    raised there, or, where only the device notices, by `check`.
    """

    decoder: RegionsDecoder
    reads_files: bool  # whether images and label maps come from the betons, batch by batch

    def enter_thread(self) -> None:
        """To be called once by the thread that calls `start`."""

    def start(self, plan: BatchPlan) -> UnderWay:
        """Begin to make a batch. nvJPEG may decode it here; nothing waits for the CPU's decoding or for kernels."""

    def finish(self, under_way: UnderWay) -> Batch:
        """The batch, ready for the caller; on a GPU for the stream that is current, and the host does not wait."""

    def check(self) -> None:
        """Wait until all batches that were finished are there, and raise what the device found wrong with them."""

    def forget(self) -> None:
        """What is wrong with batches finished so far is of no more interest."""

    def close(self) -> None:
        """Wait for what is under way, stop the threads and let go of the memory."""
