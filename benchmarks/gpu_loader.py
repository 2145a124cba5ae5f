"""How many images/s does the loader deliver on a GPU, crop + flip and full recipe, with each way to decode, from
planes, and with the set in the GPU's memory?

    python benchmarks/gpu_loader.py [--images FOLDER | --beton FILE] [--samples 4096] [--batch 256] [--threads N]

A consumer that does nothing but wait for its batches' kernels; images/s of groups of ten batches, after a warm-up.
'auto' is what the loader chooses by itself (the row says what). 'mixed' is skipped where DALI or nvJPEG is missing.
The images are packed as they are, then as planes with a short side of 256; a --beton is taken as it is.
Rows go to benchmarks/results/gpu/rows.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from gpu_rows import add_data, beton_of, mean_bytes, need_gpu, parser, without_nvjpeg, write_row

from tl_fast.beton.reader import BetonReader
from tl_fast.pipeline.batch import Batch
from tl_fast.pipeline.choice import MEASURED, WARM_UP
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.augment import Augment
from tl_fast.system.mistakes import InputError

RECIPES = {
    "crop + flip": Augment(),
    "full recipe": Augment(auto_augment="rand-m9-mstd0.5-inc1", interpolation="random", erase=0.25),
}
WAYS = ("cpu", "mixed", "hybrid", "auto")
PLANES_WAYS = ("cpu", "resident")
SHORT_SIDE = 256  # of the planes
GROUP = 10


def endless(loader: Loader) -> Iterator[Batch]:
    for epoch in itertools.count():
        loader.set_epoch(epoch, next_epoch=epoch + 1)
        yield from loader


def rates(loader: Loader, seconds: float) -> list[float]:
    values: list[float] = []
    batches = endless(loader)
    for _ in range(WARM_UP + MEASURED + GROUP):  # 'auto' has decided by then
        next(batches)
    torch.cuda.synchronize()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(values) < 3:
        begin = time.perf_counter()
        for batch in itertools.islice(batches, GROUP):
            pass
        torch.cuda.synchronize()
        values.append(GROUP * len(batch.images) / (time.perf_counter() - begin))
    batches.close()
    return values


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    add_data(options)
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options.add_argument("--seconds", type=float, default=12, help="of each contender")
    arguments = options.parse_args()
    need_gpu()
    kinds = [{}] if arguments.beton else [{}, {"store": "yuv420", "short_side": SHORT_SIDE}]
    failed = False
    for kind in kinds:
        with beton_of(arguments, **kind) as path:
            if path is None:
                return
            failed |= measure(arguments, path)
    sys.exit(failed)


def measure(arguments: argparse.Namespace, path: Path) -> bool:
    """Measure every recipe and way with a beton, and store the rows -> whether one failed."""
    failed, missing, size = False, without_nvjpeg(), mean_bytes(path)
    with BetonReader(path) as reader:
        planes = bool(reader.stored_as_planes.all())
    for (recipe, augment), way in itertools.product(RECIPES.items(), PLANES_WAYS if planes else WAYS):
        if way in ("mixed", "hybrid") and missing:
            print(f"{recipe}, {way}: skipped: {missing}", flush=True)
            continue
        resident = way == "resident"
        try:
            with Loader(
                path,
                arguments.batch,
                threads=arguments.threads,
                augment=augment,
                device="cuda",
                decode="auto" if resident else way,
                resident=resident,
            ) as loader:
                values = rates(loader, arguments.seconds)
                chosen, share, count = loader.decode, loader.hybrid_share, len(loader.samples)
        except (ImportError, RuntimeError, InputError) as error:
            print(f"{recipe}, {way}: FAILED: {str(error).splitlines()[0]}", flush=True)
            failed = True
            continue
        write_row(
            arguments.results,
            "loader",
            f"{recipe}, {'planes, ' * planes}{way}",
            values,
            "images/s",
            decode=chosen,
            hybrid_share=share,
            threads=arguments.threads,
            batch=arguments.batch,
            samples=count,
            mean_bytes=size,
            images=(arguments.beton or arguments.images).name,
        )
    return failed


if __name__ == "__main__":
    main()
