"""Batches for segmentation: images and masks from the same plan, and everything that is decided before a JPEG is
touched."""

from __future__ import annotations

import functools
import itertools
import math
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from tl_fast.kernels.geometry import cpu as geometry
from tl_fast.pipeline.batch import BatchPlan
from tl_fast.pipeline.planner import BatchPlanner
from tl_fast.plan import records
from tl_fast.plan.segment_records import draw_segment
from tl_fast.system.mistakes import InputError

TASK = 8  # samples that a thread plans at a time: handing one over costs a tenth of planning one


@dataclass(frozen=True)
class SegmentPlanner(BatchPlanner):
    """Plans of images and masks. Training shows crops of the scaled images, evaluation whole images at their stored
    size; a batch of evaluation ends where the size changes, or at `share.batch_size` samples.

    pool: whose threads decode masks.
    """

    pool: Executor

    @functools.cached_property
    def _batch_starts(self) -> np.ndarray:
        mine = slice(self.share.rank, None, self.share.world_size)
        sizes = np.stack([self.samples.heights[mine], self.samples.widths[mine]], axis=1)
        starts = [0]
        for sample in range(1, len(sizes)):
            if sample - starts[-1] == self.share.batch_size or (sizes[sample] != sizes[sample - 1]).any():
                starts.append(sample)
        return np.array(starts + [len(sizes)] if len(sizes) else starts)

    def _sample_bytes(self) -> float:
        # Pixels and the mask, as decoded and as shown.
        decoded = float((self.samples.heights * self.samples.widths).mean())
        return 4 * decoded + 4 * (math.prod(self.crops.image_size) if self.train else decoded)

    def read_whole(self, ids: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        return [self.samples.mask_addresses(ids)]

    def draw(self, ids: np.ndarray, epoch: int) -> np.ndarray:
        return self._masks_and_plans(ids, epoch)[1]

    def regions(self, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        plans = self._masks_and_plans(ids, epoch)[1]
        heights, widths = self.samples.heights[ids], self.samples.widths[ids]
        return plans, *geometry.needed(plans, heights, widths, self._shown(heights, widths))

    def plan(self, ids: np.ndarray, epoch: int) -> BatchPlan:
        heights, widths = self.samples.heights[ids], self.samples.widths[ids]
        size = self._shown(heights, widths)
        masks, plans = self._masks_and_plans(ids, epoch)
        starts, stops = geometry.needed(plans, heights, widths, size)
        return BatchPlan(ids, heights, widths, plans, starts, stops - starts, size, None, {}, masks)

    def _shown(self, heights: np.ndarray, widths: np.ndarray) -> tuple[int, int]:
        """(height, width) of the batch's images. Raises InputError where evaluation's would differ."""
        if self.train:
            return self.crops.image_size
        sizes = sorted(set(zip(heights.tolist(), widths.tolist(), strict=True)))
        if len(sizes) > 1:
            raise InputError(f"whole images of different sizes are no batch: {sizes[0]} and {sizes[1]} pixels")
        return sizes[0]

    def _masks_and_plans(self, ids: np.ndarray, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The samples' decoded masks, uint8 [h, w] each, and their plans, PLAN records [B]."""

        def of_samples(sample_ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
            masks = [self.samples.mask(sample_id) for sample_id in sample_ids.tolist()]
            heights, widths = self.samples.heights[sample_ids], self.samples.widths[sample_ids]
            if not self.train:
                corners = np.zeros_like(heights)
                return masks, records.of_boxes(np.stack([corners, corners, heights, widths], axis=1))
            settings = self.crops.augment, self.crops.image_size, masks, self.samples.mask_spec.ignore_index
            return masks, draw_segment(self.seed, epoch, sample_ids, heights, widths, *settings)

        # The first one alone: numba does not bear two threads that compile one function.
        tasks = [ids[first : first + TASK] for first in range(1, len(ids), TASK)]
        parts = [of_samples(ids[:1]), *self.pool.map(of_samples, tasks)]
        masks, plans = zip(*parts, strict=True)
        return list(itertools.chain.from_iterable(masks)), np.concatenate(plans)
