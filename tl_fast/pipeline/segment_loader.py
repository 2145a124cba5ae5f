"""The decode pipeline of segmentation: betons -> plan -> decode of the crop -> resample, masks alike -> Batch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from tl_fast.beton.samples import Samples
from tl_fast.pipeline.batch_loader import BatchLoader
from tl_fast.pipeline.choice import OnRank0
from tl_fast.pipeline.nvjpeg import HW_DECODER_LOAD
from tl_fast.pipeline.segment_planner import SegmentPlanner
from tl_fast.pipeline.settings import Crops, Decoding, Share
from tl_fast.plan.segment import SegmentAugment
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import cores_of_this_rank
from tl_fast.system.sides import Sides, both_sides


class SegmentLoader(BatchLoader):
    """Batches of one or several betons for semantic segmentation: images and masks, both from the same plan.

    paths: a beton, a glob or a list of them, with masks.
    batch_size: samples a rank and step.
    crop_size: (height, width) of training's images and masks in pixels, or the side of square ones.
    train: True for a crop of the scaled image, mirror and distorted colours of the samples in a new order every epoch,
        whole batches only; False for whole images and masks at their stored size, every sample exactly once over all
        ranks, in file order. A batch then is consecutive samples of this rank that are equally large, `batch_size` at
        most, and the number of batches may differ from rank to rank.
    augment: ranges of the random decisions; None for mmsegmentation's.
    seed, order, threads, device, decode, hybrid_share, hw_decoder_load, rank, world_size, on_rank_0, check, prefetch:
        as for `tl_fast.pipeline.Loader`. On a GPU images of 8.4 million pixels or more are refused, in evaluation too.

    `Batch.masks` holds class indices, `mask_spec.ignore_index` where nothing is labelled and outside the image;
    `Batch.targets` is None. Iterating yields the epoch chosen with `set_epoch`. Leaving the loop early cancels what was
    under way. An error in any thread is raised by the iteration. The settings are attributes too.

    Raises ValueError or FileNotFoundError for settings or files that cannot work, betons without masks among them.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        batch_size: int,
        *,
        crop_size: Sides = 512,
        train: bool = True,
        augment: SegmentAugment | None = None,
        seed: int = 0,
        order: str = "shuffled",
        threads: int | None = None,
        device: str | torch.device = "cpu",
        decode: str = "auto",
        hybrid_share: float | None = None,
        hw_decoder_load: float = HW_DECODER_LOAD,
        rank: int = 0,
        world_size: int = 1,
        on_rank_0: OnRank0 | None = None,
        check: bool = False,
        prefetch: int | None = None,
    ):
        share = Share(batch_size, rank, world_size, order)
        crop_size = both_sides(crop_size)
        if min(crop_size) < 1:
            raise InputError(f"crop_size must be at least 1 pixel, got crop_size={crop_size}")
        crops = Crops(crop_size, augment or SegmentAugment())
        threads = threads or cores_of_this_rank()
        decoding = Decoding(torch.device(device), decode, hybrid_share, hw_decoder_load, threads, check)
        samples = Samples(paths)
        if samples.mask_spec is None:
            names = ", ".join(map(str, samples.paths))
            raise InputError(f"{names}: no masks to segment by; pack them with `converters/to_beton.py --masks DIR`")
        self.crop_size, self.mask_spec = crop_size, samples.mask_spec
        self._mask_threads = ThreadPoolExecutor(threads, "tl_fast-mask")
        planner = SegmentPlanner(samples, share, crops, None, seed, train, self._mask_threads)
        super().__init__(planner, decoding, prefetch, on_rank_0)

    @property
    def num_classes(self) -> int:
        """Classes of the masks."""
        return self.mask_spec.num_classes

    def close(self) -> None:
        super().close()
        self._mask_threads.shutdown(wait=True, cancel_futures=True)
