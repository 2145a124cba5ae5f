"""How many images/s do loaders deliver from the same images: ours with and without token targets, stock FFCV, DALI,
timm, published style?

    python benchmarks/loaders.py [--images FOLDER] [--short-side 256] [--samples 1024] [--rounds 5] [--threads 2]
                                 [--only WORDS]
    python benchmarks/loaders.py --table

"crop + flip" is a random resized crop to 224 px and a flip, bilinear; "full recipe" is LV-ViT-S's: RandAugment, random
interpolation and erasing with probability 0.25, which is left to the training device, as normalisation is; ours draws
its boxes. "row index", "bit index": from betons converted with --row-index and --bit-index. All deliver uint8 batches
of 64 with the same number of threads or worker processes, from one set of bytes in the page cache; label maps are of
1,000 classes. Rounds are interleaved, after one that is not counted; a round of a loader with worker processes is half
the samples. malloc keeps what is freed, for all of them, as in training.

--short-side shrinks the images first and adds other ways to store them: ours also reads them as YUV 4:2:0 planes
(`to_beton.py --store yuv420`), stock FFCV as its raw RGB. "original JPEGs" are those from before shrinking. The data
set is then called FOLDER_SHORTSIDE.

Appends one row a contender to benchmarks/results/loaders.jsonl and draws the newest rows of each data set as
loaders.png beside it. --table prints those rows as docs/benchmarks.md has them, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
from bars import draw
from published_style import PublishedStyle, check_roi_align, roi_align_name
from rows import ROOT, measure, newest_runs, stock_ffcv_is_here, write_rows
from timm.data import create_transform

from tl_fast.beton.reader import BetonReader
from tl_fast.convert.encode import Sample
from tl_fast.convert.image import compile_kernels, prepare
from tl_fast.convert.options import EncodeOptions
from tl_fast.convert.write import write_beton
from tl_fast.labelmaps.format import MapSpec, pack
from tl_fast.pipeline.loader import Loader
from tl_fast.plan.augment import Augment
from tl_fast.system.memory import reuse_memory

SIZE, GRID, BATCH, CLASSES = 224, 14, 64, 1000
SPEC = MapSpec(k=5, height=18, width=18, num_classes=CLASSES)
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
FULL = {"interpolation": "random", "auto_augment": RAND_AUGMENT}
RESULTS = ROOT / "benchmarks" / "results" / "loaders.jsonl"

WORK = CROPS, CROPS_ALONE, RECIPE, RECIPE_ALONE = (
    "crop + flip, token targets",
    "crop + flip, no label maps",
    "full recipe, token targets",
    "full recipe, no label maps",
)
OURS, OURS_ALONE, OURS_FULL, OURS_FULL_ALONE = (f"tl_fast: {work}" for work in WORK)
INDEXED, INDEXED_FULL = f"tl_fast, row index: {CROPS}", f"tl_fast, row index: {RECIPE}"
BITS, BITS_FULL = f"tl_fast, bit index: {CROPS}", f"tl_fast, bit index: {RECIPE}"
PLANES, PLANES_ALONE, PLANES_FULL, PLANES_FULL_ALONE = (f"tl_fast, planes: {work}" for work in WORK)
ORIGINALS, ORIGINALS_FULL = f"tl_fast, original JPEGs: {CROPS}", f"tl_fast, original JPEGs: {RECIPE}"
DALI_DECODE = "DALI: decode of the crop, nothing else"
FFCV, FFCV_RAW, DALI = (f"{name}: {CROPS_ALONE}" for name in ("stock FFCV", "stock FFCV, raw RGB", "DALI"))
PUBLISHED, PUBLISHED_FULL = f"published style: {CROPS}", f"published style: {RECIPE}"
PUBLISHED_MAPS, PUBLISHED_FULL_MAPS = (
    "published style: crop + flip, maps only",
    "published style: full recipe, maps only",
)
BARS = [
    (OURS, FFCV),
    (INDEXED, FFCV),
    (OURS, DALI),
    (INDEXED, DALI),
    (DALI_DECODE, DALI),
    (BITS, OURS),
    (BITS_FULL, OURS_FULL),
    (OURS_FULL, OURS),
    (OURS_FULL, PUBLISHED_FULL),
    (INDEXED_FULL, PUBLISHED_FULL),
    (OURS_FULL, PUBLISHED_FULL_MAPS),
    (PLANES, OURS),
    (PLANES_ALONE, OURS_ALONE),
    (PLANES_ALONE, FFCV_RAW),
    (PLANES_FULL, OURS_FULL),
    (PLANES_FULL_ALONE, OURS_FULL_ALONE),
]

Epoch = Callable[[int], int]


def find_images(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise SystemExit(f"no .jpg or .jpeg below {folder}; name another folder with --images")
    return found


def random_maps(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Classes uint16 and scores float32 [k, H, W]. Neighbouring cells share classes, as in real maps: ten classes an
    image."""
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(count):
        classes = np.argsort(rng.random((10, SPEC.height, SPEC.width)), axis=0)[: SPEC.k] + rng.integers(
            0, CLASSES - 10
        )
        maps.append((classes.astype(np.uint16), rng.uniform(0, 12, classes.shape).astype(np.float32)))
    return maps


