"""Replacing a file whole: readers, also those after a power cut, see the old file or the new one, never a part.

The one home of os.replace. Checkpoints are folders, which it does not replace: `tl_fast.training.checkpoint` renames
the old one away first, and uses `sync` of this module.
"""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write(file)` fill a temporary file `.NAME.*.tmp` beside `path`, sync it and give it the name `path`.

    The file's mode is what the umask leaves, as for any new file. When `write` raises, `path` stays as it was. Raises
    OSError.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        replace_synced(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_synced(temporary: Path, path: Path) -> None:
    """Give a synced file its final name, and sync the folder, so that the name itself survives a power cut. Raises
    OSError.
    """
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk. Raises OSError, but not where a file system cannot sync folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)
