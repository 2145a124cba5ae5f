"""Hostile betons: the fuzzer (tests/fuzz_beton.py) finds nothing, would find what is planted, and every case that once
failed is kept."""

from __future__ import annotations

import json
import os
import re
import stat
import tracemalloc
from pathlib import Path

import fuzz_beton
import numpy as np
import pytest
from fuzz_beton import Base, run, run_case

from tl_fast.beton import reader as beton
from tl_fast.beton import verify as checks
from tl_fast.beton.layout import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE,
    INDEX,
    INDEX_MAGIC,
    LABEL_MAP,
    BetonError,
    metadata_dtype,
    spec_to_arguments,
)
from tl_fast.beton.reader import BetonReader
from tl_fast.beton.tables import MAX_INFO, BetonTables
from tl_fast.beton.verify import verify
from tl_fast.labelmaps.format import MapSpec

WORKERS = len(os.sched_getaffinity(0))
FIELDS = {  # what a message may name: every one of these checks is reached by the fuzzer
    "header",
    "version",
    "num_fields",
    "page_size",
    "num_samples",
    "alloc_table_ptr",
    "field",
    "fields",
    "head_crc",
    "metadata_crc",
    "alloc_crc",
    "info_crc",
    "ids_crc",
    "info_ptr",
    "ids_ptr",
    "info",
    "ids",
    "allocation table",
    "image",
    "label",
    "label_map",
    "mask",
    "crc",
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Base]:
    folder = tmp_path_factory.mktemp("bases")
    fuzz_beton.make_bases(folder)
    return {path.stem: Base(path) for path in sorted(folder.glob("*.beton"))}


def expect_no_failures(report: fuzz_beton.Report, cases: int) -> None:
    assert not report.failures, "\n".join(
        f"case {case}: {failure}" for case, failure in sorted(report.failures.items())
    )
    assert sum(report.outcomes.values()) == cases
    assert min(report.outcomes[outcome] for outcome in ("open", "read", "verify", "harmless", "accepted")) > cases / 500


def test_two_thousand_cases() -> None:
    expect_no_failures(run(seed=1, cases=range(2000), workers=WORKERS), 2000)


@pytest.mark.slow
def test_twenty_thousand_cases() -> None:
    """40 to 65 s on two cores."""
    report = run(seed=0, cases=range(20_000), workers=WORKERS)
    expect_no_failures(report, 20_000)
    assert set(report.fields) - {""} >= FIELDS and min(report.fields[field] for field in FIELDS) > 20


# ---------------------------------------------------------------- a fuzzer that can fail


def no_bounds(self: BetonTables, start: int, size: int, field: str) -> np.ndarray:
    return self._bytes[start : start + size]


@pytest.mark.parametrize(
    ("owner", "name", "planted", "message"),
    [
        (BetonTables, "_region", no_bounds, "ValueError"),  # what numpy says instead
        (BetonReader, "check", lambda self, i: None, "its check finds nothing"),
        (BetonTables, "_check_crc", lambda self, name, data: None, "read wrong"),
        (BetonTables, "_error", lambda self, field, problem: BetonError(problem), "does not begin with file and field"),
        (BetonTables, "_error", lambda self, field, problem: KeyError(problem), "KeyError"),
        (fuzz_beton, "verify", lambda path, decode: [], "verify calls a file sound"),
        (checks, "_layout_problems", lambda reader: [], "two samples with one id"),
        (BetonReader, "has_crc", property(lambda self: False), "verify calls a file sound"),
    ],
)
def test_a_planted_bug_is_found(bases, tmp_path, monkeypatch, owner, name: str, planted, message: str) -> None:
    monkeypatch.setattr(owner, name, planted)
    found = []
    for case in range(1500):
        try:
            run_case(*fuzz_beton.draw(0, case, bases), tmp_path / "case")
        except Exception as error:  # noqa: BLE001  whatever comes out is a failure of the case
            found.append(f"{type(error).__name__}: {error}")
            if re.search(message, found[-1]):
                return
    pytest.fail(f"{message!r} is not among {found}")


