"""Conversions that do not end well: killed at any moment, full disks, bad samples; what is left, and how the next run
goes on."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_betons import random_maps

from tl_fast.beton.layout import BetonError
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.verify import verify
from tl_fast.convert import partial_file, resumable
from tl_fast.convert.encode import Sample
from tl_fast.convert.write import CHUNK, TooManyRejects, WriteSummary, write_beton
from tl_fast.labelmaps.format import MapSpec

SPEC = MapSpec(k=2, height=3, width=4, num_classes=50)
NAMES = [f"class {i}" for i in range(50)]
PAGE = 1 << 21
PARTS = [".out.beton.journal", ".out.beton.partial"]


def make_samples(jpegs: list[bytes], count: int, bad: dict[int, bytes] | None = None) -> list[Sample]:
    """`count` samples with label maps; those in `bad` have these bytes for an image."""
    maps = random_maps(8, SPEC)
    images = {i: jpegs[i % len(jpegs)] for i in range(count)} | (bad or {})
    return [
        Sample(
            f"{i}.jpg",
            i % 50,
            lambda i=i: images[i],
            lambda i=i: maps[i % 8],
            f"photos/{i}.jpg",
            stamp=str(len(images[i])),
        )
        for i in range(count)
    ]


def write(path: Path, samples: list[Sample], **options) -> WriteSummary:
    return write_beton(path, samples, class_names=NAMES, spec=SPEC, page_size=PAGE, **{"workers": 1, **options})


def content(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def die_at(count: int) -> Callable[[], None]:
    """SIGKILL to ourselves right before the `count`-th call that changes the disk."""
    left = [count]
    for name in ("pwrite", "fsync", "fdatasync", "replace", "ftruncate", "unlink"):

        def counted(*arguments, call=getattr(os, name), **options):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        setattr(os, name, counted)
    return lambda: None


@contextlib.contextmanager
def commits():
    """Every chunk is committed, however slow the disk is: as many calls and records on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "COMMIT_SECONDS", 0.0)
        patch.setattr(partial_file.PartialFile, "committing", property(lambda self: self.wait() is not None))
        yield


def convert_in_child(
    path: Path, images: list[bytes], count: int, commit_seconds: float, death: int | None, nap: float
) -> None:
    resumable.COMMIT_SECONDS = commit_seconds
    samples = make_samples(images, count, bad={17: b"no image"})
    with commits() if death is not None else contextlib.nullcontext():
        if death is not None:
            die_at(death)
        write(path, slowed(samples, nap), resume=True, on_error="quarantine")


def slowed(samples: list[Sample], nap: float) -> list[Sample]:
    return [
        Sample(s.source_id, s.label, lambda s=s: time.sleep(nap) or s.image(), s.label_map, s.origin, s.stamp)
        for s in samples
    ]


# Forked, so that a child starts in milliseconds with everything imported and compiled. It uses threads of its own only.
CHILDREN = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def check_after_death(path: Path) -> bool:
    """Whatever happened: no file at the final name, or a sound one. True when it is there."""
    if path.exists():
        assert verify(path, decode=True) == []
        return True
    return False


