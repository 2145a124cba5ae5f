"""The published way to load images and label maps, written for comparison: Pillow, one .pt file an image, and RoIAlign
of dense maps.

As in the published token-labeling code, a worker decodes the whole image with Pillow, reads its float16 `[2, k, H, W]`
label map (scores, classes) with torch.load, flips both, runs RandAugment on the whole image with the map following
every geometric op (nearest cell: classes cannot be averaged), and crops and resizes the image last. The published code
then makes dense maps and token targets on the GPU; here that is done in the worker, or left out (`targets=False`),
which is the published loader alone. Images stay uint8; normalisation and erasing are left to the training device, as
tl_fast leaves them. The published code hands a crop to RoIAlign mirrored across the diagonal; here the crop is right,
which costs the same.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import numba
import numpy as np
import torch
from PIL import Image, ImageOps

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import torchvision
from timm.data import auto_augment
from torchvision.extension import _has_ops
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

MEAN_COLOUR = (124, 116, 104)  # ImageNet's, which timm fills with
SMOOTHING = 0.1
RESAMPLING = {
    "bilinear": (InterpolationMode.BILINEAR,),
    "random": (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC),
}


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    return ImageOps.posterize(image, bits) if bits else image.point(lambda _: 0)


# At magnitude 10 timm asks Pillow to keep 0 bits, which was a black image until Pillow 13 began to refuse it.
auto_augment.NAME_TO_OP["PosterizeIncreasing"] = _posterize


@numba.njit(nogil=True)
def _roi_align(planes, left, top, width, height, bins, out):
    """torchvision's CPU kernel (`aligned=False`, adaptive sampling): the taps of all sampling points once, then every
    class plane."""
    classes, rows, columns = planes.shape
    height, width = max(height, np.float32(1)), max(width, np.float32(1))
    ny, nx = int(np.ceil(height / bins)), int(np.ceil(width / bins))
    count = bins * bins * ny * nx
    at = np.empty((count, 4), np.int32)
    weight = np.empty((count, 4), np.float32)
    n = 0
    for i in range(bins):
        for j in range(bins):
            for sy in range(ny):
                y = top + i * height / bins + np.float32(sy + 0.5) * height / bins / ny
                for sx in range(nx):
                    x = left + j * width / bins + np.float32(sx + 0.5) * width / bins / nx
                    if y < -1 or y > rows or x < -1 or x > columns:
                        at[n] = 0
                        weight[n] = 0
                    else:
                        yy, xx = max(y, np.float32(0)), max(x, np.float32(0))
                        y0, x0 = min(int(yy), rows - 1), min(int(xx), columns - 1)
                        y1, x1 = min(y0 + 1, rows - 1), min(x0 + 1, columns - 1)
                        ly = np.float32(0) if y0 == rows - 1 else yy - y0
                        lx = np.float32(0) if x0 == columns - 1 else xx - x0
                        at[n, 0], at[n, 1] = y0 * columns + x0, y0 * columns + x1
                        at[n, 2], at[n, 3] = y1 * columns + x0, y1 * columns + x1
                        weight[n, 0], weight[n, 1] = (1 - ly) * (1 - lx), (1 - ly) * lx
                        weight[n, 2], weight[n, 3] = ly * (1 - lx), ly * lx
                    n += 1
    samples = ny * nx
    for c in range(classes):
        plane = planes[c].reshape(rows * columns)
        cells = out[c].reshape(bins * bins)
        n = 0
        for cell in range(bins * bins):
            total = np.float32(0)
            for _ in range(samples):
                total += weight[n, 0] * plane[at[n, 0]] + weight[n, 1] * plane[at[n, 1]]
                total += weight[n, 2] * plane[at[n, 2]] + weight[n, 3] * plane[at[n, 3]]
                n += 1
            cells[cell] = total / samples


def roi_align(dense: torch.Tensor, box: torch.Tensor, bins: int) -> torch.Tensor:
    """RoIAlign of one box (left, top, right, bottom) in cells of `dense` float32 [C, H, W] -> [C, bins, bins].

    torchvision's operator where it loads. Beside a CPU build of torch torchvision's wheel is without operators and
    falls back to Python that takes H x W sampling points a bin and masks all but a few (eager 16 s an image of 1,000
    classes; compiled, minutes of compilation first): there the operator's own algorithm, compiled by numba, so that the
    baseline is not slowed by its packaging.
    """
    if _has_ops():
        return torchvision.ops.roi_align(dense[None], [box[None]], bins)[0]
    out = torch.empty((dense.shape[0], bins, bins))
    left, top, right, bottom = (np.float32(value) for value in box.tolist())
    _roi_align(dense.numpy(), left, top, right - left, bottom - top, bins, out.numpy())
    return out


def roi_align_name() -> str:
    return "torchvision" if _has_ops() else "torchvision's CPU kernel, compiled by numba"


def check_roi_align() -> None:
    """AssertionError when `roi_align` differs from torchvision's on random boxes; compiles it, too."""
    generator = torch.Generator().manual_seed(0)
    for rows, columns, bins in ((18, 18, 14), (18, 18, 1), (12, 20, 14)):
        dense = torch.rand((3, rows, columns), generator=generator)
        for _ in range(8):
            top, left, height, width = torch.rand(4, generator=generator).mul(0.5).tolist()
            box = torch.tensor([left * columns, top * rows, (left + width) * columns, (top + height) * rows]) - 0.5
            # Without its operators torchvision compiles itself, for minutes, unless it is kept from it.
            with torch.compiler.set_stance("force_eager"):
                expected = torchvision.ops.roi_align(dense[None], [box[None]], bins)[0]
            torch.testing.assert_close(roi_align(dense, box, bins), expected, atol=1e-5, rtol=1e-4)