PLANT = """
import ctypes, time
import numpy as np
from tl_fast.beton.tables import BetonTables
fuzz_beton.SECONDS = 1
right = BetonTables._error
def wrong(self, field, problem):
    if field == "page_size":
        {}
    return right(self, field, problem)
BetonTables._error = wrong
"""


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("ctypes.string_at(0)", "ended with code -11:\nFatal Python error: Segmentation fault"),
        ("time.sleep(60)", "ended with code 1:\nTimeout"),
        ("np.zeros(400 << 20, np.uint8)", "_ArrayMemoryError"),
    ],
)
def test_a_planted_crash_hang_or_allocation_is_found(action: str, message: str) -> None:
    report = run(seed=0, cases=range(600), workers=1, prelude=PLANT.format(action), failures=1)
    assert len(report.failures) == report.outcomes["failed"] > 0
    assert all(message in failure for failure in report.failures.values())


def test_planted_memory_is_found(bases, tmp_path, monkeypatch) -> None:
    right = BetonReader.crc
    monkeypatch.setattr(BetonReader, "crc", lambda self, i: (bytearray(4 << 20), right(self, i))[1])
    with pytest.raises(fuzz_beton.Violation, match="bytes of memory"):
        run_case(bases["maps"], [], tmp_path / "case", tight=True)


# ---------------------------------------------------------------- cases that once failed


def of_map(base: Base, sample: int, values: bytes) -> list:
    """An operation that overwrites the beginning of the sample's label map."""
    at, width = base.spots[f"row{sample}.f2.ptr"]
    return ["set", int.from_bytes(base.data[at : at + width], "little"), values.hex()]


