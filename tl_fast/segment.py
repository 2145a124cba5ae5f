"""Training for semantic segmentation, from a beton with masks.

    torchrun --nproc_per_node 8 tl_fast/segment.py --config recipes/segment_lvvit_s_ade20k.yaml [--field value ...]
    python tl_fast/segment.py --train_data camvid.beton --model lvvit_t       (one process, no torchrun)

Mistakes and signals end it as they end `train.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from tl_fast.system.mistakes import one_speaks_for_its_node
from tl_fast.training.read_config import parse_command
from tl_fast.training.segment_config import SegmentConfig

PROG = "segment.py"
DESCRIPTION = "Train UPerNet on a vision transformer, from .beton files with masks."


def main(arguments: Sequence[str] | None = None, prog: str = PROG) -> None:
    """The command line; see read_config.parse_command. prog: what messages call the command."""
    with one_speaks_for_its_node():
        config, show_traceback = parse_command(SegmentConfig, arguments, prog, DESCRIPTION)
    from tl_fast.training.process import run  # when the command line is in order: it takes seconds

    run(config, prog, show_traceback)


if __name__ == "__main__":
    main()