def shrink(files: list[Path], folder: Path, short_side: int) -> list[Path]:
    """The files, some of them named several times, as JPEGs of this shorter side in `folder`, in the same order."""
    compile_kernels()
    folder.mkdir()
    shrunk = {file: folder / f"{i}.jpg" for i, file in enumerate(dict.fromkeys(files))}
    for file, path in shrunk.items():
        path.write_bytes(prepare(file.read_bytes(), EncodeOptions(short_side=short_side)).data)
    return [shrunk[file] for file in files]


class Decoded:
    """What stock FFCV's writer takes: images by index."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[i]).convert("RGB"), i % 10


def build_raw(out: Path, files: list[Path]) -> None:
    """A beton of the files' RGB pixels, written by stock FFCV in one process of its own."""
    from ffcv.fields import IntField, RGBImageField  # here, since it may not be installed
    from ffcv.writer import DatasetWriter

    writer = DatasetWriter(str(out), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its progress bar
        writer.from_indexed_dataset(Decoded(files))


def build(out: Path, files: list[Path], **options: object) -> None:
    """A beton of the files in this order, with `random_maps`."""
    records = [pack(*values, SPEC) for values in random_maps(16)]
    samples = [
        Sample(f"{i}", i % 10, file.read_bytes, lambda i=i: records[i % 16], origin=str(file))
        for i, file in enumerate(files)
    ]
    write_beton(out, samples, class_names=[str(c) for c in range(CLASSES)], spec=SPEC, **options)


def save_maps(folder: Path, count: int) -> list[Path]:
    """The same maps in the published format, one .pt file a sample: float16 [2, k, H, W], scores and classes."""
    folder.mkdir()
    paths = [folder / f"{i}.pt" for i in range(count)]
    for path, (classes, scores) in zip(paths, itertools.cycle(random_maps(16)), strict=False):
        torch.save(torch.from_numpy(np.stack([scores, classes.astype(np.float32)])).half(), path)
    return paths


class TimmStyle(torch.utils.data.Dataset):
    """Pillow decode and timm's training transform, uint8 [3, S, S]; no label maps."""

    def __init__(self, files: list[Path], **settings: object):
        # use_prefetcher: normalisation and erasing are left to the device, as in all contenders.
        self.files, self.transform = files, create_transform(SIZE, is_training=True, use_prefetcher=True, **settings)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with Image.open(self.files[i]) as file:
            return self.transform(file.convert("RGB")), i % 10


def forked(folder: Path, files: list[Path], threads: int, chosen: Callable[[str], bool]) -> dict[str, Epoch]:
    """Contenders in a torch DataLoader. Their worker processes start here, before other contenders have threads, which
    a fork breaks."""
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[: max(len(files) // 2, BATCH)]]
    maps = save_maps(folder / "maps", len(files))

    def published(**settings: object) -> PublishedStyle:
        return PublishedStyle(files, maps, SIZE, GRID, CLASSES, **settings)

    data = {
        f"timm + DataLoader: {CROPS_ALONE}": TimmStyle(files, interpolation="bilinear", color_jitter=None),
        f"timm + DataLoader: {RECIPE_ALONE}": TimmStyle(files, **FULL),
        PUBLISHED: published(),
        PUBLISHED_FULL: published(**FULL),
        PUBLISHED_MAPS: published(targets=False),
        PUBLISHED_FULL_MAPS: published(targets=False, **FULL),
    }
    epochs = {}
    for name, dataset in data.items():
        if chosen(name):
            # Workers set torch to one thread themselves.
            loader = torch.utils.data.DataLoader(
                dataset, BATCH, shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True
            )
            next(iter(loader))
            epochs[name] = lambda _, loader=loader: sum(len(batch[0]) for batch in loader)
    return epochs


@pipeline_def(enable_conditionals=False)
def dali_graph(source: Iterable, decode_only: bool):
    """What DALI's own examples do: a random crop decoded alone, resized and mirrored. No labels. decode_only: what its
    decoder allows at best."""
    jpegs = fn.external_source(source=source, dtype=types.UINT8, ndim=1)
    images = fn.decoders.image_random_crop(
        jpegs, device="cpu", output_type=types.RGB, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
    )
    if decode_only:
        return images
    images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR)
    return fn.flip(images, horizontal=fn.random.coin_flip(probability=0.5))


def dali(beton: Path, threads: int, decode_only: bool = False) -> Epoch:
    reader, rng = BetonReader(beton), np.random.default_rng(0)
    steps = len(reader) // BATCH

    def batches() -> Iterable[list[np.ndarray]]:
        while True:
            order = rng.permutation(len(reader))
            for step in range(steps):
                yield [reader.image(i) for i in order[step * BATCH : (step + 1) * BATCH]]

    graph = dali_graph(
        source=batches(),
        decode_only=decode_only,
        batch_size=BATCH,
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=2,
        exec_dynamic=True,
    )
    graph.build()

    def epoch(_: int) -> int:
        # As `graph.run()` in a loop, but nothing is under way when the epoch ends, so that no contender pays for
        # another's prefetching.
        count = 0
        for step in range(-2, steps):
            if step + 2 < steps:
                graph.schedule_run()
            if step >= 0:
                (images,) = graph.share_outputs()
                count += len(images) if decode_only else len(torch.from_dlpack(images.as_tensor()))
                graph.release_outputs()
        return count

    return epoch


def ffcv(beton: Path, threads: int, label_maps: bool) -> Epoch:
    """label_maps: the beton is ours and has some, which are left out; else its own writer wrote it."""
    from ffcv.fields.basics import IntDecoder  # here, since it may not be installed
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage

    from tl_fast.beton.ffcv_field import LabelMapField

    loader = FfcvLoader(
        str(beton),
        batch_size=BATCH,
        num_workers=threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((SIZE, SIZE)),
                RandomHorizontalFlip(),
                ToTensor(),
                ToTorchImage(),
            ],
            "label": [IntDecoder(), ToTensor()],
            **({"label_map": None, "crc": None} if label_maps else {}),
        },
        custom_fields={"label_map": LabelMapField} if label_maps else {},
    )
    return lambda _: sum(len(batch[0]) for batch in loader)


