"""Training with token labeling.

    torchrun --nproc_per_node 8 tl_fast/train.py --config recipes/lvvit_s_224.yaml [--field value ...]
    python tl_fast/train.py --config recipes/demo_photos.yaml            (one process, no torchrun)

One step is a global batch of `batch_size` images. Everything random in it (order, crops, MixToken's box, drop path) is a function of
(seed, epoch, step) and, for drop path, the rank: a run continues from a checkpoint as if it had never stopped.
"""
from __future__ import annotations

from torch.distributed.elastic.multiprocessing.errors import record

from tl_fast.beton_write import reuse_memory
from tl_fast.config import parse_config
from tl_fast.loop import train


@record  # so that torchrun prints the traceback of the rank that failed first
def main() -> None:
    """The command line; see config.parse_config. A run that a signal ended exits with 128 + its number, as other programs do: it is not done."""
    reuse_memory()  # the loader's threads take and give back hundreds of KB for every image
    stopped = train(parse_config())["stopped"]
    if stopped:
        raise SystemExit(128 + stopped)


if __name__ == "__main__":
    main()
