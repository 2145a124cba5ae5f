"""Stores of label maps: reads and writes the folder that holds the maps of a data set.

    manifest.json         what made the maps, their `spec`, `class_names`, `num_samples`, `complete`
    ids.jsonl             one JSON string a line: the image's path relative to the annotated folder (posix, with suffix)
    maps-00000.npy ...    structured arrays of `MapSpec.dtype`, 1,024 records each (the last one shorter); sample i is
                          in part i // 1024
    rejects-00000.jsonl   where a part has images that could not be read: which, and why (`tl_fast.sources.rejects`);
                          their records are `blank`

Parts appear by rename and are never touched again, so a part that exists is whole.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tl_fast.labelmaps.format import LabelMapError, MapSpec
from tl_fast.sources.rejects import read_rejects
from tl_fast.system.atomic import write_atomic
from tl_fast.system.mistakes import InputError

FORMAT = "tl_fast label maps"
VERSION = 1
# Records per part: 1 MB at 7x7 cells, 5 MB at 18x18. An interrupted annotation loses at most one part of work.
PART_SIZE = 1024
MAX_OPEN = 256  # part files kept open by a reader; a store of ImageNet has 1,251, many systems allow 1,024


def part_path(folder: Path, part: int) -> Path:
    return folder / f"maps-{part:05d}.npy"


def rejects_path(folder: Path, part: int) -> Path:
    return folder / f"rejects-{part:05d}.jsonl"


def blank(spec: MapSpec, count: int) -> np.ndarray:
    """`count` records of `spec.dtype` for images without a label map.

    Their score_min is NaN, so that `encode` refuses them.
    """
    records = np.zeros(count, spec.dtype)
    records["score_min"] = np.nan
    return records


def write_part(folder: Path, part: int, records: np.ndarray) -> None:
    """Write one part. records: `[n]` of `MapSpec.dtype`, samples part·1024 to part·1024 + n − 1."""
    write_atomic(part_path(folder, part), lambda file: np.save(file, records, allow_pickle=False))


def write_ids(folder: Path, ids: Iterable[str]) -> None:
    text = "".join(json.dumps(sample_id) + "\n" for sample_id in ids)
    write_atomic(folder / "ids.jsonl", lambda file: file.write(text.encode("ascii")))


def write_manifest(
    folder: Path,
    spec: MapSpec,
    num_samples: int,
    class_names: Sequence[str] | None,
    *,
    complete: bool,
    **annotator: Any,
) -> dict[str, Any]:
    """Write manifest.json and return it as a dict. annotator: further keys, about how the maps were made."""
    if class_names is not None and len(class_names) != spec.num_classes:
        raise LabelMapError(f"{folder}: {len(class_names)} class names for {spec.num_classes} classes")
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "complete": complete,
        "num_samples": num_samples,
        "spec": spec.to_dict(),
        "class_names": None if class_names is None else list(class_names),
        **annotator,
    }
    text = json.dumps(manifest, indent=1) + "\n"
    write_atomic(folder / "manifest.json", lambda file: file.write(text.encode("utf-8")))
    return manifest


def write_store(
    folder: Path | str,
    ids: Sequence[str],
    records: Iterable[np.void],
    spec: MapSpec,
    class_names: Sequence[str] | None = None,
    **annotator: Any,
) -> None:
    """Write a whole store at once, for label maps that tl_fast.annotate did not make.

    records: one per id, as `pack` makes them. annotator: further keys of the manifest. Raises LabelMapError when ids,
    records or class names do not fit one another.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    packed = np.array(list(records), spec.dtype)
    if len(packed) != len(ids):
        raise LabelMapError(f"{folder}: {len(ids)} ids for {len(packed)} label maps")
    write_ids(folder, ids)
    for part in range(-(-len(packed) // PART_SIZE)):
        write_part(folder, part, packed[part * PART_SIZE : (part + 1) * PART_SIZE])
    write_manifest(folder, spec, len(packed), class_names, complete=True, **annotator)


class _Part:
    """An open part file. Its records are read at their offsets; a mapped file would load pages with the GIL held."""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


class LabelMapStore:
    """Read access to a store folder, from any thread.

    `spec`, `manifest` (dict), `class_names` (list or None), `ids` (list of str), `path`, `len()`; `rejects` (dict:
    index in `ids` of an image that annotation left out -> reason). Part files are opened, and checked, on first use.
    Raises LabelMapError if the folder is not a store, or its files contradict each other.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text("utf-8"))
            lines = (self.path / "ids.jsonl").read_text("ascii").splitlines()
            # 1.28 M lines take 0.5 s as one list, 3 s one by one.
            self.ids: list[str] = json.loads(f"[{','.join(lines)}]")
        except FileNotFoundError as error:
            raise LabelMapError(
                f"{error.filename} is missing: {self.path} is not a label-map store "
                "(make one with python -m tl_fast.annotate)"
            ) from error
        except (ValueError, RecursionError) as error:
            raise LabelMapError(f"{self.path}: manifest.json or ids.jsonl is damaged ({error})") from error
        if not isinstance(self.manifest, dict):
            raise LabelMapError(f"{self.path}: manifest.json is damaged (not an object)")
        if self.manifest.get("format") != FORMAT or self.manifest.get("version") != VERSION:
            raise LabelMapError(
                f"{self.path}: format {self.manifest.get('format')!r} version {self.manifest.get('version')!r}, "
                f"this code reads {FORMAT!r} version {VERSION}"
            )
        self.spec, self.class_names = self._read_manifest()
        if not all(type(sample_id) is str for sample_id in self.ids):
            raise LabelMapError(f"{self.path}: ids.jsonl is damaged (not every line is a string)")
        if not len(set(self.ids)) == len(self.ids) == len(lines) == self.manifest["num_samples"]:
            raise LabelMapError(
                f"{self.path}: ids.jsonl has {len(lines)} lines, {len(set(self.ids))} of them different; "
                f"the manifest says {self.manifest['num_samples']}"
            )
        self._offsets: dict[int, int] = {}  # where the records of each checked part begin, in bytes
        self._open: dict[int, _Part] = {}

    def _read_manifest(self) -> tuple[MapSpec, list[str] | None]:
        """spec and class_names, checked; raises LabelMapError naming the file."""
        kinds = {"spec": dict, "class_names": (list, type(None)), "num_samples": int, "complete": bool}
        missing = object()
        if wrong := [name for name, kind in kinds.items() if not isinstance(self.manifest.get(name, missing), kind)]:
            raise LabelMapError(
                f"{self.path}: manifest.json is damaged ({', '.join(wrong)} missing or of a wrong type)"
            )
        try:
            spec = MapSpec.from_dict(self.manifest["spec"])
        except LabelMapError as error:
            raise LabelMapError(f"{self.path}: manifest.json: {error}") from error
        names: list[str] | None = self.manifest["class_names"]
        if names is not None and (len(names) != spec.num_classes or not all(isinstance(name, str) for name in names)):
            raise LabelMapError(f"{self.path}: manifest.json: class_names are not {spec.num_classes} strings")
        return spec, names

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._index

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each process opens the files itself

    @functools.cached_property
    def _index(self) -> dict[str, int]:
        return {sample_id: i for i, sample_id in enumerate(self.ids)}

    @property
    def _parts(self) -> list[Path]:
        return [part_path(self.path, part) for part in range(-(-len(self) // PART_SIZE))]

    @property
    def missing_parts(self) -> list[str]:
        """Names of the part files that do not exist yet."""
        return [path.name for path in self._parts if not path.exists()]

    @property
    def complete(self) -> bool:
        """True when the annotation ended well and every part is there."""
        return bool(self.manifest["complete"]) and not self.missing_parts

    @functools.cached_property
    def rejects(self) -> dict[int, str]:
        """Why annotation left out an image, by its index in `ids`. Raises LabelMapError naming a damaged list."""
        try:
            rejects = [reject for path in sorted(self.path.glob("rejects-*.jsonl")) for reject in read_rejects(path)]
            return {self._index[reject["id"]]: reject["reason"] for reject in rejects}
        except KeyError as error:
            raise LabelMapError(f"{self.path}: its lists of rejects name {error}, which ids.jsonl does not") from error
        except InputError as error:
            raise LabelMapError(str(error)) from error

    @functools.cached_property
    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of the part that each map is in, int64 `[n, 2]`.

        Raises OSError when a part is missing.
        """
        status = [path.stat() for path in self._parts]
        rows = np.array([(part.st_size, part.st_mtime_ns) for part in status], np.int64).reshape(-1, 2)
        return np.repeat(rows, PART_SIZE, 0)[: len(self)]

    def origin(self, j: int) -> str:
        """How messages call map j."""
        return f"{self.path}: {self.ids[j]}"

    def locate(self, ids: Sequence[str], class_names: Sequence[str], labels: np.ndarray) -> np.ndarray:
        """Index of each sample's map, int64 `[n]`, −1 where there is none.

        A sample's map is the one with the sample's own id, or else the one that `matching.match_maps` finds. ids,
        labels int64 `[n]`: the samples' ids, and the indices of their classes in `class_names`. Raises LabelMapError
        when two maps fit a sample, or one map two samples.
        """
        from tl_fast.labelmaps.matching import match_maps, refuse_shared

        indices = np.fromiter((self._index.get(sample_id, -1) for sample_id in ids), np.int64, len(ids))
        rest = np.flatnonzero(indices < 0)
        if len(rest):
            others = match_maps(self.ids, [ids[i] for i in rest], class_names, np.asarray(labels)[rest], self.origin)
            taken = np.isin(others, indices[indices >= 0])  # by the sample that has the map's own id
            indices[rest] = np.where(taken, -1, others)
        refuse_shared(indices, ids, self.origin)
        return indices

    def record(self, sample: int | str) -> np.void:
        """The packed label map of one image, by its index in `ids` or by its id.

        Raises LabelMapError naming the id, or the part file, that is missing or damaged; and for an image that
        annotation rejected.
        """
        if isinstance(sample, str):
            index = self._index.get(sample)
            if index is None:
                example = f" (it has, for instance, {self.ids[0]!r})" if self.ids else ""
                raise LabelMapError(f"{self.path} has no label map for {sample!r}{example}")
        else:
            index = int(sample)
            if not 0 <= index < len(self):
                raise LabelMapError(f"{self.path} has no label map {index}, it has {len(self)}")
        if index in self.rejects:
            raise LabelMapError(f"annotation rejected it: {self.rejects[index]}")
        part, row = divmod(index, PART_SIZE)
        file = self._open.get(part) or self._open_part(part)
        size = self.spec.dtype.itemsize
        data = os.pread(file.file, size, self._offsets[part] + row * size)
        if len(data) != size:
            raise LabelMapError(f"{part_path(self.path, part)} is damaged (cut off while it was in use)")
        return np.frombuffer(data, self.spec.dtype)[0]

    def close(self) -> None:
        """Close the part files; a later read opens them again."""
        self._open = {}

    def _open_part(self, part: int) -> _Part:
        path = part_path(self.path, part)
        try:
            if part not in self._offsets:
                self._offsets[part] = self._check_part(path, min(PART_SIZE, len(self) - part * PART_SIZE))
            if len(self._open) >= MAX_OPEN:
                self._open = {}  # what other threads are reading from stays open until they are done
            self._open[part] = file = _Part(path)
        except FileNotFoundError as error:
            raise LabelMapError(
                f"{path} is missing: the annotation is not finished; "
                "run the same tl_fast.annotate command again to resume it"
            ) from error
        except (ValueError, EOFError, OSError) as error:
            if isinstance(error, LabelMapError):
                raise
            raise LabelMapError(
                f"{path} is damaged ({error}); delete it and run the same tl_fast.annotate command again"
            ) from error
        return file

    def _check_part(self, path: Path, count: int) -> int:
        """Check a part file of `count` records; returns the byte at which its records begin."""
        records = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(records, np.memmap) or records.dtype != self.spec.dtype or records.shape != (count,):
            content = f"{records.shape} records of {records.dtype}" if isinstance(records, np.ndarray) else "an archive"
            raise LabelMapError(f"{path} holds {content}; the manifest says ({count},) of {self.spec.dtype}")
        return records.offset
