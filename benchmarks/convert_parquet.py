"""How fast do parquet shards become a beton, and how much memory does that take?

    python benchmarks/convert_parquet.py [--images FOLDER] [--samples 4096] [--group-rows 100] [--rounds 5]
                                         [--workers 2 4] [--beside NAME=CHECKOUT]

Writes one shard of the JPEGs below FOLDER (repeated), uncompressed in row groups of `--group-rows`, and converts it in
a process of its own, without label maps: with every image decoded and with only its structure checked. Rounds are
interleaved, after one that is not counted. --beside: another checkout of tl_fast, which takes part in the same rounds.
Peak memory is the largest sum of the PSS of that process and its children, read 20 times a second; PSS counts a page
that several processes share once.
Prints median and spread and appends one row a contender to benchmarks/results/convert.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rows import ROOT, write_rows

CONVERT = """
import json, resource, sys
from pathlib import Path
from tl_fast.convert.estimate import estimate
from tl_fast.convert.options import EncodeOptions
from tl_fast.convert.selection import Conversion
from tl_fast.convert.write import write_beton
from tl_fast.sources import open_source
from tl_fast.system.memory import reuse_memory

shard, out, workers, decode_check = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "True"
reuse_memory()
with open_source(shard) as source:
    conversion = Conversion(source, None, source.order(None))
    estimate(conversion, EncodeOptions(decode_check=decode_check))  # as converters/to_beton.py does
    summary = write_beton(
        out, conversion, class_names=source.class_names, workers=workers, processes=True, decode_check=decode_check
    )
print(json.dumps({"images": summary.samples, "seconds": summary.seconds}))
"""


def write_shard(images: Path, path: Path, samples: int, group_rows: int) -> float:
    """As Hugging Face's `datasets` writes it. Returns the mean size of an image in bytes."""
    files = sorted(file for file in images.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise SystemExit(f"convert_parquet.py: no .jpg or .jpeg below {images}; name another folder with --images")
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema, sizes = pa.schema([("image", image), ("label", pa.int64())]), []
    numbered = enumerate(itertools.cycle(files))
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        while rows := list(itertools.islice(numbered, min(group_rows, samples - len(sizes)))):
            column = [{"bytes": file.read_bytes(), "path": f"{i} {file.name}"} for i, file in rows]
            writer.write_table(pa.table([column, [i % 10 for i, _ in rows]], schema=schema), row_group_size=group_rows)
            sizes += [len(cell["bytes"]) for cell in column]
    return float(np.mean(sizes))


def memory(process: int) -> float:
    """PSS of a process and all its descendants, MB."""
    total, processes = 0, [process]
    while processes:
        one = processes.pop()
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for thread in os.listdir(f"/proc/{one}/task"):
                processes += map(int, Path(f"/proc/{one}/task/{thread}/children").read_text().split())
        except OSError:  # it has just ended
            continue
    return total * 1024 / 1e6


def convert(checkout: Path, shard: Path, workers: int, decode_check: bool) -> tuple[float, float]:
    """(images/s, peak memory in MB) of one conversion."""
    with tempfile.TemporaryDirectory(dir=shard.parent) as out:
        command = [sys.executable, "-c", CONVERT, shard, Path(out) / "out.beton", str(workers), str(decode_check)]
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        with subprocess.Popen(command, env=environment, cwd=out, stdout=subprocess.PIPE, text=True) as process:
            peak = 0.0
            while process.poll() is None:
                peak = max(peak, memory(process.pid))
                time.sleep(0.05)
            if process.returncode:
                raise SystemExit(f"convert_parquet.py: {checkout} failed with exit code {process.returncode}")
            result = json.load(process.stdout)
    return result["images"] / result["seconds"], peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs")
    parser.add_argument("--samples", type=int, default=4096, help="rows of the shard; the images are repeated")
    parser.add_argument("--group-rows", type=int, default=100, help="rows of a row group")
    parser.add_argument("--rounds", type=int, default=5, help="counted conversions by each contender")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--beside", metavar="NAME=CHECKOUT", help="another checkout, to compare with")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "convert.jsonl")
    arguments = parser.parse_args()
    checkouts = {"tl_fast": ROOT}
    if arguments.beside:
        name, _, checkout = arguments.beside.partition("=")
        checkouts[name] = Path(checkout).resolve(strict=True)
    contenders = {
        f"{name}: parquet, {'every image decoded' if check else 'structure checked'}, {workers} workers": (
            checkout,
            workers,
            check,
        )
        for workers in arguments.workers
        for check in (True, False)
        for name, checkout in checkouts.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, list[float]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "train-00000-of-00001.parquet"
        mean_bytes = write_shard(arguments.images, shard, arguments.samples, arguments.group_rows)
        for number in range(arguments.rounds + 1):
            for name, (checkout, workers, check) in contenders.items():
                rate, peak = convert(checkout, shard, workers, check)
                if number:
                    rates[name].append(rate)
                    peaks[name].append(peak)
    details = {name: {"peak_mb": round(max(peaks[name])), "workers": contenders[name][1]} for name in contenders}
    for name, row in details.items():
        print(f"{name:60} {row['peak_mb']:9,} MB at most")
    write_rows(
        arguments.results,
        "convert parquet",
        rates,
        "images/s",
        ("pyarrow", "numba"),
        details=details,
        images=arguments.images.name,
        samples=arguments.samples,
        mean_bytes=round(mean_bytes),
        group_rows=arguments.group_rows,
    )


if __name__ == "__main__":
    main()
