"""Which way to decode: on the CPU, by nvJPEG, or both at once. It is measured, since it depends on the cores, the GPU,
the images and the step."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import torch

from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.regions import DecodeError, Regions, RegionsDecoder, Started

MEASURE_SECONDS = 0.5  # for each way to decode
BEGUN = 3  # batches that are begun at once when a rate is measured
WARM_UP, MEASURED = 16, 32  # batches taken before the step's demand is measured, since it may compile first; and during
COVERED = 0.9  # share of their time that the threads decode, below which the cores keep up with the step
GAIN = 1.1  # what nvJPEG must gain to be chosen: its CUDA half takes time from the training step

T = TypeVar("T")
Work = Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]  # (ids, starts, shapes) of batch after batch
OnRank0 = Callable[[Callable[[], T]], T]  # calls the function on rank 0 alone and returns its result on every rank


def call(function: Callable[[], T]) -> T:
    """The `OnRank0` of a process that decides for itself."""
    return function()


def rate(decoder: RegionsDecoder, work: Work, seconds: float = MEASURE_SECONDS, warm_up: int = 2) -> float:
    """Images/s of `decoder`, until their pixels are on the device, with several batches begun at once.

    work: batches to decode; where they end the measurement does.
    seconds: length of the measurement, about.
    warm_up: batches decoded before it.

    Raises ValueError when `work` has no batch beyond the warm-up.
    """
    images, done, begin = 0, 0, time.perf_counter()
    begun: collections.deque[tuple[int, Started]] = collections.deque()
    for batch in work:
        begun.append((len(batch[0]), decoder.start(*batch)))  # without a stream: the pixels are there on return
        if len(begun) < BEGUN:
            continue
        count, finish = begun.popleft()
        finish()
        done += 1
        if done <= warm_up:
            begin = time.perf_counter()
            continue
        images += count
        if time.perf_counter() - begin >= seconds:
            break
    elapsed = time.perf_counter() - begin
    for _, finish in begun:
        finish()
    if not images:
        raise ValueError(f"the measurement needs more than {warm_up + BEGUN - 1} batches")
    return images / elapsed


class AutoDecoder(RegionsDecoder):
    """Decodes on the CPU, and goes over to nvJPEG where the cores do not keep up with the step and nvJPEG is faster.

    cpu: the CPU's decoder.
    open_nvjpeg: makes nvJPEG's decoder.
    trial: endless batches to measure nvJPEG with.
    on_rank_0: rank 0 decides for all ranks, which must take their batches in step.
    announce: whether to say on stderr what was decided and why.

    way: 'auto' until that is known, then 'cpu' or 'mixed'.

    Measured are `MEASURED` batches after `WARM_UP` others, without the time between iterations.
    """

    def __init__(
        self,
        cpu: Decoder,
        open_nvjpeg: Callable[[], RegionsDecoder],
        trial: Callable[[], Work],
        on_rank_0: OnRank0,
        announce: bool,
    ):
        self.way = "auto"
        self._cpu, self._open_nvjpeg, self._trial = cpu, open_nvjpeg, trial
        self._on_rank_0, self._announce = on_rank_0, announce
        self._decoder: RegionsDecoder = cpu
        self._taken = self._images = 0
        self._seconds = self._busy_seconds = 0.0
        self._last = time.perf_counter(), 0.0  # the clock, and how long the CPU's decoder had been busy by then

    def start(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None = None
    ) -> Started:
        return self._decoder.start(ids, starts, shapes, stream)

    def begin(self) -> None:
        self._last = time.perf_counter(), self._cpu.busy_seconds

    def taken(self, images: int) -> None:
        if self.way != "auto":
            return
        (before, busy_before), self._last = self._last, (time.perf_counter(), self._cpu.busy_seconds)
        self._taken += 1
        if self._taken > WARM_UP:
            self._images += images
            self._seconds += self._last[0] - before
            self._busy_seconds += self._last[1] - busy_before
        if self._taken == WARM_UP + MEASURED:
            self.way, words = self._on_rank_0(self._choose)
            if self._announce:
                print(f"tl_fast: {words}", file=sys.stderr, flush=True)
            if self.way == "mixed":
                self._decoder = self._open_nvjpeg()

    def _choose(self) -> tuple[str, str]:
        """'cpu' or 'mixed', and the measurement in words."""
        threads, on_cpu = self._cpu.threads, self._images / self._seconds
        busy = self._busy_seconds / (threads * self._seconds)
        measured = f"{threads} threads are {busy:.0%} busy at the step's {on_cpu:,.0f} images/s"
        if busy < COVERED:
            return "cpu", f"decode 'cpu': {measured}"
        nvjpeg = self._open_nvjpeg()
        try:
            mixed = rate(nvjpeg, self._trial())
        except DecodeError:
            raise
        except (RuntimeError, ImportError) as error:  # from building the graph: a driver or GPU without nvJPEG, no DALI
            reason = str(error).splitlines()[0]
            return "cpu", f"decode 'cpu': {measured}; 'mixed' (nvJPEG) does not work here: {reason}"
        finally:
            nvjpeg.close()
        way = "mixed" if mixed > GAIN * on_cpu else "cpu"
        return way, f"decode {way!r}: {measured}; mixed (nvJPEG) {mixed:,.0f}, taken from {GAIN:.0%} on"

    def close(self) -> None:
        self._cpu.close()
        self._decoder.close()


class HybridDecoder(RegionsDecoder):
    """The cores decode some samples while nvJPEG decodes the others. Who decodes a sample depends on its id alone.

    cpu, nvjpeg: the two decoders.
    share: of the samples that nvJPEG decodes, 0..1; None: its part of the sum of both rates, which are measured when an
        iteration begins. Until then the CPU decodes all.
    trial: endless batches to measure with.
    on_rank_0: rank 0 measures for all ranks, which must begin to iterate in step.
    announce: whether to say on stderr what was measured.
    """

    way = "hybrid"

    def __init__(
        self,
        cpu: Decoder,
        nvjpeg: RegionsDecoder,
        share: float | None,
        trial: Callable[[], Work],
        on_rank_0: OnRank0,
        announce: bool,
    ):
        self.share = share
        self._cpu, self._nvjpeg, self._trial, self._on_rank_0, self._announce = cpu, nvjpeg, trial, on_rank_0, announce

    def start(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None = None
    ) -> Started:
        by_nvjpeg = chosen(ids, self.share or 0)
        if by_nvjpeg.all():
            return self._nvjpeg.start(ids, starts, shapes, stream)
        by_cpu = ~by_nvjpeg
        # The CPU's first: its threads work while this one waits for nvJPEG.
        finish_cpu = self._cpu.start(ids[by_cpu], starts[by_cpu], shapes[by_cpu], stream)
        if by_cpu.all():
            return finish_cpu
        finish_nvjpeg = self._nvjpeg.start(ids[by_nvjpeg], starts[by_nvjpeg], shapes[by_nvjpeg], stream)

        def finish() -> tuple[Regions, torch.cuda.Event | None]:
            decoded, _ = finish_nvjpeg()
            # This upload comes behind nvJPEG's work on the stream, so its event stands for both.
            uploaded, event = finish_cpu()
            addresses = np.empty(len(ids), np.int64)
            addresses[by_cpu], addresses[by_nvjpeg] = uploaded.addresses, decoded.addresses
            return Regions(addresses, shapes, uploaded.on_gpu, (uploaded, decoded)), event

        return finish

    def begin(self) -> None:
        if self.share is None:
            self.share, words = self._on_rank_0(self._measure)
            if self._announce:
                print(f"tl_fast: {words}", file=sys.stderr, flush=True)

    def _measure(self) -> tuple[float, str]:
        """nvJPEG's share, and the measurement in words."""
        on_cpu, mixed = rate(self._cpu, self._trial()), rate(self._nvjpeg, self._trial())
        share = round(mixed / (on_cpu + mixed), 3)
        measured = f"cpu {on_cpu:,.0f} images/s, mixed (nvJPEG) {mixed:,.0f}"
        return share, f"decode 'hybrid': {measured}; nvJPEG decodes {share:.1%} of the samples (hybrid_share {share})"

    def close(self) -> None:
        self._cpu.close()
        self._nvjpeg.close()


def chosen(ids: np.ndarray, share: float) -> np.ndarray:
    """Which samples belong to a share of them all, bool [B]: spread evenly over the ids, and the same ones always.

    ids: int64 [B]; share: 0..1.
    """
    spread = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
    return (spread >> np.uint64(40)) < share * (1 << 24)
