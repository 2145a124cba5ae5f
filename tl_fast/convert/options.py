"""The options of a conversion: how images are stored, and how the run goes about it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, TypeVar

from tl_fast.beton.layout import MAX_PAGE_SIZE, MIN_PAGE_SIZE, BetonError
from tl_fast.system.cores import usable_cores

PAGE_SIZE = 8 << 20  # ffcv's default, bytes

Options = TypeVar("Options")


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
    """What is stored for an image (`tl_fast.convert.image.prepare` and `.planes.prepare_planes` have the details).
    Raises BetonError for values out of range.

    quality: of JPEGs that must be encoded anew, 1 to 100. max_resolution: pixels of the longest side, to which larger
    images are shrunk; None: no limit. decode_check: decode every JPEG that is copied, to know that it is whole.
    row_index: add restart markers to JPEGs, so that regions can be cut out. bit_index: add an index of bit positions to
    JPEGs, so that our decoder passes over what is around a crop. exif: leave images as they lie in the file,
    or turn them as their EXIF orientation says. store: JPEGs, YUV 4:2:0 planes, or as each sample says. short_side:
    pixels of the shorter side, to which larger images are shrunk. max_pixels: of an image, height times width.
    budget_gb: with `auto`, 10^9 bytes that all images may take, as `tl_fast.convert.estimate.planes_within` shares them
    out.
    """

    quality: int = 90
    max_resolution: int | None = None
    decode_check: bool = True
    row_index: bool = False
    exif: Literal["ignore", "apply"] = "ignore"
    store: Literal["jpeg", "yuv420", "auto"] = "jpeg"
    short_side: int | None = None
    max_pixels: int | None = None
    budget_gb: float | None = None
    bit_index: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise BetonError(f"quality {self.quality}: must be 1 to 100")
        for name, least in (("max_resolution", 1), ("short_side", 1), ("max_pixels", 4)):
            if (value := getattr(self, name)) is not None and value < least:
                raise BetonError(f"{name} {value}: must be at least {least} pixel{'s' * (least > 1)}")
        if self.exif not in ("ignore", "apply"):
            raise BetonError(f"exif {self.exif!r}: must be ignore or apply")
        if self.store not in ("jpeg", "yuv420", "auto"):
            raise BetonError(f"store {self.store!r}: must be jpeg, yuv420 or auto")
        if (self.budget_gb is not None) != (self.store == "auto"):
            raise BetonError(
                f"store {self.store} and budget_gb {self.budget_gb}: auto needs a budget, the others have none"
            )
        if self.budget_gb is not None and not 0 < self.budget_gb < math.inf:
            raise BetonError(f"budget_gb {self.budget_gb}: must be more than 0")
        for name in ("row_index", "bit_index"):
            if getattr(self, name) and self.store == "yuv420":
                raise BetonError(f"{name} is for JPEGs, and store yuv420 makes none; leave one of them out")
        if self.row_index and self.bit_index:
            raise BetonError("row_index and bit_index: a file has one or the other; leave one of them out")

    def record(self) -> dict[str, Any]:
        """As a beton keeps them; the later ones only where they are used, so that other files keep their bytes."""
        later, unused = ("store", "short_side", "max_pixels", "budget_gb", "bit_index"), (None, "jpeg", False)
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in later or value not in unused}

    def as_planes(self) -> EncodeOptions:
        """The same for planes, which have no index."""
        return dataclasses.replace(self, store="yuv420", budget_gb=None, row_index=False, bit_index=False)

    def as_jpegs(self) -> EncodeOptions:
        """The same for JPEGs."""
        return dataclasses.replace(self, store="jpeg", budget_gb=None)

    def fits(self, height: int, width: int) -> bool:
        """Whether an image of this size is stored at its own size."""
        return (
            max(height, width) <= (self.max_resolution or math.inf)
            and min(height, width) <= (self.short_side or math.inf)
            and height * width <= (self.max_pixels or math.inf)
        )

    def stored_size(self, height: int, width: int, even: bool = False) -> tuple[int, int]:
        """(height, width) at which an image of this size is stored: never larger; the sides' ratio is kept as far as
        whole pixels allow.

        even: sides that change become even numbers, so that chroma of half the size covers the image exactly.
        """
        if self.fits(height, width):
            return height, width
        ratios = []  # numerator and denominator
        if self.max_resolution is not None:
            ratios.append((self.max_resolution, max(height, width)))
        if self.short_side is not None:
            ratios.append((self.short_side, min(height, width)))
        if self.max_pixels is not None:
            ratios.append((math.isqrt((self.max_pixels << 40) // (height * width)), 1 << 20))
        numerator, denominator = min(ratios, key=lambda ratio: ratio[0] / ratio[1])
        step = 2 if even else 1

        def scaled(side: int) -> int:
            steps = (2 * side * numerator + step * denominator) // (2 * step * denominator)  # rounded to the nearest
            return min(max(step * steps, step), side)

        sides = [scaled(height), scaled(width)]
        while self.max_pixels is not None and sides[0] * sides[1] > self.max_pixels:  # as rounding may have it
            longer = sides.index(max(sides))
            sides[longer] = max(sides[longer] - step, step)
        return sides[0], sides[1]


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
