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
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any, Protocol

import numpy as np
import torch

from tl_fast.jpeg.region import RegionDecoder, RegionQueue
from tl_fast.jpeg.restarts import splice
from tl_fast.pipeline.regions import Regions, Started
from tl_fast.sources.image import open_rgb
from tl_fast.system.mistakes import Mistake

HW_DECODER_LOAD = 0.65  # share of the images for the GPU's JPEG engine, the others go to its cores; DALI's default
MEASURE_SECONDS = 0.5  # for each way to decode
PART = 4  # JPEGs that a thread splices at a time
GAIN = 1.1  # what nvJPEG must gain to be chosen: its CUDA half takes time from the training step

Work = Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]  # (ids, starts, shapes) of batch after batch


class DecodeError(Mistake, RuntimeError):
    """An image could not be decoded; the message names the sample and its file."""


class Jpegs(Protocol):
    """What a decoder reads: `tl_fast.beton.samples.Samples`."""

    def jpeg(self, sample_id: int) -> np.ndarray: ...

    def jpeg_addresses(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

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

    def __call__(self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray) -> Regions:
        """The regions' pixels.

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
        queue = RegionQueue(*self.samples.jpeg_addresses(ids), starts, starts + shapes)
        host = torch.empty(queue.num_bytes, dtype=torch.uint8, pin_memory=self.device is not None)
        if not self._compiled:
            self._region_decoder.compile()
            self._compiled = True
        decode = functools.partial(self._decode_queued, queue, ids, starts, shapes, host.numpy())
        futures = [self._threads.submit(decode) for _ in range(min(self.threads, len(ids)))]

        def finish() -> tuple[Regions, torch.cuda.Event | None]:
            for future in futures:
                future.result()
            pixels, decoded = host, None
            if self.device is not None:
                with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                    pixels = host.to(self.device, non_blocking=stream is not None)
                decoded = None if stream is None else stream.record_event()
            return Regions(pixels.data_ptr() + queue.offsets, shapes, self.device is not None, pixels), decoded

        return finish

    def _decode_queued(
        self, queue: RegionQueue, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, out: np.ndarray
    ) -> None:
        """Decode regions of the queue to `out` until it is empty, in one of several threads."""
        while (b := self._region_decoder.decode_queued(queue, out)) is not None:
            pixels = self._with_pillow(ids[b], starts[b], shapes[b])
            out[queue.offsets[b] : queue.offsets[b] + pixels.size] = pixels.reshape(-1)

    def region(self, sample_id: int, start: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """One region's pixels on the host, uint8 [h, w, 3], in memory that this thread's next call may write again.

        start, shape: int64 [2], first pixel and size of the region, (row, column).

        Raises DecodeError naming the sample.
        """
        region = self._region_decoder.decode(self.samples.jpeg(sample_id), start, start + shape)
        return self._with_pillow(sample_id, start, shape) if region is None else region

    def _with_pillow(self, sample_id: int, start: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """As `region`, of a file that our decoder leaves to others."""
        (top, left), (bottom, right) = start, start + shape
        try:
            return np.asarray(open_rgb(self.samples.jpeg(sample_id))[0].crop((left, top, right, bottom)))
        except ValueError as error:
            raise self._error(sample_id) from error

    def _error(self, sample_id: int) -> DecodeError:
        return DecodeError(
            f"cannot decode {self.samples.name(sample_id)}: the JPEG is damaged; "
            "check the beton with `converters/to_beton.py verify FILE --decode` and convert again"
        )

    def _with_nvjpeg(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None
    ) -> Regions:
        """The regions' pixels, made by DALI."""
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
        addresses = np.array([regions[b].data_ptr() for b in range(len(ids))], np.int64)
        return Regions(addresses, shapes, self.device.type == "cuda", (regions, jpegs))

    def _splice(self, ids: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """JPEGs that show the regions, and the pixel of the stored image that each begins with, int64 [B, 2]. Where the
        beton has a row index the JPEGs are smaller than those stored."""

        def spliced(first: int) -> list[tuple[np.ndarray, tuple[int, int]]]:
            part = range(first, min(first + PART, len(ids)))
            return [splice(self.samples.jpeg(ids[b]), starts[b], stops[b]) for b in part]

        futures = []
        for first in range(0, len(ids), PART):
            futures.append(self._threads.submit(spliced, first))
            if not self._compiled:  # numba does not bear two threads that compile one function
                wait(futures)
                self._compiled = True
        parts = [future.result() for future in futures]
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
