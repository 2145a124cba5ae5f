"""Mistakes of the user, and how they end a command: in one sentence. Imports neither torch nor numba.

A Mistake, or an error of the system such as a missing file, is for the user to mend: its message is all that they get.
Everything else that is raised is a bug of ours, and keeps its traceback. In a job of several ranks one of them speaks:

- before the ranks have met (the command line, recipes), the first rank of every node, for all on a node read the same
  files;
- in set-up, which the ranks go through together (`Ranks.agree`, `Ranks.on_main`), rank 0, whichever rank met the
  mistake;
- after that, in the steps, every rank that meets a mistake, with its number; torchrun then also repeats the traceback
  of the first.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator


class Mistake(Exception):
    """What the user can mend; the message says how."""


class InputError(Mistake, ValueError):
    """Options, data or files that cannot be used or do not fit one another; the message names them and the remedy."""


EXPECTED = Mistake, OSError

# Seconds that a rank waits which leaves the word to another: torchrun ends the others when the first rank has left.
PATIENCE = 5.0


@contextlib.contextmanager
def one_speaks_for_its_node() -> Iterator[None]:
    """Inside, what the other ranks of a node print is dropped, and they do not end before the first one has had the
    time to speak."""
    if not int(os.environ.get("LOCAL_RANK", 0)):
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
            yield
    except SystemExit as end:
        if end.code:  # --help has none
            time.sleep(PATIENCE)
        raise


@contextlib.contextmanager
def in_a_sentence(command: str, show_traceback: bool = False) -> Iterator[None]:
    """Inside, a mistake ends the process with exit code 1 and one sentence on stderr, `command` before it; with
    `show_traceback` it stays as it is."""
    try:
        yield
    except EXPECTED as error:
        if show_traceback:
            raise
        shared, rank = is_shared(error), int(os.environ.get("RANK", 0))
        if not shared and "TORCHELASTIC_RUN_ID" in os.environ:
            # So that torchrun takes it for the cause, not the failures of the ranks that then lose this one.
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        if not shared or rank == 0:
            alone = "" if shared or int(os.environ.get("WORLD_SIZE", 1)) == 1 else f"rank {rank}: "
            print(f"{command}: {alone}{sentence(error)}", file=sys.stderr, flush=True)
        else:
            time.sleep(PATIENCE)
        raise SystemExit(1) from None


def sentence(error: BaseException) -> str:
    """An error's message in one line; the system's errors begin with the file instead of a number."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
    return re.sub(r"\s*\n\s*", " ", getattr(error, "met_by", "") + text).strip()


def share(error: BaseException, met_by: str = "") -> BaseException:
    """The error, marked as one that every rank raises. `met_by` goes before its sentence: whose it is, where it is not
    everybody's."""
    error.shared_by_ranks, error.met_by = True, met_by
    return error


def is_shared(error: BaseException) -> bool:
    return getattr(error, "shared_by_ranks", False)
