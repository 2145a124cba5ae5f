"""Which samples a batch holds, and everything that is decided about them before a JPEG is touched."""

from __future__ import annotations

import abc
import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tl_fast.beton.samples import Samples
from tl_fast.kernels.geometry import cpu as geometry
from tl_fast.maths import scalar
from tl_fast.pipeline.batch import BatchPlan
from tl_fast.pipeline.settings import Crops, Share, Targets
from tl_fast.plan import records
from tl_fast.plan.boxes import center_boxes, map_affines
from tl_fast.plan.order import MOST_GROUPS, epoch_order, grouped_order
from tl_fast.system.mistakes import InputError

EVAL_INTERPOLATION = scalar.BICUBIC  # the published evaluation's


@dataclass(frozen=True)
class BatchPlanner(abc.ABC):
    """The plans of one rank's batches: a batch depends on (seed, epoch, step) and on nothing else.

    samples: the data set.
    share: the samples of every step that are this rank's.
    crops: what the images show.
    targets: how the token targets are made; None for none.
    seed: of all randomness.
    train: random crops in a new order every epoch, whole global batches only; False: every sample in file order.

    Raises InputError when training's samples do not fill one global batch, and for numbers of ranks among which the
    groups of a grouped order cannot be divided.
    """

    samples: Samples
    share: Share
    crops: Crops
    targets: Targets | None
    seed: int
    train: bool

    def __post_init__(self) -> None:
        if self.train and len(self.samples) < self.share.global_batch:
            raise InputError(
                f"{len(self.samples)} samples do not fill one global batch of {self.share.batch_size} x "
                f"{self.share.world_size} ranks; lower the batch size"
            )
        if self.train and self.share.order == "grouped" and self.share.groups % self.share.world_size:
            raise InputError(
                f"order 'grouped' divides its groups, {MOST_GROUPS} or a smaller power of two, equally among the ranks,"
                f" got {self.share.world_size} ranks: use 1, 2, 4, 8, 16, 32 or 64 ranks, or order 'shuffled'"
            )

    def __len__(self) -> int:
        """Steps of one whole epoch; the same on every rank when training."""
        if self.train:
            return len(self.samples) // self.share.global_batch
        return len(self._batch_starts) - 1

    @functools.cached_property
    def _batch_starts(self) -> np.ndarray:
        """Where evaluation's batches begin among this rank's samples, and the end: int64 [steps + 1]."""
        samples_of_rank = len(range(self.share.rank, len(self.samples), self.share.world_size))
        return np.append(np.arange(0, samples_of_rank, self.share.batch_size), samples_of_rank)

    def order(self, epoch: int) -> np.ndarray:
        """The order of all ranks' samples in an epoch, int64 [n]; a grouped one of the epoch's whole steps alone."""
        if not self.train:
            return np.arange(len(self.samples))
        if self.share.order == "grouped":
            return grouped_order(self.seed, epoch, len(self.samples), self.share.global_batch)
        return epoch_order(self.seed, epoch, len(self.samples))

    def ids(self, order: np.ndarray, step: int) -> np.ndarray:
        """This rank's samples of a step, int64 [B]."""
        if self.train:
            start = step * self.share.global_batch + self.share.rank * self.share.batch_size
            return order[start : start + self.share.batch_size]
        return order[self.share.rank :: self.share.world_size][self._batch_starts[step] : self._batch_starts[step + 1]]

    def rank_ids(self) -> np.ndarray:
        """The samples that this rank may take in an epoch, ascending, int64 [n]; with a free order of training, all."""
        ids = np.arange(len(self.samples))
        share = self.share
        if not self.train:
            return ids[share.rank :: share.world_size]
        if share.order != "grouped":
            return ids
        return ids[ids % share.groups // (share.groups // share.world_size) == share.rank]

    def batch_bytes(self) -> int:
        """About what a batch takes on its way."""
        return int(self.share.batch_size * self._sample_bytes()) + 1

    @abc.abstractmethod
    def _sample_bytes(self) -> float:
        """What a sample takes, on average; of decoded pixels at most the whole image's."""

    @abc.abstractmethod
    def read_whole(self, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """What is read of these samples besides their images, as addresses and sizes in bytes, int64 [n] both."""

    @abc.abstractmethod
    def draw(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        """Training's plans of these samples, PLAN records [B]."""

    @abc.abstractmethod
    def regions(self, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The samples' plans, PLAN records [B], and the pixels that they need: the first and the one behind the last,
        (row, column), int64 [B, 2] each."""

    @abc.abstractmethod
    def plan(self, ids: np.ndarray, epoch: int) -> BatchPlan:
        """All that is decided about a batch of these samples, int64 [B]."""

    def trial(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Batches to try decoders on, without end, as (ids, starts, shapes): this rank's of epoch 0, its crops
        included."""
        order = self.order(0)
        for step in itertools.cycle(range(len(self))):
            ids = self.ids(order, step)
            _, starts, stops = self.regions(ids, 0)
            yield ids, starts, stops - starts


@dataclass(frozen=True)
class Planner(BatchPlanner):
    """Plans of images and token targets. Training shows random resized crops, evaluation centre crops."""

    def _sample_bytes(self) -> float:
        pixels = 3 * float((self.samples.heights * self.samples.widths).mean()) + 3 * math.prod(self.crops.image_size)
        size = 2 if self.targets is not None and self.targets.dtype == "bfloat16" else 4  # bytes
        return pixels + (0 if self.targets is None else size * self.targets.tokens * self.samples.num_classes)

    def read_whole(self, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [] if self.targets is None else [self.samples.label_map_addresses(ids)]

    def draw(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        heights, widths = self.samples.heights[ids], self.samples.widths[ids]
        return records.draw(self.seed, epoch, ids, heights, widths, self.crops.augment, self.crops.aspect)

    def regions(self, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        heights, widths = self.samples.heights[ids], self.samples.widths[ids]
        if self.train:
            plans = self.draw(ids, epoch)
        else:
            boxes = center_boxes(heights, widths, self.crops.image_size, self.crops.crop_pct)
            plans = records.of_boxes(boxes, EVAL_INTERPOLATION)
        return plans, *geometry.needed(plans, heights, widths, self.crops.image_size)

    def plan(self, ids: np.ndarray, epoch: int) -> BatchPlan:
        plans, starts, stops = self.regions(ids, epoch)
        heights, widths = self.samples.heights[ids], self.samples.widths[ids]
        affines = None
        if self.targets is not None:
            affines = map_affines(plans, heights, widths, self.samples.spec.extent, self.targets.geometry)
        extras = {}
        if self.train and self.crops.augment.erase > 0:
            extras["erase"] = records.erase_boxes(plans, self.crops.image_size)
            extras["noise"] = plans["noise"].view(np.int64).copy()
        size = self.crops.image_size
        return BatchPlan(ids, heights, widths, plans, starts, stops - starts, size, affines, extras)
