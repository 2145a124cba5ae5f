"""The options of a conversion: how images are stored, and how the run goes about it."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeVar

from tl_fast.beton.layout import MAX_PAGE_SIZE, MIN_PAGE_SIZE, BetonError
from tl_fast.system.cores import usable_cores

PAGE_SIZE = 8 << 20  # ffcv's default, bytes

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """Which JPEG is stored for an image (`tl_fast.convert.image.prepare` has the details). Raises BetonError for values
    out of range.

    quality: of images that must be encoded anew, 1 to 100. max_resolution: pixels of the longest side, to which larger
    images are shrunk; None: no limit. decode_check: decode every JPEG that is copied, to know that it is whole.
    row_index: add restart markers, so that regions can be cut out. exif: leave images as they lie in the file, or turn
    them as their EXIF orientation says.
    """

    quality: int = 90
    max_resolution: int | None = None
    decode_check: bool = True
    row_index: bool = False
    exif: Literal["ignore", "apply"] = "ignore"

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise BetonError(f"quality {self.quality}: must be 1 to 100")
        if self.max_resolution is not None and self.max_resolution < 1:
            raise BetonError(f"max_resolution {self.max_resolution}: must be at least 1 pixel")
        if self.exif not in ("ignore", "apply"):
            raise BetonError(f"exif {self.exif!r}: must be ignore or apply")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How a beton is written. Raises BetonError for values out of range.

    workers: threads, by default one per CPU core that this process may use. processes: forked processes instead, which
    do not wait for each other's GIL. page_size: bytes, a power of two; no sample may be larger. on_error: `stop` at the
    first bad sample, or `quarantine`: leave it out and list it, a JSON object a line, in `PATH.rejects.jsonl`.
    max_rejects: how many samples may be left out; None: any number. overwrite: replace a file that is there. resume: go
    on from what an unfinished run left (`tl_fast.convert.partial_file`), if it left something.
    """

    workers: int = dataclasses.field(default_factory=usable_cores)
    processes: bool = False
    page_size: int = PAGE_SIZE
    on_error: Literal["stop", "quarantine"] = "stop"
    max_rejects: int | None = None
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        if not MIN_PAGE_SIZE <= self.page_size <= MAX_PAGE_SIZE or self.page_size & (self.page_size - 1):
            raise BetonError(
                f"page_size {self.page_size}: must be a power of two from {MIN_PAGE_SIZE} to {MAX_PAGE_SIZE}"
            )
        if self.workers < 1:
            raise BetonError(f"workers {self.workers}: must be at least 1")
        if self.on_error not in ("stop", "quarantine"):
            raise BetonError(f"on_error {self.on_error!r}: must be stop or quarantine")
        if self.max_rejects is not None and (self.max_rejects < 0 or self.on_error == "stop"):
            raise BetonError(f"max_rejects {self.max_rejects}: must be 0 or more, and needs on_error quarantine")


def take_options(kind: type[Options], values: dict[str, Any]) -> Options:
    """A `kind`, a dataclass, made of those of `values` that are named as its fields; they are removed from `values`.
    None stands for the default.
    """
    names = [field.name for field in dataclasses.fields(kind) if field.name in values]
    options = {name: values.pop(name) for name in names}
    return kind(**{name: value for name, value in options.items() if value is not None})
