"""How fast are the CUDA kernels? Token targets beside a device copy and beside torch; 256 images beside the 1.0 ms that
they may take.

    python benchmarks/gpu_kernels.py [--batch 256] [--small]

Token targets: 14 x 14 tokens and the class token, maps of 18 x 18 cells, top 5 of 1,000 classes, as they lie in a
beton. Bytes are those of the output and of the maps, each once; the copy counts what it reads and what it writes.
torch: scatter into dense maps, torchvision's RoIAlign, softmax, smoothing, all on the GPU. Images: regions of 500 x 375
images to 224 px; bytes are those of the decoded regions and of the output. Masks: regions of the same size, as
segmentation's training crops them, to 512 px. Every kernel is compared with its CPU twin first: its rows say whether it
`matches`, and if one does not, the program ends with a failing status. --small runs each kernel once on few samples,
for compute-sanitizer. Rows go to benchmarks/results/gpu/rows.jsonl.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

import tl_fast.system.torchvision_shim  # noqa: F401  before timm and torchvision

# isort: split
import torchvision
from gpu_rows import SPEC, milliseconds, need_gpu, parser, write_row

from tl_fast.kernels import cpu, cuda
from tl_fast.kernels.geometry import cpu as warp
from tl_fast.labelmaps.format import encode, pack, unpack
from tl_fast.maths import scalar
from tl_fast.maths.ycbcr import pixels_of
from tl_fast.plan import records as plan
from tl_fast.plan.boxes import map_affines
from tl_fast.plan.segment import SegmentAugment
from tl_fast.plan.segment_records import draw_segment

GRID, SIZE, SMOOTHING, SETS = 14, 224, 0.1, 4
CROP, IGNORE_INDEX = 512, 255  # of masks
FILL = 124, 116, 104  # outside the image
HEIGHT, WIDTH = 375, 500
RECIPES = {
    "crop + flip": plan.Augment(),
    "crop + flip, bicubic": plan.Augment(interpolation="bicubic"),
    "full recipe": plan.Augment(auto_augment="rand-m9-mstd0.5-inc1", interpolation="random"),
}


def plans_of(number: int, batch: int, augment: plan.Augment) -> np.ndarray:
    return plan.draw(0, number, np.arange(batch), np.full(batch, HEIGHT), np.full(batch, WIDTH), augment)


def device(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).cuda()


class Targets:
    """One batch of label maps in both forms, on the device."""

    def __init__(self, number: int, batch: int):
        rng = np.random.default_rng(number)
        encoded, unpacked, ranges = [], [], []
        for _ in range(batch):
            classes = np.argsort(rng.random((10, SPEC.height, SPEC.width)), axis=0)[: SPEC.k] + rng.integers(
                0, SPEC.num_classes - 10
            )
            record = pack(classes.astype(np.uint16), rng.uniform(0, 12, classes.shape).astype(np.float32), SPEC)
            encoded.append(np.frombuffer(encode(record, SPEC), np.uint8))
            ranges.append((record["score_min"], record["score_step"]))
            unpacked.append(unpack(record, SPEC))
        self.classes, self.scores = (np.ascontiguousarray(np.stack(arrays)) for arrays in zip(*unpacked, strict=True))
        plans = plans_of(number, batch, plan.Augment())
        sizes = np.full(batch, HEIGHT), np.full(batch, WIDTH)
        self.affines = map_affines(plans, *sizes, "full", "correct")
        self.maps = device(np.concatenate(encoded))
        ends = np.cumsum([0] + [len(data) for data in encoded]).astype(np.int64)
        self.bounds = device(np.stack([ends[:-1], ends[1:]], axis=1))
        self.ranges = device(np.array(ranges, np.float32))
        self.device_affines, self.errors = device(self.affines), torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.dense = device(self.classes.astype(np.int64)), device(self.scores)
        left = (self.affines[:, 2] + np.minimum(self.affines[:, 0], 0)) * SPEC.width
        top = self.affines[:, 5] * SPEC.height
        right, bottom = left + np.abs(self.affines[:, 0]) * SPEC.width, top + self.affines[:, 4] * SPEC.height
        boxes = np.stack([np.arange(batch), left - 0.5, top - 0.5, right - 0.5, bottom - 0.5], axis=1)
        self.boxes = device(boxes.astype(np.float32))
        self.flips = device(self.affines[:, 0] < 0)

    def ours(self, out: torch.Tensor) -> None:
        cuda.packed_targets(
            self.maps,
            self.bounds,
            self.ranges,
            self.device_affines,
            SPEC,
            GRID,
            SMOOTHING,
            False,
            out,
            self.errors,
            stream=torch.cuda.current_stream().cuda_stream,
        )

    def by_torch(self) -> torch.Tensor:
        classes, scores = self.dense
        dense = torch.zeros((len(classes), SPEC.num_classes, SPEC.height, SPEC.width), device="cuda")
        dense.scatter_(1, classes, scores)
        off = SMOOTHING / SPEC.num_classes
        parts = []
        for bins in (1, GRID):
            aligned = torchvision.ops.roi_align(dense, self.boxes, bins)
            aligned = torch.where(self.flips.view(-1, 1, 1, 1), aligned.flip(3), aligned)
            parts.append(aligned.flatten(2).transpose(1, 2).softmax(2) * (1 - SMOOTHING + off) + off)
        return torch.cat(parts, dim=1)


class Images:
    """One batch of decoded regions of random pixels on the device. tame: for comparing with the CPU, without operations
    that turn the geometry's difference of one level into many."""

    def __init__(self, number: int, batch: int, augment: plan.Augment, tame: bool = False):
        self.plans = plans_of(number, batch, augment)
        if tame:
            self.plans["ops"][np.isin(self.plans["ops"], (scalar.EQUALIZE, scalar.AUTO_CONTRAST))] = scalar.INVERT
        starts, stops = warp.needed(self.plans, np.full(batch, HEIGHT), np.full(batch, WIDTH), SIZE)
        shapes = stops - starts
        sizes = 3 * shapes.prod(axis=1)
        self.regions = np.zeros(batch, cuda.REGION)
        self.regions["offset"] = np.cumsum(sizes) - sizes
        self.regions["rows"], self.regions["columns"] = shapes.T
        self.regions["top"], self.regions["left"] = starts.T
        self.regions["height"], self.regions["width"] = HEIGHT, WIDTH
        # Random at 1/8 of the resolution: noise of single pixels has no histogram worth equalising, and no image looks
        # like it.
        coarse = np.random.default_rng(number).integers(0, 256, (-(-int(sizes.sum()) // 8),), np.uint8)
        self.host = np.repeat(coarse, 8)[: int(sizes.sum())]
        self.pixels, self.bytes = device(self.host), int(sizes.sum())
        self.device_regions, self.device_plans = device(self.regions.view(np.uint8)), device(self.plans.view(np.uint8))

    def run(self, out: torch.Tensor, scratch: torch.Tensor, **normalise: object) -> None:
        cuda.augment(
            self.pixels,
            self.device_regions,
            self.device_plans,
            FILL,
            out,
            scratch=scratch,
            stream=torch.cuda.current_stream().cuda_stream,
            **normalise,
        )

    def by_cpu(self, b: int) -> np.ndarray:
        region, out = self.regions[b], np.empty((3, SIZE, SIZE), np.uint8)
        rows, columns = int(region["rows"]), int(region["columns"])
        pixels = self.host[int(region["offset"]) :][: 3 * rows * columns].reshape(rows, columns, 3)
        fill = np.array(FILL, np.uint8)
        pixels = pixels_of(pixels, int(region["top"]), int(region["left"]))
        cpu.augment(pixels, HEIGHT, WIDTH, self.plans[b], fill, out)
        return out


class Masks:
    """One batch of masks' regions on the device, their classes random."""

    def __init__(self, number: int, batch: int):
        heights, widths = np.full(batch, HEIGHT), np.full(batch, WIDTH)
        self.plans = draw_segment(0, number, np.arange(batch), heights, widths, SegmentAugment(), (CROP, CROP))
        starts, stops = warp.needed(self.plans, heights, widths, CROP)
        rng = np.random.default_rng(number)
        self.masks = [np.repeat(rng.integers(0, 150, (HEIGHT, WIDTH // 4), np.uint8), 4, 1) for _ in range(batch)]
        boxes = zip(self.masks, starts, stops, strict=True)
        cut = [mask[top:end, left:right].ravel() for mask, (top, left), (end, right) in boxes]
        regions = np.zeros(batch, cuda.REGION)
        regions["offset"] = np.cumsum([0] + [part.size for part in cut[:-1]])
        regions["rows"], regions["columns"] = (stops - starts).T
        regions["top"], regions["left"] = starts.T
        regions["height"], regions["width"] = HEIGHT, WIDTH
        self.bytes = sum(part.size for part in cut)
        self.arrays = [device(a.view(np.uint8)) for a in (np.concatenate(cut), regions, self.plans)]

    def run(self, out: torch.Tensor, images: torch.Tensor) -> None:
        stream = torch.cuda.current_stream().cuda_stream
        cuda.show_masks(*self.arrays, IGNORE_INDEX, FILL, out, images, stream=stream)

    def match(self, out: torch.Tensor, images: torch.Tensor) -> bool:
        """Are the first masks the CPU's?"""
        self.run(out.fill_(77), images)
        expected, image = np.empty((min(8, len(out)), CROP, CROP), np.uint8), np.empty((3, CROP, CROP), np.uint8)
        for b in range(len(expected)):
            cpu.show_mask(self.masks[b], self.plans[b], IGNORE_INDEX, expected[b], image, np.array(FILL, np.uint8))
        wrong = (out[: len(expected)].cpu().numpy() != expected).mean()
        if wrong:
            print(f"MISMATCH: masks: {wrong:.2%} of the pixels", flush=True)
        return not wrong


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float, label: str) -> bool:
    try:
        torch.testing.assert_close(got.float().cpu(), expected.cpu(), atol=tolerance, rtol=1e-2)
    except AssertionError as error:
        print(f"MISMATCH: {label}: {error}", flush=True)
        return False
    return True


def targets_match(batch: Targets, out: torch.Tensor, tolerance: float, label: str) -> bool:
    batch.ours(out.fill_(float("nan")))
    few = min(8, len(batch.classes))
    expected = cpu.warped_targets(
        batch.classes[:few], batch.scores[:few], batch.affines[:few], SPEC.num_classes, GRID, SMOOTHING, cut=False
    )
    sound = not batch.errors.any() and bool(torch.isfinite(out.sum()))
    if not sound:
        codes = batch.errors.unique().tolist()
        print(f"MISMATCH: {label}: codes of damaged maps {codes}, or rows that are not finite", flush=True)
    return close(out[:few], torch.from_numpy(expected), tolerance, label) and sound


def images_match(
    batch: Images, out: torch.Tensor, scratch: torch.Tensor, levels: int, share: float, label: str
) -> bool:
    """Are no more than `share` of the pixels more than so many levels away from the CPU's?"""
    batch.run(out.zero_(), scratch)
    few = range(min(8, len(out)))
    off = np.abs(np.stack([out[b].cpu().numpy().astype(int) - batch.by_cpu(b) for b in few]))
    worst = (off > levels).mean(axis=(1, 2, 3)).max()
    if worst > share:
        levels_off = f"up to {off.max()} levels, of one image more than {levels} in {worst:.2%} of the pixels"
        print(f"MISMATCH: {label}: {levels_off}", flush=True)
    return bool(worst <= share)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--small", action="store_true", help="each kernel once, on few samples, without figures")
    arguments = options.parse_args()
    need_gpu()
    batch = 4 if arguments.small else arguments.batch
    facts = {"batch": batch, "num_classes": SPEC.num_classes, "grid": GRID, "cells": SPEC.height, "k": SPEC.k}
    write = functools.partial(write_row, arguments.results, "kernels")
    matches: dict[str, bool] = {}

    sets = [Targets(n, batch) for n in range(1 if arguments.small else SETS)]
    shape = (batch, 1 + GRID**2, SPEC.num_classes)
    kinds = {"token targets, float32": (torch.float32, 1e-4), "token targets, bfloat16": (torch.bfloat16, 4e-3)}
    outs = {
        label: [torch.empty(shape, dtype=dtype, device="cuda") for _ in sets] for label, (dtype, _) in kinds.items()
    }
    for label, (_, tolerance) in kinds.items():
        matches[label] = targets_match(sets[0], outs[label][0], tolerance, label)
    matches["torch"] = close(
        sets[0].by_torch(), outs["token targets, float32"][0], 1e-4, "torch's targets against ours"
    )

    bandwidth = torch_ms = 0.0
    if not arguments.small:
        size = 1 << 30
        source, target = (
            torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda"),
            torch.empty(size, dtype=torch.uint8, device="cuda"),
        )
        copy = [2 * size / ms / 1e6 for ms in milliseconds(lambda _: target.copy_(source), 1)]
        bandwidth = write("device copy, 1 GiB", copy, "GB/s")["median"]
        del source, target
        theirs = milliseconds(lambda n: sets[n].by_torch(), SETS, repeats=10, burst=5)
        torch_ms = write("torch: scatter + RoIAlign + softmax", theirs, "ms", matches=matches["torch"], **facts)[
            "median"
        ]

    def figures(label: str, times: list[float], moved: int, **columns: object) -> None:
        """Rows of a kernel: its time, and what it moves beside the device copy."""
        columns |= {"matches": matches[label], "bytes": moved}
        write(label, times, "ms", **columns)
        write(f"{label}: bandwidth", [moved / ms / 1e6 for ms in times], "GB/s", **columns)
        write(f"{label}: share of the copy", [moved / ms / 1e6 / bandwidth for ms in times], "", **columns)

    for label in () if arguments.small else kinds:
        times = milliseconds(lambda n, label=label: sets[n].ours(outs[label][n]), SETS)
        figures(label, times, outs[label][0].nbytes + sets[0].maps.nbytes, **facts)
        write(f"{label}: times torch", [torch_ms / ms for ms in times], "times", matches=matches[label], **facts)
    sets.clear()  # free the memory for what follows
    outs.clear()

    facts = {"batch": batch, "image_size": SIZE, "source": f"{WIDTH} x {HEIGHT}"}
    out = torch.empty((batch, 3, SIZE, SIZE), dtype=torch.uint8, device="cuda")
    scratch = torch.empty(cuda.scratch_bytes(batch, SIZE, SIZE, True), dtype=torch.uint8, device="cuda")
    normalised = torch.empty(
        (batch, 3, SIZE, SIZE), dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last
    )
    normalise = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    for name, augment in RECIPES.items():
        label = f"images, {name}"
        images = [Images(n, batch, augment) for n in range(1 if arguments.small else SETS)]
        levels, share = (3, 5e-3) if augment.auto_augment else (1, 1e-3)
        same = images_match(Images(0, batch, augment, tame=True), out, scratch, levels, share, label)
        matches[label] = matches[f"{label}, bfloat16 channels-last"] = same
        if arguments.small:
            images[0].run(normalised, scratch, **normalise)
            torch.cuda.synchronize()
            continue
        moved = out.nbytes + sum(batch_of_images.bytes for batch_of_images in images) // len(images)
        figures(label, milliseconds(lambda n, images=images: images[n].run(out, scratch), SETS), moved, **facts)
        times = milliseconds(lambda n, images=images: images[n].run(normalised, scratch, **normalise), SETS)
        figures(f"{label}, bfloat16 channels-last", times, moved + out.nbytes, **facts)

    masks = [Masks(n, batch) for n in range(1 if arguments.small else SETS)]
    out = torch.empty((batch, CROP, CROP), dtype=torch.uint8, device="cuda")
    images = torch.zeros((batch, 3, CROP, CROP), dtype=torch.uint8, device="cuda")
    matches["masks"] = masks[0].match(out, images)
    if not arguments.small:
        facts = {"batch": batch, "image_size": CROP, "source": f"{WIDTH} x {HEIGHT}"}
        moved = out.nbytes + sum(batch_of_masks.bytes for batch_of_masks in masks) // len(masks)
        figures("masks", milliseconds(lambda n: masks[n].run(out, images), SETS), moved, **facts)
    wrong = [label for label, same in matches.items() if not same]
    if wrong:
        raise SystemExit(f"differs from its CPU twin: {'; '.join(wrong)}")
    print("every kernel equals its CPU twin")


if __name__ == "__main__":
    main()
