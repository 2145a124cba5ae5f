"""Batches made on the GPU: what the host knows is uploaded in one copy, and kernels on a stream of their own make
images, token targets and masks.

Under numba's simulator (NUMBA_ENABLE_CUDASIM=1) the device's memory is the host's and there are no streams, so tests
run all of this without a GPU.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import cuda as numba_cuda

from tl_fast.beton.samples import Samples
from tl_fast.kernels import cuda
from tl_fast.kernels.cuda_device import SIMULATED
from tl_fast.pipeline.batch import Batch, BatchPlan, UnderWay
from tl_fast.pipeline.choice import AutoDecoder, HybridDecoder, OnRank0, call
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.nvjpeg import NvjpegDecoder
from tl_fast.pipeline.planner import BatchPlanner
from tl_fast.pipeline.regions import Regions, RegionsDecoder, Started
from tl_fast.pipeline.resident import Resident, open_resident
from tl_fast.pipeline.settings import Decoding
from tl_fast.system.mistakes import InputError

ALIGNMENT = 16  # bytes, of the parts of an upload: what the kernels' vector loads want
_launching = threading.Lock()  # of several loaders one alone compiles


def find_device(name: str | torch.device) -> torch.device:
    """The CUDA device of a name ('cuda': the current one); the simulator's is the host. ValueError where there is
    none."""
    if SIMULATED:
        return torch.device("cpu")
    device = torch.device(name)
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise InputError(
            f"device {str(name)!r}: this machine has {count} CUDA devices that torch can use; use device='cpu'"
        )
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def open_decoder(
    planner: BatchPlanner, device: torch.device | None, decoding: Decoding, on_rank_0: OnRank0
) -> RegionsDecoder:
    """The decoder of a way. device: the CUDA device; None for the simulator, whose pixels stay on the host.

    Evaluation decodes on the CPU unless 'mixed' is asked for, so that its figures do not depend on a measurement. Where
    images are stored as planes there is nothing to measure: copying them takes the cores a small part of the time of
    decoding. Raises InputError for nvJPEG then.
    """
    samples, batch_size, threads = planner.samples, planner.share.batch_size, decoding.threads
    way = decoding.way if device is not None and (planner.train or decoding.way == "mixed") else "cpu"
    if samples.stored_as_planes.any():
        if decoding.way in ("mixed", "hybrid"):
            first = int(samples.stored_as_planes.argmax())
            raise InputError(
                f"decode={decoding.way!r}: nvJPEG decodes JPEGs, but {samples.name(first)} is stored as YUV 4:2:0 "
                "planes; use decode='cpu', which copies planes and decodes the JPEGs beside them"
            )
        way = "cpu"

    def open_nvjpeg(threads: int = threads) -> NvjpegDecoder:
        return NvjpegDecoder(samples, batch_size, threads, device, decoding.hw_decoder_load)

    if way == "mixed":
        return open_nvjpeg()
    cpu, announce = Decoder(samples, threads, device), planner.share.rank == 0
    if way == "auto":
        return AutoDecoder(cpu, open_nvjpeg, planner.trial, on_rank_0, announce)
    if way == "hybrid":
        nvjpeg = open_nvjpeg(max(threads // 4, 1))  # the other cores decode
        return HybridDecoder(cpu, nvjpeg, decoding.hybrid_share, planner.trial, on_rank_0, announce)
    return cpu


@dataclass
class Maps:
    """What became of a batch's label maps.

    ids: int64 [B], the samples.
    flags: int32 [B], what was wrong with each map; valid when `event` has happened.
    """

    ids: np.ndarray
    flags: torch.Tensor
    event: torch.cuda.Event | None


@dataclass
class Made:
    """A batch whose kernels are under way until `event`.

    memory: all that the batch lies in.
    maps: None without targets.
    """

    batch: Batch
    memory: list[torch.Tensor]
    event: torch.cuda.Event | None
    maps: Maps | None


class GpuBatches:
    """A `BatchMaker` of a GPU's memory.

    planner: whose plans are carried out.
    device: of `find_device`.
    decoding: way, threads, and whether samples are checked.
    ahead: batches whose kernels may be under way at once, and batches handed over that the consumer's stream may not be
        through with, however far the consumer's thread runs ahead.
    on_rank_0: of `decode="auto"` and `decode="hybrid"`, as `AutoDecoder` takes it.

    resident: the images and label maps in the GPU's memory; None where they come from the file, batch by batch.

    `start` hands images to the decoder in the loader's thread (nvJPEG decodes them there). `make` launches kernels in a
    worker thread, where it waits for the decoder and for batches that are `ahead` back. `finish` and `check` belong to
    the consumer's thread.
    """

    def __init__(
        self, planner: BatchPlanner, device: torch.device, decoding: Decoding, ahead: int, on_rank_0: OnRank0 = call
    ):
        self.samples, self.crops, self.targets = planner.samples, planner.crops, planner.targets
        self.device, self.decoding, self.ahead = device, decoding, ahead
        on_gpu = device.type == "cuda"
        self.resident = open_resident(planner, device, decoding)
        self.reads_files = self.resident is None
        self.decoder = self.resident or open_decoder(planner, device if on_gpu else None, decoding, on_rank_0)
        self.stream = torch.cuda.Stream(device) if on_gpu else None
        # A stream apart, so that kernels never wait for the decode of a later batch.
        self.decode_stream = torch.cuda.Stream(device) if on_gpu else None
        # Not `self.enter_thread`: a thread that holds this object would keep a loader alive that nobody closed.
        self._worker = ThreadPoolExecutor(1, "tl_fast-kernel", _enter_thread, (device,))
        # Kernels that may still run, with the pixels they read: without that the next batch would get their memory.
        self._running: collections.deque[tuple[torch.cuda.Event, Any]] = collections.deque()
        # For each batch handed over but the last: that the consumer's stream is through with it.
        self._consumed: collections.deque[tuple[torch.cuda.Event, None]] = collections.deque()
        self._unchecked: collections.deque[Maps] = collections.deque()

    def enter_thread(self) -> None:
        """Make the device current in this thread, for torch and numba."""
        _enter_thread(self.device)

    def start(self, plan: BatchPlan) -> UnderWay:
        """Begin to decode the batch's images. The worker thread launches its kernels when they are decoded, while the
        decoder's threads go on with the next batch."""
        if self.resident is not None:
            plan = dataclasses.replace(plan, **self.resident.whole(plan.ids))
        elif self.decoding.check:
            for i in plan.ids:
                self.samples.check(i)
        started = self.decoder.start(plan.ids, plan.starts, plan.shapes, self.decode_stream)
        return UnderWay([self._worker.submit(self._finish_and_make, plan, started)])

    def _finish_and_make(self, plan: BatchPlan, started: Started) -> Made:
        return self.make(plan, *started())

    def make(self, plan: BatchPlan, regions: Regions, decoded: torch.cuda.Event | None) -> Made:
        """Upload what a batch needs and launch its kernels, without waiting for them. Waits for batches `ahead` back.

        regions: the pixels, on the device when `decoded` has happened. Everything returned is new memory, written by
        `stream`.
        """
        self._wait_for_old()
        span, offsets = regions.span()
        pixels = np.asarray(span) if self.stream is None else numba_cuda.as_cuda_array(span, sync=False)
        parts = upload_parts(self.samples, plan, offsets, regions.plane_bytes > 0, self.resident)
        size, image_size = len(plan.ids), plan.image_size
        with _launching, torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
            if decoded is not None:
                self.stream.wait_event(decoded)
            uploaded, up = self._upload(parts)
            images = torch.empty((size, 3, *image_size), dtype=torch.uint8, device=self.device)
            handle = 0 if self.stream is None else self.stream.cuda_stream
            scratch = torch.empty(cuda.scratch_bytes(size, *image_size, False), dtype=torch.uint8, device=self.device)
            fill = self.crops.augment.fill
            cuda.augment(pixels, up["regions"], up["plans"], fill, images, scratch=scratch, stream=handle)
            targets = flags = masks = event = None
            if plan.affines is not None:
                targets, flags = self._launch_targets(up, size, handle)
            if plan.masks is not None:
                masks = torch.empty((size, *image_size), dtype=torch.uint8, device=self.device)
                ignored = self.samples.mask_spec.ignore_index
                source = up["mask_bytes"], up["mask_regions"], up["plans"]
                cuda.show_masks(*source, ignored, fill, masks, images, stream=handle)
            if self.stream is not None:
                event = _event_on(self.stream)
                self._running.append((event, regions))
        batch = Batch(images, up["labels"].view(torch.int64), targets, up["ids"].view(torch.int64), masks=masks)
        for name, values in plan.extras.items():
            dtype = torch.from_numpy(values[:0]).dtype
            setattr(batch, name, up[name].view(dtype).view(values.shape))
        memory = [tensor for tensor in (uploaded, images, targets, masks) if tensor is not None]
        return Made(batch, memory, event, None if flags is None else Maps(plan.ids, flags, event))

    def _launch_targets(self, up: dict[str, torch.Tensor], size: int, handle: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Launch the kernel of a batch's token targets -> targets, and what was wrong with each map, on the host.

        up: what was uploaded; handle: the stream's.
        """
        shape, spec = (size, self.targets.tokens, self.samples.num_classes), self.samples.spec
        targets = torch.empty(shape, dtype=getattr(torch, self.targets.dtype), device=self.device)
        errors = up["errors"].view(torch.int32)
        cuda.packed_targets(
            up["maps"] if self.resident is None else self.resident.maps,
            up["map_bounds"].view(torch.int64).view(-1, 2),
            up["ranges"].view(torch.float32).view(-1, 2),
            up["affines"].view(torch.float32).view(-1, 6),
            spec,
            self.targets.grid,
            self.targets.smoothing,
            spec.extent == "full",  # as on the CPU: what is beyond a square map is image
            targets,
            errors,
            stream=handle,
        )
        flags = torch.empty(size, dtype=torch.int32, pin_memory=self.stream is not None)
        flags.copy_(errors, non_blocking=True)
        return targets, flags

    def _wait_for_old(self) -> None:
        """Forget the batches that are made or consumed. Wait, in this thread alone, until fewer than `ahead` batches
        are not made, and fewer than `ahead` not consumed."""
        for queue in (self._running, self._consumed):
            while queue and (len(queue) >= self.ahead or queue[0][0].query()):
                event, regions = queue.popleft()
                event.synchronize()
                del regions

    def _upload(self, parts: dict[str, np.ndarray]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Arrays -> one uint8 tensor on the device, sent by one copy that nobody waits for, and the bytes of each array
        as a view of it.

        The page-locked tensor may go at once: torch's allocator gives such memory out again only when the copies from
        it are done.
        """
        slices, size = {}, 0
        for name, array in parts.items():
            slices[name] = slice(size, size + array.nbytes)
            size = -(-slices[name].stop // ALIGNMENT) * ALIGNMENT
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        host_bytes = host.numpy()
        for name, array in parts.items():
            host_bytes[slices[name]] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        uploaded = host.to(self.device, non_blocking=True)
        return uploaded, {name: uploaded[part] for name, part in slices.items()}

    def finish(self, under_way: UnderWay) -> Batch:
        """Wait for the launch of the batch's kernels, and hand the batch over; raises what failed there."""
        return self.hand_over(under_way.futures[0].result())

    def hand_over(self, made: Made) -> Batch:
        """The batch, for the caller's current stream, which waits for the kernels; the host does not. Raises BetonError
        for a damaged label map of an earlier batch."""
        self.check(wait=False)
        if made.event is not None:
            stream = torch.cuda.current_stream(self.device)
            # What the caller did with the batches before is on the stream by now.
            self._consumed.append((_event_on(stream), None))
            stream.wait_event(made.event)
            # The memory was allocated on our stream, and may be given out again only when the caller's work on it is
            # done.
            for tensor in made.memory:
                tensor.record_stream(stream)
        if made.maps is not None:
            self._unchecked.append(made.maps)
        return made.batch

    def check(self, wait: bool = True) -> None:
        """Raise BetonError when a label map of a batch handed over was damaged. Without `wait` only batches whose
        kernels are through are looked at."""
        while self._unchecked:
            maps = self._unchecked[0]
            if maps.event is not None and not maps.event.query():
                if not wait:
                    return
                maps.event.synchronize()
            self._unchecked.popleft()
            wrong = np.flatnonzero(maps.flags.numpy())
            if len(wrong):
                self._unchecked.clear()
                raise self.samples.map_error(int(maps.ids[wrong[0]]), int(maps.flags[wrong[0]]))

    def forget(self) -> None:
        """Batches handed over are of no more interest."""
        self._unchecked.clear()

    def close(self) -> None:
        """Stop the worker thread, wait for the kernels under way and let go of their memory."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        self.forget()
        if self.stream is not None:
            self.stream.synchronize()
        self._running.clear()
        self._consumed.clear()
        self.decoder.close()


def upload_parts(
    samples: Samples, plan: BatchPlan, offsets: np.ndarray, are_planes: np.ndarray, resident: Resident | None = None
) -> dict[str, np.ndarray]:
    """What the kernels read besides the pixels, and what the batch holds that the host knows.

    offsets: int64 [B], where each region begins among the pixels; are_planes: bool [B], whether it is planes.
    resident: has the label maps, if given; else they are among the parts.
    """
    regions = np.zeros(len(plan.ids), cuda.REGION)
    regions["offset"] = offsets
    regions["rows"], regions["columns"] = plan.shapes.T
    regions["top"], regions["left"] = plan.starts.T
    regions["height"], regions["width"] = plan.heights, plan.widths
    regions["planes"] = are_planes
    parts = {
        "regions": regions,
        "plans": plan.plans,
        "ids": plan.ids,
        "labels": samples.labels[plan.ids],
        **plan.extras,
    }
    if plan.affines is not None:
        if resident is not None:
            parts["map_bounds"], parts["ranges"] = resident.map_parts(plan.ids)
        else:
            maps, parts["ranges"] = samples.raw_label_maps(plan.ids)
            ends = np.cumsum([0] + [len(record) for record in maps])
            parts["maps"], parts["map_bounds"] = np.concatenate(maps), np.stack([ends[:-1], ends[1:]], axis=1)
        parts["affines"] = plan.affines
        parts["errors"] = np.zeros(len(plan.ids), np.int32)
    if plan.masks is not None:
        # Of the masks the pixels that the images show: those under the outputs' centres are among them.
        cut = [
            mask[top : top + rows, left : left + columns].ravel()
            for mask, (top, left), (rows, columns) in zip(plan.masks, plan.starts, plan.shapes, strict=True)
        ]
        parts["mask_bytes"] = np.concatenate(cut)
        parts["mask_regions"] = regions.copy()
        parts["mask_regions"]["offset"] = np.cumsum([0] + [part.size for part in cut[:-1]])
        parts["mask_regions"]["planes"] = 0
    return parts


def _enter_thread(device: torch.device) -> None:
    """Make the device current in this thread; every thread that uses the device has to call this once."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        numba_cuda.select_device(device.index)


def _event_on(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """That the stream has come this far; who waits for it sleeps, for the cores decode."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
