"""How fast are the CUDA kernels: token targets beside a device copy and beside torch, images beside the 1.0 ms that 256 may take?

    python benchmarks/gpu_kernels.py [--batch 256] [--small]

Token targets: 14 x 14 tokens and the class token, maps of 18 x 18 cells, top 5 of 1,000 classes, as they lie in a beton. Bytes are those of the
output and of the maps, each once; the copy counts what it reads and what it writes. torch: scatter into dense maps, torchvision's RoIAlign, softmax,
smoothing, all on the GPU. Images: regions of 500 x 375 images to 224 px. Every kernel is compared with its CPU twin first. --small runs each kernel
once on few samples, for compute-sanitizer. Rows go to benchmarks/results/gpu/kernels.jsonl.
"""
from __future__ import annotations

import numpy as np
import torch

import tl_fast.compat  # noqa: F401  before torchvision
import torchvision

from gpu_rows import SPEC, milliseconds, need_gpu, parser, write_row
from tl_fast import plan
from tl_fast.kernels import cpu, cuda, warp
from tl_fast.labelmap import encode, pack, unpack
from tl_fast.pipeline import map_affines

GRID, SIZE, SMOOTHING, SETS = 14, 224, 0.1, 4
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
        maps, unpacked = [], []
        for _ in range(batch):
            classes = np.argsort(rng.random((10, SPEC.height, SPEC.width)), axis=0)[: SPEC.k] + rng.integers(0, SPEC.num_classes - 10)
            record = pack(classes.astype(np.uint16), rng.uniform(0, 12, classes.shape).astype(np.float32), SPEC)
            maps.append((np.frombuffer(encode(record, SPEC), np.uint8), record["score_min"], record["score_step"]))
            unpacked.append(unpack(record, SPEC))
        self.classes, self.scores = (np.ascontiguousarray(np.stack(each)) for each in zip(*unpacked, strict=True))
        plans = plans_of(number, batch, plan.Augment())
        sizes = np.full(batch, HEIGHT), np.full(batch, WIDTH)
        self.affines = map_affines(plans, *sizes, "full", "correct")
        self.maps = device(np.concatenate([each for each, _, _ in maps]))
        self.starts = device(np.cumsum([0] + [len(each) for each, _, _ in maps]).astype(np.int64))
        self.ranges = device(np.array([each[1:] for each in maps], np.float32))
        self.device_affines, self.errors = device(self.affines), torch.zeros(batch, dtype=torch.int32, device="cuda")
        self.dense = device(self.classes.astype(np.int64)), device(self.scores)
        left, top = (self.affines[:, 2] + np.minimum(self.affines[:, 0], 0)) * SPEC.width, self.affines[:, 5] * SPEC.height
        right, bottom = left + np.abs(self.affines[:, 0]) * SPEC.width, top + self.affines[:, 4] * SPEC.height
        self.boxes = device(np.stack([np.arange(batch), left - 0.5, top - 0.5, right - 0.5, bottom - 0.5], axis=1).astype(np.float32))
        self.flips = device(self.affines[:, 0] < 0)

    def ours(self, out: torch.Tensor) -> None:
        cuda.packed_targets(self.maps, self.starts, self.ranges, self.device_affines, SPEC, GRID, SMOOTHING, False, out, self.errors,
                            stream=torch.cuda.current_stream().cuda_stream)  # fmt: skip

    def by_torch(self) -> torch.Tensor:
        classes, scores = self.dense
        dense = torch.zeros((len(classes), SPEC.num_classes, SPEC.height, SPEC.width), device="cuda").scatter_(1, classes, scores)
        parts = []
        for bins in (1, GRID):
            aligned = torchvision.ops.roi_align(dense, self.boxes, bins)
            aligned = torch.where(self.flips.view(-1, 1, 1, 1), aligned.flip(3), aligned)
            parts.append(aligned.flatten(2).transpose(1, 2).softmax(2) * (1 - SMOOTHING + SMOOTHING / SPEC.num_classes) + SMOOTHING / SPEC.num_classes)
        return torch.cat(parts, dim=1)