def ours(beton: Path, threads: int, **settings: object) -> Epoch:
    loader = Loader(beton, BATCH, image_size=SIZE, grid=GRID, threads=threads, **settings)

    def epoch(number: int) -> int:
        loader.set_epoch(number)
        return sum(len(batch.images) for batch in loader)

    return epoch


def stored(folder: Path, files: list[Path], originals: list[Path], short_side: int | None) -> dict[str, Path]:
    """Every beton that a run reads, by what its contenders' names begin with."""
    betons = {}

    def add(name: str, source: list[Path], **options: object) -> None:
        betons[name] = folder / f"{name}.beton"
        build(betons[name], source, **options)

    add("tl_fast", files)
    add("tl_fast, row index", files, row_index=True)
    add("tl_fast, bit index", files, bit_index=True)
    if short_side is not None:
        add("tl_fast, planes", originals, store="yuv420", short_side=short_side)
        add("tl_fast, original JPEGs", originals)
    return betons


def contenders(
    folder: Path,
    files: list[Path],
    originals: list[Path],
    short_side: int | None,
    threads: int,
    chosen: Callable[[str], bool],
) -> tuple[dict[str, Epoch], dict[str, dict]]:
    """Name -> a function of the epoch's number that runs one epoch and returns how many images it delivered; and the
    name -> the mean bytes of its stored images, of those that do not read `files`."""
    raw = folder / "raw.beton"
    with_raw = short_side is not None and chosen(FFCV_RAW) and stock_ffcv_is_here()
    if with_raw:
        build_raw(raw, files)  # first, since its writer forks as well
    in_workers = forked(folder, files, threads, chosen)
    betons = stored(folder, files, originals, short_side)
    works = {
        CROPS: {},
        CROPS_ALONE: {"token_labels": False},
        RECIPE: {"augment": Augment(erase=0.25, **FULL)},
        RECIPE_ALONE: {"augment": Augment(erase=0.25, **FULL), "token_labels": False},
    }
    # Of these two figures say enough.
    few = {"tl_fast, row index", "tl_fast, bit index", "tl_fast, original JPEGs"}
    builders = {
        f"{name}: {work}": lambda beton=beton, settings=settings: ours(beton, threads, **settings)
        for name, beton in betons.items()
        for work, settings in works.items()
        if name not in few or work in (CROPS, RECIPE)
    }
    own = betons["tl_fast"]
    builders |= {
        FFCV: lambda: ffcv(own, threads, label_maps=True) if stock_ffcv_is_here() else None,
        **({FFCV_RAW: lambda: ffcv(raw, threads, label_maps=False)} if with_raw else {}),
        DALI: lambda: dali(own, threads),
        DALI_DECODE: lambda: dali(own, threads, decode_only=True),
    }
    built = {name: builder() for name, builder in builders.items() if chosen(name)}
    sizes = {name: round(BetonReader(beton).image_sizes.mean()) for name, beton in betons.items()}
    if with_raw:
        sizes[FFCV_RAW.split(":")[0]] = round(sum(3 * math.prod(Image.open(file).size) for file in files) / len(files))
    details = {name: {"mean_bytes": sizes[name.split(":")[0]]} for name in built if name.split(":")[0] in sizes}
    return {name: epoch for name, epoch in built.items() if epoch is not None} | in_workers, details


