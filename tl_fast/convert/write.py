"""Writing a .beton: in one pass, on threads or processes, to a temporary file that takes the final name only when it is
whole.

ffcv's writer loop is not used: it hangs when a worker dies, leaves torn files that look whole, and its output depends
on the workers' timing. Here workers read and encode, and one thread lays out and writes in the samples' order, so the
bytes are the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

import tl_fast
from tl_fast.beton.layout import MAX_INFO, MAX_PAGE_SIZE, MIN_PAGE_SIZE, BetonError
from tl_fast.convert.block_writer import BlockWriter
from tl_fast.convert.data_file import BetonFile, Encoded
from tl_fast.convert.encode import Sample, SampleSource, compile_kernels, encode
from tl_fast.convert.partial_file import PartialFile
from tl_fast.convert.processes import Forked, ProcessDied
from tl_fast.labelmaps.format import MapSpec
from tl_fast.sources.rejects import list_beside, reason_of, reject_lines, write_rejects
from tl_fast.system.cores import usable_cores
from tl_fast.system.threads import ordered_map

PAGE_SIZE = 8 << 20  # ffcv's default, bytes
CHUNK = 16  # samples per task: handing one to a thread and back costs some 50 µs
COMMIT_SECONDS = 2.0  # how much work a kill may cost


@dataclasses.dataclass(frozen=True)
class WriteSummary:
    """What `write_beton` did.

    Images `copied`, `transcoded` without loss, `reencoded`, `resized` (and encoded); of those, `stripped` of metadata,
    `rotated` (with an EXIF orientation, ignored or applied as asked) and `row_indexed` (regions can be cut out of them;
    0 when not asked for). `rejected`: samples left out. `resumed`: samples taken from an earlier run. Sizes in bytes,
    wall time in seconds.
    """

    samples: int
    copied: int
    transcoded: int
    reencoded: int
    resized: int
    stripped: int
    rotated: int
    row_indexed: int
    rejected: int
    resumed: int
    image_bytes: int
    label_map_bytes: int
    file_bytes: int
    seconds: float


class TooManyRejects(BetonError):
    """More samples were rejected than `max_rejects` allows; what was done is kept for a run with `resume`."""


COUNTS = (
    "copied",
    "transcoded",
    "re-encoded",
    "resized",
    "stripped",
    "rotated",
    "row_indexed",
    "image_bytes",
    "label_map_bytes",
)


class Writer:
    """One run of `write_beton`: what has been taken from the source, what became of it, and how to go on from there
    after a kill.
    """

    def __init__(self, partial: PartialFile, file: BetonFile, class_names: Sequence[str]) -> None:
        self.partial, self.file, self.class_names = partial, file, class_names
        self.digest = hashlib.blake2b(digest_size=16)  # of the inputs taken so far
        self.ids: list[str] = []  # of the samples written
        self.seen: set[str] = set()  # and of those taken
        self.rejects: list[dict[str, str]] = []
        self.counts = dict.fromkeys(COUNTS, 0)
        self.taken = 0
        self._committed = (0, 0, 0)  # samples, allocations, rejects
        self._commit_time = time.monotonic()

    def restore(self, source: Iterator[Sample]) -> None:
        """Go on from the last commit. Raises BetonError when the samples up to there are not those of the earlier
        run.
        """
        if not self.partial.records:
            return
        head = self.partial.records[-1][0]
        columns: tuple[list[bytes], ...] = ([], [], [])
        for part, data in self.partial.records:
            splits = np.cumsum(part["parts"])
            for column, start, end in zip(columns, (0, *splits), splits, strict=False):
                column.append(data[start:end])
        metadata, allocations, rejects = map(b"".join, columns)
        self.file.restore(head["size"], metadata, allocations)
        self.rejects = [json.loads(line) for line in rejects.splitlines()]
        rejected = {reject["id"] for reject in self.rejects}
        for sample in itertools.islice(source, head["taken"]):
            self._take(sample)
            self.seen.add(sample.source_id)
            if sample.source_id not in rejected:
                self.ids.append(sample.source_id)
        if self.digest.hexdigest() != head["digest"]:
            raise BetonError(
                f"{self.partial.path}: cannot be resumed, the first {head['taken']} samples (their ids, labels, file"
                " sizes or times) are not those of the unfinished run; leave --resume out to start over"
            )
        self.counts, self.taken = head["counts"], head["taken"]
        self._committed = (self.file.samples, self.file.allocated, len(self.rejects))

    def _take(self, sample: Sample) -> None:
        self.digest.update(f"{sample.source_id}\0{sample.label}\0{sample.stamp}\n".encode("utf-8", "surrogateescape"))

    def checked(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples, as long as nothing is wrong with the data set as a whole."""
        for sample in samples:
            if sample.source_id in self.seen:
                raise BetonError(f"{sample.name}: a second sample with the id {sample.source_id!r}")
            if not -1 <= sample.label < len(self.class_names):
                raise BetonError(f"{sample.name}: label {sample.label} is not in 0..{len(self.class_names) - 1}")
            self.seen.add(sample.source_id)
            yield sample

    def add(self, sample: Sample, result: Encoded | Exception) -> Exception | None:
        """Append a sample; what is wrong with it, if something is."""
        if isinstance(result, Exception):
            return result
        if len(self.ids) == len(self.file.metadata):
            raise BetonError(
                f"{self.partial.path}: more samples than the {len(self.file.metadata)} announced; the source has"
                " changed, run again"
            )
        try:
            self.file.add(result, sample.label)
        except ValueError as error:
            return error
        self.ids.append(sample.source_id)
        counts, image = self.counts, result.image
        counts[image.action] += 1
        counts["stripped"] += image.stripped > 0
        counts["rotated"] += image.rotated
        counts["row_indexed"] += image.row_index
        counts["image_bytes"] += sum(map(len, image.parts))
        counts["label_map_bytes"] += len(result.label_map)
        return None

    def took(self, sample: Sample, problem: Exception | None = None) -> None:
        """The sample is done with; with a `problem` it was left out."""
        self._take(sample)
        self.taken += 1
        if problem is not None:
            self.rejects.append({"id": sample.source_id, "origin": sample.name, "reason": reason_of(problem)})

    def commit(self) -> None:
        """Make what was done durable, in the background."""
        self.file.flush()
        samples, allocated, rejects = self._committed
        parts = (
            self.file.metadata[samples : self.file.samples].tobytes(),
            self.file.allocations[allocated : self.file.allocated].tobytes(),
            reject_lines(self.rejects[rejects:]),
        )
        head = {
            "taken": self.taken,
            "digest": self.digest.hexdigest(),
            "counts": self.counts,
            "parts": list(map(len, parts)),
        }
        self.partial.commit(self.file.offset, head, b"".join(parts))
        self._committed = (self.file.samples, self.file.allocated, len(self.rejects))
        self._commit_time = time.monotonic()

    def commit_at_times(self) -> None:
        """`commit`, when the last one is old enough and on the disk."""
        if time.monotonic() - self._commit_time >= COMMIT_SECONDS and not self.partial.committing:
            self.commit()

    def keep(self, always: bool) -> bool:
        """The run ends early: commit what was done, unless it is too little to keep. True when another run can go on
        from it.
        """
        with contextlib.suppress(OSError):  # a full disk: then the earlier commits have to do
            if always or self.partial.resumable:
                self.commit()
        return self.partial.resumable


