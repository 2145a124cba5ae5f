"""What the GPU benchmarks share: their data, CUDA events, JSON rows, and the summary that benchmarks/gpu_check.sh ends
with.

    python benchmarks/gpu_rows.py [FOLDER ...]

prints the newest rows of all the folders (benchmarks/results/gpu) together, and what they say of the bars.
"""

from __future__ import annotations

import argparse
import datetime
import io
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rows import ROOT, commit, percentiles, version

from tl_fast.beton.reader import BetonReader
from tl_fast.labelmaps.format import MapSpec, pack

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
PACKAGES = ("torch", "torchvision", "timm", "numba", "numba-cuda", "nvidia-dali-cuda130", "numpy")
SPEC = MapSpec(k=5, height=18, width=18, num_classes=1000)
# cycles, some 30 ms: while the GPU spins, the host queues a burst, so that no launch is waited for between events
SLEEP = 60_000_000
NO_DEVICE = "skipped: no CUDA device"


def need_gpu() -> None:
    """End the program, with success and its reason, where there is no GPU."""
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        sys.exit(0)


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every GPU benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--results", type=Path, default=RESULTS / "rows.jsonl")
    return options


def add_data(options: argparse.ArgumentParser) -> None:
    original = (
        Path(os.environ.get("TLFAST_SHARED", ROOT.parent / "shared")) / "data" / "imagenet_sample"
    )  # as in tests/conftest.py
    options.add_argument(
        "--images",
        type=Path,
        default=original if original.is_dir() else ROOT / "tests" / "photos",
        help="folder of JPEGs (default: shared/data/imagenet_sample where it is, else the bundled photos)",
    )
    options.add_argument("--beton", type=Path, help="a beton with label maps, instead of --images")
    options.add_argument("--samples", type=int, default=4096, help="the images are repeated to so many")


