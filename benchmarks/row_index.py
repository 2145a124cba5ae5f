"""How fast our decoder and DALI decode random crops, and how much a row index (`to_beton.py --row-index`) gains.

    python benchmarks/row_index.py [--images tests/photos] [--rounds 7]

Every contender decodes the same random resized crops, another draw each round, on 1 and on 2 threads: our decoder and
DALI's image_slice, from the files as they are and from the files with a row index. DALI gets the latter whole, or
spliced; splicing takes place in one thread and its time is included. Before anything is measured the crops' pixels are
compared. Conversion is `tl_fast.convert.image.prepare` in one thread, with a row index and without. Appends one row a
contender to benchmarks/results/row_index.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rows import ROOT, measure, write_rows

from tl_fast.convert.image import compile_kernels, prepare
from tl_fast.jpeg.region import RegionDecoder
from tl_fast.jpeg.restarts import splice
from tl_fast.kernels.geometry.cpu import needed
from tl_fast.pipeline.nvjpeg import decode_graph
from tl_fast.plan import Augment
from tl_fast.plan.records import draw as draw_plans

IMAGE_SIZE = 224


class Crops:
    """The crops of one draw after another."""

    def __init__(self, jpegs: list[np.ndarray], sizes: np.ndarray) -> None:
        self.jpegs, self.sizes = jpegs, sizes

    def regions(self, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """First pixels and those behind the last, int64 [n, 2]."""
        heights, widths = self.sizes.T
        plans = draw_plans(0, draw, np.arange(len(self.sizes)), heights, widths, Augment())
        return needed(plans, heights, widths, IMAGE_SIZE)

    def run(self, draw: int) -> int:
        self.decode(draw)
        return len(self.jpegs)


class OurCrops(Crops):
    """Decoded by our decoder, each thread into memory that it keeps."""

    def __init__(self, jpegs: list[np.ndarray], sizes: np.ndarray, threads: int) -> None:
        super().__init__(jpegs, sizes)
        self.decoder, self.parts, self.pool = RegionDecoder(), threads, ThreadPoolExecutor(threads)

    def decode(self, draw: int) -> list[np.ndarray]:
        return [self.decoder.decode(*crop).copy() for crop in zip(self.jpegs, *self.regions(draw), strict=True)]

    def run(self, draw: int) -> int:
        starts, stops = self.regions(draw)

        def part(number: int) -> None:
            for i in range(number, len(self.jpegs), self.parts):
                self.decoder.decode(self.jpegs[i], starts[i], stops[i])

        list(self.pool.map(part, range(self.parts)))
        return len(self.jpegs)


class DaliCrops(Crops):
    """Decoded by one DALI graph."""

    def __init__(self, jpegs: list[np.ndarray], sizes: np.ndarray, threads: int, spliced: bool) -> None:
        super().__init__(jpegs, sizes)
        self.spliced = spliced
        self.graph = decode_graph(
            "cpu", batch_size=len(jpegs), num_threads=threads, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
        )
        self.graph.build()

    def decode(self, draw: int) -> list[np.ndarray]:
        starts, stops = self.regions(draw)
        shapes, jpegs = (stops - starts).astype(np.int32), self.jpegs
        if self.spliced:
            jpegs, origins = zip(*map(splice, jpegs, starts, stops), strict=True)
            starts = starts - np.array(origins)
        (regions,) = self.graph.run(jpegs=list(jpegs), starts=starts.astype(np.int32), shapes=shapes)
        return [np.asarray(region) for region in regions]


def converter(sources: list[bytes], row_index: bool) -> Callable[[int], int]:
    def convert(draw: int) -> int:
        for data in sources:
            prepare(data, row_index=row_index)
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
    compile_kernels()
    sources = [path.read_bytes() for path in files]
    plain, cut = ([prepare(data, row_index=row_index) for data in sources] for row_index in (False, True))
    sizes = np.array([(jpeg.height, jpeg.width) for jpeg in plain])
    arrays = [[np.frombuffer(jpeg.data, np.uint8) for jpeg in jpegs] for jpegs in (plain, cut)]
    contenders: dict[str, Callable[[int], int]] = {}
    for threads in (1, 2):
        crops = {
            "tl_fast, as it is": OurCrops(arrays[0], sizes, threads),
            "tl_fast, row index": OurCrops(arrays[1], sizes, threads),
            "DALI, as it is": DaliCrops(arrays[0], sizes, threads, spliced=False),
            "DALI, row index, whole": DaliCrops(arrays[1], sizes, threads, spliced=False),
            "DALI, row index, spliced": DaliCrops(arrays[1], sizes, threads, spliced=True),
        }
        expected = crops["DALI, as it is"].decode(0)
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
        "with_row_index": sum(jpeg.row_index for jpeg in cut),
    }
    results = ROOT / "benchmarks" / "results" / "row_index.jsonl"
    write_rows(results, "row_index", rates, "images/s", ("nvidia-dali-cuda130", "numba", "Pillow"), **facts)
    print(
        f"{len(files)} files of {facts['mean_kb']} KB; {facts['with_row_index']} with a row index,"
        f" {facts['growth_percent']} % larger"
    )
    for threads in ("1 thread", "2 threads"):
        base = np.array(rates[f"decode of crops, DALI, as it is, {threads}"])
        for name in ("DALI, row index, spliced", "tl_fast, as it is", "tl_fast, row index"):
            print(
                f"{threads}: {name}: {np.median(rates[f'decode of crops, {name}, {threads}'] / base):.2f} times DALI's"
                " rate"
            )


if __name__ == "__main__":
    main()