def library_versions() -> dict[str, str]:
    """Of everything that decides which bytes a new encode has."""
    return {name: importlib.metadata.version(name) for name in ("Pillow", "simplejpeg")} | {
        "tl_fast": tl_fast.__version__
    }


def write_beton(
    path: Path | str,
    samples: SampleSource,
    *,
    class_names: Sequence[str],
    spec: MapSpec | None = None,
    annotator: dict[str, Any] | None = None,
    conversion: dict[str, Any] | None = None,
    workers: int | None = None,
    processes: bool = False,
    max_resolution: int | None = None,
    quality: int = 90,
    decode_check: bool = True,
    row_index: bool = False,
    exif: Literal["ignore", "apply"] = "ignore",
    page_size: int = PAGE_SIZE,
    on_error: Literal["stop", "quarantine"] = "stop",
    max_rejects: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> WriteSummary:
    """Write `samples` (with a `len()`; iterated once, in order) to `path`, in one pass, in bounded memory.

    class_names: name of every label; with `spec` as many as the label maps' classes, for token targets and labels are
    of one kind. annotator, conversion: JSON-able records of how the label maps were made and of what was converted,
    kept in the file; a resumed run must have the same, but for conversion["inputs"], as every sample taken is compared
    by its own stamp. workers: threads, by default one per CPU core this process may use. processes: forked processes
    instead, which do not wait for each other's GIL; `samples` must then be a sequence, and the bytes of its images and
    label maps are asked for in those processes. Samples with `decodes_groups` are read by threads in any case.
    max_resolution, quality, decode_check, row_index, exif: see `tl_fast.convert.image.prepare`. page_size: bytes, a
    power of two; no sample may be larger. on_error: `stop` at the first bad sample, or `quarantine`: leave it out and
    list it, a JSON object a line, in `PATH.rejects.jsonl`. max_rejects: how many may be left out. resume: go on from
    what an unfinished run left (`tl_fast.convert.partial_file`), if it left something. progress: called with the
    samples taken from the source, those of them left out, and the bytes written. Raises BetonError that names the
    sample (the first bad one in the samples' order), TooManyRejects at the end; nothing bears the name `path` then.
    """
    path, started = Path(path), time.perf_counter()
    if not MIN_PAGE_SIZE <= page_size <= MAX_PAGE_SIZE or page_size & (page_size - 1):
        raise BetonError(f"page_size {page_size}: must be a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}")
    if not 1 <= quality <= 100:
        raise BetonError(f"quality {quality}: must be 1 to 100")
    if max_resolution is not None and max_resolution < 1:
        raise BetonError(f"max_resolution {max_resolution}: must be at least 1 pixel")
    workers = workers if workers is not None else usable_cores()
    if workers < 1:
        raise BetonError(f"workers {workers}: must be at least 1")
    if on_error not in ("stop", "quarantine"):
        raise BetonError(f"on_error {on_error!r}: must be stop or quarantine")
    if max_rejects is not None and (max_rejects < 0 or on_error == "stop"):
        raise BetonError(f"max_rejects {max_rejects}: must be 0 or more, and needs on_error quarantine")
    if len(samples) == 0:
        raise BetonError(f"{path}: there are no samples to write")
    if spec is not None and len(class_names) != spec.num_classes:
        raise BetonError(
            f"{path}: the label maps know {spec.num_classes} classes, the labels {len(class_names)}; token targets and"
            " labels must be of the same classes: annotate with --classes (keep the data set's classes) or --fit-head"
            " (a head for them)"
        )
    if path.exists():
        if not overwrite:
            raise BetonError(f"{path} exists; choose another name or give --overwrite")
        if not path.is_file():
            raise BetonError(f"{path} is no regular file; choose another name")
    settings = {
        # Not as one value: a resumed run says which of them differs.
        **{key: value for key, value in (conversion or {}).items() if key != "inputs"},
        "samples": len(samples),
        "class_names": list(class_names),
        "label maps": None if spec is None else spec.to_dict(),
        "annotator": annotator,
        "max_resolution": max_resolution,
        "quality": quality,
        "decode_check": decode_check,
        "row_index": row_index,
        "exif": exif,
        "page_size": page_size,
        "versions": library_versions(),
    }
    info = {"annotator": annotator, "class_names": list(class_names), "tl_fast": tl_fast.__version__}
    if conversion is not None:
        info["conversion"] = conversion
    if (size := len(json.dumps(info, ensure_ascii=False).encode("utf-8"))) > MAX_INFO:
        raise BetonError(
            f"{path}: class names and the annotator's record have {size} bytes, at most {MAX_INFO} are read; shorten"
            " them"
        )
    rejects_path = list_beside(path)
    processes = processes and not getattr(samples, "decodes_groups", False)

    begun: deque[tuple[Sample, ...]] = deque()

    def tasks(source: Iterable[Sample], start: int) -> Iterator[Sequence]:
        source = iter(source)
        while chunk := tuple(itertools.islice(source, CHUNK)):
            begun.append(chunk)
            yield range(start, start + len(chunk)) if processes else chunk
            start += len(chunk)

    def run(chunk: Iterable[Sample]) -> list[Encoded | Exception]:
        return [encode(sample, spec, max_resolution, quality, decode_check, row_index, exif) for sample in chunk]

    def run_places(places: range) -> list[Encoded | Exception]:
        results = run(samples[place] for place in places)
        return [ValueError(reason_of(result)) if isinstance(result, Exception) else result for result in results]

    compile_kernels(spec)
    try:
        with contextlib.ExitStack() as stack:
            forked = (
                stack.enter_context(Forked(workers, run_places)) if processes else None
            )  # before anything has threads and locks
            partial = stack.enter_context(PartialFile(path, settings, resume))
            blocks = stack.enter_context(BlockWriter(partial.handle, partial.partial))
            file = BetonFile(blocks, len(samples), page_size, spec)
            writer, source = Writer(partial, file, class_names), iter(samples)
            writer.restore(source)
            resumed = writer.taken
            try:
                chunks = tasks(writer.checked(source), resumed)
                with contextlib.closing(
                    forked.map(chunks) if forked else ordered_map(workers, run, chunks, ahead=2)
                ) as results:
                    for chunk in results:
                        for sample, result in zip(begun.popleft(), chunk, strict=True):
                            problem = writer.add(sample, result)
                            if problem is not None and on_error == "stop":
                                raise BetonError(f"{sample.name}: {reason_of(problem)}") from problem
                            writer.took(sample, problem)
                        file.list_rows()
                        writer.commit_at_times()
                        if progress is not None:
                            progress(writer.taken, len(writer.rejects), file.offset)
                if writer.taken != len(samples):
                    raise BetonError(
                        f"{path}: {len(samples)} samples were announced, {writer.taken} came; the source has changed,"
                        " run again"
                    )
                if max_rejects is not None and len(writer.rejects) > max_rejects:
                    raise TooManyRejects(
                        f"{path}: {len(writer.rejects)} of {len(samples)} samples are bad and --max-rejects allows"
                        f" {max_rejects}; they are listed in {rejects_path}. Mend them and run again, or allow more and"
                        " add --resume to finish with what is done"
                    )
                if not writer.ids:
                    raise BetonError(
                        f"{path}: all {len(samples)} samples are bad, the first: {writer.rejects[0]['reason']}"
                    )
                if conversion is not None:
                    info["conversion"] = {**conversion, "rejected": len(writer.rejects)}
                file.close(info, writer.ids)
                write_rejects(rejects_path, writer.rejects)
                partial.publish()
            except Exception as error:
                if isinstance(error, TooManyRejects):
                    write_rejects(rejects_path, writer.rejects)
                if writer.keep(always=isinstance(error, TooManyRejects)):
                    error.add_note(
                        f"The first {writer.taken:,} samples are done; the same command with --resume goes on from"
                        " there."
                    )
                raise
    except (OSError, ProcessDied) as error:
        what = "cannot be written" if isinstance(error, OSError) else "unfinished"
        remedy = (
            "free some space or choose another folder" if isinstance(error, OSError) else "run with fewer --workers"
        )
        failure = BetonError(f"{path}: {what} ({error}); {remedy}")
        for note in getattr(error, "__notes__", ()):
            failure.add_note(note)
        raise failure from error
    counts = writer.counts
    return WriteSummary(
        samples=len(writer.ids),
        copied=counts["copied"],
        transcoded=counts["transcoded"],
        reencoded=counts["re-encoded"],
        resized=counts["resized"],
        stripped=counts["stripped"],
        rotated=counts["rotated"],
        row_indexed=counts["row_indexed"],
        rejected=len(writer.rejects),
        resumed=resumed,
        image_bytes=counts["image_bytes"],
        label_map_bytes=counts["label_map_bytes"],
        file_bytes=path.stat().st_size,
        seconds=time.perf_counter() - started,
    )
