"""Adding samples to a beton so that a killed run can go on: what was taken, what became of it, and commits of that."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tl_fast.beton.layout import PLANES, BetonError
from tl_fast.convert.data_file import BetonFile, Encoded
from tl_fast.convert.encode import Sample
from tl_fast.convert.partial_file import PartialFile
from tl_fast.sources.rejects import Reject, reason_of, reject_lines

COMMIT_SECONDS = 2.0  # how much work a kill may cost
# What `tl_fast.convert.image.Prepared.action` says.
ACTIONS = ("copied", "transcoded", "re-encoded", "resized", "decoded", "converted")
COUNTS = (*ACTIONS, "stripped", "rotated", "row_indexed", "bit_indexed", "planes")
COUNTS += ("image_bytes", "label_map_bytes", "mask_bytes")


class ResumableWriter:
    """Adds the samples of one run to `file`, and commits them to `partial`'s journal.

    ids: of the samples written. rejects: the samples left out. taken: how many samples were taken from the source, by
    this run and those that it goes on from. counts: COUNTS of the samples written.
    """

    def __init__(self, partial: PartialFile, file: BetonFile, class_names: Sequence[str]) -> None:
        self.partial, self.file, self.class_names = partial, file, class_names
        self.ids: list[str] = []
        self.rejects: list[Reject] = []
        self.taken = 0
        self.counts = dict.fromkeys(COUNTS, 0)
        self._seen: set[str] = set()  # ids of the samples taken, and of those begun
        self._digest = hashlib.blake2b(digest_size=16)  # of the inputs taken
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
            self._add_to_digest(sample)
            self._seen.add(sample.source_id)
            if sample.source_id not in rejected:
                self.ids.append(sample.source_id)
        if self._digest.hexdigest() != head["digest"]:
            raise BetonError(
                f"{self.partial.path}: cannot be resumed, the first {head['taken']} samples (their ids, labels, file"
                " sizes or times) are not those of the unfinished run; leave --resume out to start over"
            )
        self.counts, self.taken = {**self.counts, **head["counts"]}, head["taken"]
        self._committed = (self.file.samples, self.file.allocated, len(self.rejects))

    def _add_to_digest(self, sample: Sample) -> None:
        self._digest.update(f"{sample.source_id}\0{sample.label}\0{sample.stamp}\n".encode("utf-8", "surrogateescape"))

    def checked(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples, as long as nothing is wrong with the data set as a whole."""
        for sample in samples:
            if sample.source_id in self._seen:
                raise BetonError(f"{sample.name}: a second sample with the id {sample.source_id!r}")
            if not -1 <= sample.label < len(self.class_names):
                raise BetonError(f"{sample.name}: label {sample.label} is not in 0..{len(self.class_names) - 1}")
            self._seen.add(sample.source_id)
            yield sample

    def add(self, sample: Sample, result: Encoded | Exception) -> Exception | None:
        """Append a sample -> what is wrong with it, if something is; then `reject` it, or end the run."""
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
        self._took(sample)
        self.ids.append(sample.source_id)
        counts, image = self.counts, result.image
        counts[image.action] += 1
        counts["stripped"] += image.stripped > 0
        counts["rotated"] += image.rotated
        counts["row_indexed"] += image.row_index
        counts["bit_indexed"] += image.bit_index
        counts["planes"] += image.mode == PLANES
        counts["image_bytes"] += sum(map(len, image.parts))
        for name, (data, _) in zip(self.file.payloads, result.payloads, strict=True):
            counts[f"{name}_bytes"] += len(data)
        return None

    def reject(self, sample: Sample, problem: Exception) -> None:
        """Leave a sample out."""
        self._took(sample)
        self.rejects.append({"id": sample.source_id, "origin": sample.name, "reason": reason_of(problem)})

    def _took(self, sample: Sample) -> None:
        self._add_to_digest(sample)
        self.taken += 1

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
            "digest": self._digest.hexdigest(),
            "counts": dict(self.counts),
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
