"""Decodes regions of JPEGs on a GPU, by DALI with nvJPEG; importing this module does not need DALI."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

from tl_fast.jpeg.restarts import splice
from tl_fast.pipeline.regions import DecodeError, Images, Regions, RegionsDecoder, Started
from tl_fast.sources.image import open_rgb

HW_DECODER_LOAD = 0.65  # share of the images for the GPU's JPEG engine, the others go to its cores; DALI's default
PART = 4  # JPEGs that a thread splices at a time


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


class NvjpegDecoder(RegionsDecoder):
    """Regions of a data set's images, a batch at a time, decoded by nvJPEG.

    samples: where the JPEGs are.
    batch_size: regions a batch, at most.
    threads: that cut a batch's JPEGs to their regions, and prepare them for the GPU.
    device: the CUDA device that decodes.
    hw_decoder_load: share of the images that nvJPEG gives to the GPU's JPEG engine, 0..1.

    `start` raises ImportError without DALI. It returns when the host's part of the decoding is done.
    """

    way = "mixed"

    def __init__(
        self,
        samples: Images,
        batch_size: int,
        threads: int,
        device: torch.device,
        hw_decoder_load: float = HW_DECODER_LOAD,
    ):
        self.samples, self.batch_size, self.threads, self.device = samples, batch_size, threads, device
        self.hw_decoder_load = hw_decoder_load
        self._graph = None
        self._threads = ThreadPoolExecutor(threads, "tl_fast-splice")
        self._compiled = False

    def start(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None = None
    ) -> Started:
        pixels = self._decode(ids, starts, shapes, stream)
        # Recorded now: later the stream may have got work of the next batch.
        decoded = None if stream is None else stream.record_event()
        return lambda: (pixels, decoded)

    def _decode(
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
            raise DecodeError.of(self.samples, damaged) from error
        addresses = np.array([regions[b].data_ptr() for b in range(len(ids))], np.int64)
        return Regions(addresses, shapes, self.device.type == "cuda", (regions, jpegs))

    def _splice(self, ids: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """JPEGs that show the regions, and the pixel of the stored image that each begins with, int64 [B, 2]. Where the
        beton has a row index the JPEGs are smaller than those stored."""

        def spliced(first: int) -> list[tuple[np.ndarray, tuple[int, int]]]:
            part = range(first, min(first + PART, len(ids)))
            return [splice(self.samples.image(ids[b]), starts[b], stops[b]) for b in part]

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
                open_rgb(self.samples.image(i))
            except ValueError:
                return int(i)
        return None

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._graph = None
