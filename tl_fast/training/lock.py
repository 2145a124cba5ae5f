"""One writer a run's folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

LOCK = "run.lock"


@contextlib.contextmanager
def sole_writer(folder: Path, patience: float = 10.0) -> Iterator[None]:
    """Hold the lock on a run's folder, made if need be. Raises BlockingIOError when another process still has it after
    `patience` seconds: a rank that torchrun is about to replace may take a moment to go. The system frees the lock of a
    process that ends in any way."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+") as file:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.1)
                    continue
                file.seek(0)
                raise BlockingIOError(
                    errno.EWOULDBLOCK,
                    f"output_dir {folder} is being trained into by another process"
                    f" ({file.read().strip() or 'unknown'}): end it, or choose another output_dir",
                ) from error
            except OSError as error:  # some network file systems have no locks
                warnings.warn(
                    f"{folder} cannot be locked ({error}): make sure that no other run writes there", stacklevel=2
                )
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
