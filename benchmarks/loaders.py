"""How many images/s do loaders deliver from the same bytes: ours with and without token targets, stock FFCV, Pillow + DataLoader?

    python benchmarks/loaders.py [--images FOLDER] [--samples 1024] [--rounds 5] [--threads 2]

Random resized crop to 224 px and flip, batch 64. All contenders read the same JPEG bytes; their rounds are interleaved, after one round
that is not counted. Prints median and spread and appends one row a contender to benchmarks/results/loaders.jsonl.
"""
from __future__ import annotations

import argparse
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import tl_fast.compat  # noqa: F401  before torchvision
from ffcv.fields.basics import IntDecoder
from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader as FfcvLoader, OrderOption
from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
from rows import ROOT, measure, write_rows
from tl_fast.beton_write import Sample, write_beton
from tl_fast.ffcv_field import LabelMapField
from tl_fast.labelmap import MapSpec, pack
from tl_fast.pipeline import Loader
from torchvision.transforms import InterpolationMode, RandomResizedCrop

SIZE, BATCH, CLASSES = 224, 64, 1000


def build(folder: Path, images: Path, samples: int) -> tuple[Path, list[Path]]:
    """A beton of `samples` images (the folder's, repeated) with random top-5 label maps of 1,000 classes, 18 x 18 cells; and the files."""
    found = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    if not found:
        raise SystemExit(f"loaders.py: no .jpg or .jpeg below {images}; name another folder with --images")
    files = list(itertools.islice(itertools.cycle(found), samples))
    spec = MapSpec(k=5, height=18, width=18, num_classes=CLASSES)
    rng = np.random.default_rng(0)
    maps = []
    for _ in range(16):
        # Neighbouring cells share classes, as real maps do: ten classes an image.
        classes = np.argsort(rng.random((10, 18, 18)), axis=0)[:5] + rng.integers(0, CLASSES - 10)
        maps.append(pack(classes.astype(np.uint16), rng.uniform(0, 12, classes.shape).astype(np.float32), spec))
    out = folder / "bench.beton"
    inputs = [
        Sample(f"{i}", i % 10, file.read_bytes, lambda i=i: maps[i % len(maps)], origin=str(file)) for i, file in enumerate(files)
    ]
    write_beton(out, inputs, class_names=[str(c) for c in range(CLASSES)], spec=spec)
    return out, files


class PillowSet(torch.utils.data.Dataset):
    """The plain torch data set: Pillow decode, torchvision's random resized crop, flip."""

    def __init__(self, files: list[Path]):
        self.files, self.crop = files, RandomResizedCrop(SIZE, interpolation=InterpolationMode.BILINEAR)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(self.files[i]) as file:
            image = self.crop(file.convert("RGB"))
        pixels = np.asarray(image)
        return torch.from_numpy(np.ascontiguousarray((pixels[:, ::-1] if torch.rand(()) < 0.5 else pixels).transpose(2, 0, 1)))


def contenders(beton: Path, files: list[Path], threads: int) -> dict[str, Callable[[int], int]]:
    """Name -> a function of the epoch that runs one epoch and returns how many images it delivered."""
    ours = Loader(beton, BATCH, image_size=SIZE, threads=threads)
    images_only = Loader(beton, BATCH, image_size=SIZE, threads=threads, token_labels=False)
    ffcv = FfcvLoader(
        str(beton),
        batch_size=BATCH,
        num_workers=threads,
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            "image": [RandomResizedCropRGBImageDecoder((SIZE, SIZE)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()],
            "label": [IntDecoder(), ToTensor()],
            "label_map": None,
            "crc": None,
        },
        custom_fields={"label_map": LabelMapField},
    )
    pillow = torch.utils.data.DataLoader(PillowSet(files), BATCH, shuffle=True, num_workers=threads, drop_last=True, persistent_workers=True)

    def run_ours(loader: Loader) -> Callable[[int], int]:
        def epoch(number: int) -> int:
            loader.set_epoch(number)
            return sum(len(batch.images) for batch in loader)

        return epoch

    return {
        "tl_fast: images + token targets": run_ours(ours),
        "tl_fast: images": run_ours(images_only),
        "stock FFCV: images": lambda _: sum(len(batch[0]) for batch in ffcv),
        "Pillow + DataLoader: images": lambda _: sum(len(batch) for batch in pillow),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs (default: the bundled photos)")
    parser.add_argument("--samples", type=int, default=1024, help="size of the data set; the images are repeated to fill it")
    parser.add_argument("--rounds", type=int, default=5, help="counted epochs of each contender")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "loaders.jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        beton, files = build(Path(folder), arguments.images, arguments.samples)
        rates = measure(contenders(beton, files, arguments.threads), arguments.rounds)
    write_rows(
        arguments.results, "loaders", rates, "images/s", ("torch", "numba", "nvidia-dali-cuda130", "ffcv", "Pillow"),
        images=arguments.images.name,
        samples=arguments.samples,
        mean_bytes=round(sum(file.stat().st_size for file in files) / len(files)),
        image_size=SIZE,
        batch=BATCH,
        threads=arguments.threads,
    )


if __name__ == "__main__":
    main()
