"""Training with token labeling.

    torchrun --nproc_per_node 8 tl_fast/train.py --config recipes/lvvit_s_224.yaml [--field value ...]
    python tl_fast/train.py --config recipes/demo_photos.yaml            (one process, no torchrun)

Mistakes end it with one sentence (`--traceback`: with their traceback too): exit code 2 for the command line and
recipes, 1 for data, files and checkpoints. A run that a signal ended exits with 128 + its number, as other programs do:
it is not done.
"""

from __future__ import annotations

from collections.abc import Sequence

from tl_fast.system.mistakes import one_speaks_for_its_node
from tl_fast.training.config import DESCRIPTION, TrainConfig
from tl_fast.training.read_config import parse_command

PROG = "train.py"


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """The command line; see read_config.parse_command. prog: what messages call the command."""
    with one_speaks_for_its_node():
        config, show_traceback = parse_command(TrainConfig, arguments, prog, DESCRIPTION)
    from tl_fast.training.process import run  # when the command line is in order: it takes seconds

    run(config, prog, show_traceback)


if __name__ == "__main__":
    main()
