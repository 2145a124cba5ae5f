"""Decodes regions of JPEGs on the CPU, by our own decoder, and copies regions of planes.

Pillow decodes what our decoder leaves to others, to the same pixels.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from tl_fast.jpeg.region import RegionDecoder, RegionQueue
from tl_fast.maths.ycbcr import PADDING, Pixels, pixels_of, planes_of
from tl_fast.pipeline.regions import DecodeError, Images, Regions, RegionsDecoder, Started
from tl_fast.sources.image import open_rgb


class Decoder(RegionsDecoder):
    """Regions of a data set's images: of a batch as RGB, or planes of those that are stored as planes; of one image as
    samples.

    samples: where the images are.
    threads: that decode a batch.
    device: the CUDA device that gets a batch's pixels; None: they stay on the host.

    busy_seconds: how long the threads have decoded batches, all together.

    The threads go through the regions of all batches begun as one queue, so no thread is idle at a batch's end when the
    next one has begun. Single regions are decoded by the thread that asks, by any number of threads at once.
    """

    way = "cpu"

    def __init__(self, samples: Images, threads: int, device: torch.device | None = None):
        self.samples, self.threads, self.device = samples, threads, device
        self.busy_seconds = 0.0
        self._region_decoder = RegionDecoder()
        self._threads = ThreadPoolExecutor(threads, "tl_fast-region")
        self._kept = threading.local()  # memory that a thread's last pixels lie in
        self._counting = threading.Lock()
        self._compiled = False

    def start(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None = None
    ) -> Started:
        sides = np.stack([self.samples.heights[ids], self.samples.widths[ids]], axis=1)
        sides[~self.samples.stored_as_planes[ids]] = 0
        queue = RegionQueue(*self.samples.image_addresses(ids), starts, starts + shapes, sides)
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
            addresses = pixels.data_ptr() + queue.offsets
            return Regions(addresses, shapes, self.device is not None, pixels, queue.plane_bytes), decoded

        return finish

    def _decode_queued(
        self, queue: RegionQueue, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, out: np.ndarray
    ) -> None:
        """Decode regions of the queue to `out` until it is empty, in one of several threads."""
        begin = time.perf_counter()
        while (b := self._region_decoder.decode_queued(queue, out)) is not None:
            pixels = self._with_pillow(ids[b], starts[b], shapes[b])
            out[queue.offsets[b] : queue.offsets[b] + pixels.size] = pixels.reshape(-1)
        with self._counting:
            self.busy_seconds += time.perf_counter() - begin

    def pixels(self, sample_id: int, start: np.ndarray, shape: np.ndarray) -> Pixels:
        """One region's samples in the host's memory, as far as they need be decoded; until this thread's next call.

        start, shape: int64 [2], first pixel and size of the region, (row, column).

        Raises DecodeError naming the sample.
        """
        image = self.samples.image(sample_id)
        if self.samples.stored_as_planes[sample_id]:
            return planes_of(image, int(self.samples.heights[sample_id]), int(self.samples.widths[sample_id]))
        pixels = self._region_decoder.samples(image, start, start + shape)
        if pixels is None:
            self._kept.region = region = self._with_pillow(sample_id, start, shape)
            pixels = pixels_of(region, int(start[0]), int(start[1]))
        return pixels

    def _with_pillow(self, sample_id: int, start: np.ndarray, shape: np.ndarray) -> np.ndarray:
        """One region's pixels as RGB, uint8 [h, w, 3], of a file that our decoder leaves to others."""
        (top, left), (bottom, right) = start, start + shape
        try:
            image = open_rgb(self.samples.image(sample_id))[0].crop((left, top, right, bottom))
        except ValueError as error:
            raise DecodeError.of(self.samples, sample_id) from error
        # Behind the pixels there is room for vectors.
        memory = np.zeros(3 * image.height * image.width + PADDING, np.uint8)
        region = memory[:-PADDING].reshape(image.height, image.width, 3)
        region[:] = image
        return region

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
