"""Writing a .beton: in one pass, on threads or processes, to a temporary file that takes the final name only when it is
whole.

ffcv's writer loop is not used: it hangs when a worker dies, leaves torn files that look whole, and its output depends
on the workers' timing. Here workers read and encode, and one thread lays out and writes in the samples' order, so the
bytes are the same for any number of workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import tl_fast
from tl_fast.beton.layout import MAX_INFO, BetonError
from tl_fast.convert.block_writer import BlockWriter
from tl_fast.convert.data_file import BetonFile, Encoded
from tl_fast.convert.encode import Sample, SampleSource, compile_kernels, encode
from tl_fast.convert.options import EncodeOptions, RunOptions, take_options
from tl_fast.convert.partial_file import PartialFile
from tl_fast.convert.processes import Forked, ProcessDied
from tl_fast.convert.resumable import ResumableWriter
from tl_fast.labelmaps.format import MapSpec
from tl_fast.masks.format import MaskSpec
from tl_fast.sources.rejects import list_beside, reason_of, write_rejects
from tl_fast.system.threads import ordered_map

CHUNK = 16  # samples per task: handing one to a thread and back costs some 50 µs


@dataclasses.dataclass(frozen=True)
class WriteSummary:
    """What `write_beton` did.

    Images `copied`, `transcoded` without loss, `reencoded`, `resized` (and encoded), planes `decoded` (a JPEG's own) or
    `converted` (from RGB); of those, `planes` in all, `stripped` of metadata, `rotated` (with an EXIF orientation,
    ignored or applied as asked), `row_indexed` (regions can be cut out of them) and `bit_indexed` (our decoder passes
    over what is around a crop); these two are 0 when not asked for. `rejected`: samples left out. `resumed`: samples
    taken from an earlier run. Sizes in bytes, wall time in seconds.
    """

    samples: int
    copied: int
    transcoded: int
    reencoded: int
    resized: int
    decoded: int
    converted: int
    stripped: int
    rotated: int
    row_indexed: int
    bit_indexed: int
    planes: int
    rejected: int
    resumed: int
    image_bytes: int
    label_map_bytes: int
    mask_bytes: int
    file_bytes: int
    seconds: float


class TooManyRejects(BetonError):
    """More samples were rejected than `max_rejects` allows; what was done is kept for a run with `resume`."""


Progress = Callable[[int, int, int], None]  # samples taken from the source, samples left out, bytes written


@dataclasses.dataclass(frozen=True)
class Description:
    """What a beton says of its samples as a whole.

    class_names: name of every label. spec, masks: of the label maps and the masks; None: there are none. annotator,
    conversion: JSON-able records of how the label maps were made and of what was converted.
    """

    class_names: Sequence[str]
    spec: MapSpec | None = None
    annotator: dict[str, Any] | None = None
    conversion: dict[str, Any] | None = None
    masks: MaskSpec | None = None

    def info(self, rejected: int = 0) -> dict[str, Any]:
        """As it is kept in the file."""
        info = {"annotator": self.annotator, "class_names": list(self.class_names), "tl_fast": tl_fast.__version__}
        if self.conversion is not None:
            info["conversion"] = {**self.conversion, "rejected": rejected}
        if self.masks is not None:
            info["masks"] = self.masks.to_dict()
        return info

    def check(self, path: Path) -> None:
        """Raises BetonError naming `path` for what cannot be kept in it."""
        if self.spec is not None and len(self.class_names) != self.spec.num_classes:
            raise BetonError(
                f"{path}: the label maps know {self.spec.num_classes} classes, the labels {len(self.class_names)};"
                " token targets and labels must be of the same classes: annotate with --classes (keep the data set's"
                " classes) or --fit-head (a head for them)"
            )
        if (size := len(json.dumps(self.info(), ensure_ascii=False).encode("utf-8"))) > MAX_INFO:
            raise BetonError(
                f"{path}: class names and the annotator's record have {size} bytes, at most {MAX_INFO} are read;"
                " shorten them"
            )


def write_beton(
    path: Path | str,
    samples: SampleSource,
    *,
    class_names: Sequence[str],
    spec: MapSpec | None = None,
    masks: MaskSpec | None = None,
    annotator: dict[str, Any] | None = None,
    conversion: dict[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> WriteSummary:
    """Write `samples` (with a `len()`; iterated once, in order) to `path`, in one pass, in bounded memory.

    class_names: name of every label; with `spec` as many as the label maps' classes, for token targets and labels are
    of one kind. masks: every sample has a mask, with these classes. annotator, conversion: JSON-able records of how the
    label maps were made and of what was converted, kept in the file; a resumed run must have the same, but for
    conversion["inputs"], as every sample taken is compared by its own stamp. progress: called with the samples taken
    from the source, those of them left out, and the bytes written. options: the fields of `EncodeOptions` (quality,
    max_resolution, decode_check, row_index, bit_index, exif, store, short_side, max_pixels) and `RunOptions` (workers,
    processes, page_size, on_error, max_rejects, overwrite, resume); None is the default.

    With `processes`, `samples` must be a sequence, and the bytes of its images and label maps are asked for in the
    forked processes; samples with `decodes_groups` are read by threads in any case. Raises BetonError that names the
    sample (the first bad one in the samples' order), TooManyRejects at the end; nothing bears the name `path` then.
    """
    encoding, run = take_options(EncodeOptions, options), take_options(RunOptions, options)
    if options:
        raise TypeError(f"write_beton() has no option {', '.join(options)}")
    return write(
        Path(path), samples, Description(class_names, spec, annotator, conversion, masks), encoding, run, progress
    )


def write(
    path: Path,
    samples: SampleSource,
    description: Description,
    encoding: EncodeOptions,
    run: RunOptions,
    progress: Progress | None = None,
) -> WriteSummary:
    """`write_beton`, with the options that travel together as one value each."""
    started = time.perf_counter()
    if len(samples) == 0:
        raise BetonError(f"{path}: there are no samples to write")
    description.check(path)
    _check_free(path, run.overwrite)
    settings = _settings(samples, description, encoding, run)
    compile_kernels(description.spec, description.masks, encoding)
    try:
        with contextlib.ExitStack() as stack:
            # The encoders first: they fork, before anything has threads and locks.
            encoders = stack.enter_context(Encoders(samples, description, encoding, run))
            partial = stack.enter_context(PartialFile(path, settings, run.resume))
            blocks = stack.enter_context(BlockWriter(partial.handle, partial.partial))
            file = BetonFile(blocks, len(samples), run.page_size, description.spec, description.masks)
            writer, source = ResumableWriter(partial, file, description.class_names), iter(samples)
            writer.restore(source)
            resumed = writer.taken
            try:
                with contextlib.closing(encoders.results(writer.checked(source), resumed)) as results:
                    _write_samples(writer, results, run.on_error, progress)
                _finish(writer, len(samples), description, run.max_rejects)
            except Exception as error:
                _keep(writer, error)
                raise
    except (OSError, ProcessDied) as error:
        raise _unfinished(path, error) from error
    return WriteSummary(
        samples=len(writer.ids),
        **{name.replace("-", ""): count for name, count in writer.counts.items()},
        rejected=len(writer.rejects),
        resumed=resumed,
        file_bytes=path.stat().st_size,
        seconds=time.perf_counter() - started,
    )


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists():
        if not overwrite:
            raise BetonError(f"{path} exists; choose another name or give --overwrite")
        if not path.is_file():
            raise BetonError(f"{path} is no regular file; choose another name")


def _settings(
    samples: SampleSource, description: Description, encoding: EncodeOptions, run: RunOptions
) -> dict[str, Any]:
    """All that the bytes depend on but for the samples, for a resumed run to compare."""
    return {
        # Not as one value: a resumed run says which of them differs.
        **{key: value for key, value in (description.conversion or {}).items() if key != "inputs"},
        "samples": len(samples),
        "class_names": list(description.class_names),
        "label maps": None if description.spec is None else description.spec.to_dict(),
        "masks": None if description.masks is None else description.masks.to_dict(),
        "annotator": description.annotator,
        **encoding.record(),
        "page_size": run.page_size,
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str]:
    """Of everything that decides which bytes a new encode has."""
    versions = {name: importlib.metadata.version(name) for name in ("Pillow", "simplejpeg")}
    return {**versions, "tl_fast": tl_fast.__version__}


class Encoders:
    """The threads or forked processes that read and encode samples."""

    def __init__(
        self, samples: SampleSource, description: Description, encoding: EncodeOptions, run: RunOptions
    ) -> None:
        self._samples, self._description, self._encoding, self._workers = samples, description, encoding, run.workers
        forks = run.processes and not getattr(samples, "decodes_groups", False)
        self._forked = Forked(run.workers, self._encode_range) if forks else None

    def __enter__(self) -> Self:
        if self._forked is not None:
            self._forked.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._forked is not None:
            self._forked.__exit__(*exception)

    def _encode_samples(self, samples: Iterable[Sample]) -> list[Encoded | Exception]:
        spec, masks = self._description.spec, self._description.masks
        return [encode(sample, spec, masks, self._encoding) for sample in samples]

    def _encode_range(self, numbers: range) -> list[Encoded | Exception]:
        """In a forked process, which has the samples already; exceptions may not survive the way back."""
        results = self._encode_samples(self._samples[number] for number in numbers)
        return [ValueError(reason_of(result)) if isinstance(result, Exception) else result for result in results]

    def results(self, source: Iterator[Sample], start: int) -> Iterator[Iterable[tuple[Sample, Encoded | Exception]]]:
        """Chunks of samples from `source`, in order, each sample with what became of it. start: the number of the
        first. What comes with a chunk holds until the next is asked for.
        """
        begun: deque[tuple[Sample, ...]] = deque()

        def tasks() -> Iterator[Sequence]:
            number = start
            while chunk := tuple(itertools.islice(source, CHUNK)):
                begun.append(chunk)
                yield chunk if self._forked is None else range(number, number + len(chunk))
                number += len(chunk)

        if self._forked is None:
            encoded = ordered_map(self._workers, self._encode_samples, tasks(), ahead=2)
        else:
            encoded = self._forked.map(tasks())
        with contextlib.closing(encoded):
            for results in encoded:
                yield zip(begun.popleft(), results, strict=True)


def _write_samples(
    writer: ResumableWriter,
    chunks: Iterable[Iterable[tuple[Sample, Encoded | Exception]]],
    on_error: str,
    progress: Progress | None,
) -> None:
    for chunk in chunks:
        for sample, result in chunk:
            problem = writer.add(sample, result)
            if problem is None:
                continue
            if on_error == "stop":
                raise BetonError(f"{sample.name}: {reason_of(problem)}") from problem
            writer.reject(sample, problem)
        writer.file.list_rows()
        writer.commit_at_times()
        if progress is not None:
            progress(writer.taken, len(writer.rejects), writer.file.offset)


def _finish(writer: ResumableWriter, announced: int, description: Description, max_rejects: int | None) -> None:
    """Close the file and give it its name, if what came is what was announced and enough of it is good."""
    path, rejects = writer.partial.path, writer.rejects
    if writer.taken != announced:
        raise BetonError(
            f"{path}: {announced} samples were announced, {writer.taken} came; the source has changed, run again"
        )
    if max_rejects is not None and len(rejects) > max_rejects:
        raise TooManyRejects(
            f"{path}: {len(rejects)} of {announced} samples are bad and --max-rejects allows {max_rejects}; they are"
            f" listed in {list_beside(path)}. Mend them and run again, or allow more and add --resume to finish with"
            " what is done"
        )
    if not writer.ids:
        raise BetonError(f"{path}: all {announced} samples are bad, the first: {rejects[0]['reason']}")
    writer.file.close(description.info(len(rejects)), writer.ids)
    write_rejects(list_beside(path), rejects)
    writer.partial.publish()


def _keep(writer: ResumableWriter, error: Exception) -> None:
    """Keep what was done for a resumed run, and have the error say so."""
    too_many = isinstance(error, TooManyRejects)
    if too_many:
        write_rejects(list_beside(writer.partial.path), writer.rejects)
    if writer.keep(always=too_many):
        error.add_note(
            f"The first {writer.taken:,} samples are done; the same command with --resume goes on from there."
        )


def _unfinished(path: Path, error: OSError | ProcessDied) -> BetonError:
    """The machine's error as one that names the file and the remedy."""
    if isinstance(error, OSError):
        text = f"{path}: cannot be written ({error}); free some space or choose another folder"
    else:
        text = f"{path}: unfinished ({error}); run with fewer --workers"
    failure = BetonError(text)
    for note in getattr(error, "__notes__", ()):
        failure.add_note(note)
    return failure
