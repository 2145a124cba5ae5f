"""The decode pipeline: betons -> plan -> decode of the crop -> resample and token targets -> Batch.

Here is the order of things: which batch next, how many ahead, what happens at the end. What is decided about a batch
comes from `planner`; `cpu_batches` and `gpu_batches` make it.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch

from tl_fast.beton.samples import Samples
from tl_fast.pipeline.batch import Batch, BatchMaker, UnderWay
from tl_fast.pipeline.cpu_batches import CpuBatches
from tl_fast.pipeline.decode import HW_DECODER_LOAD
from tl_fast.pipeline.planner import Planner
from tl_fast.pipeline.settings import Crops, Decoding, Share, Targets
from tl_fast.plan.augment import Augment
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import cores_of_this_rank


class Loader:
    """Batches of one or several betons: image crops and their token targets, both from the same plan.

    paths: a beton, a glob or a list of them.
    batch_size: samples a rank and step.
    image_size: height and width of the images in pixels.
    grid: tokens a side.
    train: True for a random resized crop and flip of the samples in a new order every epoch, whole batches only (what
        is left over differs from epoch to epoch); False for resize and centre crop of every sample exactly once over
        all ranks, in file order, without targets.
    augment: ranges of the random decisions; None for the paper's.
    geometry: "correct", or "published" to crop label maps where the published code does, mirrored across the diagonal.
    seed: of all randomness.
    threads: decode and kernel threads; None for this rank's share of the cores.
    device: where batches are made and delivered, 'cpu' or a CUDA device ('cuda': torch's current one). A CUDA device's
        batches are ready for the stream that is current when they are taken.
    decode: 'cpu', 'mixed' (nvJPEG, on CUDA devices alone) or 'auto'. On a CUDA device 'auto' decodes for a second in
        both ways when the first batch is made, takes the faster and says so on stderr (rank 0).
    hw_decoder_load: share of the images that nvJPEG gives to the GPU's JPEG engine, 0..1.
    rank, world_size: this rank takes its part of every global batch.
    smoothing: label smoothing of the targets, [0, 1).
    crop_pct: share of the resized image's short side that evaluation keeps, (0, 1].
    token_labels: False leaves the targets out.
    check: compare every sample's CRC-32 as it is read.
    prefetch: batches under way besides the one that is waited for.

    Iterating yields the epoch chosen with `set_epoch`. Leaving the loop early cancels what was under way. An error in
    any thread is raised by the iteration. The settings are attributes too; `decode` is the way chosen once the first
    batch is made.

    Raises ValueError or FileNotFoundError for settings or files that cannot work, ImportError for 'mixed' without DALI.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        batch_size: int,
        *,
        image_size: int = 224,
        grid: int = 14,
        train: bool = True,
        augment: Augment | None = None,
        geometry: str = "correct",
        seed: int = 0,
        threads: int | None = None,
        device: str | torch.device = "cpu",
        decode: str = "auto",
        hw_decoder_load: float = HW_DECODER_LOAD,
        rank: int = 0,
        world_size: int = 1,
        smoothing: float = 0.1,
        crop_pct: float = 0.9,
        token_labels: bool = True,
        check: bool = False,
        prefetch: int = 2,
    ):
        share = Share(batch_size, rank, world_size)
        crops = Crops(image_size, augment or Augment(), crop_pct)
        targets = Targets(grid, smoothing, geometry)
        decoding = Decoding(torch.device(device), decode, hw_decoder_load, threads or cores_of_this_rank(), check)
        if prefetch < 1:
            raise InputError(f"prefetch must be at least 1 batch, got prefetch={prefetch}")
        self.samples = Samples(paths)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.image_size, self.augment, self.crop_pct = image_size, crops.augment, crop_pct
        self.grid, self.smoothing, self.geometry = grid, smoothing, geometry
        self.hw_decoder_load, self.threads, self.check = hw_decoder_load, decoding.threads, check
        self.seed, self.train, self.prefetch = seed, train, prefetch
        self.token_labels = token_labels and train and self.samples.spec is not None
        self._planner = Planner(self.samples, share, crops, targets if self.token_labels else None, seed, train)
        self._maker = _open_maker(self._planner, decoding, ahead=prefetch + 1)
        # One thread plans batches and starts them. Threads of the maker decode them, without a pause between batches.
        self._driver = ThreadPoolExecutor(1, "tl_fast-decode", self._maker.enter_thread)
        self._epoch, self._start_step = 0, 0

    @property
    def decode(self) -> str:
        """How JPEGs are decoded: 'cpu', 'mixed' (nvJPEG) or, until the first batch has decided, 'auto'."""
        return self._maker.decoder.way

    @property
    def num_classes(self) -> int:
        """C of the targets and labels."""
        return self.samples.num_classes

    def __len__(self) -> int:
        """Steps of one whole epoch; the same on every rank when training."""
        return len(self._planner)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration, and the step in it to start from (for resuming)."""
        if epoch < 0 or not 0 <= start_step <= len(self):
            raise InputError(f"epoch must be >= 0 and start_step in 0..{len(self)}, got {epoch} and {start_step}")
        self._epoch, self._start_step = epoch, start_step

    def draw(self, sample_ids: np.ndarray) -> np.ndarray:
        """The plans of these samples in the chosen epoch, PLAN records [B]."""
        return self._planner.draw(sample_ids, self._epoch)

    def batch(self, sample_ids: np.ndarray) -> Batch:
        """These samples as the chosen epoch has them, at most `batch_size` of them; for looking at, not for
        training."""
        ids = np.asarray(sample_ids, np.int64)
        if ids.ndim != 1 or not 1 <= ids.size <= self.batch_size or ids.min() < 0 or ids.max() >= len(self.samples):
            raise InputError(
                f"sample ids must be 1..{self.batch_size} numbers in 0..{len(self.samples) - 1}, got {sample_ids}"
            )
        batch = self._maker.finish(self._driver.submit(self._produce, ids, self._epoch).result())
        self._maker.check()
        return batch

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch  # set_epoch while this runs is for the next iteration
        order = self._planner.order(epoch)
        steps = iter(range(self._start_step, len(self)))
        pending: collections.deque[Future] = collections.deque()

        def submit(count: int) -> None:
            for step in itertools.islice(steps, count):
                pending.append(self._driver.submit(self._produce, self._planner.ids(order, step), epoch))

        self._maker.forget()  # what an iteration that was left early delivered
        try:
            submit(self.prefetch)
            while pending:
                submit(1)  # before the wait: the threads go on with it where they are done with the batch waited for
                yield self._maker.finish(pending.popleft().result())
            self._maker.check()
        finally:
            for future in pending:
                future.cancel()
            for future in pending:
                if not future.cancelled() and future.exception() is None:
                    wait(future.result().futures)

    def _produce(self, ids: np.ndarray, epoch: int) -> UnderWay:
        """Plan a batch and start to make it."""
        return self._maker.start(self._planner.plan(ids, epoch))

    def close(self) -> None:
        """Stop the threads and close the files. The loader cannot be used afterwards."""
        self._driver.shutdown(wait=True, cancel_futures=True)
        self._maker.close()
        self.samples.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _open_maker(planner: Planner, decoding: Decoding, ahead: int) -> BatchMaker:
    """What makes batches on the device; ahead: batches that may be under way there at once."""
    if decoding.device.type == "cpu":
        return CpuBatches(planner, decoding)
    from tl_fast.pipeline import gpu_batches  # here: numba's CUDA half takes a while to import

    return gpu_batches.GpuBatches(planner, gpu_batches.find_device(decoding.device), decoding, ahead)
