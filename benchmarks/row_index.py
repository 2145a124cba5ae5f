"""How much faster are random crops decoded when JPEGs have a row index (`to_beton.py --row-index`), and what does it cost?

    python benchmarks/row_index.py [--images tests/photos] [--rounds 7]

DALI's image_slice on 1 and 2 threads, of the same crops (random resized crops, another draw each round): of the files as they are, of
those with a row index given whole, and spliced, the splicing included, in one thread. Before anything is measured the crops' pixels are
compared. Conversion is `tl_fast.jpeg.prepare` in one thread. Appends one row a contender to benchmarks/results/row_index.jsonl.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rows import ROOT, measure, write_rows
from tl_fast import jpeg, plan
from tl_fast.decode import decode_graph
from tl_fast.kernels import warp
from tl_fast.kernels.jpeg_restarts import splice

IMAGE_SIZE = 224


class Crops:
    """The crops of one draw after another, decoded by one DALI graph."""

    def __init__(self, jpegs: list[np.ndarray], sizes: np.ndarray, threads: int, spliced: bool) -> None:
        self.jpegs, self.sizes, self.spliced = jpegs, sizes, spliced
        self.graph = decode_graph(
            "cpu", batch_size=len(jpegs), num_threads=threads, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
        )
        self.graph.build()

    def decode(self, draw: int) -> list[np.ndarray]:
        heights, widths = self.sizes.T
        plans = plan.draw(0, draw, np.arange(len(self.sizes)), heights, widths, plan.Augment())
        starts, stops = warp.needed(plans, heights, widths, IMAGE_SIZE)
        shapes, jpegs = (stops - starts).astype(np.int32), self.jpegs
        if self.spliced:
            jpegs, origins = zip(*map(splice, jpegs, starts, stops), strict=True)
            starts = starts - np.array(origins)
        (regions,) = self.graph.run(jpegs=list(jpegs), starts=starts.astype(np.int32), shapes=shapes)
        return [np.asarray(region) for region in regions]

    def run(self, draw: int) -> int:
        self.decode(draw)
        return len(self.jpegs)


def converter(sources: list[bytes], row_index: bool) -> Callable[[int], int]:
    def convert(draw: int) -> int:
        for data in sources:
            jpeg.prepare(data, row_index=row_index)
        return len(sources)

    return convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=ROOT / "tests" / "photos", metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    files = sorted(path for path in arguments.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        parser.error(f"no JPEGs in {arguments.images}")
    jpeg.compile_kernels()
    sources = [path.read_bytes() for path in files]
    plain, cut = ([jpeg.prepare(data, row_index=row_index) for data in sources] for row_index in (False, True))
    sizes = np.array([(one.height, one.width) for one in plain])
    arrays = [[np.frombuffer(one.data, np.uint8) for one in prepared] for prepared in (plain, cut)]
    contenders: dict[str, Callable[[int], int]] = {}
    for threads in (1, 2):
        crops = {
            "as it is": Crops(arrays[0], sizes, threads, spliced=False),
            "row index, whole": Crops(arrays[1], sizes, threads, spliced=False),
            "row index, spliced": Crops(arrays[1], sizes, threads, spliced=True),
        }
        expected = crops["as it is"].decode(0)
        for name, contender in crops.items():
            if not all(np.array_equal(a, b) for a, b in zip(contender.decode(0), expected, strict=True)):
                raise SystemExit(f"{name}: not the same pixels")
            contenders[f"decode of crops, {name}, {threads} thread{'s' * (threads > 1)}"] = contender.run
    contenders["conversion, plain"] = converter(sources, False)
    contenders["conversion, --row-index"] = converter(sources, True)
    rates = measure(contenders, arguments.rounds)
    before, after = (sum(map(len, group)) for group in arrays)
    facts = {
        "images": arguments.images.resolve().name,
        "count": len(files),
        "mean_kb": round(before / len(files) / 1e3, 1),
        "growth_percent": round(100 * (after / before - 1), 2),
        "with_row_index": sum(one.row_index for one in cut),
    }
    results = ROOT / "benchmarks" / "results" / "row_index.jsonl"
    write_rows(results, "row_index", rates, "images/s", ("nvidia-dali-cuda130", "numba", "Pillow"), **facts)
    print(f"{len(files)} files of {facts['mean_kb']} KB; {facts['with_row_index']} with a row index, {facts['growth_percent']} % larger")
    for threads in ("1 thread", "2 threads"):
        first, second = (rates[f"decode of crops, {name}, {threads}"] for name in ("as it is", "row index, spliced"))
        print(f"{threads}: {np.median(np.array(second) / np.array(first)):.2f} times the rate, spliced")


if __name__ == "__main__":
    main()
