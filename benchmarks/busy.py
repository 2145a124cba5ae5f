"""How busy are the threads that decode for a GPU, when one batch is decoded at a time and when the next ones are begun?

    python benchmarks/busy.py [--images FOLDER] [--threads 2 4 8 16]

The time that the crop of each image takes is measured first, on one thread. Then `Decoder` runs with more threads
than this machine may have cores: in place of decoding, a thread sleeps as long as the crop took. What is measured is
what the queue, the batches' ends and Python's own work cost. 100 % busy is the sum of the crops' times divided by the
threads. "Divided beforehand" is what the loader did at first: every thread has its share of a batch, and all wait for
the slowest.
Rows go to benchmarks/results/busy.jsonl.
"""

from __future__ import annotations

import argparse
import collections
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from loaders import build, find_images
from rows import ROOT, write_rows

from tl_fast.beton.samples import Samples
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.planner import Planner
from tl_fast.pipeline.settings import Crops, Share

BATCH, BATCHES = 256, 24
AHEAD = 2  # batches begun before the one that is waited for, as the loader has them
PACKAGES = ("numba", "numpy")


def crop_seconds(samples: Samples, planner: Planner, repeats: int = 3) -> np.ndarray:
    """The least time that the crop of each sample takes to decode on one thread, float64 [number of samples]."""
    ids = np.arange(len(samples))
    _, starts, stops = planner.regions(ids, 0)
    decoder = Decoder(samples, 1, 1)
    seconds = np.full((repeats + 1, len(ids)), np.inf)  # the first time compiles
    for repeat in range(repeats + 1):
        for i in ids:
            begin = time.perf_counter()
            decoder.region(i, starts[i], stops[i] - starts[i])
            seconds[repeat, i] = time.perf_counter() - begin
    decoder.close()
    return seconds[1:].min(axis=0)


def oversleep() -> float:
    """How much longer than asked a thread sleeps, in seconds."""
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        time.sleep(1e-3)
        times.append(time.perf_counter() - begin - 1e-3)
    return float(np.median(times))


class Sleeper(Decoder):
    """A decoder whose threads sleep as long as decoding takes."""

    def __init__(self, samples: Samples, threads: int, seconds: np.ndarray):
        super().__init__(samples, BATCH, threads)
        self.seconds = seconds

    def region(self, sample_id: int, start: np.ndarray, shape: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        time.sleep(self.seconds[sample_id])
        return out.reshape(*shape, 3)


def divided_beforehand(decoder: Decoder, batches: list[tuple]) -> None:
    with ThreadPoolExecutor(decoder.threads) as threads:
        for ids, starts, shapes in batches:
            out = np.empty(int(3 * shapes.prod(axis=1).max()), np.uint8)

            def decode(part: np.ndarray, ids=ids, starts=starts, shapes=shapes, out=out) -> None:
                for b in part:
                    decoder.region(ids[b], starts[b], shapes[b], out[: 3 * shapes[b].prod()])

            list(threads.map(decode, np.array_split(np.arange(len(ids)), decoder.threads)))


def one_at_a_time(decoder: Decoder, batches: list[tuple]) -> None:
    for batch in batches:
        decoder(*batch)


def begun_ahead(decoder: Decoder, batches: list[tuple]) -> None:
    under_way: collections.deque[Callable] = collections.deque()
    for batch in batches:
        under_way.append(decoder.start(*batch))
        if len(under_way) > AHEAD:
            under_way.popleft()()
    for finish in under_way:
        finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs (default: the bundled photos)"
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "busy.jsonl")
    arguments = parser.parse_args()
    files = find_images(arguments.images)
    with tempfile.TemporaryDirectory() as folder:
        build(beton := Path(folder) / "busy.beton", files)
        samples = Samples(beton)
        planner = Planner(samples, Share(1), Crops(), None, seed=0, train=True)
        seconds = crop_seconds(samples, planner)
        asked = np.maximum(seconds - oversleep(), 0)
        rng = np.random.default_rng(0)
        batches = []
        for _ in range(BATCHES):
            ids = rng.integers(0, len(samples), BATCH)
            _, starts, stops = planner.regions(ids, 0)
            batches.append((ids, starts, stops - starts))
        ideal = sum(seconds[ids].sum() for ids, _, _ in batches)
        contenders = {
            "divided beforehand": divided_beforehand,
            "one batch at a time": one_at_a_time,
            f"tl_fast, {AHEAD} batches begun ahead": begun_ahead,
        }
        for threads in arguments.threads:
            shares: dict[str, list[float]] = {name: [] for name in contenders}
            decoder = Sleeper(samples, threads, asked)
            for number in range(arguments.rounds + 1):  # the first is not counted
                for name, decode in contenders.items():
                    begin = time.perf_counter()
                    decode(decoder, batches)
                    share = 100 * ideal / (threads * (time.perf_counter() - begin))
                    if number:
                        shares[name].append(share)
            decoder.close()
            write_rows(
                arguments.results,
                "busy",
                {f"{name}, {threads} threads": values for name, values in shares.items()},
                "% busy",
                PACKAGES,
                threads=threads,
                batch=BATCH,
                images=arguments.images.name,
                crop_ms=round(1e3 * float(seconds.mean()), 3),
                crop_ms_deviation=round(1e3 * float(seconds.std()), 3),
            )
        samples.close()


if __name__ == "__main__":
    main()