JSON = ['{"class_names": ["a", "b", "c", "d", "e", "f", ', '"\\ud800"', 1, '], "annotator": null}']
KEPT = {
    "type of the crc field damaged: read as a stock file, without CRCs": (
        "one",
        [["put", "field2.type", 0]],
        "open",
        "field",
    ),
    "the same, with a type that takes arguments": ("plain", [["put", "field2.type", 6]], "open", "field"),
    "the same, with label maps": ("square", [["put", "field3.type", 0]], "open", "field"),
    "index zeroed": ("plain", [["zero", 24 + 2 * 1041 + 17, 1024]], "open", "field"),
    "crc field zeroed": ("one", [["zero", 24 + 2 * 1041, 1041]], "open", "field"),
    "one field less in a file of one sample": ("one", [["put", "header.num_fields", 2]], "open", "fields"),
    "label maps with classes beyond C pass verify": (
        "square",
        lambda base: [of_map(base, 1, b"\xff\xff"), ["seal", "samples"]],
        "read",
        "label_map",
    ),
    "signalling NaN": ("maps", [["put", "row1.f2.score_min", 0xFF_BF_FF_FE], ["seal", "samples"]], "open", "label_map"),
    "scores beyond float32": (
        "maps",
        [["put", "row1.f2.score_step", 0x7E_00_00_00], ["seal", "tables"]],
        "open",
        "label_map",
    ),
    "negative step": ("maps", [["put", "row1.f2.score_step", 0xBF_00_00_00], ["seal", "tables"]], "open", "label_map"),
    "half a surrogate pair in the class names": (
        "plain",
        [["json", "info", *JSON], ["seal", "tables"]],
        "open",
        "info",
    ),
    "half a surrogate pair in the ids": (
        "plain",
        [["json", "ids", "[", '"\\udfff",', 5, '"a"]'], ["seal", "tables"]],
        "read",
        "ids",
    ),
    "two samples with one id": (
        "plain",
        [["json", "ids", "[", '"a",', 5, '"a"]'], ["seal", "tables"]],
        "verify",
        "ids",
    ),
    "ids in UTF-16": (
        "plain",
        [["json", "ids", "[\0", '"\0a\0"\0,\0', 5, '"\0b\0"\0]\0'], ["seal", "tables"]],
        "read",
        "ids",
    ),
    "info of many lists, 21 times as large in memory": (
        "plain",
        [["json", "info", "[", "[],", 60_000, "[]]"], ["seal", "tables"]],
        "open",
        "info",
    ),
    "ids of many lists": ("plain", [["json", "ids", "[", "[],", 60_000, "[]]"], ["seal", "tables"]], "read", "ids"),
    "one id as long as the file, of wide characters": (
        "plain",
        [["json", "ids", "[", '"a",', 4, f'"{"b" * 150_000}\xf0\x9f\x98\x80","c"]'], ["seal", "tables"]],
        "verify",
        "ids",
    ),
    "unprintable field name in the message": ("maps", [["set", 25, "04"]], "open", "field"),
    "field name with a colon": ("maps", [["set", 24, "7d2c2022636c6173735f6e616d6573223a"]], "open", "field"),
    "class names for fewer classes than the label maps have": (
        "maps",
        [["json", "info", '{"class_names": ["a"', ',"b"', 9, '], "annotator": null}'], ["seal", "tables"]],
        "open",
        "info",
    ),
    "label map where the JPEG is": (
        "square",
        [["take", "row0.f2.ptr", "row0.f0.data_ptr"], ["seal", "tables"]],
        "open",
        "label_map",
    ),
    "allocation without a sample": (
        "plain",
        [["put", "alloc2.sample_id", 6], ["seal", "tables"]],
        "open",
        "allocation table",
    ),
    "allocation that no field points to": (
        "plain",
        [["entries", 5, 1], ["put", "row5.f0.data_ptr", 0], ["seal", "tables"]],
        "open",
        "allocation table",
    ),
    "info within a sample's data": (
        "plain",
        [["take", "index.info_ptr", "row0.f0.data_ptr"], ["seal", "tables"]],
        "open",
        "info",
    ),
    "height that is not the JPEG's": ("plain", [["put", "row2.f0.height", 11], ["seal", "tables"]], "verify", "image"),
    "planes in a file whose image field is ffcv's": (
        "planes",
        [["put", "field0.type", 2], ["seal", "tables"]],
        "open",
        "field",
    ),
    "planes of another height": ("planes", [["put", "row2.f0.height", 12], ["seal", "tables"]], "open", "image"),
    "planes in a shorter allocation": ("planes", [["put", "alloc1.size", 9], ["seal", "tables"]], "open", "image"),
    "a JPEG said to be planes": ("planes", [["put", "row3.f0.mode", 2], ["seal", "tables"]], "open", "image"),
    "planes said to be a JPEG": ("planes", [["put", "row1.f0.mode", 0], ["seal", "samples"]], "verify", "image"),
    "planes said to be raw RGB": ("planes", [["put", "row1.f0.mode", 1], ["seal", "tables"]], "open", "image"),
    "an unknown mode": ("plain", [["put", "row1.f0.mode", 2], ["seal", "tables"]], "open", "image"),
    "arguments of another's image field": ("planes", [["put", "image.magic", 7], ["seal", "tables"]], "open", "field"),
    "blocks of verify twice as large as the file": ("pages", [], "harmless", ""),
}


@pytest.mark.parametrize("name", KEPT)
def test_cases_that_once_failed(bases, tmp_path: Path, name: str) -> None:
    base, operations, outcome, field = KEPT[name]
    operations = operations(bases[base]) if callable(operations) else operations
    found = run_case(bases[base], operations, tmp_path / "case", tight=True)
    assert found == (outcome, field)


# ---------------------------------------------------------------- what the operations cannot make


def sealed(tmp_path: Path, base: Base, operations: list) -> Path:
    path = tmp_path / "file.beton"
    path.write_bytes(fuzz_beton.apply(base, [*operations, ["seal", "samples"]]))
    return path


