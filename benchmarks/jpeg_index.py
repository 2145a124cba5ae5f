"""How fast our decoder and DALI decode random crops, and how much an index (`to_beton.py --row-index`, `--bit-index`)
gains.

    python benchmarks/jpeg_index.py [--images tests/photos] [--short-side 256] [--rounds 7]

Every contender decodes the same random resized crops, another draw each round, on 1 and on 2 threads: our decoder and
DALI's image_slice, from the files as they are, from those with a row index, and ours from those with a bit index. DALI
gets a row index whole, or spliced; splicing takes place in one thread and its time is included. Before anything is
measured the crops' pixels are compared. Then the same crops decoded and resized (`tl_fast.kernels.cpu.augment`) on one
thread, and conversion, `tl_fast.convert.image.prepare` in one thread. Appends one row a contender to
benchmarks/results/jpeg_index.jsonl.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from loaders import find_images
from rows import ROOT, measure, write_rows

from tl_fast.convert.image import compile_kernels, prepare
from tl_fast.jpeg.region import RegionDecoder
from tl_fast.jpeg.restarts import splice
from tl_fast.kernels import cpu
from tl_fast.kernels.geometry.cpu import needed
from tl_fast.pipeline.nvjpeg import decode_graph
from tl_fast.plan import Augment
from tl_fast.plan.records import draw as draw_plans
from tl_fast.system.memory import reuse_memory

IMAGE_SIZE, FILL = 224, np.zeros(3, np.uint8)
WAYS = {"as it is": {}, "row index": {"row_index": True}, "bit index": {"bit_index": True}}


class Crops:
    """The crops of one draw after another."""

    def __init__(self, jpegs: list[np.ndarray], sizes: np.ndarray) -> None:
        self.jpegs, self.sizes = jpegs, sizes

    def plans(self, draw: int) -> np.ndarray:
        return draw_plans(0, draw, np.arange(len(self.sizes)), *self.sizes.T, Augment())

    def regions(self, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """First pixels and those behind the last, int64 [n, 2]."""
        return needed(self.plans(draw), *self.sizes.T, IMAGE_SIZE)

    def run(self, draw: int) -> int:
        self.decode(draw)
        return len(self.jpegs)


class OurCrops(Crops):
    """Decoded by our decoder, each thread into memory that it keeps."""

    def __init__(self, jpegs: list[np.ndarray], sizes: np.ndarray, threads: int) -> None:
        super().__init__(jpegs, sizes)
        self.decoder, self.parts, self.pool = RegionDecoder(), threads, ThreadPoolExecutor(threads)
        self.out = np.zeros((3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)

    def decode(self, draw: int) -> list[np.ndarray]:
        return [self.decoder.decode(*crop).copy() for crop in zip(self.jpegs, *self.regions(draw), strict=True)]

    def resize(self, draw: int) -> int:
        """Decode and resize every crop."""
        starts, stops = self.regions(draw)
        (heights, widths), plans = self.sizes.T.tolist(), self.plans(draw)
        for i, jpeg in enumerate(self.jpegs):
            pixels = self.decoder.samples(jpeg, starts[i], stops[i])
            cpu.augment(pixels, heights[i], widths[i], plans[i], FILL, self.out)
        return len(self.jpegs)

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


def converter(sources: list[bytes], way: dict[str, bool]) -> Callable[[int], int]:
    def convert(draw: int) -> int:
        for data in sources:
            prepare(data, **way)
        return len(sources)

    return convert


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, default=ROOT / "tests" / "photos", metavar="FOLDER")
    parser.add_argument("--short-side", type=int, help="pixels to which the images' shorter side is shrunk")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    files = find_images(arguments.images)
    compile_kernels()
    reuse_memory()
    sources = [prepare(path.read_bytes(), short_side=arguments.short_side).data for path in files]
    prepared = {name: [prepare(data, **way) for data in sources] for name, way in WAYS.items()}
    sizes = np.array([(jpeg.height, jpeg.width) for jpeg in prepared["as it is"]])
    arrays = {name: [np.frombuffer(jpeg.data, np.uint8) for jpeg in jpegs] for name, jpegs in prepared.items()}
    contenders: dict[str, Callable[[int], int]] = {}
    for threads in (1, 2):
        crops = {f"tl_fast, {name}": OurCrops(jpegs, sizes, threads) for name, jpegs in arrays.items()} | {
            "DALI, as it is": DaliCrops(arrays["as it is"], sizes, threads, spliced=False),
            "DALI, row index, whole": DaliCrops(arrays["row index"], sizes, threads, spliced=False),
            "DALI, row index, spliced": DaliCrops(arrays["row index"], sizes, threads, spliced=True),
        }
        expected = crops["DALI, as it is"].decode(0)
        for name, contender in crops.items():
            if not all(np.array_equal(a, b) for a, b in zip(contender.decode(0), expected, strict=True)):
                raise SystemExit(f"{name}: not the same pixels")
            contenders[f"decode of crops, {name}, {threads} thread{'s' * (threads > 1)}"] = contender.run
    for name, way in WAYS.items():
        contenders[f"decode and resize, {name}"] = OurCrops(arrays[name], sizes, 1).resize
        contenders[f"conversion, {name}"] = converter(sources, way)
    rates = measure(contenders, arguments.rounds)
    size = {name: sum(map(len, jpegs)) for name, jpegs in arrays.items()}
    facts: dict[str, object] = {
        "images": arguments.images.resolve().name + (f"_{arguments.short_side}" if arguments.short_side else ""),
        "count": len(files),
        "mean_kb": round(size["as it is"] / len(files) / 1e3, 1),
    }
    for name in ("row index", "bit index"):
        kind = name.replace(" ", "_")
        facts[f"{kind}_growth_percent"] = round(100 * (size[name] / size["as it is"] - 1), 2)
        facts[f"with_{kind}"] = sum(getattr(jpeg, kind) for jpeg in prepared[name])
    results = ROOT / "benchmarks" / "results" / "jpeg_index.jsonl"
    write_rows(results, "jpeg_index", rates, "images/s", ("nvidia-dali-cuda130", "numba", "Pillow"), **facts)
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    for base in ("decode of crops, DALI, as it is, 1 thread", "decode of crops, DALI, as it is, 2 threads"):
        print_ratios(rates, base, [name for name in rates if name.endswith(base[-10:])])
    for base in ("decode of crops, tl_fast, as it is, 1 thread", "decode and resize, as it is", "conversion, as it is"):
        print_ratios(rates, base, [base.replace("as it is", name) for name in WAYS])


def print_ratios(rates: dict[str, list[float]], base: str, names: list[str]) -> None:
    """Medians of the rounds' ratios, with the smallest and the largest."""
    for name in names:
        if name == base:
            continue
        ratios = np.array(rates[name]) / rates[base]
        print(f"{name}: {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) times {base}")


if __name__ == "__main__":
    main()
