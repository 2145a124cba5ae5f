"""Top-1 and top-5 accuracy of a checkpoint on a beton.

    python -m tl_fast.evaluate FILE.beton --checkpoint runs/x [--raw] [--img-size 288] [--crop-pct 1.0] [--batch-size 64]

`--checkpoint` takes a run's folder (its newest checkpoint), a checkpoint folder, or a weights file such as a published .pth.tar, for which
`--model` is needed. Under torchrun the ranks share the set; every sample counts exactly once.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import Any, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tl_fast.compat  # noqa: F401  before timm
import timm

from tl_fast import checkpoint
from tl_fast.config import TrainConfig
from tl_fast.decode import DecodeError
from tl_fast.models import LVViT
from tl_fast.pipeline import Batch, Loader
from tl_fast.ranks import Ranks, join


class Normalise(nn.Module):
    """uint8 images [B,3,H,W] -> float32 of zero mean and unit deviation per channel, channels-last on GPUs.

    `mean` and `std` are on a 0..1 scale.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([1 / (255 * s) for s in std]).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor([-m / s for m, s in zip(mean, std)]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        layout = torch.channels_last if images.is_cuda else torch.contiguous_format
        return torch.addcmul(self.shift, images.to(torch.float32, memory_format=layout), self.scale)


def resolved_dtype(device: torch.device, dtype: str) -> str:
    """A config's `dtype` on a device; "auto" is bfloat16 on GPUs and float32 on the CPU."""
    return dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """The autocast context of a config's `dtype`; none for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=resolved_dtype(device, dtype) == "bfloat16")


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Iterable[Batch], ranks: Ranks, config: TrainConfig) -> dict[str, float]:
    """Evaluate over all ranks: `top1`, `top5` in percent, `loss` (mean cross-entropy in nats), `samples`.

    `batches` are this rank's share; ranks may differ in their number. The last, partial batch counts in full. With fewer than 5 classes
    top5 is 100 by definition. `model` is put in eval mode and back. Raises ValueError when there are no samples.
    """
    was_training = model.training
    model.eval()
    normalise = Normalise(config.mean, config.std).to(ranks.device)
    totals = torch.zeros(4, dtype=torch.float64, device=ranks.device)  # top-1 hits, top-5 hits, summed loss, samples
    for batch in batches:
        labels = batch.labels.to(ranks.device, non_blocking=True)
        with autocast(ranks.device, config.dtype):
            logits = model(normalise(batch.images.to(ranks.device, non_blocking=True))).float()
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [B,5]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.ones_like(labels).sum()]).double()
    model.train(was_training)
    top1, top5, loss, samples = ranks.sum(totals).tolist()
    if samples == 0:
        raise ValueError("no samples to evaluate")
    return {"top1": 100 * top1 / samples, "top5": 100 * top5 / samples, "loss": loss / samples, "samples": int(samples)}


def build_model(config: TrainConfig) -> nn.Module:
    """The config's model, randomly initialised from torch's generator; `num_classes` must be resolved.

    Raises ValueError naming a bad argument, or a model without a token head for each of the config's tokens.
    """
    try:
        model = timm.create_model(
            config.model, img_size=config.img_size, num_classes=config.num_classes, drop_path_rate=config.drop_path, **config.model_kwargs
        )
    except TypeError as error:  # an argument the constructor does not have
        raise ValueError(f"model {config.model} with model_kwargs {config.model_kwargs}: {error}") from error
    except RuntimeError as error:  # timm's "Unknown model"
        raise ValueError(f"model {config.model!r}: {error}; {_MODELS}") from error
    if not isinstance(model, LVViT):
        raise ValueError(f"model {config.model!r} is a {type(model).__name__}, which has no token labeling (a head for patch tokens, MixToken): {_MODELS}")
    if model.grid_size != (config.grid, config.grid):
        raise ValueError(f"model {config.model!r} has a grid of {model.grid_size} tokens, the label maps are cut to {config.grid}x{config.grid} "
                         f"for img_size {config.img_size}: {_MODELS}")
    return model


_MODELS = "lvvit_t, lvvit_s, lvvit_m and lvvit_l exist"


def check_labels(loader: Loader, num_classes: int) -> None:
    """Raises ValueError naming the files when their labels do not fit a model of `num_classes`, the sample too where a label is below 0."""
    files = ", ".join(map(str, loader.samples.paths))
    declared = loader.num_classes if loader.samples.class_names or loader.samples.spec is not None else None
    if declared is not None and declared != num_classes:
        raise ValueError(f"{files} has {declared} classes, the model {num_classes}: set num_classes to {declared}, or use the data "
                         "that the model was made for")
    lowest = int(loader.samples.labels.argmin())
    if loader.samples.labels[lowest] < 0:
        raise ValueError(f"{loader.samples.name(lowest)} has label {loader.samples.labels[lowest]}, and labels start at 0: convert again without "
                         "such samples")
    highest = int(loader.samples.labels.max())
    if highest >= num_classes:
        raise ValueError(f"{files} has label {highest}, the model classes 0..{num_classes - 1}: set num_classes to at least {highest + 1}")


def evaluate(
    data: str | Sequence[str],
    weights: Path,
    *,
    use_ema: bool = True,
    model: str | None = None,
    img_size: int | None = None,
    crop_pct: float | None = None,
    batch_size: int = 64,
    threads: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    decode: str = "auto",
) -> dict[str, Any]:
    """Evaluate `weights` on the beton(s) `data`: accuracy's dict plus `images_per_second` over all ranks, `checkpoint`, `remarks`.

    Args:
        weights: a run's folder, a checkpoint folder, or a weights file (then `model`, a timm name, is needed).
        use_ema: the moving average where the file has one, else the raw weights.
        img_size, crop_pct: pixels and share; None: those of the checkpoint's training (224 and 0.9 for a bare file).
        batch_size: images per step and rank.
        decode: where JPEGs are decoded, as `pipeline.Loader` takes it; nvJPEG's pixels differ a little from the CPU's.

    Raises CheckpointError, FileNotFoundError or ValueError naming what does not fit.
    """
    weights = checkpoint.find(weights)
    with join(device) as ranks, contextlib.ExitStack() as stack:
        meta = checkpoint.read_meta(weights) if weights.is_dir() else {}
        config = TrainConfig.from_dict(meta["config"]) if meta else None
        if config is None and model is None:
            raise ValueError(f"{weights} does not say which model it is: give --model (lvvit_t, lvvit_s, lvvit_m or lvvit_l)")
        values = config.to_dict() if config else {"train_data": "unused: evaluation only", "model": model}
        values |= {name: value for name, value in (("model", model), ("img_size", img_size), ("crop_pct", crop_pct)) if value is not None}
        values |= {"dtype": dtype, "drop_path": 0.0, "resume": None}
        config = TrainConfig.from_dict(values)
        loader = Loader(data, batch_size, image_size=config.img_size, grid=config.grid, train=False, threads=threads,
                        crop_pct=config.crop_pct, device=ranks.device, decode=decode, rank=ranks.rank, world_size=ranks.world_size)
        stack.callback(loader.close)
        if config.num_classes is None:  # a bare file: its head says
            state, _ = checkpoint.read_weights(weights, use_ema)
            if "head.weight" not in state:
                raise ValueError(f"{weights} has no head.weight, so no class count: it is not a classifier")
            config = dataclasses.replace(config, num_classes=state["head.weight"].shape[0])
        check_labels(loader, config.num_classes)
        trained, names = meta.get("class_names"), loader.samples.class_names
        if trained and names and trained != names:
            raise ValueError(f"{', '.join(map(str, loader.samples.paths))} has the classes {names[:5]}..., {weights} was trained on "
                             f"{trained[:5]}...: convert the data with the same class list")
        network = build_model(config)
        remarks = checkpoint.load_weights(network, weights, use_ema)
        start = time.perf_counter()
        result = accuracy(network.to(ranks.device), loader, ranks, config)
        if result["samples"] != len(loader.samples):
            raise RuntimeError(f"evaluated {result['samples']} of {len(loader.samples)} samples: the loader's sharding is broken")
        return {
            **result,
            "images_per_second": result["samples"] / (time.perf_counter() - start),
            "checkpoint": str(weights),
            "weights": "ema" if use_ema else "raw",
            "remarks": remarks,
        }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """The command line: prints the accuracies on the main rank and returns evaluate's dict."""
    parser = argparse.ArgumentParser(prog="python -m tl_fast.evaluate", description="Top-1 and top-5 accuracy of a checkpoint on a beton.")
    parser.add_argument("data", nargs="+", help="the beton(s), paths or globs")
    parser.add_argument("--checkpoint", type=Path, required=True,
                        help="run folder (its newest checkpoint), checkpoint folder, or weights file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ema", dest="use_ema", action="store_true", default=True, help="the weights' moving average (default)")
    which.add_argument("--raw", dest="use_ema", action="store_false", help="the weights themselves")
    parser.add_argument("--model", help="timm name; needed for files that are not checkpoints of ours")
    parser.add_argument("--img-size", type=int, help="input side in pixels; default: the training's")
    parser.add_argument("--crop-pct", type=float, help="centre crop's share of the resized side; default: the training's")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step and rank")
    parser.add_argument("--threads", type=int, help="loader threads per rank")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--decode", choices=("auto", "cpu", "mixed"), default="auto", help="mixed: nvJPEG, on GPUs; auto: the faster")
    options = vars(parser.parse_args(arguments))
    try:
        result = evaluate(options.pop("data"), options.pop("checkpoint"), **options)
    except (ValueError, OSError, DecodeError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if int(os.environ.get("RANK", 0)) == 0:
        for remark in result["remarks"]:
            print(remark)
        print(
            f"{result['checkpoint']} ({result['weights']}): top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %,"
            f" {result['samples']} images, {result['images_per_second']:.0f} images/s"
        )
    return result


if __name__ == "__main__":
    main()
