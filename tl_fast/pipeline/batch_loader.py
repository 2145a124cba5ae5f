"""What all loaders share: which batch next, how many ahead, what happens at the end.

What is decided about a batch comes from a planner (`planner`, `segment_planner`); `cpu_batches` and `gpu_batches` make
it.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from tl_fast.pipeline.batch import Batch, BatchMaker, UnderWay
from tl_fast.pipeline.choice import OnRank0, call
from tl_fast.pipeline.cpu_batches import CpuBatches
from tl_fast.pipeline.planner import BatchPlanner
from tl_fast.pipeline.read_ahead import ReadAhead
from tl_fast.pipeline.settings import Decoding
from tl_fast.system.mistakes import InputError

PREFETCH_BYTES = 2 << 30  # of the batches under way, about
MOST_PREFETCH = {"cpu": 2, "cuda": 4}  # batches; on a GPU single large images must not stop 16 threads


@dataclass
class _Epoch:
    """An epoch that is iterated, or about to be.

    choice: number of the epoch, its first step and the one behind its last.
    order: of the samples, int64 [number of samples].
    steps: that are not begun.
    pending: of the steps that are.
    """

    choice: tuple[int, int, int]
    order: Future[np.ndarray]
    steps: Iterator[int]
    pending: collections.deque[Future[UnderWay]] = field(default_factory=collections.deque)

    def cancel(self) -> None:
        """Begin nothing more, and wait for what is under way."""
        self.steps = iter(())
        for future in self.pending:
            future.cancel()
        for future in self.pending:
            if not future.cancelled() and future.exception() is None:
                wait(future.result().futures)
        self.pending.clear()


class BatchLoader:
    """Batches that a planner plans, made ahead of whoever takes them.

    planner: what the batches are.
    decoding: where they are made, and how their JPEGs are decoded.
    prefetch: batches under way besides the one that is waited for; None: 4 on a CUDA device and 2 on the CPU, but fewer
        (1 at least) where they would take more than 2 GiB.
    on_rank_0: calls a function on rank 0 alone and returns its result on every rank; None: every rank for itself.

    Iterating yields the epoch chosen with `set_epoch`. Leaving the loop early cancels what was under way. An error in
    any thread is raised by the iteration.
    """

    def __init__(self, planner: BatchPlanner, decoding: Decoding, prefetch: int | None, on_rank_0: OnRank0 | None):
        if prefetch is not None and prefetch < 1:
            raise InputError(f"prefetch must be at least 1 batch, got prefetch={prefetch}")
        share = planner.share
        self.samples, self.seed, self.train = planner.samples, planner.seed, planner.train
        self.augment = planner.crops.augment
        self.batch_size, self.rank, self.world_size = share.batch_size, share.rank, share.world_size
        self.order, self.groups = share.order, share.groups
        self.hw_decoder_load, self.threads, self.check = decoding.hw_decoder_load, decoding.threads, decoding.check
        self._planner = planner
        self.prefetch = prefetch or max(
            min(PREFETCH_BYTES // planner.batch_bytes(), MOST_PREFETCH[decoding.device.type]), 1
        )
        self._maker = _open_maker(planner, decoding, self.prefetch + 1, on_rank_0 or call)
        self._plan = ReadAhead(planner, decoding.check).plan if self._maker.reads_files else planner.plan
        # One thread plans batches and starts them. Threads of the maker decode them, without a pause between batches.
        self._driver = ThreadPoolExecutor(1, "tl_fast-decode", self._maker.enter_thread)
        self._drawer = ThreadPoolExecutor(1, "tl_fast-order")  # of an epoch's order, while the one before is iterated
        self.set_epoch(0)
        self._prepared: _Epoch | None = None

    @property
    def decode(self) -> str:
        """How JPEGs are decoded: 'cpu', 'mixed' (nvJPEG), 'hybrid' or, until the first steps have decided, 'auto'."""
        return self._maker.decoder.way

    @property
    def hybrid_share(self) -> float | None:
        """Share of the samples that nvJPEG decodes under 'hybrid'; None for other ways, and until it is measured."""
        return self._maker.decoder.share

    def __len__(self) -> int:
        """Steps of one whole epoch; the same on every rank when training."""
        return len(self._planner)

    def set_epoch(
        self, epoch: int, start_step: int = 0, stop_step: int | None = None, next_epoch: int | None = None
    ) -> None:
        """Choose the epoch of the next iteration, and the steps of it.

        start_step: the first one (for resuming); stop_step: the one behind the last, None for all.
        next_epoch: the epoch that is iterated after it, from its first step to `stop_step`. Its order is drawn, and its
        first batches are made, while this one ends. None: not known.
        """
        stop = len(self) if stop_step is None else stop_step
        if not (0 <= start_step <= stop <= len(self) and 0 <= epoch and 0 <= (next_epoch or 0)):
            raise InputError(
                f"epoch and next_epoch must be >= 0 and 0 <= start_step <= stop_step <= {len(self)}, got "
                f"epoch={epoch}, start_step={start_step}, stop_step={stop_step}, next_epoch={next_epoch}"
            )
        self._choice, self._next_epoch = (epoch, start_step, stop), next_epoch

    def draw(self, sample_ids: np.ndarray) -> np.ndarray:
        """The plans of these samples in the chosen epoch, PLAN records [B]."""
        return self._planner.draw(sample_ids, self._choice[0])

    def batch(self, sample_ids: np.ndarray) -> Batch:
        """These samples as the chosen epoch has them, at most `batch_size` of them; for looking at, not for
        training."""
        ids = np.asarray(sample_ids, np.int64)
        if ids.ndim != 1 or not 1 <= ids.size <= self.batch_size or ids.min() < 0 or ids.max() >= len(self.samples):
            raise InputError(
                f"sample ids must be 1..{self.batch_size} numbers in 0..{len(self.samples) - 1}, got {sample_ids}"
            )
        batch = self._maker.finish(self._driver.submit(self._produce, ids, self._choice[0]).result())
        self._maker.check()
        return batch

    def __iter__(self) -> Iterator[Batch]:
        choice, next_epoch = self._choice, self._next_epoch  # set_epoch while this runs is for the next iteration
        prepared, self._prepared = self._prepared, None
        if prepared is not None and prepared.choice != choice:
            prepared.cancel()
            prepared = None
        epochs = [prepared or self._open(choice)]
        if next_epoch is not None:
            epochs.append(self._open((next_epoch, 0, choice[2])))
        pending = epochs[0].pending
        self._maker.forget()  # what an iteration that was left early delivered
        self._maker.decoder.begin()
        try:
            self._fill(epochs)
            while pending:
                yield self._take(pending.popleft())
                # Before the wait: the threads go on with them where they are done with the batch waited for.
                self._fill(epochs)
        except GeneratorExit:
            if not pending:  # who has all batches need not ask for another one
                self._end(epochs)
            raise
        else:
            self._end(epochs)
        finally:
            for epoch in epochs:
                epoch.cancel()

    def _end(self, epochs: list[_Epoch]) -> None:
        """All batches of the first epoch are taken: keep what is begun of the one behind it. Raises what the device
        found wrong."""
        self._maker.check()
        if len(epochs) > 1:
            self._prepared = epochs.pop()

    def _take(self, future: Future[UnderWay]) -> Batch:
        """Wait for a batch. The iteration keeps no reference to it."""
        batch = self._maker.finish(future.result())
        self._maker.decoder.taken(len(batch.images))
        return batch

    def _open(self, choice: tuple[int, int, int]) -> _Epoch:
        order = self._drawer.submit(self._planner.order, choice[0])
        return _Epoch(choice, order, iter(range(*choice[1:])))

    def _fill(self, epochs: list[_Epoch]) -> None:
        """Begin batches of the first epoch, then of the one behind it, until the next one and `prefetch` are under
        way."""
        room = self.prefetch + 1 - sum(len(epoch.pending) for epoch in epochs)
        for epoch in epochs:
            for step in itertools.islice(epoch.steps, room):
                epoch.pending.append(self._driver.submit(self._produce_step, epoch, step))
                room -= 1

    def _produce_step(self, epoch: _Epoch, step: int) -> UnderWay:
        return self._produce(self._planner.ids(epoch.order.result(), step), epoch.choice[0])

    def _produce(self, ids: np.ndarray, epoch: int) -> UnderWay:
        """Plan a batch and start to make it."""
        return self._maker.start(self._plan(ids, epoch))

    def close(self) -> None:
        """Stop the threads and close the files. The loader cannot be used afterwards."""
        if self._prepared is not None:
            self._prepared.cancel()
        self._drawer.shutdown(wait=True, cancel_futures=True)
        self._driver.shutdown(wait=True, cancel_futures=True)
        self._maker.close()
        self.samples.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _open_maker(planner: BatchPlanner, decoding: Decoding, ahead: int, on_rank_0: OnRank0) -> BatchMaker:
    """What makes batches on the device; ahead: batches that may be under way there at once."""
    if decoding.device.type == "cpu":
        return CpuBatches(planner, decoding)
    from tl_fast.pipeline import gpu_batches  # here: numba's CUDA half takes a while to import

    return gpu_batches.GpuBatches(planner, gpu_batches.find_device(decoding.device), decoding, ahead, on_rank_0)
