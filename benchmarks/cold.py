"""How many images/s does the loader deliver, and how much does it read, from a file that is not in the page cache?

    python benchmarks/cold.py [--images FOLDER] [--samples 8192] [--rounds 5] [--folder DIR]
    python benchmarks/cold.py --table

Random resized crops to 224 px and flips, batch 64, without token targets, from original JPEGs, from JPEGs of a short
side of 256, and from YUV 4:2:0 planes of that size; each with reading ahead (`tl_fast/pipeline/read_ahead.py`) and
without. Before every round the file is dropped from the page cache; a round is 32 steps. "Warm": whole epochs from the
page cache, in turn, after the others.

What a disk reads around a page that is asked for is set for each disk (read_ahead_kb in /sys/class/bdi). It decides
what happens without reading ahead, and is stated in the rows. Rounds drop this machine's page cache alone: the host of
a virtual disk may have a cache of its own. So images/s say how the contenders compare, and KB an image what every
disk would have to deliver. The larger the file, the less of what was read in vain is used by a later batch: a file
should be much larger than what one round needs.

Appends one row a contender to benchmarks/results/cold.jsonl. --table prints the newest rows as docs/benchmarks.md has
them, by read_ahead_kb, and measures nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from loaders import BATCH, SIZE, build, find_images, shrink
from rows import ROOT, newest_runs, write_rows

from tl_fast.pipeline.loader import Loader
from tl_fast.system.disk import disk_reads
from tl_fast.system.memory import reuse_memory

SHORT_SIDE, STEPS = 256, 32
NAMES = ORIGINALS, JPEGS, PLANES = "original JPEGs", f"JPEGs of {SHORT_SIDE} px", f"planes of {SHORT_SIDE} px"
AHEAD, PLAIN, WARM = "read ahead", "not read ahead", "warm"
RESULTS = ROOT / "benchmarks" / "results" / "cold.jsonl"


def build_betons(folder: Path, originals: list[Path]) -> dict[str, Path]:
    betons = {name: folder / f"{number}.beton" for number, name in enumerate(NAMES)}
    build(betons[ORIGINALS], originals, decode_check=False)
    build(betons[JPEGS], shrink(originals, folder / "shrunk", SHORT_SIDE), decode_check=False)
    build(betons[PLANES], originals, decode_check=False, store="yuv420", short_side=SHORT_SIDE)
    return betons


def open_loader(beton: Path, threads: int, ahead: bool) -> Loader:
    loader = Loader(beton, BATCH, image_size=SIZE, threads=threads, token_labels=False)
    if not ahead:
        loader._plan = loader._planner.plan
    return loader


def drop(file: Path) -> None:
    """Drop a file that is not mapped from the page cache."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold_round(beton: Path, threads: int, ahead: bool, number: int) -> tuple[float, float]:
    """Images/s, and KB read from the disk for an image."""
    drop(beton)
    with open_loader(beton, threads, ahead) as loader:
        loader.set_epoch(number, 0, min(STEPS, len(loader)))
        before, start = disk_reads()[1], time.perf_counter()
        count = sum(len(batch.images) for batch in loader)
        seconds = time.perf_counter() - start
        read = 512 * (disk_reads()[1] - before)
    if not read:
        raise SystemExit(f"{beton.parent} is in memory, or does not count what is read: name a folder with --folder")
    return count / seconds, read / count / 1000


def measure_cold(betons: dict[str, Path], threads: int, rounds: int) -> tuple[dict, dict]:
    """Of every contender the images/s of all rounds, and the KB read for an image."""
    rates, read = {}, {}
    for number in range(rounds + 1):  # the first one compiles and is not counted
        for (name, beton), ahead in itertools.product(betons.items(), (False, True)):
            rate, kilobytes = cold_round(beton, threads, ahead, number)
            if number:
                contender = f"{name}, {AHEAD if ahead else PLAIN}"
                rates.setdefault(contender, []).append(rate)
                read.setdefault(contender, []).append(kilobytes)
    return rates, read


def measure_warm(beton: Path, threads: int, rounds: int) -> dict[str, list[float]]:
    loaders = {
        f"{PLANES}, {WARM}, {AHEAD if ahead else PLAIN}": open_loader(beton, threads, ahead) for ahead in (False, True)
    }
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, loader in loaders.items():
            loader.set_epoch(number)
            start = time.perf_counter()
            count = sum(len(batch.images) for batch in loader)
            if number:
                rates[name].append(count / (time.perf_counter() - start))
    for loader in loaders.values():
        loader.close()
    return rates


def read_around(folder: Path) -> int:
    """What the folder's disk reads around a page, in KB; 0 where the system does not say."""
    device = os.stat(folder).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(setting.read_text()) if setting.exists() else 0


def table(runs: dict[int, list[dict]]) -> str:
    """The newest run of every read_ahead_kb as a markdown table: median and range of images/s, KB read for an image."""
    columns = {number: {row["contender"]: row for row in rows} for number, rows in sorted(runs.items())}
    heads = [f"images/s, {number:,} KB around | KB read an image" for number in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (1 + 2 * len(columns)) + "|"]
    for name in next(iter(columns.values())):
        cells = []
        for row in (column[name] for column in columns.values()):
            read = f"{row['read_kb']:,.0f}" if row["read_kb"] else "0"
            cells.append(f"{row['median']:,.0f} ({row['min']:,.0f}–{row['max']:,.0f}) | {read}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs")
    parser.add_argument("--samples", type=int, default=8192, help="the images are repeated to fill it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--folder", type=Path, default=Path("/var/tmp"), help="on which disk the betons are written, and deleted again"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the stored rows as docs/benchmarks.md has them")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(newest_runs(arguments.results, "read_ahead_kb")))
        return
    reuse_memory()
    originals = list(itertools.islice(itertools.cycle(find_images(arguments.images)), arguments.samples))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        betons = build_betons(Path(folder), originals)
        sizes = {name: beton.stat().st_size for name, beton in betons.items()}
        around = read_around(Path(folder))
        rates, read = measure_cold(betons, arguments.threads, arguments.rounds)
        rates |= measure_warm(betons[PLANES], arguments.threads, arguments.rounds)
    details = {
        contender: {
            "read_kb": round(float(np.median(read.get(contender, [0]))), 1),
            "file_mb": round(sizes[contender.split(",")[0]] / 1e6),
        }
        for contender in rates
    }
    rows = write_rows(
        arguments.results,
        "cold",
        rates,
        "images/s",
        ("torch", "numba", "numpy"),
        details=details,
        images=arguments.images.name,
        samples=arguments.samples,
        steps=STEPS,
        image_size=SIZE,
        batch=BATCH,
        threads=arguments.threads,
        read_ahead_kb=around,
    )
    found = {row["contender"]: row for row in rows}
    for name in (*NAMES, f"{PLANES}, {WARM}"):
        ahead, plain = found[f"{name}, {AHEAD}"], found[f"{name}, {PLAIN}"]
        ratios = np.array(rates[f"{name}, {AHEAD}"]) / np.array(rates[f"{name}, {PLAIN}"])
        print(
            f"{name}: read ahead {ahead['median'] / plain['median']:.3f} times as fast (by rounds, median"
            f" {np.median(ratios):.3f}), {ahead['read_kb']:,.0f} instead of {plain['read_kb']:,.0f} KB an image"
        )


if __name__ == "__main__":
    main()