def describe(row: dict) -> str:
    return f"{row['images']}: {row['mean_bytes'] / 1000:.0f} KB a file"


def table(runs: dict[str, list[dict]]) -> str:
    """The newest run of every data set as a markdown table: median and range of images/s."""
    columns = {describe(rows[0]): {row["contender"]: row for row in rows} for rows in runs.values()}
    names = dict.fromkeys(name for column in columns.values() for name in column)
    lines = ["| images/s | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in names:
        found = [column.get(name) for column in columns.values()]
        cells = [f"{row['median']:,.0f} ({row['min']:,.0f}–{row['max']:,.0f})" if row else "" for row in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: dict[str, list[dict]], path: Path) -> None:
    row = next(iter(runs.values()))[0]
    setting = f"{row['device']}, {row['threads']} threads, {row['image_size']} px, batch {row['batch']}"
    footer = f"{setting}; bars are medians, whiskers the slowest and fastest of {row['rounds']} rounds"
    draw(
        {describe(rows[0]): rows for rows in runs.values()},
        path,
        title="Images/s of loaders on the same images",
        footer=footer,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs (default: the bundled photos)"
    )
    parser.add_argument(
        "--short-side", type=int, help="pixels to which the images' shorter side is shrunk; adds planes and raw RGB"
    )
    parser.add_argument(
        "--samples", type=int, default=1024, help="size of the data set; the images are repeated to fill it"
    )
    parser.add_argument("--rounds", type=int, default=5, help="counted epochs of each contender")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", help="run the contenders whose name holds these words, and store nothing")
    parser.add_argument(
        "--table", action="store_true", help="print the table of docs/benchmarks.md from the stored rows"
    )
    arguments = parser.parse_args()
    picture = arguments.results.with_suffix(".png")
    if arguments.table:
        print(table(newest_runs(arguments.results)))
        return
    torch.set_num_threads(1)
    reuse_memory()  # for all contenders, as tl_fast/train.py does
    check_roi_align()
    short_side, only = arguments.short_side, arguments.only
    originals = list(itertools.islice(itertools.cycle(find_images(arguments.images)), arguments.samples))
    with tempfile.TemporaryDirectory() as folder:
        files = originals if short_side is None else shrink(originals, Path(folder) / "shrunk", short_side)
        file_bytes = round(sum(file.stat().st_size for file in files) / len(files))
        run, details = contenders(
            Path(folder), files, originals, short_side, arguments.threads, lambda name: only is None or only in name
        )
        rates = measure(run, arguments.rounds)
    rows = write_rows(
        Path(os.devnull) if only else arguments.results,
        "loaders",
        rates,
        "images/s",
        ("torch", "timm", "numba", "nvidia-dali-cuda130", "ffcv", "Pillow"),
        details=details,
        images=arguments.images.name + (f"_{short_side}" if short_side is not None else ""),
        samples=arguments.samples,
        mean_bytes=file_bytes,
        image_size=SIZE,
        batch=BATCH,
        threads=arguments.threads,
        roi_align=roi_align_name(),
    )
    medians = {row["contender"]: row["median"] for row in rows}
    for a, b in BARS:
        if a in medians and b in medians:
            print(f"{medians[a] / medians[b]:6.2f} times: {a} / {b}")
    if not only:
        plot(newest_runs(arguments.results), picture)


if __name__ == "__main__":
    main()
