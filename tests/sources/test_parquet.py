"""Parquet under load: each row group is decoded once, what stays in memory, and whose fault an error is."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_sources import parquet_table, write_parquet

from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.convert.estimate import estimate
from tl_fast.convert.options import EncodeOptions
from tl_fast.convert.selection import Conversion
from tl_fast.convert.write import write_beton
from tl_fast.sources.image_folder import ImageFolder
from tl_fast.sources.open import open_source
from tl_fast.sources.source import SourceChanged, SourceError

pytest.importorskip("pyarrow.parquet")
from tl_fast.sources.parquet_files import ParquetSource  # noqa: E402

ROWS = 240


@pytest.fixture(scope="module")
def photo_folder(photos: Path) -> ImageFolder:
    return ImageFolder(photos / "train")


def write_rows(folder: ImageFolder, path: Path, group_rows: int, rows: int = ROWS, **options: object) -> Path:
    """A shard of the folder's images, repeated; the ids differ, for they are made of the rows."""
    table = parquet_table(folder, [i % len(folder) for i in range(rows)], hub=False)
    return write_parquet(path, table, row_group_size=group_rows, use_dictionary=False, **options)


def count_decoding(monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    """Append the place of each decoded row group to `log`, in whichever process that is."""
    plain = ParquetSource._decode

    def decode(source: ParquetSource, group):
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, b"%d\n" % group.number)
        os.close(file)
        return plain(source, group)

    monkeypatch.setattr(ParquetSource, "_decode", decode)


def convert(source: ParquetSource, out: Path, seed: int | None = None, **options: object):
    conversion = Conversion(source, None, source.order(seed))
    options = {"workers": 4, "processes": True, **options}
    return write_beton(out, conversion, class_names=source.class_names, **options)