def test_files_that_are_no_files(tmp_path: Path) -> None:
    pipe, empty = tmp_path / "pipe", tmp_path / "empty"
    os.mkfifo(pipe)
    empty.touch()
    for path, message in (
        (pipe, "not a regular file"),
        (tmp_path, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (empty, "has 0 bytes"),
    ):
        for read in (BetonReader, verify):
            with pytest.raises(BetonError, match=rf"^{path}: header: .*{message}"):
                read(path)
    with pytest.raises(FileNotFoundError):
        BetonReader(tmp_path / "none")


def test_links_and_permissions(bases, tmp_path: Path) -> None:
    path, link = tmp_path / "file.beton", tmp_path / "link"
    path.write_bytes(bases["plain"].data)
    link.symlink_to(path)
    assert len(BetonReader(link)) == 6 and verify(link) == []
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(OSError, match="symbolic links"):
        BetonReader(link)
    path.chmod(stat.S_IWUSR)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(PermissionError):
        BetonReader(path)


def test_verify_survives_a_file_that_is_shortened(bases, tmp_path: Path) -> None:
    """A reader's mapping would end the process with SIGBUS here; verify reads, and says which samples are gone."""
    path = tmp_path / "file.beton"
    path.write_bytes(bases["many"].data)
    with BetonReader(path) as reader:
        places = np.stack(reader._places(0, len(reader)))
    right = checks._read_block

    for first_gone, cut in ((100, int(places[0, 0, 100])), (0, 0)):

        def read_cut(*arguments, cut=cut):
            os.truncate(path, cut)
            return right(*arguments)

        path.write_bytes(bases["many"].data)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checks, "_read_block", read_cut)
            problems = verify(path)
        assert [int(problem.split("sample ")[1].split()[0]) for problem in problems] == list(range(first_gone, 120))
        assert all(f"{path}: image: sample" in problem and "shortened" in problem for problem in problems)


def test_verify_reports_each_bad_sample_once(bases, tmp_path: Path) -> None:
    base = bases["many"]
    data = bytearray(base.data)
    starts = np.frombuffer(base.data[base.regions["alloc"][0] :], ALLOCATION)["ptr"]
    for i in (3, 64, 119):
        data[int(starts[2 * i]) + 40] ^= 1
    data[int(starts[2 * 64 + 1])] ^= 255  # its label map too
    (tmp_path / "file.beton").write_bytes(data)
    for workers, decode in ((1, False), (3, True)):
        problems = verify(tmp_path / "file.beton", decode=decode, workers=workers)
        assert [problem.split(" (")[0] for problem in problems] == [
            f"{tmp_path}/file.beton: crc: sample {i}" for i in (3, 64, 119)
        ]


def test_verify_names_samples_that_cross_a_page(bases, tmp_path: Path) -> None:
    """Stock ffcv's process cache would read them wrong."""
    base = bases["pages"]
    path = tmp_path / "file.beton"
    page = int(np.frombuffer(base.data[:24], HEADER)["page_size"][0])
    at, width = base.spots["row1.f0.data_ptr"]
    assert int.from_bytes(base.data[at : at + width], "little") == page  # two of its samples do not fit in one
    assert not any("page_size" in problem for problem in verify(sealed(tmp_path, base, [])))
    problems = verify(sealed(tmp_path, base, [["move", 2, page - 2]]))
    assert problems[0].startswith(
        f"{path}: page_size: the data of 1 samples, sample 1 (n01/é 1.jpg) first, lie in several pages"
    )


def test_verify_names_unused_allocations(bases, tmp_path: Path) -> None:
    """A region that no sample points to, given to a sample: in the gap that the first page ends with."""
    base = bases["pages"]
    with BetonReader(sealed(tmp_path, base, [])) as reader:
        gap = int(reader._map_ptr[0] + reader._map_size[0])
    entry = np.array([(0, gap, 100)], ALLOCATION).tobytes().hex()
    problems = verify(sealed(tmp_path, base, [["grow", entry, 1]]))
    assert (
        len(problems) == 1
        and f"allocation table: 1 entries with 100 bytes, at {gap} first, are no sample's data" in problems[0]
    )


