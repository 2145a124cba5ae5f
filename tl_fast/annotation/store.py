"""Prepares and checks the store that a run fills, and names the files that only a run needs.

`tl_fast.labelmaps.store` describes the other files.

    pooled-00000.npy ...    uint16 [n]: the class the annotator gives the whole image
    stamps-00000.npy ...    int64 [n, m]: the images' `Source.stamps` when the part was made
    features-00000.npy ...  float32 [n, D]: features for the probe, until it is fitted
    head.safetensors        the probe
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tl_fast.annotation.annotator import AnnotateError
from tl_fast.labelmaps import store as map_store
from tl_fast.labelmaps.format import MapSpec
from tl_fast.labelmaps.store import part_path
from tl_fast.sources.rejects import Reject, list_beside, read_rejects, write_rejects
from tl_fast.sources.source import Source
from tl_fast.system.atomic import write_atomic

# What two runs must share for their parts to belong in one store. The images themselves are compared by their stamps.
FINGERPRINT = (
    "spec",
    "class_names",
    "num_samples",
    "model",
    "weights_sha256",
    "preprocessing",
    "dtype",
    "kept_classes",
    "probe",
    "exif",
    "ids_sha256",
)
_PARTS = ("maps", "pooled", "stamps", "features")


def pooled_path(out: Path, part: int) -> Path:
    return out / f"pooled-{part:05d}.npy"


def features_path(out: Path, part: int) -> Path:
    return out / f"features-{part:05d}.npy"


def head_path(out: Path) -> Path:
    return out / "head.safetensors"


def _stamps_path(out: Path, part: int) -> Path:
    return out / f"stamps-{part:05d}.npy"


def _of_part(stamps: np.ndarray, part: int) -> np.ndarray:
    return stamps[part * map_store.PART_SIZE : (part + 1) * map_store.PART_SIZE]


def write_stamps(out: Path, part: int, stamps: np.ndarray) -> None:
    """Record which images a part is made of, before the part is written. stamps: all images' `Source.stamps`."""
    write_atomic(_stamps_path(out, part), lambda file: np.save(file, _of_part(stamps, part)))


