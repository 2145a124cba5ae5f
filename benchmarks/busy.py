"""How busy are the threads that decode for a GPU, when one batch is decoded at a time and when the next ones are begun?

    python benchmarks/busy.py [--images FOLDER] [--threads 2 4 8 16]

The time that the crop of each image takes is measured first, on one thread. Then `Decoder` runs with more threads
than this machine may have cores: in place of decoding, a thread sleeps as long as the crop took. What is measured is
what the queue, the batches' ends and Python's own work cost: 100 % busy means that all threads slept all the time.
"Divided beforehand" is what the loader did at first: every thread has its share of a batch, and all wait for
the slowest. Later threads took four regions at a time from Python's queue over all batches begun. Now each takes
the next region in compiled code.
Rows go to benchmarks/results/busy.jsonl.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numba
import numpy as np
from loaders import build, find_images
from rows import ROOT, write_rows

from tl_fast.beton.samples import Samples
from tl_fast.jpeg.region import RegionDecoder, RegionQueue
from tl_fast.maths.memory import address, take_number
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.planner import Planner
from tl_fast.pipeline.settings import Crops, Share

BATCH, BATCHES = 256, 24
AHEAD = 4  # batches begun behind the one that is waited for, as the loader has them on a GPU
PACKAGES = ("numba", "numpy")

CLOCK_MONOTONIC = 1
usleep, clock_gettime = ctypes.CDLL(None).usleep, ctypes.CDLL(None).clock_gettime
usleep.argtypes, usleep.restype = [ctypes.c_uint32], ctypes.c_int
clock_gettime.argtypes, clock_gettime.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_int


def crop_seconds(samples: Samples, planner: Planner, repeats: int = 3) -> np.ndarray:
    """The least time that the crop of each sample takes to decode on one thread, float64 [number of samples]."""
    ids = np.arange(len(samples))
    _, starts, stops = planner.regions(ids, 0)
    decoder = RegionDecoder()
    seconds = np.full((repeats + 1, len(ids)), np.inf)  # the first time compiles
    for repeat in range(repeats + 1):
        for i in ids:
            begin = time.perf_counter()
            decoder.decode(samples.image(i), starts[i], stops[i])
            seconds[repeat, i] = time.perf_counter() - begin
    return seconds[1:].min(axis=0)


@numba.njit(nogil=True)
def sleep_for(microseconds: int) -> int:
    """Sleep -> how long that took, in nanoseconds."""
    times = np.empty(4, np.int64)
    clock_gettime(CLOCK_MONOTONIC, times[:2].ctypes)
    usleep(microseconds)
    clock_gettime(CLOCK_MONOTONIC, times[2:].ctypes)
    return 1_000_000_000 * (times[2] - times[0]) + times[3] - times[1]


@numba.njit(nogil=True)
def sleep_queued(taken: np.ndarray, microseconds: np.ndarray) -> int:
    """Sleep for region after region that no other thread has taken, until none is left -> nanoseconds."""
    counter, nanoseconds = address(taken), 0
    while True:
        b = np.int64(take_number(counter))
        if b >= len(microseconds):
            return nanoseconds
        nanoseconds += sleep_for(microseconds[b])


class Sleeper(Decoder):
    """A decoder whose threads sleep as long as decoding takes, in compiled code as decoding is.

    seconds: float64, of each sample. slept: how long the threads did, in nanoseconds, since it was emptied.
    """

    def __init__(self, samples: Samples, threads: int, seconds: np.ndarray):
        super().__init__(samples, threads)
        self.microseconds = (1e6 * seconds).astype(np.uint32)
        self.slept: list[int] = []

    def sleep(self, sample_id: int) -> None:
        self.slept.append(sleep_for(self.microseconds[sample_id]))

    def _decode_queued(self, queue: RegionQueue, ids: np.ndarray, *_: np.ndarray) -> None:
        self.slept.append(sleep_queued(queue._taken, self.microseconds[ids]))


def divided_beforehand(decoder: Sleeper, batches: list[tuple]) -> None:
    with ThreadPoolExecutor(decoder.threads) as threads:
        for ids, _, _ in batches:

            def decode(part: np.ndarray, ids: np.ndarray = ids) -> None:
                for b in part:
                    decoder.sleep(ids[b])

            list(threads.map(decode, np.array_split(np.arange(BATCH), decoder.threads)))


def four_at_a_time(decoder: Sleeper, batches: list[tuple]) -> None:
    with ThreadPoolExecutor(decoder.threads) as threads:
        under_way: collections.deque[list[Future]] = collections.deque()
        for ids, _, _ in batches:

            def decode(first: int, ids: np.ndarray = ids) -> None:
                for b in range(first, min(first + 4, BATCH)):
                    decoder.sleep(ids[b])

            under_way.append([threads.submit(decode, first) for first in range(0, BATCH, 4)])
            if len(under_way) > AHEAD:
                wait(under_way.popleft())


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
        rng = np.random.default_rng(0)
        batches = []
        for _ in range(BATCHES):
            ids = rng.integers(0, len(samples), BATCH)
            _, starts, stops = planner.regions(ids, 0)
            batches.append((ids, starts, stops - starts))
        contenders = {
            "divided beforehand": divided_beforehand,
            f"four at a time, {AHEAD} batches begun ahead": four_at_a_time,
            "one batch at a time": one_at_a_time,
            f"tl_fast, {AHEAD} batches begun ahead": begun_ahead,
        }
        for threads in arguments.threads:
            shares: dict[str, list[float]] = {name: [] for name in contenders}
            decoder = Sleeper(samples, threads, seconds)
            for number in range(arguments.rounds + 1):  # the first is not counted
                for name, decode in contenders.items():
                    decoder.slept.clear()
                    begin = time.perf_counter()
                    decode(decoder, batches)
                    seconds_in_all = threads * (time.perf_counter() - begin)
                    if number:
                        shares[name].append(100 * sum(decoder.slept) / 1e9 / seconds_in_all)
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
