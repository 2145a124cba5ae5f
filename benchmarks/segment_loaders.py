"""How many images/s do loaders for segmentation deliver from the same JPEGs and masks: ours, a DataLoader with
torchvision's joint transforms, one with a pipeline as mmsegmentation has it?

    python benchmarks/segment_loaders.py [--images FOLDER [--masks FOLDER --classes N]] [--rounds 5] [--table]

All scale by 0.5 to 2, crop, flip, distort colours and pad, and deliver uint8 batches of images and masks, with the same
number of threads or worker processes, from files in the page cache. Ours and mmsegmentation's pipeline draw a crop
again, up to ten times, where one class covers more than 75 % of it; torchvision has no such transform, so its crops are
taken as they come. "no distortion": scale, crop and flip alone. "row index": from a beton converted with --row-index.

--masks: PNG masks under the images' relative names; without it masks are made of the images: 16 classes, the blurred
brightness in eight steps, left and right of the middle. --base-size: images are first resized to fit (long, short), as
for ADE20K. Rounds are interleaved, after one that is not counted; a round of a loader with worker processes is a
quarter of the samples. Appends one row a contender to benchmarks/results/segment_loaders.jsonl. --table prints the
newest rows of each data set as docs/benchmarks.md has them, and measures nothing.
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
from PIL import Image, ImageFilter

import tl_fast.system.torchvision_shim  # noqa: F401  before torchvision

# isort: split
import torchvision.tv_tensors
from loaders import find_images, table
from rows import ROOT, measure, newest_runs, opencv_is_here, write_rows
from torchvision.transforms import v2

from tl_fast.convert.encode import Sample
from tl_fast.convert.write import write_beton
from tl_fast.masks.format import MaskSpec
from tl_fast.pipeline.segment_loader import SegmentLoader
from tl_fast.plan.segment import SegmentAugment
from tl_fast.system.memory import reuse_memory

BATCH, IGNORE = 16, 255
MEAN = (124, 116, 104)  # what is beyond the image
MADE_CLASSES = 16  # of masks that are made of the images
RESULTS = ROOT / "benchmarks" / "results" / "segment_loaders.jsonl"

OURS, INDEXED = "tl_fast", "tl_fast, row index"
TORCHVISION, MMSEG = "torchvision v2 + DataLoader", "mmsegmentation style + DataLoader"
PLAIN = ", no distortion"

Epoch = Callable[[int], int]
Pair = tuple[np.ndarray, np.ndarray]


def made_mask(image: Image.Image) -> np.ndarray:
    """uint8 [H, W]: regions as an image's shapes give them, 16 classes."""
    grey = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(max(image.size) / 60)))
    right = np.arange(grey.shape[1]) >= grey.shape[1] // 2
    return (grey // 32 + 8 * right).astype(np.uint8)


def scaled_size(height: int, width: int, factor: float, base: tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) of an image after its resize to `base` and its random scale."""
    if base is not None:
        factor *= min(base[0] / max(height, width), base[1] / min(height, width))
    return max(round(height * factor), 1), max(round(width * factor), 1)


class Files(torch.utils.data.Dataset):
    """Image and mask files, opened and transformed in a worker process."""

    def __init__(self, files: list[tuple[Path, Path]], crop: int, base: tuple[int, int] | None, distort: bool) -> None:
        self.files, self.crop, self.base, self.distort = files, crop, base, distort

    def __len__(self) -> int:
        return len(self.files)


class Torchvision(Files):
    """Pillow's decoder and torchvision's joint transforms on uint8 tensors."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        fill = {torchvision.tv_tensors.Image: MEAN, torchvision.tv_tensors.Mask: IGNORE}
        steps = [v2.RandomCrop(self.crop, pad_if_needed=True, fill=fill), v2.RandomHorizontalFlip()]
        # torchvision's contrast, saturation and hue at their defaults, which are those of mmsegmentation.
        self.transform = v2.Compose([*steps, v2.RandomPhotometricDistort()] if self.distort else steps)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image_file, mask_file = self.files[i]
        with Image.open(image_file) as file:
            image = torchvision.tv_tensors.Image(v2.functional.pil_to_tensor(file.convert("RGB")))
        with Image.open(mask_file) as file:
            mask = torchvision.tv_tensors.Mask(v2.functional.pil_to_tensor(file))
        size = scaled_size(*image.shape[-2:], float(torch.empty(()).uniform_(0.5, 2)), self.base)
        image, mask = v2.functional.resize(image, size, antialias=True), v2.functional.resize(mask, size)
        return self.transform(image, mask)


class Mmseg(Files):
    """OpenCV's decoder and the transforms of mmsegmentation 1.x's training pipelines: Resize with ratio_range,
    RandomCrop with cat_max_ratio, RandomFlip, PhotoMetricDistortion, Pad."""

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        import cv2

        cv2.setNumThreads(0)  # as mmsegmentation sets it in its workers
        rng = np.random
        image_file, mask_file = self.files[i]
        image = cv2.imdecode(np.fromfile(image_file, np.uint8), cv2.IMREAD_COLOR)
        mask = cv2.imdecode(np.fromfile(mask_file, np.uint8), cv2.IMREAD_UNCHANGED)
        height, width = scaled_size(*image.shape[:2], rng.uniform(0.5, 2), self.base)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST)
        for _ in range(10):
            top = rng.randint(0, max(height - self.crop, 0) + 1)
            left = rng.randint(0, max(width - self.crop, 0) + 1)
            box = slice(top, top + self.crop), slice(left, left + self.crop)
            labels, counts = np.unique(mask[box], return_counts=True)
            counts = counts[labels != IGNORE]
            if len(counts) > 1 and counts.max() / counts.sum() < 0.75:
                break
        image, mask = image[box], mask[box]
        if rng.randint(2):
            image, mask = np.flip(image, 1).copy(), np.flip(mask, 1).copy()
        if self.distort:
            image = self._distorted(image)
        below, right = self.crop - image.shape[0], self.crop - image.shape[1]
        image = cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=MEAN[::-1])
        mask = cv2.copyMakeBorder(mask, 0, below, 0, right, cv2.BORDER_CONSTANT, value=IGNORE)
        return torch.from_numpy(image[:, :, ::-1].transpose(2, 0, 1).copy()), torch.from_numpy(mask)

    @staticmethod
    def _distorted(image: np.ndarray) -> np.ndarray:
        import cv2

        rng = np.random

        def convert(pixels: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
            return np.clip(pixels.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)

        if rng.randint(2):
            image = convert(image, beta=rng.uniform(-32, 32))
        contrast_first = rng.randint(2)
        if contrast_first and rng.randint(2):
            image = convert(image, alpha=rng.uniform(0.5, 1.5))
        if rng.randint(2):
            hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            hsv[:, :, 1] = convert(hsv[:, :, 1], alpha=rng.uniform(0.5, 1.5))
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        if rng.randint(2):
            hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)
            hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + rng.randint(-18, 18)) % 180
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
        if not contrast_first and rng.randint(2):
            image = convert(image, alpha=rng.uniform(0.5, 1.5))
        return image


