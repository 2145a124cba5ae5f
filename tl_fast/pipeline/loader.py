"""The decode pipeline: betons -> plan -> decode of the crop -> resample and token targets -> Batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from tl_fast.beton.samples import Samples
from tl_fast.pipeline.batch_loader import BatchLoader
from tl_fast.pipeline.choice import OnRank0
from tl_fast.pipeline.nvjpeg import HW_DECODER_LOAD
from tl_fast.pipeline.planner import Planner
from tl_fast.pipeline.settings import Crops, Decoding, Share, Targets
from tl_fast.plan.augment import Augment
from tl_fast.system.ranks import cores_of_this_rank
from tl_fast.system.sides import Sides, both_sides


class Loader(BatchLoader):
    """Batches of one or several betons: image crops and their token targets, both from the same plan.

    paths: a beton, a glob or a list of them.
    batch_size: samples a rank and step.
    image_size: (height, width) of the images in pixels, or the side of square ones; as an attribute always the pair.
    grid: (rows, columns) of tokens, or tokens a side; as an attribute always the pair.
    train: True for a random resized crop and flip of the samples in a new order every epoch, whole batches only (what
        is left over differs from epoch to epoch); False for resize and centre crop of every sample exactly once over
        all ranks, in file order, without targets.
    augment: ranges of the random decisions; None for the paper's.
    geometry: "correct", or "published" to crop label maps where the published code does, mirrored across the diagonal.
    seed: of all randomness.
    order: training's: "shuffled", or "grouped": sample i is of group i mod G, where G is the largest power of two up to
        64 that divides the global batch, and every global batch takes equally many samples of each group, in an order
        that is new every epoch. Rank r takes samples of the G / world_size groups from r * G / world_size on alone.
        Both orders have the same `len()`. "grouped" needs 1, 2, 4, 8, 16, 32 or 64 ranks.
    threads: decode and kernel threads; None for this rank's share of the cores.
    device: where batches are made and delivered, 'cpu' or a CUDA device ('cuda': torch's current one). A CUDA device's
        batches are ready for the stream that is current when they are taken.
    decode: 'cpu', on CUDA devices also 'mixed' (nvJPEG), 'hybrid' (both at once, each its share of the samples) or
        'auto': 'cpu' as long as the cores keep up with whoever takes the batches, else the faster of 'cpu' and 'mixed'.
        That is measured during the first steps, and said on stderr (rank 0). Evaluation decodes on the CPU unless
        'mixed' is asked for. Images that are stored as planes need no decoding: 'auto' is 'cpu' then, and nvJPEG is
        refused.
    hybrid_share: of the samples that nvJPEG decodes under 'hybrid', 0..1; None: in proportion to both rates, which are
        measured before the first batch. Which samples these are depends on their ids and the share alone.
    hw_decoder_load: share of the images that nvJPEG gives to the GPU's JPEG engine, 0..1.
    rank, world_size: this rank takes its part of every global batch.
    on_rank_0: calls a function on rank 0 alone and returns its result on every rank, so that rank 0 decides about
        'auto' and 'hybrid' for all; every rank calls it at the same batch. None: every rank decides for itself.
    smoothing: label smoothing of the targets, [0, 1).
    targets_dtype: "float32" or "bfloat16"; they are computed in float32.
    crop_pct: share of the resized image that evaluation keeps, (0, 1].
    token_labels: False leaves the targets out.
    check: compare every sample's CRC-32 as it is read.
    prefetch: batches under way besides the one that is waited for; None: 4 on a CUDA device and 2 on the CPU, but fewer
        (1 at least) where they would take more than 2 GiB.
    resident: True to keep this rank's images, which must be stored as planes, and label maps in the GPU's memory: they
        are uploaded when the loader is made. With order "grouped" that is a `world_size`-th of them, with "shuffled"
        all. "auto": for training, where they take at most 30 % of the GPU's memory and 90 % of what is free of it.
        Batches are the same to the bit.

    Iterating yields the epoch chosen with `set_epoch`. Leaving the loop early cancels what was under way. An error in
    any thread is raised by the iteration. The settings are attributes too.

    Raises ValueError or FileNotFoundError for settings or files that cannot work, ImportError for 'mixed' and 'hybrid'
    without DALI.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        batch_size: int,
        *,
        image_size: Sides = 224,
        grid: Sides = 14,
        train: bool = True,
        augment: Augment | None = None,
        geometry: str = "correct",
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
        smoothing: float = 0.1,
        targets_dtype: str = "float32",
        crop_pct: float = 0.9,
        token_labels: bool = True,
        check: bool = False,
        prefetch: int | None = None,
        resident: bool | str = False,
    ):
        share = Share(batch_size, rank, world_size, order)
        crops = Crops(both_sides(image_size), augment or Augment(), crop_pct)
        targets = Targets(both_sides(grid), smoothing, geometry, targets_dtype)
        threads = threads or cores_of_this_rank()
        decoding = Decoding(torch.device(device), decode, hybrid_share, hw_decoder_load, threads, check, resident)
        samples = Samples(paths)
        self.image_size, self.crop_pct = crops.image_size, crop_pct
        self.grid, self.smoothing, self.geometry = targets.grid, smoothing, geometry
        self.token_labels = token_labels and train and samples.spec is not None
        planner = Planner(samples, share, crops, targets if self.token_labels else None, seed, train)
        super().__init__(planner, decoding, prefetch, on_rank_0)

    @property
    def num_classes(self) -> int:
        """C of the targets and labels."""
        return self.samples.num_classes
