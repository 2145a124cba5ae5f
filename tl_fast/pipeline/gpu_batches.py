"""Batches made on the GPU: what the host knows goes up in one copy, two kernels make images and token targets on a
stream of their own.

Under numba's simulator (NUMBA_ENABLE_CUDASIM=1) the device's memory is the host's and there are no streams, so tests
run all of this without a GPU.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numba import cuda as numba_cuda

from tl_fast.beton.samples import Samples
from tl_fast.kernels import cuda
from tl_fast.kernels.cuda_device import SIMULATED
from tl_fast.pipeline.batch import Batch
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


@dataclass
class Maps:
    """What became of a batch's label maps. flags: int32 [B], what was wrong with each, valid when `event` has happened;
    ids: int64 [B]."""

    ids: np.ndarray
    flags: torch.Tensor
    event: torch.cuda.Event | None


@dataclass
class Made:
    """A batch whose kernels are under way until `event`. memory: all that it lies in; maps: None without targets."""

    batch: Batch
    memory: list[torch.Tensor]
    event: torch.cuda.Event | None
    maps: Maps | None


class _Span:
    """Device memory from an address on, as uint8 [size], for whoever knows the CUDA array interface."""

    def __init__(self, address: int, size: int):
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, True),
            "strides": None,
            "version": 3,
        }


class GpuBatches:
    """The device's half of a loader.

    samples: for names and label-map layout; device: of `find_device`; image_size: output pixels, square; grid: tokens a
    side; smoothing: of the targets; fill: RGB outside the image; ahead: batches whose kernels may be under way at once,
    and batches handed over that the consumer's stream may not be through with, however far its thread runs ahead.
    `make`, which waits for both, is called by one thread, `hand_over` and `check` by another, the consumer's.
    """

    def __init__(
        self,
        samples: Samples,
        device: torch.device,
        *,
        image_size: int,
        grid: int,
        smoothing: float,
        fill: tuple[int, int, int],
        ahead: int,
    ):
        self.samples, self.device, self.image_size, self.grid, self.smoothing, self.ahead = (
            samples,
            device,
            image_size,
            grid,
            smoothing,
            ahead,
        )
        self.decode_device = device if device.type == "cuda" else None  # the simulator's pixels stay on the host
        self.fill = fill
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A stream apart, so that kernels never wait for the decode of a later batch.
        self.decoding = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Whose kernels may still run, with the pixels they read: that memory would be given to the next batch.
        self._running: collections.deque[tuple[torch.cuda.Event, Any]] = collections.deque()
        # For each batch handed over but the last: that the consumer's stream is through with it.
        self._consumed: collections.deque[tuple[torch.cuda.Event, None]] = collections.deque()
        self._unchecked: collections.deque[Maps] = collections.deque()

    def enter_thread(self) -> None:
        """Make the device current in this thread, for torch and numba; to be called once by every thread that uses
        it."""
        if self.stream is not None:
            torch.cuda.set_device(self.device)
            numba_cuda.select_device(self.device.index)

    def decoded(self) -> torch.cuda.Event | None:
        """What `make` is to wait for: that the pixels ordered on `decoding` until now are there."""
        return None if self.decoding is None else self.decoding.record_event()

    def make(
        self,
        ids: np.ndarray,
        plans: np.ndarray,
        starts: np.ndarray,
        shapes: np.ndarray,
        regions: Sequence,
        decoded: torch.cuda.Event | None,
        affines: np.ndarray | None,
        extras: dict[str, np.ndarray],
    ) -> Made:
        """Upload what a batch needs and launch its kernels, without waiting for them (but for what is `ahead` batches
        back).

        ids: int64 [B]; plans: PLAN [B]; starts, shapes: int64 [B, 2], first pixel and size of the decoded regions;
        regions: the pixels, uint8 [h, w, 3] each, on the device when `decoded` has happened; affines: float32 [B, 6] as
        `cpu.warped_targets` takes them, None for no targets;
        extras: further arrays for the batch, by field of `Batch`. Everything returned is new memory, written by
        `stream`.
        """
        self._wait_for_old()
        batch = len(ids)
        pixels, offsets = self._pixels(regions, shapes)
        records = np.zeros(batch, cuda.REGION)
        records["offset"] = offsets
        for axis, names in enumerate((("rows", "top", "height"), ("columns", "left", "width"))):
            size = self.samples.widths if axis else self.samples.heights
            for name, values in zip(names, (shapes[:, axis], starts[:, axis], size[ids]), strict=True):
                records[name] = values
        parts = {"regions": records, "plans": plans, "ids": ids, "labels": self.samples.labels[ids], **extras}
        if affines is not None:
            maps, parts["ranges"] = self.samples.raw_label_maps(ids)
            parts |= {
                "starts": np.cumsum([0] + [len(each) for each in maps]),
                "maps": np.concatenate(maps),
                "affines": affines,
                "errors": np.zeros(batch, np.int32),
            }
        with _launching, torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
            if decoded is not None:
                self.stream.wait_event(decoded)
            uploaded, up = self._upload(parts)
            images = torch.empty((batch, 3, self.image_size, self.image_size), dtype=torch.uint8, device=self.device)
            handle = 0 if self.stream is None else self.stream.cuda_stream
            scratch = torch.empty(
                cuda.scratch_bytes(batch, self.image_size, self.image_size, False),
                dtype=torch.uint8,
                device=self.device,
            )
            cuda.augment(pixels, up["regions"], up["plans"], self.fill, images, scratch=scratch, stream=handle)
            targets = flags = event = None
            if affines is not None:
                targets = torch.empty(
                    (batch, 1 + self.grid**2, self.samples.num_classes), dtype=torch.float32, device=self.device
                )
                errors = up["errors"].view(torch.int32)
                spec = self.samples.spec
                cuda.packed_targets(
                    up["maps"],
                    up["starts"].view(torch.int64),
                    up["ranges"].view(torch.float32).view(-1, 2),
                    up["affines"].view(torch.float32).view(-1, 6),
                    spec,
                    self.grid,
                    self.smoothing,
                    spec.extent == "full",  # as on the CPU: what is beyond a square map is image
                    targets,
                    errors,
                    stream=handle,
                )
                flags = torch.empty(batch, dtype=torch.int32, pin_memory=self.stream is not None).copy_(
                    errors, non_blocking=True
                )
            if self.stream is not None:
                event = _event_on(self.stream)
                self._running.append((event, regions))
        ready = Batch(images, up["labels"].view(torch.int64), targets, up["ids"].view(torch.int64))
        for name, values in extras.items():
            dtype = torch.from_numpy(values[:0]).dtype
            setattr(ready, name, up[name].view(dtype).view(values.shape))
        memory = [tensor for tensor in (uploaded, images, targets) if tensor is not None]
        return Made(ready, memory, event, None if flags is None else Maps(ids, flags, event))

    def _wait_for_old(self) -> None:
        """Forget the batches that are made or consumed; wait, in this thread alone, until fewer than `ahead` of each
        are not."""
        for queue in (self._running, self._consumed):
            while queue and (len(queue) >= self.ahead or queue[0][0].query()):
                event, regions = queue.popleft()
                event.synchronize()
                del regions

    def _pixels(self, regions: Sequence, shapes: np.ndarray) -> tuple[Any, np.ndarray]:
        """All regions as one device array uint8 [M], and where in it each begins, int64 [B]. On a GPU without a copy:
        the array spans whatever lies between them."""
        sizes = 3 * shapes.prod(axis=1)
        if self.stream is None:
            return (
                np.concatenate([np.asarray(regions[b]).reshape(-1) for b in range(len(shapes))]),
                np.cumsum(sizes) - sizes,
            )
        addresses = np.array([regions[b].data_ptr() for b in range(len(shapes))], np.int64)
        base = int(addresses.min())
        return (
            numba_cuda.as_cuda_array(_Span(base, int((addresses + sizes).max()) - base), sync=False),
            addresses - base,
        )

    def _upload(self, parts: dict[str, np.ndarray]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Arrays -> one uint8 tensor on the device, sent by one copy that nobody waits for, and the bytes of each as
        views of it.

        The page-locked tensor may go at once: torch's allocator gives such memory out again only when the copies from
        it are done.
        """
        at, size = {}, 0
        for name, array in parts.items():
            at[name] = slice(size, size + array.nbytes)
            size = -(-at[name].stop // ALIGNMENT) * ALIGNMENT
        host = torch.empty(size, dtype=torch.uint8, pin_memory=self.stream is not None)
        view = host.numpy()
        for name, array in parts.items():
            view[at[name]] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        uploaded = host.to(self.device, non_blocking=True)
        return uploaded, {name: uploaded[place] for name, place in at.items()}

    def hand_over(self, made: Made) -> Batch:
        """The batch, for the caller's current stream, which waits for the kernels; the host does not. Raises BetonError
        for a damaged label map of an earlier batch."""
        self.check(wait=False)
        if made.event is not None:
            stream = torch.cuda.current_stream(self.device)
            self._consumed.append(
                (_event_on(stream), None)
            )  # what the caller did with the batches before is on the stream by now
            stream.wait_event(made.event)
            for tensor in (
                made.memory
            ):  # allocated on our stream: not to be given out again before the caller's work on it is done
                tensor.record_stream(stream)
        if made.maps is not None:
            self._unchecked.append(made.maps)
        return made.batch

    def check(self, wait: bool) -> None:
        """Raise BetonError when a label map of a batch handed over was damaged; look only at those that are finished
        unless `wait`."""
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
        """Wait for the kernels under way and let go of their memory."""
        self.forget()
        if self.stream is not None:
            self.stream.synchronize()
        self._running.clear()
        self._consumed.clear()


def _event_on(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """That the stream has come this far; who waits for it sleeps, for the cores decode."""
    event = torch.cuda.Event(blocking=True)
    event.record(stream)
    return event
