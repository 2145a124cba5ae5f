"""A rank's part of a data set in its GPU's memory, uploaded once: the planes of its images and their label maps."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import torch

from tl_fast.beton.layout import planes_size
from tl_fast.beton.samples import Samples
from tl_fast.maths.gather import gather
from tl_fast.pipeline.planner import BatchPlanner
from tl_fast.pipeline.regions import Regions, RegionsDecoder, Started
from tl_fast.pipeline.settings import Decoding
from tl_fast.system.mistakes import InputError
from tl_fast.system.progress import ProgressDisplay

ALIGNMENT = 16  # bytes, of each image's and each map's place
CHUNK = 64 << 20  # bytes that are sent at once, about
READERS = 4  # threads that read and send, at most: each has a chunk of page-locked memory
FREE_SHARE = 0.9  # of the memory that is free, above which a part is not uploaded
AUTO_SHARE = 0.3  # of all of the GPU's memory, above which 'auto' leaves it to training


class Resident(RegionsDecoder):
    """Images as planes, and label maps, of some of a data set's samples, in a GPU's memory.

    samples: the data set; the images are stored as planes.
    ids: int64 [n], ascending, the samples.
    device: the CUDA device; in numba's simulator the host.
    decoding: threads, and whether samples are checked.
    announce: whether to show the progress, and to say what was uploaded, on stderr.

    planes, maps: uint8 on the device; maps: None without label maps. num_bytes: of both.

    As a decoder it gives whole images, which are there already. Raises BetonError for a sample that the check finds
    damaged.
    """

    way = "resident"

    def __init__(
        self, samples: Samples, ids: np.ndarray, device: torch.device, decoding: Decoding, announce: bool = False
    ):
        self.device = device
        self._sizes = np.stack([samples.heights, samples.widths], axis=1)
        self._image_starts, self._bounds = np.full(len(samples), -1, np.int64), np.zeros((len(samples), 2), np.int64)
        self.maps, self._ranges, begin = None, None, time.monotonic()

        def check(part: slice) -> None:
            if decoding.check:
                for i in ids[part]:
                    samples.check(i)

        with ProgressDisplay("uploading", len(ids), enabled=announce) as display:
            addresses, sizes = samples.image_addresses(ids)
            self.planes, starts = upload(addresses, sizes, device, decoding.threads, check, display.update)
            self._image_starts[ids] = starts
        if samples.spec is not None:
            addresses, sizes = samples.label_map_addresses(ids)
            self.maps, starts = upload(addresses, sizes, device, decoding.threads)
            self._bounds[ids] = np.stack([starts, starts + sizes], axis=1)
            self._ranges = samples.label_map_ranges(np.arange(len(samples)))
        self.num_bytes = self.planes.numel() + (0 if self.maps is None else self.maps.numel())
        if announce:
            seconds, gigabytes = time.monotonic() - begin, self.num_bytes / 1e9
            print(
                f"tl_fast: {len(ids):,} images are in the memory of {device}: {gigabytes:,.3g} GB, uploaded in"
                f" {seconds:,.1f} s ({gigabytes / max(seconds, 1e-9):,.2g} GB/s)",
                file=sys.stderr,
            )

    def whole(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """`starts` and `shapes` of a `BatchPlan` whose regions are the whole images.

        Raises InputError for a sample that is not here.
        """
        elsewhere = self._image_starts[ids] < 0
        if elsewhere.any():
            raise InputError(f"sample {ids[elsewhere][0]} is in another rank's part of the data set")
        return {"starts": np.zeros((len(ids), 2), np.int64), "shapes": self._sizes[ids]}

    def start(
        self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: torch.cuda.Stream | None = None
    ) -> Started:
        """The whole images, whatever regions are asked for."""
        sizes = self._sizes[ids]
        addresses = self.planes.data_ptr() + self._image_starts[ids]
        regions = Regions(addresses, sizes, self.device.type == "cuda", self.planes, planes_size(*sizes.T))
        return lambda: (regions, None)

    def map_parts(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `maps` the samples' label maps lie, int64 [B, 2] = (first byte, the one behind the last), and their
        scores' (minimum, step), float32 [B, 2]."""
        return self._bounds[ids], self._ranges[ids]

    def close(self) -> None:
        self.planes = self.maps = None


