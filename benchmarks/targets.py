"""How many images/s get token targets (14 x 14 tokens, top 5 of 10, 1,000, 21,841 classes): ours, and torch's scatter +
RoIAlign + softmax?

    python benchmarks/targets.py [--rounds 5] [--threads 2]

Maps are of 18 x 18 cells with random classes (ten an image) and scores; crops are random resized crops of 4:3 images.
Every contender makes the targets of a batch, split over the same threads, and the two are compared before they are
measured. malloc keeps what is freed,
for all contenders: page faults of new memory cost several times the kernel, as the row "into new memory" shows.
RoIAlign is torchvision's operator or, where its wheel has none that loads, the operator's algorithm compiled by numba
(`published_style.roi_align`); then torchvision's own Python fallback is measured besides, at 1,000 classes, with one
sampling point a bin: it would otherwise take 16 s an image. Appends one row a contender and class count to
benchmarks/results/targets.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import published_style
import torchvision
from rows import ROOT, measure, write_rows

from tl_fast.kernels import cpu
from tl_fast.plan import records as plan
from tl_fast.system.memory import reuse_memory

GRID, K, CELLS, SMOOTHING = 14, 5, 18, 0.1
BATCHES = {10: 128, 1000: 64, 21841: 8}  # classes -> images a batch, some 100 MB of targets
ROUND = {"ours": 16, "torch": 2}  # batches a round

Batch = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def random_batch(num_classes: int, size: int) -> Batch:
    """classes uint16 and scores float32 [B, k, H, W], crops float32 [B, 4] of 4:3 images, flips bool [B]."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, num_classes - 9, (size, 1, 1, 1))
    classes = (np.argsort(rng.random((size, 10, CELLS, CELLS)), axis=1)[:, :K] + first).astype(np.uint16)
    scores = rng.uniform(0, 12, classes.shape).astype(np.float32)
    height, width = 375, 500
    plans = plan.draw(0, 0, np.arange(size), np.full(size, height), np.full(size, width), plan.Augment())
    crops = np.stack(
        [plans["top"] / height, plans["left"] / width, plans["height"] / height, plans["width"] / width], axis=1
    )
    return classes, scores, crops.astype(np.float32), np.ascontiguousarray(plans["flip"])


def ours(part: Batch, out: torch.Tensor) -> None:
    cpu.token_targets(*part, out.shape[2], GRID, SMOOTHING, out.numpy())


def by_torch(part: Batch, out: torch.Tensor) -> None:
    """One image after the other: batches of dense maps would leave the caches."""
    for b, (classes, scores, crop, flip) in enumerate(zip(*part, strict=True)):
        classes, scores = torch.from_numpy(classes.astype(np.int64)), torch.from_numpy(scores)
        top, left, height, width = crop.tolist()
        if flip:  # as the published code: the map is mirrored before it is cropped
            classes, scores, left = classes.flip(2), scores.flip(2), 1 - left - width
        out[b] = published_style.token_targets(
            scores, classes, (top, left, height, width), out.shape[2], GRID, SMOOTHING
        )


def by_fallback(part: Batch, out: torch.Tensor) -> None:
    """torchvision's Python RoIAlign in eager mode, one sampling point a bin (the operator takes 1 to 4 of them
    here)."""
    num_classes = out.shape[2]
    off = SMOOTHING / num_classes
    for b, (classes, scores, (top, left, height, width), _) in enumerate(zip(*part, strict=True)):
        indices = torch.from_numpy(classes.astype(np.int64))
        dense = torch.zeros((num_classes, CELLS, CELLS)).scatter_(0, indices, torch.from_numpy(scores))[None]
        box = torch.tensor([[left, top, left + width, top + height]]) * CELLS - 0.5
        align = torchvision.ops.roi_align
        parts = [
            align(dense, [box], bins, sampling_ratio=1)[0].flatten(1).softmax(0).T * (1 - SMOOTHING + off) + off
            for bins in (1, GRID)
        ]
        torch.cat(parts, out=out[b])


def new_memory(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(-1, int(np.prod(shape)) * 4), dtype=torch.float32).view(shape)


def make(
    function: Callable,
    batch: Batch,
    num_classes: int,
    pool: ThreadPoolExecutor,
    threads: int,
    allocate: Callable = torch.empty,
) -> torch.Tensor:
    """The targets of one batch: float32 [B, 1 + grid*grid, C]."""
    out = allocate((len(batch[0]), 1 + GRID**2, num_classes))
    bounds = np.linspace(0, len(batch[0]), threads + 1).astype(int)
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    list(pool.map(lambda part: function(tuple(array[part] for array in batch), out[part]), parts))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "targets.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the threads are ours
    reuse_memory()
    published_style.check_roi_align()
    pool = ThreadPoolExecutor(arguments.threads)

    def contender(
        function: Callable, num_classes: int, batch: Batch, repeats: int, allocate: Callable = torch.empty
    ) -> Callable[[int], int]:

        def run(_: int) -> int:
            for _ in range(repeats):
                make(function, batch, num_classes, pool, arguments.threads, allocate)
            return repeats * len(batch[0])

        return run

    for num_classes, size in BATCHES.items():
        batch = random_batch(num_classes, size)
        few = tuple(array[:4] for array in batch)
        torch.testing.assert_close(
            *(make(function, few, num_classes, pool, 1) for function in (ours, by_torch)), atol=1e-5, rtol=1e-3
        )
        name = "torch: scatter + RoIAlign + softmax"
        contenders = {
            "tl_fast": contender(ours, num_classes, batch, ROUND["ours"]),
            "tl_fast, into new memory": contender(ours, num_classes, batch, ROUND["ours"] // 4, new_memory),
            name: contender(by_torch, num_classes, batch, ROUND["torch"]),
        }
        if num_classes == 1000 and published_style.roi_align_name() != "torchvision":
            eight = tuple(array[:8] for array in batch)
            contenders[f"{name}, torchvision's Python fallback"] = contender(by_fallback, num_classes, eight, 1)
        # The stance belongs to all threads; compiled, the fallback would first work for minutes.
        torch.compiler.set_stance("force_eager")
        rates = measure(contenders, arguments.rounds)
        print(f"{num_classes:,} classes")
        rows = write_rows(
            arguments.results,
            "targets",
            rates,
            "images/s",
            ("torch", "torchvision", "numba"),
            num_classes=num_classes,
            k=K,
            cells=CELLS,
            grid=GRID,
            batch=size,
            threads=arguments.threads,
            roi_align=published_style.roi_align_name(),
        )
        for row in rows[2:]:
            print(f"{rows[0]['median'] / row['median']:6.1f} times: tl_fast / {row['contender']}")


if __name__ == "__main__":
    main()