def prepare(
    out: Path,
    images: Source,
    spec: MapSpec,
    class_names: list[str] | None,
    record: dict[str, Any],
    overwrite: bool,
    on_error: str,
) -> dict[str, Any]:
    """Make the store's folder, or check that the one that exists was made in the same way, of the same images.

    record: what the manifest will say about the run. Returns it, with the date and the versions of an existing store.
    With `overwrite` an existing store is emptied first. Raises AnnotateError for a store made in another way or of
    other images, and for a folder that is no store of ours; its files are never touched.
    """
    path = out / "manifest.json"
    old = _read_manifest(path)
    if old is not None:
        for kind in (*(f"{kind}-" for kind in (*_PARTS, "rejects")), "head.", "ids.", "manifest."):
            for leftover in out.glob(f".{kind}*.tmp"):  # of a killed run; this rank works before the others write
                leftover.unlink()
        if overwrite:
            _empty(out)
            old = None
    elif out.is_dir():
        for leftover in out.glob(".manifest.json.*.tmp"):
            leftover.unlink()
        if any(out.iterdir()):
            raise AnnotateError(f"{out} is not empty and has no manifest.json; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    if old is not None:
        new = {"spec": spec.to_dict(), "class_names": class_names, "num_samples": len(images), **record}
        old = {"exif": "ignore", **old}  # stores made before the option existed ignored orientations
        if differing := [key for key in FINGERPRINT if old.get(key) != new[key]]:
            changes = "; ".join(f"{key} was {_short(old.get(key))}, is now {_short(new[key])}" for key in differing)
            raise AnnotateError(
                f"{out} holds label maps made in another way: {changes}. Give --overwrite to start afresh, or "
                "another folder"
            )
        _check_images(out, images)
        _check_rejects(out, on_error)
        record = {**record, "created": old["created"], "versions": old["versions"]}
    map_store.write_manifest(out, spec, len(images), class_names, complete=False, **record)
    map_store.write_ids(out, images.ids)
    return record


def _short(value: Any) -> str:
    return text if len(text := json.dumps(value)) < 80 else text[:77] + "..."


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a store of ours; None without such a file. Raises AnnotateError for one that is not ours."""
    remedy = (
        f"nothing in {path.parent} is touched, not by --overwrite either. Give another folder, or move this one away"
    )
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise AnnotateError(
            f"{path} cannot be read as the manifest of a label-map store ({error}); {remedy}"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != map_store.FORMAT:
        raise AnnotateError(f"{path} is no manifest of a label-map store; {remedy}")
    return manifest


def _empty(out: Path) -> None:
    files = [file for kind in _PARTS for file in out.glob(f"{kind}-*.npy")] + list(out.glob("rejects-*.jsonl"))
    # The manifest last: a folder without it is no store any more, and could not be emptied again.
    for file in (*files, head_path(out), out / "ids.jsonl", list_beside(out), out / "manifest.json"):
        file.unlink(missing_ok=True)


def _check_images(out: Path, images: Source) -> None:
    """Raise AnnotateError naming the first image that is not what it was when its part was made."""
    stamps = images.stamps
    for part in range(-(-len(images) // map_store.PART_SIZE)):
        made = [path for path in (part_path(out, part), features_path(out, part)) if path.exists()]
        if not made:
            continue
        names = " and ".join(path.name for path in made)
        remedy = f"delete {names} in {out} to make that part again, or give --overwrite to start afresh"
        path = _stamps_path(out, part)
        if not path.exists():
            raise AnnotateError(
                f"{path} is missing, so whether the part's images are still the same is not known (earlier versions "
                f"of tl_fast did not record it); {remedy}"
            )
        then, now = np.load(path), _of_part(stamps, part)
        changed = np.flatnonzero((then != now).any(1)) if then.shape == now.shape else np.array([0])
        if len(changed):
            i = part * map_store.PART_SIZE + int(changed[0])
            raise AnnotateError(
                f"{images.origin(i)}: has changed since its label map was made (its file's size or time), and so have "
                f"{len(changed) - 1} others of part {part}; {remedy}"
            )


def _check_rejects(out: Path, on_error: str) -> None:
    if on_error == "stop":
        for path in sorted(out.glob("rejects-*.jsonl")):
            for reject in read_rejects(path):
                maps = path.name.replace("rejects", "maps").replace(".jsonl", ".npy")
                raise AnnotateError(
                    f"{out}: an earlier run left out {reject['origin']} ({reject['reason']}); repair it and delete "
                    f"{maps} there, or give --on-error quarantine again"
                )


def refuse_too_many(out: Path, rejected: int, max_rejects: int | None, listed_in: str | Path) -> None:
    """Raise AnnotateError when more images were left out than may be."""
    if max_rejects is not None and rejected > max_rejects:
        raise AnnotateError(
            f"{out}: {rejected} images cannot be read and --max-rejects allows {max_rejects}; they are listed in "
            f"{listed_in}. Mend them, or allow more, and run again"
        )


def list_rejects(out: Path, images: int, max_rejects: int | None) -> list[Reject]:
    """Write the rejects of a store of so many images to `OUT.rejects.jsonl`, and return them.

    Raises AnnotateError when they are more than `max_rejects`, or all images.
    """
    parts = range(-(-images // map_store.PART_SIZE))
    rejects = [reject for part in parts for reject in read_rejects(map_store.rejects_path(out, part))]
    write_rejects(list_beside(out), rejects)
    refuse_too_many(out, len(rejects), max_rejects, list_beside(out))
    if len(rejects) == images:
        raise AnnotateError(f"{out}: none of the {images} images can be read, the first: {rejects[0]['reason']}")
    return rejects
