"""Top-1 and top-5 accuracy of a checkpoint on a beton.

    python -m tl_fast.evaluate FILE.beton --checkpoint runs/x [--raw] [--img-size 288] [--crop-pct 1.0] [--batch-size 64]

`--checkpoint` takes a run's folder (its newest checkpoint), a checkpoint folder, or a weights file such as a published .pth.tar, for which
`--model` is needed. Under torchrun the ranks share the set; every sample counts exactly once.
"""
from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Sequence

from tl_fast.accuracy import evaluate
from tl_fast.decode import DecodeError


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