def test_killed_before_every_write(jpegs: list[bytes], tmp_path: Path) -> None:
    """A fresh conversion dies before its n-th call that changes the disk, for every n; the run after it makes the same
    file."""
    path, expected = tmp_path / "out.beton", tmp_path / "expected.beton"
    write(expected, make_samples(jpegs, 100, bad={17: b"no image"}), on_error="quarantine")
    deaths, finished = 0, False
    while not finished:
        for file in (path, *partial_file.partial_paths(path), path.with_name("out.beton.rejects.jsonl")):
            file.unlink(missing_ok=True)
        child = CHILDREN.Process(target=convert_in_child, args=(path, jpegs, 100, 0.0, deaths, 0.0))
        child.start()
        child.join()
        finished = child.exitcode == 0
        assert finished or child.exitcode == -signal.SIGKILL
        if not check_after_death(path):
            write(path, make_samples(jpegs, 100, bad={17: b"no image"}), on_error="quarantine", resume=True)
        assert path.read_bytes() == expected.read_bytes()
        assert json.loads(path.with_name("out.beton.rejects.jsonl").read_text())["id"] == "17.jpg"
        deaths += not finished
    assert deaths > 40


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_killed_at_random_moments(jpegs: list[bytes], tmp_path: Path) -> None:
    """50 kills at random times, runs resumed until they finish: the files are those of uninterrupted runs, and work was
    kept."""
    path, expected, count = tmp_path / "out.beton", tmp_path / "expected.beton", 300
    write(expected, make_samples(jpegs, count, bad={17: b"no image"}), on_error="quarantine")
    rng, kills, resumed = random.Random(0), 0, 0
    while kills < 50:
        child = CHILDREN.Process(target=convert_in_child, args=(path, jpegs, count, 0.02, None, 0.002))
        child.start()
        child.join(rng.uniform(0.05, 0.6))
        child.kill()
        child.join()
        kills += child.exitcode != 0
        if check_after_death(path):
            assert path.read_bytes() == expected.read_bytes()
            for file in (path, *partial_file.partial_paths(path)):
                file.unlink(missing_ok=True)
        elif partial_file.partial_paths(path)[1].exists():
            resumed += partial_file.partial_paths(path)[1].stat().st_size > 2000
    write(path, make_samples(jpegs, count, bad={17: b"no image"}), on_error="quarantine", resume=True)
    assert path.read_bytes() == expected.read_bytes() and resumed > 10


