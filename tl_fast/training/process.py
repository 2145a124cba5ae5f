"""A run as the whole work of a process, as the commands start it."""

from __future__ import annotations

from torch.distributed.elastic.multiprocessing.errors import record

from tl_fast.system.memory import reuse_memory
from tl_fast.system.mistakes import in_a_sentence
from tl_fast.training import loop
from tl_fast.training.run_config import RunConfig


def run(config: RunConfig, prog: str, show_traceback: bool) -> None:
    """Train, and end the process as `tl_fast/train.py` documents it: mistakes with one sentence that begins with
    `prog`, a signal with 128 + its number."""
    reuse_memory()  # the loader's threads take and give back hundreds of KB for every image

    @record  # so that torchrun prints the traceback of the rank that failed first
    def train() -> int:
        with in_a_sentence(prog, show_traceback):
            return loop.train(config)["stopped"]

    stopped = train()
    if stopped:
        raise SystemExit(128 + stopped)
