"""Top-1 and top-5 accuracy of a checkpoint on a beton.

    python -m tl_fast.evaluate FILE.beton --checkpoint runs/x [--raw] [--img-size 288] [--crop-pct 1.0]

`--checkpoint` takes a run's folder (its newest checkpoint), a checkpoint folder, or a weights file such as a published
.pth.tar, for which `--model` is needed. Under torchrun the ranks share the set; every sample counts exactly once. Rank
0 alone reads the weights. Mistakes end it with one sentence: exit code 2 for the command line, 1 for data and files.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

from tl_fast.system.mistakes import in_a_sentence, one_speaks_for_its_node
from tl_fast.system.sides import read_sides
from tl_fast.training.evaluation_options import add_machine, add_weights

PROG = "python -m tl_fast.evaluate"


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Top-1 and top-5 accuracy of a checkpoint on a beton.")
    parser.add_argument("data", nargs="+", help="the beton(s), paths or globs")
    add_weights(parser, "a run's folder (its newest checkpoint), a checkpoint's folder, or a weights file")
    parser.add_argument("--model", help="timm name; needed for files that are not checkpoints of ours")
    parser.add_argument(
        "--img-size",
        type=read_sides,
        metavar="PIXELS",
        help="input side, or [height,width]; default: the training's",
    )
    parser.add_argument(
        "--crop-pct", type=float, help="centre crop's share of the resized side; default: the training's"
    )
    parser.add_argument(
        "--eval-token-weight",
        type=float,
        help="what the maximum of the token logits counts beside the class logits; default: the training's",
    )
    parser.add_argument(
        "--decode", choices=("auto", "cpu", "mixed"), default="auto", help="mixed: nvJPEG, on GPUs; auto: cpu"
    )
    add_machine(parser, 64, "images")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> dict[str, Any]:
    """The command line: prints the accuracies on the main rank and returns evaluate's dict. prog: what messages call
    the command.
    """
    parser = build_parser(prog)
    with one_speaks_for_its_node():
        options = vars(parser.parse_args(arguments))
    with in_a_sentence(parser.prog, options.pop("traceback")):
        # Imported when the command line is in order: it takes seconds.
        from tl_fast.training.accuracy import evaluate, in_words

        result = evaluate(options.pop("data"), options.pop("checkpoint"), **options)
    if int(os.environ.get("RANK", 0)) == 0:
        print(in_words(result))
    return result


if __name__ == "__main__":
    main()
