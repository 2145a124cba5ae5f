"""What runs here: versions of installed packages, and the commit of the checkout."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path


def version(package: str) -> str | None:
    """The installed version of a package by its name on PyPI; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """This checkout's commit, 40 digits, with "-dirty" where files differ from it; None without git or outside a
    checkout of ours."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package must not report the commit of what it happens to lie in
        return None
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
