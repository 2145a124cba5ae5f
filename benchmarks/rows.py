"""What every benchmark does with its contenders: interleaved rounds, medians, and one JSON row each with what is needed
to compare them."""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tl_fast.system import versions
from tl_fast.system.versions import version

ROOT = Path(__file__).resolve().parent.parent


def measure(contenders: dict[str, Callable[[int], int]], rounds: int) -> dict[str, list[float]]:
    """Items/s of every contender, one figure a round, after a round that is not counted. A contender takes the round's
    number and returns how many items it did."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            count = run(number)
            if number:
                rates[name].append(count / (time.perf_counter() - start))
    return rates


def stock_ffcv_is_here() -> bool:
    """Whether stock FFCV (extra `interop`), a contender of some benchmarks, is installed; says where it is not."""
    return _is_here("stock FFCV", "ffcv", "cv2")


def opencv_is_here() -> bool:
    """As `stock_ffcv_is_here`, for contenders that decode by OpenCV (the same extra)."""
    return _is_here("OpenCV", "cv2")


def _is_here(name: str, *modules: str) -> bool:
    if all(map(importlib.util.find_spec, modules)):
        return True
    remedy = "`bash .ci/setup --interop` adds it or says what it lacks"
    print(f"{name} is left out: it is not installed ({remedy})", file=sys.stderr)
    return False


def commit() -> str:
    """The environment's TLFAST_COMMIT, for a copy without .git, or else this checkout's commit; 'unknown' without
    either."""
    return os.environ.get("TLFAST_COMMIT") or versions.commit() or "unknown"


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th, to five digits."""
    p20, median, p80 = (float(f"{value:.5g}") for value in np.percentile(values, (20, 50, 80)))
    return p20, median, p80


def newest_runs(results: Path, column: str = "images") -> dict[str, list[dict]]:
    """The rows of the last run on every data set, by the name of its folder of images; or of another column's values.
    FileNotFoundError when nothing was measured yet."""
    runs: dict[str, list[dict]] = {}
    for row in map(json.loads, results.read_text().splitlines()):
        before = runs.get(row[column], [])
        same = before and before[0].get("run") == row.get("run") and row.get("run") is not None
        runs[row[column]] = [*before, row] if same else [row]
    return runs


def circumstances(packages: Sequence[str], device: str | None = None, now: datetime.datetime | None = None) -> dict:
    """The end of a row: what it was measured on, of what versions, and when. device: None: all of the CPU; now: None:
    this moment."""
    return {
        "device": device or f"{os.cpu_count()} x {platform.machine()} CPU",
        "versions": {package: version(package) for package in packages},
        "commit": commit(),
        "date": (now or datetime.datetime.now()).date().isoformat(),
    }


def write_rows(
    results: Path,
    benchmark: str,
    rates: dict[str, list[float]],
    unit: str,
    packages: Sequence[str],
    *,
    details: dict[str, dict] | None = None,
    device: str | None = None,
    run: datetime.datetime | None = None,
    **facts: object,
) -> list[dict]:
    """Append one row a contender to `results` and print it. facts: what was measured on; details: further columns by
    contender; device: what did the work, if not all of the CPU; run: when the run began that these rows are of, if
    others of its rows are written by other calls."""
    results.parent.mkdir(parents=True, exist_ok=True)
    now = run or datetime.datetime.now().astimezone()
    spread = {name: percentiles(values) for name, values in rates.items()}
    rows = [
        {
            "benchmark": benchmark,
            "contender": name,
            "unit": unit,
            **dict(zip(("p20", "median", "p80"), spread[name], strict=True)),
            "min": round(min(values), 1),
            "max": round(max(values), 1),
            "rounds": len(values),
            **facts,
            **(details or {}).get(name, {}),
            **circumstances(packages, device, now),
            "run": now.isoformat(timespec="seconds"),
        }
        for name, values in rates.items()
    ]
    with results.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        print(
            f"{row['contender']:60} {row['median']:9,.0f} {unit}   ({row['min']:,.0f} to {row['max']:,.0f},"
            f" {row['rounds']} rounds)"
        )
    return rows
