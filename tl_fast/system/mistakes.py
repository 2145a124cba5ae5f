"""Ends a command in one sentence when the user made a mistake. Imports neither torch nor numba.

The user can mend a Mistake, or an error of the system such as a missing file: the message is all that they see. Every
other exception is a bug of ours and keeps its traceback. In a job of several ranks one of them prints the message:

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

# Seconds that a silent rank waits before it ends: torchrun ends all others as soon as one rank has ended.
PATIENCE = 5.0


@contextlib.contextmanager
def one_speaks_for_its_node() -> Iterator[None]:
    """Inside, only the first rank of a node prints; the others end late enough for it to have printed."""
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
    """Inside, a mistake ends the process with exit code 1 and one sentence on stderr, `command` before it.

    With `show_traceback` the mistake is raised as it is.
    """
    try:
        yield
    except EXPECTED as error:
        if show_traceback:
            raise
        shared, rank = is_shared(error), int(os.environ.get("RANK", 0))
        if not shared and "TORCHELASTIC_RUN_ID" in os.environ:
            # Torchrun then takes this for the cause, not the failures of the ranks that lose this one.
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
    """The error, marked as one that every rank raises.

    met_by: goes before its sentence and says which rank met the error, where not all of them did.
    """
    error.shared_by_ranks, error.met_by = True, met_by
    return error


def is_shared(error: BaseException) -> bool:
    return getattr(error, "shared_by_ranks", False)