def token_targets(
    scores: torch.Tensor, classes: torch.Tensor, crop: tuple[float, ...], num_classes: int, grid: int, smoothing: float
) -> torch.Tensor:
    """scores float, classes int64 [k, H, W]; crop (top, left, height, width) as fractions -> targets float32 [1 +
    grid*grid, C]."""
    rows, columns = scores.shape[1:]
    dense = torch.zeros((num_classes, rows, columns)).scatter_(0, classes, scores.float())
    top, left, height, width = crop
    box = torch.tensor([left * columns, top * rows, (left + width) * columns, (top + height) * rows]) - 0.5
    off = smoothing / num_classes
    parts = [roi_align(dense, box, bins).flatten(1).softmax(0).T * (1 - smoothing + off) + off for bins in (1, grid)]
    return torch.cat(parts)


class JointRandAugment:
    """timm's RandAugment on a Pillow image, with the label map's cells moved as the image's pixels are."""

    GEOMETRIC = ("ShearX", "ShearY", "TranslateXRel", "TranslateYRel", "Rotate")

    def __init__(self, config: str):
        transform = auto_augment.rand_augment_transform(config, {"img_mean": MEAN_COLOUR})
        self.ops, self.layers = transform.ops, transform.num_layers

    def __call__(self, image: Image.Image, label_map: torch.Tensor) -> tuple[Image.Image, torch.Tensor]:
        for op in random.choices(self.ops, k=self.layers):
            if random.random() > op.prob:
                continue
            magnitude = max(0.0, min(random.gauss(op.magnitude, op.magnitude_std), op.magnitude_max or 10.0))
            arguments = op.level_fn(magnitude, op.hparams) if op.level_fn else ()
            if op.name in self.GEOMETRIC:
                label_map = self._move(op.name, arguments[0], label_map, *image.size)
            image = op.aug_fn(image, *arguments, **op.kwargs)
        return image, label_map

    @staticmethod
    def _move(name: str, argument: float, label_map: torch.Tensor, width: int, height: int) -> torch.Tensor:
        rows, columns = label_map.shape[-2:]
        y, x = np.meshgrid(
            (np.arange(rows) + 0.5) / rows * height, (np.arange(columns) + 0.5) / columns * width, indexing="ij"
        )
        if name == "ShearX":
            x = x + argument * y
        elif name == "ShearY":
            y = y + argument * x
        elif name == "TranslateXRel":
            x = x + argument * width
        elif name == "TranslateYRel":
            y = y + argument * height
        else:
            sine, cosine = math.sin(math.radians(-argument)), math.cos(math.radians(-argument))
            dx, dy = x - width / 2, y - height / 2
            x, y = cosine * dx + sine * dy + width / 2, cosine * dy - sine * dx + height / 2
        row, column = np.floor(y / height * rows).astype(np.int64), np.floor(x / width * columns).astype(np.int64)
        outside = torch.from_numpy((row < 0) | (row >= rows) | (column < 0) | (column >= columns))
        moved = label_map[..., row.clip(0, rows - 1), column.clip(0, columns - 1)]
        moved[0].masked_fill_(outside, 0)  # scores: nothing known outside the image
        return moved


class PublishedStyle(torch.utils.data.Dataset):
    """(image uint8 [3, S, S], label, targets float32 [1 + grid*grid, C] or label map) of files and their .pt label
    maps.

    auto_augment: timm's RandAugment string, or "" for crop and flip alone; interpolation: "bilinear" or "random";
    targets: make token targets on the CPU, or hand on the label map with the crop's coordinates, as the published
    loader does.
    """

    def __init__(
        self,
        files: list[Path],
        maps: list[Path],
        size: int,
        grid: int,
        num_classes: int,
        *,
        auto_augment: str = "",
        interpolation: str = "bilinear",
        targets: bool = True,
    ):
        self.files, self.maps, self.size, self.grid, self.num_classes, self.targets = (
            files,
            maps,
            size,
            grid,
            num_classes,
            targets,
        )
        self.augment = JointRandAugment(auto_augment) if auto_augment else None
        self.interpolation = RESAMPLING[interpolation]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        with Image.open(self.files[i]) as file:
            image = file.convert("RGB")
        label_map = torch.load(self.maps[i]).float()
        if torch.rand(()) < 0.5:
            image, label_map = F.hflip(image), label_map.flip(3)
        if self.augment is not None:
            image, label_map = self.augment(image, label_map)
        top, left, height, width = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        crop = (top / image.height, left / image.width, height / image.height, width / image.width)
        image = F.resized_crop(
            image, top, left, height, width, [self.size, self.size], random.choice(self.interpolation)
        )
        pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1))  # a view, as the published code's ToNumpy gives
        if self.targets:
            return (
                pixels,
                i % 10,
                token_targets(label_map[0], label_map[1].long(), crop, self.num_classes, self.grid, SMOOTHING),
            )
        coordinates = torch.zeros_like(label_map[:1])
        coordinates[0, 0, 0, :4] = torch.tensor(crop)
        return pixels, i % 10, torch.cat([label_map, coordinates])
