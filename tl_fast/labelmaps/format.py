"""Label maps on disk: what the machine annotator saw in every cell of an image, k classes with their scores.

A cell lists its k best classes; a class it does not list has score 0. Scores are logits relative to the cell's tail
(`top_k_relative`), so that a softmax over all C classes gives the listed classes their true probability and spreads the
rest evenly. They are stored as uint8 levels with one float32 minimum and step per sample (`quantise`).

A store is a folder:

    manifest.json         what made the maps, their `spec`, `class_names`, `num_samples`, `complete`
    ids.jsonl             one JSON string a line: the image's path relative to the annotated folder (posix, with suffix)
    maps-00000.npy ...    structured arrays of `MapSpec.dtype`, 1,024 records each (the last one shorter); sample i is
                          in part i // 1024
    rejects-00000.jsonl   where a part has images that could not be read: which, and why (`tl_fast.sources.rejects`);
                          their records are `blank`

Parts appear by rename and are never touched again, so a part that exists is whole.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from tl_fast.sources.rejects import read_rejects
from tl_fast.system.atomic import write_atomic
from tl_fast.system.mistakes import InputError

if TYPE_CHECKING:  # opening a beton takes 0.2 s without torch, 2.5 s with it
    import torch

FORMAT = "tl_fast label maps"
VERSION = 1
PART_SIZE = (
    1024  # records per part: 1 MB at 7x7 cells, 5 MB at 18x18; an interrupted annotation loses at most this much work
)
MAX_OPEN = 256  # part files kept open by a reader; a store of ImageNet has 1,251, many systems allow 1,024
EXTENTS = ("full", "center_square")


class LabelMapError(InputError):
    """A label map, or a store of them, that cannot be used; the message names the value or file and the remedy."""


@dataclasses.dataclass(frozen=True)
class MapSpec:
    """What every label map of a store looks like.

    k: classes listed per cell. height, width: cells. num_classes: C. extent: which part of the image the map spans,
    `full` or `center_square` (maps made behind a square centre crop).
    """

    k: int
    height: int
    width: int
    num_classes: int
    extent: str = "full"

    def __post_init__(self) -> None:
        for name in ("k", "height", "width", "num_classes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
                raise LabelMapError(f"label map spec: {name} must be an integer >= 1, got {value!r}")
            object.__setattr__(self, name, int(value))
        if self.num_classes > 65_535:
            raise LabelMapError(
                f"label map spec: num_classes must be at most 65535 (classes are uint16), got {self.num_classes}"
            )
        if self.k > self.num_classes:
            raise LabelMapError(f"label map spec: k must be at most num_classes = {self.num_classes}, got {self.k}")
        if self.extent not in EXTENTS:
            raise LabelMapError(f"label map spec: extent must be one of {EXTENTS}, got {self.extent!r}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(k, H, W)."""
        return self.k, self.height, self.width

    @property
    def cells(self) -> int:
        """k·H·W, listed classes in a map."""
        return self.k * self.height * self.width

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """One packed record: 8 + 3·k·H·W bytes, no padding."""
        return np.dtype(
            [("score_min", "<f4"), ("score_step", "<f4"), ("classes", "<u2", self.shape), ("scores", "u1", self.shape)]
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MapSpec:
        """Raises LabelMapError on unknown or missing keys."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(
            name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values
        )
        if unknown or missing:
            raise LabelMapError(
                f"label map spec: unknown keys {unknown}, missing keys {missing}; the keys are {sorted(fields)}"
            )
        return cls(**values)


def top_k_relative(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best classes of every cell, their logits relative to the cell's tail.

    logits: float `[B, C, H, W]`. Returns classes int64 `[B, k, H, W]`, best first, and scores float32 `[B, k, H, W]` =
    v − t with t = logsumexp(the C − k others) − log(C − k): the logit every unlisted class would have if they shared
    their probability evenly. A softmax over the scores, unlisted classes at 0, then gives each listed class its true
    probability. With k = C nothing is unlisted and t is the cell's smallest logit. Scores are never negative. Raises
    LabelMapError unless 1 <= k <= C.
    """
    if logits.ndim != 4 or not 1 <= k <= logits.shape[1]:
        raise LabelMapError(
            f"top_k_relative: needs logits [B, C, H, W] and 1 <= k <= C, got shape {tuple(logits.shape)} and k = {k}"
        )
    logits = logits.float()
    num_classes = logits.shape[1]
    values, classes = logits.topk(k, dim=1)
    if k == num_classes:
        tail = values[:, -1:]
    else:
        # The sum over the rest is formed without the listed classes: "all minus listed" would cancel where the
        # annotator is sure.
        rest = logits.scatter(1, classes, float("-inf"))
        tail = rest.logsumexp(dim=1, keepdim=True) - float(np.log(num_classes - k))
    return classes, values - tail


def quantise(scores: np.ndarray) -> tuple[np.ndarray, np.float32, np.float32]:
    """float32 scores `[k, H, W]` → (uint8 levels `[k, H, W]`, score_min, score_step) with score ≈ score_min +
    score_step · level².

    Squared levels are fine where scores are small: there the annotator is unsure and a token's top class hangs on small
    differences. (On efficientnet-lite0's maps even levels change the top class of 1.4 % of the token targets, squared
    ones of 0.7 %.) For the same reason the best two classes of a cell stay apart when their nearest levels coincide.
    The error is at most half a level, one level where classes were kept apart. Equal scores give step 0. Raises
    LabelMapError on a non-finite score.
    """
    from tl_fast.labelmaps import (
        loops as maps,
    )  # here and below: numba takes longer to import than everything else that opens a beton

    wide = np.ascontiguousarray(scores, np.float64)
    if wide.ndim != 3 or wide.size == 0:
        raise LabelMapError(f"label map scores must be finite and [k, H, W], got shape {wide.shape}")
    levels = np.empty(wide.shape, np.uint8)
    wrong, score_min, score_step = maps.quantise(wide.reshape(len(wide), -1), levels.reshape(len(wide), -1))
    if wrong:
        _refuse_scores(wide)
    return levels, np.float32(score_min), np.float32(score_step)


def _refuse_scores(scores: np.ndarray) -> NoReturn:
    if count := int((~np.isfinite(scores)).sum()):
        raise LabelMapError(
            f"label map scores must be finite and [k, H, W], got shape {scores.shape} with {count} non-finite values"
        )
    raise LabelMapError(f"label map scores {scores.min()}..{scores.max()} span more than float32 holds")


def dequantise(levels: np.ndarray, score_min: np.ndarray | float, score_step: np.ndarray | float) -> np.ndarray:
    """uint8 levels `[..., k, H, W]`, score_min and score_step `[...]` → float32 `[..., k, H, W]`: score_min +
    score_step · level²."""
    low = np.asarray(score_min, np.float32)[..., None, None, None]
    step = np.asarray(score_step, np.float32)[..., None, None, None]
    return np.square(levels, dtype=np.float32) * step + low


LEVELS = dequantise(np.arange(256, dtype=np.uint8).reshape(1, 1, 256), 0, 1).reshape(
    256
)  # float32: the curve before minimum and step


def pack(classes: np.ndarray, scores: np.ndarray, spec: MapSpec) -> np.void:
    """One label map as a record of `spec.dtype`.

    classes: integers `[k, H, W]`, of a float dtype too (the published maps'); scores: float `[k, H, W]`. Raises
    LabelMapError on a wrong shape, a class that is not an integer in 0..C−1, a class listed twice in one cell (its mass
    would count twice), or a non-finite score.
    """
    from tl_fast.labelmaps import loops as maps

    classes, scores = np.asarray(classes), np.asarray(scores)
    for name, array in (("classes", classes), ("scores", scores)):
        if array.shape != spec.shape:
            raise LabelMapError(f"label map {name} must have shape (k, H, W) = {spec.shape}, got {array.shape}")
    if classes.dtype.kind not in "iuf":
        raise LabelMapError(f"label map classes must be integers, got dtype {classes.dtype}")
    record = np.empty((), spec.dtype)
    flat = (spec.k, -1)
    wrong, record["score_min"], record["score_step"] = maps.pack(
        np.ascontiguousarray(classes, np.float64 if classes.dtype.kind == "f" else np.int64).reshape(flat),
        np.ascontiguousarray(scores, np.float64).reshape(flat),
        spec.num_classes,
        record["classes"].reshape(flat),
        record["scores"].reshape(flat),
    )
    if wrong == maps.BAD_SCORE:
        _refuse_scores(scores)
    if wrong:
        _refuse_classes(classes, spec)
    return record[()]


def _refuse_classes(classes: np.ndarray, spec: MapSpec) -> NoReturn:
    if classes.dtype.kind == "f" and (bad := classes[~np.isfinite(classes) | (classes != np.floor(classes))]).size:
        raise LabelMapError(f"label map classes must be integers, got {bad[0]}")
    if classes.min() < 0 or classes.max() >= spec.num_classes:
        raise LabelMapError(
            f"label map classes must lie in 0..{spec.num_classes - 1}, got {int(classes.min())}..{int(classes.max())}"
        )
    ordered = np.sort(classes, axis=0)
    j, row, column = np.argwhere(ordered[1:] == ordered[:-1])[0]
    raise LabelMapError(
        f"label map lists class {int(ordered[j, row, column])} twice in cell (row {row}, column {column})"
    )


def unpack(record: np.void, spec: MapSpec) -> tuple[np.ndarray, np.ndarray]:
    """A record of `spec.dtype` → classes uint16 `[k, H, W]`, scores float32 `[k, H, W]`. Raises LabelMapError on
    another spec's record."""
    if record.dtype != spec.dtype:
        raise LabelMapError(f"label map record has dtype {record.dtype}, its spec {spec} says {spec.dtype}")
    return record["classes"], dequantise(record["scores"], record["score_min"], record["score_step"])


def encoded_sizes(spec: MapSpec) -> tuple[int, int, int]:
    """Bytes of a map in a beton: plain; with a palette of at most 256 classes; of 257 to 512. A palette that saves
    nothing is not used."""
    plain = 3 * spec.cells
    palette = -(-spec.num_classes // 8) + 2 * spec.cells
    return plain, min(palette, plain), min(palette + -(-spec.cells // 8), plain)


def encode(record: np.void, spec: MapSpec) -> bytes:
    """A record's classes and scores as they go into a beton: with a palette where that is smaller
    (docs/file_format.md).

    Raises LabelMapError on another spec's record, a class outside 0..C−1, a score_min or score_step that is not finite
    or a negative step.
    """
    from tl_fast.labelmaps import loops as maps

    if record.dtype is not spec.dtype and record.dtype != spec.dtype:
        raise LabelMapError(f"label map record has dtype {record.dtype}, its spec {spec} says {spec.dtype}")
    out = np.empty(3 * spec.cells, np.uint8)
    size = maps.encode(np.frombuffer(record.tobytes(), np.uint8), spec.num_classes, encoded_sizes(spec), out)
    if size == maps.NOT_FINITE:
        raise LabelMapError(
            f"label map has score_min {record['score_min']} and score_step {record['score_step']}; both must be finite,"
            " the step not negative"
        )
    if size < 0:
        raise LabelMapError(f"label map lists class {-1 - size} of {spec.num_classes}")
    return out[:size].tobytes()


def part_path(folder: Path, part: int) -> Path:
    return folder / f"maps-{part:05d}.npy"


def rejects_path(folder: Path, part: int) -> Path:
    return folder / f"rejects-{part:05d}.jsonl"


def blank(spec: MapSpec, count: int) -> np.ndarray:
    """`count` records of `spec.dtype` for images without a label map: their score_min is not a number, so that `encode`
    refuses them."""
    records = np.zeros(count, spec.dtype)
    records["score_min"] = np.nan
    return records


def write_part(folder: Path, part: int, records: np.ndarray) -> None:
    """records: `[n]` of `MapSpec.dtype`, samples part·1024 to part·1024 + n − 1."""
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
    """Write manifest.json; `annotator` holds what else there is to say about how the maps were made. Returns the
    manifest."""
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
    """Write a whole store at once: for label maps that come from elsewhere than tl_fast.annotate. records: one of
    `pack` per id."""
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
    """An open part file: its records are read at their offsets. (Mapping it would fault pages in with the GIL held.)"""

    def __init__(self, path: Path) -> None:
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "file"):
            os.close(self.file)


class LabelMapStore:
    """Read access to a store folder, from any thread.

    `spec`, `manifest` (dict), `class_names` (list or None), `ids` (list of str), `path`, `len()`; `rejects` (dict:
    place in `ids` of an image that annotation left out -> reason). Part files are opened, and checked, on first use.
    Raises LabelMapError if the folder is not a store, or its files contradict each other.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text("utf-8"))
            lines = (self.path / "ids.jsonl").read_text("ascii").splitlines()
            self.ids: list[str] = json.loads(f"[{','.join(lines)}]")  # at once: 1.28 M lines take 0.5 s, one by one 3 s
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
        self._offsets: dict[int, int] = {}  # of the records in each part that has been checked
        self._open: dict[int, _Part] = {}

    def _read_manifest(self) -> tuple[MapSpec, list[str] | None]:
        """spec and class_names, checked; raises LabelMapError naming the file."""
        wanted = {"spec": dict, "class_names": (list, type(None)), "num_samples": int, "complete": bool}
        if wrong := [
            name
            for name, kind in wanted.items()
            if name not in self.manifest or not isinstance(self.manifest[name], kind)
        ]:
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
        return {**self.__dict__, "_open": {}}  # every process opens the files itself

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
        """Why annotation left out an image, by its place in `ids`. Raises LabelMapError naming a damaged list."""
        try:
            rejects = [reject for path in sorted(self.path.glob("rejects-*.jsonl")) for reject in read_rejects(path)]
            return {self._index[reject["id"]]: reject["reason"] for reject in rejects}
        except KeyError as error:
            raise LabelMapError(f"{self.path}: its lists of rejects name {error}, which ids.jsonl does not") from error
        except InputError as error:
            raise LabelMapError(str(error)) from error

    @functools.cached_property
    def stamps(self) -> np.ndarray:
        """Size and modification time (ns) of the part that each map is in, int64 `[n, 2]`. Raises OSError when a part
        is missing."""
        status = [path.stat() for path in self._parts]
        rows = np.array([(part.st_size, part.st_mtime_ns) for part in status], np.int64).reshape(-1, 2)
        return np.repeat(rows, PART_SIZE, 0)[: len(self)]

    def origin(self, j: int) -> str:
        """How messages call map j."""
        return f"{self.path}: {self.ids[j]}"

    def locate(self, ids: Sequence[str], class_names: Sequence[str], labels: np.ndarray) -> np.ndarray:
        """Index of each sample's map, int64 `[n]`, −1 where there is none: the map of its very id, or else by
        `map_match.match_maps`.

        ids: the samples', with the place of each one's class in `class_names`, `labels` int64 `[n]`. Raises
        LabelMapError when two maps fit a sample, or one map two samples.
        """
        from tl_fast.labelmaps.matching import match_maps, refuse_shared

        found = np.fromiter((self._index.get(sample_id, -1) for sample_id in ids), np.int64, len(ids))
        rest = np.flatnonzero(found < 0)
        if len(rest):
            others = match_maps(self.ids, [ids[i] for i in rest], class_names, np.asarray(labels)[rest], self.origin)
            found[rest] = np.where(
                np.isin(others, found[found >= 0]), -1, others
            )  # a map that has its image is no other image's
        refuse_shared(found, ids, self.origin)
        return found

    def record(self, sample: int | str) -> np.void:
        """The packed label map of one image, by its place in `ids` or by its id.

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
        """Give the open part files back."""
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
        """Returns where in the file its records begin."""
        records = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(records, np.memmap) or records.dtype != self.spec.dtype or records.shape != (count,):
            what = f"{records.shape} records of {records.dtype}" if isinstance(records, np.ndarray) else "an archive"
            raise LabelMapError(f"{path} holds {what}; the manifest says ({count},) of {self.spec.dtype}")
        return records.offset
