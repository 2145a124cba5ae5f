"""Counts the CPU cores that this process may use, by its affinity and the CPU quotas of its control groups.

Imports neither torch nor numba.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")
NO_QUOTA = float(1 << 16)  # cores; more than any machine has


def usable_cores() -> int:
    """Cores that this process may use at a time: the smaller of its CPU affinity and its control groups' CPU quota.

    At least 1. A part of a core is rounded up: 2.5 cores count as 3, and a thread may have to wait now and then.
    """
    return max(min(len(os.sched_getaffinity(0)), math.ceil(cpu_quota())), 1)


def cpu_quota(proc: Path = PROC) -> float:
    """The smallest CPU quota, in cores, of the process's control group and those around it, whatever its affinity.

    proc: the process's folder in /proc. Both versions of control groups count. NO_QUOTA where there is no quota, or
    where the files cannot be read.
    """
    return min([NO_QUOTA, *(quota for folder in _groups(proc) if (quota := _quota(folder)) is not None)])


def _groups(proc: Path) -> Iterator[Path]:
    """Folders of the control groups that bound the process's CPU time, each before the one around it."""
    groups = dict(_memberships(proc))
    for kind, root, mount in _mounts(proc):
        if kind not in groups:
            continue
        group = groups[kind]
        # A container sees its own group's folder as the mount, while the kernel may name the group as the host does.
        inside = os.path.relpath(group, root)
        folder = mount if inside.startswith("..") else mount / inside
        while True:
            yield folder
            if folder == mount:
                break
            folder = folder.parent


def _memberships(proc: Path) -> Iterator[tuple[str, str]]:
    """("cgroup2" or "cgroup", the process's group) from the lines of /proc/self/cgroup.

    Those lines are `0::/group` for version 2 and such as `4:cpu,cpuacct:/group` for version 1.
    """
    for line in _read(proc / "cgroup").splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0" and not controllers:
            yield "cgroup2", group
        elif "cpu" in controllers.split(","):
            yield "cgroup", group


def _mounts(proc: Path) -> Iterator[tuple[str, str, Path]]:
    """(file system, root within it, mount point) of the mounted control groups that may hold CPU quotas."""
    for line in _read(proc / "mountinfo").splitlines():
        fields, _, source = line.partition(" - ")
        kind, _, options = source.split(" ", 2)
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            root, mount = map(_unescape, fields.split(" ")[3:5])
            yield kind, root, Path(mount)


def _quota(folder: Path) -> float | None:
    """A control group's own CPU quota in cores; None where it has none."""
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not quota:  # version 1
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    if not (quota.isdigit() and period.isdigit() and int(period)):  # "max", or -1
        return None
    return int(quota) / int(period)


def _unescape(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), path)  # a space is \040


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
