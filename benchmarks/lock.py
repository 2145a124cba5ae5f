"""How long does decoding for a GPU hold Python's interpreter lock, as a second thread that wants it sees it?

    python benchmarks/lock.py [--images FOLDER] [--rounds 5]

One thread decodes batches, planned and with what a GPU's kernels read besides, while a second one does nothing but look
at the clock. Where two of its looks are more than 2 µs apart it did not have the lock, or not a core; the sum of
these gaps divided by the images is stated. Gaps above 1 ms are left out: no part of the loader holds the lock so
long, but the operating system takes the core away for longer. "Nothing decoded" is what remains of that: the loader's
thread runs compiled code alone, as long as decoding takes.
"One call an image" is what the loader did before. Rows go to benchmarks/results/lock.jsonl.
"""

from __future__ import annotations

import argparse
import collections
import functools
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from loaders import build, find_images
from rows import ROOT, write_rows

from tl_fast.beton.samples import Samples
from tl_fast.jpeg.region import RegionQueue
from tl_fast.pipeline.batch import BatchPlan
from tl_fast.pipeline.decode import Decoder
from tl_fast.pipeline.gpu_batches import upload_parts
from tl_fast.pipeline.planner import Planner
from tl_fast.pipeline.settings import Crops, Share, Targets
from tl_fast.plan.augment import Augment

BATCH, BATCHES = 256, 8
AHEAD = 4  # batches begun behind the one that is waited for
PART = 4  # regions that a thread took at a time
SHORT, LONG = 2_000, 1_000_000  # ns
SWITCH_SECONDS = 1e-4  # how soon Python lets a thread have the lock that another one has
PACKAGES = ("numba", "numpy")


class OneCallAnImage(Decoder):
    """A decoder whose threads take four regions at a time and decode each by a call of its own."""

    def start(self, ids: np.ndarray, starts: np.ndarray, shapes: np.ndarray, stream: None = None) -> Callable:
        sizes = 3 * shapes.prod(axis=1)
        ends = np.cumsum(sizes)
        out = np.empty(int(ends[-1]), np.uint8)

        def decode(first: int) -> None:
            for b in range(first, min(first + PART, len(ids))):
                jpeg, pixels = self.samples.image(ids[b]), out[ends[b] - sizes[b] : ends[b]]
                self._region_decoder.decode(jpeg, starts[b], starts[b] + shapes[b], pixels)

        futures = [self._threads.submit(decode, first) for first in range(0, len(ids), PART)]

        def finish() -> list[np.ndarray]:
            for future in futures:
                future.result()
            regions = zip(ends.tolist(), sizes.tolist(), shapes.tolist(), strict=True)
            return [out[end - size : end].reshape(*shape, 3) for end, size, shape in regions]

        return finish


def gaps_of(work: Callable[[], None]) -> float:
    """Runs `work` while a thread looks at the clock -> seconds that this thread lacked the lock."""
    done, gaps = threading.Event(), []

    def watch() -> None:
        last = time.perf_counter_ns()
        while not done.is_set():
            now = time.perf_counter_ns()
            if SHORT < now - last < LONG:
                gaps.append(now - last)
            last = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return sum(gaps) / 1e9


def decode_all(planner: Planner, decoder: Decoder, batches: list[np.ndarray]) -> None:
    under_way: collections.deque[tuple[BatchPlan, Callable]] = collections.deque()

    def finish() -> None:
        plan, started = under_way.popleft()
        started()
        upload_parts(planner.samples, plan, np.zeros(len(plan.ids), np.int64), np.zeros(len(plan.ids), bool))

    for ids in batches:
        plan = planner.plan(ids, 0)
        under_way.append((plan, decoder.start(plan.ids, plan.starts, plan.shapes)))
        if len(under_way) > AHEAD:
            finish()
    while under_way:
        finish()


def decode_alone(decoder: Decoder, plans: list[BatchPlan]) -> None:
    for plan in plans:
        queue = RegionQueue(*decoder.samples.image_addresses(plan.ids), plan.starts, plan.starts + plan.shapes)
        decoder._region_decoder.decode_queued(queue, np.empty(queue.num_bytes, np.uint8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs (default: the bundled photos)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "lock.jsonl")
    arguments = parser.parse_args()
    files = find_images(arguments.images)
    sys.setswitchinterval(SWITCH_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        build(beton := Path(folder) / "lock.beton", files)
        samples = Samples(beton)
        crops = Crops(augment=Augment(auto_augment="rand-m9-mstd0.5-inc1", interpolation="random", erase=0.25))
        planner = Planner(samples, Share(1), crops, Targets(), seed=0, train=True)
        rng = np.random.default_rng(0)
        batches = [rng.integers(0, len(samples), BATCH) for _ in range(BATCHES)]
        before, now = OneCallAnImage(samples, 1), Decoder(samples, 1)
        contenders = {
            "one call a batch, planned before": functools.partial(
                decode_alone, now, [planner.plan(ids, 0) for ids in batches]
            ),
            "one call an image": functools.partial(decode_all, planner, before, batches),
            "tl_fast: one call for many images": functools.partial(decode_all, planner, now, batches),
        }
        values: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(arguments.rounds + 1):  # the first one compiles
            for name, work in contenders.items():
                micros = 1e6 * gaps_of(work) / (BATCH * BATCHES)
                if number:
                    values[name].append(micros)
        before.close()
        now.close()
        samples.close()
    write_rows(
        arguments.results, "lock", values, "µs an image", PACKAGES, batch=BATCH, images=arguments.images.name, threads=1
    )


if __name__ == "__main__":
    main()
