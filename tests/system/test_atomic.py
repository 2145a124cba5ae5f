"""Files are replaced whole, by one function."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from tl_fast.system.atomic import sync, write_atomic


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    def fails(file):
        file.write(b"half")
        raise OSError("disk full")

    (tmp_path / "kept").write_bytes(b"old")
    with pytest.raises(OSError, match="disk full"):
        write_atomic(tmp_path / "kept", fails)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and (tmp_path / "kept").read_bytes() == b"old"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_the_mode_is_what_the_umask_leaves(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", lambda file: file.write(b"new"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (calls.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"), fsync(handle)),
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("replace"), replace(*paths)))
    write_atomic(tmp_path / "file", lambda file: file.write(b"new"))
    assert calls == ["file", "replace", "folder"]


def test_a_file_system_that_cannot_sync_folders_is_no_error(tmp_path, monkeypatch):
    def refuse(handle):
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "fsync", refuse)
    sync(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        sync(tmp_path / "file")