def upload(
    addresses: np.ndarray,
    sizes: np.ndarray,
    device: torch.device,
    threads: int,
    before: Callable[[slice], None] = lambda part: None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Parts of the host's memory in one tensor on the device, uint8, and where each begins in it, int64 [n].

    addresses, sizes: int64 [n], of the parts. before: called with the parts that are read next, by any thread.
    progress: called with the parts that are there.
    """
    starts, total = places(sizes)
    # Chunks: the parts that begin in the same CHUNK bytes.
    bounds = np.append(np.flatnonzero(np.diff(starts // CHUNK, prepend=-1)), len(starts))
    ends = np.append(starts[bounds[1:-1]], total)
    room, on_gpu = int((ends - starts[bounds[:-1]]).max()), device.type == "cuda"
    out, kept = torch.empty(total, dtype=torch.uint8, device=device), threading.local()

    def send(chunk: int) -> int:
        part, begin, end = slice(bounds[chunk], bounds[chunk + 1]), int(starts[bounds[chunk]]), int(ends[chunk])
        before(part)
        if not hasattr(kept, "host"):
            kept.host = torch.empty(room, dtype=torch.uint8, pin_memory=on_gpu)
            kept.stream = torch.cuda.Stream(device) if on_gpu else None
        gather(addresses[part], sizes[part], starts[part] - begin, kept.host.numpy())
        with torch.cuda.stream(kept.stream) if on_gpu else contextlib.nullcontext():
            out[begin:end].copy_(kept.host[: end - begin], non_blocking=True)
        if on_gpu:
            kept.stream.synchronize()
        return part.stop - part.start

    nothing = np.zeros(0, np.int64)
    gather(nothing, nothing, nothing, np.zeros(0, np.uint8))  # compiled before threads call it
    done = 0
    with ThreadPoolExecutor(min(READERS, threads), "tl_fast-upload") as readers:
        for future in as_completed([readers.submit(send, chunk) for chunk in range(len(ends))]):
            done += future.result()
            progress(done)
    return out, starts


def places(sizes: np.ndarray) -> tuple[np.ndarray, int]:
    """Where parts of these sizes begin one behind the other, int64 [n], and the bytes of all."""
    ends = np.cumsum(-(-sizes // ALIGNMENT) * ALIGNMENT)
    return np.append(0, ends[:-1]).astype(np.int64), int(ends[-1])


# --- whether it is wanted, and fits


def open_resident(planner: BatchPlanner, device: torch.device, decoding: Decoding) -> Resident | None:
    """The rank's part of the data set in the GPU's memory; None where that is not wanted or, with 'auto', does not fit.

    device: of `tl_fast.pipeline.gpu_batches.find_device`. Raises InputError for `resident=True` where images are stored
    as JPEGs, or the part does not fit.
    """
    if decoding.resident is False or (decoding.resident == "auto" and not planner.train):
        return None
    samples, ids = planner.samples, planner.rank_ids()
    jpegs = ~samples.stored_as_planes
    if jpegs.any():
        if decoding.resident == "auto":
            return None
        first = int(jpegs.argmax())
        raise InputError(
            f"resident: {samples.name(first)} is a JPEG, and {int(jpegs.sum()):,} of {len(samples):,} images are; a GPU"
            " holds planes alone: convert with --store yuv420 --short-side 256"
        )
    needed = resident_bytes(samples, ids)
    free, total = memory_of(device)
    if decoding.resident == "auto" and needed > min(AUTO_SHARE * total, FREE_SHARE * free):
        return None
    if needed > FREE_SHARE * free:
        raise InputError(_too_large(planner, needed, free))
    return Resident(samples, ids, device, decoding, announce=planner.share.rank == 0)


def resident_bytes(samples: Samples, ids: np.ndarray) -> int:
    """What these samples take in a GPU's memory."""
    parts = [samples.image_addresses(ids)[1]]
    if samples.spec is not None:
        parts.append(samples.label_map_addresses(ids)[1])
    return sum(places(sizes)[1] for sizes in parts)


def memory_of(device: torch.device) -> tuple[float, float]:
    """Bytes of a device's memory that are free, and all; in the simulator there is no end of it."""
    if device.type != "cuda":
        return math.inf, math.inf
    return torch.cuda.mem_get_info(device)


def _too_large(planner: BatchPlanner, needed: int, free: float) -> str:
    """What does not fit, and what would make it fit."""
    share, samples = planner.share, planner.samples
    remedies = []
    if share.world_size > 1 and share.order != "grouped":
        remedies.append(f"order 'grouped', with which a rank needs a {share.world_size}th of the images")
    side = int(np.minimum(samples.heights, samples.widths).mean())
    smaller = int(side * math.sqrt(FREE_SHARE * free / needed)) // 32 * 32
    if smaller >= 32:
        remedies.append(f"smaller images (convert with --short-side {smaller}; now {side} on average)")
    remedies.append("more GPUs")
    return (
        f"resident: the images and label maps of rank {share.rank} take {needed / 1e9:,.3g} GB, and"
        f" {FREE_SHARE:.0%} of the {free / 1e9:,.3g} GB that are free on its GPU may be used: take"
        f" {', or '.join(remedies)}"
    )
