"""JPEGs -> the pixels of one region each, by our own decoder on the CPU or by DALI with nvJPEG; importing this module
does not need DALI.

Pillow decodes what our decoder leaves to others, to the same pixels. Whether nvJPEG is faster depends on the machine's
cores and on the images, so `choose` measures.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np
import torch

from tl_fast.jpeg.region import RegionDecoder
from tl_fast.jpeg.restarts import splice
from tl_fast.sources.image import open_rgb
from tl_fast.system.mistakes import Mistake

HW_DECODER_LOAD = 0.65  # share of the images for the GPU's JPEG engine, the others go to its cores; DALI's default
MEASURE_SECONDS = 0.5  # for each way to decode
PART = 4  # regions that a thread takes from the queue at a time
GAIN = 1.1  # what nvJPEG must gain to be chosen: its CUDA half takes time from the training step

Work = Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]  # (ids, starts, shapes) of batch after batch
# What `Decoder.start` returns: waits for the threads -> the regions' pixels, and the event after which they are there.
Started = Callable[[], tuple[Sequence, torch.cuda.Event | None]]


class DecodeError(Mistake, RuntimeError):
    """An image could not be decoded; the message names the sample and its file."""


class _Pixels(list):
    """Tensors of regions.

    source: what the pixels are made from and lie in. The GPU may still be reading it, so it is kept as long as they
        are.
    """

    source: Any


class Jpegs(Protocol):
    """What a decoder reads: `tl_fast.beton.samples.Samples`."""

    def jpeg(self, sample_id: int) -> np.ndarray: ...

    def name(self, sample_id: int) -> str: ...


@functools.cache
def graph_definition() -> Callable:
    """What `decode_graph` builds. ImportError without DALI."""
    try:
        from nvidia.dali import pipeline_def
    except ImportError as error:
        raise ImportError(f"decoding needs DALI ({error}): pip install nvidia-dali-cuda130") from error
    return pipeline_def(decoded_regions)


def decoded_regions(device: str, hw_decoder_load: float = HW_DECODER_LOAD) -> Any:
    """The nodes of `decode_graph`, to be called where DALI defines a graph."""
    from nvidia.dali import fn, types

    # The JPEGs are read where they lie, in the beton's pages.
    jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1, no_copy=True)
    starts = fn.external_source(name="starts", dtype=types.INT32, ndim=1)
    shapes = fn.external_source(name="shapes", dtype=types.INT32, ndim=1)
    return fn.decoders.image_slice(
        jpegs,
        starts,
        shapes,
        axis_names="HW",
        device=device,
        hw_decoder_load=hw_decoder_load,
        adjust_orientation=False,
        output_type=types.RGB,
    )


def decode_graph(device: str, hw_decoder_load: float = HW_DECODER_LOAD, **options: Any) -> Any:
    """The DALI graph: JPEG bytes, region start and region shape (rows, columns) -> RGB pixels of the region, uint8 [h,
    w, 3].

    device: 'cpu', whose pixels stay on the host, or 'mixed' (nvJPEG), whose pixels are on the GPU. The two graphs
        differ in nothing else.
    hw_decoder_load: share of the images that nvJPEG gives to the GPU's JPEG engine, 0..1.
    options: of DALI's pipeline.

    EXIF orientation is ignored: conversion has dealt with it. The JPEGs' arrays are not copied: they must stay as they
    are until the pixels are there. Raises ImportError without DALI.
    """
    return graph_definition()(device, hw_decoder_load, **options)


class Decoder:
    """Regions of a data set's images, one at a time or a batch.

    samples: where the JPEGs are.
    batch_size: regions a batch, at most.
    threads: that decode a batch or, for nvJPEG, cut its JPEGs to their regions.
    way: 'cpu' or 'mixed' (nvJPEG).
    device: the CUDA device that gets a batch's pixels; None: they stay on the host.
    hw_decoder_load: share of the images that nvJPEG gives to the GPU's JPEG engine, 0..1.

    One thread at a time may ask for batches, any number for single regions.
    """

    def __init__(
        self,
        samples: Jpegs,
        batch_size: int,
        threads: int,
        way: str = "cpu",
        device: torch.device | None = None,
        hw_decoder_load: float = HW_DECODER_LOAD,
    ):
        self.samples, self.batch_size, self.threads, self.way, self.device = samples, batch_size, threads, way, device
        self.hw_decoder_load = hw_decoder_load
        self._graph = None
        self._region_decoder = RegionDecoder()
        self._threads = ThreadPoolExecutor(threads, "tl_fast-region")
        self._compiled = False

    def __call__(self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray) -> Sequence:
        """The regions' pixels, uint8 [h, w, 3] each: tensors of torch, or DALI's for nvJPEG, whose memory is their own.

        ids: int64 [B], samples.
        starts, shapes: int64 [B, 2], first pixel and size of each region, (row, column).

        Raises DecodeError naming the sample, ImportError for 'mixed' without DALI.
        """
        return self.start(ids, starts, shapes)()[0]

    def start(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None = None
    ) -> Started:
        """Begin to decode a batch, as `__call__` does; the function returned ends it, in any thread.

        The decoder's threads go through the regions of all batches begun as one queue, so no thread is idle at a
        batch's end when the next one has begun. nvJPEG decodes in this call.

        stream: what the pixels are uploaded or decoded on; they are there when the event has happened that is returned
        with them. None: they are there on return, and there is no event.
        """
        if self.way == "mixed":
            pixels = self._with_nvjpeg(ids, starts, shapes, stream)
            # Recorded now: later the stream may have got work of the next batch.
            decoded = None if stream is None else stream.record_event()
            return lambda: (pixels, decoded)
        sizes = 3 * shapes.prod(axis=1)
        ends = np.cumsum(sizes)
        host = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=self.device is not None)
        packed = host.numpy()

        def decode(part: range) -> None:
            for b in part:
                out = packed[ends[b] - sizes[b] : ends[b]]
                region = self.region(ids[b], starts[b], shapes[b], out)
                if not np.may_share_memory(region, out):
                    out[:] = region.reshape(-1)

        futures = self._start_parts(decode, len(ids))

        def finish() -> tuple[Sequence, torch.cuda.Event | None]:
            for future in futures:
                future.result()
            pixels, decoded = host, None
            if self.device is not None:
                with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                    pixels = host.to(self.device, non_blocking=stream is not None)
                decoded = None if stream is None else stream.record_event()
            regions = zip(ends.tolist(), sizes.tolist(), shapes.tolist(), strict=True)
            return [pixels[end - size : end].view(*shape, 3) for end, size, shape in regions], decoded

        return finish

    def region(self, sample_id: int, start: np.ndarray, shape: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """One region's pixels on the host, uint8 [h, w, 3].

        start, shape: int64 [2], first pixel and size of the region, (row, column).
        out: uint8 [h * w * 3], as `RegionDecoder.decode` takes it; not written where Pillow had to decode.

        Raises DecodeError naming the sample.
        """
        jpeg = self.samples.jpeg(sample_id)
        region = self._region_decoder.decode(jpeg, start, start + shape, out)
        if region is None:
            (top, left), (bottom, right) = start, start + shape
            try:
                region = np.asarray(open_rgb(jpeg)[0].crop((left, top, right, bottom)))
            except ValueError as error:
                raise self._error(sample_id) from error
        return region

    def _error(self, sample_id: int) -> DecodeError:
        return DecodeError(
            f"cannot decode {self.samples.name(sample_id)}: the JPEG is damaged; "
            "check the beton with `converters/to_beton.py verify FILE --decode` and convert again"
        )

    def _with_nvjpeg(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None
    ) -> Sequence:
        """DALI's tensors of the regions."""
        if self._graph is None:
            # A depth of one is enough: outputs of DALI's dynamic executor own their memory, and the loader prefetches.
            self._graph = decode_graph(
                "mixed",
                hw_decoder_load=self.hw_decoder_load,
                batch_size=self.batch_size,
                num_threads=self.threads,
                device_id=self.device.index,
                prefetch_queue_depth=1,
                exec_dynamic=True,
            )
            self._graph.build()
        jpegs, origins = self._splice(ids, starts, starts + shapes)
        starts = starts - origins
        try:
            (regions,) = self._graph.run(
                stream, jpegs=jpegs, starts=starts.astype(np.int32), shapes=shapes.astype(np.int32)
            )
        except RuntimeError as error:
            self._graph = None  # DALI's pipeline is unusable after a failure
            damaged = self._damaged(ids, str(error))
            if damaged is None:
                raise DecodeError(
                    f"DALI could not decode samples {ids.tolist()}, though each can be decoded alone: {error}"
                ) from error
            raise self._error(damaged) from error
        pixels = _Pixels(regions[b] for b in range(len(ids)))
        pixels.source = regions, jpegs
        return pixels

    def _start_parts(self, work: Callable[[range], Any], count: int) -> list[Future]:
        """`work` of the numbers below `count`, a few at a time, on the threads' queue -> its futures in order."""
        part = min(PART, -(-count // self.threads))
        futures = []
        for first in range(0, count, part):
            futures.append(self._threads.submit(work, range(first, min(first + part, count))))
            if not self._compiled:  # numba does not bear two threads that compile one function
                wait(futures)
                self._compiled = True
        return futures

    def _splice(self, ids: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """JPEGs that show the regions, and the pixel of the stored image that each begins with, int64 [B, 2]. Where the
        beton has a row index the JPEGs are smaller than those stored."""

        def spliced(part: range) -> list[tuple[np.ndarray, tuple[int, int]]]:
            return [splice(self.samples.jpeg(ids[b]), starts[b], stops[b]) for b in part]

        parts = [future.result() for future in self._start_parts(spliced, len(ids))]
        jpegs, origins = zip(*itertools.chain.from_iterable(parts), strict=True)
        return list(jpegs), np.array(origins, np.int64)

    def _damaged(self, ids: np.ndarray, message: str) -> int | None:
        """The sample that made DALI fail, from DALI's message or, where that names none, by trying one after the other;
        None when all can be decoded."""
        numbered = re.search(r"sample #(\d+)", message)
        if numbered is not None:
            return int(ids[int(numbered.group(1))])
        for i in ids:
            try:
                open_rgb(self.samples.jpeg(i))
            except ValueError:
                return int(i)
        return None

    def close(self) -> None:
        """Stop the threads and let go of DALI's memory."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._graph = None


class AutoDecoder:
    """Decodes batches in the faster of the two ways, which is measured when the first batch is asked for.

    open_decoder: makes the decoder of a way.
    trial: endless batches to measure with.
    announce: whether to say on stderr which way was taken and why.

    way: 'auto' until that is known, then 'cpu' or 'mixed'.
    """

    def __init__(self, open_decoder: Callable[[str], Decoder], trial: Callable[[], Work], announce: bool):
        self._open_decoder, self._trial, self._announce = open_decoder, trial, announce
        self.way = "auto"
        self._decoder: Decoder | None = None

    def start(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None = None
    ) -> Started:
        """As `Decoder.start`."""
        if self._decoder is None:
            self.way, words = choose(self._open_decoder, self._trial)
            if self._announce:
                print(f"tl_fast: {words}", file=sys.stderr, flush=True)
            self._decoder = self._open_decoder(self.way)
        return self._decoder.start(ids, starts, shapes, stream)

    def close(self) -> None:
        """Close the decoder that was taken."""
        if self._decoder is not None:
            self._decoder.close()


def rate(decoder: Callable, work: Work, seconds: float = MEASURE_SECONDS, warm_up: int = 2) -> float:
    """Images/s of `decoder`, until their pixels are on the device.

    work: batches to decode; where they end the measurement does.
    seconds: length of the measurement, about.
    warm_up: batches decoded before it.

    Raises ValueError when `work` has no batch beyond the warm-up.
    """
    images, begin = 0, 0.0
    for number, batch in enumerate(work):
        if number == warm_up:
            begin = time.perf_counter()
        decoder(*batch)  # without a stream: the pixels are there on return
        if number >= warm_up:
            images += len(batch[0])
            if time.perf_counter() - begin >= seconds:
                break
    if not images:
        raise ValueError(f"the measurement needs more than {warm_up} batches")
    return images / (time.perf_counter() - begin)


def choose(open_decoder: Callable[[str], Decoder], work: Callable[[], Work]) -> tuple[str, str]:
    """Which way decodes faster here: ('cpu' or 'mixed', the measurement in words).

    open_decoder: makes the decoder of a way.
    work: endless batches to decode.

    'mixed' must gain 10 %. Where nvJPEG cannot be used at all, the words say why.
    """
    rates = {}
    for way in ("cpu", "mixed"):
        decoder = open_decoder(way)
        try:
            rates[way] = rate(decoder, work())
        except DecodeError:
            raise
        except (RuntimeError, ImportError) as error:  # from building the graph: a driver or GPU without nvJPEG, no DALI
            if way == "cpu":
                raise
            reason = str(error).splitlines()[0]
            return "cpu", f"decode 'cpu', {rates['cpu']:,.0f} images/s; 'mixed' (nvJPEG) does not work here: {reason}"
        finally:
            decoder.close()
    way = "mixed" if rates["mixed"] > GAIN * rates["cpu"] else "cpu"
    measured = f"cpu {rates['cpu']:,.0f} images/s, mixed (nvJPEG) {rates['mixed']:,.0f}"
    return way, f"decode {way!r}: {measured}; mixed is taken from {GAIN:.0%} on"
