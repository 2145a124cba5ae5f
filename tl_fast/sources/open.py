"""Opens a data set: tells from its paths which kind of source it is, and lists it.

A `Source` is listed once, when it is opened (ids, labels, sizes). Its images are then read from any thread, in any
order, without unpacking.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from tl_fast.sources.source import Source, SourceError, read_class_names

_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_URL = re.compile(r"^([a-z0-9+.-]+://|pipe:|::)", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_SHARDS = ("tar", "parquet")  # kinds of files that hold many images; also how their names end


def add_source_options(group: argparse._ArgumentGroup) -> None:
    """Add the command-line options that `open_source` takes; every command that reads images has the same."""
    group.add_argument(
        "--labels", type=Path, metavar="FILE", help="of the ImageNet validation tar: its devkit, or a list"
    )
    group.add_argument("--class-names", type=Path, metavar="FILE", help="in label order, one a line or a JSON list")
    group.add_argument("--image-column", metavar="NAME", help="of parquet files (default: found)")
    group.add_argument("--label-column", metavar="NAME", help="of parquet files (default: found)")


def open_source(
    paths: Sequence[Path | str] | Path | str,
    *,
    labels: Path | None = None,
    class_names: Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    unlabelled: bool = False,
) -> Source:
    """List the data set at `paths`: an image folder, ImageNet tars, WebDataset shards or parquet shards (see
    docs/converting.md).

    paths: a folder, files, globs or WebDataset's brace patterns ('train-{000..146}.tar'). labels: the classes of
    ImageNet's validation tar (devkit, or a list). class_names: file of names, one per line or a JSON list, in the order
    of the labels; without it names come from the data, or else from `class_names.txt` or `.json` beside the shards.
    image_column, label_column: of parquet files. unlabelled: images without labels are accepted, such as a flat folder.
    Raises SourceError naming the file at fault and the remedy.
    """
    files = expand_paths([paths] if isinstance(paths, (str, Path)) else paths)
    kind, files = _kind(files)
    options = (
        ("--labels", labels, "tar"),
        ("--image-column", image_column, "parquet"),
        ("--label-column", label_column, "parquet"),
    )
    for option, given, its_kind in options:
        if given is not None and kind != its_kind:
            raise SourceError(f"{files[0]}: {option} {given} is for {its_kind} files, this is a {kind}")
    names = None if class_names is None else read_class_names(class_names)
    # Imported here: only parquet files need pyarrow, and only ImageNet's devkit needs scipy.
    if kind == "folder":
        from tl_fast.sources.image_folder import ImageFolder

        return ImageFolder(Path(files[0]), class_names=names, unlabelled=unlabelled)
    if kind == "tar":
        from tl_fast.sources.imagenet_tar import open_tars

        return open_tars(files, labels=labels, class_names=names)
    try:
        from tl_fast.sources.parquet_files import ParquetSource
    except ModuleNotFoundError as error:
        raise SourceError(
            f"{files[0]}: reading parquet needs {error.name}, which is not installed; pip install pyarrow"
        ) from error
    return ParquetSource(files, image_column=image_column, label_column=label_column, class_names=names)


def _expand_braces(pattern: str) -> list[str]:
    """'a{00..02}' → a00, a01, a02; '{x,y}b' → xb, yb; several multiply."""
    pieces = _BRACES.split(pattern)  # text, inside, text, inside, ..., text
    choices: list[Sequence[str]] = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            choices.append([piece])
        elif numbers := _RANGE.fullmatch(piece):
            first, last = (int(number) for number in numbers.groups())
            if abs(last - first) >= 1_000_000:
                raise SourceError(f"{pattern}: {{{piece}}} stands for {abs(last - first) + 1:,} files")
            padded = any(re.match(r"-?0\d", number) for number in numbers.groups())
            width = max(map(len, numbers.groups())) if padded else 0
            step = 1 if last >= first else -1
            choices.append([f"{number:0{width}d}" for number in range(first, last + step, step)])
        else:
            choices.append(piece.split(",") if "," in piece else [f"{{{piece}}}"])
    return ["".join(parts) for parts in itertools.product(*choices)]


def expand_paths(paths: Sequence[Path | str]) -> list[str]:
    """The files and folders that `paths` name, each glob's in sorted order.

    Raises SourceError for what is missing, remote or named twice.
    """
    files: list[str] = []
    for pattern in map(os.fspath, paths):
        if _URL.match(pattern):
            raise SourceError(f"{pattern}: only files on this machine can be read; copy them here first")
        for path in [pattern] if os.path.exists(pattern) else _expand_braces(pattern):
            if os.path.exists(path):
                files.append(path)
                continue
            matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
            if not matches:
                origin = "" if path == pattern else f" (one of {pattern})"
                problem = "no file fits this pattern" if glob.has_magic(path) else "no such file or folder"
                raise SourceError(f"{path}{origin}: {problem}")
            files += matches
    if not files:
        raise SourceError("no paths given: name a folder of images, tar files or parquet files")
    seen: dict[str, str] = {}
    for path in files:
        if (first := seen.setdefault(os.path.realpath(path), path)) is not path:
            raise SourceError(f"{path}: given twice (also as {first})")
    return files


def _kind(paths: list[str]) -> tuple[str, list[str]]:
    """'folder', 'tar' or 'parquet', and the files of that kind."""
    folders = [path for path in paths if os.path.isdir(path)]
    if folders:
        if len(paths) > 1:
            raise SourceError(
                f"{folders[0]}: one of {len(paths)} paths is a folder; give one folder, or files of one kind"
            )
        return _folder_kind(folders[0])
    kinds = {path: next((kind for kind in _SHARDS if path.lower().endswith("." + kind)), None) for path in paths}
    for path, kind in kinds.items():
        if path.lower().endswith(_COMPRESSED):
            raise SourceError(
                f"{path}: compressed, nothing in it can be read without all before it; decompress it first (gunzip,"
                " unzstd)"
            )
        if kind is None:
            raise SourceError(
                f"{path}: not a kind of data set known here; give a folder with one folder per class, .tar or .parquet"
                " files"
            )
        if kind != kinds[paths[0]]:
            raise SourceError(f"{paths[0]} and {path} are of different kinds; give files of one kind")
    return kinds[paths[0]], paths


def _folder_kind(folder: str) -> tuple[str, list[str]]:
    """The same for one folder: of images, or of the shards of one data set."""
    names = sorted(os.listdir(folder))
    shards = {kind: [name for name in names if name.lower().endswith("." + kind)] for kind in _SHARDS}
    present = [kind for kind, files in shards.items() if files]
    if not present:
        if compressed := [name for name in names if name.lower().endswith(_COMPRESSED)]:
            raise SourceError(
                f"{os.path.join(folder, compressed[0])}: compressed; decompress it first (gunzip, unzstd) and name the"
                " .tar"
            )
        return "folder", [folder]
    folders = [name for name in names if os.path.isdir(os.path.join(folder, name))]
    if len(present) == 2 or folders:
        other = shards["parquet"][0] if len(present) == 2 else folders[0] + "/"
        raise SourceError(
            f"{folder}: holds {shards[present[0]][0]} and {other}; name the one that is meant (or a pattern, as"
            " '*.tar')"
        )
    files = shards[present[0]]
    families: dict[str, list[str]] = {}
    for name in files:  # 'train-00003-of-00294-0af3b5c2d1e4f697.parquet' → 'train-#-of-#'
        family = re.sub(r"\d+", "#", re.sub(r"-[0-9a-f]{16}$", "", name[: name.rindex(".")]))
        families.setdefault(family, []).append(name)
    if len(families) > 1:
        first, second = itertools.islice(families.values(), 2)
        raise SourceError(
            f"{folder}: holds {first[0]} and {second[0]}, which look like different sets; name one, as in"
            f" '{folder}/PREFIX*'"
        )
    totals = {int(total.group(1)) for name in files if (total := re.search(r"-of-(\d+)[-.]", name))}
    if totals and totals != {len(files)}:
        raise SourceError(
            f"{folder}: has {len(files)} of {max(totals)} shards; fetch the rest, or name the files to take"
        )
    return present[0], [os.path.join(folder, name) for name in files]