@pytest.mark.parametrize("seed", (None, 3), ids=("listed", "shuffled"))
@pytest.mark.parametrize("group_rows", (7, 16, 50, 600))
def test_all_workers_together_decode_each_row_group_once(photo_folder, tmp_path, monkeypatch, group_rows, seed):
    """Row groups smaller and larger than the 16 samples that a worker takes at a time, and no multiples of them. The
    bytes written are those of one worker."""
    path = write_rows(photo_folder, tmp_path / "s.parquet", group_rows, rows=600)
    cache = path.stat().st_size // 2  # 300 rows, a window of 150: more than three workers are given ahead
    convert(ParquetSource([str(path)], cache_bytes=cache), tmp_path / "one.beton", seed, workers=1, decode_check=False)
    count_decoding(monkeypatch, tmp_path / "decoded")
    with ParquetSource([str(path)], cache_bytes=cache) as source:
        convert(source, tmp_path / "three.beton", seed, workers=3, decode_check=False)
        assert sorted(map(int, (tmp_path / "decoded").read_text().split())) == list(range(len(source._groups)))
    assert len(source._groups) == -(-600 // group_rows)
    assert (tmp_path / "three.beton").read_bytes() == (tmp_path / "one.beton").read_bytes()
    with BetonReader(tmp_path / "three.beton") as reader:
        assert reader.source_ids == [source.ids[i] for i in source.order(seed)]


def test_row_groups_that_were_read_are_given_back(photo_folder, tmp_path, monkeypatch):
    """In listed order no more stay in memory than hold the samples that four workers are given ahead."""
    path = write_rows(photo_folder, tmp_path / "s.parquet", 10, rows=800)
    source, most, plain = ParquetSource([str(path)]), [0], ParquetSource._decode
    estimate(Conversion(source, None, source.order(None)), EncodeOptions())
    assert not source._cache

    def decode(source: ParquetSource, group):
        most[0] = max(most[0], len(source._cache))
        return plain(source, group)

    monkeypatch.setattr(ParquetSource, "_decode", decode)
    assert convert(source, tmp_path / "out.beton").samples == 800
    assert not source._cache and most[0] <= 4 * 2 * 16 // 10 + 4 < len(source._groups) / 2


def fail(monkeypatch: pytest.MonkeyPatch, times: int, error: Exception, group: int = 0) -> list[int]:
    """Let the first `times` attempts to decode one row group fail. Returns the list of attempts, which grows."""
    plain, attempts, lock = ParquetSource._decode, [], threading.Lock()

    def decode(source: ParquetSource, wanted):
        if wanted.number == group:
            with lock:
                attempts.append(len(attempts))
                number = len(attempts)
            if number <= times:
                time.sleep(0.02)
                raise error
        return plain(source, wanted)

    monkeypatch.setattr(ParquetSource, "_decode", decode)
    return attempts


def test_a_read_error_that_passes_costs_no_sample(photo_folder, tmp_path, monkeypatch):
    path = write_rows(photo_folder, tmp_path / "s.parquet", 50)
    attempts = fail(monkeypatch, 1, OSError(errno.EIO, "Input/output error"), group=2)
    summary = convert(open_source(path), tmp_path / "out.beton", on_error="quarantine")
    assert (summary.samples, summary.rejected, len(attempts)) == (ROWS, 0, 2)


def test_a_read_error_is_not_kept(photo_folder, tmp_path, monkeypatch):
    """The read that met it says so; the next one reads, and so do those that waited meanwhile."""
    path = write_rows(photo_folder, tmp_path / "s.parquet", 50)
    source = open_source(path)
    fail(monkeypatch, 4, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(OSError, match="Input/output error"):
        source.read(3)

    def read(i: int) -> bytes | OSError:
        try:
            return source.read(i)
        except OSError as error:
            return error

    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(read, range(8)))
    assert sum(isinstance(result, OSError) for result in results) == 1
    assert all(result == photo_folder.read(i) for i, result in enumerate(results) if isinstance(result, bytes))
    assert source.read(3) == photo_folder.read(3)


def test_a_damaged_row_group_is_damage_of_its_samples(photo_folder, tmp_path, monkeypatch):
    """Under quarantine they are left out, all of them, the others are not; two attempts are made, not one a sample."""
    path = write_rows(photo_folder, tmp_path / "s.parquet", 50, write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    count_decoding(monkeypatch, tmp_path / "decoded")
    summary = convert(open_source(path), tmp_path / "out.beton", on_error="quarantine")
    rejects = [json.loads(line) for line in (tmp_path / "out.beton.rejects.jsonl").read_text().splitlines()]
    group = int(rejects[0]["origin"].split(" row ")[1]) // 50
    rows = range(group * 50, group * 50 + 50)
    assert [reject["origin"] for reject in rejects] == [f"{path} row {row}" for row in rows]
    assert all(f"row group {group} is damaged" in reject["reason"] for reject in rejects)
    assert (summary.samples, summary.rejected) == (ROWS - 50, 50)
    decoded = (tmp_path / "decoded").read_text().split()
    assert decoded.count(str(group)) == 2 and len(decoded) == 6
    with pytest.raises(BetonError, match=f"s.parquet row {group * 50}: .*row group {group} is damaged"):
        convert(open_source(path), tmp_path / "stop.beton")


@pytest.mark.parametrize("change", ("other bytes", "gone"))
def test_a_file_that_changes_ends_the_run(photo_folder, tmp_path, change):
    """Under quarantine too: it would throw good samples away."""
    path = write_rows(photo_folder, tmp_path / "s.parquet", 50)
    source = open_source(path)
    if change == "gone":
        path.unlink()
    else:
        write_rows(photo_folder, path, 40)
    message = "can no longer be opened" if change == "gone" else "has changed since it was listed"
    with pytest.raises(SourceChanged, match=f"s.parquet: {message}"):
        source.read(0)
    with pytest.raises(BetonError, match=f"{message}.*not to blame"):
        convert(source, tmp_path / "out.beton", on_error="quarantine")
    assert not (tmp_path / "out.beton").exists() and not (tmp_path / "out.beton.rejects.jsonl").exists()


def test_no_file_handles_are_no_damage(photo_folder, tmp_path, monkeypatch):
    """pyarrow's error when the process may open no more files keeps its number, and ends a run under quarantine."""
    source = open_source(write_rows(photo_folder, tmp_path / "s.parquet", 50))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        with pytest.raises(OSError, match="s.parquet: row group 0 cannot be read") as raised:
            source.read(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised.value.errno == errno.EMFILE and not isinstance(raised.value, SourceError)
    assert source.read(0) == photo_folder.read(0)
    fail(monkeypatch, 1000, raised.value, group=1)
    with pytest.raises(BetonError, match="s.parquet row 50: .*row group 0 cannot be read.*not to blame"):
        convert(source, tmp_path / "out.beton", on_error="quarantine")


def test_too_little_memory_is_no_damage(photo_folder, tmp_path, monkeypatch):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source = open_source(write_rows(photo_folder, tmp_path / "s.parquet", 50))

    def read_row_group(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 128000000 failed")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    with pytest.raises(MemoryError):
        source.read(0)


def test_no_file_stays_open_and_no_memory_kept(photo_folder, tmp_path):
    path = write_rows(photo_folder, tmp_path / "s.parquet", 50)

    def handles() -> int:
        open_files = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return open_files.count(str(path.resolve()))

    source = open_source(path)
    assert handles() == 0
    for i in (0, 60, 239):
        source.read(i)
    assert handles() == 0 and len(source._cache) == 3
    source.release(but_for=61)
    assert list(source._cache) == [1]
    source.close()
    assert not source._cache
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(SourceError):
        open_source(path)
    assert handles() == 0