@contextmanager
def beton_of(arguments: argparse.Namespace, **conversion: Any) -> Iterator[Path | None]:
    """Path of --beton, or of a temporary beton of --images with label maps of 1,000 classes, ten an image as real maps
    have. None, and the reason printed, where none can be written. conversion: options of `write_beton`."""
    if arguments.beton:
        print(f"data: {arguments.beton}", flush=True)
        yield arguments.beton
        return
    try:
        import simplejpeg  # noqa: F401  which checks every JPEG

        from tl_fast.convert.encode import Sample
        from tl_fast.convert.write import write_beton
    except ImportError as error:
        print(
            f"skipped: writing a beton needs what is not installed ({error}); name one that was made elsewhere with"
            " --beton"
        )
        yield None
        return
    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"no .jpg or .jpeg below {arguments.images}; name another folder with --images, or a --beton")
    print(f"data: {len(files)} JPEGs of {arguments.images.name}, repeated to {arguments.samples} images", flush=True)
    rng, records = np.random.default_rng(0), []
    for _ in range(16):
        classes = np.argsort(rng.random((10, SPEC.height, SPEC.width)), axis=0)[: SPEC.k] + rng.integers(
            0, SPEC.num_classes - 10
        )
        records.append(pack(classes.astype(np.uint16), rng.uniform(0, 12, classes.shape).astype(np.float32), SPEC))
    chosen = enumerate(itertools.islice(itertools.cycle(files), arguments.samples))
    samples = [
        Sample(f"{i}", i % SPEC.num_classes, file.read_bytes, lambda i=i: records[i % 16], origin=str(file))
        for i, file in chosen
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gpu.beton"
        write_beton(
            path,
            samples,
            class_names=[str(c) for c in range(SPEC.num_classes)],
            spec=SPEC,
            on_error="quarantine",
            max_rejects=len(samples) // 2,
            **conversion,
        )
        yield path


def without_nvjpeg(device: str = "mixed") -> str | None:
    """Why DALI cannot decode on this GPU, by a graph of nothing but its decoder; None: it can, and what fails beyond
    that is a failure."""
    try:
        from nvidia.dali import fn, pipeline_def

        @pipeline_def(
            batch_size=1,
            num_threads=1,
            device_id=torch.cuda.current_device() if device == "mixed" else None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        def graph():
            return fn.decoders.image(fn.external_source(name="jpegs"), device=device)

        file = io.BytesIO()
        Image.new("RGB", (64, 48)).save(file, "JPEG")
        pipeline = graph()
        pipeline.build()
        pipeline.run(jpegs=[np.frombuffer(file.getvalue(), np.uint8)])
    except (ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def milliseconds(launch: Callable[[int], object], sets: int, repeats: int = 60, burst: int = 10) -> list[float]:
    """GPU time of `launch(n)` by CUDA events on the current stream, one figure a call; n runs over 0..sets - 1, so that
    caches hold no input."""
    for n in range(max(sets, 3)):
        launch(n % sets)
    torch.cuda.synchronize()
    times: list[float] = []
    for first in range(0, repeats, burst):
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(burst)]
        torch.cuda._sleep(SLEEP)
        for n, (start, end) in enumerate(events, first):
            start.record()
            launch(n % sets)
            end.record()
        torch.cuda.synchronize()
        times += [start.elapsed_time(end) for start, end in events]
    return times


def write_row(
    results: Path, benchmark: str, contender: str, values: Sequence[float], unit: str, **facts: object
) -> dict:
    """Append one row and print it: median, 20th and 80th percentile of `values`."""
    results.parent.mkdir(parents=True, exist_ok=True)
    p20, median, p80 = percentiles(values)
    row = {
        "benchmark": benchmark,
        "contender": contender,
        "unit": unit,
        "median": median,
        "p20": p20,
        "p80": p80,
        "rounds": len(values),
        **facts,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "cores": len(os.sched_getaffinity(0)),
        "cuda": torch.version.cuda,
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{contender:64} {median:12,.4g} {unit:9} ({p20:,.4g} to {p80:,.4g}, {len(values)} times)", flush=True)
    return row


def mean_bytes(path: Path) -> int:
    """Bytes of a beton's JPEGs, on average."""
    with BetonReader(path) as reader:
        return round(float(reader.image_sizes.mean()))


def newest(folders: Iterable[Path]) -> dict[tuple, dict]:
    """Of the folders' .jsonl files the newest row of every (benchmark, contender), and model and size where a row has
    them, by its run or else its date. Of rows of one second the last one counts."""
    rows = [
        json.loads(line)
        for folder in folders
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]
    rows.sort(key=lambda row: datetime.datetime.fromisoformat(row.get("run", row["date"])).astimezone())
    return {(row["benchmark"], row["contender"], *(row[n] for n in ("model", "size") if n in row)): row for row in rows}


# Bytes of an image on average, from which a rate of decoding says something about the bars: ImageNet's have 110,000,
# and smaller ones decode faster.
ORIGINAL_BYTES = 60_000
BARS = (
    ("targets, share of copy bandwidth", ("kernels", "token targets, float32: share of the copy"), 0.70, "at least"),
    ("targets, times torch on the GPU", ("kernels", "token targets, float32: times torch"), 30, "at least"),
    ("256 images, crop + flip", ("kernels", "images, crop + flip"), 1.0, "at most"),
    ("256 images, full recipe", ("kernels", "images, full recipe"), 1.0, "at most"),
    ("loader, crop + flip", ("loader", "crop + flip, auto"), 9200, "at least"),
    ("loader, full recipe", ("loader", "full recipe, auto"), 9200, "at least"),
    ("training LV-ViT-S at 224 px", ("train", "tl_fast, compiled", "lvvit_s", 224), 9200, "at least"),
    (
        "training LV-ViT-S at 224 px, fed",
        ("train", "tl_fast, compiled, fed from a beton", "lvvit_s", 224),
        0.97 * 9200,
        "at least",
    ),
)


def needs_originals(key: tuple) -> bool:
    """Whether a row's figure depends on how long its images take to decode."""
    benchmark, contender, *_ = key
    return benchmark in ("decode", "loader") or "fed" in contender


def main() -> None:
    options = argparse.ArgumentParser(description="Print the newest rows, and what they say of the bars.")
    options.add_argument("folders", type=Path, nargs="*", default=[RESULTS], metavar="FOLDER")
    rows = newest(options.parse_args().folders)
    for (benchmark, *names), row in rows.items():
        print(
            f"{benchmark:10} {', '.join(map(str, names)):64} {row['median']:12,.4g} {row['unit']:9} ({row['p20']:,.4g}"
            f" to {row['p80']:,.4g})"
        )
    for name, key, bar, sense in BARS:
        if key not in rows:
            print(f"bar: {name}: {sense} {bar:g}: not measured")
            continue
        value, size = rows[key]["median"], rows[key].get("mean_bytes")
        if needs_originals(key) and (size or 0) < ORIGINAL_BYTES:
            said = "images of unknown size" if size is None else f"images of {size:,} bytes on average"
            print(f"bar: {name}: not stated: measured on {said}, and {ORIGINAL_BYTES:,} or more are needed")
            continue
        met = value >= bar if sense == "at least" else value <= bar
        print(
            f"bar: {name}: {sense} {bar:g} {rows[key]['unit']}: {value:g}, {'met' if met else 'NOT met'} on"
            f" {rows[key]['device']}"
        )


if __name__ == "__main__":
    main()