def test_a_bad_sample_stops_the_run_and_resume_goes_on_behind_it(jpegs: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "out.beton"
    whole = write(tmp_path / "expected.beton", make_samples(jpegs, 200))
    with commits(), pytest.raises(BetonError, match=r"^photos/150\.jpg: not an image") as caught:
        write(path, make_samples(jpegs, 200, bad={150: b"broken"}))
    assert "150 samples are done" in caught.value.__notes__[0] and content(tmp_path) == [*PARTS, "expected.beton"]
    read = []
    samples = [
        Sample(s.source_id, s.label, lambda s=s: read.append(s.source_id) or s.image(), s.label_map, s.origin, s.stamp)
        for s in make_samples(jpegs, 200)
    ]
    summary = write(path, samples, resume=True)
    assert read == [f"{i}.jpg" for i in range(150, 200)] and summary.resumed == 150 and summary.samples == 200
    assert path.read_bytes() == (tmp_path / "expected.beton").read_bytes() and content(tmp_path) == [
        "expected.beton",
        "out.beton",
    ]
    assert (summary.copied, summary.image_bytes, summary.label_map_bytes) == (
        whole.copied,
        whole.image_bytes,
        whole.label_map_bytes,
    )


def test_resume_refuses_other_settings_and_other_inputs(jpegs: list[bytes], tmp_path: Path) -> None:
    path = tmp_path / "out.beton"

    def interrupt() -> None:
        with commits(), pytest.raises(BetonError):
            write(path, make_samples(jpegs, 100, bad={90: b"broken"}))
        assert content(tmp_path) == PARTS

    interrupt()
    with pytest.raises(BetonError, match=r"other settings \(quality\); quality was 90 and now 80"):
        write(path, make_samples(jpegs, 100), quality=80, resume=True)
    with pytest.raises(BetonError, match=r"other settings \(samples\)"):
        write(path, make_samples(jpegs, 101), resume=True)
    changed = make_samples(jpegs, 100)
    changed[3] = Sample("3.jpg", 3, changed[3].image, changed[3].label_map, stamp="another time")
    with pytest.raises(BetonError, match="the first 90 samples .* are not those"):
        write(path, changed, resume=True)
    assert content(tmp_path) == PARTS
    changed = make_samples(jpegs, 100)
    changed[95] = Sample("95.jpg", 7, changed[5].image, changed[5].label_map, stamp="not yet read")
    write(path, changed, resume=True)  # what changed had not been read
    with BetonReader(path) as reader:
        assert reader.labels[95] == 7 and verify(path) == []
    path.unlink()
    interrupt()
    assert write(path, make_samples(jpegs, 100, bad={90: jpegs[0]})).resumed == 0  # without --resume: anew


@pytest.mark.parametrize("damage", ["torn", "flipped", "cut file", "no file", "no journal"])
def test_damaged_remains_cost_work_and_nothing_else(jpegs: list[bytes], tmp_path: Path, damage: str) -> None:
    path, expected = tmp_path / "out.beton", tmp_path / "expected.beton"
    partial, journal = partial_file.partial_paths(path)
    write(expected, make_samples(jpegs, 200))
    with commits(), pytest.raises(BetonError):
        write(path, make_samples(jpegs, 200, bad={190: b"broken"}))
    records = journal.read_bytes()
    if damage == "torn":
        journal.write_bytes(records[:-5])
    elif damage == "flipped":
        journal.write_bytes(
            records[: len(records) // 2] + bytes([records[len(records) // 2] ^ 1]) + records[len(records) // 2 + 1 :]
        )
    elif damage == "cut file":
        os.truncate(partial, partial.stat().st_size // 2)
    else:
        (partial if damage == "no file" else journal).unlink()
    summary = write(path, make_samples(jpegs, 200), resume=True)
    assert path.read_bytes() == expected.read_bytes()
    assert summary.resumed == 0 if damage.startswith("no ") else 0 < summary.resumed < 190


def test_quarantine_lists_every_bad_sample(jpegs: list[bytes], tmp_path: Path) -> None:
    samples = make_samples(jpegs, 60, bad={7: b"text", 30: jpegs[30][:5000]})
    samples[9] = Sample("9.jpg", 9, samples[9].image)
    samples[11] = Sample("11.jpg", 11, samples[11].image, lambda: np.array((np.nan, 1, 0, 0), SPEC.dtype)[()])
    samples[13] = Sample("13.jpg", 13, lambda: Path("/no/such/file").read_bytes(), samples[13].label_map)
    samples[15] = Sample("15.jpg", 15, lambda: os.urandom(PAGE) + b"", samples[15].label_map)
    samples[20] = Sample("caf\udce9.jpg", 20, samples[20].image, samples[20].label_map)
    path = tmp_path / "out.beton"
    files = []
    for workers in (1, 3):
        summary = write(path, samples, on_error="quarantine", max_rejects=7, workers=workers, overwrite=True)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    assert (summary.samples, summary.rejected) == (53, 7)
    rejects = [json.loads(line) for line in (tmp_path / "out.beton.rejects.jsonl").read_text().splitlines()]
    assert [reject["id"] for reject in rejects] == [
        "7.jpg",
        "9.jpg",
        "11.jpg",
        "13.jpg",
        "15.jpg",
        "caf\udce9.jpg",
        "30.jpg",
    ]
    for reject, words in zip(
        rejects,
        ("not an image", "no label map", "finite", "No such file", "not an image", "UTF-8", "JPEG"),
        strict=True,
    ):
        assert words in reject["reason"] and "\n" not in reject["reason"]
    assert rejects[0]["origin"] == "photos/7.jpg"
    with BetonReader(path) as reader:
        assert reader.source_ids == [
            s.source_id for s in samples if s.source_id not in {reject["id"] for reject in rejects}
        ]
        for i, sample_id in enumerate(reader.source_ids):
            assert reader.labels[i] == int(sample_id.split(".")[0]) % 50
    assert verify(path, decode=True) == []
    write(path, make_samples(jpegs, 60), on_error="quarantine", overwrite=True)
    assert content(tmp_path) == ["out.beton"]  # the list was of a file that is no more


def test_too_many_rejects_keep_the_work(jpegs: list[bytes], tmp_path: Path) -> None:
    path, samples = tmp_path / "out.beton", make_samples(jpegs, 50, bad={3: b"", 40: b"text"})
    with pytest.raises(
        TooManyRejects, match=r"2 of 50 samples are bad and --max-rejects allows 1.*out\.beton\.rejects\.jsonl"
    ):
        write(path, samples, on_error="quarantine", max_rejects=1)
    assert content(tmp_path) == [*PARTS, "out.beton.rejects.jsonl"]
    assert len((tmp_path / "out.beton.rejects.jsonl").read_text().splitlines()) == 2
    summary = write(path, samples, on_error="quarantine", max_rejects=2, resume=True)
    assert (summary.resumed, summary.samples, summary.rejected) == (50, 48, 2) and verify(path) == []
    with pytest.raises(BetonError, match="all 3 samples are bad, the first: not an image"):
        write(tmp_path / "none.beton", make_samples(jpegs, 3, bad=dict.fromkeys(range(3), b"")), on_error="quarantine")
    for options, message in (
        ({"max_rejects": 3}, "needs on_error"),
        ({"on_error": "quarantine", "max_rejects": -1}, "0 or more"),
        ({"on_error": "skip"}, "on_error"),
    ):
        with pytest.raises(BetonError, match=message):
            write(tmp_path / "no.beton", samples, **options)


@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "fsync", "replace"])
def test_a_full_disk_loses_nothing(
    jpegs: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The disk fills up midway: the message says so, what is there stays, and the run goes on when there is room."""
    path = tmp_path / "out.beton"
    write(tmp_path / "expected.beton", make_samples(jpegs, 100))
    path.write_bytes((tmp_path / "expected.beton").read_bytes()[:1000])  # an earlier file, to be replaced
    calls, real = [], getattr(os, call)

    def full(*arguments, **options):
        calls.append(call)
        if len(calls) > {"pwrite": 6, "fdatasync": 4}.get(call, 0):
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **options)

    with commits(), monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(
            BetonError, match=r"out\.beton: cannot be written \(.*No space left.*free some space"
        ) as caught:
            write(path, slowed(make_samples(jpegs, 100), 0.003), overwrite=True)
    assert "--resume" in caught.value.__notes__[0]
    assert path.stat().st_size == 1000 and content(tmp_path) == [*PARTS, "expected.beton", "out.beton"]
    assert write(path, make_samples(jpegs, 100), overwrite=True, resume=True).resumed >= 16
    assert path.read_bytes() == (tmp_path / "expected.beton").read_bytes() and content(tmp_path) == [
        "expected.beton",
        "out.beton",
    ]


def test_the_machine_is_not_the_samples_fault(jpegs: list[bytes], tmp_path: Path) -> None:
    """With no file handles left every sample would look bad: that ends the run, also under quarantine."""

    def no_handles() -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    samples = make_samples(jpegs, 20)
    samples[4] = Sample("4.jpg", 4, no_handles, samples[4].label_map, "photos/4.jpg")
    with pytest.raises(BetonError, match=r"photos/4\.jpg: .*Too many open files.*not to blame"):
        write(tmp_path / "out.beton", samples, on_error="quarantine")
    assert content(tmp_path) == []


def test_memory_does_not_grow_with_the_data_set(tmp_path: Path) -> None:
    """Samples in flight are bounded: a source that is far ahead of a slow writer would hold thousands."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    alive, most = set(), [0]

    class Image1(bytes):
        def __init__(self, _: bytes) -> None:
            alive.add(id(self))
            most[0] = max(most[0], len(alive))

        def __del__(self) -> None:
            alive.discard(id(self))

    samples = [Sample(str(i), 0, lambda: Image1(buffer.getvalue())) for i in range(2000)]
    write_beton(tmp_path / "out.beton", samples, class_names=["a"], workers=2)
    assert 0 < most[0] <= CHUNK * (2 * 2 + 2)
