"""Where does the time of one batch go? Microseconds an image on one thread: plan, decode of the crop, geometry,
colours, label maps, token targets.

    python benchmarks/breakdown.py [--images FOLDER] [--samples 1024] [--row-index | --bit-index]

The loader's own steps, called one after the other for batches of 64 with token targets of 1,000 classes, crop + flip
and LV-ViT-S's full recipe; medians over the batches of an epoch after one that is not counted. Output memory is that of
earlier batches and malloc keeps what is freed, as in training. Appends one row a part and recipe to
benchmarks/results/breakdown.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from loaders import BATCH, CLASSES, FULL, GRID, SIZE, build, find_images
from rows import ROOT, write_rows

from tl_fast.kernels import cpu
from tl_fast.kernels.colour import cpu as colour
from tl_fast.kernels.geometry import cpu as warp
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.augment import Augment
from tl_fast.plan.boxes import map_affines
from tl_fast.plan.order import epoch_order
from tl_fast.system.memory import reuse_memory

RECIPES = {"crop + flip": Augment(), "full recipe": Augment(erase=0.25, **FULL)}


def epoch(loader: Loader, number: int, images: np.ndarray, targets: np.ndarray) -> dict[str, list[float]]:
    """Seconds an image of each part, one figure a batch."""
    spent: dict[str, list[float]] = defaultdict(list)
    fill, order = np.array(loader.augment.fill, np.uint8), epoch_order(0, number, len(loader.samples))
    for start in range(0, len(order) - BATCH + 1, BATCH):
        ids = order[start : start + BATCH]
        times: dict[str, float] = defaultdict(float)
        last = time.perf_counter()

        def lap(part: str, times: dict[str, float] = times) -> None:
            nonlocal last
            now = time.perf_counter()
            times[part] += now - last
            last = now

        plans, starts, stops = loader._planner.regions(ids, number)
        heights, widths = loader.samples.heights[ids], loader.samples.widths[ids]
        lap("plan")
        for b, plan in enumerate(plans):
            pixels = loader._maker.decoder.pixels(ids[b], starts[b], stops[b] - starts[b])
            lap("decode of the crop")
            crop = tuple(float(plan[name]) for name in ("top", "left", "height", "width"))
            warp.show(
                pixels,
                int(heights[b]),
                int(widths[b]),
                crop,
                plan["affine"],
                int(plan["interpolation"]),
                fill,
                images[b],
            )
            lap("geometry")
            colour.apply(images[b], plan["ops"], plan["arguments"])
            lap("colours")
        classes, scores = loader.samples.label_maps(ids)
        affines = map_affines(plans, heights, widths, "full", "correct")
        lap("label maps")
        cpu.warped_targets(classes, scores, affines, CLASSES, GRID, loader.smoothing, targets)
        lap("token targets")
        for part, seconds in times.items():
            spent[part].append(seconds / BATCH)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs (default: the bundled photos)"
    )
    parser.add_argument(
        "--samples", type=int, default=1024, help="size of the data set; the images are repeated to fill it"
    )
    parser.add_argument("--row-index", action="store_true", help="convert with restart markers")
    parser.add_argument("--bit-index", action="store_true", help="convert with an index of bit positions")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "breakdown.jsonl")
    arguments = parser.parse_args()
    reuse_memory()
    files = list(itertools.islice(itertools.cycle(find_images(arguments.images)), arguments.samples))
    images, targets = np.zeros((BATCH, 3, SIZE, SIZE), np.uint8), np.zeros((BATCH, 1 + GRID**2, CLASSES), np.float32)
    microseconds = {}
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "bench.beton", files, row_index=arguments.row_index, bit_index=arguments.bit_index)
        for recipe, augment in RECIPES.items():
            with Loader(
                Path(folder) / "bench.beton", BATCH, image_size=SIZE, grid=GRID, threads=1, augment=augment
            ) as loader:
                loader.batch(np.arange(BATCH))  # compiles
                epoch(loader, 0, images, targets)
                for part, seconds in epoch(loader, 1, images, targets).items():
                    microseconds[f"{recipe}: {part}"] = [1e6 * value for value in seconds]
    write_rows(
        arguments.results,
        "breakdown",
        microseconds,
        "us an image",
        ("numba", "Pillow"),
        images=arguments.images.name,
        batch=BATCH,
        mean_bytes=round(sum(file.stat().st_size for file in files) / len(files)),
        threads=1,
        row_index=arguments.row_index,
        bit_index=arguments.bit_index,
    )


if __name__ == "__main__":
    main()