def test_decoding_takes_no_memory_for_pixels_that_are_not_there(bases, tmp_path: Path) -> None:
    """A JPEG of 700 bytes that says it is 65,500 × 65,500: 12.9 GB of pixels."""
    base = bases["plain"]
    at, width = base.spots["row1.f0.data_ptr"]
    start = int.from_bytes(base.data[at : at + width], "little")
    frame = base.data.index(b"\xff\xc0", start)
    side = (65_500).to_bytes(2, "big").hex()
    operations = [
        ["put", "row1.f0.height", 65_500],
        ["put", "row1.f0.width", 65_500],
        ["set", frame + 5, side],
        ["set", frame + 7, side],
    ]
    path = sealed(tmp_path, base, operations)
    assert verify(path) == []
    tracemalloc.start()
    problems = verify(path, decode=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(problems) == 1 and "image: sample 1" in problems[0] and "65500×65500" in problems[0] and peak < 1 << 20


def test_info_is_limited(bases, tmp_path: Path) -> None:
    names = '{"class_names": ["0","1","2","3","4","5","6'
    for length, right in ((MAX_INFO // 2, True), (2 * MAX_INFO, False)):
        path = sealed(tmp_path, bases["plain"], [["json", "info", names, "x", length, '"], "annotator": null}']])
        if right:
            assert len(BetonReader(path).class_names[6]) == length + 1
        else:
            with pytest.raises(BetonError, match=f"info_size: {length + len(names) + 22} bytes, at most"):
                BetonReader(path)


@pytest.mark.parametrize("stride", [100, 10])
def test_memory_stays_below_the_files_size_where_tables_are_most_of_it(tmp_path: Path, stride: int) -> None:
    """Samples of `stride` bytes: no JPEG is that small, so files are never worse. Tables, ids and verify's own
    arrays."""
    n, path = 100_000, tmp_path / "tables.beton"
    fields = np.zeros(4, FIELD)
    fields["name"], fields["type_id"] = [b"image", b"label", b"label_map", b"crc"], [2, 1, 255, 1]
    fields["arguments"][2] = spec_to_arguments(MapSpec(1, 1, 1, 10))
    metadata = np.zeros(n, metadata_dtype([IMAGE, np.dtype("<i8"), LABEL_MAP, np.dtype("<i8")]))
    start = HEADER.itemsize + fields.nbytes + metadata.nbytes
    places = start + np.arange(n) * stride
    metadata["f0"]["width"], metadata["f0"]["height"] = 1, 1
    metadata["f0"]["data_ptr"], metadata["f2"]["ptr"] = places, places + stride - 3
    table = np.zeros(2 * n, ALLOCATION)
    table["sample_id"] = np.arange(2 * n) // 2
    table["ptr"][::2], table["ptr"][1::2], table["size"][::2], table["size"][1::2] = (
        places,
        places + stride - 3,
        stride - 3,
        3,
    )
    info = b'{"annotator": null, "class_names": []}'
    ids = json.dumps([f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(n)]).encode()
    after = start + n * stride
    index = np.array([(INDEX_MAGIC, after, len(info), after + len(info), len(ids), 0, 0, 0, 0, 0)], INDEX)
    fields["arguments"][3, : INDEX.itemsize] = index.view(np.uint8)
    header = np.array([(2, 4, 1 << 21, n, after + len(info) + len(ids))], HEADER)
    parts = [header.tobytes(), fields.tobytes(), metadata.tobytes(), bytes(n * stride), info, ids, table.tobytes()]
    data = bytearray(b"".join(parts))
    fuzz_beton.seal(data, samples=False)
    path.write_bytes(data)
    tracemalloc.start()
    with BetonReader(path) as reader:
        assert len(reader.source_ids) == n
        checks._layout_problems(reader)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (1 if stride == 100 else 1.5) * len(data) + (1 << 20)


def test_the_reader_that_a_case_needs_is_the_installed_one() -> None:
    """The workers' own process must test this checkout."""
    assert Path(fuzz_beton.__file__).parent == Path(__file__).parents[1]
    prelude = f"from tl_fast.beton import reader; assert reader.__file__ == {beton.__file__!r}"
    report = run(seed=0, cases=range(1), workers=1, prelude=prelude)
    assert sum(report.outcomes.values()) == 1
