"""Batches made on the CPU: threads decode and augment a few samples each, then make a few samples' token targets."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch

from tl_fast.kernels import cpu
from tl_fast.pipeline.batch import Batch, BatchPlan, UnderWay
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.planner import BatchPlanner
from tl_fast.pipeline.settings import Decoding


class CpuBatches:
    """A `BatchMaker` of the host's memory.

    planner: whose plans are carried out.
    decoding: threads, and whether samples are checked.
    """

    reads_files = True

    def __init__(self, planner: BatchPlanner, decoding: Decoding):
        self.samples, self.targets = planner.samples, planner.targets
        self.decoding = decoding
        self.decoder = Decoder(self.samples, decoding.threads)
        self.buffers = Buffers()
        self._fill = np.array(planner.crops.augment.fill, np.uint8)
        self._workers = ThreadPoolExecutor(decoding.threads, "tl_fast-kernel")
        self._compiled = False

    def enter_thread(self) -> None:
        """Nothing: the host's memory is every thread's."""

    def start(self, plan: BatchPlan) -> UnderWay:
        """Start the decoding and the kernels of one batch."""
        size, threads = len(plan.ids), min(self.decoding.threads, len(plan.ids))
        images = self.buffers.take((size, 3, *plan.image_size), np.uint8)
        masks = None if plan.masks is None else self.buffers.take((size, *plan.image_size), np.uint8)
        # Each thread takes the next sample that none has taken; the first one is a part of its own for `_share`.
        queue = iter(range(size))
        parts = [itertools.islice(queue, 1), *[queue] * threads]
        futures = self._share(functools.partial(self._augment, plan, images, masks), parts)
        delivered = None
        if plan.affines is not None:
            shape = (size, self.targets.tokens, self.samples.num_classes)
            targets = self.buffers.take(shape, np.float32)
            delivered = torch.from_numpy(targets)
            if self.targets.dtype == "bfloat16":  # which numpy does not know
                delivered = torch.from_numpy(self.buffers.take(shape, np.uint16)).view(torch.bfloat16)
            maps = self.samples.label_maps(plan.ids)
            bounds = np.linspace(0, size, threads + 1).astype(int)
            slices = [slice(first, stop) for first, stop in itertools.pairwise(bounds)]
            futures += self._share(functools.partial(self._token_targets, plan, *maps, targets, delivered), slices)
        self._compiled = True
        batch = Batch(
            images=torch.from_numpy(images),
            labels=torch.from_numpy(self.samples.labels[plan.ids]),
            targets=delivered,
            sample_ids=torch.from_numpy(np.ascontiguousarray(plan.ids)),
            masks=None if masks is None else torch.from_numpy(masks),
            **{name: torch.from_numpy(values) for name, values in plan.extras.items()},
        )
        return UnderWay(futures, batch)

    def _augment(self, plan: BatchPlan, images: np.ndarray, masks: np.ndarray | None, part: Iterator[int]) -> None:
        """Decode these samples and write their images, and their masks where the batch has some."""
        for b in part:
            if self.decoding.check:
                self.samples.check(plan.ids[b])
            # The augmentation finds them in the core's cache.
            pixels = self.decoder.pixels(plan.ids[b], plan.starts[b], plan.shapes[b])
            cpu.augment(pixels, plan.heights[b], plan.widths[b], plan.plans[b], self._fill, images[b])
            if masks is not None:
                ignored = self.samples.mask_spec.ignore_index
                cpu.show_mask(plan.masks[b], plan.plans[b], ignored, masks[b], images[b], self._fill)

    def _token_targets(
        self,
        plan: BatchPlan,
        classes: np.ndarray,
        scores: np.ndarray,
        targets: np.ndarray,
        delivered: torch.Tensor,
        part: slice,
    ) -> None:
        """Write these samples' token targets into `targets`, float32, and round them into `delivered` where it is
        bfloat16; else both are one memory."""
        cpu.warped_targets(
            classes[part],
            scores[part],
            plan.affines[part],
            self.samples.num_classes,
            self.targets.grid,
            self.targets.smoothing,
            targets[part],
            # What is beyond a square map is image, of which the map's edge says most.
            cut=self.samples.spec.extent == "full",
        )
        if delivered.dtype != torch.float32:
            delivered[part] = torch.from_numpy(targets[part])

    def _share(self, kernel: Callable, parts: Sequence) -> list[Future]:
        """`kernel(part)` on the worker threads. The first time one part runs alone, because numba does not bear two
        threads that compile one function."""
        futures = [self._workers.submit(kernel, parts[0])]
        if not self._compiled:
            wait(futures)
        return futures + [self._workers.submit(kernel, part) for part in parts[1:]]

    def finish(self, under_way: UnderWay) -> Batch:
        """Wait for the threads that fill the batch; raises what failed there."""
        for future in under_way.futures:
            future.result()
        return under_way.batch

    def check(self) -> None:
        """Nothing: `finish` has raised all errors."""

    def forget(self) -> None:
        """Nothing: `finish` leaves nothing to check."""

    def close(self) -> None:
        """Stop the threads."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self.decoder.close()


MOST_SHAPES = 8  # of arrays that `Buffers` keeps memory of


class Buffers:
    """Memory of batches that nobody holds any more, to be written again.

    New memory costs a page fault every 4 KB: for token targets of 1,000 classes several times what computing them
    takes. Memory is kept of the shapes asked for last: whole images come in any number of shapes.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], type], list[np.ndarray]] = {}
        self.allocated = 0  # arrays made so far

    def take(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An array with any content; it is in use as long as it, or a view or tensor made from it, is referred to."""
        key = shape, dtype
        free = self._free[key] = self._free.pop(key, [])  # as the dictionary's last
        if len(self._free) > MOST_SHAPES:
            del self._free[next(iter(self._free))]
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(shape, dtype)
            self.allocated += 1
        # numpy does not look behind a memoryview: views of the new array refer to that array, not to `memory`, and keep
        # it alive.
        array = np.asarray(memoryview(memory))
        weakref.finalize(array, free.append, memory).atexit = False
        return array
