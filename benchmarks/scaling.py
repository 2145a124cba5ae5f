"""How does the loader's cost grow with source size, output size and threads, and its memory with the size of the file?

    python benchmarks/scaling.py [--images FOLDER] [--samples 256] [--rounds 3]

Sources are the folder's largest photos, resized to a long side of 224 to 2,400 px (enlarged ones have less detail than
a camera's, and are smaller files) and saved as JPEGs of quality 90. Images/s with token targets of 1,000 classes, batch
64, of crop + flip and of the full recipe. Memory: a fresh process a file of 1, 4 and 16 times the samples makes the
same number of batches from it (16 epochs, 4 or 1) and says how much memory of its own it had at most, in MiB, and how
many pages of files (libraries, and what it read of the beton, which is the page cache's and goes when that needs room).
Rows go to benchmarks/results/scaling.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from loaders import BATCH, CLASSES, FULL, build, find_images
from PIL import Image
from rows import ROOT, measure, write_rows

from tl_fast.models.lvvit import PATCH
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.augment import Augment

SOURCES, OUTPUTS, FILES = (224, 500, 1000, 1600, 2400), (128, 224, 384), (1, 4, 16)
RECIPES = {"crop + flip": Augment(), "full recipe": Augment(erase=0.25, **FULL)}
SIZE, UNIQUE = 224, 32
PACKAGES = ("torch", "numba", "nvidia-dali-cuda130", "Pillow")


def resized(photos: list[Path], long_side: int, folder: Path) -> list[Path]:
    folder.mkdir()
    made = []
    for photo in photos:
        with Image.open(photo) as file:
            scale = long_side / max(file.size)
            image = file.convert("RGB").resize(
                [max(1, round(side * scale)) for side in file.size], Image.Resampling.LANCZOS
            )
        made.append(folder / f"{len(made)}.jpg")
        image.save(made[-1], quality=90)
    return made


def repeat(files: list[Path], count: int) -> list[Path]:
    return list(itertools.islice(itertools.cycle(files), count))


def epoch_of(beton: Path, augment: Augment, *, size: int = SIZE, threads: int) -> Callable[[int], int]:
    loader = Loader(beton, BATCH, image_size=size, grid=size // PATCH, threads=threads, augment=augment)

    def epoch(number: int) -> int:
        loader.set_epoch(number)
        return sum(len(batch.images) for batch in loader)

    return epoch


def resident() -> tuple[float, float]:
    """MiB of this process's memory that no file stands behind, and MiB that are pages of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))


def peak_memory(beton: str, batches: int, threads: int) -> tuple[float, float]:
    """Make so many batches of the full recipe in this process -> the most of both kinds of memory that it had at any of
    them."""
    peaks, number = (0.0, 0.0), 0
    with Loader(beton, BATCH, image_size=SIZE, threads=threads, augment=RECIPES["full recipe"]) as loader:
        while number < batches:
            for _ in loader:
                peaks, number = tuple(map(max, peaks, resident())), number + 1
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs (default: the bundled photos)"
    )
    parser.add_argument("--samples", type=int, default=256, help="samples of a file; the largest has 16 times as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "scaling.jsonl")
    parser.add_argument("--memory-of", nargs=2, metavar=("BETON", "BATCHES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory_of:
        beton, batches = arguments.memory_of
        print(*peak_memory(beton, int(batches), arguments.threads))
        return
    if arguments.samples < BATCH:
        parser.error(f"--samples must be at least {BATCH}, one batch")
    found = find_images(arguments.images)
    photos = sorted(found, key=lambda path: -path.stat().st_size)[:UNIQUE]
    threads, facts = arguments.threads, {"images": arguments.images.name, "classes": CLASSES, "batch": BATCH}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in SOURCES:
            files = resized(photos, side, folder / str(side))
            build(folder / f"{side}.beton", repeat(files, arguments.samples))
            contenders = {
                f"{side} px sources, {recipe}": epoch_of(folder / f"{side}.beton", augment, threads=threads)
                for recipe, augment in RECIPES.items()
            }
            mean = round(sum(file.stat().st_size for file in files) / len(files))
            rates = measure(contenders, arguments.rounds)
            write_rows(
                arguments.results,
                "source size",
                rates,
                "images/s",
                PACKAGES,
                samples=arguments.samples,
                source_px=side,
                mean_bytes=mean,
                image_size=SIZE,
                threads=threads,
                **facts,
            )
        beton = folder / "1.beton"
        build(beton, repeat(found, arguments.samples * FILES[0]))
        for size, count in dict.fromkeys(
            [(size, threads) for size in OUTPUTS] + [(SIZE, t) for t in range(1, threads + 1)]
        ):
            label = f"{size} px output, {count} thread{'s' * (count > 1)}"
            contenders = {
                f"{label}, {recipe}": epoch_of(beton, augment, size=size, threads=count)
                for recipe, augment in RECIPES.items()
            }
            rates = measure(contenders, arguments.rounds)
            write_rows(
                arguments.results,
                "output size and threads",
                rates,
                "images/s",
                PACKAGES,
                samples=arguments.samples,
                image_size=size,
                threads=count,
                **facts,
            )
        samples = max(arguments.samples, 4 * BATCH)
        for times in FILES:
            beton = folder / f"memory {times}.beton"
            build(beton, repeat(found, samples * times))
            batches = samples * max(FILES) // BATCH
            command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", str(beton), str(batches)]
            own, mapped = map(
                float, subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            )
            peaks = {f"{times} x the samples: own memory": [own], f"{times} x the samples: pages of files": [mapped]}
            write_rows(
                arguments.results,
                "memory",
                peaks,
                "MiB",
                PACKAGES,
                samples=samples * times,
                batches=batches,
                file_bytes=beton.stat().st_size,
                image_size=SIZE,
                threads=threads,
                **facts,
            )


if __name__ == "__main__":
    main()
