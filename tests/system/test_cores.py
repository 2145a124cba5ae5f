"""How many cores a process may use: control groups' CPU quotas, of both versions, on files as the kernel writes
them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tl_fast.convert.command_line import build_parser
from tl_fast.convert.options import RunOptions
from tl_fast.system import cores, ranks

V2 = "29 23 0:26 {root} {mount} rw,nosuid,nodev shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "33 29 0:29 {root} {mount} rw,nosuid shared:9 - cgroup cgroup rw,{controllers}"


def process(folder: Path, memberships: str, *mounts: str) -> Path:
    """A process's folder in /proc."""
    proc = folder / "proc"
    proc.mkdir()
    (proc / "cgroup").write_text(memberships)
    (proc / "mountinfo").write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/sda1 rw", *mounts]) + "\n")
    return proc


def group(folder: Path, **files: str) -> None:
    """A control group's folder with these files, a dot in their names written as two underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_the_smallest_quota_of_the_groups_around_counts(tmp_path):
    mount = tmp_path / "cg roup"
    group(mount / "pods" / "pod" / "box", cpu__max="max 100000")
    group(mount / "pods" / "pod", cpu__max="250000 100000")
    group(mount / "pods", cpu__max="1600000 100000")
    proc = process(tmp_path, "0::/pods/pod/box\n", V2.format(root="/", mount=str(mount).replace(" ", "\\040")))
    assert cores.cpu_quota(proc) == 2.5


def test_a_container_that_sees_its_own_group_as_the_root(tmp_path):
    """Docker without a namespace of control groups: the kernel names the group as the host does, the mount shows its
    inside."""
    group(tmp_path / "cgroup", cpu__cfs_quota_us="400000", cpu__cfs_period_us="100000")
    group(tmp_path / "memory", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")
    proc = process(
        tmp_path,
        "5:memory:/docker/ab\n4:cpu,cpuacct:/docker/ab\n0::/docker/ab\n",
        V1.format(root="/docker/ab", mount=tmp_path / "memory", controllers="memory"),
        V1.format(root="/docker/ab", mount=tmp_path / "cgroup", controllers="cpu,cpuacct"),
    )
    assert cores.cpu_quota(proc) == 4


@pytest.mark.parametrize("inside", ["/", "/other", "/../sibling"])
def test_a_group_outside_of_what_is_mounted_is_the_mounts(tmp_path, inside):
    group(tmp_path / "cgroup", cpu__max="50000 100000")
    proc = process(tmp_path, f"0::{inside}\n", V2.format(root="/docker/ab", mount=tmp_path / "cgroup"))
    assert cores.cpu_quota(proc) == 0.5


def test_no_quota_leaves_the_affinity(tmp_path):
    group(tmp_path / "two" / "box", cpu__max="max 100000")
    group(tmp_path / "one", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    proc = process(
        tmp_path,
        "4:cpu:/\n0::/box\n",
        V2.format(root="/", mount=tmp_path / "two"),
        V1.format(root="/", mount=tmp_path / "one", controllers="cpu"),
    )
    assert cores.cpu_quota(proc) == cores.NO_QUOTA
    assert cores.cpu_quota(tmp_path / "nowhere") == cores.NO_QUOTA
    (tmp_path / "one" / "cpu.cfs_quota_us").unlink()
    assert cores.cpu_quota(proc) == cores.NO_QUOTA


@pytest.mark.parametrize("affinity, quota, usable", [(64, 4.0, 4), (64, 2.5, 3), (8, 0.25, 1), (2, 16.0, 2)])
def test_threads_and_workers_stay_within_quota_and_affinity(monkeypatch, affinity, quota, usable):
    """A container with 4 of 64 cores: the loader's threads, shared among the ranks of the host, and the converter's
    processes."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert cores.usable_cores() == usable
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert ranks.cores_of_this_rank() == usable
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert ranks.cores_of_this_rank() == max(usable // 2, 1)
    assert RunOptions().workers == usable
    assert build_parser("verify").parse_args(["x.beton"]).workers == usable
