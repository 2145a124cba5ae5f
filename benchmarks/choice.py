"""Which way to store images: bytes, images/s and cores needed, from the rows of `loaders.py --short-side`. Measures
nothing.

python benchmarks/choice.py [--images imagenet_sample_256]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rows import ROOT, newest_runs

RESULTS = ROOT / "benchmarks" / "results" / "loaders.jsonl"
NEEDED = 8 * 9_200  # images/s that eight GPUs train
STORED = {
    "original JPEGs": "tl_fast, original JPEGs",
    "JPEGs, shrunk": "tl_fast",
    "planes, shrunk": "tl_fast, planes",
}
WORK = "crop + flip, token targets", "full recipe, token targets"


def table(rows: list[dict]) -> str:
    """One line of Markdown a way to store. Raises KeyError for a contender that the run lacks."""
    found = {row["contender"]: row for row in rows}
    threads = rows[0]["threads"]
    lines = [
        f"| stored | GB a million images | images/s on {threads} threads: crop + flip, full recipe"
        f" | threads for {NEEDED:,} images/s |",
        "|---|---|---|---|",
    ]
    for name, contender in STORED.items():
        crops, recipe = (found[f"{contender}: {work}"] for work in WORK)
        needed = [f"{NEEDED * threads / row['median']:.0f}" for row in (crops, recipe)]
        lines.append(
            f"| {name} | {crops['mean_bytes'] / 1000:.0f} | {crops['median']:,.0f}, {recipe['median']:,.0f}"
            f" | {', '.join(needed)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="imagenet_sample_256", help="data set of the rows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = newest_runs(arguments.results)
    if arguments.images in runs:
        print(table(runs[arguments.images]))
    else:
        print(
            f"{arguments.results} has no rows of {arguments.images}; measure them by"
            " `python benchmarks/loaders.py --images FOLDER --short-side 256`",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