def forked(files: list[tuple[Path, Path]], threads: int, crop: int, base: tuple[int, int] | None) -> dict[str, Epoch]:
    """Contenders in a torch DataLoader. Their worker processes start here, before other contenders have threads, which
    a fork breaks. A round of theirs is a quarter of the samples."""
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[: max(len(files) // 4, BATCH)]]
    kinds = [(TORCHVISION, Torchvision)] + ([(MMSEG, Mmseg)] if opencv_is_here() else [])
    epochs = {}
    for (name, kind), distort in itertools.product(kinds, (True, False)):
        loader = torch.utils.data.DataLoader(
            kind(files, crop, base, distort),
            BATCH,
            shuffle=True,
            num_workers=threads,
            drop_last=True,
            persistent_workers=True,
        )
        next(iter(loader))
        epochs[name + ("" if distort else PLAIN)] = lambda _, loader=loader: sum(len(batch[0]) for batch in loader)
    return epochs


def ours(beton: Path, threads: int, crop: int, base: tuple[int, int] | None, distort: bool) -> Epoch:
    augment = SegmentAugment(base_size=base, distort=distort, fill=MEAN)
    loader = SegmentLoader(beton, BATCH, crop_size=crop, threads=threads, augment=augment)

    def epoch(number: int) -> int:
        loader.set_epoch(number)
        return sum(len(batch.images) for batch in loader)

    return epoch


def pair_files(images: Path, masks: Path | None, folder: Path) -> list[tuple[Path, Path]]:
    """The image files, each with its mask's; masks that are made go below `folder`."""
    pairs = []
    for file in find_images(images):
        name = file.relative_to(images).with_suffix(".png")
        if masks is not None:
            pairs.append((file, masks / name))
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            Image.fromarray(made_mask(image)).save(folder / name)
        pairs.append((file, folder / name))
    return pairs


def build(out: Path, pairs: list[tuple[Path, Path]], classes: int, row_index: bool) -> None:
    """A beton of the pairs in this order."""

    def read_mask(file: Path) -> np.ndarray:
        with Image.open(file) as mask:
            values = np.array(mask)
        values[values >= classes] = IGNORE
        return values

    samples = [
        Sample(f"{i}", 0, image.read_bytes, mask=lambda mask=mask: read_mask(mask), origin=str(image))
        for i, (image, mask) in enumerate(pairs)
    ]
    write_beton(out, samples, class_names=["image"], masks=MaskSpec(classes), row_index=row_index)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images", type=Path, default=ROOT / "tests" / "photos", help="folder of JPEGs (default: the bundled photos)"
    )
    parser.add_argument("--masks", type=Path, help="folder of their masks (default: made of the images)")
    parser.add_argument("--classes", type=int, default=MADE_CLASSES, help="of --masks; higher values are unlabelled")
    parser.add_argument("--name", help="of the data set in the rows (default: the folder's)")
    parser.add_argument("--samples", type=int, default=512, help="the images are repeated to fill it")
    parser.add_argument("--crop", type=int, default=512, metavar="PIXELS")
    parser.add_argument("--base-size", type=int, nargs=2, metavar=("LONG", "SHORT"))
    parser.add_argument("--rounds", type=int, default=5, help="counted epochs of each contender")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table of docs/benchmarks.md from the rows")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(newest_runs(arguments.results)))
        return
    torch.set_num_threads(1)
    reuse_memory()  # for all contenders, as in training
    base = None if arguments.base_size is None else tuple(arguments.base_size)
    with tempfile.TemporaryDirectory() as folder:
        pairs = pair_files(arguments.images, arguments.masks, Path(folder) / "masks")
        pairs = list(itertools.islice(itertools.cycle(pairs), arguments.samples))
        run = forked(pairs, arguments.threads, arguments.crop, base)
        for name in (OURS, INDEXED):
            beton = Path(folder) / f"{name}.beton"
            build(beton, pairs, arguments.classes, row_index=name == INDEXED)
            for distort in (True, False):
                run[name + ("" if distort else PLAIN)] = ours(beton, arguments.threads, arguments.crop, base, distort)
        rates = measure(run, arguments.rounds)
    rows = write_rows(
        arguments.results,
        "segment_loaders",
        rates,
        "images/s",
        ("torch", "torchvision", "numba", "opencv-python-headless", "Pillow"),
        images=arguments.name or arguments.images.name,
        samples=arguments.samples,
        mean_bytes=round(sum(image.stat().st_size for image, _ in pairs) / len(pairs)),
        crop=arguments.crop,
        base_size=base,
        batch=BATCH,
        threads=arguments.threads,
    )
    medians = {row["contender"]: row["median"] for row in rows}
    for kind, own, peer in itertools.product(("", PLAIN), (OURS, INDEXED), (TORCHVISION, MMSEG)):
        if peer + kind in medians:
            print(f"{medians[own + kind] / medians[peer + kind]:6.2f} times: {own + kind} / {peer + kind}")


if __name__ == "__main__":
    main()
