"""The decode pipeline: betons -> plan -> decode of the crop -> resample and token targets -> Batch.

Sample order and all random decisions come from `tl_fast.plan.records`, so a batch depends on (seed, epoch, step) and on
nothing else.
"""

from __future__ import annotations

import collections
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import torch

from tl_fast.beton.samples import Samples
from tl_fast.kernels import cpu
from tl_fast.kernels.geometry import cpu as warp
from tl_fast.maths import scalar
from tl_fast.pipeline.batch import Batch, _Buffers
from tl_fast.pipeline.decode import HW_DECODER_LOAD, Decoder, choose, graph_definition
from tl_fast.plan import records as plan
from tl_fast.plan.boxes import GEOMETRIES, center_boxes, map_affines
from tl_fast.system.mistakes import InputError
from tl_fast.system.ranks import cores_of_this_rank

DECODES = ("auto", "cpu", "mixed")
EVAL_INTERPOLATION = scalar.BICUBIC  # the published evaluation's


class Loader:
    """Batches of one or several betons, image crops and their token targets from the same plan.

    paths: a beton, a glob or a list of them; batch_size: samples a rank and step; image_size: output pixels, square;
    grid: tokens a side;
    train: random resized crop + flip in a new order every epoch, whole batches only (what is left over differs from
    epoch to epoch), or, False, resize + centre crop (`crop_pct`) of every sample exactly once over all ranks, in file
    order, without targets; augment: ranges of the random decisions, None for the paper's; geometry: "correct", or
    "published" to crop label maps where the published code does, mirrored across the diagonal; seed: of all randomness;
    threads: decode and kernel threads, None for this rank's share of the cores; device: where batches are made and
    delivered, 'cpu' or a CUDA device ('cuda': torch's current one), whose batches are ready for the stream that is
    current when they are taken; decode: 'cpu', 'mixed' (nvJPEG, on CUDA devices alone) or 'auto', which on a CUDA
    device decodes for a second in both ways when the first batch is made, takes the faster and says so on stderr (rank
    0); hw_decoder_load: share of the images that nvJPEG gives to the GPU's JPEG engine, 0..1; rank, world_size: this
    rank takes its part of every global batch; smoothing: label smoothing of the targets; token_labels: False leaves the
    targets out; check: compare every sample's CRC-32 as it is read; prefetch: batches made ahead.

    Iterating yields the epoch chosen with `set_epoch`. Leaving the loop early cancels what was under way. An error in
    any thread is raised by the iteration. Raises ValueError or FileNotFoundError for settings or files that cannot
    work, ImportError for 'mixed' without DALI.
    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        batch_size: int,
        *,
        image_size: int = 224,
        grid: int = 14,
        train: bool = True,
        augment: plan.Augment | None = None,
        geometry: str = "correct",
        seed: int = 0,
        threads: int | None = None,
        device: str | torch.device = "cpu",
        decode: str = "auto",
        hw_decoder_load: float = HW_DECODER_LOAD,
        rank: int = 0,
        world_size: int = 1,
        smoothing: float = 0.1,
        crop_pct: float = 0.9,
        token_labels: bool = True,
        check: bool = False,
        prefetch: int = 2,
    ):
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"device must be 'cpu' or a CUDA device, got {str(device)!r}")
        if decode not in DECODES or (decode == "mixed" and device.type == "cpu"):
            raise InputError(
                f"decode must be one of {DECODES}, 'mixed' (nvJPEG) with device='cuda' alone; got "
                f"{decode!r}, device={str(device)!r}"
            )
        if not 0 <= hw_decoder_load <= 1:
            raise InputError(f"hw_decoder_load must be in 0..1, got {hw_decoder_load}")
        if decode == "mixed":
            graph_definition()  # without DALI an error now, not in a thread when the first batch is made
        if min(batch_size, image_size, grid, prefetch, world_size) < 1 or not 0 <= rank < world_size:
            raise InputError(
                "batch_size, image_size, grid, prefetch >= 1 and 0 <= rank < world_size needed, got"
                f" batch_size={batch_size}, image_size={image_size}, grid={grid}, prefetch={prefetch}, rank={rank},"
                f" world_size={world_size}"
            )
        if not 0 < crop_pct <= 1 or not 0 <= smoothing < 1:
            raise InputError(f"crop_pct must be in (0, 1] and smoothing in [0, 1), got {crop_pct} and {smoothing}")
        if geometry not in GEOMETRIES:
            raise InputError(f"geometry must be one of {GEOMETRIES}, got {geometry!r}")
        self.samples = Samples(paths)
        self.batch_size, self.image_size, self.grid, self.train = batch_size, image_size, grid, train
        self.augment, self.geometry = augment or plan.Augment(), geometry
        self.seed, self.rank, self.world_size, self.smoothing, self.crop_pct = (
            seed,
            rank,
            world_size,
            smoothing,
            crop_pct,
        )
        self.token_labels = token_labels and train and self.samples.spec is not None
        self.check, self.prefetch = check, prefetch
        self.threads = threads or cores_of_this_rank()
        if train and len(self.samples) < batch_size * world_size:
            raise InputError(
                f"{len(self.samples)} samples do not fill one global batch of {batch_size} x {world_size} ranks; lower"
                " the batch size"
            )
        self._epoch, self._start_step = 0, 0
        self._buffers = _Buffers()
        self._gpu = None
        if device.type == "cuda":
            from tl_fast.pipeline import gpu_batches  # here: numba's CUDA half takes a while to import

            self._gpu = gpu_batches.GpuBatches(
                self.samples,
                gpu_batches.find_device(device),
                image_size=image_size,
                grid=grid,
                smoothing=smoothing,
                fill=self.augment.fill,
                ahead=prefetch + 1,
            )
        if self._gpu is None or self._gpu.decode_device is None:
            decode = "cpu"
        self.decode, self.hw_decoder_load, self._decoder = decode, hw_decoder_load, None
        # One thread plans batches, and on a GPU decodes them (with threads of the decoder's); the kernels of the batch
        # before are launched meanwhile.
        enter = None if self._gpu is None else self._gpu.enter_thread
        self._driver = ThreadPoolExecutor(1, "tl_fast-decode", enter)
        self._workers = ThreadPoolExecutor(self.threads if self._gpu is None else 1, "tl_fast-kernel", enter)
        self._compiled = False

    @property
    def num_classes(self) -> int:
        """C of the targets and labels."""
        return self.samples.num_classes

    def __len__(self) -> int:
        """Steps of one whole epoch; the same on every rank when training."""
        if self.train:
            return len(self.samples) // (self.batch_size * self.world_size)
        mine = len(range(self.rank, len(self.samples), self.world_size))
        return -(-mine // self.batch_size)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """Choose the epoch of the next iteration, and the step in it to start from (for resuming)."""
        if epoch < 0 or not 0 <= start_step <= len(self):
            raise InputError(f"epoch must be >= 0 and start_step in 0..{len(self)}, got {epoch} and {start_step}")
        self._epoch, self._start_step = epoch, start_step

    def draw(self, sample_ids: np.ndarray) -> np.ndarray:
        """The plans of these samples in the chosen epoch, PLAN records [B]."""
        heights, widths = self.samples.heights[sample_ids], self.samples.widths[sample_ids]
        return plan.draw(self.seed, self._epoch, sample_ids, heights, widths, self.augment)

    def batch(self, sample_ids: np.ndarray) -> Batch:
        """These samples as the chosen epoch has them, at most `batch_size` of them; for looking at, not for
        training."""
        ids = np.asarray(sample_ids, np.int64)
        if ids.ndim != 1 or not 1 <= ids.size <= self.batch_size or ids.min() < 0 or ids.max() >= len(self.samples):
            raise InputError(
                f"sample ids must be 1..{self.batch_size} numbers in 0..{len(self.samples) - 1}, got {sample_ids}"
            )
        batch = self._finished(self._driver.submit(self._produce, ids, self._epoch))
        if self._gpu is not None:
            self._gpu.check(wait=True)
        return batch

    def __iter__(self) -> Iterator[Batch]:
        epoch = self._epoch  # set_epoch while this runs is for the next iteration
        order = plan.epoch_order(self.seed, epoch, len(self.samples)) if self.train else np.arange(len(self.samples))
        steps = iter(range(self._start_step, len(self)))
        pending: collections.deque[Future] = collections.deque()

        def submit(count: int) -> None:
            for step in itertools.islice(steps, count):
                pending.append(self._driver.submit(self._produce, self._ids(order, step), epoch))

        if self._gpu is not None:
            self._gpu.forget()  # what an iteration that was left early delivered
        try:
            submit(self.prefetch)
            while pending:
                batch = self._finished(pending.popleft())
                submit(1)
                yield batch
            if self._gpu is not None:
                self._gpu.check(wait=True)
        finally:
            for future in pending:
                future.cancel()
            for future in pending:
                if not future.cancelled() and future.exception() is None:
                    wait(future.result()[1])

    def _ids(self, order: np.ndarray, step: int) -> np.ndarray:
        """This rank's samples of a step, int64 [B]."""
        if self.train:
            start = (step * self.world_size + self.rank) * self.batch_size
            return order[start : start + self.batch_size]
        return order[self.rank :: self.world_size][step * self.batch_size : (step + 1) * self.batch_size]

    def _plan(self, ids: np.ndarray, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Plans [B], and of the pixels that they need the first and the one behind the last (row, column), int64 [B,
        2]."""
        heights, widths = self.samples.heights[ids], self.samples.widths[ids]
        if self.train:
            plans = plan.draw(self.seed, epoch, ids, heights, widths, self.augment)
        else:
            plans = plan.of_boxes(center_boxes(heights, widths, self.image_size, self.crop_pct), EVAL_INTERPOLATION)
        return plans, *warp.needed(plans, heights, widths, self.image_size)

    def _finished(self, produced: Future) -> Batch:
        """Wait for a batch of `_produce` and for what fills it, or on a GPU for the launch of that; raises what failed
        there."""
        batch, kernels = produced.result()
        results = [kernel.result() for kernel in kernels]
        return self._gpu.hand_over(results[0]) if batch is None else batch

    def _produce(self, ids: np.ndarray, epoch: int) -> tuple[Batch | None, list[Future]]:
        """Start the decoding and the kernels of one batch, and return the batch they are filling; on a GPU None, and
        the future of a `gpu_batches.Made`."""
        plans, starts, stops = self._plan(ids, epoch)
        heights, widths = self.samples.heights[ids], self.samples.widths[ids]
        if self._gpu is not None and self.check:
            for i in ids:
                self.samples.check(i)
        shapes = stops - starts
        affines = (
            map_affines(plans, heights, widths, self.samples.spec.extent, self.geometry) if self.token_labels else None
        )
        extras = {}
        if self.train and self.augment.erase > 0:
            extras = {"erase": plan.erase_boxes(plans, self.image_size), "noise": plans["noise"].view(np.int64).copy()}
        if self._gpu is not None:
            regions = self._decode(ids, starts, shapes)
            decoded = self._gpu.decoded()
            return None, [
                self._workers.submit(self._gpu.make, ids, plans, starts, shapes, regions, decoded, affines, extras)
            ]
        if self._decoder is None:
            self._decoder = self._open_decoder("cpu")
        out = self._buffers.take((len(ids), 3, self.image_size, self.image_size), np.uint8)
        images, fill = torch.from_numpy(out), np.array(self.augment.fill, np.uint8)

        def augment(part: range) -> None:
            for b in part:
                if self.check:
                    self.samples.check(ids[b])
                region = self._decoder.region(
                    ids[b], starts[b], shapes[b]
                )  # which the augmentation finds in the core's cache
                cpu.augment(region, *starts[b], heights[b], widths[b], plans[b], fill, out[b])

        parts = [range(t, len(ids), self.threads) for t in range(min(self.threads, len(ids)))]
        kernels = self._share(augment, parts)
        targets = None
        if self.token_labels:
            target_out = self._buffers.take((len(ids), 1 + self.grid**2, self.num_classes), np.float32)
            targets = torch.from_numpy(target_out)
            classes, scores = self.samples.label_maps(ids)

            def token_targets(part: slice) -> None:
                cpu.warped_targets(
                    classes[part],
                    scores[part],
                    affines[part],
                    self.num_classes,
                    self.grid,
                    self.smoothing,
                    target_out[part],
                    cut=self.samples.spec.extent
                    == "full",  # what is beyond a square map is image, of which its edge says most
                )

            bounds = np.linspace(0, len(ids), len(parts) + 1).astype(int)
            kernels += self._share(token_targets, [slice(a, b) for a, b in itertools.pairwise(bounds)])
        self._compiled = True
        labels = torch.from_numpy(self.samples.labels[ids])
        batch = Batch(images, labels, targets, torch.from_numpy(np.ascontiguousarray(ids)))
        for name, values in extras.items():
            setattr(batch, name, torch.from_numpy(values))
        return batch, kernels

    def _share(self, kernel: Callable, parts: Sequence) -> list[Future]:
        """`kernel(part)` on the worker threads; the first time one alone, for numba does not bear two threads that
        compile one function."""
        futures = [self._workers.submit(kernel, parts[0])]
        if not self._compiled:
            wait(futures)
        return futures + [self._workers.submit(kernel, part) for part in parts[1:]]

    def _open_decoder(self, way: str) -> Decoder:
        device = None if self._gpu is None else self._gpu.decode_device
        return Decoder(self.samples, self.batch_size, self.threads, way, device, self.hw_decoder_load)

    def _decode(self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray) -> Sequence:
        """The regions' pixels, uint8 [h, w, 3] each, on the host or, ordered on its `decoding` stream, on the GPU.
        Decides about 'auto' when first called."""
        if self._decoder is None:
            if self.decode == "auto":
                self.decode, words = choose(self._open_decoder, self._trial)
                if self.rank == 0:
                    print(f"tl_fast: {words}", file=sys.stderr, flush=True)
            self._decoder = self._open_decoder(self.decode)
        return self._decoder(ids, starts, shapes, None if self._gpu is None else self._gpu.decoding)

    def _trial(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Batches to try decoders on, without end: this rank's of epoch 0, its crops included."""
        order = plan.epoch_order(self.seed, 0, len(self.samples)) if self.train else np.arange(len(self.samples))
        for step in itertools.cycle(range(len(self))):
            ids = self._ids(order, step)
            _, starts, stops = self._plan(ids, 0)
            yield ids, starts, stops - starts

    def close(self) -> None:
        """Stop the threads and close the files. The loader cannot be used afterwards."""
        self._driver.shutdown(wait=True, cancel_futures=True)
        self._workers.shutdown(wait=True, cancel_futures=True)
        if self._gpu is not None:
            self._gpu.close()
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None
        self.samples.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