class Images:
    """One batch of decoded regions on the device, of random pixels."""

    def __init__(self, number: int, batch: int, augment: plan.Augment):
        self.plans = plans_of(number, batch, augment)
        starts, stops = warp.needed(self.plans, np.full(batch, HEIGHT), np.full(batch, WIDTH), SIZE)
        shapes = stops - starts
        sizes = 3 * shapes.prod(axis=1)
        self.regions = np.zeros(batch, cuda.REGION)
        self.regions["offset"] = np.cumsum(sizes) - sizes
        self.regions["rows"], self.regions["columns"] = shapes.T
        self.regions["top"], self.regions["left"] = starts.T
        self.regions["height"], self.regions["width"] = HEIGHT, WIDTH
        # Random at 1/8 of the resolution: noise of single pixels has no histogram worth equalising, and no image looks like it.
        coarse = np.random.default_rng(number).integers(0, 256, (-(-int(sizes.sum()) // 8),), np.uint8)
        self.host = np.repeat(coarse, 8)[: int(sizes.sum())]
        self.pixels, self.bytes = device(self.host), int(sizes.sum())
        self.device_regions, self.device_plans = device(self.regions.view(np.uint8)), device(self.plans.view(np.uint8))

    def run(self, out: torch.Tensor, scratch: torch.Tensor, **normalise: object) -> None:
        cuda.augment(self.pixels, self.device_regions, self.device_plans, (124, 116, 104), out, scratch=scratch,
                     stream=torch.cuda.current_stream().cuda_stream, **normalise)  # fmt: skip

    def by_cpu(self, b: int) -> np.ndarray:
        region, out = self.regions[b], np.empty((3, SIZE, SIZE), np.uint8)
        rows, columns = int(region["rows"]), int(region["columns"])
        pixels = self.host[int(region["offset"]) :][: 3 * rows * columns].reshape(rows, columns, 3)
        cpu.augment(pixels, region["top"], region["left"], HEIGHT, WIDTH, self.plans[b], np.array((124, 116, 104), np.uint8), out)
        return out


def check_targets(batch: Targets, out: torch.Tensor, tolerance: float) -> None:
    batch.ours(out.fill_(float("nan")))
    few = min(8, len(batch.classes))
    expected = cpu.warped_targets(batch.classes[:few], batch.scores[:few], batch.affines[:few], SPEC.num_classes, GRID, SMOOTHING, cut=False)
    torch.testing.assert_close(out[:few].float().cpu(), torch.from_numpy(expected), atol=tolerance, rtol=1e-2)
    assert not batch.errors.any() and torch.isfinite(out.sum())


def check_images(batch: Images, out: torch.Tensor, scratch: torch.Tensor, share: float) -> None:
    batch.run(out.zero_(), scratch)
    for b in range(min(8, len(out))):
        off = np.abs(out[b].cpu().numpy().astype(int) - batch.by_cpu(b))
        if (off > 1).mean() > share:
            raise SystemExit(f"image {b} differs from the CPU's by up to {off.max()} levels, by more than one in {(off > 1).mean():.2%} of the pixels")


def main() -> None:
    options = parser(__doc__.splitlines()[0], "kernels")
    options.add_argument("--batch", type=int, default=256)
    options.add_argument("--small", action="store_true", help="each kernel once, on few samples, without figures")
    arguments = options.parse_args()
    need_gpu()
    batch = 4 if arguments.small else arguments.batch
    facts = {"batch": batch, "num_classes": SPEC.num_classes, "grid": GRID, "cells": SPEC.height, "k": SPEC.k}

    sets = [Targets(n, batch) for n in range(1 if arguments.small else SETS)]
    shape = (batch, 1 + GRID**2, SPEC.num_classes)
    kinds = {"float32": (torch.float32, 1e-4), "bfloat16": (torch.bfloat16, 4e-3)}
    outs = {name: [torch.empty(shape, dtype=dtype, device="cuda") for _ in sets] for name, (dtype, _) in kinds.items()}
    for name, (_, tolerance) in kinds.items():
        check_targets(sets[0], outs[name][0], tolerance)
    torch.testing.assert_close(sets[0].by_torch(), outs["float32"][0], atol=1e-4, rtol=1e-2)
    if not arguments.small:
        size = 1 << 30
        source, target = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda"), torch.empty(size, dtype=torch.uint8, device="cuda")
        copy = [2 * size / ms / 1e6 for ms in milliseconds(lambda _: target.copy_(source), 1)]
        bandwidth = write_row(arguments.results, "kernels", "device copy, 1 GiB", copy, "GB/s")["median"]
        del source, target
        theirs = milliseconds(lambda n: sets[n].by_torch(), SETS, repeats=10, burst=5)
        torch_ms = write_row(arguments.results, "kernels", "torch: scatter + RoIAlign + softmax", theirs, "ms", **facts)["median"]
        for name in kinds:
            moved = outs[name][0].nbytes + sets[0].maps.nbytes
            times = milliseconds(lambda n, name=name: sets[n].ours(outs[name][n]), SETS)
            label = f"token targets, {name}"
            write_row(arguments.results, "kernels", label, times, "ms", bytes=moved, **facts)
            write_row(arguments.results, "kernels", f"{label}: bandwidth", [moved / ms / 1e6 for ms in times], "GB/s", **facts)
            write_row(arguments.results, "kernels", f"{label}: share of the copy", [moved / ms / 1e6 / bandwidth for ms in times], "", **facts)
            write_row(arguments.results, "kernels", f"{label}: times torch", [torch_ms / ms for ms in times], "times", **facts)
    del sets, outs

    facts = {"batch": batch, "image_size": SIZE, "source": f"{WIDTH} x {HEIGHT}"}
    out = torch.empty((batch, 3, SIZE, SIZE), dtype=torch.uint8, device="cuda")
    scratch = torch.empty(cuda.scratch_bytes(batch, SIZE, SIZE, True), dtype=torch.uint8, device="cuda")
    normalise = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    for name, augment in RECIPES.items():
        images = [Images(n, batch, augment) for n in range(1 if arguments.small else SETS)]
        check_images(images[0], out, scratch, 0.03 if augment.auto_augment else 1e-3)
        normalised = torch.empty((batch, 3, SIZE, SIZE), dtype=torch.bfloat16, device="cuda", memory_format=torch.channels_last)
        if arguments.small:
            images[0].run(normalised, scratch, **normalise)
            torch.cuda.synchronize()
            continue
        moved = out.nbytes + sum(each.bytes for each in images) // len(images)
        times = milliseconds(lambda n, images=images: images[n].run(out, scratch), SETS)
        write_row(arguments.results, "kernels", f"images, {name}", times, "ms", bytes=moved, **facts)
        times = milliseconds(lambda n, images=images: images[n].run(normalised, scratch, **normalise), SETS)
        write_row(arguments.results, "kernels", f"images, {name}, bfloat16 channels-last", times, "ms", bytes=moved + out.nbytes, **facts)
    if arguments.small:
        print("every kernel ran once and equals its CPU twin")


if __name__ == "__main__":
    main()
