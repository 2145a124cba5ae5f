"""The command `tl-fast`: the other doors behind one name, `tl-fast train ...` for `python tl_fast/train.py ...`.

    tl-fast annotate|convert|train|segment|evaluate|show|demo ...     (--help after any of them)

Under torchrun training keeps its paths, `torchrun tl_fast/train.py ...` and `torchrun tl_fast/segment.py ...`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {  # name -> module with the command's `main`, what it does
    "annotate": ("tl_fast.annotate", "label maps of a data set, by a machine annotator"),
    "convert": ("tl_fast.convert.command_line", "images and label maps into one .beton file; info and verify"),
    "train": ("tl_fast.train", "training with token labeling"),
    "segment": ("tl_fast.segment", "training for semantic segmentation, and its evaluation"),
    "evaluate": ("tl_fast.evaluate", "top-1 and top-5 accuracy of a checkpoint"),
    "show": ("tl_fast.show", "pictures of samples, of a recipe's crops, of a run's curves"),
    "demo": ("tl_fast.demo", "all of it on the bundled photos, in a clone"),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tl-fast", description="Train vision transformers with token labeling from one FFCV .beton file."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, help_line) in COMMANDS.items():
        commands.add_parser(name, help=help_line)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line -> exit code. Mistakes end it as they end the command itself; an unknown command is 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = build_parser().parse_args(words[:1]).command
    result = importlib.import_module(COMMANDS[command][0]).main(words[1:], prog=f"tl-fast {command}")
    return result if isinstance(result, int) else 0  # convert gives an exit code, others what they have measured


if __name__ == "__main__":
    sys.exit(main())
