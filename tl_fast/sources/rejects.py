"""Lists of samples that were left out: one JSON object a line with id, origin and reason.

The origin is what messages call the sample.
"""

from __future__ import annotations

import argparse
import errno
import json
from collections.abc import Sequence
from pathlib import Path

from tl_fast.system.atomic import write_atomic
from tl_fast.system.mistakes import InputError

Reject = dict[str, str]

# Errors of the machine, not of a sample: quarantining would throw good samples away.
FATAL = {
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.ENOSPC,
    errno.EDQUOT,
}


def add_reject_options(group: argparse._ArgumentGroup) -> None:
    """Add the command-line options for bad samples; every command that reads images has the same."""
    group.add_argument(
        "--on-error",
        choices=("stop", "quarantine"),
        default="stop",
        help="quarantine: leave out images that cannot be used, list them in OUT.rejects.jsonl",
    )
    group.add_argument(
        "--max-rejects", type=int, metavar="N", help="with quarantine: fail when more are left out (default: no limit)"
    )


def reason_of(problem: Exception) -> str:
    """What is wrong with a sample, in one line."""
    text = str(problem) if isinstance(problem, (ValueError, OSError)) else f"{type(problem).__name__}: {problem}"
    return " ".join(text.split())


def reject_lines(rejects: Sequence[Reject]) -> bytes:
    """The lines of a list of rejects, ASCII."""
    return "".join(json.dumps(reject) + "\n" for reject in rejects).encode("ascii")


def write_rejects(path: Path, rejects: Sequence[Reject]) -> None:
    """Write the list; without rejects remove the file that an earlier run may have left. Raises OSError."""
    if rejects:
        write_atomic(path, lambda file: file.write(reject_lines(rejects)))
    else:
        path.unlink(missing_ok=True)


def read_rejects(path: Path) -> list[Reject]:
    """The rejects listed in a file; none where there is no file.

    Raises InputError naming the file when it is no list of rejects.
    """
    if not path.exists():
        return []
    try:
        rejects = [json.loads(line) for line in path.read_text("ascii").splitlines()]
        if all(isinstance(reject["id"], str) and isinstance(reject["reason"], str) for reject in rejects):
            return rejects
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path}: is no list of rejects ({error}); make what it belongs to anew") from error
    raise InputError(f"{path}: is no list of rejects (ids and reasons must be texts); make what it belongs to anew")


def list_beside(path: Path) -> Path:
    """Where the rejects of `path`, a beton or a store of label maps, are listed: `PATH.rejects.jsonl`."""
    return path.with_name(f"{path.name}.rejects.jsonl")
